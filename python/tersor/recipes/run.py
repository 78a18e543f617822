"""A recipe, run: a folder in, a folder out, and on the way everything that is done kept.

While it works, all is in a folder beside the output:

    out.partial/
      recipe.json        what the run depends on, and the stages that are done
      lock               held by the run that writes
      1-prune/           the model after step 1; step 2 works in 2-quantize.partial until it is done
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tersor import kernels
from tersor.calibrate import digest
from tersor.checkpoint import Checkpoint
from tersor.corpus import digest_text
from tersor.durable import disk_errors, durable, sync_folder
from tersor.errors import TersorError
from tersor.recipes.checks import Checked, check
from tersor.recipes.facts import measure_quality, measure_size
from tersor.recipes.page import write_page
from tersor.recipes.recipe import Evaluate, Export, Recipe, name_of, settings_of
from tersor.recipes.stages import RECIPE_REPORT, RecipeReport, Stage
from tersor.report import Report, peak_memory, refuse_departures, versions
from tersor.shards import LOCK, exists_already, lock_folder
from tersor.steps import Step, Train
from tersor.training.checkpoints import check_teacher

RECIPE_PAGE = "tersor_recipe.html"
STAGES = "stages"  # in the output: models on the way that are kept
_JOURNAL, _STAGING = "recipe.json", "out"


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | str | Path,
    *,
    original: str | Path | None = None,
    strict: bool = False,
    progress: bool | None = None,
) -> RecipeReport:
    """Runs a recipe on a Hugging Face checkpoint.

    model: its folder. out: the folder to make: the last model, with tersor_recipe.json in it, the
        page tersor_recipe.html where tersor[report] is installed, and under `stages` the models on
        the way that the recipe keeps. Until it is there the work is in `<out>.partial`, from which
        the same call goes on, inside a step too. Where the page cannot be drawn the report says
        why (`no_page`), and once that is mended the same call draws it.
    recipe: a Recipe, a YAML file, or one of recipes.recipe.READY.
    original: what every stage is measured against, and what steps that train learn from; by
        default the model itself. Where the model was cut out of another one, that one.
    strict, progress: as in quantize_checkpoint.

    Raises TersorError for bad input, before the first step wherever that can be known.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.read(recipe)
    out = Path(os.path.abspath(out))
    partial = out.with_name(out.name + ".partial")
    if os.path.lexists(out) and not (partial / _JOURNAL).exists():
        return _draw_again(out, recipe, Path(model))
    checked = check(recipe, model, strict)
    base = Path(original or model)
    if original is not None:
        check_teacher(base, checked.source)
    with _Journal.open(partial, _identity(checked, base)) as journal:
        run = _Run(checked, Path(model), base, journal, strict, progress)
        if os.path.lexists(out):  # made by a run that was stopped while it cleaned up?
            if len(journal.done) <= len(recipe.steps) or run.unfinished():
                raise TersorError(exists_already(out))
            journal.remove()
            return RecipeReport.read(out)
        return run.finish(out, run.stages())


@dataclass
class _Journal:
    """What is done, on the disk. stages: in order, those that were made, with what was measured of
    them. done: numbers of the steps that nothing is left to do of; 0: of the model itself."""

    folder: Path
    identity: dict[str, Any]
    stages: list[Stage] = field(default_factory=list)
    done: list[int] = field(default_factory=list)

    @classmethod
    @contextmanager
    def open(cls, folder: Path, identity: dict[str, Any]) -> Iterator[_Journal]:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(folder)
        try:
            journal = cls(folder, json.loads(json.dumps(identity)))
            journal._read()
            yield journal
        finally:
            os.close(lock)

    def _read(self) -> None:
        path = self.folder / _JOURNAL
        if not path.exists():
            strangers = set(os.listdir(self.folder)) - {LOCK, _JOURNAL + ".tmp"}
            if strangers:
                raise TersorError(
                    f"{self.folder} is not a partial run of a recipe (it holds {min(strangers)}); "
                    "move it away"
                )
            self.write()
            return
        remove = f"remove it to start again: rm -r {shlex.quote(str(self.folder))}"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            before, self.done = content["identity"], content["done"]
            self.stages = [Stage(**stage) for stage in content["stages"]]
        except (ValueError, KeyError, TypeError) as error:
            raise TersorError(f"{path} is damaged ({error}); {remove}") from None
        if before == self.identity:
            return
        begun = set(os.listdir(self.folder)) - {LOCK, _JOURNAL, _JOURNAL + ".tmp"}
        if any(self.done) or begun:
            keys = sorted(before.keys() | self.identity.keys())
            changed = [key for key in keys if before.get(key) != self.identity.get(key)]
            raise TersorError(
                f"{self.folder} holds an unfinished run with another {', '.join(changed)}; to go "
                f"on with it, use what it was begun with; or {remove}"
            )
        self.clear()
        self.stages, self.done = [], []
        self.write()

    def write(self) -> None:
        content = {
            "identity": self.identity,
            "done": self.done,
            "stages": [asdict(stage) for stage in self.stages],
        }
        with durable(self.folder / _JOURNAL) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())

    def finish(self, number: int) -> None:
        """Nothing is left to do of that step."""
        self.done.append(number)
        self.write()

    def clear(self) -> None:
        """Removes all but the lock, the journal last."""
        for name in sorted(os.listdir(self.folder), key=lambda n: (n == _JOURNAL, n)):
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            elif name != LOCK:
                path.unlink()

    def remove(self) -> None:
        """The work is done, and the folder goes."""
        with disk_errors(self.folder):
            self.clear()
            (self.folder / LOCK).unlink()
            with suppress(OSError):  # a run that waits for this output may have come in
                self.folder.rmdir()


