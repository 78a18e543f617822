"""What a model is worth and how fast it is; what a folder and a machine have."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.commands.opening import check_config, console, load_model
from tersor.errors import TersorError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping, Sequence

    from rich.table import Table
    from torch import Tensor

    from tersor.evaluate import Speed
    from tersor.sparse import Measured


def evaluate(args: argparse.Namespace) -> int:
    """1 where something could not be measured; the rest is printed all the same."""
    from tersor.corpus import read_text

    text = read_text(args.text)
    tasks = _tasks(args.tasks, text)

    from tersor import evaluate as measure
    from tersor.calibrate import load_tokenizer

    names = [args.folder] + ([args.baseline] if args.baseline else [])
    for name in names:
        check_config(name)
    tokenizer = load_tokenizer(Path(args.folder))
    kept = "" if args.outliers is None else f" (outliers beyond {args.outliers:g})"
    models = {args.folder + kept: load_model(args.folder, args.outliers)}
    models |= {name: load_model(name) for name in names[1:]}
    length = _window_length(models.values(), args.seq_len)
    windows = measure.text_windows(text, tokenizer, length, args.bos)[: args.samples]
    qualities = measure.evaluate(models, windows, args.baseline)
    out = console()
    if not args.json:
        count = len(windows)
        out.print(f"{windows.numel()} tokens in {count} window{'s' * (count > 1)} of {length}")
        out.print(measure.table(qualities))
    failed: dict[str, dict[str, str]] = {name: {} for name in models}
    speeds = _speeds(args, models, windows, failed) if args.speed else {}
    if not args.json:
        for name, speed in speeds.items():
            out.print(
                f"{name}: prefill {speed.prefill:.0f} tokens/s ({speed.prompt} tokens), decode "
                f"{speed.decode:.1f} tokens/s ({speed.generated} tokens), "
                f"{speed.weights / 1e6:.1f} MB of weights, "
                f"{speed.peak / 1e6:.0f} MB resident at most",
                highlight=False,
            )
    scores, shown = _scores(args, tasks, models, tokenizer, failed) if args.tasks else ({}, None)
    if args.json:
        print(measure.to_json(qualities, speeds, scores, failed), end="")
    elif shown is not None and shown.row_count:
        out.print(shown)
    told = [f"{m}, {what}: {why}" for m, each in failed.items() for what, why in each.items()]
    for each in told:
        print("tersor: error:", " ".join(each.split()), file=sys.stderr)
    return int(bool(told))


def _speeds(
    args: argparse.Namespace,
    models: Mapping[str, Any],
    windows: Tensor,
    failed: dict[str, dict[str, str]],
) -> dict[str, Speed]:
    """Of all models in turns. failed: is told why there are none, where there are none."""
    from tersor.evaluate import measure_speed

    try:
        return measure_speed(models, windows[:1])
    except Exception as error:
        if args.debug:
            raise
        for name in models:
            failed[name]["speed"] = _reason(error)
        return {}


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, TersorError) else f"{type(error).__name__}: {error}"


def _tasks(names: Sequence[str], text: str) -> tuple[Any, ...]:
    """What --tasks asks for, or TersorError before a model is loaded; none for those of lm-eval."""
    if "python" in names:
        from tersor.tasks import local_tasks

        if len(names) > 1:
            raise TersorError("--tasks python is made of the text; name no others beside it")
        return local_tasks(text)
    if names:
        from tersor.tasks import harness

        harness.check(names)
    return ()


def _scores(
    args: argparse.Namespace,
    tasks: tuple[Any, ...],
    models: Mapping[str, Any],
    tokenizer: Any,
    failed: dict[str, dict[str, str]],
) -> tuple[dict[str, Any], Table]:
    """model -> task -> figures, and the table of them. failed: is told why a task has none."""
    if tasks:
        return _local_scores(args, tasks, models, tokenizer, failed)

    from rich.table import Table

    from tersor.tasks.harness import lm_eval_tasks

    scores: dict[str, dict[str, dict[str, float]]] = {}
    for name, model in models.items():
        told = None if args.debug else failed[name]
        try:
            scores[name] = lm_eval_tasks(name, args.tasks, model=model, failed=told)
        except Exception as error:  # before the first task
            if args.debug:
                raise
            scores[name] = {}
            failed[name]["tasks"] = _reason(error)
    shown = Table("model", "task", "metric", "value")
    for name, by_task in scores.items():
        for task, metrics in by_task.items():
            for metric, value in metrics.items():
                shown.add_row(name, task, metric, f"{value:.4f}")
    return scores, shown


def _local_scores(
    args: argparse.Namespace,
    tasks: tuple[Any, ...],
    models: Mapping[str, Any],
    tokenizer: Any,
    failed: dict[str, dict[str, str]],
) -> tuple[dict[str, Any], Table]:
    """Task by task, all models on each, which flips are counted by."""
    from tersor import tasks as scoring

    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    for task in tasks:
        try:
            of_task = scoring.run_tasks(models, tokenizer, (task,), args.baseline)
        except Exception as error:
            if args.debug:
                raise
            for name in models:
                failed[name][task.name] = _reason(error)
            continue
        for name, by_task in of_task.items():
            found[name] |= by_task
    return scoring.to_dict(found), scoring.table(found)


def inspect(args: argparse.Namespace) -> None:
    from tersor.inspection import inspect as look

    for part in look(args.folder):
        console().print(part, highlight=False)


def _window_length(models: Iterable[Any], asked: int | None) -> int:
    from tersor.calibrate import DEFAULT_SEQ_LEN
    from tersor.evaluate import context_of

    limit = min(filter(None, map(context_of, models)), default=None)
    if asked and limit and asked > limit:
        raise TersorError(
            f"--seq-len {asked} is beyond the model's {limit} positions; use {limit} or less"
        )
    return asked or min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN)


def _measured(found: Measured) -> str:
    sentence = (
        f"Measured: {1e3 * found.sparse:.3f} ms without the zeros, {1e3 * found.dense:.3f} ms with "
        f"them, {found.gain:.2f} times as fast"
    )
    return sentence + ("." if found.gain > 1 else ": so here weights are loaded with their zeros.")


def kernels(args: argparse.Namespace) -> None:
    import torch
    from rich.table import Table

    from tersor import cuda, sparse
    from tersor import kernels as native
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
        dtype, pattern = getattr(torch, args.dtype), native.PATTERN if args.pattern else (0, 0)
        if args.pattern:
            Sparsity.parse(args.pattern).check(k)
        reasons = dict(native.explain(m, n, k, spec, activation, dtype, pattern=pattern))
        shown.add_column("this shape")
        serving = next((name for name, reason in reasons.items() if reason is None), None)
        group = "row" if spec.group is None else f"group of {spec.group}"
        sentence = (
            f"{serving or 'No kernel of this machine'} serves {m} x {n} x {k}: "
            f"{Scheme(spec, activation)}, a scale{' and zero point' * args.asymmetric} per "
            f"{group}, {args.dtype}, {where}."
        )
        if args.pattern and sparse.serves(n, k, spec, activation):
            sentence += " " + _measured(sparse.measure(m, n, k, spec, activation, dtype))
    first = True
    for kernel in native.table():
        row = [kernel.name, kernel.isa, kernel.layout, str(kernel.priority)]
        row.append(kernel.unavailable or "yes")
        if args.shape:
            reason = reasons[kernel.name]
            row.append(reason or ("serves" if first else "would serve after those above"))
            first = first and reason is not None
        shown.add_row(*row)
    out = console()
    out.print(sentence, highlight=False)
    out.print(shown)
    served = cuda.status()
    if args.shape:
        grid = cuda.Grid.of_spec(n, k, spec, activation, sparse=bool(args.pattern))
        served = cuda.serving(m, grid, dtype)
    out.print(f"On NVIDIA GPUs: {served}.", highlight=False)
    gpu = torch.device("cuda")
    if args.shape and args.pattern and sparse.serves(n, k, spec, activation, gpu):
        out.print(_measured(sparse.measure(m, n, k, spec, activation, dtype, gpu)), highlight=False)


def bench(args: argparse.Namespace) -> None:
    if (args.model is None) == (args.shape is None):
        raise TersorError("give a model or --shape N K, one of the two")

    import json

    import torch

    from tersor import timing
    from tersor.kernels import thread_count

    threads = thread_count()
    shapes = {tuple(args.shape): 1} if args.shape else timing.shapes_of(args.model)
    dtype, results = getattr(torch, args.dtype), []
    for (n, k), count in shapes.items():
        rows = timing.compare(n, k, args.tokens, args.group, dtype)
        results.append(timing.to_dict(n, k, rows) | {"linears": count})
        if not args.json:
            title = f"{n} x {k}, {count} in the model" if args.model else f"{n} x {k}"
            console().print(timing.table(title, rows))
    if args.json:
        print(json.dumps({"threads": threads, "dtype": args.dtype, "shapes": results}, indent=2))
    else:
        on = f"{threads} thread{'s' * (threads > 1)}"
        console().print(
            f"On {on}; weights come from memory. A weight with 2:4 zeros is loaded into the kernel "
            "that leaves them out where that is faster for 1 token.",
            highlight=False,
        )


def demo(args: argparse.Namespace) -> None:
    if args.json and (args.json.is_dir() or not args.json.resolve().parent.is_dir()):
        raise TersorError(f"--json {args.json} cannot be written; name a file in a folder there is")

    if args.out and not args.full:
        raise TersorError("--out is of demo --full; add that, or leave it out")
    if args.json and args.full:
        raise TersorError("demo --full writes its figures into --out DIR; leave --json out")

    from tersor.kernels import thread_count

    thread_count()  # or TersorError
    if args.full:
        from tersor import demo_full

        demo_full.run(args.out)
        return

    from tersor import demo

    demo.run(args.json)
