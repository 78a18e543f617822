"""Assisted generation by transformers: a quantized model drafts, the original verifies.

    python bench/assisted.py [--quick]

The demo model (trained first where the cache has none) in INT4 by GPTQ proposes tokens, a few at a
time; the original checks them all in one pass and keeps those that it would have written itself
(Leviathan et al., arXiv:2211.17192). For several lengths of proposals, in float32 and in bfloat16:
tokens per second with and without the draft, in turns; the share of proposals that were accepted;
and whether the text is the very same. In float32 it is. In bfloat16, logits of several tokens read
at once are rounded otherwise than of one at a time, and where two tokens are near a tie the other
may win. Writes bench/results/assisted.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import machine
import tersor
from tersor import demo
from tersor.calibrate import load_tokenizer
from tersor.demo_model import DemoModel, demo_model

PROPOSED = (3, 5, 10)  # tokens that the draft proposes at a time
PROMPT, NEW, PROMPTS, RUNS = 64, 96, 4, 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Row:
    """tokens_per_second: medians over runs and prompts together. accepted: share of the draft's
    tokens that the original kept. identical: prompts whose text is that of the original alone."""

    dtype: str
    proposed: int
    plain: float
    assisted: float
    accepted: float
    identical: int
    prompts: int


class Passes:
    """Counts what a model reads: lengths of its inputs, call by call."""

    def __init__(self, model: nn.Module) -> None:
        self.lengths: list[int] = []
        self._hook = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        self.lengths.append(ids.shape[1])

    def close(self) -> list[int]:
        self._hook.remove()
        return self.lengths


def acceptance(lengths: list[int], prompt: int, written: int) -> tuple[int, int]:
    """(accepted, proposed) tokens, from what the verifier read: every pass reads the last token
    that is certain, or the prompt, and the proposals; it adds those it accepts and one of its own.
    """
    proposed = lengths[0] - prompt + sum(length - 1 for length in lengths[1:])
    return written - len(lengths), proposed


def generate(model: Any, ids: Tensor, draft: Any = None) -> tuple[Tensor, float]:
    start = time.perf_counter()
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, assistant_model=draft
    )
    return out[0, ids.shape[1] :], time.perf_counter() - start


def compare(
    original: Any, draft: Any, prompts: Tensor, dtype: str, proposed: int, runs: int
) -> Row:
    draft.generation_config.num_assistant_tokens = proposed
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0  # as many as asked, always
    accepted, offered, same = 0, 0, 0
    for ids in prompts.split(1):  # also warms both up
        plain, _ = generate(original, ids)
        passes = Passes(original)
        assisted, _ = generate(original, ids, draft)
        kept, all_of_them = acceptance(passes.close(), ids.shape[1], len(assisted))
        accepted, offered = accepted + kept, offered + all_of_them
        same += torch.equal(plain, assisted)
    speeds: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for ids in prompts.split(1):
            for speed, helper in zip(speeds, (None, draft), strict=True):
                text, seconds = generate(original, ids, helper)
                speed.append(len(text) / seconds)
    return Row(
        dtype,
        proposed,
        median(speeds[0]),
        median(speeds[1]),
        accepted / offered,
        same,
        len(prompts),
    )


def prompts_of(source: DemoModel, count: int) -> Tensor:
    """The beginnings of windows of held-out code, int64 [count, PROMPT]."""
    windows = demo.held_out_windows(source)["code"]
    return windows[:: len(windows) // count][:count, :PROMPT]


def table(rows: list[Row]) -> Table:
    shown = Table("dtype", "proposed", "plain tok/s", "assisted tok/s", "", "accepted", "identical")
    for row in rows:
        shown.add_row(
            row.dtype,
            str(row.proposed),
            f"{row.plain:.1f}",
            f"{row.assisted:.1f}",
            f"{row.assisted / row.plain:.2f}×",
            f"{100 * row.accepted:.1f} %",
            f"{row.identical} of {row.prompts}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one prompt, once; nothing saved")
    quick = parser.parse_args().quick
    transformers.logging.set_verbosity_error()
    source = demo_model()
    prompts = prompts_of(source, 1 if quick else PROMPTS)
    rows = []
    with tempfile.TemporaryDirectory(prefix="assisted-") as folder:
        out = Path(folder) / "int4"
        bits = demo.quantize(source, out, "rtn" if quick else "gptq", 4)
        for name, dtype in DTYPES.items():
            original, draft = demo.original(source).to(dtype), tersor.load(out, dtype)
            for model in (original, draft):
                model.generation_config.eos_token_id = None  # all write as many tokens
            for proposed in PROPOSED[: 1 if quick else None]:
                rows.append(compare(original, draft, prompts, name, proposed, 1 if quick else RUNS))
    Console(width=110).print(table(rows))
    tokenizer = load_tokenizer(source.folder)
    if not quick:
        content = {
            "bits_per_weight": bits,
            "prompt_tokens": PROMPT,
            "new_tokens": NEW,
            "runs": RUNS,
            "vocabulary": len(tokenizer),
            "threads": torch.get_num_threads(),
            "training": source.record,
            "rows": [asdict(row) for row in rows],
        }
        print(machine.save("assisted", json.loads(json.dumps(content))))


if __name__ == "__main__":
    main()
