"""LLM.int8() by the CUDA kernels, run on the CPU by tests/emulator, against float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import emulated
from emulated import Weight
from test_cuda_emulated import SHAPES, bound

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler")

HALVES = (torch.float16, torch.bfloat16)
THRESHOLDS = {"none": 1e4, "some": 6.0, "all": 1e-6}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated.build(tmp_path_factory.mktemp("emulated"))


def inputs(m: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows with room between them; every seventh column is large in one token or more."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k + 8, generator=draw)
    columns = torch.randperm(k, generator=draw)[: max(1, k // 7)]
    x[torch.randint(m, (len(columns),), generator=draw), columns] *= 30
    x[m // 2] = 0
    return x.to(dtype)[:, :k]


def check(library, weight, x, kernel, threshold, resident, seed, eager):
    bias = torch.randn(len(weight.codes), generator=torch.Generator().manual_seed(seed))
    y = emulated.linear(
        library, weight, weight.pack(library), x, bias, kernel, resident, seed, eager, threshold
    )
    wide, dense = emulated.as_int8(x.float().numpy(), threshold), weight.dense()
    exact = wide @ dense.T + bias.double().numpy()
    error = np.abs(y.double().numpy() - exact)
    assert (error <= bound(wide, dense, bias.double().numpy(), exact, x.dtype)).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("threshold", [0.5, 3.0, 1e5])
def test_columns_are_found(library, dtype, threshold):
    for m, k in ((1, 16), (3, 64), (40, 80), (65, 208), (200, 128)):
        x = inputs(m, k, dtype, m)
        x[0, 3], x[m - 1, 5], x[m // 2, 7] = float("nan"), float("inf"), -float("inf")
        found = emulated.find_outliers(library, x, threshold, seed=m).numpy()
        expected = ((x.float().abs() > threshold) & x.isfinite()).any(0).numpy()
        bits = np.unpackbits(found, bitorder="little")
        assert (bits[:k] == expected).all()
        assert not bits[k:].any()


def test_the_threshold_itself_is_no_outlier(library):
    x = torch.zeros(2, 16).half()
    x[0, 1], x[1, 2], x[0, 4] = 6.0, -6.0, -6.004
    found = emulated.find_outliers(library, x, 6.0)
    assert found.tolist() == [1 << 4, *[0] * 7]


@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [4, 8])
def test_products_against_float64(library, tokens, dtype, bits):
    """Few and many workers, so that tiles are whole and shared; copies as early and as late as they
    may be; no, some and all columns in 16 bits."""
    cases = itertools.cycle(itertools.product((1, 3, 64), (False, True)))
    thresholds = itertools.cycle(("some", "all", "some", "none"))
    for seed, (n, k, g) in enumerate(SHAPES[: 7 if tokens == 8 else 3]):
        resident, eager = next(cases)
        weight = Weight.random(n, k, g, bits, seed % 2 == 0, emulated.DTYPES[seed % 3], seed)
        m = (tokens + 1, 1, tokens, max(1, tokens - 3))[seed % 4]
        x = inputs(m, k, dtype, seed)
        threshold = THRESHOLDS[next(thresholds)]
        check(library, weight, x, ("outliers", tokens), threshold, resident, seed, eager)


@pytest.mark.parametrize("m", [130, 200])
def test_many_tokens(library, m):
    weight = Weight.random(80, 192, 64, 8, True, torch.bfloat16, m)
    x = inputs(m, 192, torch.bfloat16, m)
    check(library, weight, x, ("outliers", 64), 6.0, 5, m, False)


@pytest.mark.parametrize("tokens", [8, 64])
def test_without_outliers_the_bits_are_those_of_int8(library, tokens):
    weight = Weight.random(144, 320, 64, 4, True, torch.bfloat16)
    x = torch.randn(11, 320, generator=torch.Generator().manual_seed(1)).half()
    bias, packed = torch.randn(144), weight.pack(library)
    made = [
        emulated.linear(library, weight, packed, x, bias, (kind, tokens), 1, 0, False, 100.0)
        for kind in ("int8", "outliers")
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize("tokens", [8, 32])
def test_the_same_bits_in_any_order_of_threads(library, tokens):
    weight = Weight.random(144, 448, 64, 4, True, torch.bfloat16)
    x, packed = inputs(20, 448, torch.float16, 1), weight.pack(library)
    for resident in (1, 5, 100):
        made = [
            emulated.linear(
                library, weight, packed, x, None, ("outliers", tokens), resident, seed, eager, 6.0
            )
            for seed, eager in ((0, False), (1, True), (2, False))
        ]
        assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_spoils_no_other(library, dtype, value):
    """Neither among the columns in 16 bits, nor among the others; nor does it choose columns."""
    weight = Weight.random(64, 128, 64, 4, False, torch.float16)
    packed, x = weight.pack(library), inputs(9, 128, dtype, 0)
    x[:, 40] = 20.0  # an outlier, whichever token is spoilt
    rest = [0, 1, 2, 4, 5, 6, 8]

    def run() -> torch.Tensor:
        return emulated.linear(library, weight, packed, x, None, ("outliers", 16), 4, 0, False, 6.0)

    x[3], x[7] = 0.5, 0.25  # not the reason for any outlier but that one
    x[3, 40], x[7, 40] = 20.0, 20.0
    expected = run()
    assert bool(expected.isfinite().all())
    x[3, 40], x[7, 100] = value, value
    found = run()
    assert torch.equal(found[rest], expected[rest])
    assert not bool(found[[3, 7]].isfinite().any())
