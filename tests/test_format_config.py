"""quantization_config: what is written, against compressed-tensors' own classes; what is read, from
current and older writers; what is refused; names and expressions from a stranger's file."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tersor.errors import TersorError
from tersor.formats import FORMATS, parse_config, quantization_config
from tersor.formats.config import default_format
from tersor.formats.targets import Targets
from tersor.qweight import BITS, ActSpec, QSpec, Scheme

W4 = Scheme(QSpec(4, 128))
W8A8 = Scheme(QSpec(8, None), ActSpec())
SCHEMES = [
    Scheme(QSpec(bits, group, symmetric), activation)
    for bits in BITS
    for group in (None, 32)
    for symmetric in (True, False)
    for activation in (None, ActSpec())
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_compressed_tensors_reads_what_is_written(scheme: Scheme) -> None:
    """Its own classes accept the dict, keep every value, and would choose the same format."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig

    written = json.loads(json.dumps(quantization_config(scheme, ["lm_head"], actorder="weight")))
    read = QuantizationConfig.model_validate(written)
    kept = json.loads(read.model_dump_json())
    for key in kept.keys() & written.keys() - {"config_groups"}:
        assert kept[key] == written[key], key
    (group,), (ours,) = kept["config_groups"].values(), written["config_groups"].values()
    for key, value in ours.items():
        if isinstance(value, dict):
            assert value.items() <= group[key].items()
        else:
            assert group[key] == value
    assert infer_module_format(nn.Linear, read.config_groups["group_0"]) == default_format(scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_written_then_read(scheme: Scheme) -> None:
    config = parse_config(json.loads(json.dumps(quantization_config(scheme, ["lm_head"]))))
    assert config.scheme_for("model.layers.0.mlp.up_proj") == scheme
    assert config.format_for("model.layers.0.mlp.up_proj") == default_format(scheme)
    assert config.format_for("model.layers.0.mlp.up_proj") in FORMATS
    assert config.scheme_for("lm_head") is None
    assert config.scheme_for("model.embed_tokens", "Embedding") is None


def test_a_scheme_for_each_module() -> None:
    schemes = {"a.q": W4, "a.k": W8A8, "a.v": W4}
    written = quantization_config(schemes)
    assert written["format"] == "mixed-precision"
    assert [g["targets"] for g in written["config_groups"].values()] == [["a.q", "a.v"], ["a.k"]]
    config = parse_config(written)
    assert {name: config.scheme_for(name) for name in schemes} == schemes
    assert config.format_for("a.q") == "pack-quantized"
    assert config.format_for("a.k") == "int-quantized"
    assert config.scheme_for("a.o") is None


def test_nothing_quantized_is_no_config() -> None:
    with pytest.raises(TersorError, match="no module is quantized"):
        quantization_config({})


def test_format_can_be_chosen() -> None:
    written = quantization_config(W8A8, format="pack-quantized")
    assert written["format"] == "pack-quantized"
    assert parse_config(written).format_for("x") == "pack-quantized"
    with pytest.raises(TersorError, match="format must be"):
        quantization_config(W4, format="gguf")


def test_column_order_is_told_and_refused_by_current_readers() -> None:
    """A reader that does not know weight_g_idx would give wrong weights; it must not get so far."""
    pytest.importorskip("compressed_tensors", minversion="0.19")
    from compressed_tensors.quantization import QuantizationConfig

    written = quantization_config(W4, actorder="group")
    assert parse_config(written).scheme_for("x") == W4
    with pytest.raises(ValueError, match="actorder"):
        QuantizationConfig.model_validate(written)
    with pytest.raises(TersorError, match="actorder must be"):
        quantization_config(W4, actorder="sideways")


# --- what other writers give ----------------------------------------------------------------------


def given_config(weights: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32} | (weights or {})}
    group |= changes.pop("group", {})
    return {"quant_method": "compressed-tensors", "config_groups": {"g": group}} | changes


