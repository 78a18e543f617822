"""What a search computes before any trial: the additive model against brute force, costs as they
are stored and measured, and what they propose."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import TersorError
from tersor.formats import FORMATS
from tersor.formats.config import default_format
from tersor.qweight import QSpec, Scheme
from tersor.search import Space, additive, costs, parse_constraints
from tersor.search.additive import Unreachable, solve, undominated
from tersor.search.costs import ORIGINAL, LinearCosts, add_up, measure, stored_bytes
from tersor.search.proposals import spread, within
from tersor.search.space import Unit
from tersor.solvers import RTN
from tersor.sparsity import Sparsity

TWO_OF_FOUR = Sparsity(pattern=(2, 4))

# --- the additive model --------------------------------------------------------------------------


def brute_force(losses: Any, tables: list[Any], bounds: list[float]) -> tuple[float, bool]:
    """The least loss of all choices within the bounds, one after the other."""
    best = np.inf
    for choice in itertools.product(range(losses.shape[1]), repeat=losses.shape[0]):
        spent = [sum(table[u, c] for u, c in enumerate(choice)) for table in tables]
        if all(s <= b * (1 + 1e-9) for s, b in zip(spent, bounds, strict=True)):
            best = min(best, sum(losses[u, c] for u, c in enumerate(choice)))
    return best, best < np.inf


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    units=st.integers(1, 6),
    candidates=st.integers(1, 4),
    bounds=st.integers(1, 3),
    tight=st.floats(0.0, 1.2),
    whole=st.booleans(),
)
def test_additive_choice_is_the_best_of_all(
    seed: int, units: int, candidates: int, bounds: int, tight: float, whole: bool
) -> None:
    draw = np.random.default_rng(seed)
    shape = (units, candidates)
    losses = draw.random(shape)
    tables = [draw.integers(1, 20, shape).astype(float) if whole else draw.random(shape)
              for _ in range(bounds)]  # fmt: skip
    most = []
    for each in tables:
        low, high = each.min(1).sum(), each.max(1).sum()
        most.append(float(low + tight * (high - low)))
    best, feasible = brute_force(losses, tables, most)
    if not feasible:
        with pytest.raises(Unreachable):
            solve(losses, tables, most)
        return
    choice = solve(losses, tables, most)
    for each, bound in zip(tables, most, strict=True):
        assert each[np.arange(units), choice].sum() <= bound * (1 + 2e-9)
    assert losses[np.arange(units), choice].sum() == pytest.approx(best, abs=1e-12)


def test_all_undominated_sums_are_found() -> None:
    draw = np.random.default_rng(7)
    losses, size, time = draw.random((5, 4)), draw.integers(1, 9, (5, 4)), draw.random((5, 4))
    sums = undominated(losses, [size, time])
    every = set()
    for choice in itertools.product(range(4), repeat=5):
        at = np.arange(5), np.array(choice)
        each = (size[at].sum(), time[at].sum(), losses[at].sum())
        every.add(tuple(round(float(x), 9) for x in each))

    def beaten(a: Any) -> bool:
        return any(b != a and all(x <= y for x, y in zip(b, a, strict=True)) for b in every)

    found = np.column_stack([sums.costs, sums.losses]).round(9)
    assert set(map(tuple, found.tolist())) == {each for each in every if not beaten(each)}
    for choice, loss in zip(sums.choices, sums.losses, strict=True):
        assert losses[np.arange(5), choice].sum() == pytest.approx(loss)


def test_a_coarse_grid_keeps_bounds_and_loses_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sums are too many to tell apart, the bound is kept all the same, and more room is never
    worse than the coarseness of the grid."""
    draw = np.random.default_rng(3)
    losses = np.sort(draw.random((40, 5)) ** 4, axis=1)
    size = np.sort(draw.random((40, 5)), axis=1)[:, ::-1]
    bounds = [float(size.min(1).sum() * (1 + 0.2 * i)) for i in range(8)]
    exact = [losses[np.arange(40), solve(losses, [size], [b])].sum() for b in bounds]
    assert all(a >= b for a, b in itertools.pairwise(exact))
    monkeypatch.setattr(additive, "CELLS", 500)
    assert len(undominated(losses, [size]).losses) <= 500
    for bound, best in zip(bounds, exact, strict=True):
        choice = solve(losses, [size], [bound])
        assert size[np.arange(40), choice].sum() <= bound * (1 + 2e-9)
        # Each unit may lose a cell of the range that the sums have.
        room = bound - 40 * float(size.max(1).sum() - size.min(1).sum()) / 499
        if room > size.min(1).sum():
            monkeypatch.setattr(additive, "CELLS", 1 << 16)
            less = losses[np.arange(40), solve(losses, [size], [room])].sum()
            monkeypatch.setattr(additive, "CELLS", 500)
            assert best - 1e-9 <= losses[np.arange(40), choice].sum() <= less + 1e-3


