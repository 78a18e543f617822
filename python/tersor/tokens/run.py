"""One model while its tokens are pruned, and the forward pass that it is in.

A pass is changed by two seams: hooks on the blocks take tokens out of the hidden states and of the
position embeddings; the attention of every layer (tersor.tokens.attention) tells the scores, and is
given the mask of the tokens that are left.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tersor.errors import TersorError
from tersor.tokens.attention import switched, watched
from tersor.tokens.checks import TokenSettings, check_attention, check_settings, is_causal, parts
from tersor.tokens.choice import (
    attention_received,
    choose,
    first_of,
    last_of,
    merge,
    visible,
)
from tersor.tokens.report import TokenReport


@dataclass
class Prompt:
    """An input that is pruned. b rows of `tokens` slots.

    left: tokens left after each cut layer, planned.
    slots: of the tokens that are left so far, [b, s]. real: bool [b, tokens].
    cuts: (layer, slots left after it), one after the other.
    scores: of the tokens that are left, [b, s], from the attention of the layer that is running.
    weight: how many tokens each one holds, [b, s]. owner: slot -> the slot it was merged into.
    whole: states at their slots as of the last cut, [b, tokens, d]; encoders only.
    """

    tokens: int
    left: dict[int, int]
    slots: Tensor
    real: Tensor
    owner: Tensor
    weight: Tensor
    cuts: list[tuple[int, Tensor]] = field(default_factory=list)
    scores: Tensor | None = None
    whole: Tensor | None = None

    def slots_at(self, layer: int) -> Tensor | None:
        """The slots that are left when a layer begins; None where all are."""
        return next((slots for cut, slots in reversed(self.cuts) if cut < layer), None)


class Run:
    """One model inside prune_tokens, and the forward pass that it is in."""

    def __init__(self, model: PreTrainedModel, settings: TokenSettings) -> None:
        self.report = TokenReport()
        self.model, self.settings = model, settings
        self.blocks, self.models = parts(model)
        self.last_layer = len(self.blocks) - 1
        self.causal = is_causal(model, self.blocks[0])
        default = 32 if self.causal else 0
        self.keep_last = default if settings.keep_last is None else settings.keep_last
        check_settings(settings, self.keep_last, self.causal, len(self.blocks))
        check_attention(model, self.blocks[0])
        self.prompts: WeakKeyDictionary[Any, Prompt] = WeakKeyDictionary()  # by cache
        # The pass: what it prunes or has pruned, whether it is the one that prunes, the slots that
        # were read before it, the padding up to its end (None: there is none), and masks in use.
        self.prompt: Prompt | None = None
        self.reading = False
        self.past = 0
        self.real: Tensor | None = None
        self.masks: dict[tuple[int, int, int | None], Tensor] = {}
        self.mask: Any = None
        self.labels = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """With the hooks and watchers of this run in the model."""
        with ExitStack() as stack:
            stack.enter_context(switched([*self.blocks, *self.models]))
            for module in self.models:
                names = list(inspect.signature(module.forward).parameters)
                hook = functools.partial(self.before_model, names)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            for layer, block in enumerate(self.blocks):
                watcher = functools.partial(self.attention, layer)
                stack.enter_context(watched(block, watcher))
                before = functools.partial(self.before_block, layer)
                handle = block.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(handle.remove)
                after = functools.partial(self.after_block, layer)
                stack.callback(block.register_forward_hook(after).remove)
            yield

    def before_model(self, names: list[str], model: nn.Module, args: Any, kwargs: Any) -> None:
        """Notes what the blocks are not told; the innermost model has the last word."""
        given = dict(zip(names, args, strict=False)) | kwargs
        self.mask = given.get("attention_mask")
        inner = self.labels and model is not self.models[0]
        self.labels = inner or given.get("labels") is not None

    def before_block(self, layer: int, _: nn.Module, args: Any, kwargs: Any) -> Any:
        if layer == 0:
            self.begin(args, kwargs)
        if self.prompt is None or not self.reading:
            return None
        self.prompt.scores = None
        slots = self.prompt.slots_at(layer)
        return None if slots is None else _at_slots(args, kwargs, slots, self.prompt.tokens)

    def begin(self, args: Any, kwargs: Any) -> None:
        """What the pass is: of a prompt to prune, after one that was, or neither."""
        hidden = args[0] if args else kwargs["hidden_states"]
        rows, tokens = hidden.shape[:2]
        mask, self.mask = self.mask, None
        labels, self.labels = self.labels, False
        self.prompt, self.reading = None, False
        self.masks.clear()
        if self.model.training:
            raise TersorError("token pruning is for a model in evaluation mode; call model.eval()")
        cache = next((c for c in (*args, *kwargs.values()) if hasattr(c, "get_seq_length")), None)
        if cache is not None and type(cache) is not DynamicCache:
            raise TersorError(
                f"a {type(cache).__name__} cannot hold layers of different lengths; prune tokens "
                "with a DynamicCache, transformers' default"
            )
        self.past = 0 if cache is None else cache.get_seq_length()
        self.real = _real(mask, rows, self.past + tokens)
        if self.past:
            self.prompt = self.prompts.get(cache)
            if self.prompt is not None and self.past < self.prompt.tokens:
                raise TersorError(
                    f"the cache was cropped to {self.past} tokens, into the {self.prompt.tokens} "
                    "of the pruned prompt; begin with an empty cache"
                )
            return
        if cache is not None:
            self.prompts.pop(cache, None)
        if tokens < self.settings.min_tokens:
            self.report.passed += 1
            return
        if labels and self.causal:
            raise TersorError(
                "a pruned prompt has no logits for the tokens that went, and so no loss; leave out "
                "the labels, or prune only the prompt and score what follows it with the cache"
            )
        self.prompt, self.reading = self.plan(hidden, rows, tokens), True
        if cache is not None:
            self.prompts[cache] = self.prompt

    def plan(self, hidden: Tensor, rows: int, tokens: int) -> Prompt:
        left, count = {}, tokens
        kept = self.settings.keep_first + self.keep_last
        for layer, share in sorted(self.settings.shares.items()):
            left[layer] = count = count - int(count * share)
            if count < max(kept, 1):
                raise TersorError(
                    f"of an input of {tokens} tokens {count} would be left after layer {layer}, "
                    f"fewer than keep_first + keep_last = {kept}; lower those or the shares, "
                    f"give a longer input, or leave such short ones as they are (min_tokens)"
                )
        slots = torch.arange(tokens, device=hidden.device).repeat(rows, 1)
        real = torch.ones_like(slots, dtype=torch.bool) if self.real is None else self.real
        weight = torch.promote_types(hidden.dtype, torch.float32)
        return Prompt(tokens, left, slots, real, slots, torch.ones_like(slots, dtype=weight))

    def attention(
        self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, eager: bool, given: Any
    ) -> Tensor | None:
        """The mask for a layer's attention; and the scores, where tokens go after it."""
        prompt = self.prompt
        if prompt is None:
            return mask
        window = given.get("sliding_window")
        if window is not None and not self.causal:
            raise TersorError(
                "token pruning does not serve encoders with a sliding window; use a model "
                "with full attention"
            )
        slots = prompt.slots_at(layer)
        if self.reading and layer in prompt.left:
            if query.shape[2] != key.shape[2]:
                raise TersorError(
                    f"layer {layer} attends to more than the tokens it is given; token pruning "
                    "serves self-attention only"
                )
            scaling = given.get("scaling")
            prompt.scores = attention_received(
                *(query, key, prompt.slots, self.real),
                causal=self.causal,
                last=self.keep_last if self.causal else None,
                scaling=query.shape[3] ** -0.5 if scaling is None else scaling,
                window=window,
                softcap=given.get("softcap"),
            )
        if slots is None:
            return mask
        return self.pruned_mask(layer, slots, query, key, eager, window)

    def pruned_mask(
        self, layer: int, slots: Tensor, query: Tensor, key: Tensor, eager: bool, window: int | None
    ) -> Tensor | None:
        """The mask among the tokens that a layer has; None where attention needs none."""
        assert self.prompt is not None
        rows, count = query.shape[0], query.shape[2]
        here = slots
        if not self.reading:
            later = torch.arange(self.prompt.tokens, self.past + count, device=slots.device)
            slots = torch.cat([slots, later.expand(len(slots), -1)], dim=1)
            here = slots[:, -count:]
        missing = slots.shape[1] - key.shape[2]
        # Only a layer with a sliding window forgets, and nothing that its window still reaches.
        forgets = window is not None and key.shape[2] >= min(slots.shape[1], window - 1 + count)
        if missing < 0 or (missing and not forgets) or len(slots) != rows:
            raise TersorError(
                f"layer {layer} has {key.shape[2]} keys of {len(key)} rows where {slots.shape[1]} "
                f"of {len(slots)} were left; do not change the cache of a pruned prompt"
            )
        slots = slots[:, missing:]
        narrow = window is not None and self.past + count > window
        shape = self.causal and count > 1 and (eager or count != key.shape[2])
        if self.real is None and not narrow and not shape:
            return None
        same = here.shape[1], slots.shape[1], window  # for all layers between two cuts
        if same not in self.masks:
            mask = visible(here, slots, self.real, self.causal, window)
            if eager:
                lowest = torch.finfo(query.dtype).min
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
            self.masks[same] = mask
        return self.masks[same]

    def after_block(self, layer: int, _: nn.Module, args: Any, output: Any) -> Any:
        prompt = self.prompt
        if prompt is None or not self.reading:
            return None
        last = layer == self.last_layer
        if layer not in prompt.left and not last:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = self.finish(prompt, hidden) if last else self.cut(prompt, layer, hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def cut(self, prompt: Prompt, layer: int, hidden: Tensor) -> Tensor:
        count = prompt.left[layer]
        if prompt.scores is None:
            raise TersorError(
                f"the attention of layer {layer} does not go through transformers' attention "
                "interface, so that its scores are not known; use a model of ARCHS"
            )
        if count < hidden.shape[1]:
            if not self.causal:
                prompt.whole = _put(prompt.whole, prompt.slots, hidden)
            hidden = self.drop(prompt, count, hidden)
        prompt.cuts.append((layer, prompt.slots))
        return hidden

    def drop(self, prompt: Prompt, count: int, hidden: Tensor) -> Tensor:
        assert prompt.scores is not None
        real = prompt.real.gather(1, prompt.slots)
        safe = first_of(real, self.settings.keep_first) | last_of(real, self.keep_last)
        kept = choose(prompt.scores, real, safe, count)
        if self.settings.merge:
            hidden, weight, into = merge(hidden, prompt.weight, kept, real, safe, self.causal)
            prompt.weight = weight
            prompt.owner = prompt.owner.scatter(1, prompt.slots, prompt.slots.gather(1, into))
        else:
            hidden = hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[2]))
        prompt.slots = prompt.slots.gather(1, kept)
        return hidden

    def finish(self, prompt: Prompt, hidden: Tensor) -> Tensor:
        """The last layer's states at the places of the input, for what comes after the blocks."""
        if hidden.shape[1] < prompt.tokens:
            if self.causal:
                empty = hidden.new_full((len(hidden), prompt.tokens, hidden.shape[2]), torch.nan)
                hidden = _put(empty, prompt.slots, hidden)
            else:
                hidden = _put(prompt.whole, prompt.slots, hidden)
                owner = prompt.owner
                for _ in prompt.cuts[1:]:  # what took a token in may itself have been taken in
                    owner = owner.gather(1, owner)
                hidden = hidden.gather(1, owner[..., None].expand(-1, -1, hidden.shape[2]))
        counts = [prompt.tokens, *(slots.shape[1] for _, slots in prompt.cuts)]
        self.report.prompts += 1
        self.report.kept = dict(prompt.cuts)
        self.report.counts = dict(zip(prompt.left, pairwise(counts), strict=True))
        prompt.whole = prompt.scores = None
        self.masks.clear()
        self.reading = False
        return hidden


