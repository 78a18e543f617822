"""SparseLinear: 2:4 weights in 16 bits, in place of nn.Linear."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import tersor
import tiny
from tersor import sparse
from tersor.errors import TersorError
from tersor.kernels import PATTERN, pack_values, packed_spec, unpack_values, unpack_weight
from tersor.qweight import QSpec, QWeight
from tersor.sparse import Measured
from tersor.sparse_linear import SparseLinear, swap_sparse_linears
from tersor.sparsity import Sparsity
from tersor.testing import assert_close, oracle, random_values

BF16, FLOAT = torch.bfloat16, torch.float32
IDS = torch.arange(40).view(2, 20) % tiny.VOCAB


@pytest.fixture(autouse=True)
def _always() -> Iterator[None]:
    sparse.use_sparse("always")
    yield
    sparse.use_sparse("auto")


def linear(n: int = 40, k: int = 256, dtype: torch.dtype = BF16, bias: bool = True) -> nn.Linear:
    made = nn.Linear(k, n, bias=bias, dtype=dtype)
    made.weight.data = random_values(n, k, dtype, seed=1)
    return made


@pytest.mark.parametrize("dtype", sparse.VALUES)
@pytest.mark.parametrize("x_dtype", [FLOAT, *sparse.VALUES])
def test_against_float64(dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    dense = linear(dtype=dtype)
    layer = SparseLinear.from_linear(dense)
    assert layer.dtype == dtype
    for m in (1, 5, 20, 70):
        x = torch.randn(m, 256).to(x_dtype)
        expected, tolerance = oracle(x, dense.weight.detach(), dense.bias.detach())
        y = layer(x)
        assert y.dtype == x_dtype
        assert_close(y, expected, tolerance, f"m={m}")


def test_takes_half_of_the_bytes() -> None:
    packed = pack_values(random_values(1024, 4096, BF16), PATTERN)
    assert 8 * packed.numel() / (1024 * 4096) < 8.8


def test_values_come_back_but_for_the_sign_of_zeros() -> None:
    for dtype in sparse.VALUES:
        w = random_values(37, 384, dtype)
        w[3, 7] = -0.0 if w[3, 7] == 0 else w[3, 7]
        w[5, :8] = torch.tensor([1e-30, 0, 0, -0.0, 0, float("inf"), float("nan"), 0])
        back = unpack_values(pack_values(w, PATTERN))
        assert torch.equal(torch.nan_to_num(back), torch.nan_to_num(w))
        zero = back.view(torch.int16)[back == 0]
        assert not zero.any()
        assert torch.isnan(back[5, 6])


def test_saves_and_loads_as_a_plain_linear() -> None:
    dense, other = linear(), linear()
    other.weight.data = random_values(40, 256, BF16, seed=2)
    layer = SparseLinear.from_linear(dense)
    nn.Linear(256, 40, dtype=BF16).load_state_dict(layer.state_dict())
    assert torch.equal(layer.state_dict()["weight"], dense.weight)
    assert torch.equal(layer.weight, dense.weight)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.state_dict()["bias"], other.bias)
    assert not list(layer.parameters())
    on_meta = SparseLinear(dense.weight.detach().to("meta"), dense.bias.detach().to("meta"))
    assert on_meta.state_dict()["weight"].is_meta
    on_meta.load_state_dict(dense.state_dict(), assign=True)
    x = torch.randn(3, 256)
    assert torch.equal(on_meta(x), SparseLinear.from_linear(dense)(x))


def test_the_gradient_reaches_the_input() -> None:
    dense = linear(dtype=BF16)
    layer, x = SparseLinear.from_linear(dense), torch.randn(4, 256, requires_grad=True)
    layer(x).square().sum().backward()
    again = x.detach().double().requires_grad_()
    y = again @ dense.weight.detach().double().T + dense.bias.detach().double()
    y.square().sum().backward()
    torch.testing.assert_close(x.grad.double(), again.grad, rtol=1e-4, atol=1e-4)


def test_which_linears_are_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict(
        {
            "good": linear(),
            "narrow": linear(k=64),
            "whole": nn.Linear(256, 40, dtype=BF16),
            "float32": linear(dtype=FLOAT),
            "tied": linear(),
            "also": nn.Module(),
        }
    )
    model["also"].weight = model["tied"].weight
    expected = {
        "good": "swapped",
        "narrow": "no kernel of this machine serves 40 x 64",
        "tied": "shares its weight with another module",
    }
    sparse.use_sparse("never")
    assert set(swap_sparse_linears(model).values()) == {
        "use_sparse says never",
        expected["tied"],
    }
    sparse.use_sparse("auto")
    monkeypatch.setattr(sparse, "measure_values", lambda *what: Measured(0.9, 1.0))
    assert swap_sparse_linears(model)["good"] == "torch is faster here (0.90 times)"
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    monkeypatch.setattr(sparse, "measure_values", lambda *what: Measured(1.5, 1.0))
    assert swap_sparse_linears(model) == expected
    assert [name for name, m in model.named_modules() if isinstance(m, SparseLinear)] == ["good"]


def test_what_is_at_the_border_is_left() -> None:
    twice = linear()
    model = nn.ModuleDict({"a": twice, "b": nn.ModuleDict({"same": twice})})
    model["none"] = nn.Linear(0, 4, dtype=BF16)
    model["good"] = linear()
    assert swap_sparse_linears(model) == {
        "a": "shares its weight with another module",
        "good": "swapped",
    }
    assert swap_sparse_linears(model["good"].to("cpu")) == {}
    assert swap_sparse_linears(nn.ModuleList([linear().to("meta")])) == {}


def test_what_has_no_weight_says_so() -> None:
    empty = SparseLinear(torch.empty(64, 256, dtype=BF16, device="meta"))
    for x in (torch.randn(2, 256), torch.randn(2, 256, requires_grad=True)):
        with pytest.raises(TersorError, match="has no weight yet"):
            empty(x)
    assert empty(torch.empty(2, 256, device="meta", requires_grad=True)).shape == (2, 64)


def test_a_swapped_layer_is_where_the_linear_was() -> None:
    model = nn.Sequential(linear()).eval()
    seen = []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    swap_sparse_linears(model)
    assert isinstance(model[0], SparseLinear)
    assert not model[0].training
    model(torch.randn(1, 256))
    handle.remove()
    model(torch.randn(1, 256))
    assert seen == [1]
    with pytest.raises(TersorError, match="cannot be replaced within itself"):
        swap_sparse_linears(linear())
    with pytest.raises(TersorError, match="holds a SparseLinear already"):
        tersor.prune_model(model, method=tersor.Magnitude(Sparsity(0.8)))


def test_measuring_gives_times_of_both() -> None:
    found = sparse.measure_values(1, 256, 256)
    assert found.dense > 0
    assert found.sparse > 0


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_pruned_folders(kind: str, tmp_path: Path) -> None:
    """tersor.load takes them, and what it loaded is saved as it was."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    model = tiny.model(kind, BF16, **sizes)
    model.save_pretrained(tmp_path / "model")
    tersor.prune_checkpoint(
        tmp_path / "model", tmp_path / "out", method=tersor.Magnitude(Sparsity(pattern=(2, 4)))
    )
    loaded = tersor.load(tmp_path / "out")
    swapped = [m for m in loaded.modules() if isinstance(m, SparseLinear)]
    assert len(swapped) == {"llama": 2 * 7, "mixtral": 2 * 4 + 2 * 4 * 3}[kind]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=BF16)
    with torch.no_grad():
        got, want = loaded(input_ids=IDS).logits.float(), plain(input_ids=IDS).logits.float()
    assert (got - want).norm() < 0.02 * want.norm()
    if kind == "llama":
        loaded.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=BF16).state_dict()
        assert all(torch.equal(again[name], t) for name, t in plain.state_dict().items())


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="the values are not 2:4"):
        SparseLinear.from_linear(nn.Linear(256, 40, dtype=BF16))
    with pytest.raises(TersorError, match="bfloat16 or float16"):
        SparseLinear.from_linear(linear(dtype=FLOAT))
    with pytest.raises(TersorError, match=r"takes an nn\.Linear"):
        SparseLinear.from_linear(nn.Identity())
    with pytest.raises(TersorError, match="no kernel serves 2:4 W16A16"):
        SparseLinear.from_linear(linear(k=64))
    layer = SparseLinear.from_linear(linear())
    with pytest.raises(RuntimeError, match="load it into a layer of its own size"):
        layer.load_state_dict(linear(n=8).state_dict())
    with pytest.raises(RuntimeError, match="the values are not 2:4"):
        layer.load_state_dict(nn.Linear(256, 40, dtype=BF16).state_dict())
    with pytest.raises(TersorError, match="use unpack_values"):
        unpack_weight(layer.packed)
    quantized = tersor.QuantLinear(
        QWeight(QSpec(4), torch.zeros(16, 128, dtype=torch.uint8), torch.ones(16, 1))
    )
    with pytest.raises(TersorError, match="use unpack_weight"):
        unpack_values(quantized.packed)
    assert packed_spec(layer.packed)["bits"] == 16
