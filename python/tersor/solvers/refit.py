"""The best values for the weights that a mask leaves: least squares over the layer's outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.calibrate import GramStats

ROWS = 1024  # solved together
STEPS = 200
TOLERANCE = 1e-4  # of the loss, gained in a step, at which to stop


def refit(w: Tensor, start: Tensor, mask: Tensor, stats: GramStats, damp: float) -> Tensor:
    """Minimizes tr((X - W) (H + damp * mean(diag H) * I) (X - W)ᵀ) over the X that are zero where
    the mask is: float32 [n, k].

    w, start: [n, k]; where to begin, such as SparseGPT's answer, than which the result is never
    worse. mask: bool [n, k].

    By conjugate gradients on all rows at once, each with its own steps, preconditioned by the
    diagonal: products with H alone, which need no factor for each row. The rows' own systems
    would take k³/3 operations each.
    """
    diagonal = stats.diagonal
    live = diagonal > 0
    added = damp * float(diagonal[live].mean()) if bool(live.any()) else 1.0
    scale = 1 / (diagonal + added)
    parts = zip(w.split(ROWS), start.split(ROWS), mask.split(ROWS), strict=True)
    return torch.cat([_rows(*part, stats, added, scale) for part in parts])


def _rows(
    w: Tensor, start: Tensor, mask: Tensor, stats: GramStats, added: float, scale: Tensor
) -> Tensor:
    def product(x: Tensor) -> Tensor:
        return stats.times(x).add_(x, alpha=added)

    x = torch.where(mask, start.float(), 0)
    away = w.float() - x
    slope = product(away)
    loss = _dots(away, slope)
    residual = slope.mul_(mask)
    step = residual * scale
    strength = _dots(residual, step)
    for _ in range(STEPS):
        image = product(step).mul_(mask)
        length = strength / _dots(step, image).clamp(min=torch.finfo(torch.float64).tiny)
        x += length.float().unsqueeze(1) * step
        residual -= length.float().unsqueeze(1) * image
        gained = length * strength
        loss = loss - gained
        if float(gained.sum()) <= TOLERANCE * float(loss.clamp(min=0).sum()):
            break
        scaled = residual * scale
        now = _dots(residual, scaled)
        step.mul_((now / strength.clamp(min=torch.finfo(torch.float64).tiny)).float()[:, None])
        step += scaled
        strength = now
    return x


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Of each row with its partner, float64 [rows]."""
    return (a * b).sum(1, dtype=torch.float64)