@pytest.mark.parametrize(
    ("config", "scheme", "fmt"),
    [
        (given_config(), Scheme(QSpec(4, 32)), "pack-quantized"),
        (given_config({"strategy": "group"}), Scheme(QSpec(4, 32)), "pack-quantized"),
        (given_config({"group_size": -1}), Scheme(QSpec(4, None)), "pack-quantized"),
        (
            given_config({"group_size": -1, "strategy": "channel", "type": "INT"}),
            Scheme(QSpec(4, None)),
            "pack-quantized",
        ),
        (
            given_config({"group_size": None, "strategy": "tensor"}),
            Scheme(QSpec(4, None)),
            "pack-quantized",
        ),
        (given_config({"actorder": "static"}), Scheme(QSpec(4, 32)), "pack-quantized"),
        (given_config({"actorder": False}), Scheme(QSpec(4, 32)), "pack-quantized"),
        (
            given_config({"observer": "minmax", "block_structure": None, "zp_dtype": "torch.int8"}),
            Scheme(QSpec(4, 32)),
            "pack-quantized",
        ),
        (given_config(format="int-quantized"), Scheme(QSpec(4, 32)), "int-quantized"),
        (given_config(format="naive-quantized"), Scheme(QSpec(4, 32)), "int-quantized"),
        (
            given_config(group={"format": "pack-quantized"}, format="mixed-precision"),
            Scheme(QSpec(4, 32)),
            "pack-quantized",
        ),
        ({"compression_config": given_config()}, Scheme(QSpec(4, 32)), "pack-quantized"),
        (
            {"model_type": "llama", "quantization_config": given_config(ignore=None)},
            Scheme(QSpec(4, 32)),
            "pack-quantized",
        ),
        (
            given_config(sparsity_config={"format": "dense"}, quant_method="sparseml"),
            Scheme(QSpec(4, 32)),
            "pack-quantized",
        ),
    ],
)
def test_other_writers(config: dict[str, Any], scheme: Scheme, fmt: str) -> None:
    parsed = parse_config(config)
    assert parsed.scheme_for("layers.0.q") == scheme
    assert parsed.format_for("layers.0.q") == fmt


