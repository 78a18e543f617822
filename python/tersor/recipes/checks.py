"""Whether a recipe can be run on a model, found out before the first step starts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tersor.calibrate import DEFAULT_SEQ_LEN, Calibration, digest, load_tokenizer
from tersor.corpus import read_text
from tersor.devices import find_device
from tersor.errors import TersorError
from tersor.evaluate import check_vocabulary, position_limit, text_windows
from tersor.pipeline import check_allocation
from tersor.recipes.recipe import READY, Evaluate, Export, Recipe, name_of, ready_file
from tersor.report import refuse_departures
from tersor.runs import text_windows as calibration_windows
from tersor.scope import check_inputs, settle
from tersor.source import Source
from tersor.steps import DropExperts, Shrink, Slice, State, Step, Surgery, Train
from tersor.surgery.experts import Mixture, settle_drop
from tersor.surgery.shrink import settle_shrink
from tersor.surgery.smaller import foreseen
from tersor.surgery.width import Width, check_tokens, settle_slice
from tersor.training.checkpoints import check_batch, check_teacher

Windows = dict[str, Tensor]  # name of a text -> int64 [count, seq_len]


@dataclass(frozen=True)
class Checked:
    """A recipe with all that it reads. windows: of Recipe.evaluate, and of each Evaluate among the
    steps, by its number. calibration: the token ids, or None."""

    recipe: Recipe
    source: Source
    calibration: Tensor | None
    windows: dict[int, Windows]  # 0: of the whole recipe


def check(recipe: Recipe, model: str | Path, strict: bool = False) -> Checked:
    """TersorError for what would go wrong after hours, with the step, the cause and the fix: steps
    that cannot follow one another, settings that do not go together or not with the model that the
    steps before leave, groups that do not divide its linears, text that is missing or too short, a
    teacher of another vocabulary. strict: modules that could not be treated as asked, too.

    What only the weights tell is left to the steps."""
    _order(recipe)
    source = Source.open(model)
    widths = _models(recipe, source, strict)
    for number, step in enumerate(recipe.steps, 1):
        if isinstance(step, Train) and step.teacher not in (None, "original"):
            with _named(number, step, recipe):
                check_teacher(str(step.teacher), source)
    if recipe.evaluate is not None:
        _check_causal(source)
    calibration = None
    if recipe.calibration is not None:
        calibration = calibration_windows(source, recipe.calibration)
        for number, width in widths.items():
            with _named(number, recipe.steps[number - 1], recipe):
                check_tokens(width, calibration)
    for number, step in enumerate(recipe.steps, 1):
        if isinstance(step, Train):
            with _named(number, step, recipe):
                _training_text(step, recipe.calibration, source)
    windows = {0: _windows(recipe.evaluate, source)} if recipe.evaluate is not None else {}
    for number, step in enumerate(recipe.steps, 1):
        if isinstance(step, Evaluate):
            with _named(number, step, recipe):
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
        with _named(number, step, recipe):
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


def _models(recipe: Recipe, source: Source, strict: bool) -> dict[int, Width]:
    """Every step against the model that it is going to read: the first one's, or what the cuts
    before it leave, by the functions that the steps themselves settle it with. Returns the
    hidden widths that are cut, by the number of the step."""
    widths = {}
    for number, step in enumerate(recipe.steps, 1):
        with _named(number, step, recipe):
            if isinstance(step, (Train, Evaluate)):
                _check_causal(source)
            if isinstance(step, Slice):
                widths[number] = settle_slice(source, **step.call()[1])
                source = _left(source, widths[number])
            elif isinstance(step, Surgery):
                source = _cut(step, source)
            elif isinstance(step, Step):
                _linears(step, source, strict)
    return widths


def _cut(step: Surgery, source: Source) -> Source:
    """What the step leaves of a model."""
    _, settings = step.call()
    if isinstance(step, Shrink):
        cuts, _ = settle_shrink(source, **settings)
        # Which blocks will be ranked last is not known yet; what stays is as wide in any case.
        gone = cuts.drop if isinstance(cuts.drop, tuple) else range(cuts.left, cuts.depth)
        kept = [number for number in range(cuts.depth) if number not in gone]
        return foreseen(source, cuts.config(source, kept), cuts.skeleton(source, kept))
    assert isinstance(step, DropExperts)
    return _left(source, settle_drop(source, **settings))


def _left(source: Source, made: Width | Mixture) -> Source:
    return foreseen(source, made.config(source), made.skeleton(source))


def _linears(step: Step, source: Source, strict: bool) -> None:
    """Groups, patterns and what is ignored, against the linears that there are."""
    _, settings = step.call()
    if plan := settings.get("plan"):
        plan.arguments(Path("training"))  # which transformers may refuse; nothing is written
    qat, method = settings.get("qat"), settings.get("method")
    scheme = qat.scheme if qat is not None else settings.get("scheme")
    sparsity = settings.get("sparsity") or getattr(method, "sparsity", None)
    if method is not None and "allocation" in settings:
        check_allocation(method, settings["allocation"])
    if "device" in settings:
        find_device(settings["device"])
    scope = settle(source.model, source.found, getattr(step, "ignore", ()))
    if strict and (qat is not None or not isinstance(step, Train)):
        refuse_departures(scope.departures)
    check_inputs(source.model, scope.linears, scheme and scheme.weight, sparsity)


def _check_causal(source: Source) -> None:
    """TersorError for a model that can neither be trained from folder to folder nor measured."""
    if not source.found.arch.causal or source.found.head is None:
        raise TersorError(
            f"{type(source.model).__name__} does not predict the next token; give a causal "
            "language model"
        )


def _training_text(step: Train, calibration: Calibration | None, source: Source) -> None:
    """One batch must be there; how much more there is only changes how often it is read."""
    assert calibration is not None  # checked before
    sources, texts = (step.text, ()) if step.text else (calibration.sources, calibration.texts)
    seq_len = step.seq_len or calibration.seq_len
    first = replace(calibration, sources=sources, texts=texts, samples=step.batch, seq_len=seq_len)
    check_batch(calibration_windows(source, first, fewer=True), step.batch)


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
        check_vocabulary("the model", source.model, found[name])
    return found


@contextmanager
def _named(number: int, step: Any, recipe: Recipe) -> Iterator[None]:
    """Says of an error which step it is of, and how to mend it in a recipe."""
    try:
        yield
    except TersorError as error:
        message = f"step {number}, {name_of(step)}: {_as_settings(str(error), step)}"
        if recipe.name in READY and "--" not in message:
            message += (
                f"; {recipe.name} is a ready recipe: change it in a copy of "
                f"{ready_file(recipe.name)}, and give the copy"
            )
        raise TersorError(message) from None


def _as_settings(message: str, step: Any) -> str:
    """A message about a command, with its options spelt as the settings that a recipe has for them:
    "--group 64" becomes "group: 64". Options that are no settings of the step stay."""
    known = {field.name for field in fields(step)}

    def setting(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        return name + found[2].replace(" ", ": ") if name in known else found[0]

    return re.sub(
        r"--([a-z][a-z-]*)( (?!is |or |out\b|them\b|changes )(?=[\w'])|)", setting, message
    )
