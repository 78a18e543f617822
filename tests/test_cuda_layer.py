"""What Python does around the CUDA kernels, with the emulated kernels in the place of the real ones
and the CPU as the device."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import emulated
from tersor import (
    ActSpec,
    QSpec,
    QuantLinear,
    TersorError,
    cli,
    cuda,
    cuda_calls,
    cuda_int8,
    kernels,
    sparse,
)
from tersor.kernels import PATTERN
from tersor.oracle import random_qweight, random_values
from tersor.qweight import QWeight
from tersor.sparse import VALUES, Measured
from tersor.sparse_linear import SparseLinear

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
            scale_bytes = 0 if grid[3] == 16 else 4 if grid[5] == 0 else 2
            self.spec = (long * 8)(*grid[:5], scale_bytes, grid[8] != 0, grid[9])
            self.scale_dtype, self.bytes = grid[5], library.packed_bytes(self.spec)
            whole = grid[9] or (grid[1] == grid[2] and not grid[4])
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

    def quantize(x, m, k, g, ldx, dtype, outliers, scale, made, size, device, stream):
        assert x % 16 == 0 and ldx % 8 == 0 and dtype in (1, 2) and made % 64 == 0
        sizes = [long(m), long(k), long(g)]
        assert size == library.quantized_bytes(*sizes)
        library.quantize(
            pointer(x), m, *sizes, long(ldx), dtype, emulated.ctypes.c_float(outliers),
            pointer(scale), pointer(made), 0, 0,
        )  # fmt: skip

    def linear(
        weight, packed, size, x, m, ldx, dtype, bias, y, ldy, workspace, workspace_size,
        quantized, quantized_size, tokens, first, outliers, device, stream,
    ):  # fmt: skip
        assert x % 16 == 0 and ldx % 8 == 0 and dtype in (1, 2)
        assert (quantized != 0) == (quantized_size != 0) and m <= tokens - first
        products.append(m)
        if m > (64 if quantized else 16):
            return False
        tile = next(tile for tile in (8, 16, 32, 64) if m <= tile)
        kind = b"outliers" if outliers else weight.kind
        library.linear(
            weight.spec, weight.scale_dtype, pointer(packed), pointer(x), pointer(y),
            pointer(bias), m, long(ldx), long(ldy), dtype, kind, tile, 3, 0, 0, pointer(quantized),
            long(tokens), long(first),
        )  # fmt: skip
        return True

    native = SimpleNamespace(
        CudaWeight=Weight, cuda_pack=pack, cuda_unpack=unpack, cuda_dequantize=dequantize,
        cuda_linear=linear, cuda_quantize=quantize,
    )  # fmt: skip
    monkeypatch.setattr(cuda, "_core", native)
    monkeypatch.setattr(cuda_int8, "_core", native)
    monkeypatch.setattr(cuda, "unavailable", lambda *device: None)
    monkeypatch.setattr(cuda_calls, "place", lambda device: (0, 0))
    monkeypatch.setattr(cuda_calls, "workspace", lambda *place: torch.zeros(1))
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
    monkeypatch.setattr(cuda, "_TOKENS", 64)
    q = random_qweight(80, 192, QSpec(4, 64), torch.float16)
    packed, fields = cuda.pack_weight(q, CPU, ActSpec()), cuda.Grid.of(q, ActSpec()).fields()
    x = torch.randn(140, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[3], fixed = 0, torch.tensor([0.02])
    dynamic = torch.from_numpy(emulated.as_int8(x.float().numpy()))
    static = torch.from_numpy(emulated.as_int8(x.float().numpy(), scale=0.02))
    assert float(static.abs().max()) < 2.6 < float(x.abs().max())  # some values are cut off
    for tokens, asked, given in (
        (140, [64, 64, 12], None), (129, [64, 64, 1], fixed), (17, [17], None), (1, [1], fixed),
    ):  # fmt: skip
        meant = dynamic if given is None else static
        calls.clear()
        y = cuda._linear(x[:tokens], packed, None, *fields, None, given)
        expected = exact(q, meant[:tokens], None)
        error = (y.double() - expected).abs()
        scale = meant[:tokens].abs() @ q.dequantize(torch.float64).abs().T
        assert bool((error <= 3 * torch.finfo(dtype).eps * (scale + 1)).all())
        assert calls == ([] if dtype == torch.float32 else asked)
    monkeypatch.setattr(cuda._core, "cuda_linear", lambda *given: False)
    for given, meant in ((None, dynamic), (fixed, static)):
        found = cuda._linear(x, packed, None, *fields, None, given)
        assert torch.allclose(found.double(), exact(q, meant, None), rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_outliers(calls, dtype, monkeypatch):
    """The columns are those of all tokens, though a part of them is multiplied at a time."""
    monkeypatch.setattr(cuda, "_TOKENS", 128)
    how = ActSpec(outliers=6.0)
    q = random_qweight(80, 192, QSpec(8, None), torch.float16)
    packed, fields = cuda.pack_weight(q, CPU, how), cuda.Grid.of(q, how).fields()
    x = torch.randn(140, 192, generator=torch.Generator().manual_seed(0)).clamp(-5, 5)
    x[139, 7], x[2, 100], x[5, 191] = 50.0, -7.0, 6.0
    x = x.to(dtype)
    meant = torch.from_numpy(emulated.as_int8(x.float().numpy(), 6.0))
    assert bool((meant[:, [7, 100]] == x[:, [7, 100]]).all())
    expected = exact(q, meant, None)
    scale = meant.abs() @ q.dequantize(torch.float64).abs().T
    room = 3 * torch.finfo(dtype).eps * (scale + 1)
    for native in (True, False):
        if not native:
            monkeypatch.setattr(cuda._core, "cuda_linear", lambda *given: False)
        y = cuda._linear(x, packed, None, *fields, 6.0)
        assert bool(((y.double() - expected).abs() <= room).all())
    assert calls == ([] if dtype == torch.float32 else [64, 64, 12])


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


# --- without 2:4 zeros ---------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [QSpec(4, 64), QSpec(4, 32, False), QSpec(3, None)], ids=str)
def test_codes_without_their_zeros(calls, spec):
    q = random_qweight(80, 192, spec, torch.bfloat16, pattern=PATTERN)
    packed, grid = cuda.pack_weight(q, CPU, sparse=True), cuda.Grid.of(q, None, sparse=True)
    assert packed.numel() < cuda.pack_weight(q, CPU).numel() * 1.25  # of 80 rows 128 are stored
    back = cuda.unpack_weight(packed, grid, spec)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.scales, q.scales)
    rows = cuda.dequantize(packed, grid, 3, 50, torch.float32)
    assert torch.equal(rows, q.dequantize()[3:50])
    check_products(q.dequantize(torch.float64), packed, grid)
    assert calls == [6, 20]


@pytest.mark.parametrize("dtype", VALUES)
def test_values_without_their_zeros(calls, dtype):
    w = random_values(80, 192, dtype)
    packed, grid = cuda.pack_values(w, CPU), cuda.Grid.of_values(w)
    assert torch.equal(cuda.unpack_values(packed, grid), w)
    check_products(w.double(), packed, grid, dtype)
    assert calls == [6, 20]


def check_products(dense, packed, grid, dtype=torch.float16):
    draw = torch.Generator().manual_seed(0)
    for shape in ((2, 3, 192), (20, 192)):
        x = torch.randn(shape, generator=draw).to(dtype)
        y = cuda._linear(x, packed, None, *grid.fields())
        scale = x.double().abs() @ dense.abs().T
        error = (y.double() - x.double() @ dense.T).abs()
        assert bool((error <= 3 * torch.finfo(dtype).eps * (scale + 4)).all())


def test_what_has_more_than_two_of_four_is_refused(calls):
    q = random_qweight(64, 64, QSpec(4, 64), torch.float32)
    with pytest.raises(TersorError, match="the codes are not 2:4"):
        cuda.pack_weight(q, CPU, sparse=True)
    with pytest.raises(TersorError, match="the values are not 2:4"):
        cuda.pack_values(torch.ones(64, 64, dtype=torch.float16), CPU)


def test_an_older_gpu_is_named(calls, monkeypatch):
    monkeypatch.setattr(cuda._core, "cuda_refuses", lambda *grid: None, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    grid, gpu = cuda.Grid.of_values(torch.zeros(64, 64, dtype=torch.float16)), torch.device("cuda")
    assert "need compute capability 8.0, this GPU has 7.5" in str(cuda.refusal(grid, gpu))
    assert cuda.refusal(replace(grid, sparse=False), gpu) is None
    assert cuda.refusal(grid) is None


@pytest.mark.parametrize(("gain", "left_out"), [(1.5, True), (0.9, False)])
def test_a_layer_on_a_gpu_is_packed_by_what_measures_faster(calls, monkeypatch, gain, left_out):
    """The device is one in name only."""
    gpu, asked = SimpleNamespace(type="cuda"), []
    monkeypatch.setattr(cuda._core, "cuda_refuses", lambda *grid: None, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(QWeight, "to", lambda q, device: q)

    def measure(*what, device):
        asked.append((what, device))
        return Measured(gain, 1.0)

    monkeypatch.setattr(sparse, "measure", measure)
    monkeypatch.setattr(cuda, "_pack", lambda weight, *arrays: torch.zeros(weight.bytes))
    spec = QSpec(4, 64, False)
    q = random_qweight(80, 192, spec, torch.bfloat16, pattern=PATTERN)
    layer = QuantLinear(q)
    layer._pack(q, gpu)
    assert layer.grid == cuda.Grid.of(q, None, sparse=left_out)
    assert asked == [((1, 80, 192, spec, None), gpu)]
    for choice, expected in (("always", True), ("never", False)):
        sparse.use_sparse(choice)
        layer._pack(q, gpu)
        assert layer.grid.sparse == expected
    sparse.use_sparse("auto")
    assert len(asked) == 1
    layer._pack(random_qweight(80, 192, spec, torch.bfloat16), gpu)
    assert not layer.grid.sparse and len(asked) == 1


def test_zeros_are_counted_alike_on_every_device():
    for symmetric in (True, False):
        q = random_qweight(40, 64, QSpec(4, 32, symmetric), torch.bfloat16, pattern=PATTERN)
        for codes in (q.codes, q.codes.roll(1, 1), torch.full_like(q.codes, 1)):
            given = QWeight(q.spec, codes, q.scales, q.zeros)
            found = kernels._keeps_pattern(codes, q.zeros, 4, *PATTERN)
            assert found == kernels.keeps_pattern(given, *PATTERN)
    w = random_values(40, 64, torch.bfloat16)
    for values in (w, w.roll(1, 1), -w):
        found = kernels._keeps_pattern(values, None, 16, *PATTERN)
        assert found == kernels.keeps_pattern(values, *PATTERN)


def test_a_sparse_layer_and_its_devices(calls, monkeypatch):
    """To a device that is a GPU in name only, and back."""
    linear = nn.Linear(256, 40, dtype=torch.bfloat16)
    linear.weight.data = random_values(40, 256, torch.bfloat16)
    layer = SparseLinear.from_linear(linear)
    gpu, on_cpu = SimpleNamespace(type="cuda"), layer.packed
    packed = cuda.pack_values(linear.weight, CPU)
    monkeypatch.setattr(cuda, "pack_values", lambda w, device: packed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    reason = "n and k must be multiples of 16 on a GPU"
    monkeypatch.setattr(cuda._core, "cuda_refuses", lambda *grid: reason, raising=False)
    with pytest.raises(TersorError, match=r"a 40 x 256 layer with 2:4 zeros .* multiples of 16"):
        layer._move(gpu)
    assert layer.packed is on_cpu and layer.grid is None
    monkeypatch.setattr(cuda._core, "cuda_refuses", lambda *grid: None)
    layer._move(gpu)
    assert layer.packed is packed and layer.grid == cuda.Grid.of_values(linear.weight)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.state_dict()["weight"], linear.weight)
    assert "2:4, CUDA" in repr(layer)
    layer._move(CPU)
    assert layer.grid is None and torch.equal(layer.packed, on_cpu)
    with pytest.raises(TersorError, match="there are no kernels for mps"):
        layer._move(SimpleNamespace(type="mps"))


def test_why_a_weight_on_a_gpu_is_left_to_torch(calls, monkeypatch):
    gpu = SimpleNamespace(type="cuda")
    weight = SimpleNamespace(shape=(64, 64), dtype=torch.float16, device=gpu)
    refused: list[str | None] = ["for a reason"]
    monkeypatch.setattr(cuda._core, "cuda_refuses", lambda *grid: refused[0], raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert sparse.refusal(weight) == "for a reason"
    refused[0] = None
    for gain, expected in ((0.5, "torch is faster here (0.50 times)"), (2.0, None)):
        monkeypatch.setattr(sparse, "measure_values", lambda *_, gain=gain: Measured(gain, 1.0))
        assert sparse.refusal(weight) == expected


def test_the_cli_says_what_a_gpu_gains(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(sparse, "serves", lambda n, k, spec, activation, device=CPU: device != CPU)
    monkeypatch.setattr(sparse, "measure", lambda *what: asked.append(what) or Measured(3e-5, 2e-5))
    shape = ["--shape", "1", "64", "128", "--group", "64", "--pattern", "2:4"]
    assert cli.main(["kernels", *shape]) == 0
    spec, dtype = QSpec(4, 64), torch.bfloat16
    assert asked == [(1, 64, 128, spec, None, dtype, torch.device("cuda"))]
    said = " ".join(capsys.readouterr().out.split())
    assert "Measured: 0.020 ms without the zeros, 0.030 ms with them, 1.50 times as fast." in said
