"""DistillTrainer is a Trainer: it learns, accumulates, resumes, logs and evaluates."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny

pytest.importorskip("accelerate")
from transformers import TrainingArguments

import tersor
from tersor import TersorError
from tersor.training import Distillation, Features, Head, Keep, cache_teacher
from tersor.training.reading import Reader
from tersor.training.trainer import DistillTrainer


def windows(count: int = 8, length: int = 12) -> Tensor:
    return torch.randint(0, tiny.VOCAB, (count, length), generator=torch.manual_seed(4))


def examples(count: int = 8) -> list[dict[str, Tensor]]:
    """Prompts of several lengths do not count, and the last tokens of some rows are padding."""
    rows = []
    for i, ids in enumerate(windows(count)):
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[: 1 + i % 5] = -100
        if i % 3 == 0:
            labels[-2:], mask[-2:] = -100, 0
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def args(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
    }
    return TrainingArguments(str(folder), **(settings | changes))


def pair() -> tuple[Any, Any]:
    return tiny.model("llama", num_hidden_layers=1), tiny.model("llama")


def plain_loss(student: Any, teacher: Any, rows: list[dict[str, Tensor]]) -> list[Tensor]:
    """Forward KL at 2 and cross-entropy, means over all tokens that count, in float64."""
    student, teacher = (copy.deepcopy(model).double() for model in (student, teacher))
    kls, crosses = [], []
    for row in rows:
        ids, mask = row["input_ids"][None], row["attention_mask"][None]
        q, p = (model(ids, attention_mask=mask).logits[0] for model in (student, teacher))
        for i, label in enumerate(row["labels"][1:].tolist()):
            if label != -100:
                a, b = (p[i] / 2).softmax(0), (q[i] / 2).softmax(0)
                kls.append(4 * (a * (a / b).log()).sum())
                crosses.append(-q[i].log_softmax(0)[label])
    return [torch.stack(kls).mean().detach(), torch.stack(crosses).mean().detach()]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_readers(kind: str) -> None:
    """Hidden states and head make the logits that the model makes, for every architecture."""
    model = tiny.model(kind)
    inputs = {"input_ids": windows(2), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    reader = Reader(model)
    for _ in range(2):
        logits, _ = reader.read(model, inputs)
        if isinstance(logits, Head):
            logits = logits.logits(torch.arange(24))
        torch.testing.assert_close(logits, model(**inputs).logits.flatten(0, 1))
    assert reader.whole == (kind == "bert")
    assert reader.read(model, inputs, whole=True)[1].logits.shape == (2, 12, tiny.VOCAB)


def test_a_reader_that_does_not_fit_gives_logits() -> None:
    """A model that does something to its logits is noticed in the first batch."""
    model = tiny.model("llama")
    plain = model.forward

    def doubled(*given: Any, logits_to_keep: int = 0, use_cache: bool = False, **named: Any) -> Any:
        outputs = plain(*given, logits_to_keep=logits_to_keep, use_cache=use_cache, **named)
        outputs.logits = 2 * outputs.logits
        return outputs

    model.forward = doubled
    reader = Reader(model)
    logits, _ = reader.read(model, {"input_ids": windows(2)})
    assert reader.whole
    torch.testing.assert_close(logits, 2 * plain(windows(2)).logits.flatten(0, 1))


def test_loss_and_logs(tmp_path: Path) -> None:
    """Means over tokens, in training and evaluation, whatever the batches."""
    student, teacher = pair()
    kl, cross = map(float, plain_loss(student, teacher, examples()))
    trainer = DistillTrainer(
        student,
        teacher,
        Distillation(temperature=2.0, alpha=0.3, chunk=500),
        args=args(tmp_path, max_steps=1, per_device_train_batch_size=8),
        train_dataset=examples(),
        eval_dataset=examples(),
    )
    found = trainer.evaluate()
    assert found["eval_distillation"] == pytest.approx(kl, rel=1e-5)
    assert found["eval_cross_entropy"] == pytest.approx(cross, rel=1e-5)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["distillation"] == pytest.approx(kl, rel=1e-5)
    assert log["cross_entropy"] == pytest.approx(cross, rel=1e-5)
    assert log["loss"] == pytest.approx(0.3 * kl + 0.7 * cross, rel=1e-5)
    assert "features" not in log
    assert all(p.grad is None for p in teacher.parameters())


def test_learning_and_evaluation(tmp_path: Path) -> None:
    student, teacher = pair()
    trainer = DistillTrainer(
        student,
        teacher.train(),
        Distillation(alpha=1.0),
        args=args(tmp_path, max_steps=30, per_device_eval_batch_size=8),
        train_dataset=examples(),
        eval_dataset=examples(),
    )
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(before["eval_distillation"], rel=1e-5)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_distillation"] < before["eval_distillation"] / 2
    assert not teacher.training
    found = trainer.predict(examples(4))
    assert found.predictions.shape == (4, 12, tiny.VOCAB)
    assert trainer.evaluate()["eval_distillation"] == after["eval_distillation"]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    """Batches of unequal numbers of tokens, added up, are the one large batch."""
    made = []
    for number, size in enumerate((8, 2)):
        student, teacher = pair()
        how = args(
            tmp_path / str(number),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            optim="sgd",
        )
        DistillTrainer(student, teacher, args=how, train_dataset=examples()).train()
        made.append(weights(student))
    torch.testing.assert_close(*made, rtol=1e-5, atol=1e-7)


def test_a_student_that_is_its_teacher_stays(tmp_path: Path) -> None:
    _, teacher = pair()
    student = copy.deepcopy(teacher)
    before = weights(student)
    trainer = DistillTrainer(
        student, teacher, Distillation(alpha=1.0), args=args(tmp_path), train_dataset=examples()
    )
    trainer.train()
    assert all(log.get("distillation", 0) <= 1e-6 for log in trainer.state.log_history)
    assert [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log] == [0, 0]
    torch.testing.assert_close(weights(student), before, rtol=0, atol=0)


@pytest.mark.parametrize("features", [None, Features(hidden=1.0, values=0.5)])
def test_resume(tmp_path: Path, features: Features | None) -> None:
    """Two steps, a new process's worth of objects, and two more are the four in one go."""

    def trainer(folder: str) -> DistillTrainer:
        student = tiny.model("llama", num_hidden_layers=1, hidden_size=32)
        how = args(tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=2)
        given: dict[str, Any] = {"args": how, "train_dataset": examples(16)}
        return DistillTrainer(student, pair()[1], Distillation(), features, **given)

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=0)
    assert ("features" in whole.state.log_history[0]) == (features is not None)
    if features is not None:
        fresh = trainer("fresh")._projections()
        for name, parameter in whole._projections().items():
            assert not parameter.equal(fresh[name])
            assert parameter.equal(resumed._projections()[name])
            assert parameter.grad is None
        (tmp_path / "whole" / "checkpoint-2" / "feature_projections.safetensors").unlink()
        again = trainer("again")
        with pytest.raises(TersorError, match="is missing; go on from a checkpoint"):
            again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_mixed_precision(tmp_path: Path) -> None:
    """The heads are multiplied as the models would, in bfloat16, and the loss in float32."""
    student, teacher = pair()
    kl, cross = map(float, plain_loss(student, teacher, examples()))
    how = args(tmp_path, max_steps=1, per_device_train_batch_size=8, bf16=True)
    settings = Distillation(temperature=2.0)
    trainer = DistillTrainer(student, teacher, settings, args=how, train_dataset=examples())
    trainer.train()
    assert not trainer._student.whole and not trainer._teacher.whole
    log = trainer.state.log_history[0]
    assert log["distillation"] == pytest.approx(kl, rel=0.03)  # bfloat16 has 8 bits
    assert log["cross_entropy"] == pytest.approx(cross, rel=0.01)


