"""Adapters on quantized linears learn: by transformers' Trainer, and from a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny

pytest.importorskip("peft")
pytest.importorskip("accelerate")
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import tersor
from tersor.adapters.lora import add_lora, prepare_lora
from tersor.saving import save
from tersor.training import Distillation, Features
from tersor.training.trainer import DistillTrainer
from test_lora import IDS, adapters, base, logits, randomize

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **(settings | changes))


def examples() -> list[dict[str, Tensor]]:
    ids = torch.randint(0, tiny.VOCAB, (4, 12), generator=torch.manual_seed(4))
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids
    ]


@pytest.mark.parametrize("kind", ["w4", "nf4"])
def test_trains_by_the_trainer(kind: str, tmp_path: Path) -> None:
    plain = base(kind)
    frozen = {n: t.clone() for n, t in plain.state_dict().items()}
    model = add_lora(plain, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"))
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, save_strategy="steps", save_steps=4),
        train_dataset=examples(),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    after = model.get_base_model().state_dict()
    for name, tensor in frozen.items():
        name = name if name in after else ".base_layer.".join(name.rsplit(".", 1))
        assert torch.equal(after[name], tensor)
    want = logits(model.eval())
    again = PeftModel.from_pretrained(prepare_lora(base(kind)), tmp_path / "checkpoint-8")
    assert torch.equal(logits(again), want)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_trains_what_from_pretrained_has_loaded(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    save(base(), tmp_path / "q")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "q", quantization_config=tersor.TersorConfig()
    )
    model = add_lora(loaded, LoraConfig(r=2, task_type="CAUSAL_LM"))
    Trainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=examples()).train()
    assert any(p.any() for n, p in adapters(model).items() if "lora_B" in n)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = add_lora(base(), LoraConfig(r=2, task_type="CAUSAL_LM"))
        randomize(model)
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        return {n: p.grad for n, p in adapters(model).items()}

    one, two = gradients(False), gradients(True)
    for name, grad in one.items():
        torch.testing.assert_close(two[name], grad)


def test_distils_into_adapters(tmp_path: Path) -> None:
    """The loss of the first step is that of the formula, so that labels are shifted as a causal
    model's, and the student comes closer to the teacher."""
    teacher = tiny.model("llama")
    model = add_lora(base(), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"))
    randomize(model)
    rows = examples()
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        p, q = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (teacher, model))
    want = float((p.exp() * (p - q)).sum(-1).mean())
    trainer = DistillTrainer(
        model,
        teacher,
        Distillation(temperature=1.0, alpha=1.0),
        features=Features(hidden=0.01),
        args=arguments(tmp_path),
        train_dataset=rows,
    )
    trainer.train()
    losses = [row["distillation"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(want, rel=1e-3)
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)
