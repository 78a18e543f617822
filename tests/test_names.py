"""Tensors in files, under all the names that they have had, lead to the parameters of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from architectures import original, reopen, rewrite, run
from tersor.checkpoint import Checkpoint
from tersor.errors import TersorError
from tersor.models import (
    build_skeleton,
    empty,
    fill,
    find_arch,
    same_name,
    stored,
)
from tersor.models.arch import spellings


def test_spellings() -> None:
    aliases = (("mlp", "moe"), ("head", "out"))
    assert spellings("a.mlp.head", aliases) == [
        "a.mlp.head",
        "a.moe.head",
        "a.mlp.out",
        "a.moe.out",
    ]
    assert spellings("moe.out", aliases)[-1] == "mlp.head"
    assert spellings("mlps.ahead", aliases) == ["mlps.ahead"]


@pytest.mark.parametrize(
    ("case", "prefix"),
    [("gpt2", "transformer."), ("opt", "model."), ("bert", "bert."), ("llama", "model.")],
)
def test_files_without_the_prefix_of_the_base_model(
    case: str, prefix: str, saved, tmp_path
) -> None:
    tensors = load_file(saved(case) / "model.safetensors")
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    folder = rewrite(saved(case), tmp_path / "bare", bare)
    assert torch.equal(run(reopen(folder)), run(reopen(saved(case))))


@pytest.mark.parametrize(("case", "whole"), [("llama-base", "llama"), ("bert-base", "bert")])
def test_files_with_the_prefix_of_a_larger_model(case: str, whole: str, saved, tmp_path) -> None:
    """A base model in the files of a model with a head, whose tensors are left over."""
    prefix = original(whole).base_model_prefix
    tensors = {f"{prefix}.{n}": t for n, t in load_file(saved(case) / "model.safetensors").items()}
    folder = rewrite(
        saved(case), tmp_path / "whole", tensors | {"lm_head.weight": torch.ones(2, 2)}
    )
    assert torch.equal(run(reopen(folder)), run(reopen(saved(case))))


def test_old_names_of_norms(saved, tmp_path: Path) -> None:
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for name, t in load_file(saved("bert") / "model.safetensors").items()
    }
    assert any("gamma" in name for name in old)
    assert torch.equal(
        run(reopen(rewrite(saved("bert"), tmp_path / "old", old))), run(original("bert"))
    )


def test_the_head_of_neox_under_both_its_names(saved, tmp_path: Path) -> None:
    tensors = load_file(saved("neox") / "model.safetensors")
    (head,) = {"lm_head.weight", "embed_out.weight"} & tensors.keys()
    other = "lm_head.weight" if head == "embed_out.weight" else "embed_out.weight"
    tensors[other] = tensors.pop(head)
    folder = rewrite(saved("neox"), tmp_path / "other", tensors)
    assert torch.equal(run(reopen(folder)), run(original("neox")))


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_under_either_name(kept: str, saved, tmp_path: Path) -> None:
    tensors = load_file(saved("llama-tied") / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors[kept] = tensors.pop("model.embed_tokens.weight")
    model = reopen(rewrite(saved("llama-tied"), tmp_path / "tied", tensors))
    assert torch.equal(run(model), run(original("llama-tied")))
    assert model.lm_head.weight is model.model.embed_tokens.weight  # one tensor in memory too


def test_missing_tensors_are_named(saved, tmp_path: Path) -> None:
    tensors = load_file(saved("llama") / "model.safetensors")
    lacking = {n: t for n, t in tensors.items() if "layers.1.mlp" not in n}
    folder = rewrite(saved("llama"), tmp_path / "lacking", lacking)
    message = (
        r"no tensor for model.layers.1.mlp.gate_proj.weight \(and 2 more\) of LlamaForCausalLM"
    )
    with pytest.raises(TersorError, match=message):
        reopen(folder)


def test_tensors_of_another_shape_are_refused(saved, tmp_path: Path) -> None:
    tensors = load_file(saved("llama") / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].t()
    folder = rewrite(saved("llama"), tmp_path / "turned", tensors)
    with pytest.raises(
        TersorError, match=r"up_proj.weight the shape \(64, 96\), but .* \(96, 64\)"
    ):
        reopen(folder)


def test_same_name_leads_from_files_to_modules_too() -> None:
    found = find_arch(original("mixtral"))
    quantized = "layers.0.{}.experts.2.w1.weight_packed"
    ours, theirs = "model." + quantized.format("mlp"), quantized.format("block_sparse_moe")
    assert same_name(found, theirs, {ours}) == ours
    assert same_name(found, ours, {theirs}) == theirs
    assert same_name(found, "layers.0.mlp", {ours}) is None


def test_fill_converts_and_empty_lets_go(saved) -> None:
    checkpoint = Checkpoint.open(saved("llama"))
    model = build_skeleton(saved("llama"))
    where = stored(model, find_arch(model), checkpoint.names)
    names = [name for name in where if name.startswith("model.layers.0.")]
    fill(model, names, where, checkpoint, torch.bfloat16)
    state = model.state_dict(keep_vars=True)
    assert {name for name, tensor in state.items() if not tensor.is_meta} == set(names)
    for name in names:
        assert torch.equal(state[name], original("llama").state_dict()[name].bfloat16())
        assert not state[name].requires_grad
    empty(model, names)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
