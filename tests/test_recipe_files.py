"""Files of recipes: what they mean, and what is wrong with those that mean nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
from tersor import TersorError, cli
from tersor.calibrate import Calibration
from tersor.commands.recipe import _with_options
from tersor.qweight import QSpec
from tersor.recipes.recipe import READY, Evaluate, Export, Recipe, settings_of
from tersor.sparsity import Sparsity
from tersor.steps import Distill, Prune, QuantizationAware, Quantize, Shrink, State, Step, Train
from test_recipes import FULL, parse


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and the texts that it names."""
    home = tmp_path_factory.mktemp("home")
    (home / "held").mkdir(parents=True)
    for name in ("text.txt", "held/out.txt"):
        (home / name).write_text("text")
    (home / "recipe.yaml").write_text(FULL)
    return home


def test_yaml_and_python_are_the_same(home: Path) -> None:
    recipe = Recipe.read(home / "recipe.yaml")
    text, held = str(home / "text.txt"), str(home / "held" / "out.txt")
    training: dict[str, Any] = {"steps": 3, "batch": 2, "learning_rate": 1e-3}
    assert recipe == Recipe(
        steps=(
            Shrink(ffn=0.3, multiple=32),
            Distill(temperature=2.0, **training),
            Export("distilled"),
            Prune(pattern="2:4"),
            Evaluate({"text": text}, seq_len=32, samples=2, speed=True),
            QuantizationAware(bits=4, group=32, **training),
        ),
        calibration=Calibration((text,), samples=8, seq_len=32),
        evaluate=Evaluate({"prose": held}, seq_len=32, samples=4),
        name="recipe.yaml",
    )


def test_settings_are_those_that_are_not_as_by_default() -> None:
    assert settings_of(Quantize()) == {}
    assert settings_of(Shrink(layers=(1, 2), ffn=0.5)) == {"layers": [1, 2], "ffn": 0.5}
    assert settings_of(Evaluate({"a": "b"})) == {"text": {"a": "b"}}


def test_yaml_that_is_written_reads_back(home: Path) -> None:
    made = Recipe(
        (Shrink(layers=(1,)), Evaluate(speed=True), Prune(pattern="4:8", refit=True), Quantize()),
        keep="all",
        name="other.yaml",
    )
    assert parse(made.to_yaml(), home) == made


@pytest.mark.parametrize("name", READY)
def test_ready_recipes(name: str) -> None:
    """Each is of the kind that its name promises, and its steps follow one another."""
    recipe = Recipe.read(name)
    state = State()
    for step in recipe.steps:
        assert isinstance(step, Step)
        step.call()
        state = step.after(state)
    assert state.quantized is not None and state.quantized.weight == QSpec(4)
    names = [step.name for step in recipe.steps if isinstance(step, Step)]
    wanted = {
        "cloud": (["prune"], Sparsity(0.2)),
        "edge": (["qat"], None),
        "realtime": (["shrink", "quantize"], None),
        "mobile": (["shrink", "distill", "prune", "qat"], Sparsity(pattern=(2, 4))),
    }
    assert (names, state.zeros) == wanted[name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a recipe"),
        ("- a\n- b", "not a recipe"),
        ("steps: [", "not YAML"),
        ("steps: []", "steps is a list, of distill"),
        ("steps: prune", "steps is a list"),
        ("stages: []", "'stages' is not of a recipe; it has steps, calibration"),
        ("steps: [melt]", "step 1, melt: there is no such step; there are distill, prune"),
        ("steps: [quantize: {bitz: 4}]", "step 1, quantize: there is no setting 'bitz'"),
        ("steps: [quantize: {bits: four}]", "bits is a whole number, not 'four'"),
        ("steps: [quantize: {bits: true}]", "bits is a whole number, not True"),
        ("steps: [quantize: {ignore: [1]}]", "ignore is a list of words"),
        ("steps: [quantize: 4]", "settings are names with values, not 4"),
        ("steps: [{quantize: {}, prune: {}}]", "step 1 is one name with its settings"),
        ("steps: [prune: {pattern: 2:4}]", "in quotes where YAML would take it for a number"),
        ("steps: [slice: {}]", "hidden is missing"),
        ("steps: [quantize: {bits: 4, bits: 8}]", "'bits' stands twice"),
        ("steps: [quantize]\nsteps: [prune]", "'steps' stands twice"),
        ("steps: [export: {folder: a}]", "a recipe needs a step that changes the model"),
        ("steps: [quantize, export: {folder: ../a}]", "folder is a plain name"),
        ("steps: [quantize, export: {folder: ''}]", "folder is the name of a folder"),
        (f"steps: [quantize, export: {{folder: {'é' * 101}}}]", "a name of at most 200 bytes"),
        ("steps: [quantize: {? [a] : 1}]", "not YAML"),
        ("calibration: {sources: text.txt, seed: -1}\nsteps: [quantize]", "seed is a whole number"),
        (f"calibration: {{sources: text.txt, seed: {10**22}}}\nsteps: [quantize]", "to 2**63 - 1"),
        ("steps: [quantize, evaluate: {}]", "evaluate needs text, name: FILE, or speed"),
        ("steps: [quantize, evaluate: {speed: true, bos: nver}]", "bos is auto, always, never"),
        ('steps: [quantize]\ncalibration: "a\\0b"', "is not the name of a file"),
        ("a: &a {bits: 4}\nsteps: [quantize: {<<: *a}]", "not merged with <<"),
        ("steps: [quantize, evaluate: {text: [a]}]", "text of evaluate is a file, or names"),
        ("steps: [quantize]\nkeep: some", "keep is last or all"),
        ("steps: [quantize]\ncalibration: /etc/hostname", "not in the folder of the recipe"),
        ("steps: [quantize]\ncalibration: ../text.txt", "not in the folder of the recipe"),
        ("steps: [distill: {teacher: ../model}]", "not in the folder of the recipe"),
        ("steps: [distill: {text: /etc/hostname}]", "not in the folder of the recipe"),
        ("steps: [quantize]\nevaluate: {text: ../x}", "not in the folder of the recipe"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("steps: 2020-13-45", "not YAML that can be read (month must be in 1..12)"),
    ],
)
def test_files_that_are_no_recipes(home: Path, text: str, message: str) -> None:
    with pytest.raises(TersorError, match=r"other\.yaml") as error:
        parse(text, home)
    assert message in str(error.value)


