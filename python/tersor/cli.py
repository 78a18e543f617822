"""The command `tersor`. It is argparse: the standard library's parser is enough for seven commands,
starts at once, and is one dependency less.

Every command imports what it needs when it runs, so that --help does not wait for torch.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tersor.errors import TersorError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.console import Console

    from tersor.layerwise import Solver

EXAMPLES = {
    "quantize": "tersor quantize ./Llama-3.2-1B --out ./Llama-3.2-1B-INT4 --calibration text.txt",
    "eval": "tersor eval ./Llama-3.2-1B-INT4 --baseline ./Llama-3.2-1B --text held-out.txt",
    "inspect": "tersor inspect ./Llama-3.2-1B-INT4",
    "generate": 'tersor generate ./Llama-3.2-1B-INT4 "Once upon a time"',
    "kernels": "tersor kernels --shape 1 4096 4096 --activations int8",
    "demo": "tersor demo",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code: 0, 2 for bad input, 1 for what ought not to happen, 130 when
    interrupted."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # tersor says itself what is wrong
    warnings.filterwarnings("ignore", module="transformers")
    if not sys.stderr.isatty():  # transformers' bars, which it draws into logs as well
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    args = argparse.Namespace(debug=False, stopped="stopped")
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
    except KeyboardInterrupt:
        return _fail(args.stopped, 130)
    except BrokenPipeError:  # the reader of a pipe, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            raise
        if isinstance(error, TersorError):
            return _fail(f"error: {error}", 2)
        if isinstance(error, OSError):
            return _fail(f"error: {error.filename or 'input or output'}: {error.strerror}", 2)
        kind = type(error).__name__
        return _fail(f"internal error: {kind}: {error}; run again with --debug and report it", 1)
    return 0


def _fail(message: str, code: int) -> int:
    print("tersor:", " ".join(message.split()), file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """Errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"tersor: error: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="tersor", description="Compress language models and run the result.")
    parser.add_argument(
        "--version", action="version", version=f"tersor {metadata.version('tersor')}"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str, stopped: str = "stopped") -> Parser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example: {EXAMPLES[name]}",
        )
        sub.add_argument("--debug", action="store_true", help="show a traceback for any error")
        sub.set_defaults(run=run, stopped=stopped)
        return sub

    add = command(
        "quantize",
        quantize,
        "quantize a Hugging Face checkpoint",
        stopped="stopped; the same command again goes on after the last whole block",
    ).add_argument
    add("model", metavar="MODEL", help="folder with config.json and safetensors")
    add("--out", metavar="DIR", required=True, help="folder to make")
    add("--method", default="gptq", metavar="NAME", help="gptq or rtn; default: gptq")
    add("--bits", type=int, default=4, choices=(2, 3, 4, 8), help="of a weight; default: 4")
    add(
        "--group",
        type=_group,
        metavar="N",
        default=argparse.SUPPRESS,
        help="columns that share a scale, or 'row'; default: 128, or row for W8A8",
    )
    add("--asymmetric", action="store_true", help="store a zero point for each group")
    add(
        "--act-order",
        action="store_true",
        default=None,
        help="gptq: the most active columns first",
    )
    add("--damp", type=float, metavar="D", help="gptq: damping of the inputs; default: 0.01")
    add(
        "--clip",
        action=argparse.BooleanOptionalAction,
        help="search each group's range for the least error; default: for gptq",
    )
    add("--sequential", action="store_true", help="observe each input after those before it")
    add("--activations", choices=("int8",), help="quantize activations too, in the call")
    add(
        "--calibration",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text to calibrate on: files of plain text, or FILE.jsonl:FIELD",
    )
    add("--samples", type=_whole(1), default=128, metavar="N", help="windows of text; default: 128")
    add(
        "--seq-len",
        type=_whole(2),
        metavar="N",
        help="tokens in a window; default: 2048, or the model's context if that is less",
    )
    add("--seed", type=_whole(0), default=0, help="which parts of the text are taken; default: 0")
    add(
        "--bos",
        default="auto",
        choices=("auto", "always", "never"),
        help="begin windows with the BOS token; default: auto, as the tokenizer does",
    )
    add("--ignore", nargs="+", default=[], metavar="GLOB", help="modules to leave as they are")
    add("--strict", action="store_true", help="fail if a module cannot be treated as asked")

    add = command("eval", evaluate, "measure the quality of a model on a text").add_argument
    add("folder", metavar="DIR", help="model, quantized or not")
    add("--baseline", metavar="MODEL", help="the original, to compare with")
    add(
        "--text",
        metavar="FILE",
        required=True,
        help="text that no one calibrated on: plain text, or FILE.jsonl:FIELD",
    )
    add(
        "--seq-len", type=_whole(2), metavar="N", help="tokens in a window; default: as in quantize"
    )
    add("--samples", type=_whole(1), metavar="N", help="windows; default: all of the text")
    add("--bos", action="store_true", help="begin each window with the BOS token")
    add("--speed", action="store_true", help="measure tokens per second too")
    add("--json", action="store_true", help="print JSON instead of a table")

    add = command(
        "inspect", inspect, "show what is in a folder and what would serve it"
    ).add_argument
    add("folder", metavar="DIR")

    add = command("generate", generate, "continue a prompt").add_argument
    add("folder", metavar="DIR", help="model, quantized or not")
    add("prompt", metavar="PROMPT")
    add("--max-tokens", type=_whole(1), default=100, metavar="N", help="default: 100")
    add(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="draw tokens at this temperature; default: 0, always the likeliest",
    )
    add("--seed", type=_whole(0), default=0, help="of the draw; default: 0")

    add = command("kernels", kernels, "list the kernels, and which one serves a shape").add_argument
    add(
        "--shape",
        nargs=3,
        type=_whole(1),
        metavar=("M", "N", "K"),
        help="tokens, output and input features of a linear",
    )
    add("--bits", type=int, default=4, choices=(2, 3, 4, 8), help="default: 4")
    add("--group", type=_group, default=128, metavar="N", help="or 'row'; default: 128")
    add("--asymmetric", action="store_true")
    add("--activations", choices=("int8",))
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))

    add = command(
        "demo", demo, "train a small model, quantize it, and show what it costs and gains"
    ).add_argument
    add("--json", type=Path, metavar="FILE", help="write all figures to a file")
    return parser


