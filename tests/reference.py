"""Float64 oracles: slow, obvious, and written from the papers rather than from the code under test.

Shape letters: n output features, k input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

U32 = 2.0**-24  # unit roundoff of float32
U64 = 2.0**-53


def damped(gram: Tensor, damp: float) -> Tensor:
    """gram [k, k] + damp * mean(diagonal) * I in float64. Inputs that never fired take no part in
    the mean and get a diagonal of 1 and nothing else."""
    h = gram.double().clone()
    dead = h.diagonal() == 0
    h[dead, :] = 0
    h[:, dead] = 0
    live = ~dead
    mean = h.diagonal()[live].mean() if live.any() else torch.tensor(1.0)
    h += torch.diag(torch.where(live, damp * mean, 1.0))
    return h


def unit_factor(h: Tensor) -> tuple[Tensor, Tensor]:
    """U unit upper triangular and d such that h = U diag(d) Uᵀ: by elimination from the last column
    to the first, in float64."""
    rest = h.double().clone()
    k = rest.shape[0]
    unit, pivots = torch.eye(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    for i in reversed(range(k)):
        pivots[i] = rest[i, i]
        unit[:i, i] = rest[:i, i] / rest[i, i]
        rest[:i, :i] -= pivots[i] * torch.outer(unit[:i, i], unit[:i, i])
    return unit, pivots


def spread(grid: Tensor, group_of_column: Tensor) -> Tensor:
    """Scales or zeros [n, groups] -> float64 [n, k], one for each weight."""
    return grid.double()[:, group_of_column.long()]


def round_to_nearest(w: Tensor, scales: Tensor, zeros: Tensor, levels: int) -> Tensor:
    """Codes for w, scales and zeros [n, k]: float64 throughout, ties to even."""
    return (torch.round(w.double() / scales) + zeros).clamp(0, levels - 1)


@dataclass
class Rounded:
    """What a reference rounded, and to what; all float64 [n, k]."""

    codes: Tensor
    values: Tensor  # the weight plus what earlier columns passed on, just before it was rounded
    rounded: Tensor


def gptq_inverse_form(w: Tensor, h: Tensor, scales: Tensor, zeros: Tensor, levels: int) -> Rounded:
    """GPTQ as published (Frantar et al., arXiv:2210.17323, algorithm 1), one column at a time.

    h: damped Gram matrix [k, k]; scales, zeros: [n, k], found before the pass ("static groups").
    """
    upper = torch.linalg.cholesky(torch.linalg.inv(h.double()), upper=True)
    w = w.double().clone()
    values, codes = torch.empty_like(w), torch.empty_like(w)
    rounded = torch.empty_like(w)
    for i in range(w.shape[1]):
        values[:, i] = w[:, i]
        codes[:, i] = round_to_nearest(w[:, i], scales[:, i], zeros[:, i], levels)
        rounded[:, i] = (codes[:, i] - zeros[:, i]) * scales[:, i]
        error = (w[:, i] - rounded[:, i]) / upper[i, i]
        w[:, i:] -= torch.outer(error, upper[i, i:])
    return Rounded(codes, values, rounded)


def check_gptq_codes(
    codes: Tensor, w: Tensor, h: Tensor, scales: Tensor, zeros: Tensor, levels: int
) -> float:
    """Compares codes [n, k], computed in float32, with `gptq_inverse_form`, and returns the share
    of rows that are equal. AssertionError for a difference that rounding errors cannot explain.

    After a first difference in a row everything may differ, so only the first one is judged: there
    the reference must have been within the error of float32 of a tie, and the codes be neighbours.

    The bound on that error (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
    The solver computes v_i = w_i + Σ_j e_j U_ji with e_j = w_j - q_j. It sums products in runs of
    at most 128 and adds the runs, so that a term goes through at most 128 + k/128 additions in
    finished blocks, or 128 within its own; its product, U_ji and v_i / scale are rounded once each
    (and 18 more for what is of second order). So |δv| ≤ u ((146 + k/128) (|w_i| + Σ|e_j||U_ji|) +
    Σ |U_ji| (|q_j| + |e_j|)), the last term from the rounding of q_j and of e_j. Both factors are
    computed in float64 with a relative error of k cond(H) 2⁻⁵³ at most.
    """
    expected = gptq_inverse_form(w, h, scales, zeros, levels)
    unit, _ = unit_factor(h)
    strict = unit.abs() - torch.eye(unit.shape[0], dtype=torch.float64)
    errors = (w.double() - expected.rounded).abs()
    total = w.double().abs() + errors @ strict
    k = w.shape[1]
    bound = U32 * ((146 + k / 128) * total + (expected.rounded.abs() + errors) @ strict)
    bound += 2 * k * float(torch.linalg.cond(h)) * U64 * total

    differs = codes.double() != expected.codes
    rows = differs.any(1).nonzero().flatten()
    first = differs[rows].int().argmax(1)
    steps = expected.values[rows, first] / scales[rows, first]
    to_tie = ((steps - steps.floor()) - 0.5).abs() * scales[rows, first]
    assert (to_tie <= bound[rows, first]).all(), (to_tie, bound[rows, first])
    gap = (codes[rows, first].double() - expected.codes[rows, first]).abs()
    assert (gap == 1).all(), gap
    return 1 - len(rows) / len(w)


@dataclass
class Pruned:
    """What a reference made of a weight; all [n, k].

    values: float64, the weight. loss: what it cost to make each weight zero when that was decided,
    as |w| / [H⁻¹]_jj^½; boundary: what it would have had to reach in order to stay.
    """

    values: Tensor
    kept: Tensor
    loss: Tensor
    boundary: Tensor


def sparsegpt_inverse_form(
    w: Tensor,
    h: Tensor,
    ratio: float = 0.0,
    pattern: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    grid: tuple[Tensor, Tensor, int] | None = None,
    block: int = 128,
) -> Pruned:
    """SparseGPT as published (Frantar and Alistarh, arXiv:2301.00774, algorithm 1), one column at a
    time, with the inverse of the damped Gram matrix h [k, k].

    ratio: of each block, all rows together; pattern: (kept, of), decided at the first of its
    columns, or of its block where it is wider than 16; mask: bool [n, k] of what stays.
    grid: scales and zeros [n, k], and levels.
    """
    upper = torch.linalg.cholesky(torch.linalg.inv(h.double()), upper=True)
    w = w.double().clone()
    n, k = w.shape
    result = Pruned(torch.zeros_like(w), torch.ones(n, k).bool(), *torch.zeros(2, n, k).double())
    if mask is not None:
        result.kept = mask.clone()

    def decide(begin: int, end: int, zeros: int, dim: int | None) -> None:
        loss = w[:, begin:end].abs() / upper.diagonal()[begin:end]
        ordered = (loss.flatten() if dim is None else loss).sort(dim=-1).values
        boundary = ordered[..., zeros : zeros + 1].expand_as(loss)
        result.loss[:, begin:end], result.boundary[:, begin:end] = loss, boundary
        result.kept[:, begin:end] = loss >= boundary

    for i in range(k):
        if ratio and i % block == 0:
            end = min(k, i + block)
            decide(i, end, int(ratio * n * (end - i)), None)
        if pattern is not None:
            kept, of = pattern
            if i % (of if of <= 16 else block) == 0:
                for begin in range(i, min(k, i + max(of, block if of > 16 else 0)), of):
                    decide(begin, begin + of, of - kept, 1)
        value = torch.where(result.kept[:, i], w[:, i], 0)
        if grid is not None:
            scales, zeros, levels = grid[0][:, i], grid[1][:, i], grid[2]
            value = (round_to_nearest(value, scales, zeros, levels) - zeros) * scales
        result.values[:, i] = value
        error = (w[:, i] - value) / upper[i, i]
        w[:, i:] -= torch.outer(error, upper[i, i:])
    return result


def check_pruned(found: Tensor, w: Tensor, h: Tensor, expected: Pruned) -> float:
    """Compares float32 weights [n, k] of a pass without a grid with the reference, and returns the
    share of rows where the same weights are zero. AssertionError for a difference that rounding
    errors cannot explain; their bound is that of `check_gptq_codes`.

    As there, only the first difference in a row is judged: the reference's loss must have been
    within the errors of both sides of the boundary.
    """
    unit, pivots = unit_factor(h)
    strict = unit.abs() - torch.eye(unit.shape[0], dtype=torch.float64)
    errors = (w.double() - expected.values).abs()
    total = w.double().abs() + errors @ strict
    k = w.shape[1]
    bound = U32 * ((146 + k / 128) * total + (expected.values.abs() + errors) @ strict)
    bound += 2 * k * float(torch.linalg.cond(h)) * U64 * total

    differs = (found != 0) != expected.kept
    same = ~differs.any(1)
    assert ((found[same].double() - expected.values[same]).abs() <= bound[same]).all()
    rows = (~same).nonzero().flatten()
    first = differs[rows].int().argmax(1)
    gap = (expected.loss - expected.boundary).abs()[rows, first]
    # The boundary is the loss of another weight, so it has the error of one, at most the largest.
    allowed = 2 * (bound * pivots.sqrt()).amax()
    assert (gap <= allowed).all(), (gap, allowed)
    return float(same.double().mean())


def layer_loss(error: Tensor, h: Tensor) -> float:
    """tr(E H Eᵀ) for an error of the weight E [n, k]."""
    error = error.double()
    return float(((error @ h.double()) * error).sum())


@dataclass
class Grid:
    """scales, zeros: float64 [n, groups]."""

    scales: Tensor
    zeros: Tensor


def range_grid(
    w: Tensor, group: int, bits: int, symmetric: bool, dtype: torch.dtype, shrink: float = 1.0
) -> Grid:
    """The grid that covers `shrink` times the range of each group, with scales that `dtype` can
    hold. Groups must not be all zero."""
    levels = 2**bits
    groups = w.double().view(w.shape[0], -1, group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        scales = shrink * torch.maximum(-low, high) / (levels // 2 - 1)
    else:
        scales = shrink * (high - low) / (levels - 1)
    # To float32 first, as a conversion in hardware or in torch does. Scales stay above 0, and above
    # the denormals that processors may flush to 0.
    least = 2.0**-24 if dtype == torch.float16 else 2.0**-126
    scales = scales.float().to(dtype).double().clamp(min=least)
    if symmetric:
        return Grid(scales, torch.full_like(scales, levels // 2))
    return Grid(scales, torch.round(-low * shrink / scales).clamp(0, levels - 1))


def group_errors(w: Tensor, grid: Grid, levels: int) -> Tensor:
    """Mean squared error of rounding each group to nearest, float64 [n, groups]."""
    groups = w.double().view(*grid.scales.shape, -1)
    scales, zeros = grid.scales.unsqueeze(-1), grid.zeros.unsqueeze(-1)
    codes = round_to_nearest(groups, scales, zeros, levels)
    return ((codes - zeros) * scales - groups).square().mean(-1)
