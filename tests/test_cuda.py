"""QuantLinear on NVIDIA GPUs. Without one these tests are skipped, but for what is said then; the
kernels themselves are also run without one, by test_cuda_emulated.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tersor
import tiny
from tersor import FP4, NF4, ActSpec, NF4Linear, QSpec, QuantLinear, Scheme, TersorError, cuda
from tersor import cuda_codebook as codebook
from tersor.adapters.codebook import CodebookWeight
from tersor.oracle import random_qweight
from tersor.solvers import RTN

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
HALVES = (torch.float16, torch.bfloat16)
SHAPES = [(64, 64), (80, 96), (4096, 4096), (1024, 4112), (11008, 4096)]


def layer(n: int, k: int, spec: QSpec, dtype: torch.dtype, bias: bool = True) -> QuantLinear:
    q = random_qweight(n, k, spec, dtype)
    draw = torch.Generator().manual_seed(1)
    return QuantLinear(q, torch.randn(n, generator=draw) if bias else None, dtype=dtype)


def inputs(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(made: QuantLinear, x: torch.Tensor, y: torch.Tensor) -> None:
    """Against float64: of every sum in float32 the error is that of k additions, and the result is
    rounded once; a weight that is dequantized to 16 bits first is rounded once more."""
    w = made.qweight().dequantize(torch.float64).cpu()
    wide = x.double().cpu()
    exact = wide @ w.T + (0 if made.bias is None else made.bias.double().cpu())
    terms = wide.abs() @ w.abs().T + (0 if made.bias is None else made.bias.double().cpu().abs())
    unit = torch.finfo(x.dtype).eps / 2
    through_floats = x.dtype == torch.float32 or x.shape[0] > 128
    error = (x.shape[1] + 8) * 2.0**-24 * terms + unit * exact.abs()
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
    ("n", "k", "spec", "activation", "reason"),
    [
        (64, 64, QSpec(4, 64), None, None),
        (64, 64, QSpec(8, None), ActSpec(), None),
        (48, 4112, QSpec(4, None), None, None),
        (64, 96, QSpec(2, 32), None, None),
        (24, 64, QSpec(4, 64), None, "multiples of 16"),
        (64, 72, QSpec(4, None), None, "multiples of 16"),
        (64, 96, QSpec(4, 48), None, "the group must be 32"),
        (16, 131056, QSpec(8, None), ActSpec(), None),
        (16, 131072, QSpec(8, None), ActSpec(), "at most 131071 columns can share a scale"),
        (16, 131072, QSpec(4, 128), ActSpec(), None),
    ],
)
def test_which_weights_can_be_on_a_gpu(n, k, spec, activation, reason):
    found = cuda.refusal(random_qweight(n, k, spec, torch.bfloat16), activation)
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
@pytest.mark.parametrize("spec", [QSpec(4, 128), QSpec(8, None)], ids=str)
def test_int8_activations_are_those_of_the_cpu(dtype, spec):
    q = random_qweight(1024, 2048, spec, torch.bfloat16)
    made = QuantLinear(q, activation=ActSpec(), dtype=dtype)
    for m in (1, 8, 60, 300):
        x = inputs(m, 2048, dtype, seed=m)
        expected = made.cpu()(x).double()
        found = made.to("cuda")(x.cuda()).cpu().double()
        room = 4 * torch.finfo(dtype).eps * (expected.abs() + expected.abs().mean())
        assert bool(((found - expected).abs() <= room).all())


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


# --- NF4 and FP4 on a GPU ------------------------------------------------------------------------

PUBLISHED = [  # arXiv:2305.14314, appendix E: the table that bitsandbytes has as well
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
CODEBOOKS = [NF4(64), NF4(128, False), NF4(32), FP4(64), FP4(32, False)]


def codebook_layer(n: int, k: int, spec: NF4 | FP4, bias: bool = True) -> NF4Linear:
    torch.manual_seed(0)
    return NF4Linear.from_linear(nn.Linear(k, n, bias=bias), spec)


@gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("spec", CODEBOOKS, ids=str)
def test_codebook_products_against_float64(dtype, spec):
    """Of each weight the value is off by half a unit; then sums in float32."""
    for n, k in [*SHAPES, (37, 128), (1000, 4096)]:
        if k % spec.block:
            continue
        portable = codebook_layer(n, k, spec)
        w, added = portable.dequantize(torch.float64), portable.bias.double()
        made = copy.deepcopy(portable).to("cuda")
        assert made.packed is None
        for m in (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 513):
            name = codebook.serving(m, codebook.Blocks.of((n, k), spec), dtype)
            assert name.startswith("codebook_") == (m <= 64)
            x = inputs(m, k, dtype, seed=m)
            y = made(x.cuda())
            exact, terms = x.double() @ w.T + added, x.double().abs() @ w.abs().T + added.abs()
            unit = torch.finfo(dtype).eps / 2
            room = ((k + 10) * 2.0**-24 + 1.01 * unit) * terms + unit * exact.abs() + 1e-7
            if m > 64:  # torch may round its sum before the bias comes
                room = room + unit * terms
            assert bool(((y.double().cpu() - exact).abs() <= room).all())
            assert torch.equal(y, made(x.cuda()))


@gpu
def test_nf4_on_a_gpu_has_the_published_values():
    """Each code in every place of a row, times the identity."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(64, 4)
    codes = torch.stack([row.roll(i) for i, row in enumerate(codes)])
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).flatten()
    weight = CodebookWeight(NF4(64, False), (64, 64), packed, torch.ones(64))
    made = NF4Linear(weight).to("cuda")
    want = torch.tensor(PUBLISHED)[codes.long()]
    assert torch.allclose(made.dequantize().cpu(), want, rtol=0, atol=2e-7)
    for dtype in HALVES:
        found = made(torch.eye(64, dtype=dtype, device="cuda")).t().float().cpu()
        assert bool(((found - want).abs() <= torch.finfo(dtype).eps * want.abs()).all())


