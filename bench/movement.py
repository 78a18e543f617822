"""Pruning while fine-tuning: movement against magnitude at 85 % sparsity, by seed.

    python bench/movement.py [--quick]

Fine-tunes the first blocks of the demo model (which is trained first where the cache has none) to
name the kind of every token of Python source, and prunes their linears on the way: all methods over
the same steps, batches and schedule, at every learning rate, by three seeds. Once all weights are
trained; once they are frozen, and only the new head and the masks learn. Movement needs rates at
which weights stay near where they were, as in fine-tuning a large model; magnitude wins where they
move as far as they are large, which on a model as small as this is where both are at their best.
Writes bench/results/movement.json.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import machine
from tersor import Schedule, Sparsity
from tersor.demo_model import DemoModel, demo_model
from tersor.demo_task import Excerpts, accuracy, batches, classifier, excerpts
from tersor.pruning import Criterion, Magnitude, Movement
from tersor.training.masking import MaskTraining

SPARSITY = Sparsity(0.85)
STEPS, SCHEDULE = 120, Schedule(warmup=12, ramp=36, hold=48, cooldown=24)
LAYERS, SIZE, LENGTH = 2, 16, 48
RATES, FROZEN_RATES = (1e-4, 3e-4, 1e-3, 3e-3), (3e-3, 1e-2)
SEEDS = (0, 1, 2)
CASES: list[tuple[str, bool, Criterion | None]] = [  # name, is all but the head frozen, method
    ("dense", False, None),
    ("magnitude", False, Magnitude()),
    ("movement", False, Movement()),
    ("magnitude", True, Magnitude()),
    ("movement", True, Movement()),
]


@dataclass(frozen=True)
class Task:
    source: DemoModel
    train: Excerpts
    held_out: Excerpts


def fine_tune(
    task: Task, frozen: bool, method: Criterion | None, rate: float, seed: int
) -> dict[str, Any]:
    """One training: accuracy on held-out text, share of zeros, seconds."""
    start = time.perf_counter()
    model = classifier(task.source, seed, LAYERS).train()
    masks = None
    if method is not None:
        masks = MaskTraining(SPARSITY, SCHEDULE, method).attach(model)
    if frozen:
        model.model.requires_grad_(False)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, rate, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 10, 1 - step / STEPS)
    )
    for batch in batches(task.train, STEPS, SIZE, seed):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        if masks is not None:
            masks.step()
    zeros = masks.finish().sparsity if masks is not None else 0.0
    return {
        "rate": rate,
        "seed": seed,
        "accuracy": accuracy(model, task.held_out),
        "zeros": zeros,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one rate, one seed; nothing saved")
    quick = parser.parse_args().quick
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source = demo_model()
    train, held_out = excerpts(source, LENGTH)
    task = Task(source, train, Excerpts(held_out.ids[:600], held_out.labels[:600]))
    shown = Table("method", "weights", "rate", "zeros", *(f"seed {seed}" for seed in SEEDS), "mean")
    results: list[dict[str, Any]] = []
    for name, frozen, method in CASES:
        weights = "frozen" if frozen else "trained"
        for rate in (FROZEN_RATES if frozen else RATES)[: 1 if quick else None]:
            seeds = SEEDS[: 1 if quick else None]
            runs = [fine_tune(task, frozen, method, rate, seed) for seed in seeds]
            results.append({"method": name, "weights": weights, "rate": rate, "runs": runs})
            numbers = [run["accuracy"] for run in runs]
            zeros = f"{100 * mean(run['zeros'] for run in runs):.1f} %"
            cells = [f"{100 * number:.2f} %" for number in numbers]
            cells += [""] * (len(SEEDS) - len(cells))
            cells += [f"{100 * mean(numbers):.2f} %"]
            shown.add_row(name, weights, f"{rate:g}", zeros, *cells)
            print(name, weights, f"{rate:g}", zeros, *cells, flush=True)
    Console(width=120).print(shown)
    if not quick:
        settings = {"steps": STEPS, "layers": LAYERS, "batch": SIZE, "length": LENGTH}
        print(machine.save("movement", {"settings": settings, "rows": results}))


if __name__ == "__main__":
    main()
