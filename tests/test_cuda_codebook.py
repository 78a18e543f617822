"""The CUDA kernels for NF4 and FP4, run on the CPU by tests/emulator, against float64 and against
tersor.adapters.codebook; and what Python does around them, with the emulated kernels in the place
of the real ones and the CPU as the device. No GPU is needed."""

from __future__ import annotations

import copy
import ctypes
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import emulated
from emulated import DTYPES, pointer
from tersor import TersorError, cuda, cuda_calls, cuda_codebook
from tersor.adapters.codebook import FP4, NF4, VALUES, Codebook, CodebookWeight, scale_shapes
from tersor.adapters.nf4_linear import NF4Linear

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler")

HALVES = (torch.float16, torch.bfloat16)
TOKENS = (8, 16, 32, 64)
# n, k and the block: rows, columns and groups that do not fill what the kernels go by.
SHAPES = [(16, 32, 32), (64, 64, 64), (80, 96, 32), (37, 160, 32), (131, 320, 64), (64, 384, 128),
          (9, 1024, 1024), (70, 16, 16), (300, 128, 64), (256, 96, 32)]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    built = emulated.build(tmp_path_factory.mktemp("emulated"))
    built.codebook_bytes.restype, built.codebook_rounded.restype = ctypes.c_int64, ctypes.c_float
    return built


def random_weight(n: int, k: int, spec: Codebook, seed: int = 0) -> CodebookWeight:
    """Any codes and scales; steps that all differ."""
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
    room = torch.full((size + 256,), 0xFF, dtype=torch.uint8)  # NaN where nothing is written
    begin = -room.data_ptr() % 128
    packed = room[begin : begin + size]
    library.codebook_pack(described(q), pointer(packed), *parts(q), workers, 0)
    assert bool((room[begin + size :] == 0xFF).all()) and bool((room[:begin] == 0xFF).all())
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


def test_rows_of_more_blocks_than_share_a_step(library):
    """Two steps a row; rows that are only padding would have theirs beyond the weight."""
    q = random_weight(3, 16384, NF4(32))
    check(library, q, 5, torch.float16, 8, 7, 0, False)


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


# --- Python around the kernels -------------------------------------------------------------------


@pytest.fixture
def calls(library, monkeypatch):
    """Lets layers on the CPU run the emulated kernels, up to 16 tokens; the calls of products."""
    at, long = ctypes.c_void_p, ctypes.c_int64
    products: list[int] = []

    class Weight:
        def __init__(self, n: int, k: int, g: int, doubled: bool, values: list[float]) -> None:
            self.spec = (long * 4)(n, k, g, doubled)
            self.values, self.bytes = (
                (ctypes.c_float * 16)(*values),
                library.codebook_bytes(self.spec),
            )

    def pack(weight, codes, scales, steps, mean, packed, size, device, stream):
        assert size == weight.bytes and packed % 64 == 0
        library.codebook_pack(weight.spec, *map(at, (packed, codes, scales, steps, mean)), 2, 0)

    def unpack(weight, packed, size, codes, scales, steps, mean, device, stream):
        assert size == weight.bytes
        library.codebook_pack(weight.spec, *map(at, (packed, codes, scales, steps, mean)), 2, 1)

    def dequantize(weight, packed, size, begin, end, to, dtype, device, stream):
        assert size == weight.bytes
        library.codebook_dequantize(
            weight.spec, at(packed), weight.values, long(begin), long(end), at(to), dtype, 2
        )

    def linear(weight, packed, size, x, m, ldx, dtype, bias, y, ldy, *rest):
        assert size == weight.bytes and x % 16 == 0 and ldx % 8 == 0 and dtype in (1, 2)
        products.append(m)
        if m > 16:
            return False
        library.codebook_linear(
            weight.spec, at(packed), weight.values, at(x), at(y), at(bias), m, long(ldx),
            long(ldy), dtype, 16, 3, 0, 0,
        )  # fmt: skip
        return True

    native = SimpleNamespace(
        CudaCodebookWeight=Weight, cuda_codebook_pack=pack, cuda_codebook_unpack=unpack,
        cuda_codebook_dequantize=dequantize, cuda_codebook_linear=linear,
        cuda_codebook_refuses=lambda n, k, g, doubled: "blocks of 16" if g == 16 else None,
    )  # fmt: skip
    monkeypatch.setattr(cuda_codebook, "_core", native)
    monkeypatch.setattr(cuda, "unavailable", lambda *device: None)
    monkeypatch.setattr(cuda_calls, "place", lambda device: (0, 0))
    monkeypatch.setattr(cuda_calls, "workspace", lambda *place: torch.zeros(1))
    takes = cuda_codebook.takes
    monkeypatch.setattr(
        cuda_codebook, "takes", lambda blocks, device: takes(blocks, torch.device("cuda"))
    )
    here = torch.library.Library("tersor", "IMPL", "CPU")
    here.impl("codebook_cuda", cuda_codebook._linear)
    here.impl("codebook_cuda_backward", cuda_codebook._backward_product)
    cuda_codebook._weight.cache_clear()
    yield products
    cuda_codebook._weight.cache_clear()
    here._destroy()


