"""Text that a model writes for training: prompts of several lengths in, token ids out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from tersor.errors import TersorError
from tersor.evaluate import position_limit


def seed_of(*parts: object) -> int:
    """A seed for draws that depend on these parts alone, and look independent for any others."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")


def ends_of(model: nn.Module) -> list[int]:
    """The tokens that end a text, as the model says; none where it does not say."""
    for settings in (getattr(model, "generation_config", None), model.config):
        found = getattr(settings, "eos_token_id", None)
        if found is not None:
            return list(found) if isinstance(found, (list, tuple)) else [int(found)]
    return []


@torch.no_grad()
def complete(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """What the model writes after each prompt, up to new_tokens tokens, an end of text included.

    prompts: token ids, at least one each; of several lengths, they are padded on the left.
    temperature: 0 takes the most likely token; else tokens are drawn, from the whole vocabulary or
        the smallest part of it that has the probability top_p.
    seed: of the draws, which depend on nothing else; torch's own generators are left as they were.

    The model's settings for generation, such as a penalty for repetition, are not used but for the
    tokens that end a text. Its mode is left as it was.
    Raises TersorError for an empty prompt, one without room for more, a model that cannot write.
    """
    check_can_write(model)
    longest = max(map(len, prompts))
    if not min(map(len, prompts)):
        raise TersorError("a prompt has no tokens; begin it with the tokenizer's BOS token")
    check_room(model, longest, new_tokens)
    device = next(model.parameters()).device
    ends = ends_of(model)
    pad = ends[0] if ends else 0
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    drawn: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=True,  # which a Trainer turns off for the model
        **drawn,
    )
    with _plain(model), torch.random.fork_rng(_devices(device)):
        torch.manual_seed(seed)
        made = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
        )
    return [_until(row, ends) for row in made[:, longest:].tolist()]


def check_can_write(model: nn.Module) -> None:
    """TersorError for a model that does not generate text from left to right."""
    can = getattr(model, "can_generate", None)
    if can is None or not can():
        raise TersorError(
            f"{type(model).__name__} writes no text; give a causal language model of transformers"
        )


def check_room(
    model: nn.Module,
    longest: int,
    new_tokens: int,
    what: str = "a prompt",
    whose: str = "model",
) -> None:
    """TersorError where a prompt of so many tokens leaves a model no room for the new ones."""
    limit = position_limit(model)
    if limit is not None and longest + new_tokens > limit:
        raise TersorError(
            f"{what} of {longest} tokens and {new_tokens} new ones are beyond the {whose}'s "
            f"{limit} positions; use shorter prompts or fewer new tokens"
        )


def check_drawing(new_tokens: int, temperature: float, top_p: float) -> None:
    """TersorError for settings that complete() cannot use."""
    if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or new_tokens < 1:
        raise TersorError(f"new_tokens is {new_tokens!r}; give a whole number of at least 1")
    if not 0 <= temperature < float("inf"):
        raise TersorError(f"the temperature is {temperature!r}; give 0 (greedy) or more, usually 1")
    if not 0 < top_p <= 1:
        raise TersorError(f"top_p is {top_p!r}; give a probability above 0 and up to 1")
    if temperature == 0 and top_p < 1:
        raise TersorError(
            f"top_p={top_p} changes nothing at temperature 0, which draws nothing; leave it out"
        )


def _until(ids: list[int], ends: list[int]) -> list[int]:
    """Up to the first end of text, and it too. What padding looks like does not matter."""
    place = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: place + 1]


def _devices(device: torch.device) -> list[int]:
    if device.type != "cuda":
        return []
    return [torch.cuda.current_device() if device.index is None else device.index]


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and without settings for generation that the model came with."""
    training, settings = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings
        model.train(training)
