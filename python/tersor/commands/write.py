"""generate: a model goes on from a prompt."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.commands.opening import check_config, load_model
from tersor.errors import TersorError

if TYPE_CHECKING:
    import argparse


def generate(args: argparse.Namespace) -> None:
    import torch
    from transformers import TextStreamer

    from tersor.calibrate import load_tokenizer
    from tersor.evaluate import check_vocabulary
    from tersor.tokens import prune_tokens

    check_config(args.folder)
    tokenizer = load_tokenizer(Path(args.folder))
    prompt = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
    if not prompt["input_ids"].numel():
        raise TersorError("the prompt has no tokens; give some text to go on from")
    model = load_model(args.folder, args.outliers)
    check_vocabulary(args.folder, model, prompt["input_ids"])
    _check_room(model, prompt["input_ids"].shape[1], args.max_tokens)
    torch.manual_seed(args.seed)
    draw = (
        {"do_sample": True, "temperature": args.temperature}
        if args.temperature
        else {"do_sample": False}
    )
    shares = args.prune_tokens
    with prune_tokens(model, shares, min_tokens=2) if shares else nullcontext() as pruned:
        model.generate(
            **prompt,
            max_new_tokens=args.max_tokens,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            **draw,
        )
    if pruned:
        print(f"prompt: {pruned}", file=sys.stderr)
    _tell_of_length(model, prompt["input_ids"].shape[1], args.max_tokens)


def _check_room(model: Any, prompt: int, more: int) -> None:
    from tersor.evaluate import position_limit

    limit = position_limit(model)
    if limit is None or prompt + more <= limit:
        return
    fix = f"use --max-tokens {limit - prompt} or less" if prompt < limit else "shorten the prompt"
    raise TersorError(
        f"the prompt and --max-tokens make {prompt} + {more} tokens, more than the {limit} "
        f"positions of the model; {fix}"
    )


def _tell_of_length(model: Any, prompt: int, more: int) -> None:
    """Models with rotary positions go on beyond what they were made for, but not well."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if known and prompt + more > known:
        print(
            f"note: the model was made for {known} positions, and the prompt and --max-tokens make "
            f"{prompt} + {more}; what lies beyond may make no sense",
            file=sys.stderr,
        )
