"""Exit heads: what they learn, that leaving early is right to the token, and what is saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny

pytest.importorskip("accelerate")

from tersor import TersorError
from tersor.training import Distillation
from tersor.training.early_exit import EarlyExit
from tersor.training.exits import ExitHeads, ExitTrainer
from test_distill_trainer import args, examples, weights

DEEP: dict[str, dict[str, object]] = {
    "llama": {"num_hidden_layers": 5},
    "gemma2": {
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    },
    "gpt2": {"n_layer": 5, "num_hidden_layers": 5},
    "opt": {"num_hidden_layers": 5},
    "mistral": {"num_hidden_layers": 5},
}
EXITS = [0, 2]


def deep(kind: str = "llama", **changes: object) -> Any:
    model = tiny.model(kind, **(DEEP[kind] | changes))
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model


def states(model: Any, ids: list[int], numbers: list[int]) -> dict[int, Tensor]:
    """What blocks put out for the last token, all of the text computed afresh."""
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return {number: hidden[number + 1][0, -1] for number in numbers}


def slow_text(
    model: Any, exits: ExitHeads, prompt: list[int], count: int, threshold: float
) -> tuple[list[int], list[int]]:
    """The definition: for each token the first exit that is sure, without any cache."""
    blocks = int(model.config.num_hidden_layers)
    ids, depths = list(prompt), []
    for step in range(count):
        with torch.no_grad():
            token, depth = int(model(torch.tensor([ids])).logits[0, -1].argmax()), blocks
            for number, state in states(model, ids, exits.numbers).items() if step else ():
                chances = exits.head(number, state[None]).logits(torch.tensor([0])).softmax(-1)[0]
                if float(chances.max()) >= threshold:
                    token, depth = int(chances.argmax()), number + 1
                    break
        ids.append(token)
        depths.append(depth)
    return ids[len(prompt) :], depths


@pytest.mark.parametrize("kind", list(DEEP))
def test_text(kind: str) -> None:
    """For a threshold that sends tokens through every exit and through none."""
    model = deep(kind)
    exits = ExitHeads(model, EXITS)
    prompt = [5, 9, 17, 30]
    tried = []
    for share in (0.3, 0.5, 0.7):
        threshold = _confidence(model, exits, prompt, share)
        wanted, depths = slow_text(model, exits, prompt, 24, threshold)
        found = EarlyExit(model, exits, threshold).generate(prompt, 24)
        assert found.ids == wanted and found.depths == depths
        tried += depths[1:]
        assert found.depth == pytest.approx(sum(depths) / 24)
        # Nothing runs twice, nor for a token that nobody waits for.
        assert sum(depths[1:]) / 23 <= found.work <= 5
        with torch.no_grad():
            logits = model(torch.tensor([prompt + wanted[:-1]])).logits[0, len(prompt) - 1 :]
        assert found.agreement == pytest.approx(
            float((logits.argmax(-1) == torch.tensor(wanted)).double().mean())
        )
    assert {1, 5} <= set(tried)


def _confidence(model: Any, exits: ExitHeads, prompt: list[int], share: float) -> float:
    """A quantile of how sure the exits are along the full model's text."""
    sure = []
    ids = list(prompt)
    for _ in range(12):
        with torch.no_grad():
            for number, state in states(model, ids, exits.numbers).items():
                logits = exits.head(number, state[None]).logits(torch.tensor([0]))
                sure.append(float(logits.softmax(-1).max()))
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return float(torch.tensor(sure).quantile(share))


@pytest.mark.parametrize("kind", list(DEEP))
def test_full_threshold_is_the_full_model(kind: str) -> None:
    model = deep(kind)
    prompt = torch.tensor([[5, 9, 17, 30]])
    wanted = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, 4:].tolist()
    for threshold in (1.0, 2.0):
        found = EarlyExit(model, ExitHeads(model, EXITS), threshold).generate([5, 9, 17, 30], 20)
        assert found.ids == wanted
        assert found.depths == [5] * 20 and found.work == 5 and found.agreement == 1


def test_end_of_text() -> None:
    model = deep()
    exits = EarlyExit(model, ExitHeads(model, EXITS), 0.02)
    whole = exits.generate([5, 9], 12, compare=False)
    assert whole.agreement is None
    model.generation_config.eos_token_id = end = whole.ids[4]
    assert exits.generate([5, 9], 12).ids == whole.ids[: whole.ids.index(end) + 1]


