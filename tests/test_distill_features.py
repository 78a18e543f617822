"""Feature losses against loops in float64, read from real models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from tersor import TersorError
from tersor.training.features import (
    FeatureLoss,
    Features,
    even_layers,
    hidden_loss,
    recording,
    relation_loss,
)


def states(width: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, width, generator=draw, dtype=torch.float64)


REAL = torch.tensor([[True] * 5, [False, False, True, True, True]])


def test_hidden_by_hand() -> None:
    s, t = states(6, 0), states(6, 1)
    pairs = [(s[b, i], t[b, i]) for b in range(2) for i in range(5) if REAL[b, i]]
    squares = torch.stack([((x - y) ** 2).sum() / 6 for x, y in pairs]).mean()
    torch.testing.assert_close(hidden_loss(s, t, REAL), squares)
    angles = torch.stack([1 - x @ y / (x.norm() * y.norm()) for x, y in pairs]).mean()
    torch.testing.assert_close(hidden_loss(s, t, REAL, "cosine"), angles)
    assert hidden_loss(s.bfloat16(), t.bfloat16(), REAL).dtype == torch.float32


def test_relations_by_hand() -> None:
    """Widths differ, and each head is a row's softmax of inner products."""
    s, t, heads = states(8, 0), states(12, 1), 2
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b in range(2):
        kept = REAL[b].nonzero()[:, 0].tolist()
        for h in range(heads):
            v, w = s[b, :, 4 * h : 4 * h + 4], t[b, :, 6 * h : 6 * h + 6]
            for i in kept:
                q = torch.stack([v[i] @ v[j] / 2 for j in kept]).softmax(0)
                p = torch.stack([w[i] @ w[j] / 6**0.5 for j in kept]).softmax(0)
                total += (p * (p / q).log()).sum()
                count += 1
    torch.testing.assert_close(relation_loss(s, t, REAL, heads), total / count)


def test_even_layers() -> None:
    assert even_layers(3, 6) == {0: 1, 1: 3, 2: 5}
    assert even_layers(4, 4) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert even_layers(2, 5) == {0: 1, 1: 4}
    assert even_layers(3, 2) == {0: 0, 1: 0, 2: 1}


def models(**changes: Any) -> tuple[Any, Any, Tensor]:
    student = tiny.model("llama", num_hidden_layers=2, **changes)
    ids = torch.randint(0, tiny.VOCAB, (2, 5), generator=torch.manual_seed(1))
    return student, tiny.model("llama", num_hidden_layers=4), ids


def run(loss: FeatureLoss, student: Any, teacher: Any, ids: Tensor) -> Tensor:
    with loss.recorded(student, 0) as ours, loss.recorded(teacher, 1) as theirs:
        student(ids)
        with torch.no_grad():
            teacher(ids)
    return loss(ours, theirs, REAL)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_models(kind: str) -> None:
    """What the hooks read is what transformers itself returns, projected where widths differ."""
    student, teacher, ids = models(hidden_size=32)
    loss = FeatureLoss(student, teacher, Features({0: 2}, 0.5, kind, embedding=2.0, values=3.0))
    found = run(loss, student, teacher, ids)
    ours = student(ids, output_hidden_states=True).hidden_states
    theirs = teacher(ids, output_hidden_states=True).hidden_states
    names = ("hidden_0", "embedding")
    first, second = (loss.projections[name].weight for name in names)
    assert first.shape == second.shape == (64, 32)
    wanted = 0.5 * hidden_loss(ours[1] @ first.T, theirs[3], REAL, kind)
    wanted += 2 * hidden_loss(ours[0] @ second.T, theirs[0], REAL, kind)
    attentions = [student.model.layers[0].self_attn, teacher.model.layers[2].self_attn]
    norms = [student.model.layers[0].input_layernorm, teacher.model.layers[2].input_layernorm]
    inputs = [norms[0](ours[0]), norms[1](theirs[2])]
    values = [a.v_proj(x) for a, x in zip(attentions, inputs, strict=True)]
    wanted += 3 * relation_loss(*values, REAL, 2)
    torch.testing.assert_close(found, wanted)
    found.backward()
    assert first.grad is not None and first.grad.abs().max() > 0
    assert student.model.layers[0].self_attn.v_proj.weight.grad is not None
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is None for p in student.model.layers[1].parameters())


def test_a_student_that_is_its_teacher() -> None:
    student, _, ids = models()
    teacher = copy.deepcopy(student)
    loss = FeatureLoss(student, teacher, Features(hidden=1, embedding=1, values=1))
    assert not loss.projections
    found = run(loss, student, teacher, ids)
    found.backward()
    assert found.detach().abs() <= 1e-6
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients and max(g.abs().max() for g in gradients) <= 1e-6


def test_hooks_only_where_asked() -> None:
    student, teacher, ids = models()

    def hooked(model: torch.nn.Module) -> list[str]:
        return [path for path, module in model.named_modules() if module._forward_hooks]

    loss = FeatureLoss(student, teacher, Features(hidden=1))
    with loss.recorded(student, 0), loss.recorded(teacher, 1):
        assert hooked(student) == ["model.layers.0", "model.layers.1"]
        assert hooked(teacher) == ["model.layers.1", "model.layers.3"]
    assert not hooked(student) and not hooked(teacher)
    with pytest.raises(RuntimeError), recording(student, ["model.layers.1"]):
        raise RuntimeError
    assert not hooked(student)
    student(ids)


def test_refusals() -> None:
    student, teacher, _ = models()
    with pytest.raises(TersorError, match="teacher's block 4 of 4"):
        FeatureLoss(student, teacher, Features({0: 4}, hidden=1))
    with pytest.raises(TersorError, match="student's block 2 of 2"):
        FeatureLoss(student, teacher, Features({2: 0}, hidden=1))
    with pytest.raises(TersorError, match="layers is empty"):
        FeatureLoss(student, teacher, Features({}, hidden=1))
    with pytest.raises(TersorError, match="3 heads do not divide the 32 features"):
        FeatureLoss(student, teacher, Features(values=1, heads=3))
    with pytest.raises(TersorError, match="makes values alone"):
        FeatureLoss(tiny.model("gpt2"), teacher, Features(values=1))
    loss = FeatureLoss(student, teacher, Features(hidden=1))
    with pytest.raises(TersorError, match="no token is real"):
        loss({}, {}, torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(TersorError, match="no feature has a weight"):
        Features()
    with pytest.raises(TersorError, match="no kind 'l1'"):
        Features(hidden=1, kind="l1")
    with pytest.raises(TersorError, match="hidden is -1"):
        Features(hidden=-1)


@pytest.mark.parametrize(
    ("settings", "name", "wants"),
    [
        ({"embedding": 1.0, "layers": {0: 1}}, "layers", "hidden, values or attention"),
        ({"values": 1.0, "kind": "cosine"}, "kind", "hidden or embedding"),
        ({"hidden": 1.0, "heads": 2}, "heads", "values"),
        ({"hidden": 1.0, "attention_kind": "mse"}, "attention_kind", "attention"),
        ({"hidden": 1.0, "attention_heads": {0: 0}}, "attention_heads", "attention"),
    ],
)
def test_settings_without_effect(settings: dict[str, Any], name: str, wants: str) -> None:
    with pytest.raises(TersorError, match=f"{name} changes nothing without a weight for {wants};"):
        Features(**settings)
