"""`tersor eval` where something cannot be measured, and where sentences break."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.table import Table

import tiny
from tersor import cli, tasks
from tersor import evaluate as evaluation
from tersor.commands.opening import console
from tersor.errors import TersorError
from tersor.tasks import Item, Task


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and a text."""
    home = tmp_path_factory.mktemp("eval")
    tiny.save(home / "model")
    tiny.save(home / "other", num_hidden_layers=1)
    (home / "text.txt").write_text(tiny.text())
    return home


def test_eval_keeps_what_was_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One task of three fails, and the speed: the rest is printed, what failed with its reason."""
    good = Item("ter so", (" ra", " min"), 0)
    made = [Task(name, (good,) * 2) for name in ("first", "second", "third")]
    monkeypatch.setattr(tasks, "local_tasks", lambda text: tuple(made))
    inner = tasks.run_tasks

    def failing(models: object, reads: object, given: tuple[Task, ...], *rest: object) -> object:
        if given[0].name == "second":
            raise MemoryError("no room\nat all")
        return inner(models, reads, given, *rest)  # type: ignore[arg-type]

    def no_speed(*given: object) -> None:
        raise TersorError("the clock has stopped")

    monkeypatch.setattr(tasks, "run_tasks", failing)
    monkeypatch.setattr(evaluation, "measure_speed", no_speed)
    arguments = ["eval", folder / "other", "--baseline", folder / "model", "--samples", "2"]
    arguments += ["--seq-len", "32", "--text", folder / "text.txt", "--tasks", "python", "--speed"]
    code = cli.main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 1
    reasons = {"speed": "the clock has stopped", "second": "MemoryError: no room\nat all"}
    for model in json.loads(out).values():
        assert model["quality"]["windows"] == 2
        assert model["tasks"].keys() == {"first", "third"}
        assert model["failed"] == reasons
    assert err.count("tersor: error: ") == err.count("\n") == 4
    assert f"{folder / 'other'}, second: MemoryError: no room at all" in err
    code = cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 1 and err.count("\n") == 4
    assert "perplexity" in out and "first" in out and "third" in out and "second" not in out
    with pytest.raises(TersorError, match="the clock has stopped"):
        cli.main([*map(str, arguments), "--debug"])


def test_sentences_are_lines_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = " ".join(["word"] * 60)
    wide = Table(*["heading"] * 3, title="a title")
    wide.add_row(sentence, sentence, sentence)
    console().print(sentence)
    assert capsys.readouterr().out == f"{sentence}\n"
    console().print(wide)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 4 and max(map(len, lines)) <= 160
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    console().print(sentence)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 40
