"""What goes into a search and what comes out: constraints, the space, and fronts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from tersor.errors import TersorError
from tersor.models import find_arch, plain_linears
from tersor.qweight import ActSpec, QSpec, Scheme
from tersor.scope import settle
from tersor.search import Candidate, Constraint, Effort, Front, Point, Space, parse_constraints
from tersor.search.front import non_dominated, table
from tersor.search.space import Unit
from tersor.solvers import GPTQ, RTN, SparseGPT
from tersor.sparsity import Sparsity

TWO_OF_FOUR = Sparsity(pattern=(2, 4))

# --- constraints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("size<=0.3x", [Constraint("size", 0.3, relative=True)]),
        ("size <= 500MB", [Constraint("size", 500e6)]),
        ("size<=1.5gib", [Constraint("size", 1.5 * 2**30)]),
        ("size<=70000b,latency<=4.5ms", [Constraint("size", 7e4), Constraint("latency", 0.0045)]),
        (
            "latency<=0.8x, size<=.3x",
            [Constraint("latency", 0.8, True), Constraint("size", 0.3, True)],
        ),
        ("latency<=250us", [Constraint("latency", 250e-6)]),
        ("sparsity>=0.5", [Constraint("sparsity", 0.5)]),
        ("sparsity>=50%,", [Constraint("sparsity", 0.5)]),
        ("", []),
    ],
)
def test_constraints(text: str, expected: list[Constraint]) -> None:
    found = parse_constraints(text)
    assert [(each.name, each.relative) for each in found] == [
        (each.name, each.relative) for each in expected
    ]
    assert [each.bound for each in found] == pytest.approx([each.bound for each in expected])
    again = parse_constraints(",".join(map(str, found)))
    assert [each.bound for each in again] == pytest.approx([each.bound for each in found])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight<=3x", "'weight' cannot be bounded; use size<=0.3x"),
        ("size<0.3x", "size is bounded by <="),
        ("size>=0.3x", "size is bounded by <="),
        ("sparsity<=0.5", "sparsity is bounded by >="),
        ("size<=0.3", r"'size<=0.3' has no unit of size \(x, b, kb"),
        ("latency<=3MB", r"no unit of latency \(x, us, ms, s\)"),
        ("sparsity>=0.5x", "no unit|is no bound"),
        ("size<=-1x", "is no constraint"),
        ("size<=0x", "is no bound; use one like size<=0.3x"),
        ("sparsity>=1.5", "is no bound"),
        ("size", "'size' is no constraint"),
        ("size<=0.3x,size<=2MB", "size is bounded twice"),
    ],
)
def test_bad_constraints(text: str, message: str) -> None:
    with pytest.raises(TersorError, match=message):
        parse_constraints(text)


def test_limits_are_of_the_original() -> None:
    assert Constraint("size", 0.25, relative=True).limit(4000.0) == 1000.0
    assert Constraint("size", 300.0).limit(4000.0) == 300.0
    assert Constraint("sparsity", 0.25).limit(4000.0) == 3000.0


# --- the space -----------------------------------------------------------------------------------


def test_candidates_and_what_makes_them() -> None:
    space = Space(bits=(3, 8, 4), group=32, sparsities=(Sparsity(0.7), TWO_OF_FOUR))
    names = [str(each) for each in space.candidates]
    assert names == [
        "16 bits",
        "16 bits 2:4 by sparsegpt",
        "16 bits 70 % by sparsegpt",
        *(
            name
            for bits in (8, 4, 3)
            for name in (
                f"W{bits}A16 by gptq",
                f"W{bits}A16 2:4 by sparsegpt",
                f"W{bits}A16 70 % by sparsegpt",
            )
        ),
    ]
    made = {str(each): each.treatment for each in space.candidates}
    assert made["16 bits"] is None
    pruned = made["W3A16 2:4 by sparsegpt"]
    assert pruned is not None
    assert pruned.solver == SparseGPT(TWO_OF_FOUR)
    assert pruned.scheme == Scheme(QSpec(3, 32))
    quantized = made["W8A16 by gptq"]
    assert quantized is not None
    assert quantized.solver == GPTQ()
    for each in space.candidates:
        assert Candidate.from_dict(json.loads(json.dumps(each.to_dict()))) == each


def test_methods_compete_and_int8_has_a_scale_per_row() -> None:
    space = Space(
        bits=(8, 4),
        methods=("rtn", "gptq"),
        activations=(None, ActSpec()),
        keep=False,
    )
    schemes = [each.scheme for each in space.candidates]
    assert len(schemes) == 8
    assert all(s and s.weight.group == (None if str(s) == "W8A8" else 128) for s in schemes)
    solvers = [each.treatment.solver for each in space.candidates if each.treatment]
    assert solvers[:2] == [RTN(), GPTQ()]
    for group in (32, None):  # as asked, whatever the bits
        asked = replace(space, group=group)
        assert {each.scheme.weight.group for each in asked.candidates if each.scheme} == {group}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"granularity": "head"}, "granularity must be one of linear, input, block, kind"),
        ({"methods": ("awq",)}, "method must be one of rtn, gptq, magnitude"),
        ({"methods": ("rtn",), "sparsities": (TWO_OF_FOUR,)}, "can prune; add one of magnitude"),
        ({"methods": ("wanda",)}, "can quantize; add one of rtn, gptq"),
        ({"bits": (4,), "keep": False}, "nothing to choose"),
        ({"bits": (5,)}, "bits must be one of"),
        ({"group": "block"}, "group is a number of columns, None for the whole row, or auto"),
    ],
)
def test_bad_spaces(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        _ = Space(**arguments).candidates


def test_bad_candidates_and_efforts() -> None:
    with pytest.raises(TersorError, match="quantized by one of rtn, gptq, not sparsegpt"):
        Candidate(Scheme(QSpec(4)), None, "sparsegpt")
    with pytest.raises(TersorError, match="pruned by one of"):
        Candidate(None, TWO_OF_FOUR, "gptq")
    for bad in ({"sampler": "ga"}, {"trials": -1}, {"seconds": 0.0}, {"sensitivity": "ppl"},
                {"seconds": 9.0, "trials": 0}):  # fmt: skip
        with pytest.raises(TersorError):
            Effort(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("granularity", "names"),
    [
        ("block", ["model.layers.0", "model.layers.1"]),
        (
            "kind",
            [f"self_attn.{n}_proj" for n in "qkvo"]
            + [f"mlp.{n}_proj" for n in ("gate", "up", "down")],
        ),
        (
            "input",
            [
                f"model.layers.{i}.{name}"
                for i in (0, 1)
                for name in (
                    "self_attn.q_proj+k_proj+v_proj",
                    "self_attn.o_proj",
                    "mlp.gate_proj+up_proj",
                    "mlp.down_proj",
                )
            ],
        ),
    ],
)
def test_units(granularity: str, names: list[str]) -> None:
    model = tiny.model("llama")
    scope = settle(model, find_arch(model), ())
    units = Space(granularity=granularity).units(scope)
    assert [unit.name for unit in units] == names
    assert sorted(name for unit in units for name in unit.linears) == sorted(scope.linears)
    assert len(Space().units(scope)) == len(scope.linears)


def test_experts_of_a_kind_agree() -> None:
    model = tiny.model("mixtral")
    found = find_arch(model)
    plain_linears(model, found.arch)
    units = Space(granularity="kind").units(settle(model, found, ()))
    assert {len(unit.linears) for unit in units if "experts.*" in unit.name} == {8}


# --- the front -----------------------------------------------------------------------------------


def point(size: int, latency: float, kl: float, zeros: float = 0.0, choice: int = 0) -> Point:
    return Point((choice,), size, latency, kl, zeros, "test")


@settings(max_examples=60, deadline=None)
@given(
    goals=st.lists(st.tuples(*(st.integers(0, 4) for _ in range(4))), min_size=1, max_size=40),
    zeros=st.booleans(),
)
def test_non_dominated_is_what_no_other_beats(goals: list[Any], zeros: bool) -> None:
    points = [point(s, float(t), float(k), z / 4) for s, t, k, z in goals]

    def beats(a: Point, b: Point) -> bool:
        pairs = [(a.bytes, b.bytes), (a.latency, b.latency), (a.kl, b.kl)]
        pairs += [(-a.zeros, -b.zeros)] if zeros else []
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    front = non_dominated(points, zeros)
    left = [p for p in points if not any(beats(q, p) for q in points)]

    def key(p: Point) -> tuple[float, ...]:
        return (p.bytes, p.latency, p.kl, *([p.zeros] if zeros else []))

    assert sorted(map(key, front)) == sorted(set(map(key, left)))
    assert [p.bytes for p in front] == sorted(p.bytes for p in front)


def some_front() -> Front:
    candidates = Space(bits=(4, 2), group=32).candidates
    points = [
        Point((2, 2), 100, 1e-3, 0.5, 0.0, "additive"),
        Point((1, 2), 200, 2e-3, 0.2, 0.0, "nsga2"),
        Point((1, 1), 300, 3e-3, 0.1, 0.0, "uniform", feasible=False),
    ]
    return Front(
        model="tiny",
        units=[Unit("a", ("a.x", "a.y")), Unit("b", ("b.x",))],
        candidates=list(candidates),
        original={"size": 1000.0, "latency": 1e-2},
        points=points,
        uniform=points[2:],
        evaluated=9,
        constraints=["size<=0.25x"],
        settings={"tokens": 1},
    )


def test_an_infinite_kl_is_written_as_json_has_it(tmp_path: Path) -> None:
    front = some_front()
    front.points.append(replace(front.points[0], choice=(2, 2), bytes=50, kl=math.inf))
    front.uniform = front.points[2:]
    front.written = {"bytes": 50, "kl": math.inf}
    content = json.loads(front.save(tmp_path).read_text(), parse_constant=pytest.fail)
    assert content["points"][-1]["kl"] is None
    assert Front.read(tmp_path) == front


def test_the_best_point_keeps_the_constraints(tmp_path: Path) -> None:
    front = some_front()
    assert front.best() is front.points[1]
    assert front.best("size<=0.1x") is front.points[0]
    assert front.best("latency<=3ms") is front.points[2]
    assert front.best([]) is front.points[2]
    with pytest.raises(TersorError, match=r"no point of the front keeps size<=0.05x.*least"):
        front.best("size<=0.05x")
    assert {k: str(v) for k, v in front.assignment(front.points[1]).items()} == {
        "a.x": "W4A16 by gptq",
        "a.y": "W4A16 by gptq",
        "b.x": "W2A16 by gptq",
    }
    chosen = front.choose(front.best())
    chosen.save(tmp_path)
    assert Front.read(tmp_path) == chosen
    for each in json.loads((tmp_path / "front.json").read_text())["points"]:
        assert {"bytes", "kl", "latency"} <= each.keys()
    shown = table(chosen)
    assert shown.row_count == 3


def test_fronts_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="is not there"):
        Front.read(tmp_path)
    (tmp_path / "front.json").write_text('{"points": 3}')
    with pytest.raises(TersorError, match="is no front of a search"):
        Front.read(tmp_path)


def test_a_front_is_drawn(tmp_path: Path) -> None:
    front = some_front()
    with pytest.raises(TersorError, match="must end in"):
        front.draw(tmp_path / "front.pdf")
    pytest.importorskip("matplotlib")
    front.choose(front.best()).draw(tmp_path / "a.svg")
    front.choose(front.best()).draw(tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "KL from the original" in text
    front.draw(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
