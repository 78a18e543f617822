"""What a weight is worth, learned from gradients: how the scores beside the weights move.

g is the gradient of the loss by the masked weight, which a weight that is masked has as well (the
straight-through estimator), so that one that was pruned can come back.

The scores are in no optimizer of the caller's: what they learn by is a setting of the criterion. So
they know no weight decay, count in no clipping of gradients, and any optimizer will do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from tersor.errors import TersorError

BETAS, EPSILON = (0.9, 0.999), 1e-12  # Adam's; g w is far smaller than what its usual 1e-8 is for


class Criterion(Protocol):
    """signal: what is summed over the backward passes of a step: "g", "gw" or nothing.
    buffers: float32 tensors, zero at first, that are kept for every score; "value" is the score.
    """

    name: ClassVar[str]
    signal: ClassVar[str | None]
    buffers: ClassVar[tuple[str, ...]]

    def update(self, buffers: Mapping[str, Tensor], signal: Tensor, step: int, pull: float) -> None:
        """Learns from one step, in place. step: its number, from 0. pull: how much the scores shall
        fall, for a criterion that prunes by pulling them below a threshold."""


def _check_decay(decay: float) -> None:
    if not 0 < decay <= 1:
        raise TersorError(f"decay is more than 0 and at most 1, not {decay!r}")


@dataclass(frozen=True)
class Magnitude:
    """|W|; of a group, its sum of squares."""

    name: ClassVar[str] = "magnitude"
    signal: ClassVar[str | None] = None
    buffers: ClassVar[tuple[str, ...]] = ()

    def update(self, buffers: Mapping[str, Tensor], signal: Tensor, step: int, pull: float) -> None:
        """Nothing: the weights are the scores."""


@dataclass(frozen=True)
class Gradient:
    """|g|, S <- decay S + |g|. decay: 1 for a sum over all steps."""

    decay: float = 0.99
    name: ClassVar[str] = "gradient"
    signal: ClassVar[str | None] = "g"
    buffers: ClassVar[tuple[str, ...]] = ("value",)

    def __post_init__(self) -> None:
        _check_decay(self.decay)

    def update(self, buffers: Mapping[str, Tensor], signal: Tensor, step: int, pull: float) -> None:
        buffers["value"].mul_(self.decay).add_(signal.abs())


@dataclass(frozen=True)
class Taylor:
    """|g W|, what the loss changes by to first order without the weight; of a group |Σ g W|
    (arXiv:1906.10771). S <- decay S + |g W|."""

    decay: float = 0.99
    name: ClassVar[str] = "taylor"
    signal: ClassVar[str | None] = "gw"
    buffers: ClassVar[tuple[str, ...]] = ("value",)

    def __post_init__(self) -> None:
        _check_decay(self.decay)

    def update(self, buffers: Mapping[str, Tensor], signal: Tensor, step: int, pull: float) -> None:
        buffers["value"].mul_(self.decay).add_(signal.abs())


@dataclass(frozen=True)
class Movement:
    """Movement pruning (arXiv:2005.07683): scores trained with the gradient ∂L/∂S = g W, so that a
    weight is worth what it moved away from zero.

    adam: learn by Adam, as in the paper, or by gradient descent, S = -Σ g W. The best of scores
        that began at zero are the same at any learning rate, so none is a setting.
    prior: where they begin instead, S = prior |W| / rms(W), in full steps of Adam: what a weight is
        worth before it has moved. 0 is the paper's; a short training has little else to go by.
    """

    adam: bool = True
    prior: float = 0.0
    name: ClassVar[str] = "movement"
    signal: ClassVar[str | None] = "gw"
    buffers: ClassVar[tuple[str, ...]] = ("value", "mean", "square")

    def __post_init__(self) -> None:
        if not self.prior >= 0:
            raise TersorError(f"prior is 0 or more, not {self.prior!r}")

    def update(self, buffers: Mapping[str, Tensor], signal: Tensor, step: int, pull: float) -> None:
        if self.adam:
            _adam(buffers, signal, step, 1.0)
        else:
            buffers["value"].sub_(signal)


@dataclass(frozen=True)
class SoftMovement:
    """Soft movement pruning (arXiv:2005.07683): a weight stays where σ(S) > threshold, and the loss
    has λ mean σ(S) more, which pulls the scores of weights that are not needed below it. How sparse
    the model becomes follows from λ.

    strength: λ at the end; it grows as the schedule does. rate: learning rate of the scores (Adam).
    """

    strength: float
    rate: float = 1e-2
    threshold: float = 0.1
    name: ClassVar[str] = "soft movement"
    signal: ClassVar[str | None] = "gw"
    buffers: ClassVar[tuple[str, ...]] = ("value", "mean", "square")

    def __post_init__(self) -> None:
        if not (self.strength > 0 and self.rate > 0):
            raise TersorError(
                f"strength and rate are more than 0, not {self.strength!r} and {self.rate!r}"
            )
        if not 0 < self.threshold < 0.5:
            raise TersorError(
                f"threshold is of σ(S), which begins at 0.5: between 0 and 0.5, not "
                f"{self.threshold!r}"
            )

    def update(self, buffers: Mapping[str, Tensor], signal: Tensor, step: int, pull: float) -> None:
        soft = buffers["value"].sigmoid()
        _adam(buffers, signal + pull * self.strength * soft * (1 - soft), step, self.rate)


CRITERIA: dict[str, Criterion] = {
    each.name: each for each in (Magnitude(), Gradient(), Taylor(), Movement())
}


def find_criterion(criterion: str | Criterion) -> Criterion:
    """By name, with its usual settings, or as it is."""
    if not isinstance(criterion, str):
        if isinstance(criterion, type) or not hasattr(criterion, "signal"):
            name = getattr(criterion, "__name__", type(criterion).__name__)
            raise TersorError(
                f"{name} is no criterion of masks in training; give one such as "
                "tersor.pruning.Movement(), or its name"
            )
        return criterion
    if criterion == SoftMovement.name:
        raise TersorError("soft movement needs its λ; give SoftMovement(strength=...)")
    if criterion not in CRITERIA:
        raise TersorError(f"criterion is one of {', '.join(CRITERIA)}, not {criterion!r}")
    return CRITERIA[criterion]


def _adam(buffers: Mapping[str, Tensor], gradient: Tensor, step: int, rate: float) -> None:
    (beta1, beta2), mean, square = BETAS, buffers["mean"], buffers["square"]
    mean.lerp_(gradient, 1 - beta1)
    square.lerp_(gradient.square(), 1 - beta2)
    size = rate / (1 - beta1 ** (step + 1))
    scale = (square / (1 - beta2 ** (step + 1))).sqrt_().add_(EPSILON)
    buffers["value"].addcdiv_(mean, scale, value=-size)


__all__ = [
    "CRITERIA",
    "Criterion",
    "Gradient",
    "Magnitude",
    "Movement",
    "SoftMovement",
    "Taylor",
    "find_criterion",
]
