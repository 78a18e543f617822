"""Weights without 2:4 zeros on an NVIDIA GPU; skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tersor import QSpec, QuantLinear, sparse
from tersor.kernels import PATTERN
from tersor.oracle import random_qweight, random_values
from tersor.sparse_linear import SparseLinear, swap_sparse_linears
from test_cuda import SHAPES, check, inputs

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
HALVES = (torch.float16, torch.bfloat16)

# Of compute capability 8.0 and later.
sparse_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="there is no NVIDIA GPU that leaves zeros out",
)


@pytest.fixture
def always() -> Iterator[None]:
    sparse.use_sparse("always")
    yield
    sparse.use_sparse("auto")


@sparse_gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("spec", [QSpec(4, 128), QSpec(4, 32, False), QSpec(3, None)], ids=str)
def test_codes_without_zeros_against_float64(always, dtype, spec):
    for n, k in SHAPES:
        if k % (spec.group or k):
            continue
        q = random_qweight(n, k, spec, dtype, pattern=PATTERN)
        made = QuantLinear(q, torch.randn(n), dtype=dtype).to("cuda")
        assert made.grid is not None and made.grid.sparse
        for m in (1, 2, 8, 9, 16, 33, 64, 65, 128, 129, 513):
            x = inputs(m, k, dtype, seed=m).cuda()
            y = made(x)
            check(made, x, y)
            assert torch.equal(y, made(x))
        back = made.cpu().qweight()
        assert torch.equal(back.codes, q.codes) and torch.equal(back.scales, q.scales)


@sparse_gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_values_without_zeros_against_float64(dtype):
    for n, k in SHAPES:
        w = random_values(n, k, dtype).cuda()
        made = SparseLinear(w, torch.randn(n).cuda())
        assert torch.equal(made.weight, w)
        for m in (1, 2, 8, 9, 16, 33, 64, 65, 128, 129, 513):
            x = inputs(m, k, dtype, seed=m).cuda()
            y = made(x)
            check(made, x, y)
            assert torch.equal(y, made(x))
        other = HALVES[1 - HALVES.index(dtype)]
        x = inputs(3, k, other).cuda()
        error = made(x).double() - torch.nn.functional.linear(x.double(), w.double(), made.bias)
        assert float(error.abs().max()) < 0.05 * k**0.5


@sparse_gpu
def test_a_token_that_is_not_finite_is_seen_by_every_row(always):
    q = random_qweight(256, 512, QSpec(4, 64), torch.float16, pattern=PATTERN)
    w = random_values(256, 512, torch.float16)
    for made in (QuantLinear(q).to("cuda"), SparseLinear(w.cuda())):
        for m in (3, 20, 100):
            x = inputs(m, 512, torch.float16).cuda()
            expected = made(x)
            x[1, 77], x[2, 400] = float("nan"), float("inf")
            y = made(x)
            assert not bool(y[1:3].isfinite().any())
            y[1:3] = expected[1:3]
            assert torch.equal(y, expected)


@sparse_gpu
def test_a_sparse_layer_there_and_back():
    linear = nn.Linear(256, 64, dtype=torch.bfloat16)
    linear.weight.data = random_values(64, 256, torch.bfloat16)
    made = SparseLinear.from_linear(linear)
    x = inputs(3, 256, torch.bfloat16)
    expected = made(x)
    made = made.to("cuda")
    assert torch.equal(made.state_dict()["weight"].cpu(), linear.weight)
    made.load_state_dict(linear.state_dict())
    check(made, x.cuda(), made(x.cuda()))
    assert torch.equal(made.cpu()(x), expected)


@sparse_gpu
def test_measuring_and_swapping_on_a_gpu(always):
    gpu = torch.device("cuda:0")
    for found in (
        sparse.measure(1, 1024, 2048, QSpec(4, 128), device=gpu),
        sparse.measure_values(1, 1024, 2048, device=gpu),
    ):
        assert 0 < found.dense < 0.1 and 0 < found.sparse < 0.1
    model = nn.ModuleDict({"good": nn.Linear(80, 64), "whole": nn.Linear(80, 64)}).half().cuda()
    model["good"].weight.data = random_values(64, 80, torch.float16).cuda()
    x = inputs(5, 80, torch.float16).cuda()
    expected = model["good"](x)
    assert swap_sparse_linears(model) == {"good": "swapped"}
    assert isinstance(model["good"], SparseLinear)
    assert torch.allclose(model["good"](x), expected, rtol=2e-3, atol=2e-3)
    sparse.use_sparse("auto")
    layer = QuantLinear(random_qweight(64, 128, QSpec(4, 64), torch.float16, pattern=PATTERN))
    measured = sparse.measure(1, 64, 128, QSpec(4, 64), None, device=gpu)
    moved = layer.to(gpu)
    assert moved.grid is not None
    assert moved.grid.sparse == (measured.gain > 1)


@sparse_gpu
def test_zeros_are_left_out_in_a_graph(always):
    q = random_qweight(4096, 4096, QSpec(4, 128), torch.float16, pattern=PATTERN)
    made = QuantLinear(q).to("cuda")
    x = inputs(4, 4096, torch.float16).cuda()
    expected = made(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = made(x)
    for _ in range(5):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result, expected)
