"""A corpus that a teacher writes: its text, its resumption, and what reads it."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

import tiny

pytest.importorskip("accelerate")

from tersor import Calibration, TersorError
from tersor.training import sequences
from tersor.training.sequences import CorpusRows, generate_corpus
from tersor.training.trainer import DistillTrainer
from test_distill_onpolicy import greedy
from test_distill_trainer import args

PROMPTS = ["terso ra", "min", "kalo pe du ni va", "so", "ra terter"]


def teacher(end: int | None = None) -> Any:
    model = tiny.model("llama", num_hidden_layers=1)
    model.generation_config.eos_token_id = model.config.eos_token_id = end
    return model


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_greedy_corpus(tmp_path: Path) -> None:
    """What each prompt alone would become, one token after the other."""
    tokenizer, model = tiny.tokenizer(), teacher()
    end = greedy(model, tokenizer("min")["input_ids"], 4)[2]
    model = teacher(end)
    out = generate_corpus(
        model, tokenizer, PROMPTS, tmp_path / "c.jsonl", new_tokens=6, temperature=0, batch=2
    )
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]
    for prompt, record in zip(PROMPTS, records(out), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        new = greedy(model, ids, 6, (end,))
        assert record["prompt"] == prompt and record["prompt_tokens"] == len(ids)
        assert record["ids"] == ids + new
        assert record["text"] == tokenizer.decode(ids + new, skip_special_tokens=True)
        assert record["ended"] == (new[-1] == end)
    assert any(record["ended"] for record in records(out))


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    """Killed after two batches and in the middle of a third, it ends with the same file."""
    tokenizer, model = tiny.tokenizer(), teacher()
    given: dict[str, Any] = {"new_tokens": 5, "samples": 2, "batch": 3, "seed": 1}
    whole = generate_corpus(model, tokenizer, PROMPTS, tmp_path / "whole.jsonl", **given)
    assert len({tuple(r["ids"]) for r in records(whole)}) > len(PROMPTS)
    plain, calls = sequences.complete, []

    def killed(*what: Any, **how: Any) -> Any:
        calls.append(what)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*what, **how)

    monkeypatch.setattr(sequences, "complete", killed)
    out = tmp_path / "again.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate_corpus(model, tokenizer, PROMPTS, out, **given)
    assert not out.exists()
    text = tmp_path / "again.jsonl.partial" / "text.jsonl"
    assert len(records(text)) == 6
    if cut:  # a kill in the middle of writing
        lines = text.read_bytes()
        text.write_bytes(lines[:-cut] if cut > 1 else lines + b'{"prompt": "ha')
    with pytest.raises(TersorError, match=r"other settings \(seed\)"):
        generate_corpus(model, tokenizer, PROMPTS, out, **(given | {"seed": 2}))
    calls.clear()
    monkeypatch.setattr(sequences, "complete", lambda *a, **k: calls.append(a) or plain(*a, **k))
    generate_corpus(model, tokenizer, PROMPTS, out, **given)
    assert len(calls) == (3 if cut > 1 else 2)  # of four batches
    assert out.read_bytes() == whole.read_bytes()


def test_stopped_after_the_last_batch(tmp_path: Path) -> None:
    tokenizer, model = tiny.tokenizer(), teacher()
    given: dict[str, Any] = {"new_tokens": 2, "batch": 2}
    out = generate_corpus(model, tokenizer, PROMPTS, tmp_path / "c.jsonl", **given)
    text = out.read_bytes()
    with pytest.raises(TersorError, match="exists already"):
        generate_corpus(model, tokenizer, PROMPTS, out, **given)
    other = generate_corpus(model, tokenizer, PROMPTS, tmp_path / "d.jsonl", **given)
    partial = tmp_path / "c.jsonl.partial"
    for named in (False, True):  # killed before, and after, the file got its name
        partial.mkdir()
        settings = sequences._settings(partial)
        assert settings is None
        _write_settings(model, tokenizer, partial, given)
        if not named:
            out.rename(partial / "text.jsonl")
        assert generate_corpus(model, tokenizer, PROMPTS, out, **given) == out
        assert out.read_bytes() == text == other.read_bytes() and not partial.exists()


def _write_settings(model: Any, tokenizer: Any, partial: Path, given: dict[str, Any]) -> None:
    """Those of an unfinished run, taken from one that is stopped before it writes anything."""

    class StopError(Exception):
        pass

    def stop(*what: Any, **how: Any) -> None:
        raise StopError

    plain = sequences.complete
    sequences.complete = stop
    try:
        with pytest.raises(StopError):
            generate_corpus(model, tokenizer, PROMPTS, partial.parent / "e.jsonl", **given)
    finally:
        sequences.complete = plain
    (partial.parent / "e.jsonl.partial" / "settings.json").rename(partial / "settings.json")


def test_what_reads_it(tmp_path: Path) -> None:
    """Calibration takes its text, and a Trainer its tokens, of which the prompt's do not count."""
    tokenizer, model = tiny.tokenizer(), teacher()
    out = generate_corpus(model, tokenizer, PROMPTS, tmp_path / "c.jsonl", new_tokens=12, batch=5)
    windows = Calibration((str(out),), samples=2, seq_len=16).windows(tokenizer)
    assert windows.shape == (2, 16)
    rows = CorpusRows(out, length=14)
    assert len(rows) == 5
    for row, record in zip(list(rows), records(out), strict=True):
        n = record["prompt_tokens"]
        assert row["input_ids"] == record["ids"][:14]
        assert row["labels"] == [-100] * n + record["ids"][n:14]
    assert len(CorpusRows(out, whole=True)) == 0
    shortest = min(record["prompt_tokens"] for record in records(out))
    assert len(CorpusRows(out, length=shortest + 1)) < 5
    tokenizer.pad_token = tokenizer.eos_token
    trainer = DistillTrainer(
        tiny.model("llama", num_hidden_layers=1, hidden_size=32),
        model,
        args=args(tmp_path / "t", max_steps=1),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["loss"]))


