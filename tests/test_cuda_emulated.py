"""The CUDA kernels, run on the CPU by tests/emulator, against float64; no GPU is needed."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
import torch

import emulated
from emulated import Weight

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler")

KERNELS = [*(("mma", tokens) for tokens in (8, 16, 32, 64)), ("wgmma", 64), ("wgmma", 128)]
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated.build(tmp_path_factory.mktemp("emulated"))


# --- packing -------------------------------------------------------------------------------------


def first_operand(lane: int, element: int) -> tuple[int, int]:
    """Row and column of element 0 to 7 that a lane holds of the first operand of mma.m16n8k16 with
    16-bit elements, as the PTX manual has it."""
    group, inside = lane >> 2, lane % 4
    row = group if element in (0, 1, 4, 5) else group + 8
    column = inside * 2 + (element & 1) + (8 if element >= 4 else 0)
    return row, column


@pytest.mark.parametrize("bits", [4, 8])
def test_a_lane_finds_its_codes_in_16_bytes(library, bits):
    """Each block, strip, tile and lane, from the manual's figure."""
    weight = Weight.random(128, 192, 64, bits, False, torch.float16)
    packed = weight.pack(library).numpy()
    words = packed[: 128 * 192 * bits // 8].view(np.uint32).reshape(2, 3, 4, -1)
    for block_row, block, strip in itertools.product(range(2), range(3), range(4)):
        part = words[block_row, block, strip]
        part = part.reshape(32, 4) if bits == 4 else part.reshape(2, 32, 4)
        for lane, tile, element in itertools.product(range(32), range(4), range(8)):
            row, column = first_operand(lane, element)
            row, column = block_row * 64 + strip * 16 + row, block * 64 + tile * 16 + column
            pair, second = element // 2, element % 2
            if bits == 4:
                found = part[lane, tile] >> (4 * (pair + 4 * second)) & 15
            else:
                word = part[tile // 2, lane, tile % 2 * 2 + pair // 2]
                found = word >> (8 * (pair % 2 * 2 + second)) & 255
            assert found == weight.codes[row, column]


SHAPES = [(16, 16, 16), (64, 64, 64), (80, 96, 32), (48, 160, 32), (208, 320, 64), (64, 384, 128),
          (112, 208, 208)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_unpacking_is_the_inverse_of_packing(library, shape, bits, asymmetric):
    for dtype in emulated.DTYPES:
        weight = Weight.random(*shape, bits, asymmetric, dtype)
        packed = weight.pack(library)
        found = weight.unpack(library, packed)
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.scales, weight.scales)
        if asymmetric:
            assert torch.equal(found.zeros, weight.zeros)
        assert torch.equal(weight.pack(library, workers=1), packed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantized_values_are_rounded_once(library, shape, bits):
    for dtype, to in itertools.product(HALVES, emulated.DTYPES):
        weight = Weight.random(*shape, bits, True, dtype)
        packed = weight.pack(library)
        exact = torch.from_numpy(weight.dense())
        begin, end = (0, shape[0]) if to == torch.float32 else (5, 11)
        found = weight.dequantize(library, packed, begin, end, to)
        # float32 holds the product of a code and a 16-bit scale
        assert torch.equal(found, exact.float()[begin:end].to(to))


# --- the product ---------------------------------------------------------------------------------


def bound(x: np.ndarray, w: np.ndarray, bias: np.ndarray, y: np.ndarray, dtype: torch.dtype):
    """Of the error of sums in float32, however they are ordered, and of the last rounding.

    A code times an activation is exact; each of k additions, of the multiplications with scales and
    of the sum with bias errs by half a unit in the last place of a partial sum."""
    terms = np.abs(x) @ np.abs(w).T + np.abs(bias)
    return (x.shape[1] + 8) * 2.0**-24 * terms + np.abs(y) * torch.finfo(dtype).eps / 2 + 1e-7


def check(library, weight, m, dtype, kernel, resident, seed, eager, stride=8, with_bias=True):
    n, k = weight.codes.shape
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k + stride, generator=draw).to(dtype)[:, :k]
    bias = torch.randn(n, generator=draw) if with_bias else None
    packed = weight.pack(library)
    y = emulated.linear(library, weight, packed, x, bias, kernel, resident, seed, eager)
    wide, dense = x.double().numpy(), weight.dense()
    added = np.zeros(n) if bias is None else bias.double().numpy()
    exact = wide @ dense.T + added
    error = np.abs(y.double().numpy() - exact)
    assert (error <= bound(wide, dense, added, exact, dtype)).all()
    return y


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [4, 8])
def test_products_against_float64(library, kernel, dtype, bits):
    """Few and many workers, so that tiles are whole and shared; any number of tokens; copies as
    early and as late as they may be."""
    cases = itertools.cycle(itertools.product((1, 3, 64), (False, True)))
    for seed, (n, k, g) in enumerate(SHAPES):
        resident, eager = next(cases)
        asymmetric = seed % 2 == 0
        scales = emulated.DTYPES[seed % 3]
        weight = Weight.random(n, k, g, bits, asymmetric, scales, seed)
        m = (1, kernel[1], kernel[1] + 1, max(1, kernel[1] - 3))[seed % 4]
        check(library, weight, m, dtype, kernel, resident, seed, eager, with_bias=seed % 3 != 1)


@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [4, 8])
def test_int8_activations_against_float64(library, tokens, dtype, bits):
    cases = itertools.cycle(itertools.product((1, 3, 64), (False, True)))
    # A block of threads for each token takes the emulator a while.
    for seed, (n, k, g) in enumerate(SHAPES[: 7 if tokens == 8 else 3]):
        resident, eager = next(cases)
        weight = Weight.random(n, k, g, bits, seed % 2 == 0, emulated.DTYPES[seed % 3], seed)
        m = (1, tokens, tokens + 1, max(1, tokens - 3))[seed % 4]
        scale = (None, 0.011, None, 0.02)[seed % 4]
        check_int8(library, weight, ("int8", tokens), dtype, m, resident, seed, eager, scale)


