"""Recipes judged as a whole: what a later step would refuse is said before the first one starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny

pytest.importorskip("accelerate")
from tersor import TersorError
from tersor.calibrate import Calibration
from tersor.recipes.checks import _models, check
from tersor.recipes.recipe import READY, Recipe
from tersor.recipes.run import compress
from tersor.source import Source
from tersor.steps import DropExperts, Prune, Quantize, Shrink, Slice, Step, Surgery
from test_recipes import parse


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and a text."""
    home = tmp_path_factory.mktemp("checks")
    for kind in ("llama", "mixtral", "bert", "phi3"):
        tiny.save(home / kind, kind)
    (home / "text.txt").write_text(tiny.text())
    return home


def judge(home: Path, steps: str, kind: str = "llama", strict: bool = False) -> None:
    recipe = parse(f"calibration: {{sources: text.txt, seq_len: 32}}\nsteps: {steps}", home)
    check(recipe, home / kind, strict)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("[distill, shrink: {ffn: 0.3, importance: love}]", "step 2, shrink: importance is output"),
        ("[distill, shrink: {ffn: 0.3, damp: 2.0}]", "step 2, shrink: damp must be between"),
        ("[distill, shrink: {ffn: 0.3, ranking: global}]", "step 2, shrink: a global ranking"),
        ("[distill, shrink: {ffn: 0.3, update: bias}]", 'step 2, shrink: update "bias" adds'),
        ("[distill, shrink: {ffn: 0.3, head_importance: output}]", "step 2, shrink: head_importan"),
        ("[distill, slice: {hidden: 0.25, update: bias}]", "step 2, slice: update is"),
        ("[distill, slice: {hidden: 0.25, damp: 0}]", "step 2, slice: damp must be between"),
        ("[distill, drop_experts: {experts: 0.5}]", "step 2, drop_experts: no expert can be cut"),
        ("[distill: {optimizer: love}]", "step 1, distill: transformers has no optimizer 'love'"),
        ("[prune: {pattern: '2:4', allocation: owl}]", "step 1, prune: the pattern 2:4 is the"),
        ("[shrink: {layers: 1}, shrink: {layers: 1}]", "step 2, shrink: layers is from 0 to 0"),
        ("[shrink: {layers: [0]}, shrink: {layers: [1]}]", "step 2, shrink: layers names blocks"),
        ("[shrink: {heads: 0.5}, shrink: {heads: 0.5}]", "step 2, shrink: heads=0.5 of 1 heads"),
        (
            "[shrink: {ffn: 0.5}, slice: {hidden: 0.1, multiple: 64}]",
            "step 2, slice: hidden=0.1 of 64 channels by 64 rounds to none",
        ),
        (
            "[shrink: {ffn: 0.3, multiple: 16}, slice: {hidden: 0.25, multiple: 16}, "
            "quantize: {group: 32}]",
            "step 3, quantize: group 32 does not divide .*q_proj with 48",
        ),
        (
            "[slice: {hidden: 0.25, multiple: 16}, prune: {pattern: '2:32'}]",
            "step 2, prune: the pattern 2:32 does not divide .*q_proj with 48",
        ),
        (
            "[slice: {hidden: 0.25, multiple: 16}, shrink: {ffn: 0.3}, qat: {group: 64}]",
            "step 3, qat: group 64 does not divide",
        ),
        (
            "[distill, qat: {bits: 8, activations: int8-static}]",
            "step 2, qat: quantization-aware training measures no inputs, .*activations: int8",
        ),
        ("[distill, quantize: {group: 32, device: tpu}]", "step 2, quantize: device is auto, cpu"),
        ("[distill, prune: {sparsity: 0.5, device: 'cuda:99'}]", "step 2, prune: .*cuda:99"),
    ],
)
def test_what_a_later_step_would_refuse(home: Path, steps: str, message: str) -> None:
    with pytest.raises(TersorError, match=message):
        judge(home, steps)


@pytest.mark.parametrize(
    "steps",
    [
        "[shrink: {ffn: 0.3, multiple: 16}, slice: {hidden: 0.25, multiple: 16}, "
        "quantize: {group: 16}]",
        "[shrink: {layers: 1}, shrink: {ffn: 0.3, multiple: 32}, quantize: {group: 32}]",
        "[shrink: {layers: [0]}, shrink: {heads: 0.5}, distill, qat: {group: 32}]",
    ],
)
def test_what_goes_together_is_let_through(home: Path, steps: str) -> None:
    judge(home, steps)


def test_experts_and_what_they_leave(home: Path) -> None:
    once = "drop_experts: {experts: 0.5}"
    judge(home, f"[{once}, quantize: {{group: 32}}]", "mixtral")
    with pytest.raises(TersorError, match=r"step 2, drop_experts: .*a token chooses 2"):
        judge(home, f"[{once}, {once}]", "mixtral")
    with pytest.raises(TersorError, match="step 2, drop_experts: importance of experts is"):
        judge(home, "[distill, drop_experts: {experts: 0.5, importance: taylor}]", "mixtral")


