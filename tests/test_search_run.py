"""Whole searches on small models: what is measured, written, resumed and refused."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tersor
import tiny
from folders import tensors, weights
from tersor import pipeline
from tersor.calibrate import Calibration, load_tokenizer
from tersor.errors import TersorError
from tersor.evaluate import evaluate
from tersor.progress import Progress
from tersor.qweight import ActSpec, QSpec, QWeight, Scheme
from tersor.report import Report
from tersor.search import (
    Candidate,
    Constraint,
    Differentiable,
    Effort,
    Front,
    Space,
    parse_constraints,
    run,
    search_checkpoint,
)
from tersor.search.evolve import Measured, evolve
from tersor.search.problem import Evaluations, Problem
from tersor.search.run import Search
from tersor.search.solutions import Solutions
from tersor.search.space import Unit
from tersor.solvers import GPTQ, RTN
from tersor.sparsity import Sparsity

TEXT = Calibration(texts=(tiny.text(),), samples=6, seq_len=48)
SPACE = Space(bits=(2, 4), group=32, sparsities=(Sparsity(pattern=(2, 4)),))
SMALL = Effort(trials=30, population=8, windows=3)
BOUNDS = "size<=0.6x,latency<=0.99x"


@pytest.fixture(autouse=True)
def invented_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds by what is stored, in place of a measurement, so that runs can be compared."""

    def measure(shape: tuple[int, int], candidates: Any, tokens: int, dtype: Any) -> list[float]:
        def seconds(each: Candidate) -> float:
            bits = max(4, each.scheme.weight.bits) if each.scheme else 16
            return shape[0] * shape[1] * (bits + 3 * (each.sparsity is None)) * 1e-10

        return [seconds(Candidate()), *map(seconds, candidates)]

    monkeypatch.setattr(run, "measure", measure)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "llama", dtype=torch.bfloat16)


def words(count: int) -> str:
    return " ".join(tiny.text().split()[:count])


def windows_of(folder: Path) -> tuple[Tensor, Tensor]:
    """For calibration and held out, by definition: those after the others."""
    more = Calibration(texts=TEXT.texts, samples=9, seq_len=48)
    both = more.windows(load_tokenizer(folder))
    return both[:6], both[6:]


def plain_kl(folder: Path, changed: dict[str, Tensor]) -> float:
    """Of a model as transformers has it with other weights, by the formula in float64."""
    from transformers import AutoModelForCausalLM

    ids = windows_of(folder)[1]
    logits = []
    for weights_of in ({}, changed):
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").eval()
        for name, weight in weights_of.items():
            model.get_submodule(name).weight.data = weight
        with torch.no_grad():
            logits.append(model(ids).logits[:, :-1].double().log_softmax(-1))
    p, q = logits
    return float((p.exp() * (p - q)).sum(-1).mean())


def opened(folder: Path, work: Path, **changes: Any) -> Search:
    arguments: dict[str, Any] = {"calibration": TEXT, "space": SPACE, "effort": SMALL}
    return Search.open(folder, work, **(arguments | changes))


def found(folder: Path, work: Path, bounds: str = BOUNDS, **changes: Any) -> tuple[Search, Front]:
    search = opened(folder, work, **changes)
    with Progress(False) as bar:
        return search, search.find(parse_constraints(bounds), bar)


@pytest.fixture(scope="module")
def searched(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Front, Path]:
    pytest.importorskip("optuna")
    out = tmp_path_factory.mktemp("searched") / "out"
    with pytest.MonkeyPatch.context() as patch:
        invented_latency.__wrapped__(patch)  # type: ignore[attr-defined]
        front = search_checkpoint(
            llama, out, BOUNDS, calibration=TEXT, space=SPACE, effort=SMALL, progress=False
        )
    return front, out


