"""At equal steps a distilled student is better than one trained on the text alone."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("accelerate")
from transformers import AutoModelForCausalLM, Trainer

from tersor.calibrate import load_tokenizer
from tersor.evaluate import evaluate, text_windows
from tersor.training import Distillation
from tersor.training.students import student_of
from tersor.training.trainer import DistillTrainer
from test_distill_trainer import args

if TYPE_CHECKING:
    from tersor.demo_model import DemoModel


@pytest.mark.slow
def test_gain(demo_model: DemoModel, tmp_path: Path) -> None:
    """Half of the teacher's blocks, the same rows in the same order: held-out log-perplexity, by
    more than two standard deviations over three seeds. bench/distill.py is the long form."""
    tokenizer = load_tokenizer(demo_model.folder)
    teacher = AutoModelForCausalLM.from_pretrained(demo_model.folder, dtype=torch.float32)
    text = demo_model.calibration.read_text()[:200_000]
    rows = [{"input_ids": row, "labels": row} for row in text_windows(text, tokenizer, 128)]
    held_out = text_windows(demo_model.held_out["code"].read_text()[:60_000], tokenizer, 128)[:32]

    def trained(seed: int, distil: bool) -> float:
        student = student_of(teacher, 3)
        settings: dict[str, Any] = {"max_steps": 20, "learning_rate": 1e-3, "seed": seed}
        how = args(tmp_path, **settings, warmup_steps=3, logging_steps=1000, max_grad_norm=1.0)
        given: dict[str, Any] = {"args": how, "train_dataset": rows}
        if distil:
            DistillTrainer(student, teacher, Distillation(alpha=1.0), **given).train()
        else:
            Trainer(student, **given).train()
        return evaluate({"it": student.eval()}, held_out, batch=8)["it"].nll.mean

    plain, distilled = ([trained(seed, distil) for seed in range(3)] for distil in (False, True))
    gains = [a - b for a, b in zip(plain, distilled, strict=True)]
    assert mean(gains) > 2 * stdev(gains), (plain, distilled)
    assert mean(plain) - mean(distilled) > 2 * max(stdev(plain), stdev(distilled))
