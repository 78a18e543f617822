"""The linears of a block: observed, solved, measured, and given the values that came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from tersor import kernels
from tersor.activations import StaticStats
from tersor.calibrate import GramStats, capture
from tersor.devices import CPU, described
from tersor.errors import TersorError
from tersor.qweight import QWeight, Scheme
from tersor.report import LayerReport, Timings
from tersor.scope import BlockScope, Scope
from tersor.solvers import PRUNERS, SOLVERS
from tersor.sparsity import Sparsity
from tersor.two_level import check_two_level

STATIC_NEEDS = (
    "static scales of activations need text to calibrate on; give --calibration FILE, or use "
    "--activations int8, which needs none"
)
_UNREACHED = (
    "no calibration token reached it, nor another linear of its block, and static scales of "
    "activations come of what linears read; give more text, or use --activations int8"
)
ROWS = 1024  # of a weight that are in float32 at a time


class Solver(Protocol):
    """A frozen dataclass of settings; sees no model and no hooks.

    name: its key in SOLVERS or PRUNERS. sparsity: what it makes, of PRUNERS, else None. needs: the
    statistics without which it cannot work, or None. without_input(): the solver for a linear that
    no token reached.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def name(self) -> str: ...

    @property
    def sparsity(self) -> Sparsity | None: ...

    @property
    def needs(self) -> type[GramStats] | None: ...

    def without_input(self) -> Solver: ...

    def __call__(self, w: Tensor, stats: GramStats | None, spec: Any) -> QWeight | Tensor:
        """spec: a QSpec, or None for weights that stay in 16 bits, with what the solver does to
        them beside rounding."""
        ...


def find_solver(method: str | Solver) -> Solver:
    """The solver of that name in SOLVERS with its default settings, or the one that is given."""
    if not isinstance(method, str):
        if not all(hasattr(method, name) for name in ("name", "needs", "sparsity")):
            raise TersorError(f"method is the name of a solver, or a solver, not {method!r}")
        return method
    if method in PRUNERS:
        raise TersorError(
            f"{method} needs to know how sparse; give {PRUNERS[method].__name__}(Sparsity(...))"
        )
    if method not in SOLVERS:
        raise TersorError(f"method must be one of {', '.join(SOLVERS)}, not {method!r}")
    return SOLVERS[method]()


@dataclass(frozen=True)
class Treatment:
    """What is done to a linear. scheme: None where its weight stays in 16 bits.

    Raises TersorError where that is nothing, or where one of them is something else.
    """

    solver: Solver
    scheme: Scheme | None = None

    def __post_init__(self) -> None:
        if isinstance(self.solver, (str, type)):
            raise TersorError(f"solver is one with its settings, GPTQ() say, not {self.solver!r}")
        find_solver(self.solver)
        if not isinstance(self.scheme, (Scheme, type(None))):
            raise TersorError(f"scheme is a Scheme(QSpec(...)), not {self.scheme!r}")
        if self.scheme is None and self.solver.sparsity is None:
            raise TersorError(
                f"{self.solver.name} without a scheme does nothing; give it a Scheme(QSpec(...)), "
                "or a solver with a sparsity"
            )
        if getattr(self.solver, "two_level", False):
            if self.scheme is None:
                raise TersorError(
                    "a two-level grid is of codes; give a scheme (--quantize 4), or leave "
                    "two_level (--two-level) out"
                )
            check_two_level(self.scheme.weight)


EVERY = "*"  # the pattern of a treatment that all linears get


def check_arguments(treatments: Mapping[str, Treatment | None], ignore: Sequence[str]) -> None:
    """TersorError for what a caller without a type checker gets wrong."""
    for treatment in treatments.values():
        if not isinstance(treatment, (Treatment, type(None))):
            raise TersorError(
                f"a treatment is a Treatment(GPTQ(), Scheme(QSpec(...))), or None, not "
                f"{treatment!r}"
            )
    if isinstance(ignore, str):
        raise TersorError(f"ignore is a list of patterns; write [{ignore!r}]")


