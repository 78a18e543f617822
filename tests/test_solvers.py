"""Solvers: the contract that all of them keep, and GPTQ against the published form in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reference import check_gptq_codes, damped, layer_loss, range_grid, round_to_nearest, spread
from tersor.calibrate import GramStats
from tersor.errors import TersorError
from tersor.qweight import BITS, QSpec, QWeight
from tersor.solvers import GPTQ, RTN, SOLVERS

N, K = 24, 96
SPECS = [
    QSpec(bits, group, symmetric)
    for bits in BITS
    for group in (32, None)
    for symmetric in (True, False)
]


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def inputs(tokens: int = 400) -> Tensor:
    """Correlated and of uneven strength, as inputs of a real layer are."""
    draw = torch.Generator().manual_seed(2)
    mix = torch.randn(K, K, generator=draw) / K**0.5 + torch.eye(K)
    return torch.randn(tokens, K, generator=draw) @ mix * torch.linspace(0.2, 2, K)


def observed(x: Tensor) -> GramStats:
    stats = GramStats(K)
    stats.update(x)
    return stats


def loss(w: Tensor, q: QWeight) -> float:
    x = inputs().double()
    return layer_loss(w.double() - q.dequantize(torch.float64), x.T @ x)


# --- what every solver must do -------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_result_has_the_spec(name: str, spec: QSpec) -> None:
    q = SOLVERS[name]()(weight(), observed(inputs()), spec)
    assert q.spec == spec
    assert (q.n, q.k) == (N, K)
    assert int(q.codes.max()) < spec.levels
    assert q.order is None  # groups are those of the original columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SOLVERS)
def test_scales_have_the_dtype_of_the_weight(name: str, dtype: torch.dtype) -> None:
    assert SOLVERS[name]()(weight(dtype), observed(inputs()), QSpec(4, 32)).scales.dtype == dtype


@pytest.mark.parametrize("name", SOLVERS)
def test_same_input_same_codes(name: str) -> None:
    one, two = (SOLVERS[name]()(weight(), observed(inputs()), QSpec(3, 32)) for _ in range(2))
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scales, two.scales)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_never_worse_than_rounding(name: str, spec: QSpec) -> None:
    solver = SOLVERS[name]()
    q = solver(weight(), observed(inputs()), spec)
    assert loss(weight(), q) <= loss(weight(), RTN(solver.clip)(weight(), None, spec))


@pytest.mark.parametrize("name", SOLVERS)
def test_group_that_does_not_divide(name: str) -> None:
    with pytest.raises(TersorError, match="group 64 does not divide the 96 input features"):
        SOLVERS[name]()(weight(), observed(inputs()), QSpec(4, 64))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_weight_that_is_not_finite_is_refused(name: str) -> None:
    w = weight()
    w[3, 5] = float("nan")
    with pytest.raises(TersorError, match="NaN"):
        SOLVERS[name]()(w, observed(inputs()), QSpec(4, 32))


# --- rounding to nearest -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rtn_is_the_nearest_code(spec: QSpec, dtype: torch.dtype) -> None:
    w = weight(dtype)
    q = RTN()(w, None, spec)
    grid = range_grid(w, spec.group or K, spec.bits, spec.symmetric, dtype)
    assert torch.equal(q.scales.double(), grid.scales)
    group_of = torch.arange(K) // (spec.group or K)
    scales, zeros = spread(grid.scales, group_of), spread(grid.zeros, group_of)
    want = round_to_nearest(w, scales, zeros, spec.levels)
    # w / scale is rounded to float32 before it is rounded to a code: only at a tie can that matter.
    steps = w.double() / scales
    tie = ((steps - steps.floor()) - 0.5).abs() <= steps.abs() * 2.0**-23
    assert ((q.codes == want) | tie).all()
    assert tie.double().mean() < 0.02


def test_rtn_clip_lowers_the_squared_error() -> None:
    spec = QSpec(3, 32, symmetric=False)
    plain, clipped = (RTN(clip)(weight(), None, spec).dequantize() for clip in (False, True))
    assert (clipped - weight()).square().sum() < (plain - weight()).square().sum()


# --- GPTQ ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gptq_is_the_published_form(spec: QSpec, act_order: bool) -> None:
    stats = observed(inputs())
    gram = stats.gram.clone()
    solver = GPTQ(damp=0.02, act_order=act_order)
    q = solver(weight(), stats, spec)
    order = torch.arange(K)
    if act_order:
        order = torch.argsort(gram.diagonal(), descending=True)
        assert not torch.equal(order, torch.arange(K))
    group_of = (torch.arange(K) // (spec.group or K))[order]
    zeros = torch.full_like(q.scales, spec.midpoint) if q.zeros is None else q.zeros
    check_gptq_codes(
        q.codes[:, order],
        weight()[:, order],
        damped(gram, 0.02)[order][:, order],
        spread(q.scales, group_of),
        spread(zeros, group_of),
        spec.levels,
    )


def test_linears_that_share_an_input_share_the_factor() -> None:
    stats = observed(inputs())
    solver = GPTQ()
    first = solver(weight(), stats, QSpec(4, 32))
    again = solver(weight(), stats, QSpec(4, 32))
    assert torch.equal(first.codes, again.codes)
    assert stats.factor(solver.damp, solver.act_order) is stats.factor(0.01, False)
    with pytest.raises(ValueError, match="already factored"):
        stats.factor(0.05, False)


def test_dead_inputs_are_rounded_and_noted() -> None:
    x = inputs()
    x[:, [4, 40]] = 0
    stats = observed(x)
    q = GPTQ(clip=False)(weight(), stats, QSpec(4, 32))
    rounded = RTN()(weight(), None, QSpec(4, 32))
    assert torch.equal(q.codes[:, [4, 40]], rounded.codes[:, [4, 40]])
    assert stats.notes == ["2 of its 96 inputs were always zero"]
    assert stats.departure is None


def test_few_tokens_are_noted() -> None:
    stats = observed(inputs(tokens=5))
    GPTQ()(weight(), stats, QSpec(4, 32))
    assert stats.notes == ["only 5 tokens for 96 inputs"]


def test_raised_damping_is_a_departure() -> None:
    """One token gives a matrix of rank one, which float32 cannot factor with so little added."""
    stats = observed(inputs(tokens=1))
    GPTQ(damp=1e-9)(weight(), stats, QSpec(4, 32))
    assert stats.departure is not None
    assert stats.departure.startswith("damping raised from 1e-09 to ")


def test_gptq_needs_statistics() -> None:
    for stats in (None, GramStats(K)):
        with pytest.raises(TersorError, match="gptq needs statistics"):
            GPTQ()(weight(), stats, QSpec(4, 32))
    with pytest.raises(TersorError, match="damp must be between 0 and 1"):
        GPTQ(damp=0)
