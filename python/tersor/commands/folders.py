"""quantize and prune: a folder in, a smaller one out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.commands.opening import check_config, console, load_model
from tersor.errors import TersorError

if TYPE_CHECKING:
    import argparse

    from tersor.calibrate import Calibration
    from tersor.report import Report
    from tersor.steps import Step, Surgery


def quantize(args: argparse.Namespace) -> None:
    check_files(args)

    from tersor.steps import Quantize

    report = run_step(args, Quantize(**settings_of(args, Quantize)))
    show(args, report, f"{report.bits_per_weight:.2f} bits per quantized weight")


def prune(args: argparse.Namespace) -> None:
    check_files(args)
    if args.structured is not None:
        _shrink(args)
        return
    for option in STRUCTURED:
        if getattr(args, option) is not None:
            raise TersorError(f"--{option.replace('_', '-')} is of --structured; leave it out")

    from tersor.steps import Prune

    report = run_step(args, Prune(**settings_of(args, Prune)))
    result = f"{100 * report.sparsity:.1f} % zeros in {len(report.layers)} linears"
    if args.quantize:
        result += f", {report.bits_per_weight:.2f} bits per weight"
    show(args, report, result)


STRUCTURED = (  # options of `prune --structured` alone
    *("importance", "head_importance", "layer_importance"),
    *("ranking", "multiple", "update"),
)
UNSTRUCTURED = (
    "method",
    "quantize",
    "group",
    "asymmetric",
    "activations",
    "ignore",
    "sequential",
    "device",
)


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

    report = run_step(args, _structured(args)(**args.structured, **settings))
    parts = report.structure or {}
    before, after = parts["parameters_before"], parts["parameters_after"]
    show(args, report, f"{before / 1e6:.1f} -> {after / 1e6:.1f} million parameters")


# What is cut in a run of its own -> options of --structured that change nothing there.
ALONE = {
    "hidden": ("importance", "head_importance", "layer_importance", "ranking"),
    "experts": ("head_importance", "layer_importance", "ranking", "multiple", "update", "damp"),
}


def _structured(args: argparse.Namespace) -> type[Surgery]:
    """What cuts what --structured names, if that goes together."""
    from tersor.steps import DropExperts, Shrink, Slice

    alone = next((what for what in ALONE if what in args.structured), None)
    if alone is None:
        return Shrink
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
        return DropExperts
    return Slice


def settings_of(args: argparse.Namespace, step: type[Step]) -> dict[str, Any]:
    """The arguments that are settings of the step and were given."""
    from dataclasses import fields

    names = [field.name for field in fields(step)]  # type: ignore[arg-type]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def run_step(args: argparse.Namespace, step: Step) -> Report:
    from tersor.kernels import thread_count

    thread_count()  # or TersorError
    return step(args.model, args.out, calibration_of(args), strict=args.strict)


def calibration_of(args: argparse.Namespace) -> Calibration | None:
    from tersor.calibrate import Calibration

    if not args.calibration:
        return None
    names = ("samples", "seq_len", "seed", "bos")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return Calibration(tuple(args.calibration), **given)


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


def show(args: argparse.Namespace, report: Report, result: str) -> None:
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


def check_files(args: argparse.Namespace) -> None:
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
