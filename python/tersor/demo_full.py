"""`tersor demo --full`: the demo model made ten times smaller by a recipe, stage by stage, and the
same steps of training one after the other against all at once.

The student is cut out of the original (a narrower stream, half of the heads, four of six blocks),
learns from it, loses half of its channels, learns again with its weights as they will be in four
bits, and is quantized by GPTQ. GPTQ chooses codes anew and so gives away what the training gained:
that is shown too, by a training that keeps its own codes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.calibrate import Calibration, load_tokenizer
from tersor.demo_model import DemoModel, demo_model
from tersor.errors import TersorError
from tersor.loading import load_any
from tersor.recipes.recipe import Evaluate, Recipe
from tersor.recipes.run import RECIPE_PAGE, compress
from tersor.recipes.stages import RecipeReport
from tersor.steps import Distill, Prune, QuantizationAware, Quantize, Shrink, Slice, Step
from tersor.tasks import local_tasks, run_tasks, table

if TYPE_CHECKING:
    from rich.table import Table

WINDOW = 256  # tokens
PATTERN = "2:4"


@dataclass(frozen=True)
class Effort:
    """steps: of the first training; the second takes half as many. Both ways of the comparison
    take `compared` steps in all. samples: windows of each held-out text, and of calibration.
    rate: the learning rate of students that were cut or masked just before; aware: of one that has
    learnt already, and is trained for its grid, before GPTQ; codes: the same where the codes that
    were trained stay."""

    steps: int = 240
    compared: int = 160
    batch: int = 8
    rate: float = 2e-3
    aware: float = 2e-4
    codes: float = 3e-4
    samples: int = 64


def recipe(source: DemoModel, effort: Effort) -> Recipe:
    """The whole pipeline: distil, prune, train for the grid, GPTQ."""
    first = Distill(**_training(effort, effort.steps, effort.rate))
    aware = QuantizationAware(
        output="weights", group="row", **_training(effort, effort.steps // 2, effort.aware)
    )
    cuts = (Slice(hidden=0.625, multiple=32), Shrink(heads=0.5, layers=2))
    steps = (*cuts, first, Shrink(ffn=0.6), aware, Quantize(group="row"))
    return Recipe(
        steps, _text(source, effort), _evaluation(source, effort), keep="all", name="demo --full"
    )


def own_codes(effort: Effort) -> tuple[Step, ...]:
    """The last training once more, from GPTQ's codes to codes, with nothing after it."""
    training = _training(effort, effort.steps // 2, effort.codes)
    return (QuantizationAware(group="row", **training),)


def sequential(effort: Effort) -> tuple[Step, ...]:
    """Half of the steps to distil, 2:4 zeros by SparseGPT, half to train for the grid around
    them."""
    half = effort.compared // 2
    aware = QuantizationAware(group="row", **_training(effort, half, effort.rate / 2))
    return Distill(**_training(effort, half, effort.rate)), Prune(pattern=PATTERN), aware


def joint(effort: Effort) -> tuple[Step, ...]:
    """All at once: masks that come in little by little, the grid, and the teacher."""
    training = _training(effort, effort.compared, effort.rate)
    return (QuantizationAware(group="row", pattern=PATTERN, start="rtn", **training),)


def run(
    out: Path | None = None,
    say: Callable[[str], None] = print,
    effort: Effort | None = None,
    source: DemoModel | None = None,
) -> RecipeReport:
    """Runs the pipeline and the comparison, and prints both.

    out: the folder to make, with the compressed model, every stage, and the page; None keeps
        nothing. It must not be there yet.
    """
    from tersor.commands.recipe import table as stages
    from tersor.demo import print_table

    start = time.perf_counter()
    if out is not None and out.exists():
        raise TersorError(f"{out} exists already; remove it or choose another output folder")
    effort = effort or Effort()
    source = source or demo_model(say=say)
    with tempfile.TemporaryDirectory(prefix="tersor-demo-") as scratch:
        folder = out or Path(scratch) / "small"
        say("Distil, prune, train for the grid, GPTQ ...")
        report = compress(source.folder, folder, recipe(source, effort))
        print_table(stages(report))
        first, last = report.stages[0], report.stages[-1]
        say(
            f"{first.bytes / 1e6:.2f} MB -> {last.bytes / 1e6:.2f} MB, "
            f"{first.bytes / last.bytes:.1f} times smaller.\n"
        )
        print_table(_tasks(source, folder, effort))
        say(
            "The last training with its own codes, not GPTQ's; and from the student "
            f"{effort.compared} steps one after the other, and all at once ..."
        )
        ways = {
            "own codes": ("4-shrink", own_codes(effort)),
            "sequential": ("2-shrink", sequential(effort)),
            "joint": ("2-shrink", joint(effort)),
        }
        for name, (stage, steps) in ways.items():
            compared = Recipe(steps, _text(source, effort), _evaluation(source, effort), name=name)
            student = folder / "stages" / stage
            found = compress(student, Path(scratch) / name, compared, original=source.folder)
            say(f"\n{name}:")
            print_table(stages(found))
    where = f" The page is {out / RECIPE_PAGE}." if out and (out / RECIPE_PAGE).exists() else ""
    say(f"{time.perf_counter() - start:.0f} s in all.{where}")
    return report


def _tasks(source: DemoModel, small: Path, effort: Effort) -> Table:
    """What both models make of four tasks from the held-out code."""
    text = source.held_out["code"].read_text(encoding="utf-8")
    models = {"original": load_any(source.folder), "small": load_any(small)}
    tasks = local_tasks(text, count=effort.samples)
    return table(run_tasks(models, load_tokenizer(source.folder), tasks, "original"))


def _training(effort: Effort, steps: int, rate: float) -> dict[str, Any]:
    return {"steps": steps, "batch": effort.batch, "seq_len": WINDOW, "learning_rate": rate}


def _text(source: DemoModel, effort: Effort) -> Calibration:
    return Calibration((str(source.calibration),), samples=effort.samples, seq_len=WINDOW)


def _evaluation(source: DemoModel, effort: Effort) -> Evaluate:
    files = {kind: str(path) for kind, path in source.held_out.items()}
    return Evaluate(files, samples=effort.samples, seq_len=WINDOW)
