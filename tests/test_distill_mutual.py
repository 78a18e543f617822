"""Models that learn from each other, and chains of students."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny

pytest.importorskip("accelerate")

from tersor import TersorError
from tersor.training import Distillation
from tersor.training.mutual import MutualTrainer
from test_distill_trainer import args, examples, plain_loss, weights


def pair() -> dict[str, Any]:
    return {
        "small": tiny.model("llama", num_hidden_layers=1, hidden_size=32),
        "large": tiny.model("qwen2"),
    }


def made(folder: Path, models: dict[str, Any], **changes: Any) -> MutualTrainer:
    settings = Distillation(temperature=2.0, alpha=0.3, chunk=900)
    return MutualTrainer(
        models,
        settings,
        args=args(folder, **changes),
        train_dataset=examples(),
        eval_dataset=examples(),
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss(tmp_path: Path, accumulation: int) -> None:
    """Each from the other, as if that were a fixed teacher; the sum is what is trained."""
    models = pair()
    kl, cross = {}, {}
    for name, other in (("small", "large"), ("large", "small")):
        kl[name], cross[name] = map(float, plain_loss(models[name], models[other], examples()))
    size = 8 // accumulation
    how = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    trainer = made(tmp_path, models, max_steps=1, **how)
    trainer.train()
    log = trainer.state.log_history[0]
    for name in models:
        assert log[f"{name}_distillation"] == pytest.approx(kl[name], rel=1e-4)
        assert log[f"{name}_cross_entropy"] == pytest.approx(cross[name], rel=1e-4)
    wanted = sum(0.3 * kl[name] + 0.7 * cross[name] for name in models)
    assert log["loss"] == pytest.approx(wanted, rel=1e-4)


def test_gradients_are_those_of_fixed_teachers(tmp_path: Path) -> None:
    models = pair()
    twins = copy.deepcopy(models)
    rows = examples()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    made(tmp_path, models).compute_loss(torch.nn.Module(), dict(batch)).backward()
    labels = batch["labels"][:, 1:]
    for name, other in (("small", "large"), ("large", "small")):
        fed = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            p = (twins[other](**fed).logits[:, :-1] / 2).log_softmax(-1)[labels != -100]
        logits = twins[name](**fed).logits[:, :-1][labels != -100]
        q = (logits / 2).log_softmax(-1)
        loss = 0.3 * 4 * (p.exp() * (p - q)).sum(-1).mean()
        loss = loss + 0.7 * torch.nn.functional.cross_entropy(logits, labels[labels != -100])
        loss.backward()
        for ours, theirs in zip(models[name].parameters(), twins[name].parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_both_learn_and_are_saved_apart(tmp_path: Path) -> None:
    models = pair() | {"third": tiny.model("llama")}
    before = {name: weights(model) for name, model in models.items()}
    trainer = made(tmp_path, models, max_steps=25)
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    for name, model in models.items():
        assert last[f"eval_{name}_cross_entropy"] < first[f"eval_{name}_cross_entropy"] - 0.5
        changed = weights(model)
        assert any(not torch.equal(changed[key], old) for key, old in before[name].items())
    found = trainer.predict(examples(4)).predictions
    assert [each.shape for each in found] == [(4, 12, tiny.VOCAB)] * 3
    trainer.save_model(str(tmp_path / "saved"))
    for name, model in models.items():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / name)
        torch.testing.assert_close(weights(again), weights(model), rtol=0, atol=0)


def test_resume(tmp_path: Path) -> None:
    how: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = made(tmp_path / "whole", pair(), **how)
    whole.train()
    resumed = made(tmp_path / "resumed", pair(), **how)
    since = str(tmp_path / "whole" / "checkpoint-2")
    resumed.train(resume_from_checkpoint=since)
    for name in whole.models:
        ours, theirs = (weights(trainer.models[name]) for trainer in (resumed, whole))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    renamed = dict(zip(("a", "b"), pair().values(), strict=True))
    with pytest.raises(TersorError, match="has no model 'a'"):
        made(tmp_path / "other", renamed, **how).train(resume_from_checkpoint=since)
    smaller = pair() | {"large": tiny.model("qwen2", hidden_size=32)}
    with pytest.raises(TersorError, match="is of another model"):
        made(tmp_path / "third", smaller, **how).train(resume_from_checkpoint=since)


def test_best_models(tmp_path: Path) -> None:
    models = pair()
    how: dict[str, Any] = {
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # what learns is then best at its beginning
    }
    trainer = made(tmp_path, models, **how)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None and best.endswith("checkpoint-1")
    for name, model in models.items():
        kept = AutoModelForCausalLM.from_pretrained(Path(best, name))
        torch.testing.assert_close(weights(model), weights(kept), rtol=0, atol=0)


def test_an_evaluation_after_a_prediction(tmp_path: Path) -> None:
    trainer = made(tmp_path, pair())
    before = trainer.evaluate()
    trainer.predict(examples(3))
    after = trainer.evaluate()
    parts = [name for name in before if "entropy" in name or "distillation" in name]
    assert len(parts) == 4 and all(before[name] == after[name] for name in parts)


def test_masked_language_models(tmp_path: Path) -> None:
    models = {"a": tiny.model("bert", num_hidden_layers=1), "b": tiny.model("bert")}
    logs = made(tmp_path, models).evaluate()
    values: list[Tensor] = []
    for row in examples():
        with torch.no_grad():
            log_q = (
                models["a"](row["input_ids"][None], attention_mask=row["attention_mask"][None])
                .logits[0]
                .log_softmax(-1)
            )
        values += [-log_q[i, t] for i, t in enumerate(row["labels"].tolist()) if t != -100]
    wanted = float(torch.stack(values).mean())
    assert logs["eval_a_cross_entropy"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_refusals(tmp_path: Path) -> None:
    one = tiny.model("llama")
    for models, message in (
        ({"a": one}, "at least two models"),
        ([one, one], "at least two models"),
        ({"a": one, "b": one}, "are one object"),
        ({"a": one, "../b": tiny.model("llama")}, "cannot name a folder"),
        ({"a": one, "b": tiny.model("llama", vocab_size=200)}, "a 160, b 200"),
    ):
        with pytest.raises(TersorError, match=message):
            MutualTrainer(models, args=args(tmp_path), train_dataset=examples())
    bare = [{"input_ids": row["input_ids"]} for row in examples()]
    trainer = MutualTrainer(pair(), args=args(tmp_path), train_dataset=bare)
    with pytest.raises(TersorError, match="batches have no labels"):
        trainer.train()
    with pytest.raises(TersorError, match="leave it out and enable it on each model"):
        made(tmp_path, pair(), gradient_checkpointing=True)
    with pytest.raises(TersorError, match="would replace the distillation loss"):
        made(tmp_path, pair(), label_smoothing_factor=0.1)