def check_int8(library, weight, kernel, dtype, m, resident, seed, eager, scale=None):
    n, k = weight.codes.shape
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k + 8, generator=draw).to(dtype)[:, :k]
    x[m // 2] = 0
    bias = torch.randn(n, generator=draw)
    packed = weight.pack(library)
    y = emulated.linear(
        library, weight, packed, x, bias, kernel, resident, seed, eager, scale=scale
    )
    wide, dense = emulated.as_int8(x.float().numpy(), scale=scale), weight.dense()
    exact = wide @ dense.T + bias.double().numpy()
    error = np.abs(y.double().numpy() - exact)
    assert (error <= bound(wide, dense, bias.double().numpy(), exact, dtype)).all()


@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_two_level_grid_against_float64(library, tokens, dtype):
    cases = itertools.cycle(itertools.product((1, 3, 64), (False, True)))
    for seed, (n, k, g) in enumerate(SHAPES[: 7 if tokens == 8 else 4]):
        weight = Weight.two_level(n, k, g, emulated.DTYPES[seed % 3], seed)
        m = (1, tokens, tokens + 1, max(1, tokens - 3))[seed % 4]
        resident, eager = next(cases)
        scale = (0.017, None)[seed % 2]
        check_int8(library, weight, ("rows", tokens), dtype, m, resident, seed, eager, scale)


@pytest.mark.parametrize("tokens", [8, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_scale_a_row_takes_the_same_kernel(library, tokens, bits):
    for seed, (n, k) in enumerate([(16, 16), (80, 192), (64, 448)]):
        weight = Weight.random(n, k, k, bits, False, emulated.DTYPES[seed], seed)
        check_int8(library, weight, ("rows", tokens), HALVES[seed % 2], 9, 3, seed, seed % 2)


def test_sums_of_a_two_level_grid_are_exact(library):
    """The largest codes and multipliers there are; tokens with the scale 1, so that what is left is
    one multiplication with the scale of the row."""
    weight = Weight.two_level(64, 1024, 128, torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    weight.codes = torch.randint(2, (64, 1024), generator=draw, dtype=torch.uint8) * 15
    weight.multipliers.fill_(15)
    weight.scales.fill_(2.0**-16)
    x = (torch.randint(2, (5, 1024), generator=draw) * 127.5).half()
    x[:, ::3] *= -1
    packed = weight.pack(library)
    codes = torch.where(x > 0, 127, torch.where(x < 0, -128, 0)).double().numpy()
    exact = torch.from_numpy(codes @ weight.dense().T)
    for resident in (1, 4):
        y = emulated.linear(library, weight, packed, x, None, ("rows", 8), resident, 0, False)
        assert torch.equal(y, exact.float().half())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_two_level_grid_comes_back_as_it_was(library, shape):
    for dtype in emulated.DTYPES:
        weight = Weight.two_level(*shape, dtype)
        packed = weight.pack(library)
        found = weight.unpack(library, packed)
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.scales, weight.scales)
        assert torch.equal(found.multipliers, weight.multipliers)
        for to in emulated.DTYPES:
            rows = weight.dequantize(library, packed, 3, 11, to)
            exact = torch.from_numpy(weight.dense())[3:11]
            # float32 holds seven bits of a multiplied code and the bits of a 16-bit scale
            if dtype != torch.float32:
                assert torch.equal(rows, exact.float().to(to))
            else:
                assert torch.allclose(rows.double(), exact, rtol=torch.finfo(to).eps, atol=0)


def test_the_sums_of_a_row_are_the_same_for_any_number_of_workers(library):
    weight = Weight.two_level(144, 448, 64, torch.bfloat16)
    x = torch.randn(20, 448, generator=torch.Generator().manual_seed(1)).half()
    packed = weight.pack(library)
    made = [
        emulated.linear(library, weight, packed, x, None, ("rows", 16), resident, resident, eager)
        for resident, eager in ((1, False), (5, True), (100, False))
    ]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


@pytest.mark.parametrize("kind", ["mma", "int8"])
@pytest.mark.parametrize("tokens", [8, 16, 64])
def test_a_group_that_workers_share(library, kind, tokens):
    """Where a scale is that of many steps, a worker may begin and end anywhere among them."""
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(0)).half()
    wide = x.double().numpy() if kind == "mma" else emulated.as_int8(x.float().numpy())
    for resident, asymmetric in itertools.product((3, 5, 7), (False, True)):
        weight = Weight.random(80, 512, 512, 8, asymmetric, torch.float16, resident)
        packed, dense = weight.pack(library), weight.dense()
        y = emulated.linear(library, weight, packed, x, None, (kind, tokens), resident, 0, False)
        exact = wide @ dense.T
        error = np.abs(y.double().numpy() - exact)
        assert (error <= bound(wide, dense, np.zeros(80), exact, x.dtype)).all()


@pytest.mark.parametrize("kernel", [KERNELS[0], KERNELS[3], KERNELS[4]], ids=str)
def test_the_same_bits_in_any_order_of_threads(library, kernel):
    weight = Weight.random(144, 448, 64, 4, True, torch.bfloat16)
    for resident in (1, 5, 100):
        x = torch.randn(20, 448, generator=torch.Generator().manual_seed(1)).half()
        packed = weight.pack(library)
        made = [
            emulated.linear(library, weight, packed, x, None, kernel, resident, seed, eager)
            for seed, eager in ((0, False), (1, True), (2, False))
        ]
        assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


@pytest.mark.parametrize("kernel", [KERNELS[1], KERNELS[4], ("int8", 16), ("rows", 16)], ids=str)
def test_a_token_that_is_not_finite_spoils_no_other(library, kernel):
    weight = Weight.random(64, 128, 128, 4, False, torch.float16)
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(0)).half()
    packed = weight.pack(library)
    expected = emulated.linear(library, weight, packed, x, None, kernel, 4, 0, False)
    x[3, 5], x[7, 100] = float("nan"), float("inf")
    found = emulated.linear(library, weight, packed, x, None, kernel, 4, 0, False)
    rest = [0, 1, 2, 4, 5, 6, 8]
    assert torch.equal(found[rest], expected[rest])
    assert not bool(found[[3, 7]].isfinite().any())


# --- the partition -------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [1, 2, 7, 132, 528])
def test_every_step_has_one_worker_and_every_part_a_slot(library, resident):
    for tiles, steps in itertools.product((1, 2, 3, 17, 64), (1, 2, 5, 64)):
        room = np.full((3, tiles * steps), -1, dtype=np.int32)
        workers = library.divide(tiles, steps, resident, 4, ctypes.c_void_p(room.ctypes.data))
        begins, owner, slot = room
        assert 1 <= workers <= min(resident, tiles * steps)
        assert begins[0] == 0 and (np.diff(begins[:workers]) >= 1).all()
        counts = np.diff([*begins[:workers], tiles * steps])
        assert counts.max() - counts.min() <= 1
        assert (owner == np.repeat(np.arange(workers), counts)).all()
        tile = np.arange(tiles * steps) // steps
        parts = {(int(o), int(t), int(s)) for o, t, s in zip(owner, tile, slot, strict=True)}
        shared = [part for part in parts if len({o for o, t, _ in parts if t == part[1]}) > 1]
        assert len({s for _, _, s in shared}) == len(shared)
        assert all(0 <= s < 2 * workers for _, _, s in shared)


# --- the emulator itself -------------------------------------------------------------------------


def test_a_kernel_without_barriers_is_caught(library):
    """Or none of the above would say anything about them."""
    weight = Weight.random(64, 512, 64, 4, False, torch.float16)
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)).half()
    packed = weight.pack(library)
    library.use_barriers(0)
    try:
        found = emulated.linear(library, weight, packed, x, None, ("mma", 8), 1, 0, False)
    finally:
        library.use_barriers(1)
    expected = emulated.linear(library, weight, packed, x, None, ("mma", 8), 1, 0, False)
    assert not torch.equal(found, expected)
