"""QuantLinear on NVIDIA GPUs. Without one these tests are skipped, but for what is said then; the
kernels themselves are also run without one, by test_cuda_emulated.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tersor
import tiny
from tersor import ActSpec, QSpec, QuantLinear, Scheme, TersorError, _core, cuda
from tersor.cuda_int8 import share
from tersor.oracle import oracle, random_qweight
from tersor.solvers import RTN
from tersor.sparse_linear import SparseLinear

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
HALVES = (torch.float16, torch.bfloat16)
SHAPES = [(64, 64), (80, 96), (4096, 4096), (1024, 4112), (11008, 4096)]


def layer(n: int, k: int, spec: QSpec, dtype: torch.dtype, bias: bool = True) -> QuantLinear:
    q = random_qweight(n, k, spec, dtype)
    draw = torch.Generator().manual_seed(1)
    return QuantLinear(q, torch.randn(n, generator=draw) if bias else None, dtype=dtype)


def inputs(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(made: QuantLinear | SparseLinear, x: torch.Tensor, y: torch.Tensor) -> None:
    """Against float64: of every sum in float32 the error is that of k additions, where tensor cores
    may cut off instead of rounding, and the result is rounded once; a weight that is dequantized to
    16 bits first is rounded once more."""
    if isinstance(made, SparseLinear):
        w = made.weight.double().cpu()
    else:
        w = made.qweight().dequantize(torch.float64).cpu()
    wide = x.double().cpu()
    exact = wide @ w.T + (0 if made.bias is None else made.bias.double().cpu())
    terms = wide.abs() @ w.abs().T + (0 if made.bias is None else made.bias.double().cpu().abs())
    unit = torch.finfo(x.dtype).eps / 2
    through_floats = x.dtype == torch.float32 or x.shape[0] > 128
    error = (x.shape[1] + 8) * 2.0**-23 * terms + unit * exact.abs()
    if through_floats:
        error = error + unit * terms
    assert bool(((y.double().cpu() - exact).abs() <= error + 1e-7).all())


# --- without a GPU -------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_what_is_missing_is_said():
    reason = cuda.unavailable()
    assert reason and ("NVIDIA" in reason or "without CUDA" in reason)
    q = random_qweight(64, 64, QSpec(4, 64), torch.bfloat16)
    with pytest.raises(TersorError, match="cannot run on cuda:0"):
        cuda.pack_weight(q, torch.device("cuda:0"))


def test_the_operator_has_shapes_without_data():
    grid = cuda.Grid(64, 128, 64, 4, False, 1, 0)
    x = torch.empty(2, 3, 128, dtype=torch.float16, device="meta")
    y = cuda.linear(x, torch.empty(9, dtype=torch.uint8, device="meta"), None, grid)
    assert (y.shape, y.dtype, y.is_meta) == ((2, 3, 64), torch.float16, True)
    with pytest.raises(TersorError, match=r"takes inputs \[..., 128\]"):
        cuda.linear(x[..., :64], x, None, grid)
    with pytest.raises(TersorError, match="the input is on cpu, the layer on meta"):
        cuda.linear(torch.zeros(1, 128), x, None, grid)


@pytest.mark.skipif(not cuda.built(), reason="this build has no CUDA kernels")
@pytest.mark.parametrize(
    ("bits", "activation", "kept", "of", "reason"),
    [
        (4, 0, 2, 4, None),
        (16, 0, 2, 4, None),
        (8, 0, 2, 4, "of 4-bit codes and of 16-bit values"),
        (4, 1, 2, 4, "with 16-bit activations"),
        (4, 0, 1, 4, "knows 2:4 alone"),
        (4, 0, 4, 8, "knows 2:4 alone"),
    ],
)
def test_which_zeros_a_gpu_can_leave_out(bits, activation, kept, of, reason):
    found = _core.cuda_refuses(64, 128, 128, bits, False, 1, activation, kept, of, False)
    assert found is None if reason is None else reason in found
    if reason is None:
        assert (
            8 * _core.CudaWeight(64, 128, 128, bits, False, 1, 0, kept, of, False).bytes > 64 * 128
        )


@pytest.mark.skipif(not cuda.built(), reason="this build has no CUDA kernels")
@pytest.mark.parametrize(
    ("n", "k", "spec", "activation", "reason"),
    [
        (64, 64, QSpec(4, 64), None, None),
        (64, 64, QSpec(8, None), ActSpec(), None),
        (48, 4112, QSpec(4, None), None, None),
        (64, 96, QSpec(2, 32), None, None),
        (24, 64, QSpec(4, 64), None, "multiples of 16"),
        (64, 72, QSpec(4, None), None, "multiples of 16"),
        (64, 96, QSpec(4, 48), None, "the group must be 32"),
        (16, 65792, QSpec(8, None), ActSpec(), None),
        (16, 65808, QSpec(8, None), ActSpec(), "at most 65793 columns of 8 bits"),
        (16, 131072, QSpec(4, 128), ActSpec(), None),
    ],
)
def test_which_weights_can_be_on_a_gpu(n, k, spec, activation, reason):
    found = cuda.refusal(cuda.Grid.of_spec(n, k, spec, activation))
    assert found is None if reason is None else reason in found


# --- on a GPU ------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "spec", [QSpec(4, 128), QSpec(4, 32, False), QSpec(8, None), QSpec(8, 64, False)], ids=str
)
def test_products_against_float64(dtype, spec):
    for n, k in SHAPES:
        if k % (spec.group or k):
            continue
        made = layer(n, k, spec, dtype).to("cuda")
        for m in (1, 2, 8, 9, 16, 33, 64, 65, 128, 129, 513):
            x = inputs(m, k, dtype, seed=m).cuda()
            y = made(x)
            check(made, x, y)
            assert torch.equal(y, made(x))


@gpu
def test_float32_and_views():
    made = layer(256, 512, QSpec(4, 64), torch.float32).to("cuda")
    x = inputs(7, 512, torch.float32).cuda()
    check(made, x, made(x))
    wide = inputs(7, 1024, torch.float16).cuda()
    for view in (wide[:, 1:513], wide[:, ::2], wide[::2, :512], wide[:0, :512]):
        assert torch.equal(made(view), made(view.contiguous()))


@gpu
def test_there_and_back_nothing_changes():
    made = layer(192, 320, QSpec(4, 64, False), torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    x = inputs(3, 320, torch.bfloat16)
    expected = made(x)
    made = made.to("cuda")
    assert all(tensor.is_cuda for tensor in made.state_dict().values())
    twin = copy.deepcopy(made)
    twin.load_state_dict(before)
    assert torch.equal(twin(x.cuda()), made(x.cuda()))
    made = made.cpu()
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    assert torch.equal(made(x), expected)


@gpu
def test_a_layer_that_has_no_kernel_says_so_and_stays():
    made = QuantLinear(random_qweight(24, 64, QSpec(8, None), torch.bfloat16))
    x = inputs(2, 64, torch.bfloat16)
    expected = made(x)
    with pytest.raises(TersorError, match="keep it on the CPU"):
        nn.Sequential(made).to("cuda")
    assert torch.equal(made(x), expected)


@gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [None, 0.013])
@pytest.mark.parametrize("spec", [QSpec(4, 128), QSpec(8, None)], ids=str)
def test_int8_activations_are_those_of_the_cpu(dtype, spec, scale):
    q = random_qweight(1024, 2048, spec, torch.bfloat16)
    static = None if scale is None else torch.tensor([scale])
    how = ActSpec(dynamic=static is None)
    made = QuantLinear(q, activation=how, dtype=dtype, input_scale=static)
    for m in (1, 8, 60, 300):
        x = inputs(m, 2048, dtype, seed=m)
        expected = made.cpu()(x).double()
        found = made.to("cuda")(x.cuda()).cpu().double()
        room = 4 * torch.finfo(dtype).eps * (expected.abs() + expected.abs().mean())
        assert bool(((found - expected).abs() <= room).all())


@gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("spec", [QSpec(4, 128), QSpec(4, 32, False), QSpec(8, None)], ids=str)
def test_outliers_are_those_of_the_cpu(dtype, spec):
    """No column in 16 bits, some, and all; shared and whole tiles; the same bits every time."""
    for n, k in ((80, 96), (1024, 4096), (512, 4128)):
        if k % (spec.group or k):
            continue
        q = random_qweight(n, k, spec, torch.bfloat16)
        for outliers in (1e4, 6.0, 1e-6):
            how = ActSpec(outliers=outliers)
            made = QuantLinear(q, torch.ones(n), how, dtype)
            for m in (1, 8, 9, 33, 64, 300):
                x = inputs(m, k, dtype, seed=m)
                x[m // 2, ::19] *= 20
                x[m - 1, 5] = 9.0
                expected, tolerance = oracle(x, q, made.bias.cpu(), how)
                y = made.to("cuda")(x.cuda())
                assert bool(((y.cpu().double() - expected).abs() <= tolerance).all())
                assert torch.equal(y, made(x.cuda()))


@gpu
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_spoils_no_other(value):
    q = random_qweight(256, 512, QSpec(4, 64), torch.bfloat16)
    made = QuantLinear(q, None, ActSpec(outliers=6.0), torch.float16).to("cuda")
    x = inputs(9, 512, torch.float16).cuda()
    x[:, 40] = 20.0
    expected = made(x)
    x[3, 40], x[7, 100] = value, value
    found = made(x)
    rest = [0, 1, 2, 4, 5, 6, 8]
    assert torch.equal(found[rest], expected[rest])
    assert not bool(found[[3, 7]].isfinite().any())


@gpu
def test_an_input_that_several_linears_read_is_quantized_once():
    """In graphs too, which begin with what was quantized before them and may not use it."""
    spec, how = QSpec(4, 64), ActSpec()
    made = [
        QuantLinear(random_qweight(256, 512, spec, torch.bfloat16, seed), None, how).to("cuda")
        for seed in range(3)
    ]
    share(made)
    x = inputs(5, 512, torch.bfloat16).cuda()
    expected = [each(x.clone()) for each in made]
    assert all(torch.equal(each(x), y) for each, y in zip(made, expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [each(x) for each in made]
    other = inputs(5, 512, torch.bfloat16, seed=1).cuda()
    for given in (other, x.clone()):
        wanted = [each(given.clone()) for each in made]
        x.copy_(given)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(y, want) for y, want in zip(found, wanted, strict=True))
        assert all(torch.equal(each(x), want) for each, want in zip(made, wanted, strict=True))
    together = torch.compile(lambda x: [each(x) for each in made], fullgraph=True)
    assert all(torch.equal(y, want) for y, want in zip(together(x), wanted, strict=True))


@gpu
def test_outliers_in_graphs_and_compiled():
    q = random_qweight(512, 512, QSpec(8, None), torch.bfloat16)
    made = QuantLinear(q, None, ActSpec(outliers=6.0), torch.float16).to("cuda")
    x = inputs(5, 512, torch.float16).cuda()
    x[2, 9] = 30.0
    expected = made(x)
    assert torch.equal(torch.compile(made, fullgraph=True)(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = made(x)
    other = inputs(5, 512, torch.float16, seed=1).cuda()
    other[1, 77] = -50.0
    for given in (x.clone(), other):
        wanted = made(given)
        x.copy_(given)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, wanted)


@gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_two_level_grid_is_that_of_the_cpu(dtype, group):
    draw = torch.Generator().manual_seed(group)
    w = torch.randn(1040, 2048, generator=draw).to(torch.bfloat16)
    q = RTN(clip=True, two_level=True)(w, None, QSpec(4, group))
    made = QuantLinear(q, torch.randn(1040, generator=draw), activation=ActSpec(), dtype=dtype)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    for m in (1, 8, 9, 33, 64, 300):
        x = inputs(m, 2048, dtype, seed=m)
        expected = made.cpu()(x).double()
        made = made.to("cuda")
        assert made.grid is not None and made.grid.two_level
        found = made(x.cuda())
        assert torch.equal(found, made(x.cuda()))
        room = 4 * torch.finfo(dtype).eps * (expected.abs() + expected.abs().mean())
        assert bool(((found.cpu().double() - expected).abs() <= room).all())
        rounded = made(x.cuda().float()).cpu().double()  # through a dequantized weight
        assert bool(((rounded - expected).abs() <= room).all())
    made = made.cpu()
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())


@gpu
def test_streams_and_graphs():
    made = layer(4096, 4096, QSpec(4, 128), torch.float16).to("cuda")
    x = inputs(4, 4096, torch.float16).cuda()
    expected = made(x)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(made(x))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in found)
    graphs, results = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(made(made(x)))
        graphs.append(graph)
    twice = made(expected)
    for _ in range(10):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, twice) for y in results)


@gpu
def test_gradients_and_compile():
    made = layer(256, 512, QSpec(4, 64), torch.float32).to("cuda")
    x = inputs(5, 512, torch.float32).cuda().requires_grad_()
    weights = torch.randn(5, 256, device="cuda")
    (made(x) * weights).sum().backward()
    exact = weights.double() @ made.qweight().dequantize(torch.float64)
    assert torch.allclose(x.grad.double(), exact, rtol=1e-4, atol=1e-3)
    half = inputs(3, 512, torch.float16).cuda()
    compiled = torch.compile(made, fullgraph=True)
    assert torch.equal(compiled(half), made(half))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU only")
def test_several_devices_in_one_process():
    made = layer(256, 512, QSpec(4, 64), torch.float16)
    x = inputs(3, 512, torch.float16)
    each = [copy.deepcopy(made).to(f"cuda:{i}") for i in range(2)]
    first, second = (one(x.to(f"cuda:{i}")).cpu() for i, one in enumerate(each))
    assert torch.equal(first, second)
    assert torch.cuda.current_device() == 0
    assert torch.equal(each[0].to("cuda:1")(x.to("cuda:1")).cpu(), first)
    with pytest.raises(TersorError, match="move one"):
        each[0](x.to("cuda:0"))


@gpu
def test_a_model_is_moved_whole(tmp_path):
    quantized = tmp_path / "quantized"
    tersor.quantize_checkpoint(tiny.save(tmp_path / "plain"), quantized, Scheme(QSpec(4, 32)))
    model = tersor.load(quantized)
    ids = torch.arange(24).view(2, 12)
    expected = model(ids).logits
    found = model.to("cuda")(ids.cuda()).logits.cpu()
    assert torch.allclose(found, expected, atol=0.05 * float(expected.abs().max()))
