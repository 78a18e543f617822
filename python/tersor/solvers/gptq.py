"""GPTQ: rounds column by column and lets the columns that follow absorb the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersor import _core
from tersor.calibrate import GramStats
from tersor.errors import TersorError
from tersor.qweight import QSpec, QWeight
from tersor.solvers.rtn import find_grid


@dataclass(frozen=True)
class GPTQ:
    """GPTQ (Frantar et al., arXiv:2210.17323) in the form that needs no inverse: with H = R Rᵀ,
    R upper triangular, q_i = Q(w_i + Σ_{j<i} (w_j - q_j) R_ji / R_ii).

    damp: fraction of the mean diagonal of H added to it, raised where H cannot be factored so.
    act_order: columns in order of falling activity. The groups stay those of the original order
        (static groups), so the result is an ordinary group-wise weight.
    clip: choose the range of each group by the least squared error instead of min and max.
    """

    damp: float = 0.01
    act_order: bool = False
    clip: bool = True
    name: ClassVar[str] = "gptq"
    needs: ClassVar[type[GramStats] | None] = GramStats

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1:
            raise TersorError(f"damp must be between 0 and 1, not {self.damp}; 0.01 is usual")

    def __call__(self, w: Tensor, stats: GramStats | None, spec: QSpec) -> QWeight:
        """w: [n, k] floating point; stats: of its input, k wide, with at least one token."""
        if stats is None or not stats.tokens:
            raise TersorError("gptq needs statistics of the layer's input; calibrate, or use rtn")
        k = w.shape[1]
        scales, zeros = find_grid(w, spec, self.clip)
        factor = stats.factor(self.damp, self.act_order)
        groups = torch.arange(k, dtype=torch.int32) // (spec.group or k)
        columns = w.float().contiguous()
        if factor.order is not None:
            columns, groups = columns[:, factor.order], groups[factor.order]
        codes: Tensor = _core.solve_columns(
            columns, factor.unit, scales.float(), zeros, groups.contiguous(), spec.levels
        )
        if factor.order is not None:
            codes = codes[:, torch.argsort(factor.order)].contiguous()
        return QWeight(spec, codes, scales, zeros)
