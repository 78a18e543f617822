"""Mixtures: shares hold at any time, resume row for row, and can follow the gap to the teacher."""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

import tiny

pytest.importorskip("accelerate")

from tersor import TersorError
from tersor.training.mixture import FollowGap, Mixture
from tersor.training.on_policy import OnPolicy
from tersor.training.trainer import DistillTrainer
from test_distill_trainer import args, weights

SIZES = {"code": 40, "prose": 10, "mail": 3}


def numbered(sizes: dict[str, int] = SIZES) -> dict[str, list[tuple[str, int]]]:
    return {name: [(name, i) for i in range(size)] for name, size in sizes.items()}


def first(mixture: Mixture, count: int) -> list[Any]:
    return list(itertools.islice(iter(mixture), count))


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (3, 0, 1), (1, 1, 1), (0.98, 0.01, 0.01)])
def test_shares_of_rows(shares: tuple[float, ...]) -> None:
    """After any number of rows no source is a row or more from its share, up to as many sources."""
    sources = numbered()
    weighted = zip(sources.items(), shares, strict=True)
    mixture = Mixture({name: (rows, share) for (name, rows), share in weighted})
    seen: Counter[str] = Counter()
    for count, (name, _) in enumerate(first(mixture, 400), 1):
        seen[name] += 1
        for each, share in zip(sources, shares, strict=True):
            assert abs(seen[each] - count * share / sum(shares)) < 1 + 1e-9, (count, each)
    assert mixture.drawn == {name: seen[name] for name in sources}


def test_every_row_once_a_pass() -> None:
    mixture = Mixture({name: (rows, 1) for name, rows in numbered().items()}, seed=1)
    rows = first(mixture, 3 * 40)
    for name, size in SIZES.items():
        mine = [i for each, i in rows if each == name]
        passes = [mine[k : k + size] for k in range(0, 40, size)]
        assert all(sorted(each) == list(range(size)) for each in passes if len(each) == size)
    prose = [i for each, i in rows if each == "prose"]
    assert prose[:10] != prose[10:20] and prose[:10] != list(range(10))
    assert first(mixture, 50) == rows[:50]
    other = Mixture({name: (rows, 1) for name, rows in numbered().items()}, seed=2)
    assert first(other, 50) != rows[:50]


def test_shares_of_tokens() -> None:
    """Rows differ in length; padding does not count."""
    draw = torch.Generator().manual_seed(0)
    long, short = [], []
    for rows, most in ((long, 30), (short, 5)):
        for size in torch.randint(1, most, (20,), generator=draw).tolist():
            mask = torch.zeros(40, dtype=torch.int64)
            mask[:size] = 1
            rows.append({"input_ids": torch.zeros(40), "attention_mask": mask, "name": most})
    mixture = Mixture({"long": (long, 0.25), "short": (short, 0.75)}, by="tokens")
    seen: Counter[int] = Counter()
    for row in first(mixture, 500):
        seen[row["name"]] += int(row["attention_mask"].sum())
        assert abs(seen[30] - 0.25 * seen.total()) <= 30
    assert mixture.drawn == {"long": seen[30], "short": seen[5]}
    plain = Mixture({"a": [{"input_ids": [1, 2, 3]}], "b": [{"input_ids": [1]}]}, by="tokens")
    sizes = Counter(len(row["input_ids"]) for row in first(plain, 120))
    assert abs(sizes[1] - 90) <= 1  # two sources weigh the same: three short rows for a long one


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1e6])
def test_weights_by_size(temperature: float) -> None:
    mixture = Mixture(numbered(), temperature=temperature)
    raw = {name: size ** (1 / temperature) for name, size in SIZES.items()}
    for name, share in mixture.weights.items():
        assert share == pytest.approx(raw[name] / sum(raw.values()))


def test_a_low_temperature_takes_the_largest_alone() -> None:
    mixture = Mixture(numbered(), temperature=0.001)
    largest = max(SIZES, key=lambda name: SIZES[name])
    assert mixture.weights == {name: float(name == largest) for name in SIZES}


def test_changes_and_workers() -> None:
    mixture = Mixture({name: (rows, 1) for name, rows in numbered().items()})
    mixture.reweigh({"code": 0, "prose": 0, "mail": 1}, 30)
    rows = first(mixture, 60)
    assert {name for name, _ in rows[:30]} == set(SIZES)
    assert {name for name, _ in rows[30:]} == {"mail"}
    with pytest.raises(TersorError, match="row 59 of the mixture has been given"):
        mixture.reweigh({"code": 1, "prose": 1, "mail": 1}, 59)
    loader = DataLoader(mixture, batch_size=None, num_workers=2)
    assert [tuple(row) for row in itertools.islice(iter(loader), 40)] == rows[:40]


def labelled(kind: str, count: int = 12) -> list[dict[str, Tensor]]:
    low, high = {"low": (2, 60), "high": (100, 160)}[kind]
    ids = torch.randint(low, high, (count, 10), generator=torch.manual_seed(low))
    return [{"input_ids": row, "labels": row} for row in ids]


def held_out() -> dict[str, Tensor]:
    return {
        kind: torch.stack([row["input_ids"] for row in labelled(kind, 3)])
        for kind in ("low", "high")
    }


def make(
    folder: Path, own: OnPolicy | None = None, **changes: Any
) -> tuple[DistillTrainer, FollowGap]:
    mixture = Mixture({kind: (labelled(kind), 0.5) for kind in ("low", "high")}, by="tokens")
    teacher = tiny.model("llama")
    student = copy.deepcopy(teacher)
    with torch.no_grad():  # a student that knows nothing of one source
        student.model.embed_tokens.weight[100:].mul_(-1)
    follow = FollowGap(mixture, teacher, held_out(), every=2, strength=0.5, least=0.2, batch=2)
    settings = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "sgd",
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 3,
    }
    how = args(folder, **(settings | changes))
    given: dict[str, Any] = {"args": how, "train_dataset": mixture, "callbacks": [follow]}
    trainer = DistillTrainer(student, teacher, on_policy=own, **given)
    return trainer, follow