def test_presets() -> None:
    """A group may be the name of a preset; those that are integers read as the package means them,
    and the others are refused."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    integers = 0
    for name in PRESET_SCHEMES:
        meant = preset_name_to_scheme(name, ["Linear"])
        weights, inputs = meant.weights, meant.input_activations
        config = {"config_groups": {name.lower(): ["Linear"]}}
        if not (
            weights is not None
            and (weights.type, inputs is None or inputs.type) in (("int", True), ("int", "int"))
            and weights.num_bits in BITS
            and (inputs is None or inputs.num_bits == 8)
        ):
            with pytest.raises(TersorError, match="preset scheme"):
                parse_config(config)
            continue
        scheme = parse_config(config).scheme_for("x")
        assert scheme is not None
        assert scheme.weight == QSpec(weights.num_bits, weights.group_size, weights.symmetric)
        assert (scheme.activation is None) == (inputs is None)
        integers += 1
    assert integers >= 8


INT8 = {"num_bits": 8, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (given_config(quant_method="gptq"), "quant_method 'gptq' is not supported"),
        (given_config(quantization_status="frozen"), "quantization_status 'frozen'"),
        (given_config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (given_config(transform_config={"config_groups": {"u": {}}}), "transform_config"),
        (given_config(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        ({"config_groups": {}}, "no config_groups"),
        ({"config_groups": []}, "no config_groups"),
        ({"model_type": "llama"}, "no config_groups"),
        (given_config(ignore="lm_head"), "ignore in quantization_config must be a list"),
        (given_config(group={"targets": None}), "g.targets in quantization_config must be a list"),
        (given_config(group={"targets": [3]}), "g.targets"),
        (given_config(group={"weights": None}), "g.weights None is not supported"),
        (given_config(group={"output_activations": INT8}), "output_activations"),
        ({"config_groups": {"NVFP4": ["Linear"]}}, "'NVFP4'"),
        ({"config_groups": {"W3A16": ["Linear"]}, "version": "0.9.4"}, "the 3-bit layout"),
        (given_config({"type": "float", "num_bits": 8}), "g.weights: float with 8 bits"),
        (given_config({"num_bits": 5}), "g.weights: int with 5 bits"),
        (given_config({"num_bits": 4.0}), "int with 4.0 bits"),
        (given_config({"num_bits": 3}, version="0.17.1"), "the 3-bit layout of .* 0.17.1"),
        (given_config({"dynamic": True}), "dynamic weight scales"),
        (given_config({"actorder": "random"}), "actorder 'random'"),
        (given_config({"group_size": "32"}), "group_size '32'"),
        (given_config({"group_size": 24}), "group must be a positive multiple of 16"),
        (given_config({"group_size": -32}), "group must be"),
        (given_config({"strategy": "block", "block_structure": [128, 128]}), "strategy 'block'"),
        (given_config({"strategy": "tensor_group"}), "strategy 'tensor_group'"),
        (given_config({"strategy": "channel"}), "strategy 'channel' with group_size 32"),
        (given_config({"strategy": "group", "group_size": None}), "strategy 'group' with group_"),
        (given_config({"symmetric": "no"}), "symmetric 'no'"),
        (given_config(group={"input_activations": INT8 | {"num_bits": 4}}), "num_bits 4"),
        (given_config(group={"input_activations": INT8 | {"type": "float"}}), "type 'float'"),
        (given_config(group={"input_activations": INT8 | {"symmetric": False}}), "symmetric False"),
        (given_config(group={"input_activations": INT8 | {"dynamic": False}}), "dynamic False"),
        (given_config(group={"input_activations": INT8 | {"strategy": "tensor"}}), "'tensor'"),
        (given_config(group={"input_activations": True}), "g.input_activations"),
        *(
            (given_config(format=name), f"format '{name}' is not supported, only int-quantized")
            for name in (
                "float-quantized",
                "nvfp4-pack-quantized",
                "mxfp4-pack-quantized",
                "marlin-24",
                "sparse-24-bitmask",
                "dense",
            )
        ),
        (given_config(format=["pack-quantized"]), "format"),
        (given_config(group={"targets": ["re:("]}), "no usable expression"),
    ],
)
def test_refusals_name_the_cause(config: dict[str, Any], message: str) -> None:
    with pytest.raises(TersorError, match=message) as caught:
        parse_config(config)
    assert "\n" not in str(caught.value)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 200)
    | st.sampled_from(["int", "group", "re:(", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["targets", "weights", "num_bits", "g"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


def places(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of everything inside nested dicts."""
    inside = value.items() if isinstance(value, dict) else ()
    return [p for key, v in inside for p in [(*path, key), *places(v, (*path, key))]]


FULL = given_config(
    {"symmetric": True, "strategy": "group", "type": "int", "dynamic": False, "actorder": None},
    group={"input_activations": INT8, "format": "int-quantized", "output_activations": None},
    ignore=["lm_head"],
    format="int-quantized",
    version="0.20.0",
    sparsity_config={},
    quantization_status="compressed",
)


@settings(max_examples=500, deadline=None)
@given(path=st.sampled_from(places(FULL)), value=json_values)
def test_any_json_is_read_or_refused(path: tuple[str, ...], value: Any) -> None:
    config = json.loads(json.dumps(FULL))
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    try:
        parsed = parse_config(config)
    except TersorError as error:
        message = str(error)
    else:
        message = ""
        assert parsed.format_for("x") in {None, *FORMATS}
    assert "\n" not in message


# --- names ----------------------------------------------------------------------------------------

