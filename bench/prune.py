"""What pruning costs the demo model: by method and sparsity, alone and with INT4 in one pass.

    python bench/prune.py [--quick]

Prunes the model of `tersor demo` (which is trained first where the cache has none) and compares
with the original on held-out text, paired by window. Writes bench/results/prune.json.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

import machine
from tersor import demo
from tersor.calibrate import Calibration
from tersor.demo_model import DemoModel, demo_model
from tersor.evaluate import evaluate, quality_cells
from tersor.layerwise import Solver
from tersor.loading import load
from tersor.pipeline import prune_checkpoint, quantize_checkpoint
from tersor.qweight import QSpec, Scheme
from tersor.report import Report
from tersor.solvers import RTN, Magnitude, SparseGPT, Wanda
from tersor.sparsity import Sparsity

SPARSITIES = [Sparsity(0.5), Sparsity(pattern=(4, 8)), Sparsity(pattern=(2, 4)), Sparsity(0.7)]
INT4 = Scheme(QSpec(4))


def methods(sparsity: Sparsity) -> dict[str, Solver]:
    return {
        "magnitude": Magnitude(sparsity),
        "wanda": Wanda(sparsity),
        "sparsegpt": SparseGPT(sparsity),
        "magnitude + refit": Magnitude(sparsity, refit=True),
        "wanda + refit": Wanda(sparsity, refit=True),
        "sparsegpt + refit": SparseGPT(sparsity, refit=True),
    }


class Bench:
    """One original, and what was made of it, in a folder for the files in between."""

    def __init__(self, source: DemoModel, folder: Path, samples: int, windows: int | None) -> None:
        self.source, self.folder = source, folder
        self.text = Calibration((str(source.calibration),), samples=samples, seq_len=demo.WINDOW)
        self.windows = demo.held_out_windows(source)["code"][:windows]
        self.original = demo.original(source)
        self.rows: list[dict[str, Any]] = []

    def prune(self, sparsity: Sparsity, name: str, method: Solver, scheme: Scheme | None) -> Path:
        out = self.folder / f"{sparsity}-{name}-{scheme}".replace(" ", "")
        report = prune_checkpoint(
            self.source.folder, out, method=method, scheme=scheme, calibration=self.text
        )
        self.add(sparsity, name if scheme is None else f"{name}, INT4 in one pass", out, report)
        return out

    def add(self, sparsity: Sparsity, name: str, out: Path, report: Report) -> None:
        model = load(out) if "quantization_config" in (out / "config.json").read_text() else None
        model = model or demo.original(DemoModel(**(vars(self.source) | {"folder": out})))
        names = {"original": self.original, name: model}
        quality = evaluate(names, self.windows, baseline="original", batch=8)[name]
        self.rows.append(
            {
                "sparsity": str(sparsity),
                "method": name,
                "zeros": report.sparsity,
                "layer_error": median(layer.error for layer in report.layers),
                "quality": quality.to_dict(),
                "cells": quality_cells(quality),
            }
        )
        print(self.rows[-1]["sparsity"], name, *self.rows[-1]["cells"][1:3], flush=True)


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table()
    for head in ("sparsity", "method", "zeros", "layer error"):
        shown.add_column(head)
    for head in ("perplexity", "Δ log-perplexity", "KL", "KL 99 %", "top-1", "flips"):
        shown.add_column(head, justify="right")
    for row in rows:
        numbers = f"{100 * row['zeros']:.1f} %", f"{row['layer_error']:.4f}"
        shown.add_row(row["sparsity"], row["method"], *numbers, *row["cells"])
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2:4 alone, on little text")
    quick = parser.parse_args().quick
    source = demo_model()
    with tempfile.TemporaryDirectory(prefix="prune-") as folder:
        bench = Bench(source, Path(folder), 16 if quick else 128, 20 if quick else None)
        for sparsity in SPARSITIES[2:3] if quick else SPARSITIES:
            pruned = {
                name: bench.prune(sparsity, name, method, None)
                for name, method in methods(sparsity).items()
            }
            out = bench.folder / f"{sparsity}-rounded".replace(" ", "")
            report = quantize_checkpoint(
                pruned["sparsegpt"], out, scheme=INT4, method=RTN(), calibration=bench.text
            )
            bench.add(sparsity, "sparsegpt, then INT4 to nearest", out, report)
            for name in ("sparsegpt", "sparsegpt + refit"):
                bench.prune(sparsity, name, methods(sparsity)[name], INT4)
        Console(width=160).print(table(bench.rows))
        if not quick:
            for row in bench.rows:
                del row["cells"]
            tokens = bench.windows.numel()
            print(machine.save("prune", {"tokens": tokens, "rows": bench.rows}))


if __name__ == "__main__":
    main()
