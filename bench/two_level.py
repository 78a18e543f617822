"""What the two-level grid costs the demo model, against scales that are free: INT4 weights by
rounding to nearest and by GPTQ, in groups of 64 and 128, with 16-bit and with int8 activations.

    python bench/two_level.py [--quick]

Quantizes the model of `tersor demo` (which is trained first where the cache has none) and compares
with the original on two held-out texts, paired by window. Writes bench/results/two_level.json.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

import machine
from tersor import GPTQ, ActSpec, QSpec, Scheme, demo
from tersor.calibrate import Calibration
from tersor.demo_model import DemoModel, demo_model
from tersor.evaluate import evaluate, quality_cells
from tersor.layerwise import Solver
from tersor.loading import load
from tersor.pipeline import quantize_checkpoint
from tersor.solvers import RTN

GROUPS = (64, 128)
TEXTS = ("code", "prose")


def methods() -> dict[str, tuple[Solver, Solver]]:
    """By name: on free scales, and on two levels."""
    return {
        "rtn, clipped": (RTN(clip=True), RTN(clip=True, two_level=True)),
        "gptq": (GPTQ(), GPTQ(two_level=True)),
    }


def measure(source: DemoModel, quick: bool) -> list[dict[str, Any]]:
    text = Calibration(
        (str(source.calibration),), samples=16 if quick else demo.SAMPLES, seq_len=demo.WINDOW
    )
    held_out = {
        name: windows[: 8 if quick else None]
        for name, windows in demo.held_out_windows(source).items()
    }
    original, rows = demo.original(source), []
    activations = (None, ActSpec())
    with tempfile.TemporaryDirectory(prefix="two-level-") as folder:
        for group, activation, (name, pair) in itertools.product(
            GROUPS[1:] if quick else GROUPS, activations, methods().items()
        ):
            scheme = Scheme(QSpec(4, group), activation)
            for scales, solver in zip(("free", "two-level"), pair, strict=True):
                out = Path(folder) / str(len(rows))
                report = quantize_checkpoint(
                    source.folder, out, scheme=scheme, method=solver, calibration=text
                )
                model = load(out)
                row: dict[str, Any] = {
                    "scheme": str(scheme), "group": group, "method": name, "scales": scales,
                    "layer_error": median(layer.error for layer in report.layers),
                }  # fmt: skip
                for held in TEXTS:
                    models = {"original": original, "it": model}
                    quality = evaluate(models, held_out[held], baseline="original", batch=8)["it"]
                    row[held] = quality.to_dict()
                    row[f"{held} cells"] = quality_cells(quality)
                rows.append(row)
                print(*list(row.values())[:5], *row["code cells"][1:3], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table()
    for head in ("scheme", "group", "method", "scales", "layer error"):
        shown.add_column(head)
    for held in TEXTS:
        shown.add_column(f"Δ log-perplexity, {held}", justify="right")
        shown.add_column("KL", justify="right")
    for row in rows:
        settings = row["scheme"], str(row["group"]), row["method"], row["scales"]
        cells = [cell for held in TEXTS for cell in row[f"{held} cells"][1:3]]
        shown.add_row(*settings, f"{row['layer_error']:.4f}", *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="groups of 128, on little text")
    quick = parser.parse_args().quick
    source = demo_model()
    rows = measure(source, quick)
    Console(width=160).print(table(rows))
    if not quick:
        for row in rows:
            for held in TEXTS:
                del row[f"{held} cells"]
        print(machine.save("two_level", {"rows": rows}))


if __name__ == "__main__":
    main()
