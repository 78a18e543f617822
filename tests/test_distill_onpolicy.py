"""A student that learns from its own text: what it writes, what counts, and that it can resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny

pytest.importorskip("accelerate")

from tersor import TersorError
from tersor.training import Distillation, Keep, cache_teacher
from tersor.training.generation import complete, seed_of
from tersor.training.on_policy import OWN_TEXT, OnPolicy
from tersor.training.trainer import DistillTrainer
from test_distill_trainer import args, examples, pair, weights, windows

PROMPTS = [[5, 6, 7, 8, 9], [11], [20, 21, 22]]
WHEN = (0, 0, 0)


def greedy(model: Any, prompt: list[int], count: int, ends: tuple[int, ...] = ()) -> list[int]:
    """One token after the other, each from the whole text so far."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt", "gpt2"])
def test_greedy_text(kind: str) -> None:
    """Prompts of several lengths in one batch go on as each would alone."""
    model = tiny.model(kind)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    model.train()
    found = complete(model, PROMPTS, 6, temperature=0)
    assert model.training
    model.eval()
    assert found == [greedy(model, prompt, 6) for prompt in PROMPTS]


def test_end_of_text() -> None:
    """It ends a text, is part of it, and does not end the others."""
    model = tiny.model("llama")
    plain = [greedy(model, prompt, 8) for prompt in PROMPTS]
    end = plain[0][2]
    model.generation_config.eos_token_id = [end]
    model.generation_config.repetition_penalty = 5.0  # the model's own habits are not used
    found = complete(model, PROMPTS, 8, temperature=0)
    assert found == [greedy(model, prompt, 8, (end,)) for prompt in PROMPTS]
    assert found[0][-1] == end and len(found[0]) <= 3
    assert model.generation_config.repetition_penalty == 5.0


