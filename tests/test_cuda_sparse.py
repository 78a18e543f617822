"""The CUDA kernels that leave 2:4 zeros out, run on the CPU by tests/emulator, against float64; no
GPU is needed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import emulated
from emulated import Weight
from test_cuda_emulated import HALVES, bound

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler")

TOKENS = (8, 16, 32, 64)
SHAPES = [(16, 16, 16), (64, 64, 64), (80, 96, 32), (144, 160, 32), (208, 320, 64), (64, 384, 128),
          (112, 208, 208), (272, 192, 192)]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated.build(tmp_path_factory.mktemp("emulated"))


# --- packing -------------------------------------------------------------------------------------


def first_operand(lane: int, element: int) -> tuple[int, int]:
    """The row, and the first of the four columns, of element 0 to 7 that a lane holds of the first
    operand of mma.sp.m16n8k32 with 16-bit elements, as the PTX manual has it."""
    group, inside = lane >> 2, lane % 4
    row = group if element in (0, 1, 4, 5) else group + 8
    return row, inside * 4 + (0 if element < 4 else 16)


@pytest.mark.parametrize("bits", [4, 16])
def test_a_lane_finds_its_operands_and_patterns(library, bits):
    """Each slab, operation, block, warp and lane, from the manual's figures."""
    n, k = 200, 192
    weight = Weight.pruned(n, k, 64, bits, False, torch.float16)
    rows = torch.full((256, k), 8 if bits == 4 else 0, dtype=weight.codes.dtype)
    rows[:n] = weight.codes
    elements = rows.numpy() if bits == 4 else rows.view(torch.int16).numpy().view(np.uint16)
    zero = 8 if bits == 4 else 0
    slab_bytes = 128 * 64 // 2 * bits // 8 + 1024
    slabs = weight.pack(library).numpy()[: 2 * 3 * slab_bytes].reshape(2, 3, slab_bytes)
    parts = itertools.product(range(2), range(3), range(2), range(2), range(4))
    for slab_row, slab, operation, block, warp in parts:
        codes = slabs[slab_row, slab, : slab_bytes - 1024].view(np.uint32)
        patterns = slabs[slab_row, slab, slab_bytes - 1024 :].view(np.uint32).reshape(4, 32, 2)
        operand = operation * 2 + block
        for lane, element in itertools.product(range(32), range(8)):
            row, column = first_operand(lane, element)
            holder = lane // 4 * 4 + operation * 2 + column // 16
            bit = row // 8 * 16 + column % 16
            pattern = patterns[warp, holder, block] >> bit & 15
            assert pattern & 3 < pattern >> 2
            inside = pattern >> 2 if element % 2 else pattern & 3
            pair, second = element // 2, element % 2
            if bits == 4:
                word = codes.reshape(4, 32, 4)[warp, lane, operand]
                found = word >> (4 * (pair + 4 * second)) & 15
            else:
                word = codes.reshape(4, 4, 32, 4)[warp, operand, lane, pair]
                found = word >> (16 * second) & 0xFFFF
            row += slab_row * 128 + block * 64 + warp * 16
            column += slab * 64 + operation * 32
            expected = elements[row, column + inside]
            assert found == (0 if bits == 16 and expected == 0x8000 else expected)
            left = [j for j in range(4) if j not in (pattern & 3, pattern >> 2)]
            assert all(elements[row, column + j] & (0x7FFF if bits == 16 else 15) == zero
                       for j in left)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_unpacking_codes_is_the_inverse_of_packing(library, shape, asymmetric):
    for dtype in emulated.DTYPES:
        weight = Weight.pruned(*shape, 4, asymmetric, dtype)
        packed = weight.pack(library)
        found = weight.unpack(library, packed)
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.scales, weight.scales)
        if asymmetric:
            assert torch.equal(found.zeros, weight.zeros)
        assert torch.equal(weight.pack(library, workers=1), packed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALVES)
def test_unpacking_values_is_the_inverse_of_packing(library, shape, dtype):
    """But for the sign of zeros; what is not finite comes back too."""
    weight = Weight.pruned(*shape, 16, False, dtype)
    weight.codes[3, :8] = torch.tensor([6e-8, 0, 0, -0.0, 0, float("inf"), float("nan"), 0])
    found = weight.unpack(library, weight.pack(library)).codes
    bits, expected = found.view(torch.int16), weight.codes.view(torch.int16)
    assert torch.equal(bits, torch.where(weight.codes == 0, 0, expected))


