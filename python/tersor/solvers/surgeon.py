"""The pass that GPTQ and SparseGPT have in common: column by column, each weight becomes a point of
a grid, or zero, and the columns that follow absorb the error."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor import column_solver
from tersor.calibrate import GramStats
from tersor.qweight import QSpec, QWeight
from tersor.solvers.rtn import find_grid
from tersor.sparsity import Sparsity

PRESERVED = 0.05  # share of zeros from which a weight counts as pruned


def solve(
    w: Tensor,
    stats: GramStats,
    spec: QSpec | None,
    *,
    damp: float,
    act_order: bool = False,
    clip: bool = True,
    two_level: bool = False,
    sparsity: Sparsity | None = None,
    mask: Tensor | None = None,
) -> QWeight | Tensor:
    """w: [n, k] floating point. With a spec a QWeight, without one a weight like w.

    sparsity: which weights become zero is chosen on the way, by the loss of SparseGPT.
    mask: bool [n, k], the weights that do not become zero. One of the two, or neither.
    """
    k = w.shape[1]
    factor = stats.factor(damp, act_order)
    columns = w.float().contiguous()
    groups = scales = zeros = None
    if spec is not None:
        scales, zeros = find_grid(w, spec, clip, two_level)
        groups = torch.arange(k, dtype=torch.int32, device=w.device) // (spec.group or k)
    if factor.order is not None:
        columns = columns[:, factor.order]
        groups = None if groups is None else groups[factor.order].contiguous()
        mask = None if mask is None else mask[:, factor.order]
    kept, of = (sparsity and sparsity.pattern) or (0, 0)
    solved = column_solver.solve_columns(
        columns,
        factor.unit,
        None if scales is None else scales.float(),
        zeros,
        groups,
        spec.levels if spec else 0,
        mask=None if mask is None else mask.to(torch.uint8).contiguous(),
        pivots=factor.pivots,
        share=(sparsity and sparsity.ratio) or 0.0,
        kept=kept,
        of=of,
    )
    if factor.order is not None:
        solved = solved[:, torch.argsort(factor.order)].contiguous()
    if spec is None or scales is None:
        return solved.to(w.dtype)
    return QWeight(spec, solved, scales, zeros)


def pruned_mask(w: Tensor) -> Tensor | None:
    """The weights of w [n, k] that are not zero, where there are so many zeros that it was pruned,
    and they are to stay; else None."""
    mask = w != 0
    return mask if int(mask.sum()) <= (1 - PRESERVED) * w.numel() else None
