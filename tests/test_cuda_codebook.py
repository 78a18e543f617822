"""The CUDA kernels for NF4 and FP4, run on the CPU by tests/emulator, against float64 and against
tersor.adapters.codebook; no GPU is needed."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import emulated
from emulated import DTYPES, pointer
from tersor.adapters.codebook import FP4, NF4, VALUES, Codebook, CodebookWeight, scale_shapes

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler")

HALVES = (torch.float16, torch.bfloat16)
TOKENS = (8, 16, 32, 64)
# n, k and the block: rows, columns and groups that do not fill what the kernels go by.
SHAPES = [(16, 32, 32), (64, 64, 64), (80, 96, 32), (37, 160, 32), (131, 320, 64), (64, 384, 128),
          (9, 1024, 1024), (70, 16, 16), (300, 128, 64)]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    built = emulated.build(tmp_path_factory.mktemp("emulated"))
    built.codebook_bytes.restype, built.codebook_rounded.restype = ctypes.c_int64, ctypes.c_float
    return built


def random_weight(n: int, k: int, spec: Codebook, seed: int = 0) -> CodebookWeight:
    """Any codes and scales, steps that all differ."""
    draw = torch.Generator().manual_seed(seed)
    made = CodebookWeight(spec, (n, k), torch.empty(0), torch.empty(0))
    for name, (length, dtype) in scale_shapes(spec, (n, k)).items():
        if dtype == torch.float32:
            tensor = torch.rand(length, generator=draw) + 0.5
        else:
            low, high = (0, 256) if dtype == torch.uint8 else (-127, 128)
            tensor = torch.randint(low, high, (length,), generator=draw).to(dtype)
        setattr(made, name, tensor / 127 if name == "steps" else tensor)
    return made


def described(q: CodebookWeight) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * 4)(*q.shape, q.spec.block, q.spec.double)


def parts(q: CodebookWeight) -> list[ctypes.c_void_p]:
    return [pointer(part) for part in (q.packed, q.scales, q.steps, q.mean)]


def pack(library: ctypes.CDLL, q: CodebookWeight, workers: int = 3) -> Tensor:
    size = library.codebook_bytes(described(q))
    room = torch.full((size + 256,), 0xEE, dtype=torch.uint8)
    begin = -room.data_ptr() % 128
    packed = room[begin : begin + size]
    library.codebook_pack(described(q), pointer(packed), *parts(q), workers, 0)
    assert bool((room[begin + size :] == 0xEE).all()) and bool((room[:begin] == 0xEE).all())
    return packed


def values(q: CodebookWeight) -> Tensor:
    return VALUES[q.spec.values]()


def rounded(library: ctypes.CDLL, each: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 [16]: the values that a kernel multiplies with."""
    made = torch.empty(16)
    unit = library.codebook_rounded(pointer(each), DTYPES.index(dtype), pointer(made))
    assert torch.equal(made, made.to(dtype).float())
    return made.double() * unit


def linear(library, q, packed, x, bias, tokens, resident, seed, eager):
    """x [m, k] -> y [m, n]; what lies around y is watched."""
    m, n = x.shape[0], q.shape[0]
    room = torch.full((m + 2, n + 3), float("nan"), dtype=x.dtype)
    y, long = room[1:-1, :n], ctypes.c_int64
    library.codebook_linear(
        described(q), pointer(packed), pointer(values(q)), pointer(x), pointer(y), pointer(bias), m,
        long(x.stride(0)), long(y.stride(0)), DTYPES.index(x.dtype), tokens, resident, seed,
        int(eager),
    )  # fmt: skip
    around = room.clone()
    around[1:-1, :n] = float("nan")
    assert bool(around.isnan().all())
    return y


# --- packing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [False, True])
def test_unpacking_is_the_inverse_of_packing(library, shape, double):
    n, k, block = shape
    q = random_weight(n, k, NF4(block, double))
    packed = pack(library, q)
    assert torch.equal(pack(library, q, workers=1), packed)
    found = random_weight(n, k, q.spec, seed=1)
    library.codebook_pack(described(q), pointer(packed), *parts(found), 2, 1)
    for name in scale_shapes(q.spec, q.shape):
        assert torch.equal(getattr(found, name), getattr(q, name)), name


def test_a_weight_takes_the_bits_that_it_has(library):
    for spec in (NF4(64), NF4(128, False), FP4(32)):
        size = 8 * library.codebook_bytes((ctypes.c_int64 * 4)(4096, 4096, spec.block, spec.double))
        assert size / 4096**2 == pytest.approx(spec.bits, abs=1e-4)  # the mean has 128 bytes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", [NF4, FP4])
