"""What the commands of `tersor` do; cli.py reads their arguments.

Every command imports what it needs when it runs, and checks before that what needs no import.
"""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.errors import TersorError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping

    from rich.console import Console

    from tersor.layerwise import Solver
    from tersor.qweight import Scheme
    from tersor.report import Report


def quantize(args: argparse.Namespace) -> None:
    _check_output(args.out)

    from tersor.solvers import SOLVERS

    solver = _solver(args, SOLVERS)

    from tersor.pipeline import quantize_checkpoint

    report = quantize_checkpoint(
        args.model, args.out, scheme=_scheme(args, args.bits), method=solver, **_rest(args)
    )
    _show(args, report, f"{report.bits_per_weight:.2f} bits per quantized weight")


def prune(args: argparse.Namespace) -> None:
    _check_output(args.out)
    if args.structured is not None:
        _shrink(args)
        return
    for option in STRUCTURED:
        if getattr(args, option) is not None:
            raise TersorError(f"--{option} is of --structured; leave it out")
    args.method = args.method or "sparsegpt"
    if args.quantize is None:
        for option in ("group", "asymmetric", "activations"):
            if getattr(args, option, None):
                raise TersorError(f"--{option} is of a grid; add --quantize BITS, or leave it out")

    from tersor.solvers import PRUNERS
    from tersor.sparsity import Sparsity

    sparsity = Sparsity.parse(args.pattern) if args.pattern else Sparsity(args.sparsity)
    if args.per and args.pattern:
        raise TersorError(
            "--per is what --sparsity is kept over; a pattern is of rows: leave it out"
        )
    solver = _solver(args, PRUNERS, sparsity=sparsity)

    from tersor.pipeline import prune_checkpoint

    scheme = _scheme(args, args.quantize) if args.quantize else None
    report = prune_checkpoint(
        *(args.model, args.out),
        method=solver,
        scheme=scheme,
        allocation=args.allocation,
        **_rest(args),
    )
    result = f"{100 * report.sparsity:.1f} % zeros in {len(report.layers)} linears"
    if scheme:
        result += f", {report.bits_per_weight:.2f} bits per weight"
    _show(args, report, result)


STRUCTURED = ("importance", "multiple", "update")  # options of `prune --structured` alone
UNSTRUCTURED = ("method", "quantize", "group", "asymmetric", "activations", "ignore", "sequential")


def _shrink(args: argparse.Namespace) -> None:
    others = [*UNSTRUCTURED, *(name for name in args.settings if name != "damp")]
    for option in others:
        if getattr(args, option, None) not in (None, False, []):
            raise TersorError(
                f"--{option.replace('_', '-')} changes nothing for --structured; leave it out"
            )
    settings = {name: getattr(args, name) for name in (*STRUCTURED, "damp")}
    settings = {name: value for name, value in settings.items() if value is not None}

    rest = _rest(args)
    del rest["ignore"], rest["sequential"]
    report = _structured(args)(args.model, args.out, **args.structured, **settings, **rest)
    parts = report.structure or {}
    before, after = parts["parameters_before"], parts["parameters_after"]
    _show(args, report, f"{before / 1e6:.1f} -> {after / 1e6:.1f} million parameters")


# What is cut in a run of its own -> options of --structured that change nothing there.
ALONE = {"hidden": ("importance",), "experts": ("multiple", "update", "damp")}


def _structured(args: argparse.Namespace) -> Callable[..., Report]:
    """What cuts what --structured names, if that goes together."""
    alone = next((what for what in ALONE if what in args.structured), None)
    if alone is None:
        from tersor.shrink import shrink_checkpoint

        return shrink_checkpoint
    if len(args.structured) > 1:
        raise TersorError(
            f"{alone} is cut in a run of its own, since that changes what all else is calibrated "
            "on; cut the others from its output, or it from theirs"
        )
    for option in ALONE[alone]:
        if getattr(args, option) is not None:
            raise TersorError(f"--{option} changes nothing for {alone}; leave it out")
    if alone == "experts":
        from tersor.experts import drop_experts

        return drop_experts

    from tersor.slicing import slice_checkpoint

    return slice_checkpoint


def _scheme(args: argparse.Namespace, bits: int) -> Scheme:
    from tersor.qweight import ActSpec, QSpec, Scheme

    group = getattr(args, "group", None if bits == 8 and args.activations else 128)
    return Scheme(
        QSpec(bits, group, symmetric=not args.asymmetric), ActSpec() if args.activations else None
    )


