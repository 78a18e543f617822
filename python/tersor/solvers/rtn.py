"""Rounding to nearest: every weight on its own, which needs no calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersor import column_solver
from tersor.calibrate import GramStats
from tersor.kernels import dtype_code
from tersor.qweight import QSpec, QWeight
from tersor.sparsity import Sparsity
from tersor.two_level import check_two_level, two_level_scales


@dataclass(frozen=True)
class RTN:
    """Rounds each weight to the nearest code of its group's grid.

    clip: choose the range of each group by the least squared error instead of min and max.
    two_level: scales that are multiples, up to 15, of one for each row (see tersor.two_level).
    """

    clip: bool = False
    two_level: bool = False
    name: ClassVar[str] = "rtn"
    sparsity: ClassVar[Sparsity | None] = None
    needs: ClassVar[type[GramStats] | None] = None

    def without_input(self) -> RTN:
        return self

    def __call__(self, w: Tensor, stats: GramStats | None, spec: QSpec) -> QWeight:
        """w: [n, k] floating point. The statistics are not read. See find_grid for the scales."""
        scales, zeros = find_grid(w, spec, self.clip, self.two_level)
        return QWeight(spec, round_to_grid(w, spec, scales, zeros), scales, zeros)


def find_grid(
    w: Tensor, spec: QSpec, clip: bool, two_level: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The scales [n, groups], in the dtype of w, and zeros uint8 [n, groups] of an asymmetric spec.

    The scales are rounded to the dtype that the checkpoint stores before any code is chosen, so
    that the codes are the best ones for the very scales that a reader will multiply by.
    two_level: the products nearest to these scales, and of those the ones of the least squared
    error of the weights.
    Raises TersorError where w is not finite, or a scale is beyond its dtype.
    """
    spec.groups(w.shape[1])  # whether the group divides k
    if two_level:
        check_two_level(spec)
    scales, zeros = column_solver.search_grid(
        w.float().contiguous(),
        spec.group or w.shape[1],
        spec.bits,
        spec.symmetric,
        clip,
        dtype_code(w.dtype),
    )
    if two_level:
        scales = two_level_scales(w, scales)
    return scales.to(w.dtype), zeros


def round_to_grid(w: Tensor, spec: QSpec, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The nearest code for each weight of w [n, k]; uint8 [n, k]."""
    n, k = w.shape
    zero = spec.midpoint if zeros is None else zeros.float().unsqueeze(-1)
    steps = w.float().view(n, scales.shape[1], -1) / scales.float().unsqueeze(-1)
    codes = steps.round_().add_(zero).clamp_(0, spec.levels - 1)
    return codes.to(torch.uint8).view(n, k)