def _real(mask: Any, rows: int, tokens: int) -> Tensor | None:
    """Which slots hold a token, bool [rows, tokens]; None where all do."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != (rows, tokens):
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise TersorError(
            f"token pruning needs an attention_mask with a place for every token read so far, "
            f"[{rows}, {tokens}], not {shape}"
        )
    real = mask.bool()
    return None if bool(real.all()) else real


def _at_slots(args: Any, kwargs: Any, slots: Tensor, tokens: int) -> tuple[Any, Any]:
    """A block's arguments, what is told of each position taken at the slots that are left."""

    def take(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(take(part) for part in value)
        per_token = isinstance(value, Tensor) and value.dim() in (2, 3) and value.shape[1] == tokens
        if not per_token:
            return value
        wide = value.expand(len(slots), *value.shape[1:])
        return wide[torch.arange(len(slots), device=slots.device)[:, None], slots]

    taken = {
        name: value if name == "hidden_states" else take(value) for name, value in kwargs.items()
    }
    return (*args[:1], *map(take, args[1:])), taken


def _put(whole: Tensor | None, slots: Tensor, states: Tensor) -> Tensor:
    """states [b, s, d] at their slots of whole [b, tokens, d]; None where they are all of it."""
    if whole is None:
        return states
    return whole.scatter(1, slots[..., None].expand(-1, -1, states.shape[2]), states)
