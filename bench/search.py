"""What mixed bits are worth on the demo model: searched assignments against one width everywhere.

    python bench/search.py [--quick]

Searches the model of `tersor demo` (which is trained first where the cache has none) over 2, 3, 4,
8 and 16 bits for each linear, in the bytes that 3, 4 and 8 bits everywhere take: by sensitivities
alone, by evolution and by trained logits. Writes the best of each and compares all with the
original on held-out text, paired by window. Writes bench/results/search.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import machine
from tersor import demo
from tersor.calibrate import Calibration
from tersor.demo_model import demo_model
from tersor.evaluate import evaluate, quality_cells
from tersor.loading import load
from tersor.pipeline import compress_checkpoint, quantize_checkpoint
from tersor.progress import Progress
from tersor.qweight import QSpec, Scheme
from tersor.search import Constraint, Differentiable, Effort, Point, Space
from tersor.search import front as fronts
from tersor.search.run import Search

WIDTHS = (2, 3, 4, 8)
BUDGETS = (3, 4, 8)  # widths whose bytes are given to the search; 2 bits leave it nothing to choose


def best(points: list[Point], most: int) -> Point | None:
    """The least KL in at most so many bytes."""
    return min((p for p in points if p.bytes <= most), key=lambda p: p.kl, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few trials, on little text")
    quick = parser.parse_args().quick
    source = demo_model()
    samples, measured = (16, 2) if quick else (128, 8)
    text = Calibration((str(source.calibration),), samples=samples, seq_len=demo.WINDOW)
    effort = Effort(trials=40 if quick else 150, windows=measured)
    trained = Differentiable(steps=5 if quick else 60)
    models = {demo.BASELINE: demo.original(source)}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="search-") as scratch, Progress() as bar:
        home = Path(scratch)
        for bits in WIDTHS:
            name = f"{bits} bits everywhere"
            report = quantize_checkpoint(
                source.folder, home / name, scheme=Scheme(QSpec(bits)), calibration=text
            )
            models[name], sizes[name] = load(home / name), report.bytes_after

        search = Search.open(source.folder, home / "work", text, Space(bits=WIDTHS), effort)
        seconds: dict[str, float] = {}
        found: dict[str, list[Point]] = {}
        for bits in BUDGETS:
            start, search.points = time.perf_counter(), {}
            front = search.find((Constraint("size", sizes[f"{bits} bits everywhere"]),), bar)
            seconds[f"evolution, {bits} bits"] = time.perf_counter() - start
            found[f"{bits} bits"] = list(search.points.values())
        start, search.points, search.differentiable = time.perf_counter(), {}, trained
        search.find((), bar)
        search.close()
        seconds["differentiable, sensitivities known"] = time.perf_counter() - start
        shared = [p for p in search.points.values() if p.origin == "differentiable"]

        by_origin: list[dict[str, Any]] = []
        every = [*shared, *(point for points in found.values() for point in points)]
        for bits in BUDGETS:
            most = sizes[f"{bits} bits everywhere"]
            points = [*found[f"{bits} bits"], *shared]
            for origin in ("uniform", "additive", effort.sampler, "differentiable"):
                point = best([p for p in points if p.origin == origin], most)
                record = {"bytes": point.bytes, "kl": point.kl} if point else None
                by_origin.append({"budget": f"{bits} bits", "origin": origin, "best": record})
            chosen = best(every, most)
            assert chosen is not None  # the uniform one is among them
            name = f"searched, in the bytes of {bits} bits"
            treatments = {n: each.treatment for n, each in front.assignment(chosen).items()}
            report = compress_checkpoint(
                source.folder, home / name, treatments=treatments, calibration=text
            )
            models[name], sizes[name] = load(home / name), report.bytes_after
        front.constraints = []  # which differed from budget to budget
        front.points = fronts.non_dominated(replace(point, feasible=True) for point in every)
        texts = demo.held_out_windows(source)
        if quick:
            texts = {"code": texts["code"][:20]}
        qualities = {
            kind: evaluate(models, windows, baseline=demo.BASELINE, batch=8)
            for kind, windows in texts.items()
        }
    console = Console(width=160)
    for kind, quality in qualities.items():
        shown = Table(title=f"held-out {kind}")
        for head in ("model", "MB", "perplexity", "Δ log-perplexity", "KL", "KL 99 %", "top-1"):
            shown.add_column(head)
        for name, size in sizes.items():
            shown.add_row(name, f"{size / 1e6:.2f}", *quality_cells(quality[name]))
        console.print(shown)
    console.print(fronts.table(front))
    for row in by_origin:
        print(row)
    if not quick:
        content = {
            "tokens": {kind: windows.numel() for kind, windows in texts.items()},
            "seconds": {name: round(each, 1) for name, each in seconds.items()},
            "trials": effort.trials,
            "rows": [
                {
                    "model": name,
                    "bytes": size,
                    "quality": {kind: each[name].to_dict() for kind, each in qualities.items()},
                }
                for name, size in sizes.items()
            ],
            "best_by_origin": by_origin,
            "front": [asdict(point) for point in front.points],
            "candidates": [each.to_dict() for each in front.candidates],
        }
        print(machine.save("search", content))


if __name__ == "__main__":
    main()
