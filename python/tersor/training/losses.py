"""How far a student's predictions are from its teacher's: one number for every token.

P is the teacher's distribution and Q the student's, both softened by the temperature T:

    P = softmax(teacher / T)    Q = softmax(student / T)    over the vocabulary

Losses of distributions are multiplied by T², so that the size of their gradient depends little on T
(Hinton et al., arXiv:1503.02531, section 2). Losses of the logits themselves know no temperature.

Every loss is a sum over the vocabulary, which `fused` adds up in pieces. Those that are divergences
are sums of terms that are never negative, and zero with a zero gradient where P and Q agree: each
carries what the sum of P - Q, which is zero, adds to it. So rounding cannot make a loss of equal
models anything but zero.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from tersor.errors import TersorError


class Loss(Protocol):
    """A loss in the pieces that a part of the vocabulary contributes.

    student, teacher: [tokens, columns] of the vocabulary, in float32 or float64: log-probabilities
        at the temperature where `of_distributions`, else logits.
    """

    of_distributions: ClassVar[bool]

    def sums(self, student: Tensor, teacher: Tensor) -> Tensor:
        """What is added up over the vocabulary; [quantities, tokens]."""

    def value(self, sums: Tensor, vocabulary: int) -> Tensor:
        """The loss of each token, from the whole sums; [tokens]."""

    def gradient(self, student: Tensor, teacher: Tensor, sums: Tensor, vocabulary: int) -> Tensor:
        """Its derivative by the student's logits divided by T, or by the logits; [tokens, columns].

        sums: over the whole vocabulary.
        """


class Divergence(ABC):
    """Σ f(log p, log q) over the vocabulary, for an f that a subclass gives with its derivative.

    Through the softmax the derivative by logit i is f'_i - q_i Σ_j f'_j.
    """

    of_distributions: ClassVar[bool] = True

    @abstractmethod
    def term(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """f, for every entry."""

    @abstractmethod
    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The derivative of f by log q, for every entry."""

    def sums(self, student: Tensor, teacher: Tensor) -> Tensor:
        terms = self.term(teacher, student).sum(-1)
        return torch.stack([terms, self.slope(teacher, student).sum(-1)])

    def value(self, sums: Tensor, vocabulary: int) -> Tensor:
        return sums[0]

    def gradient(self, student: Tensor, teacher: Tensor, sums: Tensor, vocabulary: int) -> Tensor:
        return self.slope(teacher, student) - student.exp() * sums[1].unsqueeze(-1)


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(P ‖ Q) = Σ p log(p / q): the student covers all that the teacher thinks possible
    (Hinton et al., arXiv:1503.02531, up to the teacher's entropy)."""

    def term(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        p = log_p.exp()
        return p * (log_p - log_q) + (log_q.exp() - p)

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.exp() - log_p.exp()


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(Q ‖ P) = Σ q log(q / p): the student leaves out what it cannot hold, and says nothing that
    the teacher thinks impossible (MiniLLM, Gu et al., arXiv:2306.08543)."""

    def term(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        q = log_q.exp()
        return q * (log_q - log_p) + (log_p.exp() - q)

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.exp() * (log_q - log_p)


@dataclass(frozen=True)
class GeneralizedJS(Divergence):
    """β KL(P ‖ M) + (1 - β) KL(Q ‖ M) with M = β P + (1 - β) Q (GKD, Agarwal et al.,
    arXiv:2306.13649). Its gradient nears that of β KL(P ‖ Q) for small β, and that of
    (1 - β) KL(Q ‖ P) for β near 1."""

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise TersorError(
                f"beta of the generalized JS is {self.beta!r}; give a number above 0 and below 1, "
                "or use forward_kl or reverse_kl, the limits"
            )

    def term(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = _log_mix(self.beta, log_p, log_q)
        p, q = log_p.exp(), log_q.exp()
        return self.beta * p * (log_p - log_m) + (1 - self.beta) * q * (log_q - log_m)

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (1 - self.beta) * log_q.exp() * (log_q - _log_mix(self.beta, log_p, log_q))


@dataclass(frozen=True)
class SkewedKL(Divergence):
    """KL(P ‖ λ P + (1 - λ) Q): the forward KL with a bounded gradient where the student knows
    nothing (DistiLLM, Ko et al., arXiv:2402.03898)."""

    skew: float = 0.1

    def __post_init__(self) -> None:
        _check_skew(self.skew)

    def term(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = _log_mix(self.skew, log_p, log_q)
        p, q = log_p.exp(), log_q.exp()
        return p * (log_p - log_m) + (1 - self.skew) * (q - p)

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = _log_mix(self.skew, log_p, log_q)
        return (1 - self.skew) ** 2 * (log_q - log_m).exp() * (log_q.exp() - log_p.exp())


@dataclass(frozen=True)
class SkewedReverseKL(Divergence):
    """KL(Q ‖ (1 - λ) P + λ Q), the reverse KL with a bounded gradient where the teacher knows
    nothing (DistiLLM, Ko et al., arXiv:2402.03898)."""

    skew: float = 0.1

    def __post_init__(self) -> None:
        _check_skew(self.skew)

    def term(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = _log_mix(self.skew, log_q, log_p)
        p, q = log_p.exp(), log_q.exp()
        return q * (log_q - log_m) + (1 - self.skew) * (p - q)

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = _log_mix(self.skew, log_q, log_p)
        p, q = log_p.exp(), log_q.exp()
        pull = self.skew * (1 - self.skew) * (log_q - log_m).exp() * (q - p)
        return q * (log_q - log_m) - pull


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """½ Σ |p - q|, bounded by 1 (f-distill, Wen et al., arXiv:2307.15190)."""

    def term(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 0.5 * (log_p.exp() - log_q.exp()).abs()

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        q = log_q.exp()
        return 0.5 * (q - log_p.exp()).sign() * q


@dataclass(frozen=True)
class LogitMSE:
    """The mean of (student - teacher)² over the vocabulary (Kim et al., arXiv:2105.08919)."""

    of_distributions: ClassVar[bool] = False

    def sums(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().sum(-1).unsqueeze(0)

    def value(self, sums: Tensor, vocabulary: int) -> Tensor:
        return sums[0] / vocabulary

    def gradient(self, student: Tensor, teacher: Tensor, sums: Tensor, vocabulary: int) -> Tensor:
        return (student - teacher) * (2 / vocabulary)


@dataclass(frozen=True)
class Cosine:
    """1 - cos(student, teacher), the angle between the logits as vectors; 0 to 2. A vector of zeros
    is at a right angle to every other."""

    of_distributions: ClassVar[bool] = False

    def sums(self, student: Tensor, teacher: Tensor) -> Tensor:
        pairs = (student * teacher, student.square(), teacher.square())
        return torch.stack([pair.sum(-1) for pair in pairs])

    def value(self, sums: Tensor, vocabulary: int) -> Tensor:
        return 1 - sums[0] * _inverse_norm(sums[1]) * _inverse_norm(sums[2])

    def gradient(self, student: Tensor, teacher: Tensor, sums: Tensor, vocabulary: int) -> Tensor:
        of_student, of_teacher = _inverse_norm(sums[1:]).unsqueeze(-1)
        cosine = sums[0].unsqueeze(-1) * of_student * of_teacher
        return of_student * (cosine * of_student * student - of_teacher * teacher)


# Name in settings -> the loss, whose fields are its own settings.
LOSSES: dict[str, type[Loss]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "generalized_js": GeneralizedJS,
    "skewed_kl": SkewedKL,
    "skewed_reverse_kl": SkewedReverseKL,
    "total_variation": TotalVariation,
    "logit_mse": LogitMSE,
    "cosine": Cosine,
}


@dataclass(frozen=True)
class Distillation:
    """How a student learns from its teacher: alpha · loss + (1 - alpha) · cross-entropy.

    loss: a name in LOSSES, or a loss with settings of its own: SkewedKL(skew=0.2).
    temperature: above 1 the distributions are softer; 1 for losses of logits, which know none. The
        cross-entropy is always at 1.
    alpha: from 0 to 1; 1 needs no labels but those that say which tokens count.
    chunk: logits that are in memory at a time, in a few tensors of so many entries each.
    """

    loss: str | Loss = "forward_kl"
    temperature: float = 1.0
    alpha: float = 0.5
    chunk: int = 1 << 22

    def __post_init__(self) -> None:
        check_temperature(self.temperature, find_loss(self.loss))
        if not 0 <= self.alpha <= 1:
            raise TersorError(
                f"alpha is {self.alpha!r}; give the share of the distillation loss, from 0 to 1"
            )
        if isinstance(self.chunk, bool) or not isinstance(self.chunk, int) or self.chunk < 1:
            raise TersorError(f"chunk is {self.chunk!r}; give a number of logits, such as 4194304")

    def settings(self) -> dict[str, Any]:
        """As JSON data, in which losses of one kind with other settings differ, and of two kinds
        with the same."""
        loss = self.loss if isinstance(self.loss, str) else repr(self.loss)
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"loss": loss}


def find_loss(loss: str | Loss) -> Loss:
    """The loss of a name; TersorError for an unknown one."""
    if not isinstance(loss, str):
        pieces = all(hasattr(loss, name) for name in ("sums", "value", "gradient"))
        if isinstance(loss, type) or not pieces:
            raise TersorError(f"{loss!r} is no loss; give one of {', '.join(LOSSES)}")
        return loss
    if loss not in LOSSES:
        raise TersorError(f"there is no loss {loss!r}; choose one of {', '.join(LOSSES)}")
    return LOSSES[loss]()


def check_temperature(temperature: float, loss: Loss | None = None) -> None:
    """TersorError for what is no temperature, or changes nothing in that loss."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise TersorError(
            f"the temperature is {temperature!r}; give a number above 0, usually from 1 to 4"
        )
    if loss is not None and not loss.of_distributions and temperature != 1:
        raise TersorError(
            f"the temperature is {temperature!r} and changes nothing in {type(loss).__name__}, "
            "which compares logits; leave it at 1, or choose a divergence such as forward_kl"
        )


def token_losses(
    loss: str | Loss, student: Tensor, teacher: Tensor, temperature: float = 1.0
) -> Tensor:
    """The loss of every token, [tokens] in float32 (float64 for float64), differentiable.

    student, teacher: logits [tokens, vocabulary], floating point and finite. This is the plain
    form, which holds several tensors of their size; `fused.distill` gives mean and gradient in
    pieces. Raises TersorError for an unknown loss, another shape, and a temperature of 0 or
    less or where the loss knows none.
    """
    found = find_loss(loss)
    check_temperature(temperature, found)
    if student.dim() != 2 or student.shape != teacher.shape:
        raise TersorError(
            f"the student's logits are {list(student.shape)} and the teacher's "
            f"{list(teacher.shape)}; both must be [tokens, vocabulary] of one vocabulary"
        )
    s, t = working(student), working(teacher)
    if found.of_distributions:
        s, t = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    return found.value(found.sums(s, t), student.shape[1]) * temperature**2


def working(x: Tensor) -> Tensor:
    """In the dtype that losses are computed in: float32 unless it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def _log_mix(share: float, a: Tensor, b: Tensor) -> Tensor:
    """log(share · e^a + (1 - share) · e^b) without underflow, and exactly a where a = b."""
    gap = b - a
    mixed = torch.logaddexp(torch.full_like(gap, math.log(share)), gap + math.log1p(-share))
    return a + torch.where(gap == 0, mixed - mixed.detach(), mixed)  # a gradient there all the same


def _inverse_norm(squares: Tensor) -> Tensor:
    return squares.clamp_min(1e-12).rsqrt()


def _check_skew(skew: float) -> None:
    if not 0 < skew < 1:
        raise TersorError(
            f"the skew is {skew!r}; give a number above 0 and below 1, such as 0.1, or use "
            "forward_kl or reverse_kl, which have none"
        )
