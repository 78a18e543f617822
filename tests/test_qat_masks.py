"""A grid, masks and a teacher in one training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate")
from transformers import TrainingArguments

import tersor
import tiny
from regression import Regression, batch
from tersor import QSpec, Scheme, TersorError
from tersor.pruning import Schedule
from tersor.sparsity import Sparsity
from tersor.training import Distillation
from tersor.training.masking import HoldZeros, MaskTraining
from tersor.training.qat import QuantizationTraining
from tersor.training.trainer import DistillTrainer
from test_mask_trainer import Texts
from test_qat import IDS, W4, linears


def distilled(model: nn.Module, folder: Path, callbacks: list[Any], steps: int = 10) -> None:
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        weight_decay=0.1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    DistillTrainer(
        model,
        tiny.model("llama"),
        Distillation(),
        args=arguments,
        train_dataset=Texts(),
        callbacks=callbacks,
    ).train()


def is_two_of_four(w: Tensor) -> bool:
    return bool(((w.reshape(-1, 4) == 0).sum(1) >= 2).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("masks", ["held", "learned"])
def test_masks_a_grid_and_a_teacher_in_one_run(masks: str, symmetric: bool, tmp_path: Path) -> None:
    model = tiny.model("llama")
    scheme = Scheme(QSpec(4, 32, symmetric))
    pattern = Sparsity(pattern=(2, 4))
    if masks == "held":
        tersor.prune_model(model, method=tersor.Magnitude(pattern))
        zero = {name: linear.weight == 0 for name, linear in linears(model, nn.Linear).items()}
        callbacks: list[Any] = [HoldZeros(), QuantizationTraining(scheme)]
    else:
        learner = MaskTraining(pattern, Schedule(2, 4, cooldown=2), "movement")
        callbacks = [learner, QuantizationTraining(scheme)]
    distilled(model, tmp_path, callbacks)
    layers = linears(model)
    assert len(layers) == 14 and all(callback.model is None for callback in callbacks)
    for name, layer in layers.items():
        w = layer.qweight().dequantize()
        assert is_two_of_four(w), name
        if masks == "held":
            assert not bool(w[zero[name]].any()), name


def test_what_is_learned_below_a_mask_is_what_the_layer_has() -> None:
    """Masks bake, then the grid converts: to the bit what both together computed with."""
    model = tiny.model("llama", num_hidden_layers=1).train()
    masks = MaskTraining(Sparsity(pattern=(2, 4)), Schedule(1, 2), "movement").attach(model)
    training = QuantizationTraining(W4).attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(4):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.step()
    assert masks.zeros == 0.5
    weights = {name: linear.weight.detach() for name, linear in training.linears.items()}
    with pytest.raises(TersorError, match=r"has a mask still; finish\(\) the masks first"):
        training.finish()
    assert masks.finish().sparsity == 0.5
    assert all(torch.equal(training.linears[n].weight, w) for n, w in weights.items())
    training.finish()
    for name, layer in linears(model).items():
        assert torch.equal(layer.qweight().dequantize(), weights[name])


def test_masks_in_the_wrong_order(tmp_path: Path) -> None:
    """Is seen before anything is trained."""
    model = tiny.model("llama")
    tersor.prune_model(model, method=tersor.Magnitude(Sparsity(0.5)))
    with pytest.raises(TersorError, match="masks come first in callbacks, QuantizationTraining"):
        distilled(model, tmp_path, [QuantizationTraining(W4), HoldZeros()])
    for kind in ("held", "learned"):
        model = tiny.model("llama")
        if kind == "held":
            tersor.prune_model(model, method=tersor.Magnitude(Sparsity(0.5)))
            masks: Any = HoldZeros().attach(model)
        else:
            masks = MaskTraining(Sparsity(0.5), Schedule(1, 2)).attach(model)
        training = QuantizationTraining(W4).attach(model)
        for callbacks in ([training, masks], [training]):
            with pytest.raises(TersorError, match=r"callbacks=\[masks, quantization\]"):
                distilled(model, tmp_path, callbacks)
        distilled(model, tmp_path, [masks, training], 3)
        assert len(linears(model)) == 14


def test_gptq_starts_below_masks() -> None:
    """Its zeros are those of the masks, and their weights are left to them."""
    model, other = tiny.model("llama"), tiny.model("llama")
    windows = torch.randint(2, tiny.VOCAB, (16, 32), generator=torch.manual_seed(0))
    for each in (model, other):
        tersor.prune_model(each, method=tersor.Magnitude(Sparsity(pattern=(2, 4))))
    held = HoldZeros().attach(model)
    training = QuantizationTraining(W4, start="gptq").attach(model, windows)
    tersor.quantize_model(other, windows, scheme=W4)
    for name, q in training.qweights().items():
        assert torch.equal(q.dequantize(), other.get_submodule(name).qweight().dequantize())
    held.finish()
    training.finish()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, other(input_ids=IDS).logits)


def test_masks_of_a_plain_module() -> None:
    model = Regression()
    MaskTraining(Sparsity(0.5), Schedule(), "magnitude").attach(model).finish()
    held = HoldZeros().attach(model)
    training = QuantizationTraining(Scheme(QSpec(3, None))).attach(model)
    assert list(training.linears) == ["first", "second"]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for step in range(60):
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    held.finish()
    assert training.finish().sparsity >= 0.5
