"""Token pruning: what it saves in reading a prompt, and what it costs in what comes after.

    python bench/tokens.py [--quick] [--int4]

Speed: a Llama of random weights reads prompts of 1024 to 4096 tokens into an empty cache, whole and
pruned in turns; how long that takes does not depend on what the weights are. Quality: the model of
`tersor demo` reads 384 tokens of held-out text and predicts the next 64, given each in turn. Beside
the attention that they receive, tokens are chosen at random, and by age, the oldest leaving first.
What counts is how little the predictions move from those after the whole prompt (KL). The loss is
reported too, but of this model it says little: trained for two minutes, on 256 tokens at a time, it
hardly looks back, and what lies farther back than it has learnt to read only disturbs it.
Writes bench/results/tokens.json.

What can be saved is the work of the layers after a cut: of their linears the share that left, of
their attention more, since it grows with the square, and as much of their cache. Against that
stands one product of 32 queries with all keys at each cut. So it pays in reading long prompts, the
more the earlier the cut. A decoding step reads a shorter cache, which is little beside the weights
unless the prompt is very long.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import machine
import tersor
from tersor import demo
from tersor.calibrate import load_tokenizer
from tersor.demo_model import demo_model
from tersor.evaluate import Estimate, text_windows
from tersor.tokens.choice import attention_received

PROMPT, AFTER = 384, 64
LAYER = 1  # of the demo model's 6
PLANS: dict[str, dict[int, float]] = {  # of 12 layers
    "half after layer 2": {2: 0.5},
    "half after layers 2 and 5": {2: 0.5, 5: 0.5},
    "three quarters after layer 2": {2: 0.75},
    "nearly nothing after layer 2": {2: 0.001},  # what the scores alone cost
}


def random_llama() -> LlamaForCausalLM:
    """183 million weights in bfloat16, 12 layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def seconds_of(model: LlamaForCausalLM, ids: Tensor, shares: Mapping[int, float]) -> float:
    with tersor.prune_tokens(model, shares) if shares else nullcontext():
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start


@torch.inference_mode()
def speed(model: LlamaForCausalLM, tokens: int, runs: int) -> list[dict[str, Any]]:
    """Whole and pruned in turns; the gain is the median of the ratios within a turn."""
    ids = torch.randint(32000, (1, tokens), generator=torch.manual_seed(tokens))
    plans: dict[str, dict[int, float]] = {"whole": {}} | PLANS
    taken: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(runs + 1):
        for name, shares in plans.items():
            seconds = seconds_of(model, ids, shares)
            if turn:  # the first warms up
                taken[name].append(seconds)
    rows = []
    for name, shares in plans.items():
        gains = [whole / own for whole, own in zip(taken["whole"], taken[name], strict=True)]
        rows.append(
            {"tokens": tokens, "plan": name, "shares": shares, "gain": round(median(gains), 3)}
            | machine.summary(taken[name])
            | {"cache_share": cache_share(shares, tokens, model.config.num_hidden_layers)}
        )
        print(f"{tokens} tokens, {name}: {rows[-1]['median_ms']:.0f} ms, {rows[-1]['gain']}×")
    return rows


def cache_share(shares: Mapping[int, float], tokens: int, layers: int) -> float:
    """Keys that are kept, of all."""
    kept, now = 0, tokens
    for layer in range(layers):
        kept += now
        now -= int(now * shares.get(layer, 0))
    return round(kept / (layers * tokens), 4)


