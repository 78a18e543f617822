"""The whole pipeline on the demo model, with a training that is over at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("accelerate")
from tersor import TersorError, cli, demo_full
from tersor.loading import load_any
from tersor.recipes.run import RECIPE_PAGE, STAGES
from tersor.recipes.stages import RecipeReport
from tersor.steps import Train

if TYPE_CHECKING:
    from tersor.demo_model import DemoModel

SHORT = demo_full.Effort(steps=2, compared=2, batch=2, samples=8)


@pytest.mark.slow
def test_ten_times_smaller(demo_model: DemoModel, out: Path) -> None:
    said: list[str] = []
    report = demo_full.run(out, said.append, SHORT, demo_model)
    names = ["original", "1 slice", "2 shrink", "3 distill", "4 shrink", "5 qat", "6 quantize"]
    assert [stage.name for stage in report.stages] == names
    first, last = report.stages[0], report.stages[-1]
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert first.bytes >= 10 * last.bytes and first.bytes >= 10 * size
    assert last.bits_per_weight < 4.3
    assert all(0 <= stage.quality["code"]["kl"]["mean"] < 1 for stage in report.stages)
    assert report.to_json() == RecipeReport.read(out).to_json()
    assert (out / RECIPE_PAGE).exists() and len(list((out / STAGES).iterdir())) == 5
    assert sum(p.numel() for p in load_any(out).parameters()) < first.parameters
    printed = " ".join(said)
    assert all(part in printed for part in ("times smaller", "own codes:", "joint:"))
    with pytest.raises(TersorError, match="exists already"):
        demo_full.run(out, said.append, SHORT, demo_model)


def test_both_ways_take_the_same_steps() -> None:
    effort = demo_full.Effort()
    for steps in (demo_full.sequential(effort), demo_full.joint(effort)):
        assert sum(step.steps for step in steps if isinstance(step, Train)) == effort.compared


def test_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--out", "x"], ["--full", "--json", str(tmp_path / "x")]):
        assert cli.main(["demo", *options]) == 2
    err = capsys.readouterr().err
    assert "--out is of demo --full" in err and "leave --json out" in err
