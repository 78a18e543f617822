"""Training for a grid against GPTQ alone, on the trained model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate")
from transformers import AutoModelForCausalLM, TrainingArguments

import tersor
from conftest import all_cores
from tersor import GPTQ, Calibration, QSpec, QuantLinear, Scheme
from tersor.calibrate import load_tokenizer
from tersor.evaluate import evaluate, text_windows
from tersor.training import Distillation
from tersor.training.qat import QuantizationTraining
from tersor.training.trainer import DistillTrainer

if TYPE_CHECKING:
    from tersor.demo_model import DemoModel

STEPS, BATCH, LENGTH = 40, 4, 128
RATES = {2: 3e-4, 3: 2e-4}


def original(source: DemoModel) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()


def divergences(teacher: nn.Module, model: nn.Module, windows: Tensor) -> Tensor:
    """KL(teacher ‖ model) per token, of each window; float64 [windows]."""
    models = {"teacher": teacher, "model": model.eval()}
    found = []
    for window in windows.split(1):
        kl = evaluate(models, window, "teacher", progress=False)["model"].kl
        assert kl is not None
        found.append(kl.mean)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3])
def test_training_beats_gptq_alone(bits: int, demo_model: DemoModel, tmp_path: Path) -> None:
    """From GPTQ's solution, with the original as teacher; windows of held-out text are paired, and
    the difference must be more than four standard errors."""
    tokenizer = load_tokenizer(demo_model.folder)
    scheme = Scheme(QSpec(bits, 64))
    inputs = Calibration((str(demo_model.calibration),), samples=32, seq_len=LENGTH)
    text = text_windows(demo_model.calibration.read_text(), tokenizer, LENGTH)
    held_out = text_windows(demo_model.held_out["code"].read_text(), tokenizer, LENGTH)[:32]
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": ids, "labels": ids} for ids in text[order[: STEPS * BATCH]]]
    settings = TrainingArguments(
        str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATES[bits],
        warmup_steps=4,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    with all_cores():
        teacher, alone, trained = (original(demo_model) for _ in range(3))
        tersor.quantize_model(alone, inputs.windows(tokenizer), scheme=scheme, method=GPTQ())
        solution = {n: m.qweight() for n, m in alone.named_modules() if isinstance(m, QuantLinear)}
        training = QuantizationTraining(scheme, start=solution)
        DistillTrainer(
            trained,
            teacher,
            Distillation(alpha=1.0, temperature=1.0),
            args=settings,
            train_dataset=rows,
            callbacks=[training],
        ).train()
        gained = divergences(teacher, alone, held_out) - divergences(teacher, trained, held_out)
    error = float(gained.std()) / math.sqrt(len(gained))
    assert float(gained.mean()) > 4 * error