def at_random(query: Tensor, key: Tensor, slots: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.rand(slots.shape)


def by_age(query: Tensor, key: Tensor, slots: Tensor, *_: Any, **__: Any) -> Tensor:
    return slots.float()


SCORES: dict[str, Callable[..., Tensor]] = {
    "attention": attention_received,
    "attention, merged": attention_received,
    "random": at_random,
    "oldest first": by_age,
}


@torch.inference_mode()
def predicted(model: Any, ids: Tensor, share: float, method: str) -> Tensor:
    """Log-probabilities after the prompt, float64 [windows, AFTER, vocabulary]."""
    merge = method.endswith("merged")
    settings: dict[str, Any] = {"merge": merge, "min_tokens": PROMPT}
    with (
        tersor.prune_tokens(model, {LAYER: share}, **settings) if share else nullcontext(),
        patch("tersor.tokens.run.attention_received", SCORES[method]),
    ):
        cache = DynamicCache(config=model.config)
        first = model(ids[:, :PROMPT], past_key_values=cache, logits_to_keep=1).logits
        rest = model(ids[:, PROMPT:-1], past_key_values=cache).logits
    return torch.cat([first, rest], dim=1).double().log_softmax(-1)


def quality(windows: int | None) -> list[dict[str, Any]]:
    """Each way to choose beside the whole prompt and, paired by window, beside chance."""
    source = demo_model()
    model, tokenizer = demo.original(source), load_tokenizer(source.folder)
    torch.manual_seed(0)
    cases = [(share, method) for share in (0.25, 0.5, 0.75) for method in SCORES]
    rows = []
    for kind, path in source.held_out.items():
        text = text_windows(path.read_text(encoding="utf-8"), tokenizer, PROMPT + AFTER)[:windows]
        more: dict[tuple[float, str], list[Tensor]] = {case: [] for case in cases}
        kl: dict[tuple[float, str], list[Tensor]] = {case: [] for case in cases}
        for ids in text.split(8):
            whole, target = predicted(model, ids, 0, "attention"), ids[:, PROMPT:, None]
            for case in cases:
                log_p = predicted(model, ids, *case)
                more[case].append((whole - log_p).gather(2, target).mean((1, 2)))
                kl[case].append((whole.exp() * (whole - log_p)).sum(2).mean(1))
        for share, method in cases:
            distance = torch.cat(kl[share, method])
            found = {
                "more_nats": Estimate.of(torch.cat(more[share, method])),
                "kl": Estimate.of(distance),
                "kl_over_random": Estimate.of(distance - torch.cat(kl[share, "random"])),
            }
            row = {"text": kind, "windows": len(text), "kept": 1 - share, "method": method}
            rows.append(row | {name: vars(estimate) for name, estimate in found.items()})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    shown = Table(title=f"{AFTER} tokens after a prompt of {PROMPT}, in nats per token")
    for head in ("text", "kept", "chosen by", "KL from the whole", "KL beside random", "loss"):
        shown.add_column(head, justify="right")
    for row in rows:
        cells = (
            f"{row[name]['mean']:+.5f} ± {row[name]['error']:.5f}"
            for name in ("kl", "kl_over_random", "more_nats")
        )
        shown.add_row(row["text"], f"{row['kept']:.0%}", row["method"], *cells)
    Console(width=120).print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one prompt, little text")
    parser.add_argument("--int4", action="store_true", help="time the model in INT4, not bfloat16")
    settings = parser.parse_args()
    quick = settings.quick
    model = random_llama()
    weights = sum(p.numel() for p in model.parameters())
    if settings.int4:
        scheme = tersor.Scheme(tersor.QSpec(4, 128), tersor.ActSpec())
        tersor.quantize_model(model, scheme=scheme, method="rtn")
    timed = []
    for tokens in (512,) if quick else (1024, 2048, 4096):
        timed += speed(model, tokens, 1 if quick else 7)
    rows = quality(16 if quick else None)
    show(rows)
    if not quick:
        result = {
            "threads": torch.get_num_threads(),
            "weights": weights,
            "linears": "W4A8" if settings.int4 else "bfloat16",
            "speed": timed,
            "quality": {
                "prompt": PROMPT,
                "after": AFTER,
                "layer": LAYER,
                "rows": rows,
            },
        }
        print(machine.save("tokens-int4" if settings.int4 else "tokens", result))


if __name__ == "__main__":
    main()
