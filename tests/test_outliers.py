"""LLM.int8() on the CPU: columns of the input with large values stay in 16 bits."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tersor import ActSpec, QSpec, QuantLinear, Scheme, TersorError, sparse
from tersor.qweight import QWeight
from tersor.testing import DTYPES, assert_close, oracle, random_qweight

N, K = 37, 192
KEEPS = ActSpec(outliers=6.0)
SPECS = [QSpec(8, None), QSpec(8, 64, False), QSpec(4, 32), QSpec(4, None, False), QSpec(3, 32)]


def inputs(m: int, k: int = K, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Every ninth column is large in a token; one token is zero where there are several."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=draw).clamp(-5, 5)
    columns = torch.randperm(k, generator=draw)[: k // 9]
    x[torch.randint(m, (len(columns),), generator=draw), columns] *= 40
    if m > 2:
        x[1] = 0
    return x.to(dtype)


def meant(x: torch.Tensor, threshold: float) -> np.ndarray:
    """What LLM.int8() multiplies with, in float64: from the definition, a column at a time."""
    rows = x.float().numpy()
    exact = [
        any(np.isfinite(value) and abs(value) > np.float32(threshold) for value in rows[:, j])
        for j in range(rows.shape[1])
    ]
    rest = np.where(exact, np.float32(0), rows)
    scale = np.abs(rest).max(axis=1, keepdims=True) / np.float32(127.5)
    codes = np.clip(np.rint(rest / np.where(scale > 0, scale, 1)), -128, 127)
    return np.where(exact, rows.astype(np.float64), codes.astype(np.float64) * scale)


# --- the setting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, 0.0, -6.0, float("nan"), float("inf"), 1e39, 1e-40, "6"])
def test_a_threshold_is_a_positive_number(wrong):
    with pytest.raises(TersorError, match="positive number beyond which columns stay"):
        ActSpec(outliers=wrong)


def test_schemes_say_it():
    assert str(Scheme(QSpec(8, None), KEEPS)) == "W8A8, outliers beyond 6"
    assert Scheme(QSpec(8, None), KEEPS) != Scheme(QSpec(8, None), ActSpec())
    made = QuantLinear(random_qweight(N, K, QSpec(8, None), torch.float32), None, KEEPS)
    assert made.scheme.activation == KEEPS
    assert made.outliers == 6.0
    assert "outliers beyond 6" in repr(made)
    assert copy.deepcopy(made).outliers == 6.0


def test_the_columns_are_those_of_the_definition():
    for dtype in DTYPES:
        x = inputs(7, dtype=dtype)
        x[2, 5], x[3, 6], x[4, 7] = float("nan"), float("inf"), 6.0
        kept = KEEPS.kept(x)
        assert kept.shape == (K,)
        for j in range(K):
            assert bool(kept[j]) == any(6.0 < abs(v) < float("inf") for v in x[:, j].tolist())
    assert ActSpec().kept(inputs(3)) is None
    x = torch.tensor([[6.0, 6.03125]]).bfloat16()  # the threshold is not rounded to bfloat16
    assert ActSpec(outliers=6.01).kept(x).tolist() == [False, True]
    assert KEEPS.kept(inputs(6).view(2, 3, K)).equal(KEEPS.kept(inputs(6)))


# --- the product ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [1e-3, 2.0, 6.0, 100.0])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_products_against_float64(spec, threshold, dtype):
    q = random_qweight(N, K, spec, torch.bfloat16)
    stored = q
    if spec.symmetric and spec.bits < 4:  # on a 4-bit kernel: the sums are those of that weight
        stored = QWeight(QSpec(4, spec.group), q.codes + 8 - spec.midpoint, q.scales, None)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(2))
    made = QuantLinear(q, bias, ActSpec(outliers=threshold))
    for m in (1, 2, 5, 33, 200):
        x = inputs(m, dtype=dtype, seed=m)
        expected, tolerance = oracle(x, stored, bias, made.activation)
        assert_close(made(x), expected, tolerance, f"{m} tokens")
        # The oracle's own columns, by the definition; it quantizes in float64, which may round a
        # value at a tie to its other side.
        wide = torch.from_numpy(meant(x, threshold)) @ q.dequantize(torch.float64).T
        apart = (wide + bias.double() - expected).abs()
        assert bool((apart <= tolerance).all())


@pytest.mark.parametrize("spec", [QSpec(8, None), QSpec(4, 128), QSpec(8, 128)], ids=str)
def test_weights_whose_zeros_are_left_out(spec):
    sparse.use_sparse("always")
    try:
        q = random_qweight(40, 512, spec, torch.float16, pattern=(2, 4))
        made = QuantLinear(q, None, ActSpec(outliers=6.0))
    finally:
        sparse.use_sparse("auto")
    assert "tile16s24" in repr(made)
    for m in (1, 9, 70):
        x = inputs(m, 512, torch.bfloat16, m)
        assert_close(made(x), *oracle(x, q, None, made.activation), f"{m} tokens")


def test_many_tokens_share_their_columns():
    """An outlier of the last token counts for the first, however many are multiplied at a time."""
    q = random_qweight(N, 64, QSpec(8, None), torch.float32)
    made = QuantLinear(q, None, KEEPS)
    x = inputs(1100, 64)
    x[:, 3] = 0.3
    x[-1, 3] = 7.0
    assert_close(made(x), *oracle(x, q, None, KEEPS), "1100 tokens")


def test_it_gains_what_it_is_for():
    """Against the product with x as it is, one column of which is large."""
    q = random_qweight(64, 256, QSpec(8, None), torch.float32)
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    x[:, 17] *= 100
    exact = x.double() @ q.dequantize(torch.float64).T
    plain, kept = (
        float((QuantLinear(q, None, each)(x).double() - exact).square().mean())
        for each in (ActSpec(), KEEPS)
    )
    assert kept < plain / 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_without_outliers_the_bits_are_those_of_int8(spec, dtype):
    q = random_qweight(N, K, spec, torch.bfloat16)
    x = torch.randn(9, K, generator=torch.Generator().manual_seed(3)).to(dtype)
    plain, kept = (QuantLinear(q, torch.ones(N), each) for each in (ActSpec(), KEEPS))
    assert torch.equal(plain(x), kept(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_is_not_finite_spoils_no_other(value, dtype):
    q = random_qweight(N, K, QSpec(4, 32), torch.bfloat16)
    made = QuantLinear(q, None, KEEPS)
    x = inputs(9, dtype=dtype)
    x[:, 40] = 20.0  # an outlier, whichever token is spoilt
    x[3], x[7] = 0.5, 0.25  # of no other
    x[3, 40], x[7, 40] = 20.0, 20.0
    expected = made(x)
    assert bool(expected.isfinite().all())
    x[3, 40], x[7, 100] = value, value
    found = made(x)
    rest = [0, 1, 2, 4, 5, 6, 8]
    assert torch.equal(found[rest], expected[rest])
    assert not bool(found[[3, 7]].isfinite().any())


def test_an_order_of_columns_permutes_outliers_too():
    q = random_qweight(N, K, QSpec(4, 32), torch.bfloat16)
    shuffled = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    q.order = (torch.arange(K) // 32)[shuffled].int()
    x = inputs(5)
    assert_close(QuantLinear(q, None, KEEPS)(x), *oracle(x, q, None, KEEPS), "in order")


def test_views_and_threads():
    from tersor import _core

    made = QuantLinear(random_qweight(300, K, QSpec(8, 64), torch.float32), None, KEEPS)
    wide = inputs(11, 2 * K)
    for x in (wide[:, 1 : K + 1], wide[::2, :K], wide[:, ::2], wide[:0, :K], wide[0, :K]):
        assert torch.equal(made(x), made(x.contiguous()))
    expected = made(wide[:, :K])
    before = _core.thread_count()
    _core.set_thread_count(3)
    try:
        assert torch.equal(made(wide[:, :K]), expected)
    finally:
        _core.set_thread_count(before)


# --- torch ----------------------------------------------------------------------------------------


def test_operator_is_well_formed():
    made = QuantLinear(random_qweight(N, K, QSpec(4, 32), torch.float32), torch.ones(N), KEEPS)
    for outliers in (None, 6.0):
        x = inputs(3).view(1, 3, K).requires_grad_()
        given = (x, made.packed, made.bias, N, outliers)
        torch.library.opcheck(torch.ops.tersor.linear.default, given)


def test_compiles_and_has_the_gradient_of_its_weight():
    q = random_qweight(N, K, QSpec(8, None), torch.float32)
    made = QuantLinear(q, None, KEEPS)
    x = inputs(4).requires_grad_()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert torch.equal(y, made(x.detach()))
    grad = torch.randn(4, N, generator=torch.Generator().manual_seed(0))
    y.backward(grad)
    expected = grad.double() @ q.dequantize(torch.float64)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_bad_calls_of_the_operator():
    q = random_qweight(N, K, QSpec(8, None), torch.float32)
    plain, int8 = QuantLinear(q), QuantLinear(q, None, ActSpec())
    x = inputs(2)
    with pytest.raises(TersorError, match="this weight takes 16-bit ones"):
        torch.ops.tersor.linear(x, plain.packed, None, N, 6.0)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(TersorError, match="must be a positive number"):
            torch.ops.tersor.linear(x, int8.packed, None, N, wrong)