def layers(n: int, k: int, spec: Codebook, monkeypatch, bias: bool = True):
    """The same layer in CUDA order and in portable order."""
    torch.manual_seed(0)
    dense = nn.Linear(k, n, bias=bias)
    ordered = NF4Linear.from_linear(dense, spec)
    with monkeypatch.context() as patch:
        patch.setattr(cuda_codebook, "takes", lambda *given: False)
        return ordered, NF4Linear.from_linear(dense, spec)


SPECS = [NF4(64), NF4(32, False), FP4(64)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_layer_keeps_one_weight_and_says_the_same(calls, spec, monkeypatch):
    ordered, portable = layers(80, 192, spec, monkeypatch)
    assert ordered.packed is None and ordered.scales is None and portable.ordered is None
    want, found = portable.state_dict(), ordered.state_dict()
    assert set(found) == set(want)
    assert all(torch.equal(found[name], want[name]) for name in want)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(ordered.dequantize(dtype), portable.dequantize(dtype))
    twin = copy.deepcopy(ordered)
    other = NF4Linear.from_linear(nn.Linear(192, 80), spec)
    assert not torch.equal(other.dequantize(), twin.dequantize())
    other.load_state_dict(want)
    assert other.packed is None and torch.equal(other.ordered, twin.ordered)
    twin.to(torch.bfloat16)
    assert torch.equal(twin.ordered, other.ordered) and twin.bias.dtype == torch.bfloat16
    assert torch.equal(twin.type(torch.float16).ordered, other.ordered)
    with pytest.raises(RuntimeError, match="size mismatch for packed"):
        other.load_state_dict(layers(64, 192, spec, monkeypatch)[1].state_dict())
    assert other.packed is None and torch.equal(other.nf4_weight().packed, want["packed"])


def test_leaving_the_gpu_is_portable_order(calls, monkeypatch):
    ordered, portable = layers(80, 192, NF4(64), monkeypatch)
    ordered._unsettle()
    assert ordered.ordered is None and torch.equal(ordered.packed, portable.packed)
    ordered._settle()
    assert ordered.packed is None
    monkeypatch.setattr(cuda_codebook, "takes", lambda *given: False)
    away = copy.deepcopy(ordered).to("meta")
    assert away.ordered is None and away.packed.is_meta and away.steps.is_meta


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_few_and_many_tokens(calls, spec, dtype, monkeypatch):
    """Few by a kernel; many, and wider dtypes, by a weight that is dequantized, here in parts."""
    monkeypatch.setattr(cuda, "_SLAB", 32 * 192 * 4)
    for bias in (False, True):
        ordered, portable = layers(80, 192, spec, monkeypatch, bias)
        w = portable.dequantize(torch.float64)
        added = portable.bias.double() if bias else torch.zeros(80)
        calls.clear()
        for shape in ((2, 3, 192), (20, 192), (0, 192), (192,)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            y = ordered(x)
            assert (y.shape, y.dtype) == ((*shape[:-1], 80), dtype)
            exact = x.double() @ w.T + added
            terms = x.double().abs() @ w.abs().T + added.abs()
            # The weight in 16 bits, the sum, the bias and the result are rounded, each to nearest.
            room = 2 * max(torch.finfo(dtype).eps, 2.0**-23 * 8) * terms
            assert bool(((y.double() - exact).abs() <= room).all())
        assert calls == ([6, 20, 1] if dtype in HALVES else [])


def test_gradients_are_those_of_the_dequantized_weight(calls, monkeypatch):
    for slab in (1 << 20, 32 * 192 * 4):
        monkeypatch.setattr(cuda, "_SLAB", slab)
        ordered, portable = layers(80, 192, NF4(64), monkeypatch)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(5, 192, generator=torch.Generator().manual_seed(0)).to(dtype)
            grad = torch.randn(5, 80, generator=torch.Generator().manual_seed(1)).to(dtype)
            x.requires_grad_()
            ordered(x).backward(grad)
            exact = grad.double() @ portable.dequantize(torch.float64)
            terms = grad.double().abs() @ portable.dequantize(torch.float64).abs()
            room = 3 * max(torch.finfo(dtype).eps, 2.0**-20) * terms
            assert x.grad.dtype == dtype
            assert bool(((x.grad.double() - exact).abs() <= room).all())
    small, _ = layers(16, 32, FP4(32), monkeypatch)
    inputs = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(small, inputs)


def test_the_operator_is_one_that_torch_can_compile(calls, monkeypatch):
    ordered, _ = layers(80, 192, NF4(64), monkeypatch)
    x = torch.randn(3, 192).requires_grad_()
    given = (x, ordered.ordered, ordered.bias, *ordered._blocks.fields())
    torch.library.opcheck(torch.ops.tersor.codebook_cuda, given)
    compiled = torch.compile(ordered, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ordered(x))


def test_autocast_gives_its_dtype(calls, monkeypatch):
    ordered, _ = layers(80, 192, NF4(64), monkeypatch)
    x = torch.randn(3, 192).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ordered(x)
    assert y.dtype == torch.bfloat16 and calls == [3]
    assert torch.equal(y, ordered(x.bfloat16()))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_rows_that_no_kernel_could_read_are_copied(calls, monkeypatch):
    ordered, _ = layers(64, 64, NF4(64), monkeypatch)
    wide = torch.randn(8, 160, generator=torch.Generator().manual_seed(0)).half()
    for x in (wide[:, 1:65], wide[:, :128:2], wide[::2, :64], wide[:, :64].t()[:, :8].t()):
        assert torch.equal(ordered(x), ordered(x.clone(memory_format=torch.contiguous_format)))


def test_blocks_that_no_kernel_takes_stay_portable(calls, monkeypatch):
    ordered, portable = layers(64, 64, NF4(16), monkeypatch)
    assert ordered.ordered is None
    x = torch.randn(3, 64)
    assert torch.equal(ordered(x), portable(x)) and not calls
    with pytest.raises(TersorError, match=r"has no CUDA order: blocks of 16; leave it"):
        cuda_codebook.pack_weight(portable.nf4_weight())


# --- what the native module says -----------------------------------------------------------------


@pytest.mark.skipif(not cuda.built(), reason="this build has no CUDA kernels")
@pytest.mark.parametrize(
    ("n", "k", "g", "reason"),
    [
        (64, 128, 64, None),
        (37, 96, 32, None),
        (5, 1024, 1024, None),
        (64, 16, 16, None),
        (64, 64, 16, "must divide a row"),
        (64, 1024, 4096, "must divide a row"),
        (64, 96, 64, "must divide a row"),
        (64, 72, 72, "a multiple of 16"),
        (2**31 - 1, 4096, 32, "too many blocks"),
    ],
)
def test_which_blocks_have_kernels(n, k, g, reason):
    found = cuda._core.cuda_codebook_refuses(n, k, g, True)
    assert found is None if reason is None else reason in found


@pytest.mark.skipif(not cuda.built(), reason="this build has no CUDA kernels")
def test_native_calls_are_checked(library):
    native, each = cuda._core, VALUES["nf4"]().tolist()
    for wrong in (each[:15], [*each[:15], 2.0], [*each[:15], float("nan")]):
        with pytest.raises(Exception, match="16 values from -1 to 1"):
            native.CudaCodebookWeight(64, 64, 64, True, wrong)
    with pytest.raises(Exception, match="that divides k"):
        native.CudaCodebookWeight(64, 64, 48, True, each)
    q = random_weight(64, 64, NF4(64))
    weight = native.CudaCodebookWeight(64, 64, 64, True, each)
    assert weight.bytes == library.codebook_bytes(described(q))
    room = torch.zeros(weight.bytes + 128, dtype=torch.uint8)
    at = room.data_ptr() + -room.data_ptr() % 128
    codes, scales, steps, mean = (p.data_ptr() for p in (q.packed, q.scales, q.steps, q.mean))
    for match, given in [
        ("aligned to 128", (codes, scales, steps, mean, at + 16, weight.bytes)),
        ("it should have", (codes, scales, steps, mean, at, weight.bytes - 1)),
        ("only there", (codes, scales, 0, mean, at, weight.bytes)),
        ("only there", (codes, scales, steps, 0, at, weight.bytes)),
        ("aligned to 4", (codes, scales, steps + 1, mean, at, weight.bytes)),
        ("codes must be given", (0, scales, steps, mean, at, weight.bytes)),
    ]:
        with pytest.raises(Exception, match=match):
            native.cuda_codebook_pack(weight, *given, 0, 0)
    x = torch.zeros(64 * 8 + 8).half()
    here = x.data_ptr() + -x.data_ptr() % 16
    call = [weight, at, weight.bytes, here, 1, 64, 2, 0, here, 64, at, 0, 0, 0]
    for match, index, value in [
        ("it should have", 2, 0),
        ("aligned to 16", 3, here + 2),
        ("m must be", 4, 0),
        ("must not overlap", 5, 56),
        ("multiples of 16", 5, 68),
        ("bfloat16 or float16", 6, 0),
        ("aligned to 4", 7, 2),
        ("y must be", 8, 0),
        ("must not overlap", 9, 63),
        ("workspace must be", 10, 4),
    ]:
        with pytest.raises(Exception, match=match):
            native.cuda_codebook_linear(*call[:index], value, *call[index + 1 :])
    for match, rows in (("rows must be", (0, 65)), ("rows must be", (3, 3))):
        with pytest.raises(Exception, match=match):
            native.cuda_codebook_dequantize(weight, at, weight.bytes, *rows, here, 2, 0, 0)
