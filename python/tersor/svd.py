"""The best low-rank approximation of a weight, plain or in the norm of its outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.calibrate import GramStats
from tersor.errors import TersorError


@dataclass(frozen=True)
class Decomposition:
    """W L = U diag(s) Vᵀ for a weight W [n, k]; L is the root of a Gram matrix, or the identity.

    left: U [n, p]. values: s [p], descending. right: Vᵀ [p, k]. root: L, lower triangular, or None.
    p = min(n, k).
    """

    left: Tensor
    values: Tensor
    right: Tensor
    root: Tensor | None

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """b [n, rank] and a [rank, k], of which b @ a comes closest to W (Eckart and Young, 1936):
        ‖(W - b a) L‖² is the tail of the squared values. Both have the roots of the values."""
        size = self.values[:rank].sqrt()
        b, a = self.left[:, :rank] * size, size[:, None] * self.right[:rank]
        if self.root is not None:
            a = torch.linalg.solve_triangular(self.root, a.to(self.root.dtype), upper=False,
                                              left=False).to(b.dtype)  # fmt: skip
        return b, a

    def tail(self, rank: int) -> float:
        """‖(W - b a) L‖², the squared error of factors(rank)."""
        return float(self.values[rank:].double().square().sum())

    def rank_for(self, energy: float) -> int:
        """The least rank whose values have that share of the sum of squares; at least 1."""
        squares = self.values.double().square().cumsum(0)
        if not squares[-1] > 0:
            return 1
        # The last sum is the whole, so that energy 1 finds it whatever the rounding.
        return min(int((squares < energy * squares[-1]).sum()) + 1, len(squares))


def decompose(w: Tensor, root: Tensor | None = None) -> Decomposition:
    """w: floating point [n, k]; worked on in float32, or float64 as it is. root: as root_of makes
    it."""
    w = w.detach()
    w = w if w.dtype == torch.float64 else w.float()
    if root is not None:
        w = (w.to(root.dtype) @ root).to(w.dtype)
    left, values, right = torch.linalg.svd(w, full_matrices=False)
    return Decomposition(left, values, right, root)


def root_of(stats: GramStats | None, damp: float) -> Tensor | None:
    """L with L Lᵀ = H / tokens + damp · mean(diag) · I, lower triangular float64 [k, k], before H
    is factored; None where there is nothing to go by. damp is doubled until L can be found.

    ‖E L‖² is then the mean squared error of the outputs, E being that of the weight (whitening as
    in SVD-LLM, arXiv:2403.07378).
    """
    if stats is None or not stats.tokens:
        return None
    gram = stats.gram.double() / stats.tokens
    mean = float(gram.diagonal().mean())
    if not mean > 0:
        return None
    diagonal = gram.diagonal().clone()
    while damp < 2:
        gram.diagonal().copy_(diagonal + damp * mean)
        found: Tensor
        found, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            return found
        damp *= 2
    raise TersorError(
        "the second moments of a linear's inputs cannot be factored; look for NaN or infinite "
        "values in what the model computes on the calibration inputs"
    )
