"""What distillation gains: over cross-entropy alone, after 2:4 pruning, and in memory.

    python bench/distill.py [--quick]

Students are three of the six blocks of the demo model (which is trained first where the cache has
none). Each is trained on the same rows, steps, batches and schedule with cross-entropy alone, or
with distillation, at every learning rate, by three seeds. What counts is log-perplexity on
held-out text: a gain is certain where it is more than two standard deviations of the difference
over the seeds.

Then the demo model with 2:4 zeros (Wanda) is trained with HoldZeros, with cross-entropy alone and
with the dense model as its teacher: what part of the loss by pruning comes back.

Last the memory of the loss in pieces against the plain one, with a vocabulary of 128 k, each in a
process of its own. Writes bench/results/distill.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

import machine
from tersor import HoldZeros, Sparsity, Wanda, prune_model, student_of
from tersor.calibrate import Calibration, load_tokenizer
from tersor.demo_model import demo_model
from tersor.evaluate import evaluate, text_windows
from tersor.training import Distillation, Head, distill, token_losses
from tersor.training.trainer import DistillTrainer

LAYERS, STEPS, SIZE, LENGTH, WARMUP = 3, 32, 8, 128, 4
RATES, SEEDS = (5e-4, 2e-3), (0, 1, 2)
HELD_OUT = 64  # windows of each text
METHODS: dict[str, Distillation | None] = {  # None: cross-entropy alone
    "cross-entropy": None,
    "forward KL and cross-entropy": Distillation("forward_kl", alpha=0.5),
    "forward KL": Distillation("forward_kl", alpha=1.0),
}
RECOVERY_STEPS, RECOVERY_RATE = 32, 5e-4
TOKENS, HIDDEN, VOCABULARY = 512, 256, 131072  # of the measurement of memory


@dataclass(frozen=True)
class Texts:
    rows: list[dict[str, Tensor]]
    held_out: dict[str, Tensor]


def train(
    student: Any,
    teacher: Any,
    texts: Texts,
    how: Distillation | None,
    rate: float,
    seed: int,
    steps: int,
    callbacks: list[Any] | None = None,
) -> dict[str, Any]:
    """One training: log-perplexity on each held-out text, seconds."""
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {
            "args": TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=SIZE,
                learning_rate=rate,
                warmup_steps=WARMUP,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                seed=seed,
            ),
            "train_dataset": texts.rows,
            "callbacks": callbacks,
        }
        start = time.perf_counter()
        if how is None:
            trainer = Trainer(student, **given)
        else:
            trainer = DistillTrainer(student, teacher, how, **given)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        seconds = time.perf_counter() - start
    found = measured(student, texts)
    return {"rate": rate, "seed": seed, **found, "seconds": round(seconds, 1)}


def measured(model: Any, texts: Texts) -> dict[str, float]:
    model.eval()
    return {
        name: evaluate({"it": model}, windows, batch=8)["it"].nll.mean
        for name, windows in texts.held_out.items()
    }


def gain(rows: list[dict[str, Any]], name: str, text: str) -> dict[str, Any]:
    """A method at its best rate against cross-entropy at its best, seed by seed."""

    def best(method: str) -> list[float]:
        runs = [[run[text] for run in row["runs"]] for row in rows if row["method"] == method]
        return min(runs, key=mean)

    pairs = zip(best("cross-entropy"), best(name), strict=True)
    gains = [plain - distilled for plain, distilled in pairs]
    deviation = stdev(gains) if len(gains) > 1 else float("nan")
    certain = len(gains) > 1 and mean(gains) > 2 * deviation
    return {"mean": mean(gains), "deviation": deviation, "beyond_two_deviations": certain}


def compare(teacher: Any, texts: Texts, quick: bool) -> dict[str, Any]:
    rows = []
    for name, how in METHODS.items():
        for rate in RATES[: 1 if quick else None]:
            seeds = SEEDS[: 1 if quick else None]
            steps = 4 if quick else STEPS
            runs = [
                train(student_of(teacher, LAYERS), teacher, texts, how, rate, seed, steps)
                for seed in seeds
            ]
            rows.append({"method": name, "rate": rate, "runs": runs})
            print(name, f"{rate:g}", *(f"{run['code']:.4f}" for run in runs), flush=True)
    gains = {
        name: {text: gain(rows, name, text) for text in texts.held_out}
        for name in METHODS
        if name != "cross-entropy"
    }
    return {"untrained": measured(student_of(teacher, LAYERS), texts), "rows": rows, "gains": gains}


def recover(folder: Any, teacher: Any, texts: Texts, calibration: Tensor, quick: bool) -> Any:
    """What part of the loss by 2:4 zeros training with those zeros gets back, by seed."""
    dense, rows = measured(teacher, texts), []
    steps = 4 if quick else RECOVERY_STEPS
    solver = Wanda(Sparsity(pattern=(2, 4)))
    for name in ("cross-entropy", "forward KL"):
        runs = []
        for seed in SEEDS[: 1 if quick else None]:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            prune_model(model, calibration, method=solver)
            pruned = measured(model, texts)
            how, held = METHODS[name], [HoldZeros()]
            run = train(model, teacher, texts, how, RECOVERY_RATE, seed, steps, held)
            run["pruned"] = pruned
            run["recovered"] = {
                text: (pruned[text] - run[text]) / (pruned[text] - dense[text])
                for text in texts.held_out
            }
            runs.append(run)
        rows.append({"method": name, "runs": runs})
        shares = [f"{100 * run['recovered']['code']:.0f} %" for run in runs]
        print("2:4, of the loss recovered:", name, *shares, flush=True)
    return {"dense": dense, "rows": rows}


def peak() -> int:
    """The most bytes that this process has held, as Linux counts it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(found) * 1024


