"""What is kept of a teacher's distribution where all of it would be too much, and losses on that.

Exactly kept are the `top` most likely tokens. Of the rest, the tail, either its mass alone is kept,
and the student's loss is that of a vocabulary in which the tail is one token (a divergence so
computed is never above the true one); or `samples` tokens drawn from it with importance weights, so
that the forward KL and its gradient have the true ones as expectations (sampled logits, Anshumann
et al., arXiv:2503.16870). The top alone, renormalised, would teach the student that nothing else is
possible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tersor.errors import TersorError
from tersor.training.fused import IGNORED, Head, Logits, Parts, counted
from tersor.training.losses import (
    Distillation,
    ForwardKL,
    Loss,
    check_temperature,
    find_loss,
    working,
)

CHUNK = 1 << 21  # of the teacher's logits that are turned to float64 at a time: 16 MB
_LEAST = 1e-38  # a probability that float32 can hold, for one that underflowed


@dataclass(frozen=True)
class Keep:
    """What of each distribution is kept: top + samples entries of 8 bytes.

    top: the most likely tokens, exactly.
    samples: draws from the others; 0: only their mass.
    proposal: draws are made with probabilities ∝ p^proposal; 1 draws from the teacher itself, less
        than 1 looks at rare tokens more often. The expectation is the same for all.
    temperature: of the distribution; a loss on it must use the same.
    seed: of the draws.
    """

    top: int = 64
    samples: int = 0
    proposal: float = 1.0
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        for name in ("top", "samples", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise TersorError(f"{name} is {value!r}; give a whole number of at least 0")
        if not self.top and not self.samples:
            raise TersorError("nothing would be kept of the teacher; give top or samples")
        if not 0 < self.proposal <= 2:
            raise TersorError(
                f"proposal is {self.proposal!r}; give an exponent above 0 and up to 2, usually 1"
            )
        if self.proposal != 1 and not self.samples:
            raise TersorError(
                f"proposal is {self.proposal!r} and changes nothing without samples; give samples, "
                "or leave it out"
            )


@dataclass(frozen=True)
class SparseTargets:
    """The teacher's distributions of some tokens, at one temperature.

    ids: int64 [tokens, slots]. p: float32 [tokens, slots], probabilities of the top, then weights
        of the samples. tail: float32 [tokens], the mass of what is not in the slots; with samples
        it is in them. negentropy: float32 [tokens], Σ p log p of the whole distribution.
    """

    ids: Tensor
    p: Tensor
    tail: Tensor
    negentropy: Tensor
    keep: Keep
    vocabulary: int

    def __getitem__(self, rows: Tensor) -> SparseTargets:
        return self._mapped(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> SparseTargets:
        return self._mapped(lambda tensor: tensor.to(device))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> SparseTargets:
        names = ("ids", "p", "tail", "negentropy")
        return replace(self, **{name: change(getattr(self, name)) for name in names})


def sparse_targets(logits: Tensor, keep: Keep, draw: torch.Generator) -> SparseTargets:
    """Of a teacher's logits [tokens, vocabulary]; computed in float64.

    Raises TersorError where logits are not finite, or more is to be kept than there is.
    """
    vocabulary = logits.shape[1]
    if keep.top > vocabulary or (keep.samples and keep.top == vocabulary):
        raise TersorError(
            f"top={keep.top} and samples={keep.samples} are to be kept of a vocabulary of "
            f"{vocabulary}; give a smaller top, or samples=0"
        )
    pieces = [_keep(part, keep, draw) for part in logits.split(max(1, CHUNK // max(1, vocabulary)))]
    ids, p, tail, negentropy = (torch.cat(column) for column in zip(*pieces, strict=True))
    return SparseTargets(ids, p, tail, negentropy, keep, vocabulary)


def _keep(logits: Tensor, keep: Keep, draw: torch.Generator) -> tuple[Tensor, ...]:
    log_p = (logits.double() / keep.temperature).log_softmax(-1)
    if not log_p.isfinite().all():
        raise TersorError("the teacher's logits are not finite; check it, or load it in bfloat16")
    p = log_p.exp()
    negentropy = (p * log_p).sum(-1)
    of_top, ids = p.topk(keep.top, dim=-1)
    rest = p.scatter(1, ids, 0.0)
    tail = rest.sum(-1)
    if not keep.samples:
        return ids, of_top.float(), tail.float(), negentropy.float()
    chances = rest.clamp_min(1e-300).pow(keep.proposal).scatter(1, ids, 0.0)
    chances /= chances.sum(-1, keepdim=True)
    drawn = chances.multinomial(keep.samples, replacement=True, generator=draw)
    weights = rest.gather(1, drawn) / (chances.gather(1, drawn) * keep.samples)
    entries = torch.cat([ids, drawn], dim=1), torch.cat([of_top, weights], dim=1).float()
    return *entries, torch.zeros_like(tail).float(), negentropy.float()


def sparse_losses(loss: str | Loss, student: Tensor, targets: SparseTargets) -> Tensor:
    """The loss of every token, [tokens] in float32 (float64 for float64), differentiable, times T².

    student: logits [tokens, vocabulary]. Raises TersorError for a loss that needs what was not
    kept: those of logits need all of them, and samples estimate no loss but the forward KL.
    """
    found = find_loss(loss)
    t = targets.keep.temperature
    check_kept(found, t, targets.keep)
    _check_shape(student.shape, targets)
    scaled = working(student) / t
    normaliser = scaled.logsumexp(-1)
    log_q = scaled.gather(1, targets.ids) - normaliser.unsqueeze(-1)
    p = targets.p.to(log_q)
    if targets.keep.samples:
        return (targets.negentropy.to(log_q) - (p * log_q).sum(-1)) * t**2
    if targets.ids.shape[1] < targets.vocabulary:
        outside = scaled.scatter(1, targets.ids, float("-inf")).logsumexp(-1) - normaliser
        log_q = torch.cat([log_q, outside.unsqueeze(-1)], dim=1)
        p = torch.cat([p, targets.tail.to(p).unsqueeze(-1)], dim=1)
    log_p = p.clamp_min(_LEAST).log()
    return found.value(found.sums(log_q, log_p), targets.vocabulary) * t**2


def distill_sparse(
    student: Logits,
    targets: SparseTargets,
    settings: Distillation,
    labels: Tensor | None = None,
    count: Tensor | float | None = None,
) -> Parts:
    """As fused.distill, with what was kept of the teacher in the place of its logits.

    Logits are made of settings.chunk entries at a time (one token's at the least), and made again
    in the backward pass. Raises TersorError also where the temperature is not that of the targets.
    """
    loss = find_loss(settings.loss)
    check_kept(loss, settings.temperature, targets.keep)
    _check_shape(student.shape, targets)
    rows, divisor = counted(student, settings, labels, count)
    step = max(1, settings.chunk // targets.vocabulary)
    values, cross = [], []
    for block in rows.split(step):
        wanted = None if labels is None else labels[block]
        value, entropy = checkpoint(
            _block,
            student,
            targets[block],
            loss,
            wanted,
            block,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        values.append(value)
        cross.append(entropy)
    distillation, entropy = torch.stack(values).sum() / divisor, torch.stack(cross).sum() / divisor
    total = settings.alpha * distillation
    if settings.alpha < 1:
        total = total + (1 - settings.alpha) * entropy
    return Parts(total, distillation.detach(), entropy.detach())


def _block(
    student: Logits, targets: SparseTargets, loss: Loss, labels: Tensor | None, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums over these rows of the loss and of the cross-entropy."""
    logits = student.logits(rows) if isinstance(student, Head) else working(student[rows])
    value = sparse_losses(loss, logits, targets).sum()
    if labels is None:
        return value, value.detach() * float("nan")
    entropy = torch.nn.functional.cross_entropy(
        logits, labels, ignore_index=IGNORED, reduction="sum"
    )
    return value, entropy


def check_kept(loss: Loss, temperature: float, keep: Keep) -> None:
    """TersorError where this loss cannot be computed from what is kept so."""
    if not loss.of_distributions:
        raise TersorError(
            f"{type(loss).__name__} needs all of the teacher's logits, and only some were kept; "
            "choose a divergence such as forward_kl, or let the teacher run"
        )
    if keep.samples and not isinstance(loss, ForwardKL):
        raise TersorError(
            f"samples of the teacher's tail give no {type(loss).__name__}, only forward_kl; "
            "choose that, or keep the top without samples"
        )
    if temperature != keep.temperature:
        raise TersorError(
            f"the temperature is {temperature} and the teacher's distributions were kept at "
            f"{keep.temperature}; use that one, or keep them again"
        )


def _check_shape(shape: tuple[int, ...], targets: SparseTargets) -> None:
    if len(shape) != 2 or tuple(shape) != (len(targets.ids), targets.vocabulary):
        raise TersorError(
            f"the student's logits are {list(shape)} and the teacher was kept for "
            f"{len(targets.ids)} tokens of a vocabulary of {targets.vocabulary}; both must read "
            "the same batch with the same tokenizer"
        )
