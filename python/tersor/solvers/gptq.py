"""GPTQ: rounds column by column and lets the columns that follow absorb the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersor.calibrate import GramStats
from tersor.errors import TersorError
from tersor.qweight import QSpec, QWeight
from tersor.solvers.rtn import RTN
from tersor.solvers.surgeon import pruned_mask, solve
from tersor.sparsity import Sparsity


@dataclass(frozen=True)
class GPTQ:
    """GPTQ (Frantar et al., arXiv:2210.17323) in the form that needs no inverse: with H = R Rᵀ,
    R upper triangular, q_i = Q(w_i + Σ_{j<i} (w_j - q_j) R_ji / R_ii).

    damp: fraction of the mean diagonal of H added to it, raised where H cannot be factored so.
    act_order: columns in order of falling activity. The groups stay those of the original order
        (static groups), so the result is an ordinary group-wise weight.
    clip, two_level: of the grid, as for RTN.
    """

    damp: float = 0.01
    act_order: bool = False
    clip: bool = True
    two_level: bool = False
    name: ClassVar[str] = "gptq"
    sparsity: ClassVar[Sparsity | None] = None
    needs: ClassVar[type[GramStats] | None] = GramStats

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1:
            raise TersorError(f"damp must be between 0 and 1, not {self.damp}; 0.01 is usual")

    def __call__(self, w: Tensor, stats: GramStats | None, spec: QSpec) -> QWeight:
        """w: [n, k] floating point; stats: of its input, k wide, with at least one token. The
        zeros of a weight that was pruned (5 % or more) stay zeros."""
        if stats is None or not stats.tokens:
            raise TersorError("gptq needs statistics of the layer's input; calibrate, or use rtn")
        q = solve(
            w,
            stats,
            spec,
            damp=self.damp,
            act_order=self.act_order,
            clip=self.clip,
            two_level=self.two_level,
            mask=pruned_mask(w),
        )
        assert isinstance(q, QWeight)  # as with any spec
        return q

    def without_input(self) -> RTN:
        return RTN(self.clip, self.two_level)