@pytest.mark.parametrize("own", [False, True])
def test_loss(tmp_path: Path, own: bool) -> None:
    """Cross-entropies and divergences from plain logits in float64."""
    model = deep(num_hidden_layers=3)
    exits = ExitHeads(model, [0, 1], own)
    with torch.no_grad():
        for parameter in exits.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    before, old = copy.deepcopy(model).double(), copy.deepcopy(exits.double())
    exits.float()
    trainer = ExitTrainer(
        model,
        exits,
        Distillation("reverse_kl", alpha=0.7, chunk=600),
        weights={0: 0.2, 1: 0.5},
        full=0.9,
        args=args(tmp_path, max_steps=1, per_device_train_batch_size=8),
        train_dataset=examples(),
    )
    trainer.train()
    values: dict[str, list[Tensor]] = {"full": [], "0": [], "1": [], "ce0": [], "ce1": []}
    for row in examples():
        with torch.no_grad():
            outputs = before(
                row["input_ids"][None],
                attention_mask=row["attention_mask"][None],
                output_hidden_states=True,
            )
            last = outputs.logits[0].log_softmax(-1)
            for i, label in enumerate(row["labels"][1:].tolist()):
                if label == -100:
                    continue
                values["full"].append(-last[i, label])
                for number in (0, 1):
                    normed = old.norms[str(number)](outputs.hidden_states[number + 1][0, i])
                    head = old.projections[str(number)] if own else before.lm_head
                    q = F.linear(normed.double(), head.weight.double()).log_softmax(-1)
                    values[str(number)].append((q.exp() * (q - last[i])).sum())
                    values[f"ce{number}"].append(-q[label])
    mean = {name: float(torch.stack(each).mean()) for name, each in values.items()}
    log = trainer.state.log_history[0]
    assert log["cross_entropy"] == pytest.approx(mean["full"], rel=1e-4)
    assert log["exit_0"] == pytest.approx(mean["0"], rel=1e-4)
    assert log["exit_1"] == pytest.approx(mean["1"], rel=1e-4)
    wanted = 0.9 * mean["full"]
    wanted += 0.2 * (0.7 * mean["0"] + 0.3 * mean["ce0"])
    wanted += 0.5 * (0.7 * mean["1"] + 0.3 * mean["ce1"])
    assert log["loss"] == pytest.approx(wanted, rel=1e-4)


def test_frozen_model_and_files(tmp_path: Path) -> None:
    """The exits alone learn; the folder opens as an ordinary model, and with its heads."""
    model = deep().requires_grad_(False)
    exits = ExitHeads(model, EXITS, own=True)
    before = weights(model)
    trainer = ExitTrainer(
        model,
        exits,
        Distillation(alpha=1.0),
        full=0.0,
        args=args(tmp_path, max_steps=30),
        train_dataset=examples(),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "exit_0" in log]
    assert logs[-1]["exit_0"] < logs[0]["exit_0"] / 2
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(weights(again), before, rtol=0, atol=0)
    heads = ExitHeads.load(tmp_path / "saved", again)
    assert heads.numbers == EXITS and heads.own
    again.generation_config.eos_token_id = again.config.eos_token_id = None
    texts = [
        EarlyExit(*pair, 1e-4).generate([7, 8], 16) for pair in ((model, exits), (again, heads))
    ]
    assert texts[0] == texts[1] and texts[0].depth < 5


def test_resume(tmp_path: Path) -> None:
    def trainer(folder: str) -> ExitTrainer:
        model = deep(num_hidden_layers=3)
        how = args(tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=2)
        return ExitTrainer(model, ExitHeads(model, [0]), args=how, train_dataset=examples(16))

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for ours, theirs in ((resumed.model, whole.model), (resumed.exits, whole.exits)):
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=0)


def test_best_model(tmp_path: Path) -> None:
    """The heads are of the same checkpoint as the model."""
    model = deep(num_hidden_layers=3)
    how = args(
        tmp_path,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # what learns is then best at its beginning
    )
    exits = ExitHeads(model, [0])
    rows = examples()
    trainer = ExitTrainer(model, exits, args=how, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None and best.endswith("checkpoint-1")
    kept = AutoModelForCausalLM.from_pretrained(best)
    torch.testing.assert_close(weights(model), weights(kept), rtol=0, atol=0)
    torch.testing.assert_close(weights(exits), weights(ExitHeads.load(best, kept)), rtol=0, atol=0)


def test_gradients_of_heads_are_looked_at_and_clipped(tmp_path: Path) -> None:
    model = deep(num_hidden_layers=3).requires_grad_(False)

    def step(folder: str, **changes: Any) -> float:
        """How far one step of plain SGD moves the heads."""
        exits = ExitHeads(model, [0, 1])
        before = weights(exits)
        settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "warmup_steps": 0}
        how = args(tmp_path / folder, **(settings | changes))
        ExitTrainer(model, exits, full=0.0, args=how, train_dataset=examples()).train()
        now = weights(exits)
        return float(torch.stack([(now[n] - w).norm() for n, w in before.items()]).norm())

    free = step("free")
    assert step("clipped", max_grad_norm=free / 8) == pytest.approx(free / 8, rel=1e-3)
    exits = ExitHeads(model, [0])
    next(exits.parameters()).register_hook(lambda grad: grad * float("inf"))
    trainer = ExitTrainer(model, exits, args=args(tmp_path / "inf"), train_dataset=examples())
    with pytest.raises(TersorError, match=r"the gradient is (nan|inf) in step 1"):
        trainer.train()


