"""Fused experts and Conv1D as the linears that they are."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from architectures import original, plain, reopen, rewrite, run
from tersor.checkpoint import Checkpoint
from tersor.errors import TersorError
from tersor.models import (
    Experts,
    build_skeleton,
    find_arch,
    plain_linears,
    stored,
    taps_of,
    unfuse_experts,
)
from tersor.models.linears import is_conv1d, is_fused


class FusedExperts(nn.Module):
    """Experts as transformers 5 keeps them, computed densely: every expert on every token."""

    def __init__(self, experts: int, hidden: int, inter: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inter, hidden))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inter))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        shares = torch.zeros(len(hidden_states), len(self.down_proj), dtype=hidden_states.dtype)
        shares.scatter_(1, top_k_index, top_k_weights)
        gate, up = torch.einsum("th,eih->tei", hidden_states, self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("tei,ehi,te->th", self.act_fn(gate) * up, self.down_proj, shares)


NAMES = Experts(module="experts", routers=("gate",), gate="w1", up="w3", down="w2")


def test_unfused_experts_compute_the_same() -> None:
    torch.manual_seed(0)
    fused = FusedExperts(experts=5, hidden=16, inter=24).double()
    x = torch.randn(40, 16, dtype=torch.float64)
    index = torch.rand(40, 4).topk(2, dim=-1).indices  # the fifth expert gets no token
    weights = torch.rand(40, 2, dtype=torch.float64)
    unfused = unfuse_experts(fused, NAMES)
    assert [name for name, _ in unfused[3].named_parameters()] == [
        "w1.weight",
        "w3.weight",
        "w2.weight",
    ]
    # float64: sums of at most 24 products of numbers around 1 to 100.
    torch.testing.assert_close(
        unfused(x, index, weights), fused(x, index, weights), rtol=1e-10, atol=1e-9
    )
    storages = {p.untyped_storage().data_ptr() for p in unfused.parameters()}
    assert len(storages) == 15  # nothing keeps the fused parameters alive
    assert fused.down_proj.untyped_storage().data_ptr() not in storages


def test_experts_of_another_kind_are_refused() -> None:
    fused = FusedExperts(2, 16, 24)
    fused.gate_up_proj_bias = nn.Parameter(torch.zeros(2, 48))
    with pytest.raises(TersorError, match="cannot take the experts of FusedExperts apart"):
        unfuse_experts(fused, NAMES)
    turned = FusedExperts(2, 16, 24)
    turned.down_proj = nn.Parameter(torch.zeros(2, 24, 16))
    with pytest.raises(TersorError, match=r"down_proj \(2, 24, 16\)"):
        unfuse_experts(turned, NAMES)


def test_mixtral_without_fused_experts_gives_the_same_logits() -> None:
    if not any(is_fused(module) for module in original("mixtral").modules()):
        pytest.skip("this version of transformers does not fuse the experts of Mixtral")
    # float32 sums of at most 96 products, in another order.
    torch.testing.assert_close(
        run(plain("mixtral")), run(original("mixtral")), rtol=1e-4, atol=1e-5
    )


def test_every_expert_has_a_tap_and_a_name_of_its_own(saved) -> None:
    checkpoint = Checkpoint.open(saved("mixtral"))
    model = build_skeleton(saved("mixtral"))
    found = find_arch(model)
    plain_linears(model, found.arch)
    path, block = next(found.blocks(model))
    taps = [t.linears for t in taps_of(found.arch, block) if "experts" in t.linears[0]]
    assert len(taps) == 8  # two for each of four experts
    assert {name.rpartition(".")[2] for linears in taps for name in linears} == {"w1", "w2", "w3"}
    where = stored(model, found, checkpoint.names)
    for number, part in [(0, "w1"), (3, "w2")]:
        (linear,) = (n for t in taps for n in t if n.endswith(f"experts.{number}.{part}"))
        place = where[f"{path}.{linear}.weight"]
        expected = f"model.layers.0.block_sparse_moe.experts.{number}.{part}.weight"
        assert (place.name, place.saved_as, place.expert) == (expected, expected, None)


def test_files_with_fused_experts(saved, tmp_path: Path) -> None:
    """As a plain state dict of transformers 5 has them."""
    tensors = load_file(saved("mixtral") / "model.safetensors")
    per_expert = {name for name in tensors if ".experts." in name}
    fused = {
        n.replace("block_sparse_moe", "mlp"): t for n, t in tensors.items() if n not in per_expert
    }
    for layer in range(2):
        w1, w2, w3 = (
            torch.stack(
                [
                    tensors[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{w}.weight"]
                    for e in range(4)
                ]
            )
            for w in ("w1", "w2", "w3")
        )
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    folder = rewrite(saved("mixtral"), tmp_path / "fused", fused)
    assert torch.equal(run(reopen(folder)), run(reopen(saved("mixtral"))))
    model = build_skeleton(folder)
    found = find_arch(model)
    plain_linears(model, found.arch)
    where = stored(model, found, Checkpoint.open(folder).names)
    written = {place.saved_as for place in where.values() if ".experts." in place.saved_as}
    assert written == per_expert


def test_conv1d_becomes_an_equal_linear(saved) -> None:
    before, after = original("gpt2"), plain("gpt2")
    assert any(map(is_conv1d, before.modules()))
    assert not any(map(is_conv1d, after.modules()))
    assert after.transformer.h[0].attn.c_attn.weight.shape == (192, 64)
    # float32 sums of at most 256 products, in another order.
    torch.testing.assert_close(run(after), run(before), rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(after)
    plain_linears(again, find_arch(again).arch)
    assert torch.equal(run(again), run(after))


def test_config_files_are_read_as_dicts_or_folders(saved) -> None:
    config = json.loads((saved("qwen2") / "config.json").read_text())
    ours, theirs = build_skeleton(config), build_skeleton(str(saved("qwen2")))
    assert list(ours.state_dict()) == list(theirs.state_dict())