def _rest(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that quantize and prune have in common."""
    from tersor.calibrate import Calibration
    from tersor.kernels import thread_count

    thread_count()  # or TersorError
    calibration = None
    if args.calibration:
        calibration = Calibration(
            tuple(args.calibration),
            samples=args.samples,
            seq_len=args.seq_len,
            seed=args.seed,
            bos=args.bos,
        )
    return {
        "calibration": calibration,
        "ignore": args.ignore,
        "sequential": args.sequential,
        "strict": args.strict,
    }


def _show(args: argparse.Namespace, report: Report, result: str) -> None:
    from tersor.report import table

    out = _console()
    if report.layers:
        out.print(table(report))
    for name, reason in report.departures.items():
        out.print(f"not as asked: {name}: {reason}", highlight=False)
    out.print(
        f"{args.out}: {report.bytes_before / 1e6:.1f} MB -> {report.bytes_after / 1e6:.1f} MB, "
        f"{result}; details in tersor_report.json",
        highlight=False,
    )


def _check_output(out: str) -> None:
    """The commonest mistakes, before seconds of imports. Beside a folder that an unfinished run has
    left, only the writer can tell."""
    path = Path(os.path.abspath(out))
    if not path.name:
        raise TersorError(f"--out {out} is the root of all files; name a new folder")
    if os.path.lexists(out) and not path.with_name(f"{path.name}.partial").exists():
        raise TersorError(f"{out} exists already; remove it or choose another output folder")


def _solver(
    args: argparse.Namespace, solvers: Mapping[str, Callable[..., Solver]], **given: Any
) -> Solver:
    """The method with the settings that were given; whichever a method lacks is refused."""
    from dataclasses import fields

    if args.method not in solvers:
        names = " or ".join(solvers)
        raise TersorError(f"--method {args.method} is unknown; use {names}")
    solver: Any = solvers[args.method]
    settings = {name: getattr(args, name) for name in args.settings}
    settings = {name: value for name, value in settings.items() if value is not None}
    for name in settings.keys() - {field.name for field in fields(solver)}:
        option = "--" + name.replace("_", "-")
        raise TersorError(f"{option} changes nothing for --method {args.method}; leave it out")
    made: Solver = solver(**given, **settings)
    return made


def evaluate(args: argparse.Namespace) -> None:
    from tersor.corpus import read_text

    text = read_text(args.text)

    from tersor import evaluate as measure
    from tersor.calibrate import load_tokenizer

    names = [args.folder] + ([args.baseline] if args.baseline else [])
    for name in names:
        _check_config(name)
    tokenizer = load_tokenizer(Path(args.folder))
    models = {name: _load_model(name) for name in names}
    length = _window_length(models.values(), args.seq_len)
    windows = measure.text_windows(text, tokenizer, length, args.bos)[: args.samples]
    qualities = measure.evaluate(models, windows, args.baseline)
    speeds = measure.measure_speed(models, windows[:1]) if args.speed else None
    if args.json:
        print(measure.to_json(qualities, speeds), end="")
        return
    out = _console()
    count = len(windows)
    out.print(f"{windows.numel()} tokens in {count} window{'s' * (count > 1)} of {length}")
    out.print(measure.table(qualities))
    for name, speed in (speeds or {}).items():
        out.print(
            f"{name}: prefill {speed.prefill:.0f} tokens/s ({speed.prompt} tokens), decode "
            f"{speed.decode:.1f} tokens/s ({speed.generated} tokens), "
            f"{speed.weights / 1e6:.1f} MB of weights, {speed.resident / 1e6:.0f} MB resident",
            highlight=False,
        )


def inspect(args: argparse.Namespace) -> None:
    from tersor.inspection import inspect as look

    for part in look(args.folder):
        _console().print(part, highlight=False)


def generate(args: argparse.Namespace) -> None:
    import torch
    from transformers import TextStreamer

    from tersor.calibrate import load_tokenizer
    from tersor.evaluate import check_vocabulary

    _check_config(args.folder)
    tokenizer = load_tokenizer(Path(args.folder))
    prompt = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
    if not prompt["input_ids"].numel():
        raise TersorError("the prompt has no tokens; give some text to go on from")
    model = _load_model(args.folder)
    check_vocabulary(args.folder, model, prompt["input_ids"])
    _check_room(model, prompt["input_ids"].shape[1], args.max_tokens)
    torch.manual_seed(args.seed)
    draw = (
        {"do_sample": True, "temperature": args.temperature}
        if args.temperature
        else {"do_sample": False}
    )
    model.generate(
        **prompt,
        max_new_tokens=args.max_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **draw,
    )


def _check_room(model: Any, prompt: int, more: int) -> None:
    from tersor.evaluate import position_limit

    limit = position_limit(model)
    if limit is None or prompt + more <= limit:
        return
    fix = f"use --max-tokens {limit - prompt} or less" if prompt < limit else "shorten the prompt"
    raise TersorError(
        f"the prompt and --max-tokens make {prompt} + {more} tokens, more than the {limit} "
        f"positions of the model; {fix}"
    )


def kernels(args: argparse.Namespace) -> None:
    import torch
    from rich.table import Table

    from tersor import kernels as native
    from tersor import sparse
    from tersor.qweight import ActSpec, QSpec, Scheme
    from tersor.sparsity import Sparsity

    threads = native.thread_count()
    where = f"on {threads} thread{'s' * (threads > 1)}"
    shown = Table()
    for head in ("kernel", "isa", "layout", "priority", "on this machine"):
        shown.add_column(head)
    reasons: dict[str, str | None] = {}
    sentence = f"The kernels, in the order in which they are tried; they run {where}."
    if args.shape:
        m, n, k = args.shape
        spec = QSpec(args.bits, args.group, symmetric=not args.asymmetric)
        activation = ActSpec() if args.activations else None
        dtype, pattern = getattr(torch, args.dtype), sparse.PATTERN if args.pattern else (0, 0)
        if args.pattern:
            Sparsity.parse(args.pattern).check(k)
        reasons = dict(native.explain(m, n, k, spec, activation, dtype, pattern=pattern))
        shown.add_column("this shape")
        serving = next((name for name, reason in reasons.items() if reason is None), None)
        grid = "row" if spec.group is None else f"group of {spec.group}"
        sentence = (
            f"{serving or 'No kernel of this machine'} serves {m} x {n} x {k}: "
            f"{Scheme(spec, activation)}, a scale{' and zero point' * args.asymmetric} per {grid}, "
            f"{args.dtype}, {where}."
        )
        if args.pattern and sparse.serves(n, k, spec, activation):
            found = sparse.measure(m, n, k, spec, activation, dtype)
            sentence += (
                f" Measured: {1e3 * found.sparse:.3f} ms without the zeros, "
                f"{1e3 * found.dense:.3f} ms with them, {found.gain:.2f} times as fast."
            )
    first = True
    for kernel in native.table():
        row = [kernel.name, kernel.isa, kernel.layout, str(kernel.priority)]
        row.append(kernel.unavailable or "yes")
        if args.shape:
            reason = reasons[kernel.name]
            row.append(reason or ("serves" if first else "would serve after those above"))
            first = first and reason is not None
        shown.add_row(*row)
    out = _console()
    out.print(sentence, highlight=False)
    out.print(shown)


def demo(args: argparse.Namespace) -> None:
    if args.json and (args.json.is_dir() or not args.json.resolve().parent.is_dir()):
        raise TersorError(f"--json {args.json} cannot be written; name a file in a folder there is")

    from tersor.demo import run
    from tersor.kernels import thread_count

    thread_count()  # or TersorError
    run(args.json)


# --- what several commands need ------------------------------------------------------------------


def _console() -> Console:
    """On a terminal as wide as it is; in a file or pipe, wide enough for every table."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _check_config(folder: str) -> None:
    """Whether it is of a causal language model, before anything large is loaded, and before the
    tokenizer: transformers reads config.json for that too, and would blame the tokenizer."""
    import transformers

    from tersor.checkpoint import Checkpoint

    Checkpoint.open(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise _refused(folder, error) from error
    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        if cls is not None and not cls.can_generate():
            raise TersorError(
                f"{folder} holds a {name}, which does not predict the next token; give a causal "
                "language model"
            )


def _load_model(folder: str) -> Any:
    """A quantized folder on tersor's kernels; any other as transformers has it, but whole."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from tersor.checkpoint import Checkpoint
    from tersor.kernels import thread_count
    from tersor.loading import load

    thread_count()  # or TersorError
    if "quantization_config" in Checkpoint.open(folder).config:
        return load(folder)
    disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            torch_dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # named below
            output_loading_info=True,
        )
    except Exception as error:  # whatever a config.json that it cannot use makes it raise
        raise _refused(folder, error) from error
    wrong = [f"no tensor for {name}" for name in sorted(info["missing_keys"])]
    wrong += [f"{name} in another shape" for name, *_ in sorted(info["mismatched_keys"])]
    if wrong:  # transformers has put random numbers in their place
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise TersorError(
            f"{folder} has {wrong[0]}{more}; its files are incomplete, or of another model than "
            "config.json: download it again"
        )
    return model.eval()


def _refused(folder: str, error: Exception) -> TersorError:
    cause = textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")
    return TersorError(
        f"transformers cannot load {folder} ({cause}); correct its config.json, or download the "
        "model again"
    )


def _window_length(models: Iterable[Any], asked: int | None) -> int:
    from tersor.calibrate import DEFAULT_SEQ_LEN
    from tersor.evaluate import context_of

    limit = min(filter(None, map(context_of, models)), default=None)
    if asked and limit and asked > limit:
        raise TersorError(
            f"--seq-len {asked} is beyond the model's {limit} positions; use {limit} or less"
        )
    return asked or min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN)
