"""Skeletons: models without weights, whose buffers are real."""

from __future__ import annotations

import copy
import resource
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from architectures import (
    CASES,
    PARTS_CHANGED,
    ROUTERS,
    configuration,
    construct,
    every_case,
    original,
    reopen,
    run,
)
from tersor.errors import TersorError
from tersor.models import (
    build_skeleton,
)
from tersor.models.linears import is_conv1d


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skeleton_has_real_buffers_and_no_weights(case: str, dtype: torch.dtype) -> None:
    skeleton, model = build_skeleton(configuration(case), dtype), construct(case, dtype)
    ours, theirs = dict(skeleton.named_buffers()), dict(model.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, buffer in theirs.items():
        assert ours[name].dtype == buffer.dtype, name
        assert torch.equal(ours[name], buffer), name  # fails on meta too
    ours, theirs = (m.state_dict(keep_vars=True) for m in (skeleton, model))
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert ours[name].is_meta == isinstance(parameter, nn.Parameter), name
        assert (ours[name].shape, ours[name].dtype) == (parameter.shape, parameter.dtype), name
    tied = [(a, b) for a in theirs for b in theirs if a < b and theirs[a] is theirs[b]]
    assert tied == [(a, b) for a in ours for b in ours if a < b and ours[a] is ours[b]]
    assert not skeleton.training


@every_case
def test_skeleton_from_files_is_the_model(case: str, saved) -> None:
    model, reference = reopen(saved(case)), original(case)
    theirs = reference.state_dict()
    compared = 0
    for name, tensor in model.state_dict().items():
        if name in theirs:
            owner = reference.get_submodule(name.rpartition(".")[0])
            turned = is_conv1d(owner) and name.endswith("weight")
            assert torch.equal(tensor.t() if turned else tensor, theirs[name]), name
            compared += 1
    assert compared == len(theirs) or case in ROUTERS
    if case != "roberta":  # transformers 4.50 forgets the bias of this head when it loads
        reference = getattr(transformers, CASES[case][1]).from_pretrained(saved(case))
    ours, expected = run(model), run(reference)
    if case in PARTS_CHANGED:
        # Sums of at most 96 products in another order, in float32, over two blocks.
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(ours, expected)


def test_skeleton_of_8_billion_parameters_takes_no_memory() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    config = configuration("llama") | sizes | heads | {"head_dim": 128, "torch_dtype": "bfloat16"}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build_skeleton(config)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert sum(p.numel() for p in model.parameters()) > 8e9
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert grown < 300  # MiB; the weights would be 16 GiB


def test_skeleton_ignores_an_earlier_quantization_and_keeps_the_config() -> None:
    config = configuration("llama") | {
        "quantization_config": {"quant_method": "compressed-tensors"}
    }
    given = copy.deepcopy(config)
    assert not hasattr(build_skeleton(config).config, "quantization_config")
    assert config == given


BAD_CONFIGS = {
    "unknown type": ({"model_type": "nope"}, "has no model 'LlamaForCausalLM' of type 'nope'"),
    "no type": ({"model_type": None}, "of type None"),
    "odd type": ({"model_type": ["llama"]}, "install a version that has it"),
    "unknown class": ({"architectures": ["Nope"]}, "has no model 'Nope'"),
    "not a model": ({"architectures": ["AutoTokenizer"]}, "has no model 'AutoTokenizer'"),
    "no class": ({"architectures": None}, "has no model None"),
    "odd class": ({"architectures": [3]}, "correct `model_type` and `architectures`"),
    "own code": ({"architectures": ["Nope"], "auto_map": {"AutoModel": "x.Y"}}, "does not run"),
    "zero heads": ({"num_attention_heads": 0, "head_dim": None}, "transformers"),
    "odd width": ({"hidden_size": "wide"}, "transformers"),
}


@pytest.mark.parametrize("change", BAD_CONFIGS)
def test_bad_configurations_are_refused_on_one_line(change: str) -> None:
    settings, message = BAD_CONFIGS[change]
    with pytest.raises(TersorError) as caught:
        build_skeleton(configuration("llama") | settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.get_default_dtype() == torch.float32


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match=r"has no config.json"):
        build_skeleton(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TersorError, match="not valid JSON"):
        build_skeleton(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(TersorError, match="not a JSON object"):
        build_skeleton(tmp_path)


def test_a_buffer_that_cannot_be_made_apart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class OddForCausalLM(transformers.LlamaForCausalLM):
        def __init__(self, config: object) -> None:
            super().__init__(config)
            self.register_buffer("table", torch.empty(3).fill_(1), persistent=False)

    # transformers puts another module object in its place while it is imported.
    monkeypatch.setattr(
        sys.modules["transformers"], "OddForCausalLM", OddForCausalLM, raising=False
    )
    with pytest.raises(TersorError, match="buffer table of OddForCausalLM"):
        build_skeleton(configuration("llama") | {"architectures": ["OddForCausalLM"]})
