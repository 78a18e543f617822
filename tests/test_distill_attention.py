"""Attention maps of a student against its teacher's, from plain transformers and plain sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny

pytest.importorskip("accelerate")

from tersor import TersorError
from tersor.training import Distillation, FeatureLoss, Features
from tersor.training.attention import attention_loss
from tersor.training.trainer import DistillTrainer
from test_distill_trainer import args, examples, windows


def eager(kind: str = "llama", **changes: object) -> Any:
    off = {"bert": "attention_probs_dropout_prob", "gpt2": "attn_pdrop"}
    plain = {off[kind]: 0.0} if kind in off else {}
    model = tiny.model(kind, **(plain | changes))
    model.set_attn_implementation("eager")
    return model


def maps(model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(model(ids, attention_mask=mask, output_attentions=True).attentions)


def plain(q: Tensor, p: Tensor, real: Tensor, kind: str) -> float:
    """Of maps [batch, heads, length, length]; one entry after the other."""
    values = []
    for b, h, i in [
        (b, h, i)
        for b in range(q.shape[0])
        for h in range(q.shape[1])
        for i in range(q.shape[2])
        if real[b, i]
    ]:
        pairs = [(float(q[b, h, i, j]), float(p[b, h, i, j])) for j in range(q.shape[3])]
        pairs = [(x, y) for x, y in pairs if x or y]
        if kind == "mse":
            values += [(x - y) ** 2 for x, y in pairs]
        else:
            row = torch.tensor(pairs, dtype=torch.float64)
            values.append(float((row[:, 1] * (row[:, 1] / row[:, 0]).log()).nansum()))
    return sum(values) / len(values)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "opt", "bert", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("how", ["kl", "mse"])
def test_against_plain(kind: str, how: str) -> None:
    """With padding on either side, and maps of both that a causal mask hides."""
    if kind not in tiny.KINDS:
        pytest.skip("not in this version of transformers")
    count = tiny.CONFIGS[kind].get("num_hidden_layers", 2)
    student, teacher = eager(kind), eager(kind)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    ids, mask = windows(3), torch.ones(3, 12, dtype=torch.int64)
    mask[0, -3:] = 0
    mask[1, :2] = 0
    features = Features({0: count - 1, 1: 0}, attention=0.5, attention_kind=how)
    losses = FeatureLoss(student, teacher, features)
    with losses.recorded(student, 0) as ours, losses.recorded(teacher, 1) as theirs:
        outputs = [model(ids, attention_mask=mask) for model in (student, teacher)]
    assert all("attentions" not in each for each in outputs)
    found = losses(ours, theirs, mask.bool())
    a, b = maps(student, ids, mask), maps(teacher, ids, mask)
    pairs = ((0, count - 1), (1, 0))
    wanted = sum(plain(a[i], b[j], mask, how) for i, j in pairs) / 2 * 0.5
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-4)
    found.backward()
    learning = [n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()]
    assert learning
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("how", ["kl", "mse"])
def test_equal_maps_and_masks(how: str) -> None:
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    hidden = torch.ones(5, 5).triu(1).bool()
    p = x.masked_fill(hidden, float("-inf")).softmax(-1).requires_grad_()
    real = torch.ones(2, 5).bool()
    loss = attention_loss(p, p.detach(), real, how)
    (grad,) = torch.autograd.grad(loss, p)
    assert float(loss.detach()) == 0 and grad[..., ~hidden].abs().max() <= 1e-12
    q = (x * 1.5).masked_fill(hidden, float("-inf")).softmax(-1)
    found = float(attention_loss(q, p.detach(), real, how))
    assert found == pytest.approx(plain(q, p.detach(), real, how))
    check = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: attention_loss(
            z.masked_fill(hidden, float("-inf")).softmax(-1), p.detach(), real, how
        ),
        check,
    )


def test_numbers_of_heads() -> None:
    """The mean over heads where they differ, or the pairs that are named."""
    draw = torch.manual_seed(0)
    q = torch.randn(2, 2, 6, 6, generator=draw).double().softmax(-1)
    p = torch.randn(2, 4, 6, 6, generator=draw).double().softmax(-1)
    real = torch.ones(2, 6).bool()
    mean = plain(q.mean(1, keepdim=True), p.mean(1, keepdim=True), real, "kl")
    assert float(attention_loss(q, p, real)) == pytest.approx(mean)
    named = plain(q[:, [1, 0]], p[:, [3, 2]], real, "mse")
    assert float(attention_loss(q, p, real, "mse", {1: 3, 0: 2})) == pytest.approx(named)


def test_training(tmp_path: Path) -> None:
    """Through the Trainer, whose predictions have no maps in them."""
    student = eager(num_attention_heads=2, num_key_value_heads=1, hidden_size=32)
    trainer = DistillTrainer(
        student,
        eager(),
        Distillation(alpha=1.0),
        Features({0: 0, 1: 1}, attention=100.0),
        args=args(tmp_path, max_steps=25, per_device_eval_batch_size=8),
        train_dataset=examples(),
        eval_dataset=examples(),
    )
    before = trainer.evaluate()["eval_features"]
    trainer.train()
    assert trainer.evaluate()["eval_features"] < before / 2
    assert trainer.predict(examples(4)).predictions.shape == (4, 12, tiny.VOCAB)


def test_refusals() -> None:
    student, teacher = eager(), eager()
    for changes, message in (
        ({"attention": -1.0}, "the weight attention is -1.0"),
        ({"attention": 1.0, "attention_kind": "cosine"}, "no attention_kind 'cosine'"),
    ):
        with pytest.raises(TersorError, match=message):
            Features(**changes)
    with pytest.raises(TersorError, match="no feature has a weight"):
        Features()
    for heads, message in (
        ({4: 0}, "the student's head 4 of 4"),
        ({0: 7}, "the teacher's head 7 of 4"),
        ({}, "attention_heads is empty"),
    ):
        with pytest.raises(TersorError, match=message):
            FeatureLoss(student, teacher, Features(attention=1.0, attention_heads=heads))
    for models, whose in (
        ((tiny.model("llama"), teacher), "student"),
        ((student, tiny.model("llama")), "teacher"),
    ):
        with pytest.raises(TersorError, match=f"the {whose} attends with 'sdpa'"):
            FeatureLoss(*models, Features(attention=1.0))
    for kind, name in (
        ("llama", "attention_dropout"),
        ("bert", "attention_probs_dropout_prob"),
        ("gpt2", "attn_pdrop"),
    ):
        dropping = eager(kind, **{name: 0.1})
        with pytest.raises(TersorError, match=f"{name}=0.1 of dropout.*before the model is made"):
            FeatureLoss(dropping, eager(kind), Features(attention=1.0))
        FeatureLoss(eager(kind), dropping, Features(attention=1.0))  # which does not train
