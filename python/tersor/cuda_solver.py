"""The column solver on an NVIDIA GPU: a CUDA kernel for each block of columns, and torch for what
is a matrix product, a factorization or a sort.

The codes and masks are those of the CPU, but where two choices are equally good up to the rounding
of sums. The functions have the arguments and results of column_solver.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tersor import _core
from tersor.errors import TersorError

BLOCK = 128  # columns that one kernel goes through
IN_KERNEL = 16  # the longest pattern that it chooses itself
_STRIP = 2048  # rows of a Gram matrix that are in float64 beside the factor


def _stream(tensor: Tensor) -> int:
    stream: int = torch.cuda.current_stream(tensor.device).cuda_stream
    return stream


def search_grid(
    w: Tensor, group: int, bits: int, symmetric: bool, clip: bool, scale_dtype: int
) -> tuple[Tensor, Tensor | None]:
    _check_weights(w)
    n, groups = w.shape[0], w.shape[1] // group
    scales = torch.empty(n, groups, device=w.device)
    zeros = None if symmetric else torch.empty(n, groups, dtype=torch.uint8, device=w.device)
    _core.cuda_search_grid(w, group, bits, symmetric, clip, scale_dtype, scales, zeros, _stream(w))
    if not bool(scales.isfinite().all()):
        raise TersorError(
            "the weights are too large for scales in this dtype; store the scales in bfloat16 or "
            "float32"
        )
    return scales, zeros


def _check_weights(w: Tensor) -> None:
    if not bool(w.isfinite().all()):
        raise TersorError("the weights hold NaN or infinity")


# --- the factor -----------------------------------------------------------------------------------


def factor(gram: Tensor, damp: float) -> tuple[float, int, Tensor]:
    """In float64, and in memory of its own for two such matrices."""
    if not 0 <= damp <= 1:
        raise TersorError(f"damp must be between 0 and 1, not {damp}")
    k, diagonal = gram.shape[0], gram.diagonal().double()
    _check_gram(gram, diagonal)
    live = diagonal > 0
    dead = k - int(live.sum())
    mean = float(diagonal[live].mean()) if dead < k else 1.0
    floor = mean * k * 2.0**-24  # a pivot of the size of H's own rounding errors is noise
    while (r := _reversed_factor(gram, live, damp * mean, mean, floor)) is None:
        damp = max(2 * damp, k * 2.0**-24)
        if damp > 1:
            raise TersorError(
                "the Gram matrix is not positive semidefinite, even with its mean diagonal added "
                "to it; it must be the sum of x xᵀ"
            )
    pivots = r.diagonal().flip(0)
    inverse = 1 / pivots
    for begin in range(0, k, _STRIP):  # row i of R is row k - 1 - i of r, read from its end
        end = min(begin + _STRIP, k)
        rows = r[k - end : k - begin].flip(0, 1) * inverse
        strip = gram[begin:end]
        upper = torch.ones(end - begin, k, dtype=torch.bool, device=gram.device).triu(begin + 1)
        strip.copy_(torch.where(upper, rows.float(), strip))
    return damp, dead, torch.where(live, pivots, 1e-12 * mean**0.5).float()


def _check_gram(gram: Tensor, diagonal: Tensor) -> None:
    bad = ~gram.isfinite().all(1) | (diagonal < 0)
    if bool(bad.any()):
        raise TersorError(
            f"row {int(bad.nonzero()[0])} of the Gram matrix has a NaN, an infinity or a negative "
            "diagonal entry; check the activations that it was made of"
        )


def _reversed_factor(
    gram: Tensor, live: Tensor, added: float, mean: float, floor: float
) -> Tensor | None:
    """L, lower triangular, of H in reversed order of rows and columns: R from its end to its
    beginning. None where a pivot is not above the floor."""
    h, live = gram.flip(0, 1).double(), live.flip(0)
    h.mul_(live).mul_(live[:, None])
    diagonal = h.diagonal()
    diagonal.copy_(torch.where(live, diagonal + added, mean))
    r, info = torch.linalg.cholesky_ex(h)  # which reads its lower triangle, the upper one of H
    if int(info) or not bool((r.diagonal().square() > floor).all()):
        return None
    return r


# --- the columns ----------------------------------------------------------------------------------


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
    """Right-looking: the errors of a block are added to all columns after it at once."""
    _check(w, scales, group_of_column)
    n, k = w.shape
    values, stream = w.clone(), _stream(w)
    codes = None if scales is None else torch.empty(n, k, dtype=torch.uint8, device=w.device)
    errors = torch.zeros(n, BLOCK, device=w.device)
    with float32_products():
        for first in range(0, k, BLOCK):
            last = min(first + BLOCK, k)
            keep = None if mask is None else mask[:, first:last]
            if share > 0 or of > IN_KERNEL:
                losses = torch.empty(n, last - first, device=w.device)
                _core.cuda_solve_block(
                    w, unit, values, first, last - first, scales=None, zeros=None,
                    group_of_column=None, levels=0, keep=None, pivots=pivots, kept=0, of=0,
                    codes=None, errors=None, losses=losses, stream=stream,
                )  # fmt: skip
                keep = _keep(losses, share, kept, of)
            _core.cuda_solve_block(
                w, unit, values, first, last - first, scales=scales, zeros=zeros,
                group_of_column=group_of_column, levels=levels, keep=keep, pivots=pivots,
                kept=kept if keep is None else 0, of=of if keep is None else 0,
                codes=codes, errors=errors, losses=None, stream=stream,
            )  # fmt: skip
            if last < k:
                values[:, last:].addmm_(errors, unit[first:last, last:])
    return values if codes is None else codes


def _check(w: Tensor, scales: Tensor | None, group_of_column: Tensor | None) -> None:
    _check_weights(w)
    if scales is None or group_of_column is None:
        return
    if not bool((scales.isfinite() & (scales > 0)).all()):
        raise TersorError("the scales must be positive and finite")
    low, high = (int(bound) for bound in torch.aminmax(group_of_column))
    if low < 0 or high >= scales.shape[1]:
        raise TersorError(
            f"columns are in groups from {low} to {high}, and there are {scales.shape[1]}"
        )


def _keep(losses: Tensor, share: float, kept: int, of: int) -> Tensor:
    """uint8 like the losses [n, width]: 0 for the weights that become zero."""
    if of:
        grouped = losses.view(losses.shape[0], -1, of)
        best = grouped.argsort(dim=-1, descending=True, stable=True)[..., :kept]
        keep = torch.zeros_like(grouped, dtype=torch.uint8)
        return keep.scatter_(-1, best, 1).view_as(losses)
    rank = min(losses.numel() - 1, int(share * losses.numel()))
    threshold = losses.flatten().sort().values[rank]
    return (losses >= threshold).to(torch.uint8)


@contextmanager
def float32_products() -> Iterator[None]:
    """Products of float32 on a GPU are of that precision while it lasts, whatever a user allows
    torch: TF32 would change which codes are the nearest."""
    matmul = torch.backends.cuda.matmul
    name, exact = "fp32_precision", "ieee"
    if not hasattr(matmul, name):  # torch before 2.9
        name, exact = "allow_tf32", ""
    before = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)
