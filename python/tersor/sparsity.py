"""How sparse a weight is to be, and which of its elements that leaves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.errors import TersorError

PATTERNS = (2, 4, 8, 16, 32, 64, 128)  # the M of N:M


@dataclass(frozen=True)
class Sparsity:
    """How many of a weight's elements are zero: one of

    ratio: a share of them, between 0 and 1, wherever they are;
    pattern: (N, M), at most N of every M consecutive input features are not zero; M is a power of
        two up to 128. (2, 4) is what hardware calls 2:4.
    """

    ratio: float | None = None
    pattern: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.pattern is None):
            raise TersorError("give a sparsity as a ratio or as a pattern, one of the two")
        if self.ratio is not None:
            number = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
            if not number or not 0 < self.ratio < 1:
                raise TersorError(f"a sparsity is between 0 and 1, such as 0.5, not {self.ratio!r}")
        if self.pattern is not None:
            two = isinstance(self.pattern, tuple) and [type(x) for x in self.pattern] == [int, int]
            if not two:
                raise TersorError(
                    f"a pattern is two whole numbers, (2, 4) for 2:4, not {self.pattern!r}; "
                    "Sparsity.parse reads a text"
                )
            kept, of = self.pattern
            if of not in PATTERNS or not 0 < kept < of:
                raise TersorError(
                    f"a pattern N:M keeps N of every M weights, 0 < N < M, and M is one of "
                    f"{', '.join(map(str, PATTERNS))}; {kept}:{of} is none"
                )

    @classmethod
    def parse(cls, pattern: str) -> Sparsity:
        """From a pattern as people write it, such as "2:4"."""
        kept, colon, of = str(pattern).partition(":")
        if not (colon and kept.isdecimal() and of.isdecimal() and len(pattern) < 10):
            raise TersorError(f"a pattern is written N:M, such as 2:4, not {str(pattern)[:20]!r}")
        return cls(pattern=(int(kept), int(of)))

    @property
    def zeros(self) -> float:
        """The share of weights that are zero."""
        if self.pattern is not None:
            return 1 - self.pattern[0] / self.pattern[1]
        return self.ratio or 0.0

    def check(self, k: int) -> None:
        """TersorError if the pattern does not divide k input features."""
        if self.pattern is not None and k % self.pattern[1]:
            fits = [f"{of // 2}:{of}" for of in PATTERNS if k % of == 0]
            hint = f"use {fits[-1]}, or a ratio" if fits else "use a ratio"
            raise TersorError(f"the pattern {self} does not divide the {k} input features; {hint}")

    def __str__(self) -> str:
        if self.pattern is not None:
            return f"{self.pattern[0]}:{self.pattern[1]}"
        return f"{100 * self.zeros:g} %"


def keep_largest(scores: Tensor, sparsity: Sparsity, per: str = "layer") -> Tensor:
    """The elements that stay: a bool mask [n, k], False where a weight becomes zero.

    scores: floating point [n, k], not NaN; the smallest go, and of equal ones the last.
    per: over what a ratio is kept exactly (rounded down): "row", or "layer" for all of it. A
        pattern is one of rows anyway.
    """
    n, k = scores.shape
    sparsity.check(k)
    if sparsity.pattern is not None:
        kept, of = sparsity.pattern
        best = scores.view(n, -1, of).argsort(dim=-1, descending=True, stable=True)[..., :kept]
        mask = torch.zeros(n, k // of, of, dtype=torch.bool, device=scores.device)
        return mask.scatter_(-1, best, True).view(n, k)
    rows = scores if per == "row" else scores.reshape(1, -1)
    zeros = int(sparsity.zeros * rows.shape[1])
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = rows.kthvalue(zeros, dim=1, keepdim=True).values
    above, equal = rows > threshold, rows == threshold
    spare = rows.shape[1] - zeros - above.sum(1, keepdim=True)  # of the equal ones
    return (above | (equal & (equal.cumsum(1, dtype=torch.int32) <= spare))).view(n, k)
