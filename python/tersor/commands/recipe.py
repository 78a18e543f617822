"""compress: several steps in a row."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.commands.opening import console
from tersor.errors import TersorError

if TYPE_CHECKING:
    import argparse

    from rich.table import Table

    from tersor.recipes.recipe import Recipe
    from tersor.recipes.stages import RecipeReport, Stage


def compress(args: argparse.Namespace) -> None:
    from tersor.kernels import thread_count
    from tersor.recipes.recipe import Recipe
    from tersor.recipes.run import RECIPE_PAGE
    from tersor.recipes.run import compress as run
    from tersor.recipes.stages import RECIPE_REPORT

    thread_count()  # or TersorError
    recipe = _with_options(Recipe.read(args.recipe), args)
    report = run(args.model, args.out, recipe, strict=args.strict)
    out = console()
    out.print(table(report))
    for stage in report.stages:
        for note in stage.notes:
            out.print(f"not as asked: {stage.name}: {note}", highlight=False)
    first, last = report.stages[0], report.stages[-1]
    where = RECIPE_PAGE
    if report.no_page:
        where = (
            f"{RECIPE_REPORT} (no page: {report.no_page}; once that is mended, the same command "
            "draws it)"
        )
    out.print(
        f"{args.out}: {first.bytes / 1e6:.2f} MB -> {last.bytes / 1e6:.2f} MB, "
        f"{first.bytes / last.bytes:.1f} times smaller; details in {where}",
        highlight=False,
    )


def _with_options(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """What the command line says beside the recipe, or in its place."""
    from tersor.calibrate import Calibration
    from tersor.recipes.recipe import Evaluate
    from tersor.steps import Train

    names = ("samples", "seq_len", "seed", "bos")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    calibration, evaluate = recipe.calibration, recipe.evaluate
    if args.calibration:
        sources = tuple(args.calibration)
        if calibration is None:
            calibration = Calibration(sources, **given)
        else:
            calibration = replace(calibration, sources=sources, texts=(), **given)
    elif calibration is not None:
        calibration = replace(calibration, **given)
    else:
        of_windows = ("seq_len", "bos") if args.text else ()
        if option := next((name for name in given if name not in of_windows), None):
            fix = "--calibration" if args.text else "--calibration or --text"
            raise TersorError(f"--{option.replace('_', '-')} is of a text; give {fix}")
    if args.text:
        texts = {Path(file).stem: file for file in args.text}
        if len(texts) < len(args.text):
            raise TersorError("two files of --text have the same name; rename one")
        settings = {name: given[name] for name in ("seq_len", "bos") if name in given}
        evaluate = replace(evaluate or Evaluate(texts), text=texts, **settings)
    if args.speed:
        evaluate = replace(evaluate, speed=True) if evaluate else Evaluate(speed=True)
    steps = recipe.steps
    if args.teacher:
        teacher = os.path.abspath(args.teacher)
        steps = tuple(
            replace(step, teacher=teacher) if isinstance(step, Train) else step for step in steps
        )
    if args.teacher and steps == recipe.steps:
        raise TersorError("--teacher is for steps that train, and the recipe has none")
    return replace(
        recipe,
        steps=steps,
        calibration=calibration,
        evaluate=evaluate,
        keep=args.keep or recipe.keep,
    )


def table(report: RecipeReport) -> Table:
    """One line for each stage; several texts side by side."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    texts = list(dict.fromkeys(name for stage in report.stages for name in stage.quality))
    shown = Table(
        title=f"held-out text: {' / '.join(texts)}" if texts else None,
        caption="bits, zeros: of all linears in the blocks, those left in 16 bits included",
        box=SIMPLE_HEAD,
    )
    shown.add_column("stage", no_wrap=True)
    speed = any(stage.speed for stage in report.stages)
    heads = ["MB", "weights", "bits", "zeros %"]
    heads += ["perplexity", "KL", "top-1 %"] if texts else []
    heads += ["prefill tok/s", "decode tok/s"] if speed else []
    for head in (*heads, "seconds"):
        shown.add_column(head, justify="right")
    for stage in report.stages:
        shown.add_row(*_cells(stage, texts, speed))
    return shown


def _cells(stage: Stage, texts: list[str], speed: bool) -> list[str]:
    cells = [stage.name, f"{stage.bytes / 1e6:.2f}", f"{stage.parameters / 1e6:.2f} M"]
    cells += [f"{stage.bits_per_weight:.2f}", f"{100 * stage.sparsity:.1f}"]
    if texts:
        found = [stage.quality.get(text) for text in texts]
        for show in (
            lambda q: _number(q["perplexity"]["mean"], ".2f"),
            lambda q: _number(q["kl"]["mean"], ".4f"),
            lambda q: f"{100 * q['top1']:.1f}",
        ):
            cells.append(" / ".join(show(q) if q else "-" for q in found))
    if speed:
        both = stage.speed
        cells += [
            f"{both[what]:.0f} ({both[what + '_ratio']:.2f}×)" if both else "-"
            for what in ("prefill", "decode")
        ]
    seconds = "unknown" if stage.seconds is None else f"{stage.seconds:.1f}"
    return [*cells, seconds if stage.step else ""]


def _number(value: float | None, style: str) -> str:
    """None is what JSON has for a mean that is not finite."""
    return "not finite" if value is None else format(value, style)