# --- costs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_are_those_of_the_format(bits: int, symmetric: bool) -> None:
    scheme = Scheme(QSpec(bits, 32, symmetric))
    w = torch.randn(24, 96).bfloat16()
    packed = FORMATS[default_format(scheme)].pack(RTN()(w, None, scheme.weight))
    expected = sum(tensor.nbytes for tensor in packed.values())
    assert stored_bytes(24, 96, scheme, torch.bfloat16) == expected
    assert expected >= 24 * 96 * bits / 8 + 24 * 3 * 2


def some_costs(constraints: str = "", draws: int = 0) -> Any:
    space = Space(bits=(4, 2), group=32, sparsities=(TWO_OF_FOUR,))
    units = [Unit(f"u{i}", (f"l{i}",)) for i in range(6)]
    shapes = [(64, 64), (32, 64), (64, 96)] * 2
    linears = {
        f"l{i}": LinearCosts.of(shape, space.candidates, torch.bfloat16, torch.bfloat16)
        for i, shape in enumerate(shapes)
    }
    draw = np.random.default_rng(draws)
    seconds = {shape: [1e-4, *(1e-4 * draw.random(6))] for shape in set(shapes)}
    return add_up(units, linears, seconds, 100_000, 1), space, seconds, shapes


def test_costs_add_up() -> None:
    found, space, seconds, shapes = some_costs()
    weights = sum(n * k for n, k in shapes)
    assert found.original == {
        "size": 100_000,
        "latency": pytest.approx(6e-4),
        "sparsity": weights,
    }
    assert found.of([ORIGINAL] * 6) == (100_000, pytest.approx(6e-4), 0.0)
    assert found.of([0] * 6)[0] == 100_000
    pruned = [str(each) for each in space.candidates].index("W4A16 2:4 by sparsegpt")
    size, latency, zeros = found.of([pruned, *[ORIGINAL] * 5])
    assert zeros == pytest.approx(64 * 64 / 2 / weights)
    assert size == 100_000 - 2 * 64 * 64 + stored_bytes(
        64, 64, Scheme(QSpec(4, 32)), torch.bfloat16
    )
    assert latency == pytest.approx(5e-4 + seconds[64, 64][1 + pruned])
    choice = [1, 2, 3, 4, 5, 0]
    at = np.arange(6), np.array(choice)
    size, latency, zeros = found.of(choice)
    assert found.table("size")[at].sum() == size
    assert found.table("latency")[at].sum() == pytest.approx(latency)
    assert found.table("sparsity")[at].sum() == pytest.approx((1 - zeros) * weights)


def test_a_ratio_everywhere_keeps_its_own_bound() -> None:
    """Though 0.7 of 99 weights is no whole number of them."""
    space = Space(bits=(), sparsities=(Sparsity(0.7),))
    shape = (9, 11)
    linear = LinearCosts.of(shape, space.candidates, torch.bfloat16, torch.bfloat16)
    units = [Unit("a", ("a",)), Unit("b", ("b",))]
    found = add_up(units, {"a": linear, "b": linear}, {shape: [1.0] * 3}, 9000, 1)
    choice = within(np.zeros((2, 2)), found, parse_constraints("sparsity>=0.7"))
    assert choice == (1, 1)
    assert found.of(choice)[2] == pytest.approx(0.7, rel=1e-12)


