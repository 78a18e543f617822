"""The column solver, on whatever device the tensors are: in C++ on the CPU, and on an NVIDIA GPU by
CUDA kernels and torch's matrix products."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from tersor import _core, cuda_solver
from tersor.errors import TersorError


def _on(tensor: Tensor) -> ModuleType | Any:
    if tensor.is_cpu:
        return _core
    if tensor.is_cuda:
        return cuda_solver
    raise TersorError(
        f"weights are compressed on the CPU or an NVIDIA GPU, not on {tensor.device}; move them "
        "with .cpu()"
    )


def search_grid(
    w: Tensor, group: int, bits: int, symmetric: bool, clip: bool, scale_dtype: int
) -> tuple[Tensor, Tensor | None]:
    """scales float32 [n, k / group] and, of an asymmetric grid, zeros uint8 like it, such that
    (code - zero) * scale covers each group of w, contiguous float32 [n, k]. See search_grid in
    csrc/solve/solve.h.

    Raises TersorError where w is not finite, or a scale is beyond its dtype."""
    scales, zeros = _on(w).search_grid(w, group, bits, symmetric, clip, scale_dtype)
    return scales, zeros


def factor(gram: Tensor, damp: float) -> tuple[float, int, Tensor]:
    """Replaces what is above the diagonal of a Gram matrix, contiguous float32 [k, k], by the
    factor of the solver: R_ji / R_ii, where H + damp * mean(diag H) * I = R Rᵀ.

    Returns the damping that was needed, the number of inputs that were always zero, and the
    diagonal of R, float32 [k]. See factor in csrc/solve/solve.h.
    Raises TersorError for what is no Gram matrix."""
    used, dead, pivots = _on(gram).factor(gram, damp)
    return used, dead, pivots


def solve_columns(
    w: Tensor,
    unit: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    group_of_column: Tensor | None,
    levels: int,
    *,
    mask: Tensor | None,
    pivots: Tensor,
    share: float,
    kept: int,
    of: int,
) -> Tensor:
    """Goes through the columns of w, contiguous float32 [n, k]: each weight becomes a point of its
    grid, or zero, and the columns after it absorb the error. See Columns in csrc/solve/solve.h.

    unit, pivots: from factor(). scales float32 [n, groups], zeros uint8 like them or None,
    group_of_column int32 [k], levels: the grid; or None. mask uint8 [n, k], share, or kept and of:
    which become zero; one of the three or none.
    Returns codes uint8 [n, k] on a grid, float32 values without one.
    Raises TersorError where w is not finite, or a scale is not positive."""
    solved: Tensor = _on(w).solve_columns(
        w, unit, scales, zeros, group_of_column, levels,
        mask=mask, pivots=pivots, share=share, kept=kept, of=of,
    )  # fmt: skip
    return solved