def test_three_bits_a_code(library):
    weight = Weight.pruned(256, 1024, 1024, 4, False, torch.float16)
    assert weight.pack(library).numel() == 256 * 1024 * 3 // 8 + 256 * 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 16])
def test_dequantized_values_are_rounded_once(library, shape, bits):
    for dtype, to in itertools.product(HALVES, emulated.DTYPES):
        weight = Weight.pruned(*shape, bits, bits == 4, dtype)
        packed = weight.pack(library)
        exact = torch.from_numpy(weight.dense())
        begin, end = (0, shape[0]) if to == torch.float32 else (5, 11)
        found = weight.dequantize(library, packed, begin, end, to)
        assert torch.equal(found, exact.float()[begin:end].to(to))


# --- the product ---------------------------------------------------------------------------------


def run(library, weight, x, bias, tokens, resident=4, seed=0, eager=False):
    packed = weight.pack(library)
    return emulated.linear(library, weight, packed, x, bias, ("mma", tokens), resident, seed, eager)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [4, 16])
def test_products_against_float64(library, tokens, dtype, bits):
    """Few and many workers, so that tiles are whole and shared; any number of tokens; copies as
    early and as late as they may be."""
    cases = itertools.cycle(itertools.product((1, 3, 64), (False, True)))
    for seed, (n, k, g) in enumerate(SHAPES):
        resident, eager = next(cases)
        scales = dtype if bits == 16 else emulated.DTYPES[seed % 3]
        weight = Weight.pruned(n, k, g, bits, bits == 4 and seed % 2 == 0, scales, seed)
        m = (1, tokens, tokens + 1, tokens - 3)[seed % 4]
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(m, k + 8, generator=draw).to(dtype)[:, :k]
        bias = torch.randn(n, generator=draw) if seed % 3 != 1 else None
        y = run(library, weight, x, bias, tokens, resident, seed, eager)
        wide, dense = x.double().numpy(), weight.dense()
        added = np.zeros(n) if bias is None else bias.double().numpy()
        exact = wide @ dense.T + added
        error = np.abs(y.double().numpy() - exact)
        assert (error <= bound(wide, dense, added, exact, dtype)).all()


@pytest.mark.parametrize("tokens", [8, 32])
@pytest.mark.parametrize("bits", [4, 16])
def test_the_same_bits_in_any_order_of_threads(library, tokens, bits):
    weight = Weight.pruned(144, 448, 64, bits, bits == 4, torch.bfloat16)
    x = torch.randn(20, 448, generator=torch.Generator().manual_seed(1)).bfloat16()
    for resident in (1, 5, 100):
        made = [
            run(library, weight, x, None, tokens, resident, seed, eager)
            for seed, eager in ((0, False), (1, True), (2, False))
        ]
        assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bits", [4, 16])
def test_a_token_that_is_not_finite_spoils_no_other(library, tokens, bits):
    """And is seen by rows too that leave its column out, in whole tiles and in shared ones, before
    tiles of other tokens."""
    weight = Weight.pruned(64, 256, 64, bits, False, torch.float16)
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(0)).half()
    broken = {3: (5, float("nan")), 7: (100, float("inf")), 10: (255, float("-inf"))}
    for column, _ in broken.values():
        assert bool((torch.from_numpy(weight.dense())[:, column] == 0).any())
    for resident in (1, 3):
        expected = run(library, weight, x, None, tokens, resident)
        spoilt = x.clone()
        for token, (column, value) in broken.items():
            spoilt[token, column] = value
        found = run(library, weight, spoilt, None, tokens, resident)
        rest = [token for token in range(20) if token not in broken]
        assert torch.equal(found[rest], expected[rest])
        assert not bool(found[list(broken)].isfinite().any())


def test_a_kernel_without_barriers_is_caught(library):
    weight = Weight.pruned(128, 512, 64, 4, False, torch.float16)
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)).half()
    library.use_barriers(0)
    try:
        found = run(library, weight, x, None, 8, resident=1)
    finally:
        library.use_barriers(1)
    assert not torch.equal(found, run(library, weight, x, None, 8, resident=1))