NAMES = [
    "lm_head",
    "model.embed",
    "model.layers.0.q_proj",
    "model.layers.1.q_proj",
    "model.layers.11.mlp.gate",
    "model.norm",
]
TARGETS = [
    "Linear",
    "Embedding",
    "lm_head",
    "q_proj",
    "model.layers.1",
    "model.layers.1.q_proj",
    "re:.*q_proj",
    "re:q_proj",
    "re:model\\.layers\\.1\\.",
    "re:.*layers[.]1",
    "re:.*mlp.*$",
    "re:(?!.*mlp).*layers.*",
    "layers.1.q_proj",
    "re:",
    "Module",
]


def test_matching_agrees_with_compressed_tensors() -> None:
    """The target that it would take for a module, over all pairs of targets."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.utils.match import is_match, match_targets

    modules = {
        name: nn.LayerNorm(2) if name.endswith("norm") else nn.Linear(2, 2) for name in NAMES
    }
    modules["model.embed"] = nn.Embedding(2, 2)
    for first in TARGETS:
        for second in TARGETS:
            targets = Targets([first, second])
            for name, module in modules.items():
                kind = type(module).__name__
                if "Module" in (first, second):
                    continue  # names of parent classes need the class itself
                theirs = match_targets(name, module, [first, second])
                assert targets.match(name, kind) == (theirs[0] if theirs else None)
                assert bool(theirs) == is_match(name, module, [first, second])


def test_ignore_wins() -> None:
    written = quantization_config(W4, ["lm_head", "re:.*experts.*", "Conv1D"])
    config = parse_config(written)
    assert config.scheme_for("lm_head") is None
    assert config.scheme_for("layers.3.experts.0.w1") is None
    assert config.scheme_for("layers.3.q", "Conv1D") is None
    assert config.scheme_for("layers.3.q") == W4


def test_later_groups_override() -> None:
    groups = {
        "a": given_config()["config_groups"]["g"],
        "b": given_config({"num_bits": 8})["config_groups"]["g"],
    }
    assert parse_config({"config_groups": groups}).scheme_for("x") == Scheme(QSpec(8, 32))


def test_fused_modules() -> None:
    config = parse_config(quantization_config({"a.q_proj": W4, "a.k_proj": W4, "a.o_proj": W8A8}))
    group = config.group_for("a.qkv_proj", shards=["a.q_proj", "a.k_proj"])
    assert group is not None
    assert group.scheme == W4
    assert config.group_for("a.qkv_proj", shards=["a.x", "a.y"]) is None
    group = {"targets": ["a.v_proj"], "weights": {"num_bits": 4, "group_size": 128}}
    alike = quantization_config({"a.q_proj": W4})
    alike["config_groups"]["group_1"] = group
    assert parse_config(alike).group_for("a.qv_proj", shards=["a.q_proj", "a.v_proj"]) is not None
    for other in ("a.o_proj", "a.unquantized"):
        with pytest.raises(
            TersorError, match=r"a\.qkv_proj is fused from a\.q_proj, a\.\w+, which"
        ):
            config.group_for("a.qkv_proj", shards=["a.q_proj", other])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a|aa)+$", "took more than 0.5 s on the name 'aaaa"),
        ("a" * 1001, "1001 characters, more than 1000"),
        ("(" * 499 + "a" + ")" * 499, "no usable expression"),
        ("[", "no usable expression"),
        ("a\n(", "no usable expression"),
    ],
)
def test_hostile_expressions(pattern: str, message: str) -> None:
    with pytest.raises(TersorError, match=message) as caught:
        Targets(["re:" + pattern]).match("a" * 200 + "-", "Linear")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_many_names_are_quick() -> None:
    """Explicit targets are looked up, not searched: 20,000 experts take no quadratic time."""
    schemes = {f"model.layers.{i // 100}.experts.{i % 100}.w1": W4 for i in range(20_000)}
    config = parse_config(quantization_config(schemes))
    assert all(config.scheme_for(name) == W4 for name in schemes)
