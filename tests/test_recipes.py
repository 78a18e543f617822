"""Recipes: read, checked, run, interrupted and run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny

pytest.importorskip("accelerate")
from tersor import TersorError, cli
from tersor.calibrate import Calibration
from tersor.evaluate import evaluate
from tersor.loading import load_any
from tersor.recipes import run as running
from tersor.recipes.recipe import Evaluate, Recipe
from tersor.recipes.run import RECIPE_PAGE, STAGES, compress
from tersor.recipes.stages import RECIPE_REPORT, RecipeReport
from tersor.report import REPORT
from tersor.solvers import RTN
from tersor.steps import Prune, Quantize, Shrink, Step

SHORT = "steps: 3, batch: 2, learning_rate: 1.0e-3"
FULL = f"""
calibration: {{sources: [text.txt], samples: 8, seq_len: 32}}
evaluate: {{text: {{prose: held/out.txt}}, seq_len: 32, samples: 4}}
steps:
  - shrink: {{ffn: 0.3, multiple: 32}}
  - distill: {{{SHORT}, temperature: 2.0}}
  - export: {{folder: distilled}}
  - prune: {{pattern: "2:4"}}
  - evaluate: {{text: text.txt, seq_len: 32, samples: 2, speed: true}}
  - qat: {{{SHORT}, bits: 4, group: 32}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two texts and a recipe."""
    home = tmp_path_factory.mktemp("recipe")
    tiny.save(home / "model", "llama")
    (home / "text.txt").write_text(tiny.text())
    (home / "held").mkdir()
    (home / "held" / "out.txt").write_text(tiny.text(seed=3))
    (home / "recipe.yaml").write_text(FULL)
    return home


@pytest.fixture(scope="module")
def done(home: Path) -> Path:
    """What the recipe makes."""
    compress(home / "model", home / "done", home / "recipe.yaml")
    return home / "done"


def parse(text: str, home: Path) -> Recipe:
    path = home / "other.yaml"
    path.write_text(text)
    return Recipe.read(path)


# --- checked before the first step ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("[quantize: {group: 32}, prune: {pattern: '2:4'}]", "step 2, prune: .* W4A16 codes"),
        ("[prune: {pattern: '2:4'}, shrink: {ffn: 0.5}]", "step 2, shrink: .*put shrink before"),
        ("[quantize: {group: 32}, qat: {group: 32}]", "step 2, qat: qat cannot follow quantize"),
        ("[quantize: {group: 32}, quantize: {bits: 3}]", "step 2, quantize"),
        ("[quantize]", "step 1, quantize: group 128 does not divide"),
        ("[qat]", "step 1, qat: group 128 does not divide"),
        ("[prune: {pattern: '2:128'}]", "step 1, prune: the pattern 2:128 does not divide"),
        ("[quantize: {group: 32, bits: 5}]", "step 1, quantize: bits must be one of"),
        ("[shrink: {heads: 0.1}]", "step 1, shrink: "),
        ("[distill: {steps: 0}]", "step 1, distill: steps is a whole number"),
        ("[distill: {loss: love}]", "step 1, distill: there is no loss"),
        ("[distill: {teacher: none}]", "step 1, distill: "),
        ("[distill: {teacher: other}]", "has a vocabulary of 320 tokens and the model one of 160"),
        ("[distill: {text: empty.txt}]", "step 1, distill: .*is empty"),
        ("[distill: {batch: 100000}]", "step 1, distill: the text has .*fewer than the 100000"),
        (f"[distill: {{steps: {10**24}}}]", r"steps is a whole number from 1 to 2\*\*31 - 1"),
        ("[distill: {learning_rate: 1000}]", "learning_rate is from 0 to 10"),
        ("[prune: {sparsity: 0.3}, distill: {optimizer: lomo}]", "step 2, distill: the optimizer"),
        ("[shrink: {layers: [0, 0]}]", "layers names each block once"),
        ("[shrink: {ffn: 0.3}, evaluate: {text: gone.txt}]", "step 2, evaluate: "),
        ("[shrink: {ffn: 0.3}, evaluate: {text: empty.txt}]", "does not fill one window"),
        ("[shrink: {ffn: 0.3}, evaluate: {text: text.txt, seq_len: 999}]", "beyond the model's 64"),
        ("[export: {folder: a}, shrink: {ffn: 0.3}]", "nothing to export before the first step"),
        (
            "[evaluate: {speed: true}, export: {folder: a}, shrink: {ffn: 0.3}]",
            "nothing to export before the first step",
        ),
        ("[shrink: {ffn: 0.3}, export: {folder: a}]", "step 2, export: .*is the output itself"),
        (
            "[shrink: {ffn: 0.3}, export: {folder: a}, export: {folder: b}, quantize: {group: 32}]",
            "a is the same model",
        ),
        (
            "[shrink: {ffn: 0.3}, export: {folder: a}, distill, export: {folder: a}, prune: "
            "{sparsity: 0.5}]",
            "a is the name of two models",
        ),
        (
            "[shrink: {ffn: 0.3}, export: {folder: 3-distill}, distill, prune: {sparsity: 0.5}]\n"
            "keep: all",
            "3-distill is the name of two models",
        ),
        ("[shrink: {layers: 1}, distill, quantize]", "step 3, quantize: group 128 does not divide"),
        ("[shrink: {layers: 1}, qat: {ignore: ['*.nope']}]", "step 2, qat: .*matches no module"),
        ("[distill: {teacher: null}]", "distill learns from a teacher"),
        ("[qat: {group: 32, teacher: null, alpha: 0.5}]", "are of a teacher's predictions"),
        (
            "[evaluate: {text: {x: text.txt}, seq_len: 32}, evaluate: {text: {x: held/out.txt}, "
            "seq_len: 32}, shrink: {ffn: 0.3}]",
            "two texts to evaluate on are called x",
        ),
    ],
)
def test_errors_before_the_first_step(
    home: Path, out: Path, monkeypatch: pytest.MonkeyPatch, steps: str, message: str
) -> None:
    (home / "empty.txt").touch()
    if not (home / "other").exists():
        tiny.save(home / "other", "llama", vocab_size=320)
    monkeypatch.setattr(Step, "__call__", lambda *given, **named: pytest.fail("a step was run"))
    text = f"calibration: {{sources: text.txt, seq_len: 32}}\nsteps: {steps}"
    with pytest.raises(TersorError, match=message):
        compress(home / "model", out, parse(text, home))
    assert not list(out.parent.iterdir())


def test_text_is_asked_for(home: Path, out: Path) -> None:
    with pytest.raises(TersorError, match="step 1, prune: it needs text; give --calibration"):
        compress(home / "model", out, Recipe((Prune(pattern="2:4"),)))
    with pytest.raises(TersorError, match="step 1, quantize: it needs text"):
        compress(home / "model", out, Recipe((Quantize(group=32),)))
    report = compress(home / "model", out, Recipe((Quantize(method="rtn", group=32),)))
    assert [stage.name for stage in report.stages] == ["original", "1 quantize"]


# --- running -------------------------------------------------------------------------------------


def test_the_stages(home: Path, done: Path) -> None:
    report = RecipeReport.read(done)
    names = ["original", "1 shrink", "2 distill", "4 prune", "6 qat"]
    assert [stage.name for stage in report.stages] == names
    original, shrunk, distilled, pruned, trained = report.stages
    assert original.parameters == sum(p.numel() for p in load_any(home / "model").parameters())
    assert shrunk.parameters == distilled.parameters == trained.parameters < original.parameters
    assert (original.sparsity, distilled.sparsity) == (0, 0)
    assert pruned.sparsity == 0.5 and trained.sparsity >= 0.5
    assert pruned.bits_per_weight == 32 and 4 < trained.bits_per_weight < 5.1
    assert [len(stage.losses) for stage in report.stages] == [0, 0, 3, 0, 3]
    assert {layer["method"] for layer in trained.layers} == {"qat"}
    files = [path.stat().st_size for path in done.glob("*.safetensors")]
    assert trained.bytes < sum(files) < trained.bytes + 20_000
    assert (done / RECIPE_PAGE).exists() and (done / REPORT).exists()
    assert [path.name for path in (done / STAGES).iterdir()] == ["distilled"]
    assert not done.with_name("done.partial").exists()


def test_what_is_measured_is_what_evaluation_says(home: Path, done: Path) -> None:
    report = RecipeReport.read(done)
    first, *_, last = report.stages
    assert first.quality["prose"]["kl"]["mean"] == 0
    assert [sorted(stage.quality) for stage in report.stages] == [
        ["prose", "text"],
        ["prose"],
        ["prose"],
        ["prose", "text"],
        ["prose"],
    ]
    assert [stage.speed is None for stage in report.stages] == [False, True, True, False, True]
    recipe = Recipe.read(home / "recipe.yaml")
    from tersor.recipes.checks import check

    windows = check(recipe, home / "model").windows[0]["prose"]
    assert windows.shape == (4, 32)
    models = {"original": load_any(home / "model"), "last": load_any(done)}
    found = evaluate(models, windows, "original")["last"]
    assert found.kl is not None
    assert last.quality["prose"]["kl"]["mean"] == pytest.approx(found.kl.mean, rel=1e-5)
    exported = load_any(done / STAGES / "distilled")
    assert exported(windows).logits.isfinite().all()


def test_steps_one_by_one_give_the_same(home: Path, done: Path, tmp_path: Path) -> None:
    text = Calibration((str(home / "text.txt"),), samples=8, seq_len=32)
    model = home / "model"
    for number, step in enumerate(Recipe.read(home / "recipe.yaml").steps):
        if isinstance(step, Step):
            made = step.learns_from(home / "model") if hasattr(step, "learns_from") else step
            made(model, tmp_path / str(number), text)
            model = tmp_path / str(number)
    for path in model.glob("*.safetensors"):
        assert path.read_bytes() == (done / path.name).read_bytes()


class Stop(BaseException):
    pass


def stopping(module: Any, name: str, at: int, before: bool) -> Callable[..., Any]:
    """The function of that name, which stops the run the `at`-th time, before or after it works."""
    inner, count = getattr(module, name), [0]

    def function(*given: Any, **named: Any) -> Any:
        count[0] += 1
        if before and count[0] == at:
            raise Stop
        result = inner(*given, **named)
        if count[0] == at:
            raise Stop
        return result

    return function


@pytest.mark.parametrize(
    ("where", "name", "at", "before"),
    [
        (running, "measure_size", 1, True),
        (running, "measure_size", 3, False),
        (running, "measure_quality", 4, True),
        (running.shutil, "rmtree", 1, True),
        (running.shutil, "rmtree", 1, False),
        (running.os, "rename", 2, True),  # the steps' own: one each
        (running.os, "rename", 5, True),  # those that put the output together
        (running.os, "rename", 5, False),
        (running.os, "rename", 6, False),
        (running.os, "rename", 7, False),
        (running._Journal, "clear", 1, True),
    ],
)
def test_a_run_that_is_stopped_goes_on(
    home: Path, done: Path, out: Path, monkeypatch: pytest.MonkeyPatch,
    where: Any, name: str, at: int, before: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(where, name, stopping(where, name, at, before))
    with pytest.raises(Stop):
        compress(home / "model", out, home / "recipe.yaml")
    monkeypatch.undo()
    calls = []
    step = Step.__call__
    monkeypatch.setattr(
        Step, "__call__", lambda self, *a, **k: calls.append(self.name) or step(self, *a, **k)
    )
    again = compress(home / "model", out, home / "recipe.yaml")
    assert len(calls) < 4 or (where, name, at) == (running, "measure_size", 1)
    assert [stage.name for stage in again.stages] == [
        stage.name for stage in RecipeReport.read(done).stages
    ]
    assert not out.with_name("out.partial").exists()
    for file in ("model.safetensors", f"{STAGES}/distilled/model.safetensors"):
        assert (out / file).read_bytes() == (done / file).read_bytes()


def test_another_recipe_does_not_go_on(
    home: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe((Quantize(method="rtn", group=32), Evaluate(speed=True)))
    monkeypatch.setattr(running, "measure_quality", stopping(running, "measure_quality", 1, True))
    with pytest.raises(Stop):
        compress(home / "model", out, recipe)
    monkeypatch.undo()
    other = Recipe((Quantize(method="rtn", bits=3, group=32), Evaluate(speed=True)))
    with pytest.raises(TersorError, match=r"another steps; .*rm -r"):
        compress(home / "model", out, other)
    compress(home / "model", out, recipe)
    with pytest.raises(TersorError, match="exists already"):
        compress(home / "model", out, recipe)


def test_a_training_on_other_text_does_not_go_on(
    home: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, teacher = home / "own.txt", home / "teacher"
    own.write_text(tiny.text(seed=5))
    tiny.save(teacher, "llama")
    recipe = parse(
        "calibration: {sources: text.txt, seq_len: 32, samples: 4}\nsteps: [distill: {steps: 1, "
        "batch: 2, text: own.txt, teacher: teacher}, quantize: {method: rtn, group: 32}]", home,
    )  # fmt: skip
    monkeypatch.setattr(Quantize, "__call__", stopping(Quantize, "__call__", 1, True))
    with pytest.raises(Stop):
        compress(home / "model", out, recipe)
    monkeypatch.undo()
    own.write_text(tiny.text(seed=6))
    with pytest.raises(TersorError, match="unfinished run with another training"):
        compress(home / "model", out, recipe)
    own.write_text(tiny.text(seed=5))
    tiny.save(teacher, "llama", rms_norm_eps=1e-4)
    with pytest.raises(TersorError, match="unfinished run with another training"):
        compress(home / "model", out, recipe)
    tiny.save(teacher, "llama")
    compress(home / "model", out, recipe)


def test_what_is_done_is_not_thrown_away(
    home: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first step that is whole, and not yet measured; and an output that somebody else made."""
    held = Evaluate({"held": str(home / "held" / "out.txt")}, seq_len=32, samples=2)
    recipe = Recipe((Quantize(method="rtn", group=32),), evaluate=held)
    monkeypatch.setattr(running, "measure_quality", stopping(running, "measure_quality", 2, True))
    with pytest.raises(Stop):
        compress(home / "model", out, recipe)
    monkeypatch.undo()
    partial = out.with_name("out.partial")
    assert (partial / "1-quantize").exists()
    other = Evaluate({"held": str(home / "text.txt")}, seq_len=32, samples=2)
    with pytest.raises(TersorError, match="unfinished run with another evaluation"):
        compress(home / "model", out, Recipe(recipe.steps, evaluate=other))
    assert (partial / "1-quantize").exists()
    faster = Recipe(recipe.steps, evaluate=Evaluate(held.text, 2, 32, speed=True))
    with pytest.raises(TersorError, match="unfinished run with another speed"):
        compress(home / "model", out, faster)

    monkeypatch.setattr(running.os, "rename", stopping(running.os, "rename", 1, True))
    with pytest.raises(Stop):
        compress(home / "model", out, recipe)
    monkeypatch.undo()
    out.mkdir()
    with pytest.raises(TersorError, match="exists already"):
        compress(home / "model", out, recipe)
    assert (partial / "1-quantize").exists()
    out.rmdir()
    assert compress(home / "model", out, recipe).stages[-1].quality["held"]


def test_a_solver_of_ones_own(home: Path, out: Path) -> None:
    recipe = Recipe((Quantize(method=RTN(clip=True), group=32), Evaluate(speed=True)))
    report = compress(home / "model", out, recipe)
    assert report.steps[0] == {
        "quantize": {"method": "RTN(clip=True, two_level=False)", "group": 32}
    }
    with pytest.raises(TersorError, match="a solver of its own"):
        recipe.to_yaml()


def test_compared_with_another_model(home: Path, out: Path) -> None:
    step = Shrink(ffn=0.3, multiple=32, update="none", importance="magnitude")
    step(home / "model", home / "cut")
    held = Evaluate(str(home / "held" / "out.txt"), seq_len=32, samples=2)
    steps = (Quantize(method="rtn", group=32),)
    recipe = Recipe(steps, evaluate=held)
    first, last = compress(home / "cut", out, recipe, original=home / "model").stages
    assert first.name == "model" and first.quality["out"]["kl"]["mean"] > 0
    from tersor.recipes.checks import check

    windows = check(recipe, home / "model").windows[0]["out"]
    models = {"a": load_any(home / "model"), "b": load_any(out)}
    kl = evaluate(models, windows, "a")["b"].kl
    assert kl is not None
    assert last.quality["out"]["kl"]["mean"] == pytest.approx(kl.mean, rel=1e-5)


def test_strangers_are_not_touched(home: Path, out: Path) -> None:
    partial = out.with_name("out.partial")
    partial.mkdir()
    (partial / "diary.txt").write_text("mine")
    with pytest.raises(TersorError, match=r"holds diary\.txt.*move it away"):
        compress(home / "model", out, Recipe((Quantize(method="rtn", group=32),)))
    (partial / "recipe.json").write_text("{")
    with pytest.raises(TersorError, match="damaged"):
        compress(home / "model", out, Recipe((Quantize(method="rtn", group=32),)))
    assert (partial / "diary.txt").read_text() == "mine"


def test_all_stages_are_kept(home: Path, out: Path) -> None:
    steps = (Shrink(ffn=0.3, multiple=32, update="none", importance="magnitude"),)
    rounded = Quantize(method="rtn", group=32)
    compress(home / "model", out, Recipe((*steps, rounded), keep="all"))
    assert [path.name for path in (out / STAGES).iterdir()] == ["1-shrink"]
    assert "quantization_config" not in json.loads(
        (out / STAGES / "1-shrink" / "config.json").read_text()
    )
    assert "quantization_config" in json.loads((out / "config.json").read_text())


def test_command(home: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main([
        "compress", str(home / "model"), "--out", str(out), "--recipe", str(home / "recipe.yaml"),
        "--text", str(home / "held" / "out.txt"), "--seq-len", "32", "--keep", "all",
        "--calibration", str(home / "text.txt"), "--samples", "4",
    ])  # fmt: skip
    shown = " ".join(capsys.readouterr().out.split())
    assert code == 0
    for word in ("original", "1 shrink", "6 qat", "perplexity", "times smaller", RECIPE_PAGE):
        assert word in shown
    assert len(list((out / STAGES).iterdir())) == 3
    report = json.loads((out / RECIPE_REPORT).read_text())
    assert "out" in report["stages"][0]["quality"]
    code = cli.main(["compress", str(home / "model"), "--out", str(home / "x"), "--recipe", "nope"])
    assert code == 2
    assert "there is no recipe nope" in capsys.readouterr().err
