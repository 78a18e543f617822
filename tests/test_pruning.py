"""Groups of channels against slow oracles in float64: their importance, and what takes over their
work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.calibrate import GramStats
from tersor.errors import TersorError
from tersor.pruning import (
    BY_STATISTICS,
    best,
    bias_for,
    importance,
    output_error,
    reconstruct,
    select,
)

N, K, TOKENS = 24, 48, 200


def inputs(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    """Small whole numbers, correlated: their Gram matrix is exact in float32."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (tokens, K), generator=draw)
    mix = torch.randint(0, 2, (K, K), generator=draw).triu()
    return (x @ mix).clamp(-8, 8).double()


def stats_of(x: Tensor) -> GramStats:
    stats = GramStats(K)
    stats.update(x.float())
    assert torch.equal(stats.gram.double(), x.T @ x)
    return stats


def weight(n: int = N, k: int = K, seed: int = 1) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def columns(group: int, groups: int) -> list[int]:
    return list(range(group * K // groups, (group + 1) * K // groups))


def slow_importance(kind: str, groups: int, w: Tensor, rows: list[Tensor], x: Tensor) -> Tensor:
    scores = []
    for g in range(groups):
        own = columns(g, groups)
        if kind == "output":  # of the linear with all inputs but these zero
            only = torch.zeros_like(x)
            only[:, own] = x[:, own]
            score = (only @ w.double().T).square().sum()
        elif kind == "fluctuation":
            only = (x[:, own] - x[:, own].mean(0)) @ w[:, own].double().T
            score = only.square().sum()
        elif kind == "activation":
            score = x[:, own].square().sum()
        else:
            score = w[:, own].double().square().sum()
            for other in rows:
                each = other.shape[0] // groups
                score += other[g * each : (g + 1) * each].double().square().sum()
        scores.append(score)
    return torch.stack(scores)


@pytest.mark.parametrize("groups", [1, 3, 4, K])
@pytest.mark.parametrize("kind", BY_STATISTICS)
def test_importance(kind: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.pruning.structured.COLUMNS", 20)  # some groups at a time
    x, w, rows = inputs(), weight(), [weight(K, 7, seed=2), weight(2 * K, 5, seed=3)]
    given = None if kind == "magnitude" else stats_of(x)
    got = importance(kind, groups, w, rows, given)
    want = slow_importance(kind, groups, w, rows, x)
    assert got.shape == (groups,) and got.dtype == torch.float64
    # Squares in float32 are off by less than a unit in the last place each; all else is float64.
    torch.testing.assert_close(got, want, rtol=2e-7 if kind == "magnitude" else 1e-12, atol=0)


@pytest.mark.parametrize("kind", ["output", "fluctuation", "activation"])
def test_importance_needs_statistics(kind: str) -> None:
    for stats in (None, GramStats(K)):
        with pytest.raises(TersorError, match="needs statistics"):
            importance(kind, 4, weight(), [], stats)


def test_best_keeps_order_and_the_first_of_equals() -> None:
    assert best(torch.tensor([1.0, 3.0, 2.0, 3.0, 1.0]), 3).tolist() == [1, 2, 3]
    assert best(torch.tensor([1.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 2]
    rows = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]])
    assert best(rows, 2).tolist() == [[1, 2], [0, 1]]


@pytest.mark.parametrize("dim", [0, 1])
def test_select(dim: int) -> None:
    tensor = torch.arange(6 * 12).view(6, 12)
    size = tensor.shape[dim] // 3
    want = [i for g in (0, 2) for i in range(g * size, (g + 1) * size)]
    kept = torch.tensor([0, 2])
    assert torch.equal(select(tensor, dim, 3, kept), tensor.index_select(dim, torch.tensor(want)))
    assert select(tensor.to("meta"), dim, 3, kept).shape[dim] == 2 * size


@pytest.mark.parametrize(("groups", "kept"), [(4, [0, 2, 3]), (K, list(range(0, K, 3)))])
@pytest.mark.parametrize("tokens", [TOKENS, K // 4])
def test_reconstruction_is_the_damped_least_squares(
    groups: int, kept: list[int], tokens: int
) -> None:
    """Against the problem itself, rows and all, given to another solver."""
    x, w, damp = inputs(tokens), weight(), 0.01
    stay = [c for g in kept for c in columns(g, groups)]
    power = x.square().sum(0)
    root = (damp * power[power > 0].mean()).sqrt()
    left = torch.cat([x[:, stay], root * torch.eye(len(stay), dtype=torch.float64)])
    right = torch.cat([x @ w.double().T, root * w[:, stay].double().T])
    want = torch.linalg.lstsq(left, right, driver="gelsd").solution.T
    got, used = reconstruct(w, groups, torch.tensor(kept), stats_of(x), damp)
    assert used == damp
    # The normal equations square the condition, which the damping keeps below k / damp.
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_reconstruction_gains_and_the_error_is_measured() -> None:
    x, w, kept, groups = inputs(), weight(), torch.arange(0, K, 2), K
    stats = stats_of(x)
    new, _ = reconstruct(w, groups, kept, stats, 0.01)
    errors = []
    for values in (w[:, kept].double(), new):
        full = torch.zeros(N, K, dtype=torch.float64)
        full[:, kept] = values
        lost = (x @ (w.double() - full).T).square().sum() / (x @ w.double().T).square().sum()
        got = output_error(w, groups, kept, values.float(), stats)
        assert got == pytest.approx(float(lost), rel=1e-5)
        errors.append(got)
    assert errors[1] < 0.5 * errors[0]
    plain = output_error(w, groups, kept, w[:, kept], None)
    assert plain == pytest.approx(float(w[:, 1::2].square().sum() / w.square().sum()), rel=1e-5)


def test_the_bias_makes_up_for_what_was_lost_on_average() -> None:
    x, w, kept, groups = inputs() + 1, weight(), torch.arange(0, K // 2, 2), K // 2
    stay = [c for g in kept.tolist() for c in columns(g, groups)]
    stats = stats_of(x)
    full = torch.zeros(N, K, dtype=torch.float64)
    full[:, stay] = w[:, stay].double()
    lost = x @ (w.double() - full).T
    shift = bias_for(w, groups, kept, stats)
    torch.testing.assert_close(shift, lost.mean(0), rtol=1e-12, atol=1e-12)
    got = output_error(w, groups, kept, w[:, stay], stats, shift)
    want = (lost - lost.mean(0)).square().sum() / (x @ w.double().T).square().sum()
    assert got == pytest.approx(float(want), rel=1e-5)
    assert got < output_error(w, groups, kept, w[:, stay], stats)


def test_groups_that_did_nothing_change_nothing() -> None:
    w, kept = weight(), torch.tensor([0, 1, 3])
    w[:, columns(2, 4)] = 0
    stay = [c for g in kept.tolist() for c in columns(g, 4)]
    for x in (inputs(), inputs(5), torch.zeros(3, K, dtype=torch.float64)):
        new, _ = reconstruct(w, 4, kept, stats_of(x), 0.01)
        assert torch.equal(new, w[:, stay].double())


def test_damping_grows_until_it_can_be_factored() -> None:
    stats = stats_of(inputs())
    stats.gram[0, 0] = -1e-3 * float(stats.diagonal.mean())  # as rounding could leave it
    stats.gram[0, 1:] = stats.gram[1:, 0] = 0
    _, used = reconstruct(weight(), K, torch.arange(K - 4), stats, 1e-4)
    assert used > 1e-4