def check_shared(scope: Scope, treatments: Mapping[str, Treatment]) -> None:
    """TersorError where linears that read the same activation would have its Gram matrix factored
    in two ways, which is done once for all of them. treatments: of the linears, by name."""
    for tap in (tap for block in scope.blocks for tap in block.taps):
        first: dict[tuple[float, bool], str] = {}
        for name in tap:
            solver = treatments[name].solver
            if hasattr(solver, "damp"):
                first.setdefault((solver.damp, getattr(solver, "act_order", False)), name)
        if len(first) > 1:
            told = " and ".join(
                f"{name} has damp {damp:g}, act_order {ordered}"
                for (damp, ordered), name in first.items()
            )
            raise TersorError(
                f"linears that read the same activation need the same damp and act_order, but "
                f"{told}; give their solvers the same"
            )


def settings_of(
    treatments: Mapping[str, Treatment | None],
    ignore: Sequence[str],
    sequential: bool,
    device: torch.device = CPU,
) -> dict[str, Any]:
    """Everything that a result depends on beside the model and the text, for a report.

    treatments: by pattern; that of EVERY alone is given line by line. Of several the first that
    matches counts, so they are pairs in their order.
    """
    uniform = treatments.get(EVERY) if len(treatments) == 1 else None
    if uniform is not None:
        how = _settings_of(uniform)
    else:
        methods = {each.solver.name for each in treatments.values() if each}
        how = {
            "method": ", ".join(sorted(methods)),
            "treatments": [
                [pattern, _settings_of(each) if each else None]
                for pattern, each in treatments.items()
            ],
        }
    return {
        **how,
        "sequential": sequential,
        "ignore": sorted(set(ignore)),
        **machine(),
        **described(device),
    }


def _settings_of(treatment: Treatment) -> dict[str, Any]:
    scheme, solver = treatment.scheme, treatment.solver
    activation = scheme.activation if scheme else None
    more: dict[str, Any] = {}
    if activation and activation.outliers:
        more["outliers"] = activation.outliers
    if activation and not activation.dynamic:
        more["dynamic"] = False
    return {
        "bits": scheme.weight.bits if scheme else None,
        "group": scheme.weight.group if scheme else None,
        "symmetric": scheme.weight.symmetric if scheme else None,
        "activations": activation.bits if activation else None,
        **more,
        "method": solver.name,
        **asdict(solver),
    }


def machine() -> dict[str, Any]:
    """What of the machine the order of sums depends on, and with it the last bits of a result."""
    return {
        "threads": torch.get_num_threads(),
        "isa": sorted({kernel.isa for kernel in kernels.table() if not kernel.unavailable}),
    }


@dataclass(frozen=True)
class Solved:
    """A compressed linear. weight: its codes, or without a grid its values. departure: why it was
    not treated as asked, or None. input_scale: of static activations, [1] in the dtype of the
    scales of the weight."""

    name: str
    weight: QWeight | Tensor
    report: LayerReport
    departure: str | None
    input_scale: Tensor | None = None


def compress_block(
    model: nn.Module,
    block: BlockScope,
    treatments: Mapping[str, Treatment],
    passes: Callable[[], Iterable[object]] | None,
    sequential: bool,
    timings: Timings,
) -> Iterator[Solved]:
    """Compresses the linears of a block in place and yields them in the order of its taps.

    treatments: of each of them, by name. passes: gives the forward passes of the calibration text
    through the block, as the block is when they are made; None where there is no text.
    """
    static = any(each.scheme and each.scheme.static for each in treatments.values())
    widest = torch.ones(0)  # of the scales of inputs so far
    for taps in block.rounds(sequential):
        stats: dict[str, GramStats] = {}
        if passes is not None:
            with timings.stage("observe"):
                linears = {tap[0]: model.get_submodule(tap[0]) for tap in taps}
                stats = capture(linears, passes(), StaticStats if static else GramStats)
        scales = {}
        for first, each in stats.items():
            if isinstance(each, StaticStats) and each.tokens:
                with timings.stage("solve"):
                    found = each.scale()
                if found is not None:
                    scales[first] = found
        if scales:
            widest = torch.cat([widest, *scales.values()]).amax(0, keepdim=True)
        for tap in taps:
            seen = stats.pop(tap[0], None)  # freed before the next one is factored
            scale, guess = scales.get(tap[0], widest), ""
            if tap[0] not in scales:
                guess = "no calibration token reached it"
                if seen is not None and seen.tokens:
                    guess = "calibration showed it nothing but zeros"
                    scale = widest if widest.numel() else torch.ones(1)
            for name in tap:
                with timings.stage("solve"):
                    linear = model.get_submodule(name)
                    solved = compress_linear(name, linear, seen, treatments[name], scale, guess)
                yield solved


