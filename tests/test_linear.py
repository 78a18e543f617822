"""QuantLinear: its results against the float64 oracle, and that it is a module like any other."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from tersor import QuantLinear, TersorError, kernels
from tersor.formats import FORMATS
from tersor.qweight import ActSpec, QSpec, QWeight, Scheme
from tersor.testing import DTYPES, assert_close, oracle, random_qweight

SPECS = [
    QSpec(4, 32),
    QSpec(4, 16, symmetric=False),
    QSpec(4, None),
    QSpec(3, 32),
    QSpec(3, 32, symmetric=False),
    QSpec(2, 16),
    QSpec(2, None, symmetric=False),
    QSpec(8, 64),
    QSpec(8, None, symmetric=False),
]
N, K = 37, 192


def weight(spec: QSpec, order: bool = False, seed: int = 0, n: int = N, k: int = K) -> QWeight:
    q = random_qweight(n, k, spec, torch.bfloat16, seed)
    if order and spec.group:
        shuffled = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
        q.order = (torch.arange(k) // spec.group)[shuffled].int()
    return q


def same(a: QWeight, b: QWeight) -> bool:
    """Equal to the last bit, in dtype too."""
    pairs = [(a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros), (a.order, b.order)]
    return a.spec == b.spec and all(
        x is y or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y))
        for x, y in pairs
    )


def layer(spec: QSpec | None = None, bias: bool = True, seed: int = 0) -> QuantLinear:
    b = torch.randn(N, generator=torch.Generator().manual_seed(seed)) if bias else None
    return QuantLinear(weight(spec or QSpec(4, 32), seed=seed), b)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [False, True], ids=["", "order"])
@pytest.mark.parametrize("activation", [None, ActSpec()], ids=["A16", "A8"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_matches_the_oracle(spec, activation, order, dtype):
    q = weight(spec, order)
    bias = inputs(N)
    x = inputs(5, K, dtype=dtype)
    y = QuantLinear(q, bias, activation)(x)
    assert y.dtype == dtype
    # Codes of 2 and 3 bits run on 4-bit kernels, symmetric ones with their zero point moved to 8,
    # so the intermediate sums, and with them the bound, are those of that weight.
    stored = q
    if spec.symmetric and spec.bits < 4:
        stored = QWeight(QSpec(4, spec.group), q.codes + 8 - spec.midpoint, q.scales, None, q.order)
        assert torch.equal(stored.dequantize(), q.dequantize())
    assert_close(y, *oracle(x, stored, bias, activation), str(spec))


@pytest.mark.parametrize("order", [False, True], ids=["", "order"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gives_its_weight_back(spec, order):
    q = weight(spec, order)
    assert same(QuantLinear(q).qweight(), q)


def test_an_order_that_permutes_nothing_is_kept():
    q = weight(QSpec(4, 32))
    q.order = (torch.arange(K) // 32).int()
    made = QuantLinear(q)
    assert made.columns is None
    assert same(made.qweight(), q)


@pytest.mark.parametrize(
    "x",
    [
        inputs(2, 3, K),
        inputs(K),
        inputs(0, K),
        inputs(2, 0, K),
        inputs(1, 1, 1, K),
        inputs(4, 2 * K)[:, :K],
        inputs(6, K)[::2],
        inputs(K, 4).T,
        inputs(2, 3, K).transpose(0, 1),
        inputs(1, K).expand(3, K),
        inputs(3 * K + 1)[1:].view(3, K),
        torch._neg_view(inputs(3, K)),
    ],
    ids=["batch", "vector", "empty", "empty batch", "4-d", "columns", "rows", "transposed",
         "swapped", "expanded", "unaligned",
         "negated"],
)  # fmt: skip
def test_any_shape_and_stride(x):
    made = layer()
    y = made(x)
    assert y.shape == (*x.shape[:-1], N)
    rows = x.reshape(-1, K).clone()
    expected, tolerance = oracle(rows, made.qweight(), made.bias)
    assert_close(y.reshape(-1, N), expected, tolerance, "strided input")
    assert torch.equal(torch.ops.tersor.linear(x, made.packed, made.bias, N), y)


def test_from_linear_rounds_to_nearest():
    linear = nn.Linear(K, N)
    for bits, symmetric in ((4, True), (4, False), (8, True)):
        made = QuantLinear.from_linear(linear, Scheme(QSpec(bits, 32, symmetric)))
        q = made.qweight()
        step = q.scales.float().repeat_interleave(32, dim=1)
        # A weight may be clipped at the end of the grid by up to half a step more, and the scale
        # has its own rounding to float32.
        error = (q.dequantize() - linear.weight).abs()
        assert bool((error <= 1.01 * step).all())
        assert float((error <= 0.501 * step).float().mean()) > 0.95
        assert torch.equal(made.bias, linear.bias)


# --- torch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, ActSpec()], ids=["A16", "A8"])
def test_operator_is_well_formed(activation):
    q = weight(QSpec(4, 32, symmetric=False))
    packed = kernels.pack_weight(q, activation)
    for bias in (None, torch.randn(N)):
        x = inputs(2, 3, K).requires_grad_()
        torch.library.opcheck(torch.ops.tersor.linear.default, (x, packed, bias, N))
    torch.library.opcheck(torch.ops.tersor.linear_backward.default, (inputs(2, 3, N), packed, K))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [False, True], ids=["", "order"])
def test_gradient_of_the_input(order, dtype):
    q = weight(QSpec(4, 32, symmetric=False), order)
    for activation in (None, ActSpec()):  # rounded activations count as the identity
        made = QuantLinear(q, torch.randn(N), activation)
        x = inputs(2, 3, K, dtype=dtype).requires_grad_()
        grad = inputs(2, 3, N, dtype=dtype)
        made(x).backward(grad)
        dense = q.dequantize(torch.float64)
        expected = grad.double() @ dense
        # A float32 sum of N products and the rounding of the weight, then one to the dtype.
        absolute = grad.double().abs() @ dense.abs()
        error = (N + 4) * 2.0**-24 * absolute
        bound = error + torch.finfo(dtype).eps / 2 * (expected.abs() + error)
        assert x.grad.dtype == dtype
        assert bool(((x.grad.double() - expected).abs() <= bound + 1e-7).all())
        assert not any(buffer.requires_grad for buffer in made.buffers())


def test_gradient_of_many_rows():
    q = weight(QSpec(8, 32), n=2500)  # more rows than are dequantized at once
    x = inputs(2, K).requires_grad_()
    QuantLinear(q)(x).sum().backward()
    torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand(2, K), rtol=1e-4, atol=1e-4)


def test_inference_mode():
    made = layer()
    expected = made(inputs(3, K))
    with torch.inference_mode():
        y = made(inputs(3, K))
    assert y.is_inference()
    assert torch.equal(y, expected)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = QuantLinear(weight(QSpec(4, 32), order=True), torch.randn(N))
        self.second = QuantLinear(weight(QSpec(8, None), n=24, k=N), None, ActSpec())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x))) + 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(backend):
    block = Block()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(inputs(3, K)), block(inputs(3, K)))


def test_compiles_with_its_gradient():
    block = Block()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    ours, theirs = inputs(3, K).requires_grad_(), inputs(3, K).requires_grad_()
    compiled(ours).sum().backward()
    block(theirs).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_compiles_for_any_number_of_tokens():
    block = Block()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (2, 3, 17):
        with torch.no_grad():
            assert torch.equal(compiled(inputs(m, K)), block(inputs(m, K)))


def test_exports():
    block = Block().eval()
    tokens = torch.export.Dim("tokens", min=2, max=512)
    program = torch.export.export(block, (inputs(4, K),), dynamic_shapes={"x": {0: tokens}})
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("tersor.linear.default") == 2
    x = inputs(7, K)
    with torch.no_grad():
        assert torch.equal(program.module()(x), block(x))


def test_meta_input():
    assert layer()(torch.empty(2, 3, K, device="meta")).shape == (2, 3, N)


# --- saving, loading, moving ----------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("order", [False, True], ids=["", "order"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_state_dict_is_the_portable_form(spec, order, format):
    q = weight(spec, order)
    made = QuantLinear(q, inputs(N), format=format)
    state = made.state_dict(prefix="a.")
    portable = FORMATS[format].pack(q)
    assert set(state) == {f"a.{name}" for name in [*portable, "bias"]}
    for name, tensor in portable.items():
        assert torch.equal(state[f"a.{name}"], tensor)

    saved = io.BytesIO()
    torch.save(made.state_dict(), saved)
    saved.seek(0)
    other = QuantLinear(weight(spec, seed=5), inputs(N) + 1, format=format)
    other.load_state_dict(torch.load(saved, weights_only=True))
    assert same(other.qweight(), q)
    x = inputs(4, K)
    assert torch.equal(other(x), made(x))


def on_meta(q: QWeight) -> QWeight:
    zeros = None if q.zeros is None else q.zeros.to("meta")
    order = None if q.order is None else q.order.to("meta")
    return QWeight(q.spec, q.codes.to("meta"), q.scales.to("meta"), zeros, order)


@pytest.mark.parametrize("assign", [False, True])
def test_loads_into_a_layer_on_meta(assign):
    q = weight(QSpec(4, 32, symmetric=False), order=True)
    made = QuantLinear(q, inputs(N))
    empty = QuantLinear(on_meta(q), torch.empty(N, device="meta"))
    assert "no weight yet" in repr(empty)
    with pytest.raises(TersorError, match="has no weight yet"):
        empty(inputs(1, K))
    with pytest.raises(TersorError, match="has no weight yet"):
        empty.qweight()
    model = nn.Sequential(empty)
    model.load_state_dict({f"0.{k}": v for k, v in made.state_dict().items()}, assign=assign)
    assert same(empty.qweight(), q)
    assert torch.equal(model(inputs(2, K)), made(inputs(2, K)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("order", [False, True], ids=["", "order"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_state_dict_on_meta_tells_what_will_be_there(spec, order, format):
    q = weight(spec, order)
    there = QuantLinear(q, inputs(N), format=format).state_dict()
    empty = QuantLinear(on_meta(q), torch.empty(N, device="meta"), format=format)
    awaited = empty.state_dict()
    assert awaited.keys() == there.keys()
    for name, tensor in there.items():
        assert awaited[name].is_meta
        assert (awaited[name].dtype, awaited[name].shape) == (tensor.dtype, tensor.shape)
    empty.load_state_dict(there)
    assert not any(tensor.is_meta for tensor in empty.state_dict().values())


def test_assign_takes_the_dtype_of_the_bias():
    made = layer()
    state = made.state_dict() | {"bias": inputs(N).bfloat16()}
    made.load_state_dict(state)
    assert made.dtype == torch.float32
    made.load_state_dict(state, assign=True)
    assert made.dtype == torch.bfloat16
    assert torch.equal(made.state_dict()["bias"], state["bias"])


def test_strict_loading_names_what_is_wrong():
    made = layer()
    good = made.state_dict()
    before = made(inputs(2, K))
    for name in ("weight_packed", "weight_scale", "weight_shape", "bias"):
        with pytest.raises(RuntimeError, match=rf"Missing key\(s\).*{name}"):
            made.load_state_dict({k: v for k, v in good.items() if k != name})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*weight_other"):
        made.load_state_dict(good | {"weight_other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="the weight is 37 x 96, the layer 37 x 192"):
        made.load_state_dict(QuantLinear(weight(QSpec(4, 32), k=96), inputs(N)).state_dict())
    with pytest.raises(RuntimeError, match=r"weight_scale: dtype torch\.int32"):
        made.load_state_dict(good | {"weight_scale": good["weight_scale"].int()})
    with pytest.raises(RuntimeError, match=r"bias must be \[37\]"):
        made.load_state_dict(good | {"bias": torch.zeros(3)})
    assert torch.equal(made(inputs(2, K)), before)

    other = layer(seed=3)
    result = other.load_state_dict({"bias": good["bias"]}, strict=False)
    assert set(result.missing_keys) == {"weight_packed", "weight_scale", "weight_shape"}
    assert torch.equal(other.bias, made.bias)
    assert same(other.qweight(), weight(QSpec(4, 32), seed=3))


def test_an_asymmetric_layer_needs_its_zero_points():
    made = layer(QSpec(4, 32, symmetric=False))
    state = made.state_dict()
    del state["weight_zero_point"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*weight_zero_point"):
        made.load_state_dict(state)


def test_dtype_applies_to_the_bias_alone():
    bias = inputs(N)
    made = QuantLinear(weight(QSpec(4, 32)), bias)
    x = inputs(2, K)
    before = made(x)
    made.to(torch.bfloat16)
    assert made.dtype == torch.bfloat16
    assert same(made.qweight(), weight(QSpec(4, 32)))
    assert made.bias.dtype == torch.float32
    assert torch.equal(made.bias, bias.bfloat16().float())
    assert made.state_dict()["bias"].dtype == torch.bfloat16
    made.to(torch.bfloat16)
    made.float()
    assert torch.equal(made.state_dict()["bias"], bias.bfloat16().float())
    rounding = (bias - bias.bfloat16().float()).abs()
    assert bool(((made(x) - before).abs() <= rounding + 1e-5).all())
    with pytest.raises(TersorError, match=r"not torch\.float64"):
        made.double()
    assert made.dtype == torch.float32


def test_bias_is_a_copy():
    linear = nn.Linear(K, N)
    made = QuantLinear.from_linear(linear, Scheme(QSpec(4, 32)))
    before = made.bias.clone()
    with torch.no_grad():
        linear.bias.add_(1)
    assert torch.equal(made.bias, before)


def test_copies_and_shares():
    made = QuantLinear(weight(QSpec(4, 32), order=True), inputs(N), ActSpec())
    x = inputs(2, K)
    expected = made(x)
    twin = copy.deepcopy(made)
    assert twin.packed.data_ptr() != made.packed.data_ptr()
    made.share_memory()
    assert made.packed.is_shared()
    assert made.bias.is_shared()
    assert torch.equal(made(x), expected)
    del made
    assert torch.equal(twin(x), expected)


def test_moving_off_the_cpu_is_refused():
    made = layer()
    with pytest.raises(TersorError, match="cannot move a QuantLinear from cpu to meta"):
        nn.Sequential(made).to("meta")
    assert made(inputs(1, K)).shape == (1, N)
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):  # torch's own message
            made.to("cuda")


def test_training_mode_changes_nothing():
    made = layer().train()
    assert list(made.parameters()) == []
    assert torch.equal(made(inputs(2, K)), made.eval()(inputs(2, K)))


def test_repr_says_what_it_is():
    text = repr(QuantLinear(weight(QSpec(3, 32, symmetric=False), order=True), None, ActSpec()))
    for part in ("in_features=192", "out_features=37", "bias=False", "W3A8", "g32", "asymmetric",
                 "activation order"):  # fmt: skip
        assert part in text


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [False, True], ids=["", "order"])
def test_wrong_inputs(order):
    made = QuantLinear(weight(QSpec(4, 32), order))
    for grad in (False, True):  # straight to the kernel, and through the operator
        for shape in ((2, K - 1), (2, K + 1), ()):
            with pytest.raises(TersorError, match=r"takes inputs \[..., 192\]"):
                made(torch.zeros(shape).requires_grad_(grad))
        with pytest.raises(TersorError, match=r"not torch\.float64; convert it"):
            made(torch.zeros(2, K, dtype=torch.float64).requires_grad_(grad))
    with pytest.raises(TersorError, match=r"not torch\.int64; convert it"):
        made(torch.zeros(2, K, dtype=torch.int64))


def test_wrong_construction():
    q = weight(QSpec(4, 32))
    with pytest.raises(TersorError, match=r"bias must be \[37\], not \[36\]"):
        QuantLinear(q, torch.zeros(36))
    with pytest.raises(TersorError, match="float64"):
        QuantLinear(q, dtype=torch.float64)
    with pytest.raises(TersorError, match="format must be one of pack-quantized, int-quantized"):
        QuantLinear(q, format="gptq")
    with pytest.raises(TersorError, match=r"takes an nn\.Linear, not Conv1d"):
        QuantLinear.from_linear(nn.Conv1d(1, 1, 1), Scheme(QSpec(4)))
    q.codes[3, 3] = 16
    with pytest.raises(TersorError, match="codes must be below 16"):
        QuantLinear(q)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.zeros(K), "same number of columns"),
        (torch.arange(K) // 16, "beyond the 6"),
        (torch.arange(K) // 32 - 1, "beyond the 6"),
    ],
)
def test_wrong_order(order, message):
    q = weight(QSpec(4, 32))
    q.order = order.int()
    with pytest.raises(TersorError, match=message):
        QuantLinear(q)


def test_a_damaged_weight_is_refused():
    made = layer()
    x = inputs(1, K)
    short = made.packed[:-1].clone()
    with pytest.raises(TersorError, match="cut off"):
        torch.ops.tersor.linear(x, short, made.bias, N)
    with pytest.raises(TersorError, match="not a packed weight"):
        torch.ops.tersor.linear(x, torch.zeros_like(made.packed), made.bias, N)
    with pytest.raises(TersorError, match="the weight is"):
        torch.ops.tersor.linear(x, made.packed, None, N + 1)
    with pytest.raises(TersorError, match="bias must be float32"):
        torch.ops.tersor.linear(x, made.packed, made.bias.bfloat16(), N)
    with pytest.raises(TersorError, match="uint8 tensor on the CPU"):
        kernels.unpack_weight(made.packed.float())
    with pytest.raises(TersorError, match="contiguous groups"):
        kernels.pack_weight(weight(QSpec(4, 32), order=True))


# --- the table ------------------------------------------------------------------------------------


def test_table_and_explanation_agree():
    names = [entry.name for entry in kernels.table()]
    assert len(set(names)) == len(names)
    for m in (1, 128):
        rows = kernels.explain(m, 4096, 4096, QSpec(4, 128), ActSpec())
        assert [name for name, _ in rows] == names
        assert any(reason is None for _, reason in rows)
        unavailable = {entry.name for entry in kernels.table() if entry.unavailable}
        assert not unavailable & {name for name, reason in rows if reason is None}
    with pytest.raises(TersorError, match="does not divide"):
        kernels.explain(1, 16, 100, QSpec(4, 32))
