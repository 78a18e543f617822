"""distill and qat: a folder in, a trained one out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tersor.commands.folders import check_files, run_step, settings_of, show
from tersor.errors import TersorError

if TYPE_CHECKING:
    import argparse

    from tersor.report import Report
    from tersor.steps import Train


def distill(args: argparse.Namespace) -> None:
    check_files(args)

    from tersor.steps import Distill

    _refuse_samples(args, "distill")
    report = _train(args, Distill(**settings_of(args, Distill)))
    show(args, report, _training(report))


def qat(args: argparse.Namespace) -> None:
    check_files(args)

    from tersor.steps import QuantizationAware

    if args.teacher is None:
        for option in ("loss", "temperature", "alpha"):
            if getattr(args, option) is not None:
                raise TersorError(f"--{option} is of what a teacher predicts; add --teacher MODEL")
    if args.start == "rtn":
        _refuse_samples(args, "--start rtn")
    report = _train(args, QuantizationAware(**settings_of(args, QuantizationAware)))
    bits = f"{report.bits_per_weight:.2f} bits per quantized weight, " if report.layers else ""
    show(args, report, bits + _training(report))


def _refuse_samples(args: argparse.Namespace, where: str) -> None:
    """Where GPTQ reads no text."""
    if args.samples is not None:
        raise TersorError(
            f"--samples changes nothing for {where}: training reads as many windows as its steps "
            "take (--steps, --batch, --accumulate); leave it out"
        )


def _train(args: argparse.Namespace, step: Train) -> Report:
    if not args.calibration:
        raise TersorError("training needs text; give --calibration FILE")
    return run_step(args, replace(step, teacher=args.teacher, text=tuple(args.training_text or ())))


def _training(report: Report) -> str:
    training = report.training or {}
    losses = [values["loss"] for _, values in training["log"]]
    way = f", loss {losses[0]:.4f} -> {losses[-1]:.4f}" if losses else ""
    return f"{training['steps']} steps on {training['tokens']} tokens{way}"
