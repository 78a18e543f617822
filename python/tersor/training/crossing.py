"""Distillation between two vocabularies: at the positions where both models predict the same token
after the same text, their distributions over the tokens that both have, each renormalised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tersor.training.fused import IGNORED, Head, Logits, distill
from tersor.training.losses import Distillation
from tersor.training.vocabulary import VocabularyMap

_CHUNK = 1 << 22  # logits at a time, where the teacher's mass is measured


class Crossed(NamedTuple):
    """loss: alpha · distillation + (1 - alpha) · cross-entropy of the whole vocabulary.
    distillation: the mean over `used` positions; zero where there are none. cross_entropy: as in
    fused.Parts. outside: the teacher's mean probability of tokens that are not shared."""

    loss: Tensor
    distillation: Tensor
    cross_entropy: Tensor
    outside: Tensor
    used: int


def distill_across(
    student: Logits,
    read_teacher: Callable[[dict[str, Tensor]], Logits],
    vocabulary: VocabularyMap,
    inputs: Mapping[str, Any],
    settings: Distillation,
    labels: Tensor,
    count: Any,
) -> Crossed:
    """student: of a batch whose input_ids and attention_mask are in inputs. read_teacher: its
    predictions for a batch of its own tokens. labels, count: as in fused.distill; the mean of the
    distillation counts as much as the batch's tokens do."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    rows, ours, theirs = _translated(vocabulary, ids, mask, labels)
    # The cheapest loss beside a cross-entropy that is wanted alone.
    plain = distill(student, student.detach(), Distillation("logit_mse", alpha=0.0), labels, count)
    zero = plain.cross_entropy.new_zeros(())
    if not len(ours):
        loss = (1 - settings.alpha) * plain.loss
        return Crossed(loss, zero, plain.cross_entropy, zero, 0)
    length = max(map(len, rows))
    text = ids.new_zeros(len(rows), length)
    known = torch.zeros_like(text)
    for number, row in enumerate(rows):
        text[number, : len(row)] = torch.tensor(row)
        known[number, : len(row)] = 1
    with torch.no_grad():
        teacher = read_teacher({"input_ids": text, "attention_mask": known})
    at = torch.tensor([row * length + place for row, place in theirs], device=ids.device)
    here = torch.tensor([row * ids.shape[1] + place for row, place in ours], device=ids.device)
    shared = tuple(t.to(ids.device) for t in (vocabulary.student, vocabulary.teacher))
    target = narrowed(teacher, shared[1], at)
    parts = distill(narrowed(student, shared[0], here), target, replace(settings, alpha=1.0))
    weight = (labels != IGNORED).sum() / count
    loss = settings.alpha * weight * parts.loss + (1 - settings.alpha) * plain.loss
    outside = _outside(narrowed(teacher, slice(None), at), shared[1])
    return Crossed(loss, parts.distillation, plain.cross_entropy, outside, len(here))


def narrowed(logits: Logits, columns: slice | Tensor, rows: Tensor | None = None) -> Logits:
    """Of these tokens of the vocabulary, and these rows."""
    if isinstance(logits, Tensor):
        kept = logits if rows is None else logits[rows]
        return kept[:, columns]
    hidden = logits.hidden if rows is None else logits.hidden[rows]
    bias = None if logits.bias is None else logits.bias[columns]
    return Head(hidden, logits.weight[columns], bias, logits.softcap)


def _translated(
    vocabulary: VocabularyMap, ids: Tensor, mask: Tensor | None, labels: Tensor
) -> tuple[list[list[int]], list[tuple[int, int]], list[tuple[int, int]]]:
    """The teacher's rows, and pairs (row, position) of both at which something counts."""
    counts = (labels != IGNORED).view(ids.shape).tolist()
    rows, ours, theirs = [], [], []
    for number, row in enumerate(ids.tolist()):
        real = range(len(row))
        if mask is not None:
            real = mask[number].nonzero()[:, 0].tolist()
        other, pairs = vocabulary.translate([row[place] for place in real])
        rows.append(other)
        for i, j in pairs:
            if counts[number][real[i]]:
                ours.append((number, real[i]))
                theirs.append((number, j))
    return rows, ours, theirs


@torch.no_grad()
def _outside(teacher: Logits, shared: Tensor) -> Tensor:
    count, size = teacher.shape
    masses = []
    for rows in torch.arange(count, device=shared.device).split(max(1, _CHUNK // size)):
        logits = teacher.logits(rows) if isinstance(teacher, Head) else teacher[rows].float()
        inside = logits[:, shared].logsumexp(-1) - logits.logsumexp(-1)
        masses.append(-inside.expm1())
    return torch.cat(masses).mean()
