"""Text from a model with exit heads: a token that an early head is sure of is taken there.

    block 0 1 2 | exit | 3 4 | exit | 5 6 7 | head        stretches of blocks between exits
    token t     -> sure: its hidden states wait before block 3
    token t + 1 -> goes on: t and t + 1 pass blocks 3 and 4 together

A token that left early has no keys and values in the later blocks. They are made when a later token
first goes there, from its waiting hidden states and in one batch with that token, so that every
block sees what it would in the full model: leaving early changes which token is chosen, and nothing
else. (LayerSkip, Elhoushi et al., arXiv:2404.16710, fills its cache so; copying the last hidden
state instead, as in CALM, arXiv:2207.07061, only nears it.) What waits at the end is never run.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tersor.blocks import Call, catch
from tersor.errors import TersorError
from tersor.evaluate import position_limit
from tersor.models import find_arch
from tersor.training.exits import ExitHeads
from tersor.training.generation import check_can_write, ends_of


@dataclass(frozen=True)
class EarlyText:
    """What was written after a prompt, and what it took.

    ids: the new tokens, an end of text included. depths: for each, the number of blocks after which
        it was chosen; the first one comes from the full model, which has to read the prompt anyway.
    work: the number of blocks that ran per token after the first one, those that caught up for
        earlier tokens included.
    agreement: the part of the tokens that the full model too would have chosen after the same text;
        None where it was not asked.
    """

    ids: list[int]
    depths: list[int]
    work: float
    agreement: float | None

    @property
    def depth(self) -> float:
        """The mean of depths."""
        return sum(self.depths) / len(self.depths)


class EarlyExit:
    """Greedy text of a causal model that leaves early where an exit head is sure.

    threshold: the probability of its likeliest token from which on an exit is taken; with 1 or
        more none ever is, and the text is exactly the full model's.
    Raises TersorError for a threshold that is not above 0.
    """

    def __init__(self, model: nn.Module, exits: ExitHeads, threshold: float = 0.9) -> None:
        check_can_write(model)
        if exits.model[0] is not model:
            raise TersorError("the exit heads are of another model; load them with this one")
        if not threshold > 0:
            raise TersorError(f"the threshold is {threshold!r}; give a probability above 0")
        self.model, self.exits, self.threshold = model, exits, threshold
        self.blocks = [block for _, block in find_arch(model).blocks(model)]

    @torch.inference_mode()
    def generate(
        self, prompt: Sequence[int], new_tokens: int = 64, compare: bool = True
    ) -> EarlyText:
        """Goes on from one prompt of token ids. compare: for agreement, one more pass of the full
        model over the text. TersorError for a prompt without tokens or without room for more."""
        limit = position_limit(self.model)
        if not len(prompt) or new_tokens < 1:
            raise TersorError(
                f"a prompt of {len(prompt)} tokens and new_tokens={new_tokens}; both must be at "
                "least 1"
            )
        if limit is not None and len(prompt) + new_tokens > limit:
            raise TersorError(
                f"a prompt of {len(prompt)} tokens and {new_tokens} new ones are beyond the "
                f"model's {limit} positions; use fewer"
            )
        training = self.model.training
        self.model.eval()
        self.exits.eval()
        try:
            return self._generate(list(map(int, prompt)), new_tokens, compare)
        finally:
            self.model.train(training)

    def _generate(self, prompt: list[int], new_tokens: int, compare: bool) -> EarlyText:
        device = next(self.model.parameters()).device
        cache = _empty(self.model)
        ids = torch.tensor([prompt], device=device)
        logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        new = [int(logits[0, -1].argmax())]
        steps = _Steps(self.model, self.exits, self.threshold, self.blocks, cache)
        depths, ends = [len(self.blocks)], ends_of(self.model)
        while len(new) < new_tokens and new[-1] not in ends:
            token, depth = steps.next(torch.tensor([prompt + new], device=device))
            new.append(token)
            depths.append(depth)
        work = steps.ran / (len(new) - 1) if len(new) > 1 else float(len(self.blocks))
        agreement = None
        if compare:
            text = torch.tensor([prompt + new[:-1]], device=device)
            chosen = self.model(text, use_cache=False).logits[0, len(prompt) - 1 :].argmax(-1)
            same = chosen == torch.tensor(new, device=device)
            agreement = float(same.double().mean())
        return EarlyText(new, depths, work, agreement)


class _Steps:
    """One text on its way: the caches of its blocks, and what waits between stretches."""

    def __init__(
        self,
        model: nn.Module,
        exits: ExitHeads,
        threshold: float,
        blocks: list[nn.Module],
        cache: DynamicCache,
    ) -> None:
        self.model, self.exits, self.threshold = model, exits, threshold
        self.blocks, self.cache = blocks, cache
        bounds = [0, *(number + 1 for number in exits.numbers), len(blocks)]
        self.stretches = list(itertools.pairwise(bounds))
        self.waiting: list[Tensor | None] = [None] * len(self.stretches)
        self.ran = 0

    def next(self, ids: Tensor) -> tuple[int, int]:
        """The token after ids int64 [1, length], whose last one no block has seen yet; and the
        number of blocks after which it was chosen."""
        total = ids.shape[1]
        calls: dict[int, tuple[Tensor, list[Call]]] = {}
        hidden: Tensor | None = None
        for stretch, (begin, end) in enumerate(self.stretches):
            before = self.waiting[stretch]
            self.waiting[stretch] = None
            count = sum(0 if each is None else each.shape[1] for each in (before, hidden))
            count = max(count, 1)
            past = total - count
            if past not in calls:
                calls[past] = self._calls(ids, past)
            entering, arguments = calls[past]
            if hidden is not None:
                entering = hidden if before is None else torch.cat([before, hidden], dim=1)
            hidden = entering
            for number in range(begin, end):
                hidden = arguments[number](self.blocks[number], hidden)
            self.ran += count * (end - begin)
            if end == len(self.blocks):
                break
            token, sure = self._exit(end - 1, hidden[:, -1])
            if sure >= self.threshold and self.threshold < 1:
                later = self.waiting[stretch + 1]
                waits = hidden if later is None else torch.cat([later, hidden], dim=1)
                self.waiting[stretch + 1] = waits
                return token, end
        assert hidden is not None
        return self._last(hidden[:, -1:]), len(self.blocks)

    def _exit(self, number: int, hidden: Tensor) -> tuple[int, float]:
        head = self.exits.head(number, hidden)
        sure, token = head.logits(torch.zeros(1, dtype=torch.int64)).softmax(-1).max(-1)
        return int(token), float(sure)

    def _last(self, hidden: Tensor) -> int:
        """By the modules that the model itself runs after its blocks."""
        found = find_arch(self.model)
        for path in found.arch.after:
            try:
                hidden = self.model.get_submodule(found.prefix + path)(hidden)
            except AttributeError:  # one that this model does without
                continue
        return int(self.model.get_output_embeddings()(hidden)[0, -1].argmax())

    def _calls(self, ids: Tensor, past: int) -> tuple[Tensor, list[Call]]:
        """What the model gives its blocks for the tokens from `past` on: the hidden states that
        enter the first one, and for each of them its arguments, with our cache."""
        known = _empty(self.model)  # of that length, and with nothing in it
        nothing = ids.new_zeros(1, 1, past, 1)
        for layer in range(len(self.blocks)):
            known.update(nothing, nothing, layer)
        hidden, calls = catch(
            self.model, self.blocks, ids[:, past:], past_key_values=known, use_cache=True
        )

        def ours(value: Any) -> Any:
            return self.cache if value is known else value

        changed = [
            Call(tuple(map(ours, call.args)), {k: ours(v) for k, v in call.kwargs.items()})
            for call in calls
        ]
        return hidden, changed


def _empty(model: Any) -> Any:
    """A cache for all blocks, windowed where they are; transformers before 4.56 asks for none."""
    if "config" in inspect.signature(DynamicCache.__init__).parameters:
        return DynamicCache(config=model.config)
    return DynamicCache()