def test_a_link_out_of_the_folder_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").symlink_to(home / "text.txt")
    with pytest.raises(TersorError, match="not in the folder of the recipe"):
        parse("steps: [quantize]\ncalibration: text.txt", tmp_path)


@pytest.mark.parametrize("name", ["x.jsonl:text", "x.jsonl", "d.jsonl:/text.txt", "d.jsonl:/x:y"])
def test_links_with_a_field_are_refused_too(home: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "x.jsonl").symlink_to(home / "text.txt")
    (tmp_path / "d.jsonl:").symlink_to(home)
    with pytest.raises(TersorError, match="not in the folder of the recipe"):
        parse(f"steps: [quantize]\ncalibration: '{name}'", tmp_path)


def test_values_that_grow_are_cut_in_messages(home: Path) -> None:
    """Aliases of aliases: a few hundred bytes that would print as many millions."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    for number in range(1, 8):
        before = ", ".join([f"*a{number - 1}"] * 8)
        lines.append(f"a{number}: &a{number} [{before}]")
    with pytest.raises(TersorError) as error:
        parse("\n".join([*lines, "steps: [quantize: {bits: *a7}]"]).replace("a0:", "steps2:"), home)
    assert len(str(error.value)) < 1000
    for end in ("keep: *a7\nsteps: [quantize]", "evaluate: {speed: *a7}\nsteps: [quantize]"):
        with pytest.raises(TersorError) as error:
            parse("\n".join([*lines, end]).replace("a0:", "calibration:", 1), home)
        assert len(str(error.value)) < 1000
    steps = f"steps: [quantize: {{bits: {'[' * 60 + ']' * 60}}}]"
    with pytest.raises(TersorError) as error:
        parse(steps, home)
    assert len(str(error.value)) < 1000


def test_numbers_as_people_write_them(home: Path) -> None:
    (step,) = parse("steps: [distill: {learning_rate: 2e-4, alpha: 1, warmup: .1}]", home).steps
    assert step == Distill(learning_rate=2e-4, alpha=1, warmup=0.1)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="give a YAML file, or cloud, edge, realtime, mobile"):
        Recipe.read(tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TersorError, match="not UTF-8"):
        Recipe.read(tmp_path / "binary")
    with pytest.raises(TersorError, match=r"cannot read .*give a YAML file"):
        Recipe.read(tmp_path)


def test_the_command_line_adds_to_a_recipe(home: Path) -> None:
    """And replaces what it names, nothing else."""

    def options(recipe: Recipe, *given: str) -> Recipe:
        common = ["compress", "model", "--out", "out", "--recipe", "file"]
        return _with_options(recipe, cli.build_parser().parse_args([*common, *given]))

    recipe = Recipe.read(home / "recipe.yaml")
    assert options(recipe) == recipe
    assert recipe.calibration is not None and recipe.evaluate is not None
    fewer = replace(recipe.calibration, samples=2, seq_len=16)
    assert options(recipe, "--samples", "2", "--seq-len", "16").calibration == fewer
    other = options(recipe, "--calibration", "b.txt").calibration
    assert other == replace(recipe.calibration, sources=("b.txt",))
    text = replace(recipe.evaluate, text={"b": "b.txt"})
    assert options(recipe, "--text", "b.txt").evaluate == text
    taught = options(recipe, "--teacher", "original").steps
    teachers = [step.teacher for step in taught if isinstance(step, Train)]
    assert teachers == [str(Path("original").resolve())] * 2
    bare = Recipe((Quantize(),))
    assert options(bare, "--text", "b.txt", "--seq-len", "16").evaluate == Evaluate(
        {"b": "b.txt"}, seq_len=16
    )
    assert options(bare, "--speed").evaluate == Evaluate(speed=True)
    for wrong, message in (
        (["--samples", "4"], "--samples is of a text"),
        (["--text", "b.txt", "--samples", "4"], "--samples is of a text; give --calibration$"),
        (["--teacher", "x"], "the recipe has none"),
        (["--text", "a/x.txt", "b/x.txt"], "the same name"),
    ):
        with pytest.raises(TersorError, match=message):
            options(bare, *wrong)
