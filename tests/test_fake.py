"""Fake quantization: the values of QWeight, and gradients against formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.errors import TersorError
from tersor.oracle import random_qweight
from tersor.qweight import QSpec, QWeight
from tersor.solvers import RTN
from tersor.training.fake import (
    FakeQuantize,
    fake_quantize,
    fake_quantize_activation,
    into_cells,
    ready,
    stored_scales,
)

N, K = 5, 64
SPECS = [
    QSpec(bits, group, symmetric)
    for bits in (2, 3, 4, 8)
    for group in (16, None)
    for symmetric in (True, False)
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(spec: QSpec, dtype: torch.dtype = torch.float32) -> tuple[Tensor, QWeight]:
    """Random ones with some that lie far beyond the grid, and a grid for them."""
    draw = torch.Generator().manual_seed(spec.bits)
    w = torch.randn(N, K, generator=draw) * torch.logspace(-2, 1, N)[:, None]
    q = RTN(clip=True)(w.to(dtype), None, spec)
    w[:, 3] *= 20
    return w.to(dtype), q


def per_column(q: QWeight, values: Tensor | None) -> Tensor:
    """Scales or zeros, float64 [n, k]."""
    midpoint = torch.full(q.scales.shape, q.spec.midpoint)
    values = midpoint if values is None else values
    return values.double().repeat_interleave(q.k // values.shape[1], dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_values_are_the_nearest_of_the_grid(spec: QSpec, dtype: torch.dtype) -> None:
    """By trying all of them, in float64; and to the bit what the codes stand for."""
    w, q = weights(spec, dtype)
    found = fake_quantize(w, q.scales.float(), q.zeros, spec, dtype)
    assert found.dtype == dtype
    scales, zeros = per_column(q, q.scales), per_column(q, q.zeros)
    levels = (torch.arange(spec.levels) - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
    distance = (levels - w.double().unsqueeze(-1)).abs()
    nearest = distance.argmin(-1, keepdim=True)
    slack = torch.finfo(torch.float32).eps * (w.double().abs() + scales)  # near a tie, either
    exact = fake_quantize(w.float(), q.scales.float(), q.zeros, spec, dtype).double()
    assert bool(((exact - w.double()).abs() <= distance.amin(-1) + slack).all())
    off = (exact - levels.gather(-1, nearest).squeeze(-1)).abs() > slack
    assert float(off.double().mean()) < 0.01
    codes = ((exact / scales).round() + zeros).to(torch.uint8)
    assert torch.equal(found, QWeight(spec, codes, q.scales, q.zeros).dequantize(dtype))


def plain_gradients(w: Tensor, q: QWeight, g: Tensor) -> tuple[Tensor, Tensor]:
    """One weight at a time, in float64, from the formulas of arXiv:1902.08153, section 2.1, without
    the gradient scale."""
    n, k = w.shape
    groups = q.scales.shape[1]
    of_w, of_s = torch.zeros(n, k, dtype=torch.float64), torch.zeros(n, groups).double()
    for i in range(n):
        for j in range(k):
            at = j // (k // groups)
            scale = float(q.scales[i, at])
            zero = q.spec.midpoint if q.zeros is None else int(q.zeros[i, at])
            low, high = -zero, 2**q.spec.bits - 1 - zero
            v = float(w[i, j]) / scale
            level = round(v)  # half to even
            if level < low:
                slope = low
            elif level > high:
                slope = high
            else:
                slope = level - v
                of_w[i, j] = float(g[i, j])
            of_s[i, at] += float(g[i, j]) * slope
    return of_w, of_s


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_are_the_formulas(spec: QSpec) -> None:
    w, q = weights(spec)
    scales = q.scales.clone().requires_grad_()
    w.requires_grad_()
    g = torch.randn(N, K, generator=torch.Generator().manual_seed(7))
    fake_quantize(w, scales, q.zeros, spec, torch.float32).backward(g)
    of_w, of_s = plain_gradients(w.detach(), q, g)
    assert w.grad is not None and scales.grad is not None
    assert torch.equal(w.grad.double(), of_w)
    assert 0 < int((w.grad == 0).sum()) < w.numel()  # some are clipped, and not all
    # A difference of two numbers up to Q_p + 1, each with a rounding, times g; summed.
    size = 2 * spec.levels * torch.finfo(torch.float32).eps * g.double().abs()
    bound = size.view(*of_s.shape, -1).sum(-1) * K
    assert bool(((scales.grad.double() - of_s).abs() <= bound).all())


def test_the_slope_of_what_is_clipped_is_that_of_the_function() -> None:
    """There the function is smooth, and finite differences know its slope by the scale."""
    spec = QSpec(3, None)
    w = torch.tensor([[9.0, -9.0, 30.0, -5.5, 4.6, *[9.0] * 11]])
    scales = torch.ones(1, 1).requires_grad_()
    g = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))

    def loss(scale: float) -> float:
        made = fake_quantize(w, torch.tensor([[scale]]), None, spec, torch.float32)
        return float((made * g).double().sum())

    fake_quantize(w, scales, None, spec, torch.float32).backward(g)
    slope = (loss(1 + 2**-7) - loss(1 - 2**-7)) / 2**-6
    assert scales.grad is not None
    assert float(scales.grad) == pytest.approx(slope, rel=1e-5)


def test_a_weight_on_the_last_level_learns_though_its_scale_shrinks() -> None:
    w = torch.full((1, 16), 3.0).requires_grad_()
    fake_quantize(w, torch.full((1, 1), 0.9), None, QSpec(3, None), torch.float32).sum().backward()
    assert w.grad is not None and bool((w.grad == 1).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_stored_positive_and_finite(dtype: torch.dtype) -> None:
    raw = torch.tensor([0.0, -1.0, 1e-45, 1e-39, 0.1, 7e4, 3.4e38, math.inf])
    stored = stored_scales(raw, dtype)
    assert bool((stored > 0).all()) and bool(stored.isfinite().all())
    assert torch.equal(stored.to(dtype).float(), stored)
    assert float(stored[4]) == float(torch.tensor(0.1).to(dtype))


def linear(q: QWeight, transposed: bool = False, learned: bool = True) -> nn.Linear:
    """A layer with weights at the values of q, faked."""
    values = q.dequantize()
    layer = nn.Linear(q.k, q.n, bias=False)
    layer.weight = nn.Parameter(values.t().clone() if transposed else values)
    parametrize.register_parametrization(layer, "weight", FakeQuantize(q, learned, transposed))
    return layer


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_parametrization_gives_the_weight_back(spec: QSpec) -> None:
    q = ready(random_qweight(N, K, spec, torch.bfloat16))
    layer = linear(q)
    fake = layer.parametrizations.weight[0]
    assert torch.equal(layer.weight, q.dequantize())
    again = fake.quantize(layer.parametrizations.weight.original)
    assert torch.equal(again.codes, q.codes) and torch.equal(again.scales, q.scales)
    assert (again.zeros is None) == spec.symmetric and again.scales.dtype == torch.bfloat16
    with torch.no_grad():
        fake.log_bias += 0.1 * torch.randn(fake.log_bias.shape)
    again = fake.quantize(layer.parametrizations.weight.original)
    assert not torch.equal(again.scales, q.scales) and torch.equal(layer.weight, again.dequantize())


def test_columns_in_another_order_and_stored_transposed() -> None:
    draw = torch.Generator().manual_seed(1)
    q = random_qweight(N, K, QSpec(4, 16, False))
    q.order = (torch.randperm(K, generator=draw) // 16).to(torch.int32)
    q = ready(q)
    g = torch.randn(N, K, generator=draw)
    results = []
    for transposed in (False, True):
        layer = linear(q, transposed)
        fake = layer.parametrizations.weight[0]
        weight = layer.weight.t() if transposed else layer.weight
        assert torch.equal(weight, q.dequantize())
        again = fake.quantize(layer.parametrizations.weight.original)
        assert torch.equal(again.codes, q.codes) and torch.equal(again.order, q.order)
        with torch.no_grad():
            fake.log_bias += 0.01
        (layer.weight.t() if transposed else layer.weight).backward(g)
        results.append(fake.log_bias.grad)
    assert torch.equal(*results) and bool(results[0].any())
    columns = torch.argsort(q.order, stable=True)
    plain = linear(QWeight(q.spec, q.codes[:, columns], q.scales, q.zeros))
    with torch.no_grad():
        plain.parametrizations.weight[0].log_bias += 0.01
    plain.weight.backward(g[:, columns])
    assert torch.equal(plain.parametrizations.weight[0].log_bias.grad, results[0])


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_stay_positive_and_learn_by_the_chain_rule(symmetric: bool) -> None:
    """At the start the gradient is that of the paper, relative to the mean scale."""
    q = ready(random_qweight(N, K, QSpec(4, 16, symmetric)))
    fake = linear(q).parametrizations.weight[0]
    g = torch.randn(fake.log_bias.shape)
    fake.scales.backward(g)
    pace = 1 / math.sqrt(16 * (7 if symmetric else 15))
    start = fake.start.double()
    torch.testing.assert_close(fake.log_bias.grad.double(), pace * g * start / start.mean())
    fake.log_bias.grad = None
    with torch.no_grad():
        fake.log_bias.copy_(torch.randn(fake.log_bias.shape) / 50)
    fake.scales.backward(g)
    bias = fake.log_bias.detach().double()

    def loss(bias: Tensor) -> float:
        return float((start * (pace * bias / start.mean()).exp() * g).sum())

    for i, j in ((0, 0), (2, 3), (4, 1)):
        step = torch.zeros_like(bias)
        step[i, j] = 1e-5
        slope = (loss(bias + step) - loss(bias - step)) / 2e-5
        assert float(fake.log_bias.grad[i, j]) == pytest.approx(slope, rel=1e-4)
    for far in (-1e4, 1e4):
        with torch.no_grad():
            fake.log_bias.fill_(far)
        stored = stored_scales(fake.scales, fake.dtype)
        assert bool((stored > 0).all()) and bool(stored.isfinite().all())


def test_weights_move_no_further_than_to_their_codes() -> None:
    for spec in SPECS:
        w, q = weights(spec)
        codes = ((q.codes.int() + 1) % spec.levels).to(torch.uint8)
        other = QWeight(spec, codes, q.scales, q.zeros)
        for each in (q, other):
            near = into_cells(w, each)
            again = fake_quantize(near, each.scales, each.zeros, spec, torch.float32)
            assert torch.equal(again, each.dequantize())
            stays = fake_quantize(w, each.scales, each.zeros, spec, torch.float32) == again
            assert torch.equal(near[stays], w[stays])
            moved = (near - each.dequantize()).double() / per_column(q, q.scales)
            side = (w - each.dequantize()).sign().double()
            rounding = 2 * spec.levels * torch.finfo(torch.float32).eps
            assert bool(((moved - 0.45 * side)[~stays].abs() <= rounding).all())
            assert (each is q) <= bool(stays.double().mean() > 0.9)


def test_what_a_start_must_be() -> None:
    q = random_qweight(14, K, QSpec(4, 16))  # rows 6 and 13 have a scale of zero
    made = ready(q, torch.float16)
    assert made.scales.dtype == torch.float16 and bool((made.scales > 0).all())
    usual = q.scales[q.scales > 0].mean()
    assert float(made.scales[6, 0]) == pytest.approx(float(usual), rel=1e-3)
    torch.testing.assert_close(made.dequantize(), q.dequantize(), rtol=2**-11, atol=0)
    nothing = ready(QWeight(QSpec(4, 16), q.codes, torch.zeros(14, 4)))
    assert bool((nothing.scales == 1).all()) and not bool(nothing.dequantize().any())
    for bad in (-1.0, math.nan, math.inf):
        q.scales[0, 0] = bad
        with pytest.raises(TersorError, match="negative or not finite"):
            ready(q)
    with pytest.raises(TersorError, match=r"not torch.float64"):
        ready(QWeight(q.spec, q.codes, torch.ones(14, 4, dtype=torch.float64)))


# State.


def test_a_state_is_of_one_grid() -> None:
    q = ready(random_qweight(N, K, QSpec(4, 16)))
    saved = linear(q).state_dict()
    assert {name.rpartition(".")[2] for name in saved} == {
        *("original", "start", "settings", "log_bias")
    }
    linear(q).load_state_dict(saved)
    others = (
        linear(ready(random_qweight(N, K, QSpec(3, 16)))),
        linear(ready(random_qweight(N, K, QSpec(4, 16), torch.bfloat16))),
        linear(q, learned=False),
    )
    for other in others:
        with pytest.raises(TersorError, match=r"weight.0 was saved with other settings \[4, 16"):
            other.load_state_dict(saved, strict=False)


def test_dtypes_stay_when_the_model_is_converted() -> None:
    layer = linear(ready(random_qweight(N, K, QSpec(4, 16, False)))).to(torch.bfloat16)
    fake = layer.parametrizations.weight[0]
    assert layer.parametrizations.weight.original.dtype == layer.weight.dtype == torch.bfloat16
    assert fake.log_bias.dtype == fake.start.dtype == torch.float32
    assert fake.zeros.dtype == torch.uint8
    layer.weight.sum().backward()
    assert fake.log_bias.grad.dtype == torch.float32


# Activations.


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_rounded_token_by_token(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 7, 32, generator=draw) * 10).to(dtype)
    x[0, 0] = 0
    x[0, 1, 4] = -100
    x[0, 2, 4] = 100
    found = fake_quantize_activation(x).double().flatten(0, 1)
    for token, made in zip(x.flatten(0, 1).double().tolist(), found.tolist(), strict=True):
        scale = max(map(abs, token)) / 127.5
        for value, rounded in zip(token, made, strict=True):
            steps = value / scale if scale else 0.0
            code = max(-128, min(127, round(steps)))
            close = abs(steps - math.floor(steps) - 0.5) < 1e-4
            codes = {code, math.floor(steps), min(127, math.ceil(steps))} if close else {code}
            least = min(abs(each * scale - rounded) for each in codes)
            assert least <= abs(rounded) * torch.finfo(dtype).eps
    assert float(found[1, 4]) == pytest.approx(-128 / 127.5 * 100, rel=torch.finfo(dtype).eps)
    assert float(found[2, 4]) == pytest.approx(127 / 127.5 * 100, rel=torch.finfo(dtype).eps)
    assert not bool(found[0].any())


def test_gradients_of_activations_pass() -> None:
    x = torch.randn(4, 16, requires_grad=True)
    g = torch.randn(4, 16)
    fake_quantize_activation(x).backward(g)
    assert x.grad is not None and torch.equal(x.grad, g)


def test_activations_that_are_not_finite_stay_so() -> None:
    x = torch.ones(3, 16)
    x[0, 0], x[1, 0] = math.nan, math.inf
    found = fake_quantize_activation(x)
    assert bool(found[:2].isnan().all()) and bool(found[2].isfinite().all())