def loss_memory(kind: str, vocabulary: int) -> None:
    """Prints what a loss and its gradients add to the most memory that the process has had."""
    draw = torch.Generator().manual_seed(0)
    heads = []
    for _ in range(2):
        hidden = torch.randn(TOKENS, HIDDEN, generator=draw)
        weight = torch.randn(vocabulary, HIDDEN, generator=draw) / HIDDEN**0.5
        heads.append((hidden.requires_grad_(), weight.requires_grad_()))
    for tensor in heads[0]:
        tensor.grad = torch.zeros_like(tensor)
    labels = torch.randint(0, vocabulary, (TOKENS,), generator=draw)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    start = time.perf_counter()
    (hidden, weight), (of_teacher, teacher_weight) = heads
    if kind == "pieces":
        loss = distill(
            Head(hidden, weight), Head(of_teacher, teacher_weight), Distillation(), labels
        ).loss
    else:
        with torch.no_grad():
            target = of_teacher @ teacher_weight.T
        logits = hidden @ weight.T
        losses = token_losses("forward_kl", logits, target)
        loss = 0.5 * losses.mean() + 0.5 * torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    seconds = time.perf_counter() - start
    found = {"bytes": peak() - before, "seconds": round(seconds, 2), "loss": float(loss.detach())}
    print(json.dumps(found))


def memory(quick: bool) -> dict[str, Any]:
    vocabulary = VOCABULARY // 16 if quick else VOCABULARY
    found = {}
    for kind in ("plain", "pieces"):
        command = [sys.executable, __file__, "--loss", kind, "--vocabulary", str(vocabulary)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[kind] = json.loads(text)
        print("memory", kind, f"{found[kind]['bytes'] / 1e6:.0f} MB", found[kind], flush=True)
    return {"tokens": TOKENS, "hidden": HIDDEN, "vocabulary": vocabulary, **found}


def show(content: dict[str, Any]) -> None:
    seeds = [f"seed {seed}" for seed in SEEDS]
    shown = Table("method", "rate", *seeds, "mean", "seconds", title="log-perplexity, code")
    for row in content["gain"]["rows"]:
        numbers = [run["code"] for run in row["runs"]]
        cells = [f"{number:.4f}" for number in numbers] + [""] * (len(SEEDS) - len(numbers))
        seconds = mean(run["seconds"] for run in row["runs"])
        shown.add_row(
            row["method"], f"{row['rate']:g}", *cells, f"{mean(numbers):.4f}", f"{seconds:.1f}"
        )
    Console(width=120).print(shown)
    for name, texts in content["gain"]["gains"].items():
        for text, found in texts.items():
            sure = "beyond" if found["beyond_two_deviations"] else "within"
            print(f"{name}, {text}: {found['mean']:+.4f} ± {found['deviation']:.4f}, {sure} two")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, one seed; nothing saved")
    parser.add_argument("--loss", choices=("plain", "pieces"), help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loss:
        loss_memory(given.loss, given.vocabulary)
        return
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    source = demo_model()
    tokenizer = load_tokenizer(source.folder)
    teacher = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    windows = text_windows(source.calibration.read_text(), tokenizer, LENGTH)
    held_out = {
        name: text_windows(path.read_text(), tokenizer, LENGTH)[: 4 if given.quick else HELD_OUT]
        for name, path in source.held_out.items()
    }
    texts = Texts([{"input_ids": row, "labels": row} for row in windows], held_out)
    calibration = Calibration((str(source.calibration),), samples=16, seq_len=LENGTH)
    content = {
        "settings": {
            "layers": LAYERS,
            "steps": STEPS,
            "batch": SIZE,
            "length": LENGTH,
            "recovery_steps": RECOVERY_STEPS,
            "recovery_rate": RECOVERY_RATE,
        },
        "teacher": measured(teacher, texts),
        "gain": compare(teacher, texts, given.quick),
        "recovery": recover(
            source.folder, teacher, texts, calibration.windows(tokenizer), given.quick
        ),
        "memory": memory(given.quick),
    }
    content["seconds"] = round(time.perf_counter() - start, 1)
    show(content)
    if not given.quick:
        print(machine.save("distill", content))


if __name__ == "__main__":
    main()