class _Run:
    def __init__(
        self,
        checked: Checked,
        model: Path,
        original: Path,
        journal: _Journal,
        strict: bool,
        progress: bool | None,
    ) -> None:
        self.checked, self.journal = checked, journal
        self.model, self.original = model, original
        self.strict, self.progress = strict, progress
        self.recipe = checked.recipe

    def stages(self) -> list[Stage]:
        """Of the whole recipe, those done before included."""
        journal = self.journal
        if self.strict:  # of steps that an earlier run without it has done
            for stage in journal.stages:
                refuse_departures(dict(note.partition(": ")[::2] for note in stage.notes))
        if not journal.stages:
            stage = Stage("original" if self.model == self.original else "model", None)
            measure_size(stage, self.model)
            journal.stages.append(stage)
        if 0 not in journal.done:
            self._measure(journal.stages[0], self.model, 0)
            journal.finish(0)
        folder = self.model
        for number, step in enumerate(self.recipe.steps, 1):
            if isinstance(step, Step):
                before, folder = folder, self._folder(number)
                if number not in journal.done:
                    self._step(number, step, before, folder)
            elif isinstance(step, Evaluate) and number not in journal.done:
                self._evaluate(number, folder)
            if number not in journal.done:
                journal.finish(number)
            if isinstance(step, Step):
                self._forget(before)
        return journal.stages

    def finish(self, out: Path, stages: list[Stage]) -> RecipeReport:
        """Puts the output together. Killed at any point, it can be repeated."""
        report = RecipeReport(
            model=self.model.resolve().name,
            recipe=self.recipe.name,
            steps=self.recipe.to_dicts(),
            versions=versions(),
            machine=_machine(),
            stages=stages,
        )
        folder, staging = self.journal.folder, self.journal.folder / _STAGING
        last = self._folder(max(self._writes()))
        with disk_errors(folder):
            if not staging.exists():
                os.rename(last, staging)
            for number, name in self._kept().items():
                kept = self._folder(number)
                if kept.exists():
                    (staging / STAGES).mkdir(exist_ok=True)
                    os.rename(kept, staging / STAGES / name)
        _draw(report, staging)
        with disk_errors(folder):
            sync_folder(staging)
            os.rename(staging, out)
            sync_folder(out.parent)
            self.journal.remove()
        return report

    def unfinished(self) -> bool:
        """Whether the last model is still to be put in its place."""
        places = (self._folder(max(self._writes())), self.journal.folder / _STAGING)
        return any(place.exists() for place in places)

    def _step(self, number: int, step: Step, before: Path, folder: Path) -> None:
        stages = self.journal.stages
        if stages[-1].name != f"{number} {step.name}":  # or it was made, and could not be measured
            stages.append(self._made(number, step, before, folder))
            self.journal.write()
        self._measure(stages[-1], folder, 0)

    def _made(self, number: int, step: Step, before: Path, folder: Path) -> Stage:
        """The stage that the step ends in, not measured yet."""
        stage = Stage(f"{number} {step.name}", step.name, settings_of(step))
        interrupted = folder.with_name(f"{folder.name}.partial").exists() or folder.exists()
        start = time.perf_counter()
        report = Report.read(folder) if folder.exists() else None
        with peak_memory() as peak:
            if report is None:
                asked = step.learns_from(self.original) if isinstance(step, Train) else step
                text = self.recipe.calibration
                report = asked(before, folder, text, strict=self.strict, progress=self.progress)
        stage.seconds = None if interrupted else round(time.perf_counter() - start, 3)
        stage.peak_bytes = 0 if interrupted else peak.bytes
        if self.strict:
            report.require_strict()
        measure_size(stage, folder, report, before)
        stage.layers = [asdict(layer) for layer in report.layers]
        stage.losses = [tuple(row) for row in (report.training or {}).get("log", [])]
        stage.notes = [f"{name}: {why}" for name, why in report.departures.items()]
        return stage

    def _evaluate(self, number: int, folder: Path) -> None:
        """What an Evaluate among the steps asks for, of the model as it is and of the original."""
        first, last = self.journal.stages[0], self.journal.stages[-1]
        self._measure(first, self.model, number)
        if last is not first:
            self._measure(last, folder, number)

    def _measure(self, stage: Stage, folder: Path, number: int) -> None:
        """number: of the Evaluate among the steps; 0: that of the whole recipe."""
        asked = self.recipe.steps[number - 1] if number else self.recipe.evaluate
        if not isinstance(asked, Evaluate):
            return
        windows = self.checked.windows[number]
        try:
            measure_quality(stage, folder, self.original, windows, asked.speed)
        except TersorError as error:
            raise TersorError(
                f"{stage.name} cannot be measured: {error}; its model is {folder}, and what was "
                f"measured before is in {self.journal.folder / _JOURNAL}"
            ) from None
        finally:  # what was measured is kept, whatever stopped the rest
            self.journal.write()

    def _writes(self) -> list[int]:
        """Numbers of the steps that write a model."""
        return [n for n, step in enumerate(self.recipe.steps, 1) if isinstance(step, Step)]

    def _kept(self) -> dict[int, str]:
        """Step -> the name of its model under `stages`; the last one is the output itself."""
        numbers = self._writes()
        kept = {n: self._folder(n).name for n in numbers} if self.recipe.keep == "all" else {}
        for number, step in enumerate(self.recipe.steps, 1):
            if isinstance(step, Export):
                kept[max(n for n in numbers if n < number)] = step.folder
        return {n: name for n, name in kept.items() if n != numbers[-1]}

    def _forget(self, folder: Path) -> None:
        """Removes the model before the last, unless it is kept."""
        kept = [self._folder(number) for number in self._kept()]
        if folder != self.model and folder not in kept and folder.exists():
            shutil.rmtree(folder)

    def _folder(self, number: int) -> Path:
        """Of the model that step `number` makes."""
        return self.journal.folder / f"{number}-{name_of(self.recipe.steps[number - 1])}"


