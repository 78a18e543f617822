"""Steps of a compression as values: settings without the folders that they work on.

    small = Shrink(heads=0.2, ffn=0.25, layers=2)
    report = small("path/to/model", "model-small", text)

Each step reads a checkpoint and writes another one, by the function named in its docstring. Its
settings are those of the command of its name, as people write them in a recipe: numbers, words and
lists. Steps are frozen and compare by value, so that a list of them says what was done to a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tersor.devices import AUTO
from tersor.errors import TersorError
from tersor.qweight import ActSpec, QSpec, Scheme
from tersor.solvers import PRUNERS, SOLVERS
from tersor.sparsity import Sparsity
from tersor.training.plan import Plan, plan_of

if TYPE_CHECKING:
    from tersor.calibrate import Calibration
    from tersor.layerwise import Solver
    from tersor.report import Report
    from tersor.training.checkpoints import QAT


@dataclass(frozen=True)
class State:
    """What is known of a model between two steps.

    quantized: its scheme, once its weights are codes. zeros: what of its linears is zero, once
    weights were pruned one by one. by: the step that did the one or the other last.
    """

    quantized: Scheme | None = None
    zeros: Sparsity | None = None
    by: str = ""


class Step(ABC):
    """What all steps have in common: (model, out, calibration) -> Report, of folders."""

    name: ClassVar[str]  # in recipes, and of the command

    def __call__(
        self,
        model: str | Path,
        out: str | Path,
        calibration: Calibration | None = None,
        *,
        strict: bool = False,
        progress: bool | None = None,
    ) -> Report:
        """Reads the folder `model`, and makes the folder `out`."""
        function, settings = self.call()
        report: Report = function(
            model, out, calibration=calibration, strict=strict, progress=progress, **settings
        )
        return report

    @abstractmethod
    def call(self) -> tuple[Callable[..., Report], dict[str, Any]]:
        """What does the work, and its arguments beside those that all have; TersorError for
        settings that do not go together. Nothing is read."""

    @property
    def reads_text(self) -> bool:
        """Whether it cannot do without text."""
        return True

    def after(self, state: State) -> State:
        """What the model is then; TersorError where the step cannot follow on what it was."""
        self.refuse_codes(state)
        return state

    def refuse_codes(self, state: State) -> None:
        """TersorError where weights are codes already."""
        if state.quantized is not None:
            raise TersorError(
                f"{self.name} cannot follow {state.by}, after which weights are {state.quantized} "
                f"codes and no longer numbers to work on; put {self.name} before it"
            )


@dataclass(frozen=True, kw_only=True)
class Quantize(Step):
    """quantize_checkpoint.

    method: a name in SOLVERS, or a solver. bits, group, asymmetric, activations: see scheme_of.
    act_order, damp, clip, two_level: of the solver; None leaves it as it has them.
    device: where the work is done; see quantize_checkpoint.
    """

    name: ClassVar[str] = "quantize"
    method: str | Solver = "gptq"
    bits: int = 4
    group: int | str | None = None
    asymmetric: bool = False
    activations: str | None = None
    act_order: bool | None = None
    damp: float | None = None
    clip: bool | None = None
    two_level: bool | None = None
    ignore: tuple[str, ...] = ()
    sequential: bool = False
    device: str = AUTO

    @property
    def reads_text(self) -> bool:
        return self._solver().needs is not None or self._scheme().static

    def call(self) -> tuple[Callable[..., Report], dict[str, Any]]:
        from tersor.pipeline import quantize_checkpoint

        scheme = self._scheme()
        rest = {"ignore": self.ignore, "sequential": self.sequential, "device": self.device}
        return quantize_checkpoint, {"scheme": scheme, "method": self._solver(), **rest}

    def after(self, state: State) -> State:
        from tersor.layerwise import Treatment

        self.refuse_codes(state)
        scheme = self._scheme()
        Treatment(self._solver(), scheme)  # refuses what does not go together
        return replace(state, quantized=scheme, by=self.name)

    def _scheme(self) -> Scheme:
        return scheme_of(self.bits, self.group, self.asymmetric, self.activations)

    def _solver(self) -> Solver:
        names = ("act_order", "damp", "clip", "two_level")
        given = {name: getattr(self, name) for name in names}
        return solver_of(self.method, SOLVERS, given)


@dataclass(frozen=True, kw_only=True)
class Prune(Step):
    """prune_checkpoint, of single weights.

    method: a name in PRUNERS, or a solver with its sparsity. sparsity: a share of zeros; pattern:
        N:M in its place. allocation: how a share is spread. refit, per: of the solver.
    quantize: bits, to quantize what is left in the same pass; then the rest is as in Quantize.
    """

    name: ClassVar[str] = "prune"
    method: str | Solver = "sparsegpt"
    sparsity: float | None = None
    pattern: str | None = None
    allocation: str = "uniform"
    refit: bool | None = None
    per: str | None = None
    quantize: int | None = None
    group: int | str | None = None
    asymmetric: bool = False
    activations: str | None = None
    act_order: bool | None = None
    damp: float | None = None
    clip: bool | None = None
    two_level: bool | None = None
    ignore: tuple[str, ...] = ()
    sequential: bool = False
    device: str = AUTO

    @property
    def reads_text(self) -> bool:
        scheme = self._scheme()
        static = scheme is not None and scheme.static
        return static or self._solver().needs is not None or self.allocation == "owl"

    def call(self) -> tuple[Callable[..., Report], dict[str, Any]]:
        from tersor.pipeline import prune_checkpoint

        rest = {"ignore": self.ignore, "sequential": self.sequential, "device": self.device}
        rest["allocation"] = self.allocation
        return prune_checkpoint, {"method": self._solver(), "scheme": self._scheme(), **rest}

    def after(self, state: State) -> State:
        self.refuse_codes(state)
        if state.zeros is not None:
            raise TersorError(
                f"prune cannot follow {state.by}, which made {state.zeros} of the weights zero: "
                "one choice of zeros would undo the other; prune once, as far as you want"
            )
        return State(self._scheme(), self._solver().sparsity, self.name)

    def _scheme(self) -> Scheme | None:
        if self.quantize is None:
            for setting in ("group", "asymmetric", "activations", "two_level"):
                if getattr(self, setting):
                    option = setting.replace("_", "-")
                    raise TersorError(
                        f"--{option} is of a grid; add --quantize BITS, or leave it out"
                    )
            return None
        return scheme_of(self.quantize, self.group, self.asymmetric, self.activations)

    def _solver(self) -> Solver:
        names = ("refit", "per", "act_order", "damp", "clip", "two_level")
        given = {name: getattr(self, name) for name in names}
        if not isinstance(self.method, str):
            if self.sparsity is not None or self.pattern is not None:
                raise TersorError("the solver knows its sparsity; leave sparsity and pattern out")
            return solver_of(self.method, PRUNERS, given)
        if self.sparsity is not None and self.pattern is not None:
            raise TersorError("sparsity and pattern are one or the other; leave one out")
        if self.sparsity is None and self.pattern is None:
            raise TersorError(
                "give sparsity, a share of zeros such as 0.5, or a pattern such as 2:4"
            )
        if self.per and self.pattern:
            raise TersorError(
                "--per is what --sparsity is kept over; a pattern is of rows: leave it out"
            )
        sparsity = Sparsity.parse(self.pattern) if self.pattern else Sparsity(self.sparsity)
        return solver_of(self.method, PRUNERS, given, sparsity=sparsity)


@dataclass(frozen=True, kw_only=True)
class Train(Plan, Step):
    """train_checkpoint; a Plan with what is learned from and on.

    teacher: the folder of a model to learn from; "original": in a recipe, the model that it begins
        with; None: none, the text alone. loss, temperature, alpha: of Distillation.
    text: files to train on; empty: those of the calibration.
    sparsity, pattern: weights to mask in the course of the training; what is zero already stays.
    """

    teacher: str | None = "original"
    loss: str = "forward_kl"
    temperature: float = 1.0
    alpha: float = 1.0
    text: tuple[str, ...] = ()
    sparsity: float | None = None
    pattern: str | None = None

    def call(self) -> tuple[Callable[..., Report], dict[str, Any]]:
        if find_spec("accelerate") is None:
            raise TersorError("training needs accelerate; run pip install 'tersor[train]'")

        from tersor.training.checkpoints import train_checkpoint
        from tersor.training.losses import Distillation

        settings: dict[str, Any] = {"plan": plan_of(self), "text": self.text}
        settings["sparsity"] = self._sparsity()
        distillation = Distillation(self.loss, self.temperature, self.alpha)
        if self.teacher is None:
            if distillation != Distillation(alpha=1.0):
                raise TersorError("loss, temperature and alpha are of a teacher's predictions")
        else:
            settings |= {"teacher": self.teacher, "distillation": distillation}
        return train_checkpoint, settings

    def __call__(self, model: str | Path, *given: Any, **named: Any) -> Report:
        step = self.learns_from(model)
        return super(Train, step).__call__(model, *given, **named)

    def learns_from(self, original: str | Path) -> Train:
        """The step with the original model's folder as its teacher, where it names no other."""
        return replace(self, teacher=str(original)) if self.teacher == "original" else self

    def after(self, state: State) -> State:
        self.refuse_codes(state)
        sparsity = self._sparsity()
        if sparsity is None:
            return state
        if state.zeros is not None:
            raise TersorError(
                f"{self.name} cannot make {sparsity} of the weights zero after {state.by}, which "
                f"made {state.zeros} of them zero; leave one of the two out"
            )
        return replace(state, zeros=sparsity, by=self.name)

    def _sparsity(self) -> Sparsity | None:
        if self.sparsity is not None and self.pattern is not None:
            raise TersorError("sparsity and pattern are one or the other; leave one out")
        if self.pattern is not None:
            return Sparsity.parse(self.pattern)
        return None if self.sparsity is None else Sparsity(self.sparsity)