def test_heads_do_not_shorten_the_steps_of_the_model(tmp_path: Path) -> None:
    """Gradients are clipped on their own: a weight of the exits that is a thousand times as large
    leaves the model's step as it is, where nothing of their loss reaches the model."""

    def step(weight: float) -> dict[str, Tensor]:
        model = deep(num_hidden_layers=3)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == "lm_head.weight")
        exits = ExitHeads(model, [0], own=True)
        how = args(tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.1)
        ExitTrainer(model, exits, weights={0: weight}, args=how, train_dataset=examples()).train()
        return weights(model)

    torch.testing.assert_close(step(1.0), step(1000.0), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_predictions_and_the_evaluation_after_them(tmp_path: Path, kind: str) -> None:
    """Logits of all tokens, of the model as it is; and logs of what was evaluated alone."""
    model = deep(kind)
    rows = examples()
    given: dict[str, Any] = {"args": args(tmp_path), "eval_dataset": rows[:4]}
    trainer = ExitTrainer(model, ExitHeads(model, EXITS), train_dataset=rows, **given)
    before = trainer.evaluate()
    found = trainer.predict(rows[4:]).predictions
    batch = {name: torch.stack([row[name] for row in rows[4:]]) for name in rows[0]}
    with torch.no_grad():
        wanted = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.tensor(found)[real], wanted[real], rtol=1e-4, atol=1e-4)
    after = trainer.evaluate()
    parts = [name for name in before if "exit" in name or "entropy" in name]
    assert len(parts) == 3 and all(before[name] == after[name] for name in parts)


def test_refusals(tmp_path: Path) -> None:
    model = deep()
    for wrong in ([], [4], [-1], [2, 1], [1, 1]):
        with pytest.raises(TersorError, match="name some from 0 to 3"):
            ExitHeads(model, wrong)
    with pytest.raises(TersorError, match="no heads can be made"):
        ExitHeads(tiny.model("bert"), [0])
    exits = ExitHeads(model, EXITS)
    how: dict[str, Any] = {"args": args(tmp_path), "train_dataset": examples()}
    with pytest.raises(TersorError, match="of another model"):
        ExitTrainer(deep(), exits, **how)
    with pytest.raises(TersorError, match="one of at least 0 for each"):
        ExitTrainer(model, exits, weights={0: 1.0}, **how)
    with pytest.raises(TersorError, match="full is -1"):
        ExitTrainer(model, exits, full=-1, **how)
    for other in (
        how | {"compute_loss_func": lambda *_: None},
        how | {"args": args(tmp_path, label_smoothing_factor=0.1)},
    ):
        with pytest.raises(TersorError, match="would replace the distillation loss"):
            ExitTrainer(model, exits, **other)
    mine = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TersorError, match="does not train the exit heads"):
        ExitTrainer(model, exits, optimizers=(mine, None), **how)
    both = torch.optim.SGD([*model.parameters(), *exits.parameters()], 0.1)
    ExitTrainer(model, exits, optimizers=(both, None), **how)
    with pytest.raises(TersorError, match="of another model"):
        EarlyExit(deep(), exits)
    with pytest.raises(TersorError, match="the threshold is 0"):
        EarlyExit(model, exits, 0)
    for prompt, count in (([], 4), ([1], 0)):
        with pytest.raises(TersorError, match="both must be"):
            EarlyExit(model, exits).generate(prompt, count)
    exits.save(tmp_path)
    with pytest.raises(TersorError, match="of other exit heads"):
        ExitHeads(model, [1]).restore(tmp_path)
    with pytest.raises(TersorError, match="is missing"):
        exits.restore(tmp_path / "absent")
    with pytest.raises(TersorError, match="name some from 0 to 0"):
        ExitHeads.load(tmp_path, deep(num_hidden_layers=2))