@pytest.mark.parametrize("double", [False, True])
def test_dequantized_to_the_same_bits(library, shape, spec, double):
    n, k, block = shape
    q = random_weight(n, k, spec(block, double))
    packed = pack(library, q)
    for dtype, (begin, end) in itertools.product(DTYPES, ((0, n), (5, 8))):
        found = torch.full((end - begin, k), float("nan"), dtype=dtype)
        library.codebook_dequantize(
            described(q), pointer(packed), pointer(values(q)), ctypes.c_int64(begin),
            ctypes.c_int64(end), pointer(found), DTYPES.index(dtype), 2,
        )  # fmt: skip
        assert torch.equal(found, q.dequantize(dtype)[begin:end])


# --- the values in 16 bits -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
def test_values_are_rounded_as_little_as_can_be(library, dtype):
    """No more than one rounding to nearest; less than that of the values themselves; FP4 not at
    all, but for the digits that float32 has of its thirds."""
    nf4, fp4 = VALUES["nf4"](), VALUES["fp4"]()
    found = rounded(library, nf4, dtype)
    off = (found - nf4.double()).abs()
    half = torch.finfo(dtype).eps / 2
    assert bool((off <= half * (1 + 2.0**-20) * nf4.abs()).all())
    plain = (nf4.to(dtype).double() - nf4.double()).abs()
    assert float(off.square().sum()) < 0.5 * float(plain.square().sum())
    assert bool(((rounded(library, fp4, dtype) - fp4.double()).abs() <= 2.0**-23 * fp4.abs()).all())


# --- the product ---------------------------------------------------------------------------------


def check(library, q, m, dtype, tokens, resident, seed, eager, with_bias=True):
    """Against the weight that is meant, and, far more narrowly, against its values as the tensor
    cores have them: what is left is sums in float32 however they are ordered (k additions, the
    scale's few multiplications, the bias), and the last rounding."""
    n, k = q.shape
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k + 8, generator=draw).to(dtype)[:, :k]
    bias = torch.randn(n, generator=draw) if with_bias else None
    y = linear(library, q, pack(library, q), x, bias, tokens, resident, seed, eager)
    wide, added = x.double(), torch.zeros(n) if bias is None else bias.double()
    nibbles = torch.stack([q.packed & 15, q.packed >> 4], 1).flatten().long()
    scales = q.block_scales().double().repeat_interleave(q.spec.block).view(n, k)
    codes = nibbles[: n * k].view(n, k)
    meant = values(q).double()[codes] * scales
    multiplied = rounded(library, values(q), dtype)[codes] * scales
    unit = torch.finfo(dtype).eps / 2
    terms = wide.abs() @ meant.abs().T
    for w, values_off in ((multiplied, 0.0), (meant, unit)):
        exact = wide @ w.T + added
        room = ((k + 10) * 2.0**-24 + values_off) * 1.01 * (terms + added.abs())
        assert bool(((y.double() - exact).abs() <= room + exact.abs() * unit + 1e-7).all())


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("double", [False, True])
def test_products_against_float64(library, tokens, dtype, double):
    """Few and many workers, so that tiles are whole and shared; any number of tokens; copies as
    early and as late as they may be."""
    cases = itertools.cycle(itertools.product((1, 3, 64), (False, True)))
    for seed, (n, k, block) in enumerate(SHAPES):
        resident, eager = next(cases)
        q = random_weight(n, k, (NF4, FP4)[seed % 2](block, double), seed)
        m = (1, tokens, tokens + 1, max(1, tokens - 3))[seed % 4]
        check(library, q, m, dtype, tokens, resident, seed, eager, with_bias=seed % 3 != 1)


def test_the_same_bits_in_any_order_of_threads(library):
    q = random_weight(144, 448, NF4(64))
    packed = pack(library, q)
    x = torch.randn(20, 448, generator=torch.Generator().manual_seed(1)).half()
    for tokens, resident in itertools.product((8, 64), (1, 5, 100)):
        made = [
            linear(library, q, packed, x, None, tokens, resident, seed, eager)
            for seed, eager in ((0, False), (1, True), (2, False))
        ]
        assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_a_token_that_is_not_finite_spoils_no_other(library):
    q = random_weight(64, 128, NF4(64))
    packed = pack(library, q)
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(0)).half()
    expected = linear(library, q, packed, x, None, 16, 4, 0, False)
    x[3, 5], x[7, 100] = float("nan"), float("inf")
    found = linear(library, q, packed, x, None, 16, 4, 0, False)
    rest = [0, 1, 2, 4, 5, 6, 8]
    assert torch.equal(found[rest], expected[rest])
    assert not bool(found[[3, 7]].isfinite().any())


def test_the_table_is_behind_a_barrier(library):
    """Without barriers a lane reads entries before they are written."""
    q = random_weight(64, 64, NF4(64))  # one step, so that no copy is ever overwritten
    packed, x = pack(library, q), torch.ones(8, 64).half()
    expected = linear(library, q, packed, x, None, 8, 1, 0, True)
    library.use_barriers(0)
    try:
        found = linear(library, q, packed, x, None, 8, 1, 0, True)
    finally:
        library.use_barriers(1)
    assert not np.array_equal(found.numpy(), expected.numpy())
