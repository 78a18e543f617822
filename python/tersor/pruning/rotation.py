"""The arithmetic of a narrower residual stream (SliceGPT, arXiv:2401.15024), with one rotation for
the whole model, so that what is left is a model of the same class.

A block reads the residual stream x [d] as u = norm(x) = x / sqrt(mean(x²) + ε), times the norm's
weight g, by linears W: y = W diag(g) u. The directions P [d, d'], PᵀP = 1, are kept. Then

    z = s Pᵀ x, s = sqrt(d'/d)       is the narrower stream: embeddings and all that is added to it
                                     are multiplied by s P, the norm's weight becomes 1;
    W' = W diag(g) T, T [d, d']      makes what a linear read, u, of v = norm(z).

The factor s is there for the mean in the norm, which is over d' channels now: mean(z²) is
|Pᵀx|² / d. Where P loses nothing of x, that is the old mean(x²), so v = s Pᵀu with the same ε, and
T = P / s gives W u exactly. Where it loses something, |Pᵀx|² = ρ |x|², the norm makes v longer by
1 / sqrt(ρ), and a constant can take that back on average: T = P sqrt(ρ) / s (`keeping`). That is
one number for all tokens, and knows nothing of what was cut; the T with the least squared error
over a text takes back what can be told from v (`Transfer`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.errors import TersorError

ROWS = 1024  # of a weight that are in float64 at a time


def normed(x: Tensor, eps: float) -> Tensor:
    """What a norm with a weight of 1 puts out, float32 [tokens, d]; x: [..., d] in any dtype."""
    rows = x.reshape(-1, x.shape[-1]).float()
    return rows * (rows.square().mean(1, keepdim=True) + eps).rsqrt()


class Moment:
    """Σ u uᵀ over everything that norms put out, before their weights: float64 [d, d].

    Of u and not of x, because it is what the linears read: the stream grows from block to block,
    and its own second moment is little more than that of the last few and of a few large tokens.
    All norms and tokens count the same. On the demo model, the second moment of x and that of the
    last norm alone lead to nearly twice the KL divergence.
    """

    def __init__(self, width: int) -> None:
        self.matrix = torch.zeros(width, width, dtype=torch.float64)

    def update(self, u: Tensor) -> None:
        """u: float32 [tokens, d]. Products in float32, sums over batches in float64."""
        for i in range(0, u.shape[1], ROWS):
            self.matrix[i : i + ROWS] += u[:, i : i + ROWS].T @ u


def principal(moment: Tensor, kept: int) -> tuple[Tensor, float]:
    """The directions that hold most of a second moment, P float64 [d, kept], with orthonormal
    columns, the largest first; and ρ, the share of it that they hold.

    moment: symmetric, float64 [d, d]; it is overwritten."""
    moment += moment.T.clone()
    values, vectors = torch.linalg.eigh(moment.mul_(0.5))
    values = values.clamp_(min=0)
    directions = vectors.flip(1)[:, :kept]
    # The sign of an eigenvector is the solver's; ours: what is largest in a column is positive.
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    share = float(values[-kept:].sum() / values.sum()) if values[-1] > 0 else 1.0
    return (directions * largest.sign()).contiguous(), share


def keeping(directions: Tensor, share: float) -> Tensor:
    """T = P sqrt(ρ) / s, float64 [d, d']."""
    d, kept = directions.shape
    return directions * (share * d / kept) ** 0.5


class Transfer:
    """Sums over tokens from which comes the T [d, d'] that makes u of v with the least squared
    error: C = Σ u vᵀ, G = Σ v vᵀ and Σ |u|², in float64."""

    def __init__(self, width: int, kept: int) -> None:
        self.cross = torch.zeros(width, kept, dtype=torch.float64)
        self.gram = torch.zeros(kept, kept, dtype=torch.float64)
        self.energy = 0.0
        self.tokens = 0

    def update(self, u: Tensor, v: Tensor) -> None:
        """u [tokens, d] and v [tokens, d'], float32, of the same tokens."""
        for i in range(0, u.shape[1], ROWS):
            self.cross[i : i + ROWS] += u[:, i : i + ROWS].T @ v
        for i in range(0, v.shape[1], ROWS):
            self.gram[i : i + ROWS] += v[:, i : i + ROWS].T @ v
        self.energy += float(u.square().sum(dtype=torch.float64))
        self.tokens += len(u)

    def solve(self, prior: Tensor, damp: float) -> tuple[Tensor, float]:
        """T = (C + λ T₀) (G + λ I)⁻¹, λ = damp * mean(diag G), float64 [d, d'], which minimizes
        Σ |u - T v|² + λ ‖T - T₀‖²; and the damping that was needed.

        prior: T₀, what T is drawn to where the text says little."""
        if not (self.gram.isfinite().all() and self.cross.isfinite().all()):
            raise TersorError(
                "hidden states of the narrower model overflow its dtype; convert the model to "
                "bfloat16 or float32"
            )
        unit = float(self.gram.diagonal().mean()) or 1.0
        gram = (self.gram + self.gram.T) / 2
        while True:
            damped = gram.clone()
            damped.diagonal().add_(damp * unit)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                break
            damp *= 2
        wanted = self.cross + (damp * unit) * prior
        return torch.cholesky_solve(wanted.T, factor).T.contiguous(), damp

    def error(self, transfer: Tensor) -> float:
        """Σ |u - T v|² / Σ |u|²."""
        lost = (transfer @ self.gram - 2 * self.cross).mul_(transfer).sum()
        return max(0.0, 1 + float(lost) / self.energy) if self.energy > 0 else 0.0


def reading(w: Tensor, gain: Tensor, transfer: Tensor) -> Tensor:
    """W diag(g) T in the dtype of w, [n, d'], computed in float64.

    w: [n, d]; gain: g [d], what the norm multiplies by; transfer: T [d, d'].
    """
    inner = gain.double()[:, None] * transfer
    return torch.cat([(rows.double() @ inner).to(w.dtype) for rows in w.split(ROWS)])


def writing(w: Tensor, directions: Tensor) -> Tensor:
    """s Pᵀ W in the dtype of w, [d', k], computed in float64. w: [d, k]; or a bias, [d]."""
    d, kept = directions.shape
    inner = directions.T * (kept / d) ** 0.5
    parts = [(inner @ part.double()).to(w.dtype) for part in w.reshape(d, -1).split(ROWS, 1)]
    return torch.cat(parts, 1).reshape(kept, *w.shape[1:])


def embedding(w: Tensor, directions: Tensor, scale: float = 1.0) -> Tensor:
    """s E P in the dtype of w, [tokens, d'], computed in float64. w: E [tokens, d].

    scale: a further factor."""
    d, kept = directions.shape
    inner = directions * (scale * (kept / d) ** 0.5)
    return torch.cat([(rows.double() @ inner).to(w.dtype) for rows in w.split(ROWS)])
