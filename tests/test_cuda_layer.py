"""What Python does around the CUDA kernels, with the emulated kernels in the place of the real ones
and the CPU as the device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import emulated
from tersor import ActSpec, QSpec, QWeight, TersorError, cuda
from tersor.oracle import random_qweight

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler")

CPU = torch.device("cpu")
SPECS = [
    *(QSpec(4, 64), QSpec(4, 32, False), QSpec(3, 64)),
    *(QSpec(2, None), QSpec(8, 64), QSpec(8, None, False)),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def calls(library, monkeypatch):
    """Replaces the native functions that need a GPU; the calls of products, as they come."""
    pointer, long = emulated.ctypes.c_void_p, emulated.ctypes.c_int64
    products: list[int] = []

    class Weight:
        def __init__(self, *grid: int) -> None:
            scale_bytes = 4 if grid[5] == 0 else 2
            self.spec = (long * 7)(*grid[:5], scale_bytes, grid[7])
            self.scale_dtype, self.bytes = grid[5], library.packed_bytes(self.spec)
            whole = grid[7] or (grid[1] == grid[2] and not grid[4])
            self.kind = (b"rows" if whole else b"int8") if grid[6] else b"mma"

    def pack(weight, codes, scales, zeros, packed, size, device, stream):
        assert size == weight.bytes
        library.pack(weight.spec, *map(pointer, (packed, codes, scales, zeros)), 2)

    def unpack(weight, packed, size, codes, scales, zeros, device, stream):
        assert size == weight.bytes
        library.unpack(weight.spec, *map(pointer, (packed, codes, scales, zeros)), 2)

    def dequantize(weight, packed, size, begin, end, to, dtype, device, stream):
        library.dequantize(
            weight.spec, weight.scale_dtype, pointer(packed), long(begin), long(end), pointer(to),
            dtype, 2,
        )  # fmt: skip

    def linear(weight, packed, size, x, m, ldx, dtype, bias, y, ldy, *rest):
        assert x % 16 == 0 and ldx % 8 == 0 and dtype in (1, 2)
        products.append(m)
        if m > 16:
            return False
        library.linear(
            weight.spec, weight.scale_dtype, pointer(packed), pointer(x), pointer(y),
            pointer(bias), m, long(ldx), long(ldy), dtype, weight.kind, 16, 3, 0, 0,
        )  # fmt: skip
        return True

    native = SimpleNamespace(
        CudaWeight=Weight, cuda_pack=pack, cuda_unpack=unpack, cuda_dequantize=dequantize,
        cuda_linear=linear, cuda_unavailable=lambda: None, cuda_scratch_bytes=lambda *of: 64,
    )  # fmt: skip
    monkeypatch.setattr(cuda, "_core", native)
    monkeypatch.setattr(cuda, "_place", lambda device: (0, 0))
    monkeypatch.setattr(cuda, "_workspace", lambda *place: torch.zeros(1))
    cuda._weight.cache_clear()
    yield products
    cuda._weight.cache_clear()


def exact(q, x, bias):
    return x.double() @ q.dequantize(torch.float64).T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_weight_comes_back_as_it_was(calls, spec):
    q = random_qweight(80, 192, spec, torch.bfloat16)
    packed = cuda.pack_weight(q, CPU)
    back = cuda.unpack_weight(packed, cuda.Grid.of(q, None), spec)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.scales, q.scales)
    assert (back.zeros is None) == (q.zeros is None)
    if q.zeros is not None:
        assert torch.equal(back.zeros, q.zeros)
    rows = cuda.dequantize(packed, cuda.Grid.of(q, None), 3, 50, torch.float32)
    assert torch.equal(rows, q.dequantize()[3:50])


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_few_and_many_tokens(calls, spec, dtype, monkeypatch):
    """Few by a kernel; many, and float32, by a weight that is dequantized, here in parts."""
    monkeypatch.setattr(cuda, "_SLAB", 32 * 192 * 4)
    q = random_qweight(80, 192, spec, torch.float16)
    packed, fields = cuda.pack_weight(q, CPU), cuda.Grid.of(q, None).fields()
    draw = torch.Generator().manual_seed(0)
    for bias in (None, torch.randn(80, generator=draw).to(dtype).float()):
        for shape in ((2, 3, 192), (20, 192), (0, 192), (192,)):
            x = torch.randn(shape, generator=draw).to(dtype)
            y = cuda._linear(x, packed, bias, *fields)
            assert (y.shape, y.dtype) == ((*shape[:-1], 80), dtype)
            error = (y.double() - exact(q, x, bias)).abs()
            scale = x.double().abs() @ q.dequantize(torch.float64).abs().T
            assert bool((error <= 3 * torch.finfo(dtype).eps * (scale + 4)).all())
    assert calls == ([] if dtype == torch.float32 else [6, 20, 1] * 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_int8_activations(calls, dtype, monkeypatch):
    """Any number by a kernel, some at a time; float32, and what no kernel serves, by what the codes
    stand for."""
    monkeypatch.setattr(cuda, "_TOKENS", 8)
    q = random_qweight(80, 192, QSpec(4, 64), torch.float16)
    packed, fields = cuda.pack_weight(q, CPU, ActSpec()), cuda.Grid.of(q, ActSpec()).fields()
    x = torch.randn(20, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[3] = 0
    meant = torch.from_numpy(emulated.as_int8(x.float().numpy()))
    for tokens, asked in ((20, [8, 8, 4]), (17, [8, 8, 1])):
        calls.clear()
        y = cuda._linear(x[:tokens], packed, None, *fields)
        expected = exact(q, meant[:tokens], None)
        error = (y.double() - expected).abs()
        scale = meant[:tokens].abs() @ q.dequantize(torch.float64).abs().T
        assert bool((error <= 3 * torch.finfo(dtype).eps * (scale + 1)).all())
        assert calls == ([] if dtype == torch.float32 else asked)
    monkeypatch.setattr(cuda._core, "cuda_linear", lambda *given: False)
    found = cuda._linear(x, packed, None, *fields)
    assert torch.allclose(found.double(), exact(q, meant, None), rtol=2e-3, atol=2e-2)


def two_level(n: int, k: int, spec: QSpec, dtype: torch.dtype) -> QWeight:
    q = random_qweight(n, k, spec, dtype)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(8, 16, (n, 1), generator=draw) * 2.0**-10
    q.scales = (rows * torch.randint(1, 16, q.scales.shape, generator=draw)).to(dtype)
    return q


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spec", [QSpec(4, 64), QSpec(3, 32)], ids=str)
def test_a_two_level_grid_is_recognised_and_stays_what_it_was(calls, spec, scales):
    q = two_level(80, 192, spec, scales)
    grid = cuda.Grid.of(q, ActSpec())
    assert grid.two_level
    packed = cuda.pack_weight(q, CPU, ActSpec())
    back = cuda.unpack_weight(packed, grid, spec)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.scales, q.scales)
    assert back.scales.dtype == scales and back.zeros is None
    rows = cuda.dequantize(packed, grid, 3, 50, torch.float32)
    assert torch.equal(rows, q.dequantize()[3:50])
    x = torch.randn(9, 192, generator=torch.Generator().manual_seed(0)).half()
    meant = torch.from_numpy(emulated.as_int8(x.float().numpy()))
    y = cuda._linear(x, packed, None, *grid.fields())
    error = (y.double() - exact(q, meant, None)).abs()
    scale = meant.abs() @ q.dequantize(torch.float64).abs().T
    assert bool((error <= 3 * torch.finfo(torch.float16).eps * (scale + 1e-3)).all())
    grad = torch.randn(5, 80, generator=torch.Generator().manual_seed(0))
    found = cuda._backward_product(grad, packed, *grid.fields())
    assert torch.allclose(found, grad @ q.dequantize(), rtol=1e-4, atol=1e-5)


def test_what_is_on_no_two_level_grid_that_a_kernel_knows(calls):
    q = two_level(80, 192, QSpec(4, 64), torch.float16)
    assert not cuda.Grid.of(q, None).two_level
    q.scales[70, 1] *= 1.01
    assert not cuda.Grid.of(q, ActSpec()).two_level
    for spec in (QSpec(8, 64), QSpec(4, 64, False), QSpec(4, None)):
        assert not cuda.Grid.of(two_level(80, 192, spec, torch.float32), ActSpec()).two_level
    for k, fits in ((131008, True), (131072, False)):  # sums of more columns need more than int32
        wide = two_level(16, k, QSpec(4, 64), torch.float32)
        assert cuda.Grid.of(wide, ActSpec()).two_level == fits


def test_rows_that_no_kernel_could_read_are_copied(calls):
    q = random_qweight(64, 64, QSpec(4, 64), torch.float16)
    packed, fields = cuda.pack_weight(q, CPU), cuda.Grid.of(q, None).fields()
    wide = torch.randn(8, 160, generator=torch.Generator().manual_seed(0)).half()
    for x in (wide[:, 1:65], wide[:, :128:2], wide[::2, :64], wide[:, :64].t()[:, :8].t()):
        expected = cuda._linear(
            x.clone(memory_format=torch.contiguous_format), packed, None, *fields
        )
        assert torch.equal(cuda._linear(x, packed, None, *fields), expected)


def test_the_gradient_is_that_of_the_dequantized_weight(calls, monkeypatch):
    monkeypatch.setattr(cuda, "_SLAB", 32 * 192 * 4)
    q = random_qweight(80, 192, QSpec(4, 64), torch.float32)
    packed, fields = cuda.pack_weight(q, CPU), cuda.Grid.of(q, None).fields()
    grad = torch.randn(5, 80, generator=torch.Generator().manual_seed(0))
    found = cuda._backward_product(grad, packed, *fields)
    expected = grad.double() @ q.dequantize(torch.float64)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_codes_that_do_not_fit_are_refused(calls):
    q = random_qweight(64, 64, QSpec(4, 64), torch.float32)
    q.codes[3, 4] = 16
    with pytest.raises(TersorError, match="codes must be below 16"):
        cuda.pack_weight(q, CPU)
