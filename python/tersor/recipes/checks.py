"""Whether a recipe can be run on a model, found out before the first step starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tersor.calibrate import DEFAULT_SEQ_LEN, Calibration, digest, load_tokenizer
from tersor.corpus import read_text
from tersor.errors import TersorError
from tersor.evaluate import position_limit, text_windows
from tersor.models import find_arch
from tersor.recipes.recipe import Evaluate, Export, Recipe, name_of
from tersor.runs import text_windows as calibration_windows
from tersor.scope import check_inputs, settle
from tersor.source import Source
from tersor.steps import Shrink, State, Step, Surgery, Train
from tersor.surgery.cuts import settle_cuts
from tersor.training.checkpoints import check_teacher

Windows = dict[str, Tensor]  # name of a text -> int64 [count, seq_len]


@dataclass(frozen=True)
class Checked:
    """A recipe with all that it reads. windows: of Recipe.evaluate, and of each Evaluate among the
    steps, by its number. calibration: the token ids, or None."""

    recipe: Recipe
    source: Source
    calibration: Tensor | None
    windows: dict[int, Windows]  # 0: of the whole recipe


def check(recipe: Recipe, model: str | Path) -> Checked:
    """TersorError for what would go wrong after hours: steps that cannot follow one another,
    settings that do not go together, groups that do not divide the model's linears, text that is
    missing or too short, a teacher of another vocabulary."""
    _order(recipe)
    source = Source.open(model)
    _shapes(recipe, source)
    for number, step in enumerate(recipe.steps, 1):
        if isinstance(step, Train) and step.teacher not in (None, "original"):
            with _named(number, step):
                check_teacher(str(step.teacher), source)
    calibration = None
    if recipe.calibration is not None:
        calibration = calibration_windows(source, recipe.calibration)
    for number, step in enumerate(recipe.steps, 1):
        if isinstance(step, Train):
            with _named(number, step):
                _training_text(step, recipe.calibration, source)
    windows = {0: _windows(recipe.evaluate, source)} if recipe.evaluate is not None else {}
    for number, step in enumerate(recipe.steps, 1):
        if isinstance(step, Evaluate):
            with _named(number, step):
                windows[number] = _windows(step, source)
    _texts(windows)
    return Checked(recipe, source, calibration, windows)


def _texts(windows: dict[int, Windows]) -> None:
    """TersorError for two texts of one name, of which a stage could hold one figure."""
    seen: dict[str, str] = {}
    for texts in windows.values():
        for name, ids in texts.items():
            if seen.setdefault(name, digest(ids)) != digest(ids):
                raise TersorError(
                    f"two texts to evaluate on are called {name}; name one of them otherwise: "
                    f"text: {{other: FILE}}"
                )


def _order(recipe: Recipe) -> None:
    state = State()
    for number, step in enumerate(recipe.steps, 1):
        with _named(number, step):
            if isinstance(step, Step):
                step.call()
                state = step.after(state)
                if step.reads_text and recipe.calibration is None:
                    raise TersorError(
                        "it needs text; give --calibration FILE, or calibration in the recipe"
                    )
            if isinstance(step, Export):
                _export(recipe, number)


def _export(recipe: Recipe, number: int) -> None:
    """TersorError unless there is a model to keep under a name of its own."""
    export = recipe.steps[number - 1]
    assert isinstance(export, Export)
    writes = [n for n, step in enumerate(recipe.steps, 1) if isinstance(step, Step)]
    if number < writes[0]:
        raise TersorError("there is nothing to export before the first step")
    if number > writes[-1]:
        raise TersorError("the last step's model is the output itself; leave the export out")
    other = recipe.steps[number - 2]
    if isinstance(other, Export):
        raise TersorError(f"{other.folder} is the same model; export it once")
    names = [step.folder for step in recipe.steps if isinstance(step, Export)]
    names += [f"{n}-{name_of(recipe.steps[n - 1])}" for n in writes] * (recipe.keep == "all")
    if names.count(export.folder) > 1:
        raise TersorError(f"{export.folder} is the name of two models; choose another folder")


def _shapes(recipe: Recipe, source: Source) -> None:
    """Groups and patterns against the linears, as long as it is known how wide they are then: not
    after a second cut, or one of another kind."""
    model, cut = source.model, False
    for number, step in enumerate(recipe.steps, 1):
        if isinstance(step, Surgery):
            if not isinstance(step, Shrink) or cut:
                return
            with _named(number, step):
                parts = ("heads", "query_heads", "ffn", "layers", "multiple")
                cuts = settle_cuts(source, **{part: getattr(step, part) for part in parts})
                model, cut = cuts.skeleton(source, range(cuts.left)), True
            continue
        if not isinstance(step, Step):
            continue
        with _named(number, step):
            _, settings = step.call()
            qat = settings.get("qat")
            scheme = qat.scheme if qat is not None else settings.get("scheme")
            sparsity = settings.get("sparsity") or getattr(settings.get("method"), "sparsity", None)
            scope = settle(model, find_arch(model), getattr(step, "ignore", ()))
            check_inputs(model, scope.linears, scheme and scheme.weight, sparsity)


def _training_text(step: Train, calibration: Calibration | None, source: Source) -> None:
    """One batch must be there; how much more there is only changes how often it is read."""
    assert calibration is not None  # checked before
    sources, texts = (step.text, ()) if step.text else (calibration.sources, calibration.texts)
    seq_len = step.seq_len or calibration.seq_len
    first = replace(calibration, sources=sources, texts=texts, samples=step.batch, seq_len=seq_len)
    calibration_windows(source, first)


def _windows(asked: Evaluate, source: Source) -> Windows:
    """The texts as tokens. None of a name: a speed alone."""
    folder = source.checkpoint.folder
    tokenizer = load_tokenizer(folder)
    limit = position_limit(source.model) or source.context
    length = asked.seq_len or min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN)
    if asked.seq_len and limit and asked.seq_len > limit:
        raise TersorError(f"seq_len {asked.seq_len} is beyond the model's {limit} positions")
    found = {}
    for name, file in asked.files.items():
        whole = text_windows(read_text(file), tokenizer, length, asked.bos)
        found[name] = whole[: asked.samples]
    return found


@contextmanager
def _named(number: int, step: Any) -> Iterator[None]:
    """Says of an error which step it is of."""
    try:
        yield
    except TersorError as error:
        raise TersorError(f"step {number}, {name_of(step)}: {error}") from None