def test_quantized_teacher(tmp_path: Path) -> None:
    """A teacher on our kernels, whose output head stays a plain linear."""
    student, teacher = pair()
    tersor.quantize_model(teacher, scheme=tersor.Scheme(tersor.QSpec(4, 16)), method="rtn")
    assert any(isinstance(module, tersor.QuantLinear) for module in teacher.modules())
    rows = [row | {"attention_mask": torch.ones_like(row["labels"])} for row in examples()]
    ids, labels = windows(), torch.stack([row["labels"] for row in rows])
    with torch.no_grad():
        q, p = (model(ids).logits[:, :-1].double().softmax(-1) for model in (student, teacher))
    kl = float((p * (p / q).log()).sum(-1)[labels[:, 1:] != -100].mean())
    how = args(tmp_path, max_steps=1, per_device_train_batch_size=8)
    trainer = DistillTrainer(student, teacher, args=how, train_dataset=rows)
    trainer.train()
    assert not trainer._teacher.whole
    assert trainer.state.log_history[0]["distillation"] == pytest.approx(kl, rel=1e-4)


def test_offline_teacher(tmp_path: Path) -> None:
    """All of the vocabulary kept: the same training as with the teacher itself."""
    made = []
    for name in ("online", "offline"):
        student, teacher = pair()
        rows = [row | {"attention_mask": torch.ones_like(row["labels"])} for row in examples()]
        source = teacher
        if name == "offline":
            keep = Keep(top=tiny.VOCAB)
            source = cache_teacher(teacher, windows(), tmp_path / "cache", keep)
        how = args(tmp_path / name, optim="sgd")
        DistillTrainer(student, source, Distillation(), args=how, train_dataset=rows).train()
        made.append(weights(student))
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-6)


