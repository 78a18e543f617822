"""Steps as values: the fields are the arguments of the functions, and so are the files."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import tiny
from folders import content
from tersor.calibrate import Calibration
from tersor.qweight import QSpec, Scheme
from tersor.solvers import RTN, SparseGPT
from tersor.sparsity import Sparsity
from tersor.steps import FUNCTIONS, DropExperts, Prune, Quantize, Shrink, Slice, Step

TEXT = Calibration(texts=(tiny.text(),), samples=20, seq_len=64)
COMMON = {"model", "out", "calibration", "strict", "progress"}


@pytest.mark.parametrize("step", FUNCTIONS)
def test_the_fields_are_the_arguments(step: type[Step]) -> None:
    wanted = {
        name: parameter.default
        for name, parameter in inspect.signature(FUNCTIONS[step]).parameters.items()
        if name not in COMMON
    }
    found = {field.name: field.default for field in fields(step)}  # type: ignore[arg-type]
    assert found.keys() == wanted.keys()
    for name, default in wanted.items():
        empty = inspect.Parameter.empty
        assert found[name] == (MISSING if default is empty else default), name


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("llama", Quantize(Scheme(QSpec(4, 32)), RTN())),
        ("llama", Prune(SparseGPT(Sparsity(pattern=(2, 4))))),
        ("llama", Shrink(heads=0.5, ffn=0.3, layers=(1,), multiple=32)),
        ("llama", Slice(hidden=0.5, multiple=32)),
        ("mixtral", DropExperts(experts=0.25)),
    ],
)
def test_a_step_writes_what_its_function_does(kind: str, step: Step, tmp_path: Path) -> None:
    model = tiny.save(tmp_path / "model", kind)
    report = step(model, tmp_path / "a", TEXT)
    settings = {field.name: getattr(step, field.name) for field in fields(step)}  # type: ignore[arg-type]
    FUNCTIONS[type(step)](model, tmp_path / "b", calibration=TEXT, **settings)
    assert report.layers or report.structure
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert step == type(step)(**settings)
    assert hash(step) == hash(type(step)(**settings))
