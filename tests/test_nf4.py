"""NF4 and FP4: the published values, errors and sizes; the layer and the models made of them."""

from __future__ import annotations

import copy
import io
import itertools
import math
import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tersor
import tiny
from tersor import QSpec, Scheme, TersorError
from tersor.adapters.codebook import (
    FP4,
    NF4,
    Codebook,
    CodebookWeight,
    fp4_values,
    nf4_values,
    quantize_codebook,
)
from tersor.adapters.nf4_linear import NF4Linear, nf4_model

IDS = torch.arange(40).view(2, 20)
PUBLISHED = [  # arXiv:2305.14314, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


KINDS = (NF4, FP4)


def float4(code: int) -> float:
    """What E2M1 says of a code: s ee m, a bias of 1, and no implied digit where ee is 0."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return -size if sign else size


ORACLES = {NF4: PUBLISHED, FP4: [float4(code) / 6 for code in range(16)]}


def gaussian(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.manual_seed(seed))


def plain_quantize(w: Tensor, block: int, double: bool, kind: type[Codebook] = NF4) -> Tensor:
    """The dequantized weight, by loops over blocks in float64."""
    flat = w.double().flatten()
    blocks = flat.split(block)
    scales = [float(b.abs().max()) for b in blocks]
    if double:
        mean = float(torch.tensor(statistics.fmean(scales)).float())
        stored: list[float] = []
        for i in range(0, len(scales), 256):
            rest = [s - mean for s in scales[i : i + 256]]
            step = float(torch.tensor(max(map(abs, rest)) / 127).float()) or 1.0
            stored += [round(r / step) * step + mean for r in rest]
        scales = stored
    values = torch.tensor(ORACLES[kind], dtype=torch.float64)
    out = [
        values[(b[:, None] / s - values).abs().argmin(1)] * s if s else torch.zeros_like(b)
        for b, s in zip(blocks, scales, strict=True)
    ]
    return torch.cat(out).view(w.shape)


# --- the data type --------------------------------------------------------------------------------


def test_values_are_the_published_ones() -> None:
    torch.testing.assert_close(nf4_values(), torch.tensor(PUBLISHED), rtol=0, atol=2e-7)


def test_values_are_quantiles_of_the_normal_distribution() -> None:
    normal = statistics.NormalDist()
    end = 1 - (1 / 32 + 1 / 30) / 2
    upper = [normal.inv_cdf(end + (0.5 - end) * i / 8) for i in range(8)]
    lower = [-normal.inv_cdf(end + (0.5 - end) * i / 7) for i in range(7)]
    want = sorted([*upper, 0.0, *lower])
    got = nf4_values().double() * normal.inv_cdf(end)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-6)


def test_fp4_is_e2m1() -> None:
    """Codes are the bits of the number; the largest is 6."""
    want = torch.tensor(ORACLES[FP4], dtype=torch.float64)
    assert (6 * want[:8]).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert torch.equal(fp4_values(), want.float())
    w = torch.tensor(ORACLES[FP4]).repeat(4).view(1, 64)
    q = quantize_codebook(w, FP4(64, False))
    found = torch.stack([q.packed & 15, q.packed >> 4], 1).flatten()
    assert found.tolist() == [0 if code == 8 else code for code in range(16)] * 4
    assert torch.equal(q.dequantize(), w)
    second_zero = CodebookWeight(q.spec, q.shape, torch.full_like(q.packed, 0x88), q.scales)
    assert not second_zero.dequantize().any()


@pytest.mark.parametrize(
    ("kind", "block", "error"),
    [(NF4, 64, 0.00845), (NF4, 128, 0.00914), (FP4, 64, 0.01117), (FP4, 128, 0.01186)],
)
@pytest.mark.parametrize("double", [False, True])
def test_error_on_gaussian_weights_is_the_published_one(
    kind: type[Codebook], block: int, error: float, double: bool
) -> None:
    w = gaussian(2048, 1024)
    q = quantize_codebook(w, kind(block, double))
    assert float((q.dequantize() - w).square().mean()) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [(NF4(64, False), 4.5), (NF4(64), 4.127), (NF4(128, False), 4.25), (FP4(64), 4.127)],
)
def test_bits_per_weight(spec: Codebook, bits: float) -> None:
    q = quantize_codebook(gaussian(512, 1024), spec)
    assert 8 * q.nbytes / (512 * 1024) == pytest.approx(bits, abs=5e-4)
    assert spec.bits == pytest.approx(bits, abs=5e-4)


@pytest.mark.parametrize("shape", [(48, 64), (37, 50), (1, 1), (3, 33), (300, 129)])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [16, 64, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_same_as_plain_loops(
    kind: type[Codebook], block: int, double: bool, shape: tuple[int, int]
) -> None:
    w = gaussian(*shape)
    w[:, : shape[1] // 2] *= 0.01  # blocks of different sizes
    got = quantize_codebook(w, kind(block, double)).dequantize(torch.float64)
    want = plain_quantize(w, block, double, kind)
    # A weight half way between two values may go to either.
    differs = (got - want).abs() > 1e-5 * w.abs().max()
    assert float(differs.double().mean()) < 0.002
    torch.testing.assert_close(
        (got - w).square().sum(), (want - w).square().sum(), rtol=1e-3, atol=1e-9
    )


def test_many_weights_at_once_are_as_a_few() -> None:
    """Larger than what is handled at a time, with a short last block."""
    w = gaussian(1030, 1025)
    for spec in (NF4(64), NF4(4096, False)):
        got = quantize_codebook(w, spec).dequantize()
        scales = [float(b.abs().max()) for b in w.flatten().split(spec.block)]
        bound = torch.tensor(scales).repeat_interleave(spec.block)[: w.numel()].view_as(w)
        half = max(b - a for a, b in itertools.pairwise(PUBLISHED)) / 2
        slack = 1.02 if spec.double else 1.0001  # of the scale's own rounding
        assert bool(((got - w).abs() <= half * slack * bound + 0.02 * bound * spec.double).all())


def test_zeros_stay_zeros_and_scale_is_free() -> None:
    w = gaussian(4, 64)
    w[1] = 0
    for double in (False, True):
        q = quantize_codebook(w, NF4(64, double))
        assert not q.dequantize()[1].any()
    one, two = (quantize_codebook(w * s, NF4(64, False)) for s in (1.0, 4.0))
    assert torch.equal(one.packed, two.packed)
    assert torch.equal(one.dequantize() * 4, two.dequantize())


def test_rounding_again_changes_nothing() -> None:
    q = quantize_codebook(gaussian(64, 64), NF4(64, False))
    again = quantize_codebook(q.dequantize(), NF4(64, False))
    assert torch.equal(again.packed, q.packed)
    assert torch.equal(again.scales, q.scales)


def test_layout_of_the_codes() -> None:
    w = torch.tensor(PUBLISHED).repeat(4).view(1, 64)
    q = quantize_codebook(w, NF4(64, False))
    assert q.packed[:8].tolist() == [16 * (2 * i + 1) + 2 * i for i in range(8)]
    assert torch.equal(q.dequantize(), nf4_values().repeat(4).view(1, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_point_weight(dtype: torch.dtype) -> None:
    w = gaussian(8, 64).to(dtype)
    got, want = quantize_codebook(w, NF4()), quantize_codebook(w.float(), NF4())
    assert torch.equal(got.packed, want.packed)
    assert got.dequantize(torch.float16).dtype == torch.float16


# --- the layer ------------------------------------------------------------------------------------


def layer(double: bool = True, bias: bool = True, n: int = 24, k: int = 96) -> NF4Linear:
    torch.manual_seed(1)
    return NF4Linear.from_linear(nn.Linear(k, n, bias=bias), NF4(64, double))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradient(bias: bool, dtype: torch.dtype) -> None:
    made = layer(bias=bias)
    x = gaussian(6, 96).view(2, 3, 96).to(dtype).requires_grad_()
    dense = made.dequantize(dtype).requires_grad_(False)
    y = made(x)
    want = F.linear(x.detach(), dense)
    if made.bias is not None:
        want = want + made.bias.to(dtype)
    assert y.dtype == dtype and torch.equal(y.detach(), want)
    grad = gaussian(6, 24, 5).view(2, 3, 24).to(dtype)
    y.backward(grad)
    assert torch.equal(x.grad, grad @ dense)


def test_nothing_dense_is_kept_for_the_backward_pass() -> None:
    made = layer(k=512, n=512)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made(gaussian(2, 512).requires_grad_())
    assert sum(t.nbytes for t in kept) < 512 * 512
    assert not any(p.requires_grad for p in made.parameters()) and not list(made.parameters())


def test_autocast_and_gradcheck() -> None:
    made = layer()
    x = gaussian(3, 96).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad[0], made.dequantize().sum(0), rtol=0.05, atol=0.05)
    assert torch.autograd.gradcheck(made, gaussian(2, 96).double().requires_grad_())


@pytest.mark.parametrize("double", [False, True])
def test_state_dict_is_packed_and_comes_back_bit_for_bit(double: bool) -> None:
    made = layer(double)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    names = {"packed", "scales", "bias"} | ({"steps", "mean"} if double else set())
    assert set(state) == names
    other = NF4Linear.from_linear(nn.Linear(96, 24), NF4(64, double))
    other.load_state_dict(state)
    assert all(torch.equal(other.state_dict()[name], made.state_dict()[name]) for name in names)
    assert torch.equal(other.dequantize(), made.dequantize())
    with pytest.raises(RuntimeError, match="size mismatch for packed"):
        layer(double, n=32).load_state_dict(state)
    with pytest.raises(RuntimeError, match="steps"):
        layer(not double).load_state_dict(state)


def test_a_dtype_applies_to_the_bias_alone() -> None:
    made = layer()
    want = made.dequantize()
    made.to(torch.bfloat16)
    assert made.dtype == made.bias.dtype == torch.bfloat16
    assert made.steps.dtype == made.mean.dtype == torch.float32
    assert torch.equal(made.dequantize(), want)
    assert torch.equal(copy.deepcopy(made).dequantize(), want)


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_takes_the_linears_that_quantize_model_takes(kind: str) -> None:
    one, two = tiny.model(kind), tiny.model(kind)
    report = nf4_model(one, NF4(64))
    other = tersor.swap_linears(two, Scheme(QSpec(4, 32)))
    assert [x.name for x in report.layers] == [x.name for x in other.layers]
    assert report.kept == other.kept
    for each in report.layers:
        assert isinstance(one.get_submodule(each.name), NF4Linear)
        assert 0 < each.error < 0.02
    assert report.bits_per_weight == pytest.approx(4.127, abs=0.02)


def test_model_computes_with_the_dequantized_weights() -> None:
    model, dense = tiny.model("llama"), tiny.model("llama")
    report = nf4_model(model)
    with torch.no_grad():
        for each in report.layers:
            dense.get_submodule(each.name).weight.copy_(model.get_submodule(each.name).dequantize())
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits)


def test_any_module_and_ignored_linears() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    report = nf4_model(model, NF4(16, double=False), ignore=["2"])
    assert [type(m).__name__ for m in model] == ["NF4Linear", "ReLU", "Linear"]
    assert "2" in report.kept
    assert report.layers[0].bits_per_weight == 4 + 32 / 16


def test_fp4_in_the_place_of_nf4() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8))
    expected = [quantize_codebook(model[i].weight, FP4(32)).dequantize() for i in (0, 2)]
    report = nf4_model(model, FP4(32))
    assert [layer.method for layer in report.layers] == ["fp4"] * 2
    assert report.settings["method"] == "fp4" and report.layers[0].scheme == "FP4 g32 double"
    assert all(torch.equal(model[i].dequantize(), w) for i, w in zip((0, 2), expected, strict=True))


def test_is_the_same_every_time_and_state_comes_back() -> None:
    one, two = tiny.model("llama"), tiny.model("llama")
    nf4_model(one), nf4_model(two)
    state = one.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in two.state_dict().items())


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, -64, 48, 65, 8192, None, 64.0])
def test_wrong_blocks(block: Any) -> None:
    with pytest.raises(TersorError, match="a block of NF4 is one of"):
        NF4(block)
    with pytest.raises(TersorError, match="a block of FP4 is one of"):
        FP4(block)


def test_a_codebook_has_values() -> None:
    with pytest.raises(TersorError, match=r"is NF4\(\.\.\.\) or FP4\(\.\.\.\)"):
        Codebook()


def test_wrong_weights() -> None:
    with pytest.raises(TersorError, match=r"takes a weight \[n, k\], not torch\.int64"):
        quantize_codebook(torch.zeros(2, 2, dtype=torch.int64), NF4())
    with pytest.raises(TersorError, match=r"takes a weight \[n, k\]"):
        quantize_codebook(torch.zeros(4), NF4())
    with pytest.raises(TersorError, match="on the meta device"):
        quantize_codebook(torch.zeros(2, 2, device="meta"), NF4())
    for bad in (math.nan, math.inf):
        w = gaussian(4, 64)
        w[2, 3] = bad
        with pytest.raises(TersorError, match="NaN or infinite"):
            quantize_codebook(w, NF4())


def test_wrong_layers() -> None:
    with pytest.raises(TersorError, match=r"takes an nn\.Linear, not ReLU"):
        NF4Linear.from_linear(nn.ReLU())
    q = quantize_codebook(gaussian(4, 64), NF4())
    with pytest.raises(TersorError, match=r"bias must be \[4\], not \[3\]"):
        NF4Linear(q, torch.zeros(3))
    short = CodebookWeight(q.spec, q.shape, q.packed[:-1], q.scales, q.steps, q.mean)
    with pytest.raises(TersorError, match="packed of NF4 g64 double must be"):
        NF4Linear(short)
    made = layer()
    for x in (torch.zeros(2, 95), torch.zeros(()), torch.zeros(2, 96, dtype=torch.int64)):
        with pytest.raises(TersorError, match=r"takes floating-point inputs \[\.\.\., 96\]"):
            made(x)


def test_wrong_models() -> None:
    with pytest.raises(TersorError, match=r"spec is NF4\(\.\.\.\) or FP4\(\.\.\.\), not 4"):
        nf4_model(tiny.model("llama"), 4)
    with pytest.raises(TersorError, match=r"bare nn\.Linear"):
        nf4_model(nn.Linear(4, 4))
    with pytest.raises(TersorError, match="on meta"):
        nf4_model(nn.Sequential(nn.Linear(4, 4, device="meta")))
    quantized = tiny.model("llama")
    tersor.swap_linears(quantized, Scheme(QSpec(4, 32)))
    with pytest.raises(TersorError, match="holds a QuantLinear already"):
        nf4_model(quantized)
    twice = tiny.model("llama")
    nf4_model(twice)
    with pytest.raises(TersorError, match="is a NF4Linear already"):
        nf4_model(twice)
    with pytest.raises(TersorError, match="is a NF4Linear already"):
        tersor.swap_linears(twice, Scheme(QSpec(4, 32)))


def test_a_model_that_cannot_be_rounded_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    with pytest.raises(TersorError, match="1: the weight holds NaN"):
        nf4_model(model)
    assert all(type(m) is nn.Linear for m in model)