def _group(text: str) -> int | None:
    if text == "row":
        return None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of columns nor 'row'")


def _whole(least: int) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from `least` to what an int64 holds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(
                f"give a whole number from {least} to 2**63 - 1, not {text!r}"
            )
        return value

    return parse


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"give 0 or a positive number, not {text!r}")
    return value


# --- the commands --------------------------------------------------------------------------------


def quantize(args: argparse.Namespace) -> None:
    from tersor.calibrate import Calibration
    from tersor.pipeline import quantize_checkpoint
    from tersor.qweight import ActSpec, QSpec, Scheme
    from tersor.report import table

    if not Path(args.out).resolve().name:
        raise TersorError(f"--out {args.out} is the root of all files; name a new folder")
    group = getattr(args, "group", None if args.bits == 8 and args.activations else 128)
    report = quantize_checkpoint(
        args.model,
        args.out,
        scheme=Scheme(
            QSpec(args.bits, group, symmetric=not args.asymmetric),
            ActSpec() if args.activations else None,
        ),
        method=_solver(args),
        calibration=Calibration(
            tuple(args.calibration),
            samples=args.samples,
            seq_len=args.seq_len,
            seed=args.seed,
            bos=args.bos,
        )
        if args.calibration
        else None,
        ignore=args.ignore,
        sequential=args.sequential,
        strict=args.strict,
    )
    out = _console()
    out.print(table(report))
    for name, reason in report.departures.items():
        out.print(f"not as asked: {name}: {reason}", highlight=False)
    out.print(
        f"{args.out}: {report.bytes_before / 1e6:.1f} MB -> {report.bytes_after / 1e6:.1f} MB, "
        f"{report.bits_per_weight:.2f} bits per quantized weight; details in tersor_report.json",
        highlight=False,
    )


def _solver(args: argparse.Namespace) -> Solver:
    """The method with the settings that were given; whichever a method lacks is refused."""
    from dataclasses import fields

    from tersor.solvers import SOLVERS

    if args.method not in SOLVERS:
        names = " or ".join(SOLVERS)
        raise TersorError(f"--method {args.method} is unknown; use {names}")
    solver = SOLVERS[args.method]
    settings = {name: getattr(args, name) for name in ("act_order", "damp", "clip")}
    given = {name: value for name, value in settings.items() if value is not None}
    for name in given.keys() - {field.name for field in fields(solver)}:
        option = "--" + name.replace("_", "-")
        raise TersorError(f"{option} changes nothing for --method {args.method}; leave it out")
    return solver(**given)


