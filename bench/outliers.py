"""What LLM.int8() is for: int8 activations where some channels are much larger than the rest.

    python bench/outliers.py [--quick]

Large language models have such channels; the demo model (trained first where the cache has none)
is too small, so they are made, without changing what it computes: a few channels of the norms in
front of attention and MLP are multiplied by a power of two, and the columns of the linears that
read them divided by it. One scale for a token then leaves few codes for all its other channels.
The models in W8A16, W8A8 with static and with dynamic scales, and W8A8 with outliers beyond 6 (one
scale per row, rounded to nearest):
how far they are from the original on text that it was not trained on. What W8A16 loses is the
weights' part: small columns in a row of large ones have few codes too.
Writes bench/results/outliers.json. No times are measured.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import machine
import tersor
from tersor import ActSpec, QSpec, Scheme, demo
from tersor.calibrate import load_tokenizer
from tersor.demo_model import demo_model
from tersor.evaluate import evaluate

CHANNELS, FACTORS, WINDOWS = 4, (1, 16, 64), 64
READERS = {  # linears that read a norm, in a block of Llama's
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
SCHEMES = {
    "W8A16": Scheme(QSpec(8, None)),
    "W8A8 static": Scheme(QSpec(8, None), ActSpec(dynamic=False)),
    "W8A8": Scheme(QSpec(8, None), ActSpec()),
    "LLM.int8()": Scheme(QSpec(8, None), ActSpec(outliers=6.0)),
}


@dataclass
class Row:
    """kl: per token, from the model before it was rewritten; error: standard, over windows.
    columns: share of the columns of all linears' inputs that were kept in 16 bits."""

    factor: int
    scheme: str
    kl: float
    error: float
    top1: float
    perplexity: float
    columns: float


def scale_channels(model: Any, factor: int) -> None:
    """Makes the first channels behind every norm larger; factor: a power of two, so that nothing
    is rounded and the model computes the very same."""
    for block in model.model.layers:
        for norm, readers in READERS.items():
            block.get_submodule(norm).weight.data[:CHANNELS] *= factor
            for reader in readers:
                block.get_submodule(reader).weight.data[:, :CHANNELS] /= factor


def count_columns(model: nn.Module) -> list[float]:
    """Fills up with the share of each linear's columns in 16 bits, call by call."""
    shares: list[float] = []

    def note(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        kept = layer.activation.kept(args[0]) if layer.activation else None
        shares.append(0.0 if kept is None else float(kept.float().mean()))

    for module in model.modules():
        if isinstance(module, tersor.QuantLinear):
            module.register_forward_pre_hook(note)
    return shares


def table(rows: list[Row]) -> Table:
    shown = Table("channels ×", "scheme", "KL", "top-1 %", "perplexity", "columns in 16 bits")
    for row in rows:
        shown.add_row(
            str(row.factor),
            row.scheme,
            f"{row.kl:.5f} ± {row.error:.5f}",
            f"{100 * row.top1:.1f}",
            f"{row.perplexity:.3f}",
            f"{100 * row.columns:.2f} %",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 windows; nothing saved")
    quick = parser.parse_args().quick
    source = demo_model()
    windows = demo.held_out_windows(source)["code"]
    windows = windows[: 8 if quick else WINDOWS]
    samples = 16 if quick else demo.SAMPLES  # for static scales
    calibration = tersor.Calibration(
        (str(source.calibration),), samples=samples, seq_len=demo.WINDOW
    )
    text = calibration.windows(load_tokenizer(source.folder))
    rows = []
    for factor in FACTORS:
        models: dict[str, Any] = {"original": demo.original(source)}
        changed = demo.original(source)
        scale_channels(changed, factor)
        shares = {}
        for name, scheme in SCHEMES.items():
            models[name] = copy.deepcopy(changed)
            tersor.quantize_model(models[name], text, scheme=scheme, method="rtn")
            shares[name] = count_columns(models[name])
        models["rewritten"] = changed
        found = evaluate(models, windows, baseline="original")
        assert found["rewritten"].kl is not None and found["rewritten"].kl.mean == 0
        for name in SCHEMES:
            quality, share = found[name], shares[name]
            assert quality.kl is not None and quality.top1 is not None
            rows.append(
                Row(
                    factor, name, quality.kl.mean, quality.kl.error, quality.top1,
                    quality.perplexity.mean, sum(share) / len(share),
                )
            )  # fmt: skip
    Console(width=110).print(table(rows))
    if not quick:
        content = {
            "channels": CHANNELS,
            "tokens": windows.numel(),
            "training": source.record,
            "rows": [asdict(row) for row in rows],
        }
        print(machine.save("outliers", content))


if __name__ == "__main__":
    main()