def test_an_expert_counts_by_the_tokens_it_sees() -> None:
    space = Space(bits=(4,), group=32)
    linear = LinearCosts.of((64, 64), space.candidates, torch.bfloat16, torch.bfloat16, calls=0.25)
    found = add_up([Unit("e", ("e",))], {"e": linear}, {(64, 64): [8.0, 8.0, 4.0]}, 9000, 1)
    assert found.original["latency"] == 2.0
    assert found.latency.tolist() == [[2.0, 1.0]]


def test_latency_is_measured_once_for_what_a_kernel_cannot_tell_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """2, 3 and 4 bits run on the same kernel, and so do zeros that no kernel leaves out."""
    space = Space(bits=(2, 3, 4, 8), group=32, sparsities=(Sparsity(0.5), TWO_OF_FOUR))
    timed: list[int] = []

    def in_turn(*calls: Any) -> list[float]:
        timed.append(len(calls))
        return [1.0 + i for i in range(len(calls))]

    monkeypatch.setattr(costs.timing, "in_turn", in_turn)
    taken = measure((64, 64), space.candidates, 1, torch.bfloat16)
    assert len(taken) == 1 + len(space.candidates)
    by_name = dict(zip(map(str, space.candidates), taken[1:], strict=True))
    assert by_name["W4A16 by gptq"] != by_name["W8A16 by gptq"]
    assert by_name["W2A16 by gptq"] == by_name["W3A16 by gptq"] == by_name["W4A16 by gptq"]
    assert by_name["W4A16 50 % by sparsegpt"] == by_name["W4A16 by gptq"]
    assert by_name["16 bits"] == by_name["16 bits 50 % by sparsegpt"] == taken[0]
    assert by_name["W4A16 2:4 by sparsegpt"] <= by_name["W4A16 by gptq"]
    assert timed[0] <= 6


def test_latency_is_really_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs.timing, "_last_level_cache", lambda: 1 << 20)  # fewer copies
    space = Space(bits=(4,), group=32, sparsities=(TWO_OF_FOUR,))
    for dtype in (torch.bfloat16, torch.float32):
        taken = measure((32, 64), space.candidates, 2, dtype)
        assert len(taken) == 5
        assert all(0 < seconds < 1 for seconds in taken)


# --- proposals -----------------------------------------------------------------------------------


def test_proposals_keep_the_constraints() -> None:
    found, space, _, _ = some_costs()
    losses = np.random.default_rng(0).random((6, len(space.candidates)))
    losses[:, 0] = 0
    wanted = parse_constraints("size<=0.75x,latency<=0.9x")
    choice = within(losses, found, wanted)
    size, latency, _ = found.of(choice)
    assert size <= 75_000
    assert latency <= 0.9 * 6e-4
    first = spread(losses, found, wanted, 16, zeros=True)
    assert first[0] == choice
    assert len(set(first)) == len(first) <= 16
    sizes = [found.of(each)[0] for each in first]
    assert min(sizes) == found.table("size").min(1).sum()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size<=0.1x", r"size<=0.1x cannot be kept: the least size .* is 0.0\d+MB, 0.\d+x; relax"),
        ("latency<=1us", "the least latency that these candidates reach"),
        ("sparsity>=0.9", "the most zeros that these candidates have is 0.5000"),
    ],
)
def test_bounds_that_nothing_reaches(text: str, message: str) -> None:
    found, space, _, _ = some_costs()
    losses = np.zeros((6, len(space.candidates)))
    with pytest.raises(TersorError, match=message):
        within(losses, found, parse_constraints(text))


def test_bounds_that_exclude_each_other() -> None:
    """What is small is slow here, and the other way round."""
    size = np.array([[1.0, 3.0]] * 4)
    with pytest.raises(Unreachable) as caught:
        solve(np.zeros((4, 2)), [size, 4 - size], [7.0, 7.0], ["size", "latency"])
    assert caught.value.name == "latency"
    assert caught.value.kept == ("size",)
    assert caught.value.least == 10.0