@dataclass(frozen=True, kw_only=True)
class Distill(Train):
    """Training on what a teacher predicts."""

    name: ClassVar[str] = "distill"

    def call(self) -> tuple[Callable[..., Report], dict[str, Any]]:
        if self.teacher is None:
            raise TersorError("distill learns from a teacher; name one, or leave it out: original")
        return super().call()


@dataclass(frozen=True, kw_only=True)
class QuantizationAware(Train):
    """Training with weights as they will be once quantized; by default with a teacher.

    bits, group, asymmetric, activations: see scheme_of. scales, start, output: see tersor.QAT.
    """

    name: ClassVar[str] = "qat"
    bits: int = 4
    group: int | str | None = None
    asymmetric: bool = False
    activations: str | None = None
    scales: str = "learned"
    start: str = "gptq"
    output: str = "codes"
    ignore: tuple[str, ...] = ()

    def call(self) -> tuple[Callable[..., Report], dict[str, Any]]:
        function, settings = super().call()
        return function, settings | {"qat": self._qat()}

    def after(self, state: State) -> State:
        state, qat = super().after(state), self._qat()
        if qat.output == "weights":
            return state
        return replace(state, quantized=qat.scheme, by=self.name)

    def _qat(self) -> QAT:
        from tersor.training.checkpoints import QAT

        scheme = scheme_of(self.bits, self.group, self.asymmetric, self.activations)
        rest = {"scales": self.scales, "start": self.start, "output": self.output}
        return QAT(scheme=scheme, ignore=self.ignore, **rest)


