"""SparseGPT: weights become zero column by column, and the columns that follow absorb the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tersor.calibrate import GramStats
from tersor.errors import TersorError
from tersor.qweight import QSpec, QWeight
from tersor.solvers.masked import Magnitude, check, on_mask
from tersor.solvers.surgeon import solve
from tersor.sparsity import Sparsity


@dataclass(frozen=True)
class SparseGPT:
    """SparseGPT (Frantar and Alistarh, arXiv:2301.00774), in the same pass as GPTQ's rounding.

    A ratio is kept in every 128 columns, over all rows; which weights go is decided when a block or
    the M columns of a pattern are reached, for the values that they have by then.

    refit: then the best values for the weights that stay by least squares, all at once. With a
        grid they are found before the rounding, which then goes over the columns once more.
    damp, act_order, clip, two_level: as for GPTQ. act_order is for ratios: a pattern is of
        neighbours.
    """

    sparsity: Sparsity
    refit: bool = False
    damp: float = 0.01
    act_order: bool = False
    clip: bool = True
    two_level: bool = False
    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[type[GramStats] | None] = GramStats

    def __post_init__(self) -> None:
        check(self.sparsity, "row", self.damp)
        if self.act_order and (self.sparsity.pattern or self.refit):
            raise TersorError(
                "activation order goes with a ratio and without a refit: a pattern is of columns "
                "that are neighbours, and a refit has no order; leave act_order out"
            )

    def without_input(self) -> Magnitude:
        return Magnitude(self.sparsity, clip=self.clip, two_level=self.two_level)

    def __call__(
        self, w: Tensor, stats: GramStats | None, spec: QSpec | None = None
    ) -> QWeight | Tensor:
        """w: [n, k] floating point; stats: of its input. A weight with zeros; with a spec, a
        QWeight whose zeros are exact, from one joint pass."""
        if stats is None or not stats.tokens:
            raise TersorError("sparsegpt needs statistics of the layer's input; calibrate")
        self.sparsity.check(w.shape[1])
        joint = None if self.refit else spec
        solved = solve(
            w,
            stats,
            joint,
            damp=self.damp,
            act_order=self.act_order,
            clip=self.clip,
            two_level=self.two_level,
            sparsity=self.sparsity,
        )
        if not self.refit or isinstance(solved, QWeight):
            return solved
        return on_mask(
            w, solved, solved != 0, stats, spec,
            refitted=True, damp=self.damp, clip=self.clip, two_level=self.two_level,
        )  # fmt: skip
