"""int8 activations on a GPU: made once for the linears that read them."""

from __future__ import annotations

import copy
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import make_fx

import emulated
import tiny
from tersor import (
    ActSpec,
    QSpec,
    QuantLinear,
    Scheme,
    cuda,
    cuda_calls,
    cuda_int8,
    load,
    quantize_checkpoint,
    swap_linears,
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if emulated.compiler() is None:
        pytest.skip("there is no C++ compiler")
    return emulated.build(tmp_path_factory.mktemp("emulated"))


def test_an_input_is_quantized_once_for_all_that_read_it(monkeypatch):
    """As long as it is the same, in the same place: of a stream, a capture, a grid and a scale."""
    made, place, capture = [], [0, 7], [0]

    def quantize(x, g, outliers, input_scale):
        made.append(x.clone())
        return torch.zeros(1)

    monkeypatch.setattr(cuda_int8, "quantize", quantize)
    monkeypatch.setattr(cuda_calls, "place", lambda device: tuple(place))
    monkeypatch.setattr(cuda_int8, "_core", SimpleNamespace(cuda_capture=lambda *at: capture[0]))
    shared, users = cuda_int8.Shared(9), iter(range(1000))  # numbers below 257 have one identity

    def asked(x, g=64, outliers=None, scale=None, user=None):
        before = len(made)
        shared.of(next(users) if user is None else user, x, g, outliers, scale)
        return len(made) - before

    x = torch.ones(2, 64, requires_grad=True)
    assert asked(x) == 1 and asked(x) == 0 and not made[0].requires_grad
    with torch.no_grad():
        x.add_(1)  # another value
    assert asked(x) == 1 and bool((made[-1] == 2).all())
    half, other = (torch.tensor([0.5]), 0.5), (torch.tensor([0.5]), 0.5)
    assert asked(x, 32) == 1 and asked(x, 32, 6.0) == 1 and asked(x, 32, None, half) == 1
    assert asked(x, 32, None, other) == 0 and asked(x, 32, None, (half[0], 0.25)) == 1
    for change, back in (((place, 1, 8), 7), ((place, 0, 1), 0), ((capture, 0, 5), 0)):
        which, at, value = change
        assert asked(x) == 1
        which[at] = value
        assert asked(x) == 1
        which[at] = back
    assert asked(x) == 1 and asked(torch.ones(2, 64)) == 1 and asked(x) == 1
    user = object()
    assert asked(x, user=user) == 0 and asked(x, user=user) == 1  # as if x were another now
    kept = weakref.ref(shared._made.quantized)
    del x
    assert kept() is None and shared._made is None  # nothing is kept beyond the input
    with torch.inference_mode():
        x = torch.ones(2, 64)
        assert [asked(x) for _ in range(9)] == [1, *[0] * 8]
    assert shared._made is None  # nor beyond the last that reads it
    assert copy.deepcopy(shared).count == pickle.loads(pickle.dumps(shared)).count == 9


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_who_shares(kind, tmp_path):
    """In a model that was quantized in memory, in one that was loaded, and in copies."""
    scheme = Scheme(QSpec(8, None), ActSpec())
    source = tiny.save(tmp_path / "m", kind)
    quantize_checkpoint(source, tmp_path / "q", scheme=scheme, method="rtn")
    loaded, held = load(tmp_path / "q"), tiny.model(kind)
    swap_linears(held, scheme)
    for model in (loaded, held, copy.deepcopy(loaded)):
        groups: dict[cuda_int8.Shared, list[str]] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, QuantLinear) and layer.shared is not None:
                groups.setdefault(layer.shared, []).append(name.rpartition(".")[2])
        assert all(len(names) == shared.count for shared, names in groups.items())
        found = sorted(map(sorted, groups.values()))
        attention, experts = ["k_proj", "q_proj", "v_proj"], [["w1", "w3"]] * 8
        gated = [["gate_proj", "up_proj"]] * 2
        expected = {
            "llama": [*gated, attention, attention],
            "mixtral": [attention, attention, *experts],
            "gpt2": [],
        }
        assert found == expected[kind]
    swap_linears(plain := tiny.model("llama"), Scheme(QSpec(8, None)))
    assert all(getattr(each, "shared", None) is None for each in plain.modules())


def test_both_sides_know_how_long_int8_activations_are(library):
    long = emulated.ctypes.c_int64
    for m in (1, 8, 9, 16, 17, 33, 64, 65, 1000):
        for k, g in ((16, 16), (32, 32), (64, 32), (208, 208), (4096, 128), (192, 64), (160, 32)):
            rows = cuda_int8._rows(m)
            assert rows == cuda_int8._symbolic_rows(m)
            size = cuda_int8._bytes(rows, k, g)
            assert size == library.quantized_bytes(long(m), long(k), long(g))


def test_equal_calls_in_a_graph_become_one():
    """What torch.compile does with a graph in which several linears read one input."""
    grid = cuda.Grid(64, 128, 64, 8, False, 1, 1)

    def block(x, packed):
        return [cuda.linear(x, packed, None, grid) for _ in range(3)]

    x = torch.empty(2, 128, dtype=torch.float16, device="meta")
    packed = torch.empty(1, dtype=torch.uint8, device="meta")
    graph = fx_graph_cse(make_fx(block, tracing_mode="real")(x, packed).graph)
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert sum("quantize_cuda" in name for name in names) == 1


def test_one_graph_serves_any_number_of_tokens():
    grid, packed = cuda.Grid(64, 128, 64, 8, False, 1, 1), torch.empty(1, device="meta")

    class Block(torch.nn.Module):
        def forward(self, x):
            return cuda.linear(x, packed, None, grid)

    x = torch.empty(70, 128, dtype=torch.float16, device="meta")
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Block(), (x,), dynamic_shapes={"x": {0: tokens}})
    assert "quantize_cuda" in str(program.graph)
    assert program.module()(x[:5]).shape == (5, 64)