def test_a_name_with_a_slash(tmp_path: Path) -> None:
    out = generate_corpus(
        teacher(), tiny.tokenizer(), ["so"], f"{tmp_path}/c.jsonl/", new_tokens=2, temperature=0
    )
    assert out.is_file() and [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_refusals(tmp_path: Path) -> None:
    tokenizer, model = tiny.tokenizer(), teacher()
    out = tmp_path / "c.jsonl"
    for changes, message in (
        ({"new_tokens": 0}, "new_tokens is 0"),
        ({"samples": 0}, "samples is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"samples": 2, "temperature": 0}, "all samples are the same"),
        ({"prompts": "text"}, "a list of prompts"),
        ({"prompts": []}, "a list of prompts"),
        ({"prompts": [3]}, "prompt 0 is a int"),
        ({"out": tmp_path / "c.txt"}, "ends in .jsonl"),
        ({"tokenizer": tiny.tokenizer(bos=False), "prompts": ["a", ""]}, "prompt 1 has no tokens"),
        ({"teacher": tiny.model("bert")}, "writes no text"),
        (  # before the batches ahead of it are written
            {"teacher": tiny.model("opt"), "prompts": ["so"] * 9 + ["ra " * 70], "new_tokens": 5},
            "prompt 9 of .* beyond the model's 64 positions",
        ),
    ):
        given: dict[str, Any] = {
            "teacher": model,
            "tokenizer": tokenizer,
            "prompts": PROMPTS,
            "out": out,
        }
        with pytest.raises(TersorError, match=message):
            generate_corpus(**(given | changes))
    assert not list(tmp_path.iterdir())
    (tmp_path / "c.jsonl.partial").mkdir()
    with (tmp_path / "c.jsonl.partial" / "text.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TersorError, match="another run is writing"):
            generate_corpus(model, tokenizer, PROMPTS, out)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "no ids"}\n')
    with pytest.raises(TersorError, match="line 1 is none of generate_corpus"):
        CorpusRows(bad)
    with pytest.raises(TersorError, match="cannot read"):
        CorpusRows(tmp_path / "absent.jsonl")
    with pytest.raises(TersorError, match="length is 1"):
        CorpusRows(bad, length=1)