class Surgery(Step):
    """A step that takes parts out, and leaves a smaller model of the same class."""

    def after(self, state: State) -> State:
        self.refuse_codes(state)
        if state.zeros is not None:
            raise TersorError(
                f"{self.name} cannot follow {state.by}: it gives other values to the weights that "
                f"are left, zeros among them; put {self.name} before {state.by}"
            )
        return state

    def call(self) -> tuple[Callable[..., Report], dict[str, Any]]:
        settings = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return self.function(), settings

    @abstractmethod
    def function(self) -> Callable[..., Report]:
        """Whose arguments are the fields."""


@dataclass(frozen=True, kw_only=True)
class Shrink(Surgery):
    """shrink_checkpoint."""

    name: ClassVar[str] = "shrink"
    heads: float = 0.0
    query_heads: float = 0.0
    ffn: float = 0.0
    layers: int | tuple[int, ...] = 0
    multiple: int | None = None
    importance: str = "output"
    head_importance: str | None = None
    layer_importance: str = "influence"
    ranking: str = "local"
    update: str = "least-squares"
    damp: float = 0.01

    @property
    def reads_text(self) -> bool:
        ranks = isinstance(self.layers, int) and self.layers > 0
        by_weights = {self.importance, self.head_importance or "magnitude"} == {"magnitude"}
        parts = self.heads or self.query_heads or self.ffn
        return ranks or bool(parts and not (by_weights and self.update == "none"))

    def function(self) -> Callable[..., Report]:
        from tersor.surgery.shrink import shrink_checkpoint

        return shrink_checkpoint


