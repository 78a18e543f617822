"""Groups of channels: how much each matters, and the weights of a linear that reads fewer of them.

Features are in G equal groups, one after the other. The linear that reads them has the weight
W [n, k] and the Gram matrix H = Σ x xᵀ of its input; W_g [n, k/G] and H_gg are of group g.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tersor.calibrate import GramStats
from tersor.errors import TersorError

BY_STATISTICS = (
    "output",
    "fluctuation",
    "magnitude",
    "activation",
)  # of one linear; see importance
COLUMNS = 512  # of a weight that are in float64 at a time
ROWS = 1024  # of a weight that are in float32 at a time


def importance(
    kind: str, groups: int, w: Tensor, rows: Iterable[Tensor], stats: GramStats | None
) -> Tensor:
    """How much each group matters, float64 [groups]; more is more.

    kind: "output", tr(W_g H_gg W_gᵀ): the squared error of the linear's output where the group is
            left out, as Wanda has it for one weight (arXiv:2306.11695);
        "fluctuation", the same of the inputs less their mean, which is what is lost where a bias
            makes up for the mean: FLAP's, which is of single channels (arXiv:2312.11983);
        "activation", tr(H_gg): the energy of what is read;
        "magnitude", the squared norm of all weights that make and read the group (as LLM-Pruner's
            vector-wise magnitude, arXiv:2305.11627). Needs no statistics.
    w: [n, k]. rows: weights [r, any], r divisible by groups, whose outputs are the groups.
    stats: of w's input.
    """
    if kind == "magnitude":
        scores = _norms(w.t(), groups)
        for weight in rows:
            scores += _norms(weight, groups)
        return scores
    if stats is None or not stats.tokens:
        raise TersorError(f'importance "{kind}" needs statistics of the input; calibrate')
    if kind == "activation":
        return stats.diagonal.double().view(groups, -1).sum(1)
    size = w.shape[1] // groups
    together = max(1, COLUMNS // size)
    parts = []
    for g in range(0, groups, together):
        at = slice(g * size, min(g + together, groups) * size)
        part = w[:, at].double().unflatten(1, (-1, size))  # [n, groups here, size]
        grams = stats.gram[at, at].double().view(part.shape[1], size, part.shape[1], size)
        own = grams.diagonal(dim1=0, dim2=2)  # [size, size, groups here]
        energy = torch.einsum("ngs,stg,ngt->g", part, own, part)
        if kind == "fluctuation":
            means = torch.einsum("ngs,gs->ng", part, stats.mean[at].view(-1, size))
            energy = (energy - stats.tokens * means.square().sum(0)).clamp(min=0)
        parts.append(energy)
    return torch.cat(parts)


def _norms(weight: Tensor, groups: int) -> Tensor:
    """Squared norms of groups of rows, float64 [groups]."""
    return weight.unflatten(0, (groups, -1)).flatten(1).float().square().sum(1, dtype=torch.float64)


def best(scores: Tensor, count: int) -> Tensor:
    """The numbers of the `count` highest scores, int64, ascending; of equal ones the first.

    scores: [any]; or [groups, any], each row by itself, which gives [groups, count]."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values


def select(tensor: Tensor, dim: int, groups: int, kept: Tensor) -> Tensor:
    """These groups of a dimension, in their order. Works on the meta device."""
    parted = tensor.unflatten(dim, (groups, -1))
    return parted.index_select(dim, kept.to(tensor.device)).flatten(dim, dim + 1)


def reconstruct(
    w: Tensor, groups: int, kept: Tensor, stats: GramStats, damp: float
) -> tuple[Tensor, float]:
    """The weight for the groups that are kept, K, that does best what all of W did:

        W' = W_K + W_R H_RK (H_KK + λ I)⁻¹,  λ = damp * mean(diag H),  R the groups removed,

    float64 [n, columns kept], and the damping that was needed. It minimizes
    tr(E H Eᵀ) + λ ‖W' - W_K‖², E = W - W' on K: least squares, as SlimGPT (arXiv:2412.18110) and
    ZipLM (arXiv:2302.04089) use it, but damped towards the weights there are and not towards zero,
    so that groups that did nothing change nothing.

    stats: of w's input, not factored; at least one token.
    """
    columns = torch.arange(w.shape[1]).view(groups, -1)
    gone = torch.ones(groups, dtype=torch.bool)
    gone[kept] = False
    stay, go = columns[kept].flatten(), columns[gone].flatten()
    gram, diagonal = stats.gram, stats.diagonal.double()
    live = diagonal > 0
    unit = float(diagonal[live].mean()) if bool(live.any()) else 1.0
    inner = gram[stay][:, stay].double()
    while True:
        damped = inner.clone()
        damped.diagonal().add_(damp * unit)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        damp *= 2  # H is a sum in float32, so no more than nearly positive
    wanted = w[:, go].double() @ gram[go][:, stay].double()
    moved = torch.cholesky_solve(wanted.t(), factor).t()
    return w[:, stay].double() + moved, damp


def bias_for(w: Tensor, groups: int, kept: Tensor, stats: GramStats) -> Tensor:
    """What the removed groups R gave on average, W_R mean(x_R), float64 [n]: added to the linear's
    bias it leaves of their loss only what varies (FLAP, arXiv:2312.11983).

    w: [n, k]. stats: of its input.
    """
    gone = torch.ones(groups, dtype=torch.bool)
    gone[kept] = False
    go = torch.arange(w.shape[1]).view(groups, -1)[gone].flatten()
    return w[:, go].double() @ stats.mean[go]


def output_error(
    w: Tensor,
    groups: int,
    kept: Tensor,
    new: Tensor,
    stats: GramStats | None,
    shift: Tensor | None = None,
) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ), E = W - W': the squared error of the linear's output relative to it;
    H = 1 without statistics.

    w: [n, k]. new: its replacement, [n, columns kept]. shift: [n], from bias_for, where it was
    added and `new` are the weights there were: the lost sum is then less by tokens * ‖shift‖².
    """
    stay = torch.arange(w.shape[1]).view(groups, -1)[kept].flatten()
    lost = total = 0.0
    for old, mine in zip(w.split(ROWS), new.split(ROWS), strict=True):
        rows = old.float()
        total += _energy(rows, stats)
        error = rows.clone()
        error[:, stay] -= mine.float()
        lost += _energy(error, stats)
    if shift is not None and stats is not None:
        lost = max(0.0, lost - stats.tokens * float(shift.double().square().sum()))
    return lost / total if total > 0 else 0.0


def _energy(rows: Tensor, stats: GramStats | None) -> float:
    return float(rows.square().sum(dtype=torch.float64)) if stats is None else stats.loss(rows)
