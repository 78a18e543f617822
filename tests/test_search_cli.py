"""`tersor search` from the command line; and what it is worth on the trained demo model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tersor
import tiny
from conftest import all_cores
from tersor import cli, demo
from tersor.calibrate import Calibration
from tersor.demo_model import DemoModel
from tersor.evaluate import evaluate
from tersor.pipeline import quantize_checkpoint
from tersor.qweight import QSpec, Scheme
from tersor.search import Effort, Front, Space, run, search_checkpoint


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("cli")
    tiny.save(home / "model", dtype=torch.bfloat16)
    (home / "text.txt").write_text(tiny.text())
    return home


def search(home: Path, out: Path, *options: str) -> int:
    text = ["--calibration", str(home / "text.txt"), "--samples", "4", "--seq-len", "48"]
    model = ["search", str(home / "model"), "--out", str(out), "--held-out", "2", "--group", "32"]
    try:
        return cli.main([*model, *text, *options])
    except SystemExit as end:  # argparse
        return int(end.code or 0)


@pytest.fixture
def invented_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure", lambda shape, each, *_: [2.0] + [1.0] * len(each))


@pytest.mark.usefixtures("invented_latency")
def test_search_writes_a_model_and_its_front(
    home: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    options = ["--trials", "12", "--bits", "3", "8", "--pattern", "2:4", "--granularity", "input"]
    assert search(home, out, "--constraint", "size<=0.65x,latency<=0.9x", *options) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "chosen" in shown
    assert "models measured" in shown
    front = Front.read(out)
    assert front.settings["trials"] == 12
    assert front.constraints == ["size<=0.65x", "latency<=0.9x"]
    assert {str(each) for each in front.candidates} >= {"W3A16 2:4 by sparsegpt", "16 bits"}
    stored = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert front.written is not None
    assert stored > front.written["bytes"]
    assert tersor.load(out) is not None
    assert json.loads((out / "tersor_report.json").read_text())["settings"]["treatments"]


@pytest.mark.usefixtures("invented_latency")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--constraint", "size<=0.01x"], "the least size that these candidates reach is"),
        (["--constraint", "speed<=1x"], "'speed' cannot be bounded"),
        (["--constraint", "size<=0.5x", "--method", "rtn", "--pattern", "2:4"], "can prune; add"),
        (["--constraint", "size<=0.5x", "--bits", "5"], "invalid choice: 5"),
        (["--constraint", "size<=0.5x", "--trials", "some"], "give a whole number from 0"),
        (["--constraint", "size<=0.5x", "--sparsity", "1.5"], "a sparsity is between 0 and 1"),
        ([], "the following arguments are required: --constraint"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    home: Path, out: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search(home, out, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_text_is_needed(home: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["search", str(home / "model"), "--out", str(out), "--constraint", "size<=0.5x"]
    assert cli.main(arguments) == 2
    assert "give --calibration FILE" in capsys.readouterr().err


@pytest.mark.slow
def test_mixed_bits_beat_three_everywhere(
    demo_model: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the trained model, with not a byte more, calibrated on the same text, and judged on text
    that neither the calibration nor the search has seen."""
    monkeypatch.setattr(run, "measure", lambda shape, each, *_: [1.0] * (1 + len(each)))
    text = Calibration((str(demo_model.calibration),), samples=16, seq_len=demo.WINDOW)
    three = Scheme(QSpec(3))
    with all_cores():
        report = quantize_checkpoint(
            demo_model.folder, tmp_path / "three", scheme=three, calibration=text
        )
        front = search_checkpoint(
            *(demo_model.folder, tmp_path / "mixed", f"size<={report.bytes_after}b"),
            calibration=text,
            space=Space(bits=(2, 3, 4), keep=False),
            effort=Effort(trials=0, windows=2),
            progress=False,
        )
        models = {
            "original": demo.original(demo_model),
            "three": tersor.load(tmp_path / "three"),
            "mixed": tersor.load(tmp_path / "mixed"),
        }
        windows = demo.held_out_windows(demo_model)["code"][:40]
        qualities = evaluate(models, windows, "original", batch=8)
    assert front.written is not None
    assert front.written["bytes"] <= report.bytes_after
    mixed, uniform = qualities["mixed"].kl, qualities["three"].kl
    assert mixed is not None
    assert uniform is not None
    print(f"KL {mixed.mean:.5f} ± {mixed.error:.5f}, {uniform.mean:.5f} ± {uniform.error:.5f}")
    assert mixed.mean < uniform.mean


@pytest.mark.usefixtures("invented_latency")
def test_a_plot_that_cannot_be_drawn_blocks_nothing(
    home: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")

    def broken(*given: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(Front, "draw", broken)
    options = ["--trials", "0", "--bits", "3", "8", "--granularity", "block"]
    assert search(home, out, "--constraint", "size<=0.65x", *options) == 0
    assert "front.svg could not be drawn (no fonts)" in capsys.readouterr().out
    assert any("no fonts" in note for note in Front.read(out).notes)
    assert not out.with_name("out.search").exists()