def test_a_model_that_predicts_no_token_is_not_trained(home: Path) -> None:
    with pytest.raises(TersorError, match="step 2, distill: BertForMaskedLM does not predict"):
        judge(home, "[prune: {sparsity: 0.5}, distill]", "bert")
    with pytest.raises(TersorError, match="step 2, evaluate: BertForMaskedLM does not predict"):
        judge(home, "[prune: {sparsity: 0.5}, evaluate: {speed: true}]", "bert")


def test_too_little_text_for_a_slice(home: Path) -> None:
    recipe = Recipe(
        (Shrink(ffn=0.3), Slice(hidden=0.25, multiple=16)),
        Calibration((str(home / "text.txt"),), samples=1, seq_len=32),
    )
    with pytest.raises(TersorError, match="step 2, slice: 32 tokens cannot tell which 48"):
        check(recipe, home / "llama")


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("llama", (Shrink(ffn=0.3, heads=0.5, layers=(1,)), Slice(hidden=0.25, multiple=16))),
        ("phi3", (Shrink(ffn=0.3, multiple=32), Shrink(layers=(0,)))),
        ("mixtral", (DropExperts(experts=0.5),)),
    ],
)
def test_the_model_that_is_foreseen_is_the_one_that_is_made(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, steps: tuple[Step, ...]
) -> None:
    """Shapes and configuration against the folders that the steps write."""
    from tersor.recipes import checks

    seen: list[Source] = []
    inner = checks.foreseen
    monkeypatch.setattr(checks, "foreseen", lambda *a: seen.append(inner(*a)) or seen[-1])
    _models(Recipe(steps), Source.open(home / kind), False)
    text = Calibration((str(home / "text.txt"),), samples=4, seq_len=32)
    folder = home / kind
    for number, (step, source) in enumerate(zip(steps, seen, strict=True)):
        assert isinstance(step, Surgery)
        step(folder, tmp_path / str(number), text)
        folder = tmp_path / str(number)
        made = Source.open(folder)
        shapes = {n: tuple(p.shape) for n, p in made.model.named_parameters()}
        assert {n: tuple(p.shape) for n, p in source.model.named_parameters()} == shapes
        assert set(source.where) == set(made.where)
        ours, theirs = source.model.config.to_dict(), made.model.config.to_dict()
        assert {**ours, "_name_or_path": ""} == {**theirs, "_name_or_path": ""}


def test_fixes_are_settings_of_a_recipe(home: Path) -> None:
    for steps, fix in (
        ("[quantize]", "use group: 32 or group: row$"),
        ("[quantize: {group: 64}]", r"use group: 32 or group: row or ignore: '\*.down_proj'$"),
        ("[prune: {sparsity: 0.5, group: 32}]", "group is of a grid; add quantize: BITS, or leave"),
        ("[prune: {pattern: '2:64'}]", "use sparsity: 0.96875"),
        (
            "[quantize: {group: 32, two_level: true, asymmetric: true}]",
            "leave asymmetric or two_level out$",
        ),
    ):
        with pytest.raises(TersorError, match=fix):
            judge(home, steps)
    with pytest.raises(TersorError, match="give --calibration FILE"):  # an option of compress
        check(Recipe((Quantize(group=32),)), home / "llama")


@pytest.mark.parametrize("name", READY)
def test_ready_recipes_say_where_to_change_them(home: Path, name: str) -> None:
    """128 does not divide the widths of a small model."""
    text = Calibration((str(home / "text.txt"),), seq_len=32)
    recipe = Recipe(Recipe.read(name).steps, text, name=name)
    with pytest.raises(TersorError) as error:
        check(recipe, home / "llama")
    found = str(error.value)
    path = Path(found.rpartition("change it in a copy of ")[2].partition(", and give")[0])
    assert Recipe.read(path).steps == recipe.steps
    assert f"{name} is a ready recipe" in found


def test_strict_is_known_ahead(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear that no tap reaches, which a step would leave as it is."""
    from tersor.recipes import checks

    settled = checks.settle

    def settle(*given: Any) -> Any:
        scope = settled(*given)
        scope.departures["model.layers.0.odd"] = "no tap is known"
        return scope

    monkeypatch.setattr(checks, "settle", settle)
    steps = "[distill, quantize: {group: 32}]"
    judge(home, steps)
    with pytest.raises(TersorError, match=r"step 2, quantize: 1 module was not .*model.layers.0.o"):
        judge(home, steps, strict=True)
    judge(home, "[distill]", strict=True)


def test_nothing_is_begun(home: Path, out: Path) -> None:
    recipe = Recipe((Prune(sparsity=0.5, method="magnitude"), Quantize(method="rtn")))
    with pytest.raises(TersorError, match="step 2, quantize: group 128"):
        compress(home / "llama", out, recipe)
    assert not list(out.parent.iterdir())