def _identity(checked: Checked, original: Path) -> dict[str, Any]:
    """What two runs must have in common for one to go on with the other."""
    recipe, found = checked.recipe, checked.calibration
    return {
        "steps": recipe.to_dicts(),
        "keep": recipe.keep,
        "speed": [getattr(each, "speed", None) for each in (recipe.evaluate, *recipe.steps)],
        "model": checked.source.checkpoint.fingerprint(),
        "original": Checkpoint.open(original).fingerprint(),
        "calibration": None if found is None else digest(found),
        "evaluation": {
            f"{number} {name}": digest(ids)
            for number, windows in checked.windows.items()
            for name, ids in windows.items()
        },
        "training": [_training(step, recipe) for step in recipe.steps if isinstance(step, Train)],
        "versions": versions(),
    }


def _training(step: Train, recipe: Recipe) -> dict[str, Any]:
    """What a step that trains reads, beside what it is told: the text, all of which may be read,
    and a teacher of its own."""
    assert recipe.calibration is not None  # checked before
    own = step.teacher if step.teacher not in (None, "original") else None
    return {
        "text": [digest_text(file) for file in step.text or recipe.calibration.sources],
        "texts": [] if step.text else list(recipe.calibration.texts),
        "teacher": None if own is None else Checkpoint.open(own).fingerprint(),
    }


def _draw(report: RecipeReport, folder: Path) -> None:
    """Writes the report into its folder, with the page, or with what kept that from being drawn."""
    report.no_page = ""
    try:
        write_page(report, folder / RECIPE_PAGE)
    except Exception as error:  # whatever a broken installation makes the drawing raise
        kind = "" if isinstance(error, TersorError) else f"{type(error).__name__}: "
        report.no_page = f"{kind}{error}"
    with durable(folder / RECIPE_REPORT) as file:
        file.write(report.to_json().encode())


def _draw_again(out: Path, recipe: Recipe, model: Path) -> RecipeReport:
    """The report of a run of this recipe that ended without its page, which is drawn now.
    TersorError for any other output, and where it still cannot be drawn."""
    if not (out / RECIPE_REPORT).is_file() or (out / RECIPE_PAGE).exists():
        raise TersorError(exists_already(out))
    report = RecipeReport.read(out)
    steps = json.loads(json.dumps(recipe.to_dicts()))
    if (report.model, report.steps) != (model.resolve().name, steps):
        raise TersorError(exists_already(out))
    _draw(report, out)
    if report.no_page:
        raise TersorError(
            f"{out} is whole but for its page ({report.no_page}); mend that and run the same "
            "command again, or remove the folder to start anew"
        )
    return report


def _machine() -> dict[str, Any]:
    names = []
    with suppress(OSError):  # of Linux alone
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    usable = [kernel.isa for kernel in kernels.table() if not kernel.unavailable]
    return {
        "processor": names[0] if names else "unknown",
        "threads": torch.get_num_threads(),
        "isa": usable[0] if usable else "none",
    }
