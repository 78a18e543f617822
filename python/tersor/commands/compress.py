"""quantize and prune: a folder in, a smaller one out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.commands.opening import check_config, console, load_model
from tersor.errors import TersorError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping

    from tersor.layerwise import Solver
    from tersor.qweight import Scheme
    from tersor.report import Report


def quantize(args: argparse.Namespace) -> None:
    _check_files(args)

    from tersor.solvers import SOLVERS

    solver = _solver(args, SOLVERS)

    from tersor.pipeline import quantize_checkpoint

    report = quantize_checkpoint(
        args.model, args.out, scheme=_scheme(args, args.bits), method=solver, **_rest(args)
    )
    _show(args, report, f"{report.bits_per_weight:.2f} bits per quantized weight")


def prune(args: argparse.Namespace) -> None:
    _check_files(args)
    if args.structured is not None:
        _shrink(args)
        return
    for option in STRUCTURED:
        if getattr(args, option) is not None:
            raise TersorError(f"--{option.replace('_', '-')} is of --structured; leave it out")
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


STRUCTURED = (  # options of `prune --structured` alone
    *("importance", "head_importance", "layer_importance"),
    *("ranking", "multiple", "update"),
)
UNSTRUCTURED = ("method", "quantize", "group", "asymmetric", "activations", "ignore", "sequential")


def _shrink(args: argparse.Namespace) -> None:
    others = [*UNSTRUCTURED, *(name for name in args.settings if name != "damp")]
    if args.allocation != "uniform":
        others.append("allocation")
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
ALONE = {
    "hidden": ("importance", "head_importance", "layer_importance", "ranking"),
    "experts": ("head_importance", "layer_importance", "ranking", "multiple", "update", "damp"),
}


def _structured(args: argparse.Namespace) -> Callable[..., Report]:
    """What cuts what --structured names, if that goes together."""
    alone = next((what for what in ALONE if what in args.structured), None)
    if alone is None:
        from tersor.surgery.shrink import shrink_checkpoint

        return shrink_checkpoint
    if len(args.structured) > 1:
        raise TersorError(
            f"{alone} is cut in a run of its own, since that changes what all else is calibrated "
            "on; cut the others from its output, or it from theirs"
        )
    for option in ALONE[alone]:
        if getattr(args, option) is not None:
            name = option.replace("_", "-")
            raise TersorError(f"--{name} changes nothing for {alone}; leave it out")
    if alone == "experts":
        from tersor.surgery.experts import drop_experts

        return drop_experts

    from tersor.surgery.slicing import slice_checkpoint

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


def _measure_speed(args: argparse.Namespace) -> None:
    """Of the model that went in and of what came out, in turn; into the timings of the folder."""
    import json
    from dataclasses import asdict

    import torch

    from tersor.durable import durable
    from tersor.evaluate import measure_speed
    from tersor.report import TIMINGS

    models = {"before": load_model(args.model), "after": load_model(args.out)}
    vocabulary = models["before"].config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (1, 512), generator=torch.Generator().manual_seed(0))
    speeds = measure_speed(models, prompt)
    path = Path(args.out) / TIMINGS
    content = json.loads(path.read_bytes())
    content["speed"] = {name: asdict(speed) for name, speed in speeds.items()}
    with durable(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
    before, after = speeds["before"], speeds["after"]
    console().print(
        f"prefill {before.prefill:.0f} -> {after.prefill:.0f} tokens/s ({before.prompt} tokens), "
        f"decode {before.decode:.1f} -> {after.decode:.1f} tokens/s, "
        f"{before.weights / 1e6:.1f} -> {after.weights / 1e6:.1f} MB of weights in memory",
        highlight=False,
    )


def _show(args: argparse.Namespace, report: Report, result: str) -> None:
    from tersor.report import table

    out = console()
    if report.layers:
        out.print(table(report))
    for name, reason in report.departures.items():
        out.print(f"not as asked: {name}: {reason}", highlight=False)
    out.print(
        f"{args.out}: {report.bytes_before / 1e6:.1f} MB -> {report.bytes_after / 1e6:.1f} MB, "
        f"{result}; details in tersor_report.json",
        highlight=False,
    )
    if args.speed:
        _measure_speed(args)


def _check_files(args: argparse.Namespace) -> None:
    """The commonest mistakes, before seconds of imports. Beside a folder that an unfinished run has
    left, only the writer can tell."""
    out: str = args.out
    path = Path(os.path.abspath(out))
    if not path.name:
        raise TersorError(f"--out {out} is the root of all files; name a new folder")
    if os.path.lexists(out) and not path.with_name(f"{path.name}.partial").exists():
        raise TersorError(f"{out} exists already; remove it or choose another output folder")
    if args.speed:
        check_config(args.model)


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
