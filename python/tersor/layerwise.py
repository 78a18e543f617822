"""The linears of a block: observed, solved, measured, and given the values of their codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import Field, asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from tersor import kernels
from tersor.calibrate import GramStats, capture
from tersor.errors import TersorError
from tersor.qweight import QSpec, QWeight, Scheme
from tersor.report import LayerReport, Timings
from tersor.scope import BlockScope
from tersor.solvers import RTN, SOLVERS

ROWS = 1024  # of a weight that are in float32 at a time


class Solver(Protocol):
    """A frozen dataclass of settings; sees no model and no hooks.

    name: its key in SOLVERS. needs: the statistics without which it cannot work, or None.
    clip: whether ranges are searched for.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    name: ClassVar[str]
    needs: ClassVar[type[GramStats] | None]

    @property
    def clip(self) -> bool: ...

    def __call__(self, w: Tensor, stats: GramStats | None, spec: QSpec) -> QWeight: ...


def find_solver(method: str | Solver) -> Solver:
    """The solver of that name in SOLVERS with its default settings, or the one that is given."""
    if not isinstance(method, str):
        return method
    if method not in SOLVERS:
        raise TersorError(f"method must be one of {', '.join(SOLVERS)}, not {method!r}")
    return SOLVERS[method]()


def settings_of(
    scheme: Scheme, solver: Solver, ignore: Sequence[str], sequential: bool
) -> dict[str, Any]:
    """Everything that a result depends on beside the model and the text, for a report."""
    return {
        "bits": scheme.weight.bits,
        "group": scheme.weight.group,
        "symmetric": scheme.weight.symmetric,
        "activations": scheme.activation.bits if scheme.activation else None,
        "method": solver.name,
        **asdict(solver),
        "sequential": sequential,
        "ignore": sorted(set(ignore)),
        # The order of sums in torch depends on these two.
        "threads": torch.get_num_threads(),
        "isa": sorted({kernel.isa for kernel in kernels.table() if not kernel.unavailable}),
    }


@dataclass(frozen=True)
class Solved:
    """A quantized linear. departure: why it was not treated as asked, or None."""

    name: str
    weight: QWeight
    report: LayerReport
    departure: str | None


def quantize_block(
    model: nn.Module,
    block: BlockScope,
    solver: Solver,
    scheme: Scheme,
    passes: Callable[[], Iterable[object]] | None,
    sequential: bool,
    timings: Timings,
) -> Iterator[Solved]:
    """Quantizes the linears of a block in place and yields them in the order of its taps.

    passes: gives the forward passes of the calibration text through the block, as the block is when
    they are made; None where there is no text.
    """
    for taps in block.rounds(sequential):
        stats: dict[str, GramStats] = {}
        if passes is not None:
            with timings.stage("observe"):
                stats = capture({tap[0]: model.get_submodule(tap[0]) for tap in taps}, passes())
        for tap in taps:
            seen = stats.pop(tap[0], None)  # freed before the next one is factored
            for name in tap:
                with timings.stage("solve"):
                    solved = quantize_linear(name, model.get_submodule(name), seen, solver, scheme)
                yield solved


@torch.no_grad()
def quantize_linear(
    name: str, linear: nn.Linear, stats: GramStats | None, solver: Solver, scheme: Scheme
) -> Solved:
    """Quantizes the linear's weight and puts what the codes stand for in its place.

    stats: of the linear's input; None or without a token where there are none, and then a solver
    that needs them gives way to rounding, which is a departure.
    Raises TersorError naming the layer where the weight cannot be solved.
    """
    seen = stats if stats is not None and stats.tokens else None
    departure = None
    if solver.needs is not None and seen is None:
        departure = f"rounded to nearest: no calibration token reached it, {solver.name} needs some"
        solver = RTN(clip=solver.clip)
    try:
        q = solver(linear.weight.detach(), seen, scheme.weight)
    except TersorError as error:
        raise TersorError(f"{name}: {error}") from error
    report = LayerReport(
        name=name,
        shape=(q.n, q.k),
        scheme=str(scheme),
        method=solver.name,
        error=_replace(linear, q, seen),
        tokens=seen.tokens if seen else 0,
    )
    if seen is not None:
        report.notes += seen.notes
        departure = seen.departure
    return Solved(name, q, report, departure)


def _replace(linear: nn.Linear, q: QWeight, stats: GramStats | None) -> float:
    """Writes q's values into the linear; returns tr(E H Eᵀ) / tr(W H Wᵀ), E = W - Q (H = 1 without
    statistics)."""
    lost = total = 0.0
    for i in range(0, q.n, ROWS):
        rows = slice(i, i + ROWS)
        zeros = None if q.zeros is None else q.zeros[rows]
        old = linear.weight[rows].float()
        new = QWeight(q.spec, q.codes[rows], q.scales[rows], zeros, q.order).dequantize()
        lost += _energy(old - new, stats)
        total += _energy(old, stats)  # before old, which may be a view, is overwritten
        linear.weight[rows] = new.to(linear.weight.dtype)
    return lost / total if total > 0 else 0.0


def _energy(rows: Tensor, stats: GramStats | None) -> float:
    return float(rows.square().sum(dtype=torch.float64)) if stats is None else stats.loss(rows)