def test_the_chosen_point_is_what_is_written(searched: tuple[Front, Path], llama: Path) -> None:
    front, out = searched
    assert front.chosen is not None
    chosen = front.points[front.chosen]
    assert chosen == front.best()
    assert chosen.feasible
    stored = sum(tensor.nbytes for tensor in tensors(out).values())
    assert stored == chosen.bytes <= 0.6 * front.original["size"]
    assert front.original["size"] == sum(tensor.nbytes for tensor in tensors(llama).values())
    assert front.written is not None
    assert front.written["bytes"] == stored
    found = weights(out)
    for name, candidate in front.assignment(chosen).items():
        bits = found[name].spec.bits if name in found else None
        assert bits == (candidate.scheme.weight.bits if candidate.scheme else None), name
    assert Front.read(out) == front
    assert not out.with_name("out.search").exists()
    model = tersor.load(out)
    ids = windows_of(llama)[1]
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(llama, torch_dtype="auto").eval()
    quality = evaluate({"original": original, "ours": model}, ids, "original")["ours"]
    assert quality.kl is not None
    assert front.written["kl"] == pytest.approx(quality.kl.mean, rel=1e-6)


def test_the_front_has_no_point_that_another_beats(searched: tuple[Front, Path]) -> None:
    front, _ = searched
    for a, b in itertools.permutations(front.points, 2):
        goals = [(x.bytes, x.latency, x.kl, -x.zeros) for x in (a, b)]
        assert not all(x <= y for x, y in zip(*goals, strict=True))
    origins = {point.origin for point in front.points}
    assert origins <= {"uniform", "additive", "nsga2"}
    assert len(front.uniform) == len(front.candidates)
    assert front.evaluated >= 30


def test_the_same_seed_finds_the_same_front(
    searched: tuple[Front, Path], llama: Path, tmp_path: Path
) -> None:
    front, _ = searched
    _, again = found(llama, tmp_path / "again")
    assert again.points == front.points
    _, other = found(llama, tmp_path / "other", effort=Effort(**(vars(SMALL) | {"seed": 1})))
    assert {p.choice for p in other.points} != {p.choice for p in front.points}


def test_kl_is_that_of_the_assembled_model(llama: Path, tmp_path: Path) -> None:
    """Weights that GPTQ makes of each layer on the original's activations, in a plain model."""
    effort = Effort(trials=0, windows=3)
    _, front = found(llama, tmp_path / "work", effort=effort)
    number = [str(each) for each in front.candidates].index("W2A16 by gptq")
    uniform = next(p for p in front.uniform if set(p.choice) == {number})
    model = tiny.model("llama")
    model = type(model).from_pretrained(llama, torch_dtype="auto").eval()
    inputs: dict[str, list[Tensor]] = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "proj" in n}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: inputs.setdefault(n, []).append(args[0]))
        for n, m in linears.items()
    ]
    with torch.no_grad():
        model(windows_of(llama)[0])
    for hook in hooks:
        hook.remove()
    changed = {}
    for name, linear in linears.items():
        stats = tersor.calibrate.GramStats(linear.in_features)
        for x in inputs[name]:
            stats.update(x)
        q = GPTQ()(linear.weight.detach(), stats, QSpec(2, 32))
        changed[name] = q.dequantize(torch.bfloat16)
    expected = plain_kl(llama, changed)
    assert uniform.kl == pytest.approx(expected, rel=0.02)
    zero = next(p for p in front.uniform if set(p.choice) == {0})
    assert zero.kl == 0.0