def evaluate(args: argparse.Namespace) -> None:
    from tersor import evaluate as measure
    from tersor.calibrate import load_tokenizer
    from tersor.corpus import read_text

    text = read_text(args.text)
    tokenizer = load_tokenizer(Path(args.folder))
    names = [args.folder] + ([args.baseline] if args.baseline else [])
    models = {name: _load_model(name) for name in names}
    length = _window_length(models.values(), args.seq_len)
    windows = measure.text_windows(text, tokenizer, length, args.bos)[: args.samples]
    qualities = measure.evaluate(models, windows, args.baseline)
    speeds = measure.measure_speed(models, windows[:1]) if args.speed else None
    if args.json:
        print(measure.to_json(qualities, speeds), end="")
        return
    out = _console()
    out.print(measure.table(qualities, f"{windows.numel()} tokens, windows of {length}"))
    for name, speed in (speeds or {}).items():
        out.print(
            f"{name}: prefill {speed.prefill:.0f} tokens/s, decode {speed.decode:.1f} tokens/s, "
            f"{speed.weights / 1e6:.1f} MB of weights, {speed.resident / 1e6:.0f} MB resident"
        )


def inspect(args: argparse.Namespace) -> None:
    from tersor.inspection import inspect as look

    for part in look(args.folder):
        _console().print(part, highlight=False)


def generate(args: argparse.Namespace) -> None:
    import torch
    from transformers import TextStreamer

    from tersor.calibrate import load_tokenizer

    tokenizer = load_tokenizer(Path(args.folder))
    model = _load_model(args.folder)
    torch.manual_seed(args.seed)
    draw = (
        {"do_sample": True, "temperature": args.temperature}
        if args.temperature
        else {"do_sample": False}
    )
    model.generate(
        **tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False),
        max_new_tokens=args.max_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **draw,
    )


def kernels(args: argparse.Namespace) -> None:
    import torch
    from rich.table import Table

    from tersor import kernels as native
    from tersor.qweight import ActSpec, QSpec, Scheme

    shown = Table()
    for head in ("kernel", "isa", "layout", "priority", "on this machine"):
        shown.add_column(head)
    reasons: dict[str, str | None] = {}
    if args.shape:
        m, n, k = args.shape
        spec = QSpec(args.bits, args.group, symmetric=not args.asymmetric)
        activation = ActSpec() if args.activations else None
        dtype = getattr(torch, args.dtype)
        reasons = dict(native.explain(m, n, k, spec, activation, dtype))
        grid = "per row" if spec.group is None else f"g{spec.group}"
        grid += " asymmetric" if args.asymmetric else ""
        shown.add_column(f"for {m}x{n}x{k}, {Scheme(spec, activation)} {grid}, {args.dtype}")
    first = True
    for kernel in native.table():
        row = [kernel.name, kernel.isa, kernel.layout, str(kernel.priority)]
        row.append(kernel.unavailable or "yes")
        if args.shape:
            reason = reasons[kernel.name]
            row.append(reason or ("serves" if first else "would serve after those above"))
            first = first and reason is not None
        shown.add_row(*row)
    _console().print(shown)


def demo(args: argparse.Namespace) -> None:
    from tersor.demo import run

    run(args.json)


def _console() -> Console:
    """On a terminal as wide as it is; in a file or pipe, wide enough for every table."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _load_model(folder: str) -> Any:
    """A quantized folder on tersor's kernels; any other as transformers has it, but whole."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from tersor.checkpoint import Checkpoint
    from tersor.loading import load

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
        raise TersorError(
            f"transformers cannot load {folder} ({type(error).__name__}: {error}); correct its "
            "config.json, or download the model again"
        ) from error
    wrong = [f"no tensor for {name}" for name in sorted(info["missing_keys"])]
    wrong += [f"{name} in another shape" for name, *_ in sorted(info["mismatched_keys"])]
    if wrong:  # transformers has put random numbers in their place
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise TersorError(
            f"{folder} has {wrong[0]}{more}; its files are incomplete, or of another model than "
            "config.json: download it again"
        )
    return model.eval()


def _window_length(models: Iterable[Any], asked: int | None) -> int:
    from tersor.calibrate import DEFAULT_SEQ_LEN

    limits = [getattr(model.config, "max_position_embeddings", None) for model in models]
    context = min(filter(None, limits), default=None)
    if asked and context and asked > context:
        raise TersorError(
            f"--seq-len {asked} is beyond the model's {context} positions; use {context} or less"
        )
    return asked or min(DEFAULT_SEQ_LEN, context or DEFAULT_SEQ_LEN)