def test_draws_depend_on_the_seed_alone() -> None:
    model = tiny.model("llama")
    model.generation_config.eos_token_id = None
    state = torch.get_rng_state()
    first = complete(model, PROMPTS, 8, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert complete(model, PROMPTS, 8, seed=3) == first
    assert complete(model, PROMPTS, 8, seed=4) != first


def test_first_token_follows_the_distribution() -> None:
    """Frequencies of one drawn token against the softmax at the temperature, by a χ² test."""
    model = tiny.model("llama")
    with torch.no_grad():
        chances = (model(torch.tensor([[5]])).logits[0, -1].double() / 0.5).softmax(0)
    count = 2000
    drawn = torch.tensor(complete(model, [[5]] * count, 1, temperature=0.5, seed=1)).flatten()
    seen = torch.bincount(drawn, minlength=tiny.VOCAB).double()
    often = chances * count >= 5
    groups = torch.cat([chances[often], chances[~often].sum().view(1)]) * count
    found = torch.cat([seen[often], seen[~often].sum().view(1)])
    statistic = float(((found - groups).square() / groups).sum())
    free = len(groups) - 1
    assert free >= 2
    assert statistic < free + 5 * (2 * free) ** 0.5 + 5  # beyond one in a thousand


def test_written_batch() -> None:
    """The prompt is what does not count, padding is left out, and only new tokens count."""
    student, _ = pair()
    end = greedy(student, [9], 1)[0]
    student.generation_config.eos_token_id = end
    rows = examples(4)
    batch: dict[str, Any] = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    settings = OnPolicy(share=1.0, new_tokens=5, temperature=0)
    made = settings.written(student, batch, WHEN)
    assert made[OWN_TEXT] and made["labels"].shape == made["input_ids"].shape
    for i, row in enumerate(rows):
        prompt = row["input_ids"][: 1 + i % 5].tolist()
        text = greedy(student, prompt, 5, (end,))
        n, total = len(prompt), len(prompt) + len(text)
        assert made["input_ids"][i, :total].tolist() == prompt + text
        assert made["attention_mask"][i].sum() == made["attention_mask"][i, :total].sum() == total
        assert made["labels"][i, n:total].tolist() == text
        assert (made["labels"][i, :n] == -100).all()
        assert (made["labels"][i, total:] == -100).all()
    first = OnPolicy(share=1.0, new_tokens=2, prompt_tokens=3).written(student, batch, WHEN)
    assert torch.equal(first["input_ids"][:, :3], batch["input_ids"][:, :3])
    given = OnPolicy(share=1.0, new_tokens=2, prompts=PROMPTS).written(student, batch, WHEN)
    for ids, labels in zip(given["input_ids"].tolist(), given["labels"], strict=True):
        assert ids[: int((labels == -100).logical_not().nonzero()[0])] in PROMPTS


def test_long_prompts() -> None:
    """Where positions are a table, the end of a row's prompt that leaves room for what follows."""
    student = tiny.model("opt")
    ids = windows(2, 62)
    labels = torch.full_like(ids, -100)
    labels[0, 61:], labels[1, 30:] = 1, 1
    made = OnPolicy(share=1.0, new_tokens=8).written(
        student, {"input_ids": ids, "labels": labels}, WHEN
    )
    for i, prompt in enumerate((ids[0, 5:61], ids[1, :30])):
        assert torch.equal(made["input_ids"][i, : len(prompt)], prompt)
        assert (made["labels"][i, : len(prompt)] == -100).all()
        assert made["labels"][i, len(prompt)] != -100
    longer = OnPolicy(share=1.0, new_tokens=8).written(
        tiny.model("llama"), {"input_ids": ids, "labels": labels}, WHEN
    )
    assert torch.equal(longer["input_ids"][0, :61], ids[0, :61])  # rotary positions have no end


def test_long_prompts_of_a_teacher_with_fewer_positions() -> None:
    """Its table is the limit, where the student has none."""
    ids = windows(2, 62)
    labels = torch.full_like(ids, -100)
    student, teacher = tiny.model("llama"), tiny.model("opt")
    made = OnPolicy(share=1.0, new_tokens=8).written(
        student, {"input_ids": ids, "labels": labels}, WHEN, teacher=teacher
    )
    assert made["input_ids"].shape[1] <= 64
    assert torch.equal(made["input_ids"][0, :56], ids[0, 6:])
    teacher(made["input_ids"])


def test_share() -> None:
    """About so many batches, the same ones in every process."""
    settings = OnPolicy(share=0.25, new_tokens=1, prompt_tokens=1)
    student, _ = pair()
    batch: dict[str, Any] = {"input_ids": windows(1), "labels": windows(1)}
    chosen = [
        [OWN_TEXT in settings.written(student, dict(batch), (7, step, 0), p) for step in range(60)]
        for p in (0, 1)
    ]
    assert chosen[0] == chosen[1]
    assert abs(sum(chosen[0]) - 15) <= 4 * (60 * 0.25 * 0.75) ** 0.5
    assert seed_of(1, 23) != seed_of(12, 3)


def test_loss(tmp_path: Path) -> None:
    """The divergence at the written tokens, in float64 of the plain models, and nothing else."""
    student, teacher = pair()
    settings = OnPolicy(share=1.0, new_tokens=6, temperature=0)
    how = args(tmp_path, max_steps=1, per_device_train_batch_size=8)
    trainer = DistillTrainer(
        student,
        teacher,
        Distillation("reverse_kl", alpha=0.3),
        on_policy=settings,
        args=how,
        train_dataset=examples(),
    )
    rows = examples()
    batch: dict[str, Any] = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    made = settings.written(student, batch, (how.seed, 0, 0))
    kls: list[Tensor] = []
    with torch.no_grad():
        for i in range(8):
            total = int(made["attention_mask"][i].sum())
            ids, labels = made["input_ids"][i : i + 1, :total], made["labels"][i, :total]
            q, p = (m(ids).logits[0].double().softmax(-1) for m in (student, teacher))
            for at in (labels[1:] != -100).nonzero()[:, 0].tolist():
                kls.append((q[at] * (q[at] / p[at]).log()).sum())
    wanted = float(torch.stack(kls).mean())
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(wanted, rel=1e-5)
    assert log["distillation"] == pytest.approx(wanted, rel=1e-5)
    assert "cross_entropy" not in log


def test_learning(tmp_path: Path) -> None:
    student, teacher = pair()
    trainer = DistillTrainer(
        student,
        teacher,
        Distillation("generalized_js", alpha=1.0),
        on_policy=OnPolicy(share=1.0, new_tokens=8, prompt_tokens=2),
        args=args(tmp_path, max_steps=30, gradient_accumulation_steps=2),
        train_dataset=examples(),
    )
    trainer.train()
    logs = [log["distillation"] for log in trainer.state.log_history if "distillation" in log]
    assert sum(logs[-5:]) < sum(logs[:5]) / 2


def test_resume(tmp_path: Path) -> None:
    def trainer(folder: str) -> DistillTrainer:
        how = args(tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=2)
        own = OnPolicy(share=0.5, new_tokens=4, prompt_tokens=3)
        return DistillTrainer(*pair(), on_policy=own, args=how, train_dataset=examples(16))

    whole = trainer("whole")
    whole.train()
    written = ["cross_entropy" not in log for log in whole.state.log_history[:4]]
    assert 0 < sum(written) < 4, "some batches of each kind, or the seed of this test is no use"
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=0)
    plain = [log["loss"] for log in whole.state.log_history if "loss" in log]
    again = [log["loss"] for log in resumed.state.log_history if "loss" in log]
    assert again == plain


