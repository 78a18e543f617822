"""On-policy distillation: the student learns from what its teacher thinks of the student's own
text, so that it is corrected where its own mistakes lead (GKD, Agarwal et al., arXiv:2306.13649).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.evaluate import position_limit
from tersor.training.fused import IGNORED
from tersor.training.generation import (
    check_can_write,
    check_drawing,
    check_room,
    complete,
    seed_of,
)

OWN_TEXT = "own_text"  # key of a batch that the student has written


@dataclass(frozen=True)
class OnPolicy:
    """Which batches the student writes itself, and how.

    share: of the batches, λ in the paper; 1 takes nothing from the data set but prompts.
    new_tokens: that the student writes after each prompt, at most.
    temperature, top_p: of the draws; temperature 0 is greedy.
    prompt_tokens: so many tokens at the beginning of each row are its prompt; None: those before
        the first one that counts (whose label is not -100). Of a prompt that leaves new_tokens no
        room in the positions of student and teacher, the end that does.
    prompts: token ids to begin with in the place of the rows' own, drawn at random.

    What is drawn depends on the Trainer's seed, the step and the number of the batch, so a training
    that is resumed goes on with the same draws. Its own text has no right answers: the loss of
    these batches is the distillation alone, of the tokens that were written, up to the end of text.
    """

    share: float = 0.5
    new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    prompt_tokens: int | None = None
    prompts: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise TersorError(
                f"share is {self.share!r}; give the part of the batches that the student writes, "
                "above 0 and up to 1, or no OnPolicy"
            )
        check_drawing(self.new_tokens, self.temperature, self.top_p)
        if self.prompt_tokens is not None and self.prompt_tokens < 1:
            raise TersorError(f"prompt_tokens is {self.prompt_tokens}; give at least 1, or None")
        if self.prompts is not None:
            if self.prompt_tokens is not None:
                raise TersorError("prompts come from the rows or are given; drop prompt_tokens")
            if not len(self.prompts) or not min(len(prompt) for prompt in self.prompts):
                raise TersorError("prompts must be token ids, at least one in each")

    def written(
        self,
        student: nn.Module,
        batch: dict[str, Any],
        when: tuple[int, ...],
        process: int = 0,
        teacher: nn.Module | None = None,
    ) -> dict[str, Any]:
        """The batch, or in its place one that the student has written.

        when: seed, step and number of the batch in it, which decide whether to write, in all
            processes alike. process: its number, on which too depends what is written.
        teacher: that is to read the same tokens, and so must have room for them as well.
        """
        if random.Random(seed_of("write", *when)).random() >= self.share:
            return batch
        draws = seed_of("draw", *when, process)
        limits = [position_limit(model) for model in (student, teacher) if model is not None]
        known = [limit for limit in limits if limit is not None]
        room = min(known) - self.new_tokens if known else None
        prompts = self._prompts(batch, random.Random(draws), room)
        texts = complete(
            student,
            prompts,
            self.new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=draws,
        )
        return _batch(prompts, texts, batch["input_ids"].device)

    def _prompts(
        self, batch: dict[str, Any], draw: random.Random, room: int | None
    ) -> list[list[int]]:
        """room: the tokens that a prompt of a row may have; None: any number."""
        ids: Tensor = batch["input_ids"]
        if self.prompts is not None:
            return [list(map(int, draw.choice(self.prompts))) for _ in ids]
        if "labels" not in batch:
            raise TersorError(
                "the batches have no labels, which say where a row's prompt ends; let the data "
                "collator make them, or give prompts"
            )
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        return [
            self._prompt(*row)[-room if room is not None else None :]
            for row in zip(ids.cpu(), batch["labels"].cpu(), mask.cpu().bool(), strict=True)
        ]

    def _prompt(self, ids: Tensor, labels: Tensor, real: Tensor) -> list[int]:
        ids, labels = ids[real], labels[real]
        count = self.prompt_tokens
        if count is None:
            counting = (labels != IGNORED).nonzero()[:, 0]
            count = int(counting[0]) if len(counting) else len(ids)
        if not count or not len(ids):
            raise TersorError(
                "a row has no prompt: its first token counts already; set prompt_tokens, the "
                "number of tokens at the beginning of a row that the student goes on from"
            )
        prompt: list[int] = ids[:count].tolist()
        return prompt


def _batch(
    prompts: list[list[int]], texts: list[list[int]], device: torch.device
) -> dict[str, Any]:
    """Rows padded on the right, so that positions are those of any other batch."""
    length = max(len(a) + len(b) for a, b in zip(prompts, texts, strict=True))
    shape = (len(prompts), length)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        end = len(prompt) + len(text)
        ids[row, :end] = torch.tensor(prompt + text)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(text)
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in tensors.items()} | {OWN_TEXT: True}


def check_on_policy(
    student: nn.Module, teacher: Any, sharded: bool, how: OnPolicy, same_tokens: bool = True
) -> None:
    """TersorError where a student cannot learn from its own text. same_tokens: whether the teacher
    reads the student's tokens, and not the text as its own."""
    check_can_write(student)
    if not isinstance(teacher, nn.Module):
        raise TersorError(
            "a cache holds nothing of text that the student is yet to write; give the teacher "
            "itself, or no on_policy"
        )
    longest = max(map(len, how.prompts)) if how.prompts is not None else how.prompt_tokens or 1
    check_room(student, longest, how.new_tokens, whose="student")
    if same_tokens:
        check_room(teacher, longest, how.new_tokens, whose="teacher")
    if sharded:
        raise TersorError(
            "the student's weights are sharded, and it cannot write with a part of them; train "
            "with data parallelism alone, or let the teacher write before (generate_corpus)"
        )
