"""NF4 and FP4 on an NVIDIA GPU; skipped where there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tersor
import tiny
from tersor import FP4, NF4, NF4Linear
from tersor import cuda_codebook as codebook
from tersor.adapters.codebook import CodebookWeight
from test_cuda import SHAPES, inputs

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
HALVES = (torch.float16, torch.bfloat16)

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
            room = ((k + 10) * 2.0**-23 + 1.01 * unit) * terms + unit * exact.abs() + 1e-7
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
