"""Quantization-aware training against GPTQ alone, at 2 to 4 bits, and together with 2:4 masks.

    python bench/qat.py [--quick]

Trains the model of `tersor demo` (which is itself trained first where the cache has none) for a
grid, with the original as teacher, on the text that it was trained on, and compares with the
original on held-out text, paired by window. All trainings see the same batches. With 2:4 zeros,
one training for masks and grid is held against one as long for the masks alone and GPTQ after it.
Writes bench/results/qat.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, PrinterCallback, TrainingArguments

import machine
import tersor
from tersor import GPTQ, HoldZeros, QSpec, QuantLinear, Scheme, SparseGPT, Sparsity, demo
from tersor.calibrate import Calibration, load_tokenizer
from tersor.demo_model import DemoModel, demo_model
from tersor.evaluate import evaluate, quality_cells, text_windows
from tersor.qweight import QWeight
from tersor.solvers import RTN
from tersor.training import Distillation
from tersor.training.qat import QuantizationTraining
from tersor.training.trainer import DistillTrainer

GROUP = 64
RATES = {2: 6e-4, 3: 2e-4, 4: 1e-4}  # peak learning rates, by bits
SPARSE = 3e-4  # of all trainings with 2:4 zeros
STEPS, BATCH, LENGTH = 100, 4, 128
PATTERN = Sparsity(pattern=(2, 4))


class Bench:
    """One original, its texts, and the table of what was made of it."""

    def __init__(self, source: DemoModel, quick: bool) -> None:
        self.source, self.steps = source, 8 if quick else STEPS
        tokenizer = load_tokenizer(source.folder)
        text = Calibration(
            (str(source.calibration),), samples=16 if quick else demo.SAMPLES, seq_len=demo.WINDOW
        )
        self.calibration = text.windows(tokenizer)
        self.held_out = demo.held_out_windows(source)["code"][: 8 if quick else 64]
        windows = text_windows(source.calibration.read_text(), tokenizer, LENGTH)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
        self.rows = [{"input_ids": ids, "labels": ids} for ids in windows[order]]
        self.teacher = self.original()
        self.results: list[dict[str, Any]] = []

    def original(self) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(self.source.folder, dtype=torch.float32)
        return model.eval()

    def train(self, model: nn.Module, rate: float, callbacks: list[Any]) -> None:
        with tempfile.TemporaryDirectory(prefix="qat-") as folder:
            settings = TrainingArguments(
                folder,
                max_steps=self.steps,
                per_device_train_batch_size=BATCH,
                learning_rate=rate,
                warmup_steps=self.steps // 10,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            )
            trainer = DistillTrainer(
                model,
                self.teacher,
                Distillation(alpha=1.0, temperature=1.0),
                args=settings,
                train_dataset=self.rows,
                callbacks=callbacks,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()

    def solve(self, model: nn.Module, scheme: Scheme, method: GPTQ | RTN) -> dict[str, QWeight]:
        tersor.quantize_model(model, self.calibration, scheme=scheme, method=method)
        return {
            name: m.qweight() for name, m in model.named_modules() if isinstance(m, QuantLinear)
        }

    def add(self, scheme: str, name: str, model: nn.Module, seconds: float, **more: Any) -> None:
        models = {"original": self.teacher, "made": model.eval()}
        quality = evaluate(models, self.held_out, baseline="original", batch=8)["made"]
        row = {"scheme": scheme, "method": name, "seconds": round(seconds, 1), **more}
        self.results.append(row | {"quality": quality.to_dict(), "cells": quality_cells(quality)})
        print(scheme, name, f"{seconds:.0f} s", *quality_cells(quality)[1:3], flush=True)

    def bits(self, bits: int) -> None:
        """One width: rounding, GPTQ, and trainings from both."""
        scheme = Scheme(QSpec(bits, GROUP))
        label = f"INT{bits} g{GROUP}"
        solution: dict[str, QWeight] = {}
        took = 0.0
        for name, method in (("rtn", RTN(clip=True)), ("gptq", GPTQ())):
            model = self.original()
            begin = time.perf_counter()
            solution = self.solve(model, scheme, method)
            took = time.perf_counter() - begin
            self.add(label, name, model, took)
        rate = RATES[bits]
        cases: dict[str, dict[str, Any]] = {
            "qat from rtn": {},
            "qat from gptq": {"start": solution},
            "qat from gptq, scales fixed": {"start": solution, "scales": "fixed"},
        }
        for name, settings in cases.items():
            model = self.original()
            begin = time.perf_counter()
            self.train(model, rate, [QuantizationTraining(scheme, **settings)])
            seconds = time.perf_counter() - begin + (took if "start" in settings else 0)
            self.add(label, name, model, seconds, rate=rate)

    def sparse(self, widths: tuple[int, ...]) -> None:
        """2:4 and a grid: one training for both, or the masks first and GPTQ after."""
        model = self.original()
        begin = time.perf_counter()
        tersor.prune_model(model, self.calibration, method=SparseGPT(PATTERN))
        took = time.perf_counter() - begin
        pruned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.add("2:4", "sparsegpt", model, took)
        begin = time.perf_counter()
        self.train(model, SPARSE, [HoldZeros()])
        tuned = took + time.perf_counter() - begin
        held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.add("2:4", "zeros held in training", model, tuned, rate=SPARSE)
        for bits in widths:
            scheme, label = Scheme(QSpec(bits, GROUP)), f"2:4 INT{bits} g{GROUP}"
            for name, weights, before in (
                ("sparsegpt, then gptq", pruned, took),
                ("zeros held in training, then gptq", held, tuned),
            ):
                model = self.original()
                model.load_state_dict(weights)
                begin = time.perf_counter()
                self.solve(model, scheme, GPTQ())
                self.add(label, name, model, before + time.perf_counter() - begin)
            model = self.original()
            model.load_state_dict(pruned)
            begin = time.perf_counter()
            masks = HoldZeros().attach(model)
            training = QuantizationTraining(scheme, start=GPTQ()).attach(model, self.calibration)
            self.train(model, SPARSE, [masks, training])
            seconds = took + time.perf_counter() - begin
            self.add(label, "zeros held and qat in one", model, seconds, rate=SPARSE)


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("scheme", "method")
    for head in ("rate", "seconds", "perplexity", "Δ log-perplexity", "KL", "KL 99 %", "top-1"):
        shown.add_column(head, justify="right")
    for row in rows:
        rate = f"{row['rate']:g}" if "rate" in row else ""
        shown.add_row(row["scheme"], row["method"], rate, f"{row['seconds']:.0f}", *row["cells"])
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps on little text; not saved")
    quick = parser.parse_args().quick
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bench = Bench(demo_model(), quick)
    for bits in (2,) if quick else (2, 3, 4):
        bench.bits(bits)
    bench.sparse((4,) if quick else (4, 2))
    Console(width=160).print(table(bench.results))
    if not quick:
        for row in bench.results:
            del row["cells"]
        settings = {"steps": STEPS, "batch": BATCH, "length": LENGTH, "group": GROUP}
        tokens = bench.held_out.numel()
        content = {"settings": settings, "tokens": tokens, "rows": bench.results}
        print(machine.save("qat", content))


if __name__ == "__main__":
    main()
