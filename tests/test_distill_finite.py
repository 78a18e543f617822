"""Training stops at the first number that is none, with the weights of the step before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

pytest.importorskip("accelerate")

from tersor import TersorError
from tersor.training import Distillation
from tersor.training.trainer import DistillTrainer
from test_distill_trainer import args, examples, pair, weights


class Break(TrainerCallback):
    """Something that goes wrong after two steps."""

    def __init__(self, how: Any) -> None:
        self.how = how

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.how(kwargs["model"])


def broken_weight(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")


def broken_gradient(model: torch.nn.Module) -> None:
    model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))


@pytest.mark.parametrize("norm", [0.0, 1.0])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        (broken_weight, "the loss is nan in step 3"),
        (broken_gradient, r"the gradient is (nan|inf) in step 3"),
    ],
)
def test_stops(tmp_path: Path, how: Any, message: str, norm: float) -> None:
    """Whether or not gradients are clipped, which would hide an infinite one in all of them."""
    student, teacher = pair()
    settings = args(tmp_path, max_steps=6, save_strategy="steps", save_steps=2, max_grad_norm=norm)
    trainer = DistillTrainer(
        student,
        teacher,
        Distillation(),
        args=settings,
        train_dataset=examples(),
        callbacks=[Break(how)],
    )
    with pytest.raises(TersorError, match=rf"{message}.*checkpoint-2 in .* is from before"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    kept = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    if how is broken_gradient:  # the step was not taken
        now = weights(student)
        assert all(torch.equal(now[name], tensor) for name, tensor in kept.items())


def test_without_a_checkpoint(tmp_path: Path) -> None:
    student, teacher = pair()
    broken_weight(student)
    trainer = DistillTrainer(student, teacher, args=args(tmp_path), train_dataset=examples())
    with pytest.raises(TersorError, match=r"in step 1.*no checkpoint was written"):
        trainer.train()


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="the training data set is empty"):
        DistillTrainer(*pair(), args=args(tmp_path), train_dataset=[])