def with_ratio(solver: Solver, ratio: float) -> Solver:
    """The solver with a sparsity of its own for one linear; 0 is the least that there is."""
    made: Solver = replace(solver, sparsity=Sparsity(max(ratio, 1e-9)))
    return made


@torch.no_grad()
def compress_linear(
    name: str,
    linear: nn.Linear,
    stats: GramStats | None,
    treatment: Treatment,
    scale: Tensor | None = None,
    guess: str = "",
    in_place: bool = True,
) -> Solved:
    """Solves for the linear's weight and puts what comes of it in its place.

    stats: of the linear's input; None or without a token where there are none, and then a solver
    that needs them gives way to another one, which is a departure.
    scale: of static activations, [1]; where the linear's own inputs say nothing of it the largest
        of others in its block, and then guess says why; empty where there is none.
    in_place: False leaves the linear as it is.
    Raises TersorError naming the layer where the weight cannot be solved.
    """
    solver, scheme = treatment.solver, treatment.scheme
    seen = stats if stats is not None and stats.tokens else None
    departure = None
    if solver.needs is not None and seen is None:
        asked, solver = solver.name, solver.without_input()
        departure = f"by {solver.name}: no calibration token reached it, {asked} needs some"
    try:
        q = solver(linear.weight.detach(), seen, scheme.weight if scheme else None)
    except TersorError as error:
        raise TersorError(f"{name}: {error}") from error
    n, k = linear.weight.shape
    loss, zeros = _replace(linear.weight, q, seen, in_place)
    report = LayerReport(
        name=name,
        shape=(n, k),
        scheme=str(scheme or "W16A16"),
        method=solver.name,
        error=loss,
        sparsity=zeros / (n * k),
        tokens=seen.tokens if seen else 0,
    )
    if seen is not None and hasattr(solver, "damp"):  # others do not factor what it is about
        report.notes += seen.notes
        departure = seen.departure
    if scheme is None or not scheme.static:
        return Solved(name, q, report, departure)
    assert isinstance(q, QWeight)
    if scale is None or not scale.numel():
        raise TersorError(f"{name}: {STATIC_NEEDS if stats is None else _UNREACHED}")
    if guess:
        guess = f"its input_scale is a guess: {guess}"
        departure = f"{departure}; {guess}" if departure else guess
    # float16 holds smaller numbers than its smallest normal one, which is not small for a scale.
    stored = torch.finfo(q.scales.dtype)
    least = max(stored.tiny * stored.eps, torch.finfo(torch.float32).tiny)
    return Solved(name, q, report, departure, scale.clamp(min=least).to(q.scales))


def _replace(
    weight: Tensor, q: QWeight | Tensor, stats: GramStats | None, in_place: bool
) -> tuple[float, int]:
    """Writes q's values into the weight; returns tr(E H Eᵀ) / tr(W H Wᵀ), E = W - Q (H = 1 without
    statistics), and how many are zero."""
    lost = total = 0.0
    zeros = 0
    for i in range(0, weight.shape[0], ROWS):
        rows = slice(i, i + ROWS)
        old = weight[rows].float()
        new = q.rows(rows).dequantize() if isinstance(q, QWeight) else q[rows].float()
        lost += _energy(old - new, stats)
        total += _energy(old, stats)  # before old, which may be a view, is overwritten
        zeros += new.numel() - int(new.count_nonzero())
        if in_place:
            weight[rows] = new.to(weight.dtype)
    return (lost / total if total > 0 else 0.0), zeros


def _energy(rows: Tensor, stats: GramStats | None) -> float:
    return float(rows.square().sum(dtype=torch.float64)) if stats is None else stats.loss(rows)
