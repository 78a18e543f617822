"""Magnitude and Wanda: a score for every weight, and the smallest become zero."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from tersor.calibrate import GramStats
from tersor.errors import TersorError
from tersor.qweight import QSpec, QWeight
from tersor.solvers.refit import refit
from tersor.solvers.rtn import RTN
from tersor.solvers.surgeon import solve
from tersor.sparsity import Sparsity, keep_largest


@dataclass(frozen=True)
class Magnitude:
    """The smallest weights become zero (Han et al., arXiv:1506.02626). Needs no calibration.

    per: over what a ratio is kept: "layer", or "row". (A ratio over the whole model is a ratio for
        each layer, chosen beforehand: see tersor.allocation.)
    refit: then the best values for the others by least squares, which needs calibration.
    damp: of that, and of the rounding where weights are quantized too.
    clip, two_level: see find_grid.
    """

    sparsity: Sparsity
    per: str = "layer"
    refit: bool = False
    damp: float = 0.01
    clip: bool = True
    two_level: bool = False
    name: ClassVar[str] = "magnitude"

    def __post_init__(self) -> None:
        check(self.sparsity, self.per, self.damp)

    @property
    def needs(self) -> type[GramStats] | None:
        return GramStats if self.refit else None

    def without_input(self) -> Magnitude:
        return Magnitude(self.sparsity, self.per, clip=self.clip, two_level=self.two_level)

    def __call__(
        self, w: Tensor, stats: GramStats | None, spec: QSpec | None = None
    ) -> QWeight | Tensor:
        """w: [n, k] floating point. With a spec, what is left is quantized: with statistics as
        GPTQ does, without them to nearest."""
        mask = keep_largest(w.abs(), self.sparsity, self.per)
        if stats is None or not stats.tokens:
            if self.refit:
                raise TersorError("refit needs statistics of the layer's input; calibrate")
            left = torch.where(mask, w, 0)
            return RTN(self.clip, self.two_level)(left, None, spec) if spec else left
        return on_mask(
            w, w, mask, stats, spec,
            refitted=self.refit, damp=self.damp, clip=self.clip, two_level=self.two_level,
        )  # fmt: skip


@dataclass(frozen=True)
class Wanda:
    """The weights of the least |w_ij| ‖x_j‖ become zero, row by row (Sun et al., arXiv:2306.11695).

    per, refit, damp, clip, two_level: as for Magnitude; the paper's `per` is "row".
    """

    sparsity: Sparsity
    per: str = "row"
    refit: bool = False
    damp: float = 0.01
    clip: bool = True
    two_level: bool = False
    name: ClassVar[str] = "wanda"
    needs: ClassVar[type[GramStats] | None] = GramStats

    def __post_init__(self) -> None:
        check(self.sparsity, self.per, self.damp)

    def without_input(self) -> Magnitude:
        return Magnitude(self.sparsity, self.per, clip=self.clip, two_level=self.two_level)

    def __call__(
        self, w: Tensor, stats: GramStats | None, spec: QSpec | None = None
    ) -> QWeight | Tensor:
        """w: [n, k] floating point; stats: of its input. With a spec, what is left is quantized as
        GPTQ does."""
        if stats is None or not stats.tokens:
            raise TersorError("wanda needs statistics of the layer's input; calibrate")
        scores = w.float().abs() * stats.diagonal.sqrt()
        mask = keep_largest(scores, self.sparsity, self.per)
        return on_mask(
            w, w, mask, stats, spec,
            refitted=self.refit, damp=self.damp, clip=self.clip, two_level=self.two_level,
        )  # fmt: skip


def check(sparsity: Sparsity, per: str, damp: float) -> None:
    if not isinstance(sparsity, Sparsity):
        raise TersorError(f"give Sparsity(0.5) or Sparsity(pattern=(2, 4)), not {sparsity!r}")
    if per not in ("layer", "row"):
        raise TersorError(f'a ratio is kept per "layer" or per "row", not {per!r}')
    if not 0 < damp < 1:
        raise TersorError(f"damp must be between 0 and 1, not {damp}; 0.01 is usual")


def on_mask(
    w: Tensor,
    start: Tensor,
    mask: Tensor,
    stats: GramStats,
    spec: QSpec | None,
    *,
    refitted: bool,
    damp: float,
    clip: bool,
    two_level: bool,
) -> QWeight | Tensor:
    """w with zeros where the mask is False: as `start` has the others, or refitted to w from there,
    and on the grid of the spec where there is one."""
    onto_grid = partial(solve, damp=damp, clip=clip, two_level=two_level, mask=mask)
    if not refitted:
        left = torch.where(mask, start, 0)
        # Zeros that were chosen by a score are news to the other weights: they absorb that error
        # together with that of the rounding.
        return left if spec is None else onto_grid(w, stats, spec)
    best = refit(w, start, mask, stats, damp)
    if spec is None:
        return best.to(w.dtype)
    # The loss against w is that against the refit, which is orthogonal to all that the mask allows,
    # plus what the refit lost.
    return onto_grid(best.to(w.dtype), stats, spec)
