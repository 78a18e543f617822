"""What structured pruning costs a small trained model, what it gains, and what a short fine-tune
brings back.

    python bench/structured.py [--quick]

The model is one of the demo's kind with 10 query heads on 5 of keys and values, so that 20 % of its
heads can go, and 8 blocks; it is trained first where the cache has none (some minutes). Every row
is against that model on held-out text, paired by window. Writes bench/results/structured.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

import machine
from tersor import demo
from tersor.calibrate import Calibration, load_tokenizer
from tersor.demo_model import DemoModel, Recipe, demo_model, split_documents
from tersor.demo_training import Training, fine_tune, save_model
from tersor.evaluate import evaluate, measure_speed, quality_cells
from tersor.surgery.shrink import shrink_checkpoint

RECIPE = Recipe(
    training=Training(
        hidden=320, intermediate=768, layers=8, heads=10, key_value_heads=5, seconds=3600.0
    )
)
TUNING = replace(RECIPE.training, steps=90, warmup=5, muon=0.004, adamw=0.0015, seed=1)
CUT: dict[str, Any] = {"heads": 0.2, "ffn": 0.25, "layers": 2, "multiple": 64}
SHOWN = "output, least-squares"
WAYS: dict[str, dict[str, Any]] = {  # what is cut is CUT, unless it is said
    SHOWN: {},
    "output, none": {"update": "none"},
    "magnitude, least-squares": {"importance": "magnitude"},
    "magnitude, none": {"importance": "magnitude", "update": "none"},
    "activation, least-squares": {"importance": "activation"},
    "activation, none": {"importance": "activation", "update": "none"},
    "taylor, least-squares": {"importance": "taylor"},
    "taylor, none": {"importance": "taylor", "update": "none"},
    "heads by entropy, least-squares": {"head_importance": "entropy"},
    "heads by entropy, none": {"head_importance": "entropy", "update": "none"},
    "layers by angle, least-squares": {"layer_importance": "angular"},
    "layers together, least-squares": {"layer_importance": "contiguous"},
    "heads alone": {"ffn": 0.0, "layers": 0},
    "half of the query heads alone": {"heads": 0.0, "query_heads": 0.5, "ffn": 0.0, "layers": 0},
    "ffn alone": {"heads": 0.0, "layers": 0},
    "layers alone": {"heads": 0.0, "ffn": 0.0},
}
BIASED = {  # of the same model with biases of zero, which make room for what bias adds
    "output, bias": {"update": "bias"},
    "fluctuation, bias": {"importance": "fluctuation", "update": "bias"},
    "output, none, with biases": {"update": "none"},
}


class Bench:
    """One original, and what was made of it, in a folder for the files in between."""

    def __init__(self, folder: Path, samples: int, windows: int | None) -> None:
        self.source, self.folder = demo_model(RECIPE), folder
        self.text = Calibration(
            (str(self.source.calibration),), samples=samples, seq_len=demo.WINDOW
        )
        self.windows = demo.held_out_windows(self.source)["code"][:windows]
        self.original = demo.original(self.source)
        self.folders = {"original": self.source.folder}
        self.rows: dict[str, dict[str, Any]] = {"original": {}}

    def shrink(self, name: str, model: Path, settings: dict[str, Any]) -> None:
        out = self.new(name)
        report = shrink_checkpoint(model, out, calibration=self.text, **(CUT | settings))
        assert report.structure is not None
        self.rows[name] = {"dropped": report.structure["dropped"]}
        print(f"{name}: {report.structure['parameters_after']} parameters", flush=True)

    def new(self, name: str) -> Path:
        self.folders[name] = self.folder / name.replace(" ", "-").replace(",", "")
        return self.folders[name]

    def measure(self) -> None:
        """All models that were not measured yet, as plain transformers opens them, in one pass."""
        names = [name for name in self.folders if "quality" not in self.rows.get(name, {})]
        models = {name: self.open(self.folders[name]) for name in names} | {
            "original": self.original
        }
        found = evaluate(models, self.windows, baseline="original", batch=8)
        for name in names:
            files = self.folders[name].glob("*.safetensors")
            self.rows[name] = self.rows.get(name, {}) | {
                "parameters": models[name].num_parameters(),
                "bytes": sum(path.stat().st_size for path in files),
                "quality": found[name].to_dict(),
                "cells": quality_cells(found[name]),
            }

    def open(self, folder: Path) -> Any:
        return demo.original(DemoModel(**(vars(self.source) | {"folder": folder})))

    def with_biases(self) -> Path:
        """The original as a model of the same class that has biases, all zero."""
        out = self.folder / "original-with-biases"
        config = AutoConfig.from_pretrained(self.source.folder, attention_bias=True, mlp_bias=True)
        model = AutoModelForCausalLM.from_config(config).to(self.original.dtype)
        model.load_state_dict(self.original.state_dict(), strict=False)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith(".bias"):
                    parameter.zero_()
        model.save_pretrained(out)
        load_tokenizer(self.source.folder).save_pretrained(out)
        return out

    def tune(self, name: str, steps: int) -> dict[str, Any]:
        """A short fine-tune on the training text, of which the model may have seen a part alone."""
        tokenizer = load_tokenizer(self.folders[name])
        model = self.open(self.folders[name]).float()
        _, texts = split_documents(RECIPE)
        record = fine_tune(model, tokenizer, texts, replace(TUNING, steps=steps))
        save_model(model, tokenizer, self.new(f"{name}, tuned"))
        return record

    def delta(self, name: str) -> float:
        return float(self.rows[name]["quality"]["delta"]["mean"])


def table(rows: dict[str, dict[str, Any]]) -> Table:
    shown = Table()
    for head in ("model", "million parameters", "MB"):
        shown.add_column(head)
    for head in ("perplexity", "Δ log-perplexity", "KL", "KL 99 %", "top-1", "flips"):
        shown.add_column(head, justify="right")
    for name, row in rows.items():
        sizes = f"{row['parameters'] / 1e6:.2f}", f"{row['bytes'] / 1e6:.1f}"
        shown.add_row(name, *sizes, *row["cells"])
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="on little text, with fewer steps")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory(prefix="structured-") as folder:
        bench = Bench(Path(folder), 16 if quick else 128, 20 if quick else None)
        biased = bench.with_biases()
        for name, how in WAYS.items():
            bench.shrink(name, bench.source.folder, how)
        for name, how in BIASED.items():
            bench.shrink(name, biased, how)
        models = {"original": bench.original, SHOWN: bench.open(bench.folders[SHOWN])}
        speed = measure_speed(models, bench.windows[:1], runs=2 if quick else 9)
        steps = 20 if quick else TUNING.steps
        record = bench.tune(SHOWN, steps)
        bench.tune("original", steps)  # what the fine-tune does by itself
        bench.measure()
        lost, left = bench.delta(SHOWN), bench.delta(f"{SHOWN}, tuned")
        gain = bench.delta("original, tuned")
        recovery = {
            "lost": lost,
            "left": left,
            "recovered": (lost - left) / lost,
            "recovered_against_the_original_tuned_too": (lost - (left - gain)) / lost,
        }
        Console(width=160).print(table(bench.rows))
        for name, taken in speed.items():
            print(f"{name}: prefill {taken.prefill:.0f}, decode {taken.decode:.1f} tokens/s")
        print(json.dumps(recovery, indent=1))
        if not quick:
            for row in bench.rows.values():
                del row["cells"]
            content = {
                "recipe": asdict(RECIPE),
                "training": bench.source.record,
                "cut": CUT,
                "tokens": bench.windows.numel(),
                "threads": torch.get_num_threads(),
                "rows": bench.rows,
                "speed": {name: asdict(taken) for name, taken in speed.items()},
                "tuning": asdict(TUNING),
                "tuning_record": record,
                "recovery": recovery,
            }
            print(machine.save("structured", content))


if __name__ == "__main__":
    main()