def test_follows_the_gap(tmp_path: Path) -> None:
    """Shares are those of the published rule, from KLs of plain float64."""
    trainer, follow = make(tmp_path)
    wanted = {}
    for kind, ids in held_out().items():
        with torch.no_grad():
            q, p = (
                model.double()(ids).logits[:, :-1].softmax(-1)
                for model in (trainer.model, trainer.teacher)
            )
        wanted[kind] = float((p * (p / q).log()).sum(-1).mean())
        trainer.model.float(), trainer.teacher.float()
    assert follow.gaps(trainer.model) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    trainer.train()
    found = [entry["mixture"] for entry in trainer.state.log_history if "mixture" in entry]
    assert [entry["from_row"] for entry in found] == [9, 15]  # two steps of three rows, and one
    shares = {"low": 0.5, "high": 0.5}
    for entry in found:
        grown = {k: shares[k] * math.exp(0.5 * entry["gaps"][k]) for k in shares}
        total = sum(grown.values())
        shares = {k: 0.2 * 0.5 + 0.8 * grown[k] / total for k in shares}
        assert entry["shares"] == pytest.approx(shares)
        assert entry["gaps"]["high"] > entry["gaps"]["low"]
    assert shares["high"] > 0.5
    assert follow.mixture.weights == found[-1]["shares"]
    assert trainer.model.training


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume(tmp_path: Path, accumulation: int) -> None:
    """Row for row and share for share, from a checkpoint on."""

    def run(folder: str, since: str | None) -> DistillTrainer:
        trainer, _ = make(tmp_path / folder, gradient_accumulation_steps=accumulation)
        trainer.train(resume_from_checkpoint=since)
        return trainer

    whole = run("whole", None)
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-4"))
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=0)
    logs = [
        [entry for entry in t.state.log_history if "mixture" in entry or "loss" in entry]
        for t in (whole, resumed)
    ]
    assert logs[0] == logs[1]


def test_refusals(tmp_path: Path) -> None:
    rows = numbered()
    for sources, message in (
        ({}, "at least one"),
        ({"a": ([], 1)}, "a is empty"),
        ({"a": (rows["code"], 1), "b": rows["mail"]}, "b has no weight"),
        ({"a": (rows["code"], -1)}, "at least 0"),
        ({"a": (rows["code"], 0), "b": (rows["mail"], 0)}, "not all of them 0"),
        ({"a": (rows["code"], float("nan"))}, "at least 0"),
        ({"a": iter(rows["code"])}, "without length"),
    ):
        with pytest.raises(TersorError, match=message):
            Mixture(sources)
    with pytest.raises(TersorError, match="give it or weights"):
        Mixture({"a": (rows["code"], 1)}, temperature=2.0)
    with pytest.raises(TersorError, match="the temperature is 0"):
        Mixture(rows, temperature=0)
    with pytest.raises(TersorError, match='"rows" or "tokens"'):
        Mixture(rows, by="bytes")
    with pytest.raises(TersorError, match="a row has no input_ids"):
        first(Mixture(rows, by="tokens"), 1)
    with pytest.raises(TersorError, match="weights are for code"):
        Mixture(rows).reweigh({"code": 1}, 0)
    mixture = Mixture({kind: (labelled(kind), 1) for kind in ("low", "high")})
    teacher = tiny.model("llama")
    for given, message in (
        ({"rows": {"low": held_out()["low"]}}, "give some for each"),
        ({"rows": held_out() | {"high": torch.zeros(3)}}, "rows of high are torch.float32"),
        ({"every": 0}, "every is 0"),
        ({"strength": -1.0}, "strength is -1.0"),
        ({"least": 1.5}, "least 1.5"),
    ):
        with pytest.raises(TersorError, match=message):
            FollowGap(mixture, teacher, **({"rows": held_out()} | given))
    trainer, _ = make(tmp_path, dataloader_num_workers=1)
    with pytest.raises(TersorError, match="set dataloader_num_workers=0"):
        trainer.train()
    trainer, follow = make(tmp_path / "padded")
    follow.teacher = tiny.model("llama", vocab_size=192)
    with pytest.raises(TersorError, match="has 160 tokens and the teacher's 192, and FollowGap"):
        trainer.train()
    assert trainer.state.global_step == 0


def train(folder: Path, processes: int) -> None:
    """Six steps of four rows in all; writes the weights, and what was logged of the shares."""
    trainer, follow = make(
        folder,
        OnPolicy(share=0.5, new_tokens=5, temperature=0, prompt_tokens=3),
        per_device_train_batch_size=4 // processes,
        ddp_backend="gloo" if processes > 1 else None,
        save_strategy="no",
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        shares = torch.tensor([list(share.values()) for _, share in follow.mixture.changes])
        rows = torch.tensor([row for row, _ in follow.mixture.changes])
        own = sum("cross_entropy" not in log for log in trainer.state.log_history if "loss" in log)
        assert 0 < own < 6
        found = weights(trainer.model) | {"shares": shares, "rows": rows}
        save_file(found, folder / "result.safetensors")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """The same rows in the same steps, shares that follow the same gaps, and the student's own text
    in the same batches."""
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}", __file__, str(folder), str(processes)]
        subprocess.run(command, check=True, timeout=300, capture_output=True)
        found.append(load_file(folder / "result.safetensors"))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert found[0]["rows"].tolist() == [0, 12, 20]


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
