"""The best choice for losses that add up: one candidate for each unit, the least sum of losses
within bounds on the sums of costs.

That is the multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger, Knapsack Problems,
chapter 11), with one or several bounds. It is solved by dynamic programming over the units: of all
choices for the first units only those are kept that no other one beats in loss and in every cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersor.errors import TersorError

Array = Any  # numpy's, whose types differ too much between its releases

CELLS = 1 << 16  # partial choices that are kept at most, on a grid over the costs
SLACK = 1e-9  # relative; sums of floats are bounded up to this


@dataclass(frozen=True)
class Sums:
    """Choices that no other one beats. choices: int64 [count, units]; losses: float64 [count];
    costs: float64 [count, bounds]."""

    choices: Array
    losses: Array
    costs: Array


def undominated(
    losses: Array, costs: Sequence[Array], bounds: Sequence[float] | None = None
) -> Sums:
    """All choices that are best for some bounds on the costs.

    losses: float64 [units, candidates], never negative infinity or NaN. costs: for each bound, the
        same shape, not negative. bounds: the most of each cost, None for no bound: what cannot stay
        within it any more is dropped early.

    Costs are told apart on a grid with CELLS cells: exactly as long as the sums of each cost have
    no more different values than the grid has lines, and otherwise to within a cell.
    """
    units, candidates = losses.shape
    table = np.stack([np.asarray(cost, dtype=np.float64) for cost in costs], axis=-1)
    most = np.full(len(costs), np.inf) if bounds is None else np.asarray(bounds, dtype=np.float64)
    most = most * (1 + SLACK)
    # What the units from i on take at least.
    least = np.zeros((units + 1, len(costs)))
    least[:-1] = table.min(axis=1)[::-1].cumsum(axis=0)[::-1]
    lost, spent = np.zeros(1), np.zeros((1, len(costs)))
    steps: list[tuple[Array, Array]] = []
    parent: Array
    choice: Array
    for unit in range(units):
        next_lost = (lost[:, None] + losses[unit]).ravel()
        next_spent = (spent[:, None, :] + table[unit]).reshape(-1, len(costs))
        parent = np.repeat(np.arange(len(lost), dtype=np.int32), candidates)
        choice = np.tile(np.arange(candidates, dtype=np.int16), len(lost))
        fits = (next_spent + least[unit + 1] <= most).all(axis=1)
        kept = np.flatnonzero(fits)[_unbeaten(next_lost[fits], next_spent[fits])]
        lost, spent = next_lost[kept], next_spent[kept]
        steps.append((parent[kept], choice[kept]))
    choices = np.empty((len(lost), units), dtype=np.int64)
    at = np.arange(len(lost))
    for unit in reversed(range(units)):
        parent, choice = steps[unit]
        choices[:, unit] = choice[at]
        at = parent[at]
    return Sums(choices, lost, spent)


def _unbeaten(losses: Array, costs: Array) -> Array:
    """Numbers of the entries that no other one beats."""
    if not len(losses):
        return np.empty(0, dtype=np.int64)
    lines = int(CELLS ** (1 / costs.shape[1]))
    places: list[Array] = []
    shape: list[int] = []
    column: Array
    for column in costs.T:
        values, place = np.unique(column, return_inverse=True)
        if len(values) > lines:
            width = (values[-1] - values[0]) / (lines - 1)
            place = ((column - values[0]) / width).astype(np.int64)
        places.append(place)
        shape.append(int(place.max()) + 1)
    cells: Array = np.ravel_multi_index(places, shape)
    # The first of each cell, by loss and then by costs, so that equal ones are told apart.
    order = np.lexsort((*costs.T, losses, cells))
    first = np.flatnonzero(np.diff(cells[order], prepend=-1))
    best = order[first]
    grid: Array = np.full(shape, np.inf)
    grid.ravel()[cells[best]] = losses[best]
    # The least loss for at most the costs of a cell, its own left out: that of the cells before it
    # along each axis, everything before them taken in.
    before = grid
    for axis in range(grid.ndim):
        before = np.minimum.accumulate(before, axis=axis)
    others: Array = np.full(shape, np.inf)
    for axis in range(grid.ndim):
        ahead = [slice(None)] * grid.ndim
        behind = [slice(None)] * grid.ndim
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        others[tuple(ahead)] = np.minimum(others[tuple(ahead)], before[tuple(behind)])
    return best[losses[best] < others.ravel()[cells[best]]]


def solve(
    losses: Array,
    costs: Sequence[Array],
    bounds: Sequence[float],
    names: Sequence[str] = (),
) -> Array:
    """The choice with the least sum of losses within the bounds, int64 [units].

    Arguments as in `undominated`; names: of the costs, for messages.
    Raises Unreachable, naming the cost and the least of it that can be had.
    """
    names = names or [f"cost {number}" for number in range(len(costs))]
    for name, cost, bound in zip(names, costs, bounds, strict=True):
        least = float(np.asarray(cost).min(axis=1).sum())
        if least > bound * (1 + SLACK):
            raise Unreachable(name, least, bound)
    if not costs:
        return losses.argmin(axis=1)
    sums = undominated(losses, costs, bounds)
    if len(sums.losses):
        return sums.choices[int(sums.losses.argmin())]
    # Each bound can be kept on its own, but the grid has lost a choice that keeps them all, or
    # there is none. What is left of the last cost, the others kept, decides.
    last = np.asarray(costs[-1], dtype=np.float64)
    rest = solve(last, costs[:-1], bounds[:-1], names[:-1])
    least = float(last[np.arange(len(rest)), rest].sum())
    if least > bounds[-1] * (1 + SLACK):
        raise Unreachable(names[-1], least, bounds[-1], kept=tuple(names[:-1]))
    return rest


class Unreachable(TersorError):  # noqa: N818 - reads as what it says of the bound
    """No choice keeps a bound. least: of that cost, where those in `kept` are kept."""

    def __init__(self, name: str, least: float, bound: float, kept: tuple[str, ...] = ()) -> None:
        self.name, self.least, self.bound, self.kept = name, least, bound, kept
        beside = f" where {' and '.join(kept)} are kept" if kept else ""
        super().__init__(f"{name} cannot be at most {bound:g}: the least is {least:g}{beside}")