def test_masked_language_models(tmp_path: Path) -> None:
    """Each position predicts its own token: labels are not shifted."""
    student, teacher = tiny.model("bert", num_hidden_layers=1), tiny.model("bert")
    trainer = DistillTrainer(
        student, teacher, Distillation(), args=args(tmp_path), eval_dataset=examples()
    )
    found = trainer.evaluate()["eval_cross_entropy"]
    logs: list[float] = []
    for row in examples():
        mask = row["attention_mask"][None]
        log_q = student(row["input_ids"][None], attention_mask=mask).logits[0]
        log_q = log_q.detach().log_softmax(-1)
        logs += [float(-log_q[i, t]) for i, t in enumerate(row["labels"].tolist()) if t != -100]
    assert found == pytest.approx(sum(logs) / len(logs), rel=1e-5)


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    """A subclass predicts the next token as its base does, whatever it is called; a class of which
    nothing is known is refused, not trained on labels that may be off by one."""
    student, teacher = pair()
    kl, cross = map(float, plain_loss(student, teacher, examples()))
    student.__class__ = type("Mine", (type(student),), {})
    settings = Distillation(temperature=2.0)
    trainer = DistillTrainer(
        student, teacher, settings, args=args(tmp_path), eval_dataset=examples()
    )
    found = trainer.evaluate()
    assert found["eval_distillation"] == pytest.approx(kl, rel=1e-5)
    assert found["eval_cross_entropy"] == pytest.approx(cross, rel=1e-5)
    unknown = nn.Module()
    unknown.config = teacher.config
    with pytest.raises(TersorError, match="Module is not known to be a causal or a masked"):
        DistillTrainer(unknown, teacher, args=args(tmp_path))


def test_rows_beyond_a_table_of_positions(tmp_path: Path) -> None:
    """Of the teacher; before the first step."""
    ids = windows(4, 70)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    student = pair()[0]
    trainer = DistillTrainer(student, tiny.model("opt"), args=args(tmp_path), train_dataset=rows)
    with pytest.raises(TersorError, match=r"70 tokens are beyond the 64 positions of a OPTFor"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_refusals(tmp_path: Path) -> None:
    student, teacher = pair()
    how: dict[str, Any] = {"args": args(tmp_path), "train_dataset": examples()}
    with pytest.raises(TersorError, match="vocabulary has 160 tokens and the teacher's 200"):
        DistillTrainer(student, tiny.model("llama", vocab_size=200), **how)
    with pytest.raises(TersorError, match="are one object"):
        DistillTrainer(student, student, **how)
    with pytest.raises(TersorError, match="would replace the distillation loss"):
        DistillTrainer(student, teacher, compute_loss_func=lambda *_: None, **how)
    smooth = how | {"args": args(tmp_path, label_smoothing_factor=0.1)}
    with pytest.raises(TersorError, match="would replace the distillation loss"):
        DistillTrainer(student, teacher, **smooth)
    narrow = tiny.model("llama", hidden_size=32)
    mine = torch.optim.SGD(narrow.parameters(), 0.1)
    with pytest.raises(TersorError, match="does not train the projections of features"):
        DistillTrainer(
            narrow, teacher, features=Features(hidden=1.0), optimizers=(mine, None), **how
        )
    cache = cache_teacher(teacher, windows(2), tmp_path / "cache")
    with pytest.raises(TersorError, match="a cache holds no features"):
        DistillTrainer(student, cache, features=Features(hidden=1.0), **how)
    with pytest.raises(TersorError, match=r"temperature is 2.0 .* kept at 1.0"):
        DistillTrainer(student, cache, Distillation(temperature=2.0), **how)
    with pytest.raises(TersorError, match="Cosine needs all"):
        DistillTrainer(student, cache, Distillation("cosine"), **how)
    with pytest.raises(TersorError, match="is not in"):
        DistillTrainer(student, cache, **how).train()
    unlabelled = [{"input_ids": ids} for ids in windows()]
    with pytest.raises(TersorError, match="batches have no labels"):
        DistillTrainer(student, teacher, args=args(tmp_path), train_dataset=unlabelled).train()
    masked = [row | {"labels": row["labels"] * 0 - 100} for row in examples()]
    with pytest.raises(TersorError, match="no token counts"):
        DistillTrainer(student, teacher, args=args(tmp_path), train_dataset=masked).train()
