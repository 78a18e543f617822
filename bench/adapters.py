"""What adapters that cancel the error of quantization, and factors of low rank, keep of the demo
model.

    python bench/adapters.py [--quick]

Quantizes and factorizes the model of `tersor demo` (which is trained first where the cache has
none) and compares with the original on held-out text, paired by window. Writes
bench/results/adapters.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import nn

import machine
import tersor
from tersor import demo
from tersor.adapters.codebook import NF4
from tersor.adapters.loftq import LoftQ, loftq_model
from tersor.adapters.nf4_linear import nf4_model
from tersor.calibrate import Calibration, load_tokenizer
from tersor.demo_model import DemoModel, demo_model
from tersor.evaluate import evaluate, quality_cells
from tersor.qweight import QSpec, Scheme
from tersor.surgery.lowrank import factorize_model

RANK = 16  # of the adapters
LOFTQ = {  # in tables: what is made small, and how often the two steps take turns
    "weights": LoftQ(1),
    "weights, 5 times": LoftQ(5),
    "outputs": LoftQ(1, "activation"),
    "outputs, 5 times": LoftQ(5, "activation"),
}


class Bench:
    def __init__(self, source: DemoModel, samples: int, windows: int | None) -> None:
        self.source = source
        text = Calibration((str(source.calibration),), samples=samples, seq_len=demo.WINDOW)
        self.ids = text.windows(load_tokenizer(source.folder))
        self.windows = demo.held_out_windows(source)["code"][:windows]
        self.original = self.load()

    def load(self) -> Any:
        return demo.original(self.source).float()

    def row(self, what: str, model: nn.Module, **numbers: float) -> dict[str, Any]:
        names = {"original": self.original, what: model}
        quality = evaluate(names, self.windows, baseline="original", batch=8)[what]
        cells = quality_cells(quality)
        print(what, *cells[1:3], flush=True)
        return {"model": what, **numbers, "quality": quality.to_dict(), "cells": cells}

    def quantized(self, to: Scheme | NF4, method: str) -> Iterator[dict[str, Any]]:
        name = str(to) if isinstance(to, NF4) else f"INT{to.weight.bits} {method}"
        plain = self.load()
        if isinstance(to, NF4):
            nf4_model(plain, to)
        else:
            tersor.quantize_model(plain, self.ids, scheme=to, method=method)
        yield self.row(name, plain)
        for kind, settings in LOFTQ.items():
            model, _ = loftq_model(
                self.load(),
                LoraConfig(r=RANK),
                to=to,
                method=method,
                calibration=self.ids,
                settings=settings,
            )
            yield self.row(f"{name}, LoftQ of {kind}", model)

    def factorized(self, rank: int) -> Iterator[dict[str, Any]]:
        for kind, calibration in (("weights", None), ("outputs", self.ids)):
            model = self.load()
            report = factorize_model(model, rank=rank, calibration=calibration)
            share = report.parameters_after / report.parameters_before
            yield self.row(f"rank {rank} of {kind}", model, parameters=share)


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table()
    shown.add_column("model")
    for head in ("parameters", "perplexity", "Δ log-perplexity", "KL", "KL 99 %", "top-1"):
        shown.add_column(head, justify="right")
    for row in rows:
        share = f"{100 * row['parameters']:.1f} %" if "parameters" in row else ""
        shown.add_row(row["model"], share, *row["cells"])
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="INT2 and one rank, on little text")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    bench = Bench(demo_model(), 16 if quick else 128, 20 if quick else None)
    rows: list[dict[str, Any]] = []
    for bits in (2,) if quick else (2, 3, 4):
        for method in ("rtn", "gptq"):
            rows += bench.quantized(Scheme(QSpec(bits, 64)), method)
    if not quick:
        rows += bench.quantized(NF4(64), "rtn")
    for rank in (96,) if quick else (128, 96, 64):
        rows += bench.factorized(rank)
    Console(width=160).print(table(rows))
    if not quick:
        for row in rows:
            del row["cells"]
        tokens = bench.windows.numel()
        print(machine.save("adapters", {"tokens": tokens, "rank": RANK, "rows": rows}))


if __name__ == "__main__":
    main()
