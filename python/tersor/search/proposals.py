"""Choices that need no trials: what the sensitivities say is best, for many bounds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tersor.errors import TersorError
from tersor.search.additive import Array, Unreachable, solve, undominated
from tersor.search.constraints import Constraint, show
from tersor.search.costs import Costs
from tersor.search.space import Choice

NOISE = 0.2  # standard deviation of the logarithm
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
    then, for each cost alone, the cheapest ones for sums of losses that fall evenly, in their
    logarithm, from those of the least cost on.

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
    rows = max(2, -(-(count - len(found)) // len(names)))
    for i in range(rows):
        for front in sums:
            worst = float(front.losses.max())
            least = float(front.losses[front.losses > 0].min(initial=worst))
            limit = worst * (least / worst) ** (i / (rows - 1)) if worst > 0 else 0.0
            good = np.flatnonzero(front.losses <= limit * (1 + 1e-9))
            cheapest = good[front.costs[good, 0].argmin()]
            found[tuple(int(number) for number in front.choices[cheapest])] = None
    return list(found)[:count]


def perturbed(
    losses: Array, costs: Costs, constraints: tuple[Constraint, ...], count: int, seed: int
) -> list[Choice]:
    """Up to `count` different choices within the constraints, each the best one for losses that are
    multiplied by log-normal noise. Where losses do not add up, one of them may be better than the
    best for the losses as they are."""
    draw = np.random.default_rng(seed)
    found: dict[Choice, None] = {}
    for _ in range(2 * count):
        if len(found) == count:
            break
        noisy = losses * np.exp(draw.normal(0.0, NOISE, losses.shape))
        found[within(noisy, costs, constraints)] = None
    return list(found)