def test_a_search_that_is_killed_goes_on(
    searched: tuple[Front, Path], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At several moments: while it solves, while it measures sensitivities, in the trials, while it
    writes and after that. The end is the same, and nothing is measured twice."""
    out, calls = tmp_path / "out", []
    arguments: dict[str, Any] = {"calibration": TEXT, "space": SPACE, "effort": SMALL}
    arguments["progress"] = False
    measure = Problem._measure

    def counted(self: Problem, choice: Any) -> float:
        calls.append(choice)
        return measure(self, choice)

    monkeypatch.setattr(Problem, "_measure", counted)

    def stop_after(count: int, what: Any) -> Any:
        left = iter(range(count))

        def stopping(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return what(*args, **kwargs)

        return stopping

    for owner, name, count in (
        (tersor.search.solutions, "compress_linear", 20),
        (Problem, "_measure", 10),
        (Problem, "_measure", 60),
        (Problem, "_measure", 25),
        (run, "compress_checkpoint", 0),
        (run, "load", 0),
        (run, "remove", 0),
    ):
        with monkeypatch.context() as cut:
            cut.setattr(owner, name, stop_after(count, getattr(owner, name)))
            with pytest.raises(KeyboardInterrupt):
                search_checkpoint(llama, out, BOUNDS, **arguments)
        assert out.with_name("out.search").exists()
    front = search_checkpoint(llama, out, BOUNDS, **arguments)
    whole, _ = searched
    assert front == whole
    assert len(calls) == len(set(calls))


def test_a_run_that_is_killed_as_it_writes_may_choose_anew(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, compress = tmp_path / "out", pipeline.compress_block
    arguments: dict[str, Any] = {"calibration": TEXT, "progress": False}
    arguments["space"] = Space(bits=(2, 4), group=32, granularity="kind")
    arguments["effort"] = Effort(trials=0, windows=2)

    def first(model: Any, block: Any, *rest: Any) -> Any:
        if block.path.endswith(".1"):
            raise KeyboardInterrupt
        return compress(model, block, *rest)

    with monkeypatch.context() as cut:
        cut.setattr(pipeline, "compress_block", first)
        with pytest.raises(KeyboardInterrupt):
            search_checkpoint(llama, out, "size<=0.9x", **arguments)
    front = search_checkpoint(llama, out, "size<=0.6x", **arguments)
    assert front.written is not None
    assert front.written["bytes"] <= 0.6 * front.original["size"]
    assert Front.read(out) == front
    assert list(tmp_path.iterdir()) == [out]


def test_a_torn_line_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "kl.jsonl"
    kept = Evaluations(path)
    kept.add((0, 1), 0.5)
    kept.add((1, 1), float("inf"))
    path.write_bytes(path.read_bytes() + b'{"choice": [2, 2], "k')
    again = Evaluations(path)
    assert again.known == {(0, 1): 0.5, (1, 1): float("inf")}
    again.add((2, 2), 0.25)
    assert Evaluations(path).known[2, 2] == 0.25


def test_another_search_in_the_same_place_is_refused(llama: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with opened(llama, work), pytest.raises(TersorError, match=r"another run is writing .*work"):
        opened(llama, work)
    opened(llama, work, effort=Effort(trials=5, windows=3, seed=4)).close()
    (work / "kl.jsonl").touch()
    with pytest.raises(TersorError, match="unfinished search that differs in its candidates"):
        opened(llama, work, space=Space(bits=(3,), group=32))


def test_seconds_alone_stand_in_the_way_of_no_other_search(llama: Path, tmp_path: Path) -> None:
    """As where a bound that nothing keeps was followed by more candidates."""
    with pytest.raises(TersorError, match="cannot be kept"), opened(llama, tmp_path / "a") as one:
        one.find(parse_constraints("size<=0.05x"), Progress(False))
    assert (tmp_path / "a" / "latency.json").exists()
    with opened(llama, tmp_path / "a", space=Space(bits=(3,), group=32)):
        assert not (tmp_path / "a" / "latency.json").exists()


def test_what_is_not_of_a_search_stays(llama: Path, tmp_path: Path) -> None:
    own = tmp_path / "out.search" / "notes.txt"
    own.parent.mkdir()
    own.touch()
    with pytest.raises(TersorError, match=r"not the work of a search \(it holds notes.txt"):
        search_checkpoint(llama, tmp_path / "out", BOUNDS, calibration=TEXT, space=SPACE)
    assert list(own.parent.iterdir()) == [own]


@pytest.mark.parametrize(
    ("bounds", "changes", "message"),
    [
        ("size<=0.05x", {}, "size<=0.05x cannot be kept: the least size"),
        ("latency<=0.01x", {}, "the least latency that these candidates reach is"),
        ("sparsity>=0.6", {}, "the most zeros that these candidates have is 0.5000"),
        ("", {}, "needs a constraint to choose by"),
        ("size<=2x,latency<=1x", {}, "the original keeps size<=2x, latency<=1x as"),
        ("size<=9MB,latency<=1s", {}, "the original keeps size<=9MB, latency<=1000ms"),
        (["size<=0.5x", "speed<=1x"], {}, "'speed' cannot be bounded"),
        ([Constraint("size", 0.5, True)] * 2, {}, "size is bounded twice"),
        ("size<=0.5x", {"ignore": "*.q_proj"}, r"ignore is a list of patterns; write \["),
        ("size<=0.5x", {"calibration": tiny.text()}, "calibration is a Calibration.* not a str"),
        (
            "size<=0.5x",
            {"calibration": Calibration(texts=(words(400),), samples=7, seq_len=48)},
            r"has 8 windows of 48 tokens, and a search needs 15: 7 to calibrate on and 8 to",
        ),
        ("size<=0.5x", {"space": Space(bits=(4,), group=64)}, "group 64 does not divide"),
        ("size<=0.5x", {"ignore": ["*.q_prj"]}, "--ignore .* matches no module"),
        (
            "size<=0.5x",
            {"differentiable": Differentiable(), "effort": Effort(seconds=9.0)},
            "seconds bound trials, in whose place",
        ),
    ],
)
def test_bad_input(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bounds: Any,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(run, "solve_all", lambda *_: pytest.fail("solved"))
    arguments: dict[str, Any] = {"calibration": TEXT, "space": SPACE, "progress": False}
    with pytest.raises(TersorError, match=message):
        search_checkpoint(llama, tmp_path / "out", bounds, **(arguments | changes))
    assert not (tmp_path / "out").exists()


def test_an_original_that_may_stay_is_not_even_timed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(TersorError, match="the original keeps size<=1x"):
        found(llama, tmp_path / "work", "size<=1x,latency<=1.5x")


def test_without_optuna(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(TersorError, match=r"pip install 'tersor\[search\]'"):
        opened(llama, tmp_path / "work")
    opened(llama, tmp_path / "work", effort=Effort(trials=0, windows=3))


def test_models_that_predict_no_next_token(tmp_path: Path) -> None:
    bert = tiny.save(tmp_path / "bert", "bert")
    with pytest.raises(TersorError, match="does not predict the next token"):
        opened(bert, tmp_path / "work")


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_conv1d_and_experts(kind: str, tmp_path: Path) -> None:
    """Linears that files keep in another form."""
    source = tiny.save(tmp_path / kind, kind)
    front = search_checkpoint(
        *(source, tmp_path / "out", "size<=0.5x"),
        calibration=TEXT,
        space=Space(bits=(3, 4), group=32, granularity="kind"),
        effort=Effort(trials=0, windows=2),
        progress=False,
    )
    assert front.written is not None
    chosen = front.points[front.chosen or 0]
    stored = sum(tensor.nbytes for tensor in tensors(tmp_path / "out").values())
    assert stored == chosen.bytes == front.written["bytes"]
    assert chosen.latency < front.original["latency"]


def test_int8_activations_are_rounded_while_it_measures(llama: Path, tmp_path: Path) -> None:
    space = Space(bits=(8,), group=32, activations=(None, ActSpec()), methods=("rtn",))
    effort = Effort(trials=0, windows=3)
    _, front = found(llama, tmp_path / "work", "size<=0.9x", space=space, effort=effort)
    kl = {str(front.candidates[p.choice[0]]): p.kl for p in front.uniform}
    out = tmp_path / "w8a8"
    scheme = Scheme(QSpec(8, 32), ActSpec())
    tersor.quantize_checkpoint(llama, out, scheme=scheme, method="rtn")
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(llama, torch_dtype="auto").eval()
    models = {"original": original, "w8a8": tersor.load(out)}
    quality = evaluate(models, windows_of(llama)[1], "original")["w8a8"]
    assert quality.kl is not None
    assert kl["W8A8 by rtn"] == pytest.approx(quality.kl.mean, rel=0.1)
    assert kl["W8A8 by rtn"] > kl["W8A16 by rtn"]


def test_the_model_is_left_as_it_was(llama: Path) -> None:
    model = type(tiny.model("llama")).from_pretrained(llama, torch_dtype="auto").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "model.layers.0.mlp.up_proj"
    linear = model.get_submodule(name)
    q = RTN()(linear.weight.detach(), None, QSpec(2, 32))
    assert isinstance(q, QWeight)
    candidates = [Candidate(), Candidate(Scheme(QSpec(2, 32), ActSpec()), None, "rtn")]
    solutions = {name: Solutions((None, q), (0.0, 1.0))}
    problem = Problem(
        *(model, [Unit(name, (name,))], candidates, solutions, windows_of(llama)[1], Evaluations())
    )
    with problem.restored():
        assert problem.kl([0]) == 0.0
        assert problem.kl([1]) > 0
        assert torch.equal(linear.weight, q.dequantize(torch.bfloat16))
        assert len(linear._forward_pre_hooks) == 1
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not linear._forward_pre_hooks


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_the_search_goes_on_from_where_it_begins(sampler: str) -> None:
    """The first trials are the ones that are given, and the others resemble them: of 50 candidates
    only 0 and 1 occur in the first, and crossover brings no others."""
    pytest.importorskip("optuna")
    draw = np.random.default_rng(0)
    first = [tuple(int(x) for x in draw.integers(0, 2, 20)) for _ in range(12)]
    tried: list[tuple[int, ...]] = []

    def measure(choice: tuple[int, ...]) -> Measured:
        tried.append(choice)
        return Measured((float(sum(choice)), float(-choice[0])), {"size": sum(choice) - 30.0})

    effort = Effort(trials=60, sampler=sampler, seed=5)
    evolve(20, 50, first, measure, effort)
    del tried[0]  # to see how many goals there are
    assert tried[:12] == first
    assert len(tried) == 60
    rest = np.array(tried[12:])
    if sampler == "nsga2":  # one parameter of 20 mutates in each child
        assert float((rest <= 1).mean()) > 0.85
    assert rest.shape == (48, 20)
    again, tried = tried, []
    evolve(20, 50, first, measure, effort)
    assert tried[1:] == again


def test_a_share_of_zeros_is_spread_over_the_layers(llama: Path, tmp_path: Path) -> None:
    space = Space(bits=(), sparsities=(Sparsity(0.3), Sparsity(0.6)), methods=("wanda",))
    front = search_checkpoint(  # a path as a shell completes it
        *(llama, f"{tmp_path / 'out'}/", [Constraint("sparsity", 0.4)]),
        calibration=TEXT,
        space=space,
        effort=Effort(trials=0, windows=2, population=6),
        progress=False,
    )
    chosen = front.points[front.chosen or 0]
    assert chosen.zeros >= 0.4
    assert len(set(chosen.choice)) > 1
    report = Report.read(tmp_path / "out")
    assert report is not None
    pruned = sum(layer.sparsity * np.prod(layer.shape) for layer in report.layers)
    weights_in_all = sum(
        tensor.numel() for name, tensor in tensors(llama).items() if "proj" in name
    )
    assert pruned / weights_in_all == pytest.approx(chosen.zeros, abs=5e-3)
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