@gpu
@pytest.mark.parametrize("spec", [NF4(64), FP4(32, False), NF4(16), NF4(4096)], ids=str)
def test_codebook_layers_there_and_back(spec):
    """Blocks of 16, and those of several rows, have no kernel: torch multiplies there."""
    made = codebook_layer(192, 320, spec)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    dense = made.dequantize()
    made = made.to("cuda")
    assert (made.ordered is None) == (spec.block in (16, 4096))
    state = made.state_dict()
    assert set(state) == set(before) and all(tensor.is_cuda for tensor in state.values())
    assert all(torch.equal(tensor.cpu(), before[name]) for name, tensor in state.items())
    for dtype in (torch.float32, *HALVES):
        assert torch.equal(made.dequantize(dtype).cpu(), dense.to(dtype))
    x = inputs(3, made.in_features, torch.float16).cuda()
    twin = copy.deepcopy(made)
    twin.load_state_dict(before)
    assert torch.equal(twin(x), made(x))
    exact = x.cpu().double() @ dense.double().T + before["bias"].double()
    terms = x.cpu().double().abs() @ dense.double().abs().T + before["bias"].double().abs()
    room = 3 * torch.finfo(x.dtype).eps * terms  # weights, sum, bias and result in 16 bits
    assert bool(((made(x).cpu().double() - exact).abs() <= room).all())
    made = made.cpu()
    assert made.ordered is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())


@gpu
def test_codebook_gradients_graphs_and_compile():
    made = codebook_layer(256, 512, NF4(64)).to("cuda")
    x = inputs(5, 512, torch.float32).cuda().requires_grad_()
    weights = torch.randn(5, 256, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    (y.float() * weights).sum().backward()
    w = made.dequantize(torch.float64)
    exact, terms = weights.double() @ w, weights.double().abs() @ w.abs()
    room = 3 * torch.finfo(torch.bfloat16).eps * terms  # weights, gradients and result in 16 bits
    assert bool(((x.grad.double() - exact).abs() <= room).all())
    half = inputs(3, 512, torch.float16).cuda()
    expected = made(half)
    assert torch.equal(torch.compile(made, fullgraph=True)(half), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = made(half)
    captured.zero_()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


@gpu
def test_qlora_trains_on_a_gpu():
    peft = pytest.importorskip("peft")
    model = tiny.model("llama")
    tersor.nf4_model(model, NF4(32))
    adapted = tersor.add_lora(model, peft.LoraConfig(r=4)).to("cuda")
    ids = torch.arange(24, device="cuda").view(2, 12)
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), 1e-2)
    losses = []
    for _ in range(5):
        with torch.autocast("cuda", torch.bfloat16):
            loss = adapted(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
