"""What a run of a recipe keeps of figures, times and its page, whatever fails or stops it."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import tiny

pytest.importorskip("accelerate")
from tersor import TersorError, cli, shards
from tersor.commands.recipe import table
from tersor.evaluate import evaluate
from tersor.linear import QuantLinear
from tersor.loading import load_any
from tersor.recipes import facts
from tersor.recipes import run as running
from tersor.recipes.recipe import Evaluate, Recipe
from tersor.recipes.run import RECIPE_PAGE, compress
from tersor.recipes.stages import RECIPE_REPORT, RecipeReport
from tersor.steps import Prune, Quantize, Step
from test_recipes import Stop, stopping


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and two texts."""
    home = tmp_path_factory.mktemp("figures")
    tiny.save(home / "model", "llama")
    (home / "text.txt").write_text(tiny.text())
    (home / "held").mkdir()
    (home / "held" / "out.txt").write_text(tiny.text(seed=3))
    return home


def test_an_evaluation_that_fails_loses_nothing(
    home: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fourth measurement, the second text of the quantized model, fails: the first three and
    the model are kept, and the next run makes only the fourth."""
    texts = {"a": str(home / "text.txt"), "b": str(home / "held" / "out.txt")}
    recipe = Recipe(
        (Quantize(method="rtn", group=32),), evaluate=Evaluate(texts, seq_len=32, samples=2)
    )
    calls: list[int] = []

    def failing(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise TersorError("its logits hold NaN")
        return evaluate(*given, **named)

    monkeypatch.setattr(facts, "evaluate", failing)
    partial = out.with_name("out.partial")
    with pytest.raises(TersorError, match="1 quantize cannot be measured: its logits hold NaN; "):
        compress(home / "model", out, recipe)
    stages = json.loads((partial / "recipe.json").read_text())["stages"]
    assert [list(stage["quality"]) for stage in stages] == [["a", "b"], ["a"]]
    monkeypatch.setattr(Step, "__call__", lambda *a, **k: pytest.fail("the step was run again"))
    report = compress(home / "model", out, recipe)
    assert len(calls) == 5
    assert [list(stage.quality) for stage in report.stages] == [["a", "b"]] * 2
    assert report.stages[-1].seconds is not None and report.stages[-1].seconds > 0


def test_the_time_of_an_interrupted_step_is_unknown(
    home: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was done when the run was stopped, and one that was stopped itself."""
    recipe = Recipe((Quantize(method="rtn", group=32),))
    monkeypatch.setattr(running, "measure_size", stopping(running, "measure_size", 2, True))
    with pytest.raises(Stop):
        compress(home / "model", out, recipe)
    monkeypatch.undo()
    last = compress(home / "model", out, recipe).stages[-1]
    assert last.seconds is None and last.peak_bytes == 0
    shown = io.StringIO()
    Console(width=160, file=shown).print(table(RecipeReport.read(out)))
    assert "unknown" in shown.getvalue()
    assert "<td>unknown</td>" in (out / RECIPE_PAGE).read_text()

    other = out.with_name("other")
    monkeypatch.setattr(
        shards.ShardWriter, "finish", stopping(shards.ShardWriter, "finish", 1, True)
    )
    with pytest.raises(Stop):
        compress(home / "model", other, recipe)
    monkeypatch.undo()
    assert compress(home / "model", other, recipe).stages[-1].seconds is None
    third = compress(home / "model", out.with_name("third"), recipe).stages[-1]
    assert third.seconds is not None and third.peak_bytes > 0


def test_a_page_that_cannot_be_drawn_blocks_nothing(
    home: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*given: Any) -> None:
        raise ImportError("numpy.core.multiarray failed to import")

    file = home / "rtn.yaml"
    file.write_text("steps: [quantize: {method: rtn, group: 32}]")
    command = ["compress", str(home / "model"), "--out", str(out), "--recipe", str(file)]
    monkeypatch.setattr(running, "write_page", broken)
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "no page: ImportError: numpy.core.multiarray failed to import; once that is men" in said
    assert not out.with_name("out.partial").exists()
    assert load_any(out) is not None
    assert RecipeReport.read(out).no_page and not (out / RECIPE_PAGE).exists()
    assert cli.main(command) == 2
    assert "is whole but for its page (ImportError" in capsys.readouterr().err
    monkeypatch.undo()
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(TersorError, match="exists already"):  # of another recipe
        compress(home / "model", out, Recipe((Quantize(method="rtn", bits=3, group=32),)))
    assert cli.main(command) == 0
    assert (out / RECIPE_PAGE).exists() and not RecipeReport.read(out).no_page
    assert (out / "model.safetensors").read_bytes() == before
    assert cli.main(command) == 2
    assert "exists already" in capsys.readouterr().err


def test_bits_and_zeros_are_of_all_linears(home: Path, out: Path) -> None:
    """Those that stay in 16 bits (here 32) count as what they are; bytes are those of the files."""
    prune = Prune(method="magnitude", sparsity=0.5, ignore=("*.q_proj",))
    ignored = ("*.down_proj", "*.k_proj")
    steps = (prune, Quantize(method="rtn", group=32, ignore=ignored))
    *_, last = compress(home / "model", out, Recipe(steps)).stages
    bits = weights = zeros = 0.0
    stored = load_file(out / "model.safetensors")
    for name, module in load_any(out).model.layers.named_modules():
        if isinstance(module, (QuantLinear, torch.nn.Linear)):
            quantized = isinstance(module, QuantLinear)
            w = module.qweight().dequantize() if quantized else module.weight
            weights, zeros = weights + w.numel(), zeros + int((w == 0).sum())
            of = [t for key, t in stored.items() if key.startswith(f"model.layers.{name}.")]
            bits += 8 * sum(tensor.nbytes for tensor in of)
    assert last.bits_per_weight == pytest.approx(bits / weights, rel=1e-9)
    assert last.sparsity == pytest.approx(zeros / weights, rel=1e-9)
    assert last.bits_per_weight > 8  # where 4.5 are those of the quantized ones alone


def test_one_run_at_a_time(home: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the lock that shards have, which knows file systems without locks."""
    recipe = Recipe((Quantize(method="rtn", group=32),))
    partial = out.with_name("out.partial")
    partial.mkdir()
    held = shards.lock_folder(partial)
    with pytest.raises(TersorError, match="another run is writing"):
        compress(home / "model", out, recipe)
    os.close(held)

    def none(*given: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(shards.fcntl, "flock", none)
    with pytest.warns(UserWarning, match="cannot be locked"):
        compress(home / "model", out, recipe)
    assert (out / RECIPE_REPORT).exists()


def test_strict_counts_for_what_is_done_already(
    home: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe((Quantize(method="rtn", group=32),))
    monkeypatch.setattr(running, "_draw", stopping(running, "_draw", 1, True))
    with pytest.raises(Stop):
        compress(home / "model", out, recipe)
    monkeypatch.undo()
    journal = out.with_name("out.partial") / "recipe.json"
    content = json.loads(journal.read_text())
    content["stages"][1]["notes"] = ["model.layers.0.mlp.up_proj: no token: reached it"]
    journal.write_text(json.dumps(content))
    with pytest.raises(TersorError, match=r"not treated as asked \(model.*: no token: reached it"):
        compress(home / "model", out, recipe, strict=True)
    assert compress(home / "model", out, recipe).stages[1].notes
