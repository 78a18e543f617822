"""What is kept of a teacher: exact where it says so, unbiased where it says so, and durable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from tersor import TersorError
from tersor.training import (
    LOSSES,
    Distillation,
    Head,
    Keep,
    TeacherCache,
    cache_teacher,
    distill,
    distill_sparse,
    sparse_losses,
    sparse_targets,
    token_losses,
)

DIVERGENCES = [name for name in LOSSES if LOSSES[name].of_distributions]


def logits(tokens: int = 7, vocabulary: int = 30) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    student, teacher = 3 * torch.randn(2, tokens, vocabulary, dtype=torch.float64)
    return student.requires_grad_(), teacher


def lumped(x: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Logits of a vocabulary in which all but these tokens are one."""
    p = (x / temperature).softmax(-1)
    top = p.gather(1, ids)
    return torch.cat([top, 1 - top.sum(-1, keepdim=True)], dim=1).log() * temperature


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_top_and_tail(name: str, temperature: float) -> None:
    """The loss of the lumped vocabulary, never above the whole one's."""
    student, teacher = logits()
    targets = sparse_targets(teacher, Keep(6, temperature=temperature), torch.Generator())
    assert targets.ids.equal(teacher.topk(6).indices)
    found = sparse_losses(name, student, targets)
    few = (lumped(x, targets.ids, temperature) for x in (student, teacher))
    wanted = token_losses(name, *few, temperature)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # kept in float32
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    whole = token_losses(name, student, teacher, temperature)
    assert (found <= whole + 1e-6).all() and (found > 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_all_that_there_is(name: str) -> None:
    student, teacher = logits()
    targets = sparse_targets(teacher, Keep(30), torch.Generator())
    wanted = token_losses(name, student, teacher)
    torch.testing.assert_close(sparse_losses(name, student, targets), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_that_is_its_teacher(name: str) -> None:
    teacher = logits()[1].float()
    student = teacher.clone().requires_grad_()
    losses = sparse_losses(name, student, sparse_targets(teacher, Keep(5), torch.Generator()))
    assert losses.abs().max() <= 1e-6
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    # The total variation has a kink there, and what was stored is a rounding off it.
    assert name == "total_variation" or gradient.abs().max() <= 1e-6


@pytest.mark.parametrize(("top", "proposal"), [(0, 1.0), (4, 1.0), (4, 0.6)])
def test_samples_are_unbiased(top: int, proposal: float) -> None:
    """Over many draws the mean of loss and gradient is the forward KL's of all logits, within four
    standard errors; that of the top alone is not."""
    student, teacher = logits(2, 12)
    keep = Keep(top, samples=3, proposal=proposal, temperature=1.5)
    draws, draw = 4000, torch.Generator().manual_seed(5)
    targets = sparse_targets(teacher.repeat(draws, 1), keep, draw)
    many = student.detach().repeat(draws, 1).requires_grad_()
    losses = sparse_losses("forward_kl", many, targets)
    (gradient,) = torch.autograd.grad(losses.sum(), many)
    wanted = token_losses("forward_kl", student, teacher, 1.5)
    (exact,) = torch.autograd.grad(wanted.sum(), student)
    found = torch.cat([losses.detach()[:, None], gradient], dim=1).view(draws, 2, -1)
    true = torch.cat([wanted.detach()[:, None], exact], dim=1)
    error = found.std(0) / draws**0.5
    assert ((found.mean(0) - true).abs() <= 4 * error + 1e-6).all()
    if proposal == 1:  # all the mass is given out
        torch.testing.assert_close(targets.p.sum(1), torch.ones(2 * draws))
    with pytest.raises(TersorError, match="give no ReverseKL, only forward_kl"):
        sparse_losses("reverse_kl", many, targets)


@pytest.mark.parametrize("keep", [Keep(5), Keep(5, samples=4), Keep(3, temperature=2.0)])
@pytest.mark.parametrize("chunk", [1, 64, 1 << 20])
def test_pieces_are_the_whole(keep: Keep, chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 30, (11,))
    labels[:4] = -100
    teacher = sparse_targets(torch.randn(11, 30), keep, torch.Generator().manual_seed(1))
    settings = Distillation(temperature=keep.temperature, alpha=0.7, chunk=chunk)
    found = distill_sparse(Head(hidden, weight), teacher, settings, labels)
    student, real = hidden @ weight.T, labels != -100
    losses = sparse_losses("forward_kl", student, teacher)[real]
    cross = torch.nn.functional.cross_entropy(student[real], labels[real])
    wanted = 0.7 * losses.mean() + 0.3 * cross
    torch.testing.assert_close(found.loss, wanted)
    torch.testing.assert_close(found.distillation, losses.mean().detach())
    for tensor in (hidden, weight):
        gradients = [
            torch.autograd.grad(x, tensor, retain_graph=True)[0] for x in (found.loss, wanted)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def text(count: int = 10, length: int = 6) -> Tensor:
    return torch.randint(0, tiny.VOCAB, (count, length), generator=torch.manual_seed(3))


def test_cache(tmp_path: Path) -> None:
    """Read back by the tokens in any order, it is what the teacher says now."""
    teacher, windows = tiny.model("llama"), text()
    keep = Keep(8, samples=5)
    cache = cache_teacher(teacher, windows, tmp_path / "cache", keep, batch=2, part=4)
    assert (cache.vocabulary, cache.length, cache.keep) == (tiny.VOCAB, 6, keep)
    picked = windows[[7, 0, 4]]
    targets = cache.targets(picked)
    with torch.no_grad():
        now = teacher(picked).logits.flatten(0, 1)
    fresh = sparse_targets(now, Keep(8), torch.Generator())
    assert targets.ids[:, :8].equal(fresh.ids)
    torch.testing.assert_close(targets.p[:, :8], fresh.p)
    torch.testing.assert_close(targets.negentropy, fresh.negentropy)
    torch.testing.assert_close(targets.p.sum(1), torch.ones(18))
    student = (now * 0.5).requires_grad_()
    labels = windows[[7, 0, 4]].roll(-1, 1).flatten()
    parts = distill_sparse(student, targets, Distillation(), labels)
    whole = distill(student, now, Distillation(), labels)
    torch.testing.assert_close(parts.cross_entropy, whole.cross_entropy)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]


def test_killed_and_continued(tmp_path: Path) -> None:
    """The parts that were committed are not computed again, and the files are the same."""
    model, windows, keep = tiny.model("llama"), text(), Keep(8, samples=5)
    how: dict[str, Any] = {"keep": keep, "batch": 2, "part": 4, "fingerprint": "a"}
    whole = cache_teacher(model, windows, tmp_path / "whole", **how)
    calls = []

    def teacher(ids: Tensor) -> Any:
        calls.append(len(ids))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return model(ids).logits

    with pytest.raises(KeyboardInterrupt):
        cache_teacher(teacher, windows, tmp_path / "cut", **how)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(TersorError, match="teacher was"):
        cache_teacher(teacher, windows, tmp_path / "cut", **(how | {"fingerprint": "b"}))
    with pytest.raises(TersorError, match="text was"):
        cache_teacher(teacher, windows.flip(0), tmp_path / "cut", **how)
    cut = cache_teacher(teacher, windows, tmp_path / "cut", **how)
    assert calls == [2] * 4 + [2] * 3
    for path in whole.folder.iterdir():
        assert path.read_bytes() == (cut.folder / path.name).read_bytes(), path.name
    with pytest.raises(TersorError, match="exists already"):
        cache_teacher(teacher, windows, tmp_path / "cut", **how)


def test_a_teacher_that_was_being_trained(tmp_path: Path) -> None:
    """Nothing is dropped while it reads; afterwards its modes are as they were."""
    model, windows = tiny.model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5), text(2)
    wanted = cache_teacher(model.eval(), windows, tmp_path / "eval", Keep(8)).targets(windows)
    model.train().transformer.h[0].eval()
    found = cache_teacher(model, windows, tmp_path / "train", Keep(8)).targets(windows)
    assert torch.equal(found.p, wanted.p) and found.ids.equal(wanted.ids)
    assert model.training and not model.transformer.h[0].training


def test_draws_do_not_depend_on_batches(tmp_path: Path) -> None:
    """So that a run that ran out of memory can go on with smaller ones."""
    model, windows = tiny.model("llama").double(), text(4)
    found = [
        cache_teacher(model, windows, tmp_path / f"{batch}", Keep(4, samples=6), batch=batch)
        for batch in (1, 4)
    ]
    targets = [cache.targets(windows) for cache in found]
    assert targets[0].ids.equal(targets[1].ids)
    drawn = targets[0].ids[:, 4:].reshape(4, -1)
    assert len({tuple(row) for row in drawn.tolist()}) == 4
    other = cache_teacher(model, windows, tmp_path / "seed", Keep(4, samples=6, seed=1))
    assert not other.targets(windows).ids.equal(targets[0].ids)


def test_another_teacher_is_another_fingerprint(tmp_path: Path) -> None:
    model, windows = tiny.model("llama"), text(2)
    first = cache_teacher(model, windows, tmp_path / "1").manifest["teacher"]
    assert cache_teacher(model, windows, tmp_path / "2").manifest["teacher"] == first
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert cache_teacher(model, windows, tmp_path / "3").manifest["teacher"] != first


def test_refusals(tmp_path: Path) -> None:
    model, windows = tiny.model("llama"), text(2)
    cache = cache_teacher(model, windows, tmp_path / "cache")
    with pytest.raises(TersorError, match=r"is not in .* whose windows have 6"):
        cache.targets(windows[:, :5])
    targets, student = cache.targets(windows), torch.randn(12, tiny.VOCAB)
    with pytest.raises(TersorError, match=r"temperature is 2.0 .* kept at 1.0"):
        distill_sparse(student, targets, Distillation(temperature=2.0, alpha=1.0))
    with pytest.raises(TersorError, match="a vocabulary of 160"):
        distill_sparse(student[:, 1:], targets, Distillation(alpha=1.0))
    with pytest.raises(TersorError, match="LogitMSE needs all"):
        distill_sparse(student, targets, Distillation("logit_mse", alpha=1.0))
    with pytest.raises(TersorError, match="no token counts"):
        distill_sparse(student, targets, Distillation(), torch.full((12,), -100))
    with pytest.raises(TersorError, match="give a fingerprint"):
        cache_teacher(lambda ids: ids, windows, tmp_path / "no")
    with pytest.raises(TersorError, match="must give"):
        cache_teacher(lambda ids: ids, windows, tmp_path / "no", fingerprint="x")
    with pytest.raises(TersorError, match="not finite"):
        sparse_targets(torch.full((2, 9), float("nan")), Keep(2), torch.Generator())
    with pytest.raises(TersorError, match="of a vocabulary of 9"):
        sparse_targets(torch.randn(2, 9), Keep(10), torch.Generator())
    with pytest.raises(TersorError, match="token ids int64"):
        cache_teacher(model, windows.int(), tmp_path / "no")
    with pytest.raises(TersorError, match="nothing would be kept"):
        Keep(0)
    with pytest.raises(TersorError, match="proposal is 0"):
        Keep(proposal=0.0)
    with pytest.raises(TersorError, match="samples is -1"):
        Keep(samples=-1)
    with pytest.raises(TersorError, match=r"proposal is 0\.5 and changes nothing without samples"):
        Keep(proposal=0.5)


def test_damaged_folders(tmp_path: Path) -> None:
    cache = cache_teacher(tiny.model("llama"), text(3), tmp_path / "cache")
    with pytest.raises(TersorError, match="no teacher cache"):
        TeacherCache.open(tiny.save(tmp_path / "model"))
    with pytest.raises(TersorError, match="has no"):
        TeacherCache.open(tmp_path / "nothing")
    (cache.folder / "model.safetensors").rename(tmp_path / "moved")
    with pytest.raises(TersorError, match="is incomplete"):
        TeacherCache.open(cache.folder)
