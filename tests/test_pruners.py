"""Pruning solvers: what is kept, that it is what the papers say, and the order of their errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reference import damped, layer_loss
from tersor.calibrate import GramStats
from tersor.errors import TersorError
from tersor.qweight import QSpec, QWeight
from tersor.solvers import GPTQ, PRUNERS, RTN, Magnitude, SparseGPT, Wanda
from tersor.solvers.refit import refit
from tersor.sparsity import Sparsity, keep_largest

N, K = 48, 256
HALF, TWO_OF_FOUR = Sparsity(0.5), Sparsity(pattern=(2, 4))
SPARSITIES = [HALF, Sparsity(0.7), TWO_OF_FOUR, Sparsity(pattern=(4, 8)), Sparsity(pattern=(1, 4))]


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def inputs(tokens: int = 1000) -> Tensor:
    """Correlated, and each input of its own strength, in no order."""
    draw = torch.Generator().manual_seed(2)
    mix = 0.5 * torch.randn(K, K, generator=draw) / K**0.5 + torch.eye(K)
    return torch.randn(tokens, K, generator=draw) @ mix * (0.2 + torch.rand(K, generator=draw) * 2)


def observed(x: Tensor) -> GramStats:
    stats = GramStats(K)
    stats.update(x)
    return stats


def values(result: QWeight | Tensor) -> Tensor:
    return result.dequantize() if isinstance(result, QWeight) else result


def loss(result: QWeight | Tensor) -> float:
    x = inputs().double()
    return layer_loss(weight().double() - values(result).double(), x.T @ x)


# --- sparsities ----------------------------------------------------------------------------------


def test_what_is_no_sparsity_is_refused() -> None:
    for given in ({}, {"ratio": 0.5, "pattern": (2, 4)}):
        with pytest.raises(TersorError, match="one of the two"):
            Sparsity(**given)  # type: ignore[arg-type]
    for ratio in (0.0, 1.0, -0.5, 50, float("nan")):
        with pytest.raises(TersorError, match="between 0 and 1"):
            Sparsity(ratio)
    for pattern in ((4, 4), (0, 4), (2, 3), (5, 4), (2, 256)):
        with pytest.raises(TersorError, match="N:M"):
            Sparsity(pattern=pattern)
    for odd in ("2:4", (2,), [2, 4], (2.0, 4), (True, 2), (1, 2, 3)):
        with pytest.raises(TersorError, match="two whole numbers"):
            Sparsity(pattern=odd)  # type: ignore[arg-type]
    for odd in ("0.5", (2, 4), True):
        with pytest.raises(TersorError, match="between 0 and 1"):
            Sparsity(odd)  # type: ignore[arg-type]
    for solver in PRUNERS.values():
        with pytest.raises(TersorError, match=r"give Sparsity\(0.5\)"):
            solver("2:4")  # type: ignore[arg-type]
    for text in ("9" * 5000 + ":4", None, "2", "2:", ":4", "a:b", "2:4:8", "-2:4"):
        with pytest.raises(TersorError, match="N:M"):
            Sparsity.parse(text)
    assert Sparsity.parse("2:4") == TWO_OF_FOUR
    assert (str(TWO_OF_FOUR), str(Sparsity(0.7))) == ("2:4", "70 %")


@pytest.mark.parametrize("name", PRUNERS)
def test_a_pattern_that_does_not_divide(name: str) -> None:
    narrow, stats = weight()[:, :250].contiguous(), GramStats(250)
    stats.update(inputs()[:, :250])
    with pytest.raises(TersorError, match=r"2:4 does not divide the 250 .*use 1:2"):
        PRUNERS[name](TWO_OF_FOUR)(narrow, stats, None)


@pytest.mark.parametrize("per", ["layer", "row"])
@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.013])
def test_exactly_the_ratio_goes_whatever_the_ties(per: str, ratio: float) -> None:
    scores = torch.randint(3, (N, K), generator=torch.Generator().manual_seed(3)).float()
    mask = keep_largest(scores, Sparsity(ratio), per)
    if per == "layer":
        assert (~mask).sum() == int(ratio * N * K)
    else:
        assert ((~mask).sum(1) == int(ratio * K)).all()
    for part, kept in zip(
        scores.view(1, -1) if per == "layer" else scores,
        mask.view(1, -1) if per == "layer" else mask,
        strict=True,
    ):
        assert part[~kept].max() <= part[kept].min()


@pytest.mark.parametrize(
    ("sparsity", "share"),
    [(HALF, 0.0713), (Sparsity(pattern=(4, 8)), 0.103), (TWO_OF_FOUR, 0.132)],
    ids=str,
)
def test_the_energy_that_magnitude_takes_from_a_gaussian(sparsity: Sparsity, share: float) -> None:
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(4))
    left = values(Magnitude(sparsity)(w, None))
    lost = 1 - float(left.square().sum() / w.square().sum())
    assert lost == pytest.approx(share, rel=0.01)


# --- what every pruner must do -------------------------------------------------------------------


@pytest.mark.parametrize("spec", [None, QSpec(4, 64), QSpec(4, 64, False), QSpec(8, None)], ids=str)
@pytest.mark.parametrize("refitted", [False, True])
@pytest.mark.parametrize("sparsity", SPARSITIES, ids=str)
@pytest.mark.parametrize("name", PRUNERS)
def test_zeros_are_as_many_as_asked(
    name: str, sparsity: Sparsity, refitted: bool, spec: QSpec | None
) -> None:
    result = PRUNERS[name](sparsity, refit=refitted)(weight(), observed(inputs()), spec)
    zero = values(result) == 0
    assert zero.float().mean() >= sparsity.zeros - 1 / K
    if spec is None:
        assert zero.float().mean() <= sparsity.zeros + 1 / K
    else:
        assert isinstance(result, QWeight) and result.spec == spec
    if sparsity.pattern:
        kept, of = sparsity.pattern
        assert ((~zero).view(N, -1, of).sum(-1) <= kept).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRUNERS)
def test_result_has_the_dtype_of_the_weight(name: str, dtype: torch.dtype) -> None:
    for refitted in (False, True):
        pruned = PRUNERS[name](HALF, refit=refitted)(weight(dtype), observed(inputs()), None)
        assert isinstance(pruned, Tensor) and pruned.dtype == dtype


@pytest.mark.parametrize("spec", [None, QSpec(4, 64)], ids=str)
@pytest.mark.parametrize("sparsity", SPARSITIES, ids=str)
def test_the_order_of_errors(sparsity: Sparsity, spec: QSpec | None) -> None:
    """Refitting never loses; SparseGPT beats Wanda, and Wanda magnitude."""
    plain, refitted = (
        [loss(PRUNERS[name](sparsity, refit=r)(weight(), observed(inputs()), spec))
         for name in ("magnitude", "wanda", "sparsegpt")]
        for r in (False, True)
    )  # fmt: skip
    assert plain[2] < plain[1] < plain[0]
    assert all(better < worse for better, worse in zip(refitted, plain, strict=True))


@pytest.mark.parametrize("name", PRUNERS)
def test_what_needs_statistics_says_so(name: str) -> None:
    solver = PRUNERS[name](HALF, refit=True)
    assert solver.needs is GramStats
    for stats in (None, GramStats(K)):
        with pytest.raises(TersorError, match="needs statistics"):
            solver(weight(), stats, None)
    instead = solver.without_input()
    assert instead.sparsity == HALF and instead.needs is None
    assert (values(instead(weight(), None, None)) == 0).float().mean() == 0.5


def test_settings_that_mean_nothing_are_refused() -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (Magnitude, {"per": "block"}, '"layer" or per "row"'),
        (Wanda, {"damp": 0.0}, "damp"),
        (SparseGPT, {"damp": 2.0}, "damp"),
        (SparseGPT, {"sparsity": TWO_OF_FOUR, "act_order": True}, "act_order"),
    ]
    for solver, given, message in cases:
        with pytest.raises(TersorError, match=message):
            solver(**({"sparsity": HALF} | given))


# --- against the papers --------------------------------------------------------------------------


def test_wanda_is_the_published_score() -> None:
    """Sun et al., arXiv:2306.11695, algorithm 1: |W| * ‖X‖₂, the least of each row to zero."""
    x, w = inputs().double(), weight().double()
    score = w.abs() * x.norm(dim=0)
    expected = w.clone()
    expected.scatter_(1, score.argsort(dim=1)[:, : K // 2], 0)
    assert torch.equal(values(Wanda(HALF)(weight(), observed(inputs()))).double(), expected)


def test_magnitude_is_the_published_score() -> None:
    w = weight()
    expected = w.clone().flatten()
    expected[w.abs().flatten().argsort()[: int(0.7 * N * K)]] = 0
    assert torch.equal(values(Magnitude(Sparsity(0.7))(w, None)), expected.view(N, K))


def test_refit_is_the_least_squares_solution() -> None:
    x, w = inputs().double(), weight()
    start = Wanda(HALF)(w, observed(inputs()))
    assert isinstance(start, Tensor)
    mask = start != 0
    h = damped(x.T @ x, 0.01)
    exact = torch.zeros(N, K, dtype=torch.float64)
    for row in range(N):
        kept = mask[row]
        exact[row, kept] = torch.linalg.solve(h[kept][:, kept], h[kept] @ w[row].double())
    found = refit(w, start, mask, observed(inputs()), 0.01)
    assert (found[~mask] == 0).all()
    best = layer_loss(w.double() - exact, h)
    assert layer_loss(w.double() - found.double(), h) == pytest.approx(best, rel=1e-3)
    assert best < 0.8 * layer_loss(w.double() - start.double(), h), "there was something to gain"


def test_the_joint_pass_beats_pruning_and_then_rounding() -> None:
    spec = QSpec(4, 64)
    joint = SparseGPT(TWO_OF_FOUR)(weight(), observed(inputs()), spec)
    pruned = SparseGPT(TWO_OF_FOUR)(weight(), observed(inputs()), None)
    rounded = RTN()(values(pruned), None, spec)
    assert loss(joint) < loss(rounded)


def test_gptq_keeps_the_zeros_of_a_pruned_weight() -> None:
    pruned = values(Magnitude(TWO_OF_FOUR)(weight(), None))
    q = GPTQ()(pruned, observed(inputs()), QSpec(4, 64))
    assert (q.dequantize()[pruned == 0] == 0).all()
    few = weight()
    few[:, -5:] = 0  # under 5 %: an accident, and free to absorb errors
    assert (GPTQ()(few, observed(inputs()), QSpec(8, 64)).dequantize()[:, -5:] != 0).any()
