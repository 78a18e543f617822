"""Distillation of a trained model, and in two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tersor.evaluate import evaluate, text_windows
from tersor.training import LOSSES, Distillation, distill
from tersor.training.reading import Reader
from tersor.training.students import student_of
from tersor.training.trainer import DistillTrainer
from test_distill_trainer import args, examples, pair, weights

if TYPE_CHECKING:
    from tersor.demo_model import DemoModel


def test_trained_model(demo_model: DemoModel) -> None:
    """Equal models have no divergence and no gradient; others that which evaluation measures."""
    teacher = AutoModelForCausalLM.from_pretrained(demo_model.folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_model.folder)
    windows = text_windows(demo_model.held_out["prose"].read_text()[:4000], tokenizer, 64)[:2]
    labels = torch.cat([windows[:, 1:], torch.full((2, 1), -100)], dim=1).flatten()
    with torch.no_grad():
        target, _ = Reader(teacher).read(teacher, {"input_ids": windows})
    for name in LOSSES:
        student, _ = Reader(teacher).read(teacher, {"input_ids": windows})
        loss = distill(student, target, Distillation(name, alpha=1.0, chunk=40_000), labels).loss
        loss.backward()
        assert loss.detach().abs() <= 1e-6
        largest = max(float(p.grad.abs().max()) for p in teacher.parameters())
        assert largest == 0 if name != "cosine" else largest <= 1e-6
        teacher.zero_grad()

    student = student_of(teacher, 4)
    quality = evaluate({"teacher": teacher, "student": student}, windows, "teacher")["student"]
    predicted, _ = Reader(student).read(student, {"input_ids": windows})
    parts = distill(predicted, target, Distillation(), labels)
    assert quality.kl is not None and quality.kl.mean > 0.1
    assert float(parts.distillation) == pytest.approx(quality.kl.mean, rel=1e-5)
    assert float(parts.cross_entropy) == pytest.approx(quality.nll.mean, rel=1e-5)


def train(folder: Path, batch: int) -> None:
    """Two steps of eight rows in all; writes the weights and what was logged."""
    student, teacher = pair()
    how = args(
        folder,
        per_device_train_batch_size=batch,
        optim="sgd",
        learning_rate=0.1,
        ddp_backend="gloo" if batch < 8 else None,
    )
    trainer = DistillTrainer(student, teacher, args=how, train_dataset=examples())
    trainer.train()
    if trainer.accelerator.is_main_process:
        log = trainer.state.log_history[1]
        logged = torch.tensor([log["distillation"], log["cross_entropy"]])
        save_file(weights(student) | {"logged": logged}, folder / "result.safetensors")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """Rows with unequal numbers of tokens, in two processes: the same steps and the same logs."""
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}", __file__, str(folder), str(8 // processes)]
        subprocess.run(command, check=True, timeout=300, capture_output=True)
        found.append(load_file(folder / "result.safetensors"))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