def test_refusals(tmp_path: Path) -> None:
    for wrong, message in (
        ({"share": 0}, "share is 0"),
        ({"share": 1.5}, "share is 1.5"),
        ({"new_tokens": 0}, "new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 0.9, "temperature": 0}, "top_p=0.9 changes nothing at temperature 0"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"prompts": []}, "prompts must be token ids"),
        ({"prompts": [[1], []]}, "prompts must be token ids"),
        ({"prompts": [[1]], "prompt_tokens": 2}, "drop prompt_tokens"),
    ):
        with pytest.raises(TersorError, match=message):
            OnPolicy(**wrong)
    student, teacher = pair()
    how: dict[str, Any] = {"args": args(tmp_path), "train_dataset": examples()}
    cache = cache_teacher(teacher, windows(2), tmp_path / "cache", Keep(top=8))
    with pytest.raises(TersorError, match="yet to write"):
        DistillTrainer(student, cache, on_policy=OnPolicy(), **how)
    with pytest.raises(TersorError, match="writes no text"):
        DistillTrainer(tiny.model("bert"), tiny.model("bert"), on_policy=OnPolicy(), **how)
    for wrong in (
        {"new_tokens": 5, "prompts": [[1], [1] * 60]},
        {"new_tokens": 5, "prompt_tokens": 60},
        {"new_tokens": 64},
    ):
        for models, whose in (
            ((tiny.model("opt"), teacher), "student"),
            ((student, tiny.model("opt")), "teacher"),
        ):
            with pytest.raises(TersorError, match=f"beyond the {whose}'s 64 positions"):
                DistillTrainer(*models, on_policy=OnPolicy(**wrong), **how)
    whole = [row | {"labels": row["input_ids"]} for row in examples()]
    trainer = DistillTrainer(
        student, teacher, on_policy=OnPolicy(share=1.0), args=args(tmp_path), train_dataset=whole
    )
    with pytest.raises(TersorError, match="set prompt_tokens"):
        trainer.train()
    with pytest.raises(TersorError, match="say where a row's prompt ends"):
        OnPolicy(share=1.0).written(student, {"input_ids": windows(1)}, WHEN)
    with pytest.raises(TersorError, match="beyond the model's 64 positions"):
        complete(tiny.model("opt"), [[1] * 60], 5)
    with pytest.raises(TersorError, match="a prompt has no tokens"):
        complete(student, [[1], []], 5)
