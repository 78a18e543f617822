"""`tersor demo`: a small real model through the whole path, and one table of what came of it."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tersor.calibrate import Calibration, load_tokenizer
from tersor.demo_model import DemoModel, demo_model
from tersor.evaluate import Quality, Speed, evaluate, measure_speed, text_windows
from tersor.loading import load
from tersor.pipeline import quantize_checkpoint
from tersor.qweight import QSpec, Scheme
from tersor.report import versions

if TYPE_CHECKING:
    from rich.table import Table

BASELINE = "bf16"
METHODS = {f"{method} INT{bits}": (method, bits) for bits in (4, 3) for method in ("rtn", "gptq")}
SHOWN = "gptq INT4"
PROMPT = "class Reader:\n    def __init__(self, file"
WINDOW = 256  # tokens, for calibration and evaluation
SAMPLES = 128  # windows of calibration


@dataclass(frozen=True)
class Row:
    """One line of the table. bits: per weight of the quantized layers, scales included;
    size: bytes of the safetensors files; quality: by held-out text."""

    bits: float
    size: int
    quality: dict[str, Quality]
    speed: Speed

    def to_dict(self) -> dict[str, Any]:
        quality = {text: quality.to_dict() for text, quality in self.quality.items()}
        return asdict(self) | {"quality": quality}


def run(json_path: Path | None = None, say: Callable[[str], None] = print) -> dict[str, Row]:
    """Makes the demo model (or takes it from the cache), quantizes it to 4 and 3 bits by rounding
    and by GPTQ, loads every result, evaluates all on held-out text, generates a few lines and
    prints the table.

    json_path: a file for all the figures, with standard errors.
    """
    start = time.perf_counter()
    source = demo_model(say=say)
    models, bits, sizes = {BASELINE: original(source)}, {BASELINE: 16.0}, {}
    sizes[BASELINE] = _size(source.folder)
    with tempfile.TemporaryDirectory(prefix="tersor-demo-") as scratch:
        for name, (method, width) in METHODS.items():
            say(f"Quantizing: {name} ...")
            out = Path(scratch) / name.replace(" ", "-")
            bits[name] = quantize(source, out, method, width)
            models[name], sizes[name] = load(out), _size(out)

    say("Evaluating on held-out text ...")
    texts = held_out_windows(source)
    quality = {
        kind: evaluate(models, windows, baseline=BASELINE, batch=8)
        for kind, windows in texts.items()
    }
    speed = measure_speed(models, next(iter(texts.values()))[:1])
    rows = {
        name: Row(
            bits[name], sizes[name], {kind: quality[kind][name] for kind in texts}, speed[name]
        )
        for name in models
    }
    say(f"\n{SHOWN} goes on from a prompt:\n\n{_generate(models[SHOWN], source)}\n")
    print_table(table(rows))
    counts = " and ".join(f"{windows.numel()} tokens of {kind}" for kind, windows in texts.items())
    say(
        f"On {counts} that the model was not trained on, in windows of {WINDOW}. KL and top-1 are "
        f"against bf16, × is its speed.\n"
        f"{torch.get_num_threads()} threads; {time.perf_counter() - start:.0f} s in all."
    )
    if json_path:
        content = {
            "rows": {name: row.to_dict() for name, row in rows.items()},
            "training": source.record,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        json_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return rows


def quantize(source: DemoModel, out: Path, method: str, bits: int) -> float:
    """The demo model quantized into the folder `out`; returns its bits per weight."""
    text = Calibration((str(source.calibration),), samples=SAMPLES, seq_len=WINDOW)
    report = quantize_checkpoint(
        source.folder,
        out,
        scheme=Scheme(QSpec(bits)),
        method=method,
        calibration=text if method == "gptq" else None,
    )
    return report.bits_per_weight


def held_out_windows(source: DemoModel) -> dict[str, Tensor]:
    """The texts that the model was not trained on, as tokens: int64 [windows, WINDOW] each."""
    tokenizer = load_tokenizer(source.folder)
    return {
        kind: text_windows(path.read_text(encoding="utf-8"), tokenizer, WINDOW)
        for kind, path in source.held_out.items()
    }


def original(source: DemoModel) -> nn.Module:
    """The demo model as it was trained, in bfloat16."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source.folder, torch_dtype="auto").eval()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _generate(model: Any, source: DemoModel) -> str:
    tokenizer = load_tokenizer(source.folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prompt = tokenizer(PROMPT, return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=80, do_sample=True, temperature=0.6)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def table(rows: dict[str, Row]) -> Table:
    """One line for each model; two texts side by side, speeds beside how many times bf16's."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    out = Table(title=f"held-out text: {' / '.join(rows[BASELINE].quality)}", box=SIMPLE_HEAD)
    out.add_column("method", no_wrap=True)
    for head in ("bits", "MB", "perplexity", "KL", "top-1 %", "prefill tok/s", "decode tok/s"):
        out.add_column(head, justify="right")
    base = rows[BASELINE].speed
    for name, row in rows.items():
        texts = row.quality.values()
        out.add_row(
            name,
            f"{row.bits:.2f}",
            f"{row.size / 1e6:.1f}",
            " / ".join(f"{quality.perplexity.mean:.2f}" for quality in texts),
            " / ".join(f"{quality.kl.mean:.4f}" for quality in texts if quality.kl),
            " / ".join(f"{100 * (quality.top1 or 0):.1f}" for quality in texts),
            f"{row.speed.prefill:.0f} ({row.speed.prefill / base.prefill:.2f}×)",
            f"{row.speed.decode:.0f} ({row.speed.decode / base.decode:.2f}×)",
        )
    return out


def print_table(shown: Table) -> None:
    from rich.console import Console

    # On a terminal as wide as it is; in a file or a pipe, wide enough.
    Console(width=None if sys.stdout.isatty() else 110).print(shown)