@dataclass(frozen=True, kw_only=True)
class Slice(Surgery):
    """slice_checkpoint."""

    name: ClassVar[str] = "slice"
    hidden: float
    multiple: int | None = None
    update: str = "least-squares"
    damp: float = 0.01

    def function(self) -> Callable[..., Report]:
        from tersor.surgery.slicing import slice_checkpoint

        return slice_checkpoint


@dataclass(frozen=True, kw_only=True)
class DropExperts(Surgery):
    """drop_experts."""

    name: ClassVar[str] = "drop_experts"
    experts: float
    importance: str = "output"

    @property
    def reads_text(self) -> bool:
        return self.importance != "magnitude"

    def function(self) -> Callable[..., Report]:
        from tersor.surgery.experts import drop_experts

        return drop_experts


ACTIVATIONS = {"int8": ActSpec(), "int8-static": ActSpec(dynamic=False)}


def scheme_of(
    bits: int,
    group: int | str | None = None,
    asymmetric: bool = False,
    activations: str | None = None,
) -> Scheme:
    """The scheme of settings as people write them.

    group: columns that share a scale, or "row"; None is 128, or the row where both weights and
        activations have 8 bits. activations: one of ACTIVATIONS, or None for 16 bits.
    """
    if activations is not None and activations not in ACTIVATIONS:
        raise TersorError(
            f"activations can be {' or '.join(ACTIVATIONS)}, not {activations!r}; leave it out for "
            "16 bits"
        )
    if isinstance(group, str) and group != "row":
        raise TersorError(f"group is a number of columns or row, not {group!r}")
    if group is None:
        group = "row" if bits == 8 and activations else 128
    spec = QSpec(bits, None if group == "row" else group, symmetric=not asymmetric)  # type: ignore[arg-type]
    return Scheme(spec, ACTIVATIONS[activations] if activations else None)


def solver_of(
    method: str | Solver,
    table: Mapping[str, Callable[..., Solver]],
    settings: Mapping[str, Any],
    **given: Any,
) -> Solver:
    """The solver of that name with those settings that are not None; whichever it lacks is refused.
    given: what every solver of the table takes."""
    asked = {name: value for name, value in settings.items() if value is not None}
    if not isinstance(method, str):
        if asked:
            raise TersorError(f"{next(iter(asked))} is a setting of the solver; give it there")
        return method
    if method not in table:
        raise TersorError(f"--method {method} is unknown; use {' or '.join(table)}")
    make: Any = table[method]
    for name in asked.keys() - {field.name for field in fields(make)}:
        option = "--" + name.replace("_", "-")
        raise TersorError(f"{option} changes nothing for --method {method}; leave it out")
    made: Solver = make(**given, **asked)
    return made


# By the name in recipes.
STEPS: dict[str, type[Step]] = {
    step.name: step
    for step in (Distill, Prune, QuantizationAware, Quantize, Shrink, Slice, DropExperts)
}
