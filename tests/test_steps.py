"""Steps as values: their settings are those of the functions, and so are the files."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import tiny
from folders import content
from tersor import prune_checkpoint, quantize_checkpoint
from tersor.calibrate import Calibration
from tersor.errors import TersorError
from tersor.qweight import ActSpec, QSpec, Scheme
from tersor.solvers import GPTQ, RTN, Magnitude, SparseGPT
from tersor.sparsity import Sparsity
from tersor.steps import (
    STEPS,
    Distill,
    DropExperts,
    Prune,
    QuantizationAware,
    Quantize,
    Shrink,
    Slice,
    State,
    Step,
    Surgery,
    scheme_of,
)
from tersor.surgery.experts import drop_experts
from tersor.surgery.shrink import shrink_checkpoint
from tersor.surgery.slicing import slice_checkpoint
from tersor.training.plan import Plan

TEXT = Calibration(texts=(tiny.text(),), samples=20, seq_len=64)
COMMON = {"model", "out", "calibration", "strict", "progress"}


@pytest.mark.parametrize("step", [Shrink, Slice, DropExperts])
def test_the_fields_of_a_cut_are_the_arguments(step: type[Surgery]) -> None:
    function = {
        Shrink: shrink_checkpoint,
        Slice: slice_checkpoint,
        DropExperts: drop_experts,
    }[step]
    wanted = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in COMMON
    }
    found: dict[str, Any] = {field.name: field.default for field in fields(step)}  # type: ignore[arg-type]
    assert found.keys() == wanted.keys()
    for name, default in wanted.items():
        assert default is inspect.Parameter.empty or found[name] == default, name


def test_a_training_hands_on_its_plan() -> None:
    """All of it; and what is none is refused where it is written down."""
    changed: dict[str, Any] = {
        "steps": 3,
        "batch": 2,
        "accumulate": 5,
        "seq_len": 16,
        "learning_rate": 1e-3,
        "warmup": 0.1,
        "schedule": "linear",
        "weight_decay": 0.01,
        "optimizer": "sgd",
        "precision": "bfloat16",
        "checkpoint_every": 7,
        "seed": 4,
    }
    assert changed.keys() == {field.name for field in fields(Plan)}
    for step in (Distill(**changed, alpha=0.5), QuantizationAware(**changed, bits=3)):
        plan = step.call()[1]["plan"]
        assert type(plan) is Plan and plan == Plan(**changed)
    assert Distill().call()[1]["plan"] == Plan()
    with pytest.raises(TersorError, match="batch is a whole number"):
        QuantizationAware(batch=0)


@pytest.mark.parametrize(
    ("kind", "step", "function", "arguments"),
    [
        (
            "llama",
            Quantize(method="rtn", bits=3, group=32, asymmetric=True),
            quantize_checkpoint,
            {"method": RTN(), "scheme": Scheme(QSpec(3, 32, symmetric=False))},
        ),
        (
            "llama",
            Quantize(bits=8, activations="int8", act_order=True, damp=0.05, clip=False),
            quantize_checkpoint,
            {
                "method": GPTQ(damp=0.05, act_order=True, clip=False),
                "scheme": Scheme(QSpec(8, None), ActSpec()),
            },
        ),
        (
            "llama",
            Prune(pattern="2:4", quantize=4, group=32, refit=True),
            prune_checkpoint,
            {
                "method": SparseGPT(Sparsity(pattern=(2, 4)), refit=True),
                "scheme": Scheme(QSpec(4, 32)),
            },
        ),
        (
            "llama",
            Prune(method="magnitude", sparsity=0.3, per="row", allocation="global"),
            prune_checkpoint,
            {"method": Magnitude(Sparsity(0.3), per="row"), "allocation": "global"},
        ),
        (
            "llama",
            Shrink(heads=0.5, ffn=0.3, layers=(1,), multiple=32),
            shrink_checkpoint,
            {"heads": 0.5, "ffn": 0.3, "layers": (1,), "multiple": 32},
        ),
        (
            "llama",
            Slice(hidden=0.5, multiple=32),
            slice_checkpoint,
            {"hidden": 0.5, "multiple": 32},
        ),
        ("mixtral", DropExperts(experts=0.25), drop_experts, {"experts": 0.25}),
    ],
)
def test_a_step_writes_what_its_function_does(
    kind: str, step: Step, function: Any, arguments: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny.save(tmp_path / "model", kind)
    report = step(model, tmp_path / "a", TEXT)
    function(model, tmp_path / "b", calibration=TEXT, **arguments)
    assert report.layers or report.structure
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert step == type(step)(**{f.name: getattr(step, f.name) for f in fields(step)})  # type: ignore[arg-type]
    assert step.name in STEPS and STEPS[step.name] is type(step)


@pytest.mark.parametrize(
    ("bits", "group", "activations", "wanted"),
    [
        (4, None, None, QSpec(4, 128)),
        (4, "row", None, QSpec(4, None)),
        (8, None, "int8", QSpec(8, None)),
        (8, None, None, QSpec(8, 128)),
        (4, None, "int8", QSpec(4, 128)),
        (8, 64, "int8", QSpec(8, 64)),
    ],
)
def test_schemes(bits: int, group: Any, activations: Any, wanted: QSpec) -> None:
    assert scheme_of(bits, group, activations=activations).weight == wanted


CODES = State(quantized=Scheme(QSpec(4)), by="quantize")
ZEROS = State(zeros=Sparsity(pattern=(2, 4)), by="prune")


@pytest.mark.parametrize(
    ("step", "state", "message"),
    [
        *[
            (step, CODES, f"{step.name} cannot follow quantize, after which weights are W4A16")
            for step in (
                *(Quantize(), Prune(pattern="2:4"), Shrink(ffn=0.5), Slice(hidden=0.5)),
                *(DropExperts(experts=0.5), Distill(), QuantizationAware()),
            )
        ],
        (Prune(sparsity=0.5), ZEROS, "prune cannot follow prune"),
        (Shrink(ffn=0.5), ZEROS, "put shrink before prune"),
        (Slice(hidden=0.5), ZEROS, "put slice before prune"),
        (Distill(pattern="2:4"), ZEROS, "leave one of the two out"),
    ],
)
def test_what_cannot_follow(step: Step, state: State, message: str) -> None:
    with pytest.raises(TersorError, match=message):
        step.after(state)


def test_what_can_follow() -> None:
    state = State()
    for step in (Slice(hidden=0.5), Shrink(ffn=0.5), Distill(), Prune(pattern="2:4"), Distill()):
        state = step.after(state)
    assert state == State(None, Sparsity(pattern=(2, 4)), "prune")
    state = QuantizationAware(output="weights").after(state)
    assert state.quantized is None
    state = Quantize(bits=3).after(state)
    assert state.quantized == Scheme(QSpec(3)) and state.zeros is not None
    assert QuantizationAware(bits=2).after(State()).quantized == Scheme(QSpec(2))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda: Quantize(bits=5), "bits must be one of"),
        (lambda: Quantize(activations="fp8"), "activations can be int8"),
        (lambda: Quantize(group="column"), "a number of columns or row"),
        (lambda: Quantize(method="magic"), "--method magic is unknown; use rtn or gptq"),
        (
            lambda: Quantize(method="rtn", act_order=True),
            "--act-order changes nothing for --method rtn",
        ),
        (lambda: Quantize(method=RTN(), clip=True), "clip is a setting of the solver"),
        (lambda: Prune(), "give sparsity, a share of zeros"),
        (lambda: Prune(sparsity=0.5, pattern="2:4"), "one or the other"),
        (lambda: Prune(sparsity=0.5, group=32), "--group is of a grid"),
        (lambda: Prune(pattern="2:4", per="row"), "--per is what --sparsity is kept over"),
        (
            lambda: Prune(method=SparseGPT(Sparsity(0.5)), sparsity=0.5),
            "the solver knows its sparsity",
        ),
        (lambda: Distill(loss="love"), "there is no loss 'love'"),
        (lambda: Distill(steps=0), "steps is a whole number from 1"),
        (lambda: Distill(learning_rate=0.0), "learning_rate is from 0 to 10"),
        (lambda: Distill(warmup=1.0), "warmup is a share"),
        (lambda: Distill(precision="int8"), "precision is float32 or bfloat16"),
        (lambda: Distill(schedule="never"), "schedule is one of"),
        (lambda: Distill(sparsity=0.5, pattern="2:4"), "one or the other"),
        (lambda: QuantizationAware(scales="none"), "scales is learned or fixed"),
        (lambda: QuantizationAware(start="luck"), "start is gptq or rtn"),
        (lambda: QuantizationAware(output="gguf"), "output is codes or weights"),
    ],
)
def test_settings_that_cannot_be(step: Callable[[], Step], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        step().call()
