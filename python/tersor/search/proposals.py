"""Choices that need no trials: what the sensitivities say is best, for many bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tersor.errors import TersorError
from tersor.search.additive import Unreachable, solve, undominated
from tersor.search.constraints import Constraint, show
from tersor.search.costs import Costs

Array = Any  # numpy's, whose types differ too much between its releases
Choice = tuple[int, ...]
MARGINS = (1.0, 0.97, 0.94, 0.9)  # of the bounds, since losses do not quite add up


def within(
    losses: Array, costs: Costs, constraints: tuple[Constraint, ...], margin: float = 1.0
) -> Choice:
    """The choice with the least sum of losses that keeps the constraints.

    losses: float64 [units, candidates]. margin: a share of every bound to keep within.
    Raises TersorError naming the constraint that cannot be kept, and the least there is of it.
    """
    original = costs.original
    bounds = [each.limit(original[each.name]) * margin for each in constraints]
    tables = [costs.table(each.name) for each in constraints]
    names = [each.name for each in constraints]
    try:
        return tuple(int(number) for number in solve(losses, tables, bounds, names))
    except Unreachable as error:
        bound = next(each for each in constraints if each.name == error.name)
        raise TersorError(_explain(bound, error, original)) from error


def _explain(bound: Constraint, error: Unreachable, original: Mapping[str, float]) -> str:
    whole = original[error.name]
    if error.name == "sparsity":
        reach = f"the most zeros that these candidates have is {1 - error.least / whole:.4f}"
        fix = "add sparser candidates (--pattern, --sparsity)"
    else:
        least = f"{show(error.name, error.least)}, {error.least / whole:.4f}x"
        reach = f"the least {error.name} that these candidates reach is {least}"
        fix = "add smaller candidates (--bits, --pattern)"
    beside = f" where {' and '.join(error.kept)} is kept" if error.kept else ""
    return f"{bound} cannot be kept: {reach}{beside}; relax it, or {fix}"


def spread(
    losses: Array, costs: Costs, constraints: tuple[Constraint, ...], count: int, zeros: bool
) -> list[Choice]:
    """Up to `count` different choices: the best within the constraints and a little inside them,
    then, for bounds on each cost alone that rise evenly from the least to the most, the best.

    zeros: a bound on the share of zeros is one of the costs.
    """
    found: dict[Choice, None] = {}
    for margin in MARGINS if constraints else ():
        try:
            found[within(losses, costs, constraints, margin)] = None
        except TersorError:
            if margin == 1.0:
                raise
    names = ["size", "latency"] + ["sparsity"] * zeros
    sums = [undominated(losses, [costs.table(name)]) for name in names]
    each = max(2, -(-(count - len(found)) // len(names)))
    for i in range(each):
        for name, front in zip(names, sums, strict=True):
            spent = front.costs[:, 0]
            low, high = float(spent.min()), float(spent.max())
            bound = low * (high / low) ** (i / (each - 1)) if low > 0 else high
            within_bound = np.flatnonzero(spent <= bound * (1 + 1e-9))
            best = within_bound[front.losses[within_bound].argmin()]
            found[tuple(int(number) for number in front.choices[best])] = None
            if name == "latency" and low == high:
                break  # nothing of the space is faster than anything else
    return list(found)[:count]
