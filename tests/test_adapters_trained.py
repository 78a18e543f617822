"""Adapters and factors on the trained demo model: what each is for, on text held out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import tersor
from tersor import QSpec, Scheme
from tersor.adapters.loftq import LoftQ, loftq_model
from tersor.adapters.lora import add_lora
from tersor.adapters.merge import merge_lora
from tersor.adapters.nf4_linear import nf4_model
from tersor.evaluate import evaluate, text_windows
from tersor.surgery.lowrank import factorize_model

if TYPE_CHECKING:
    from tersor.demo_model import DemoModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

W2 = Scheme(QSpec(2, 64))


class Setting:
    """The model, and windows of text: to calibrate on, and of two kinds that it has not seen."""

    def __init__(self, source: DemoModel) -> None:
        self.folder = source.folder
        tokenizer = AutoTokenizer.from_pretrained(source.folder)

        def windows(path: Any, count: int) -> Tensor:
            return text_windows(path.read_text()[: 1000 * count], tokenizer, 128)[:count]

        self.calibration = windows(source.calibration, 16)
        self.code = windows(source.held_out["code"], 8)
        self.prose = windows(source.held_out["prose"], 40)
        self.original = self.load()

    def load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def divergence(self, model: Any) -> float:
        """KL(original ‖ model), nats per token."""
        models = {"original": self.original, "model": model}
        quality = evaluate(models, self.code, "original", progress=False)["model"]
        assert quality.kl is not None
        return quality.kl.mean


@pytest.fixture(scope="module")
def trained(demo_model: DemoModel) -> Setting:
    return Setting(demo_model)


def test_loftq_begins_nearer_to_the_original(trained: Setting) -> None:
    plain = trained.load()
    tersor.swap_linears(plain, W2)
    found = [trained.divergence(plain)]
    for weighting in ("none", "activation"):
        model, _ = loftq_model(
            trained.load(),
            LoraConfig(r=16),
            to=W2,
            calibration=trained.calibration,
            settings=LoftQ(1, weighting),
        )
        found.append(trained.divergence(model))
    rounded, published, weighted = found
    assert weighted < published < rounded


def test_factors_for_the_outputs_keep_more_of_the_model(trained: Setting) -> None:
    plain, aware = trained.load(), trained.load()
    one = factorize_model(plain, rank=96)
    two = factorize_model(aware, rank=96, calibration=trained.calibration)
    assert one.parameters_after == two.parameters_after < 0.7 * one.parameters_before
    assert trained.divergence(aware) < trained.divergence(plain)


def test_qlora_learns_another_kind_of_text_and_is_merged(trained: Setting) -> None:
    model = trained.load()
    nf4_model(model)
    model = add_lora(model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
    learned, unseen = trained.prose[:32], trained.prose[32:]

    def loss() -> float:
        return evaluate({"model": model}, unseen, progress=False)["model"].nll.mean

    before = loss()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    model.train()
    for ids in learned.split(4) * 2:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    after = loss()
    assert after < before
    model, report = merge_lora(model)
    assert all(0 < layer.weight_error < 0.02 for layer in report.layers)
    assert loss() < before
