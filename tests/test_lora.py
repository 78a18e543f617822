"""LoRA through peft on quantized linears: the formula in float64, gradients, saving, bad input."""

from __future__ import annotations

import copy
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny

pytest.importorskip("peft")
import peft
from peft import LoraConfig, PeftModel, get_peft_model

import tersor
from tersor import ActSpec, QSpec, QuantLinear, QWeight, Scheme, SparseLinear, TersorError
from tersor.adapters.codebook import NF4
from tersor.adapters.layer import AdaptedLinear
from tersor.adapters.lora import add_lora, prepare_lora
from tersor.adapters.nf4_linear import NF4Linear, nf4_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

W4 = Scheme(QSpec(4, 32))
IDS = torch.arange(40).view(2, 20)
KINDS = ("w4", "w4a8", "order", "nf4", "sparse")


def base(kind: str = "w4", model: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    made = tiny.model(model, dtype)
    if kind == "nf4":
        nf4_model(made, NF4(64))
    else:
        tersor.swap_linears(made, Scheme(QSpec(4, 32), ActSpec() if kind == "w4a8" else None))
    return made


def linear(kind: str, n: int = 24, k: int = 128) -> Any:
    """A quantized layer and its dense weight in float64."""
    torch.manual_seed(1)
    dense = nn.Linear(k, n)
    if kind == "nf4":
        made = NF4Linear.from_linear(dense)
        return made, made.dequantize(torch.float64)
    if kind == "sparse":
        w = dense.weight.detach().view(n, k // 4, 4).clone()
        w.scatter_(2, w.abs().topk(2, largest=False).indices, 0.0)
        made = SparseLinear(w.view(n, k).bfloat16(), dense.bias)
        return made, made.weight.double()
    q = QuantLinear.from_linear(dense, W4).qweight()
    if kind == "order":
        q.order = torch.arange(k).flip(0).div(32, rounding_mode="floor").int()
    made = QuantLinear(q, dense.bias, ActSpec() if kind == "w4a8" else None)
    return made, q.dequantize(torch.float64)


def net(kind: str = "w4") -> tuple[nn.Sequential, Tensor]:
    made, dense = linear(kind)
    return nn.Sequential(made), dense


def randomize(model: nn.Module, seed: int = 7) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=draw))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if "lora_" in n}


# --- the formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_the_formula(kind: str, rslora: bool) -> None:
    model, dense = net(kind)
    model = add_lora(model, LoraConfig(r=4, lora_alpha=6, use_rslora=rslora))
    randomize(model)
    a, b = (p.detach().double() for p in adapters(model).values())
    scaling = 6 / 4**0.5 if rslora else 6 / 4
    x = torch.randn(5, 128, generator=torch.manual_seed(2)).requires_grad_()
    grad = torch.randn(5, 24, generator=torch.manual_seed(3))
    y = model(x)
    y.backward(grad)
    bias = model.base_model.model[0].get_base_layer().bias.double()
    rows, out = x.detach().double(), grad.double()
    if kind != "w4a8":  # which rounds its inputs to 8 bits
        want = rows @ dense.T + bias + scaling * (rows @ a.T) @ b.T
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        x.grad.double(), out @ (dense + scaling * b @ a), rtol=1e-4, atol=1e-4
    )
    wants = {"lora_A": scaling * b.T @ out.T @ rows, "lora_B": scaling * out.T @ rows @ a.T}
    for name, p in adapters(model).items():
        want = wants["lora_A" if "lora_A" in name else "lora_B"]
        torch.testing.assert_close(p.grad.double(), want, rtol=1e-4, atol=1e-4)


def test_dropout_is_of_the_adapters_input_alone() -> None:
    model, _ = net()
    x = torch.randn(4, 128, generator=torch.manual_seed(2))
    before = model(x)
    model = add_lora(model, LoraConfig(r=4, lora_dropout=0.5))
    assert torch.equal(model.train()(x), before)  # B is zero
    randomize(model)
    torch.manual_seed(0)
    one, two = model(x), model(x)
    assert not torch.equal(one, two)
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("kind", ["w4", "w4a8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_an_active_adapter_outputs_are_the_bases(kind: str, dtype: torch.dtype) -> None:
    plain = base(kind, dtype=dtype)
    want = logits(plain)
    model = add_lora(plain, LoraConfig(r=4, task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), want)  # B is zero
    randomize(model)
    assert not torch.equal(logits(model), want)
    with model.disable_adapter():
        assert torch.equal(logits(model), want)
    assert all(p.dtype == torch.float32 for p in adapters(model).values())
    assert torch.equal(logits(model.unload()), want)


def test_adapters_go_on_every_quantized_linear_and_nothing_else_learns() -> None:
    plain = base()
    names = {n for n, m in plain.named_modules() if isinstance(m, QuantLinear)}
    model = add_lora(plain, LoraConfig(r=2))
    inner = model.get_base_model()
    assert {n for n, m in inner.named_modules() if isinstance(m, AdaptedLinear)} == names
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapters(model))
    assert len(adapters(model)) == 2 * len(names)


def test_config_is_not_changed_and_has_a_default() -> None:
    config = LoraConfig(r=2)
    add_lora(base(), config)
    assert config.target_modules is None
    assert add_lora(base()).peft_config["default"].r == LoraConfig().r


def test_targets_patterns_and_other_modules() -> None:
    config = LoraConfig(
        r=2, rank_pattern={"q_proj": 5}, alpha_pattern={"q_proj": 3}, modules_to_save=["lm_head"],
        target_modules=["q_proj", "embed_tokens"],
    )  # fmt: skip
    model = add_lora(base(), config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    adapted = {n: m for n, m in layers.items() if m.lora_A}
    assert all(name.endswith("q_proj") for name in adapted) and len(adapted) == 2
    assert all(m.r["default"] == 5 and m.scaling["default"] == 3 / 5 for m in adapted.values())
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in n for n in learning) and any("embedding" in n for n in learning)
    assert all("lora_" in n or "lm_head" in n for n in learning)


def test_all_linear_takes_those_that_are_not_quantized_too() -> None:
    plain = tiny.model("llama")
    tersor.swap_linears(plain, W4, ignore=["*.down_proj"])
    model = add_lora(plain, LoraConfig(r=2, target_modules="all-linear"))
    names = {re.sub(r".*\.(\w+)\.lora_A.*", r"\1", n) for n in adapters(model) if "lora_A" in n}
    assert {"down_proj", "q_proj", "up_proj"} <= names
    assert "lm_head" not in names


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "bert"])
def test_other_architectures(kind: str) -> None:
    plain = base(model=kind)
    names = {n for n, m in plain.named_modules() if isinstance(m, QuantLinear)}
    want = logits(plain)
    model = add_lora(plain, LoraConfig(r=2))
    inner = model.get_base_model()
    assert {n for n, m in inner.named_modules() if isinstance(m, AdaptedLinear)} == names
    assert len(adapters(model)) == 2 * len(names)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_experts_have_no_adapters(kind: str, tmp_path: Path) -> None:
    """peft would look for them under the names of fused experts, and not find them again."""
    model = add_lora(base(model=kind), LoraConfig(r=2))
    names = {n for n, m in model.get_base_model().named_modules() if isinstance(m, AdaptedLinear)}
    assert names and not any("experts." in name.replace("shared_expert.", "") for name in names)
    assert len(adapters(model)) == 2 * len(names)
    randomize(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(prepare_lora(base(model=kind)), tmp_path)
    assert torch.equal(logits(again), logits(model))
    target = "w1" if kind == "mixtral" else "gate_proj"
    with pytest.raises(TersorError, match=rf"match .*experts\.0\.{target} in an expert"):
        add_lora(base(model=kind), LoraConfig(target_modules=[target]))


def test_two_adapters_and_batches_that_mix_them() -> None:
    model = add_lora(base(), LoraConfig(r=2, task_type="CAUSAL_LM"), "one")
    model.add_adapter("two", LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    randomize(model)
    model.eval()
    each = []
    for name in ("one", "two"):
        model.set_adapter(name)
        each.append(logits(model))
    with torch.no_grad():
        mixed = model(IDS, adapter_names=["two", "__base__"]).logits
        with model.disable_adapter():
            plain = model(IDS).logits
    torch.testing.assert_close(mixed[0], each[1][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], plain[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(each[0], each[1])
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(logits(model), each[1])


def test_another_adapter_on_other_layers_waits_for_its_turn() -> None:
    def config(target: str) -> LoraConfig:
        return LoraConfig(r=2, target_modules=[target], init_lora_weights=False)

    model = add_lora(base(), config("q_proj"), "one").eval()
    want = logits(model)
    model.add_adapter("two", config("up_proj"))
    assert torch.equal(logits(model), want)
    for name in ("one", "two"):
        model.set_adapter(name)
        learning = [n for n, p in model.named_parameters() if p.requires_grad]
        assert learning and all(f".{name}." in n for n in learning)
    assert not torch.equal(logits(model), want)


def test_a_shared_layer_has_one_adapter() -> None:
    made, _ = linear("w4", n=128)
    model = add_lora(nn.Sequential(made, nn.ReLU(), made), LoraConfig(r=2))
    assert len(adapters(model)) == 2
    x = torch.randn(3, 128)
    randomize(model)
    layer = model.base_model.model[0]
    assert torch.equal(model(x), layer(layer(x).relu()))


def test_copies() -> None:
    model, _ = net()
    model = add_lora(model, LoraConfig(r=2))
    randomize(model)
    x = torch.randn(3, 128)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


# --- peft's own saving and loading ----------------------------------------------------------------


def test_saves_and_loads_by_peft_on_a_loaded_folder(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "m")
    tersor.quantize_checkpoint(source, tmp_path / "q", scheme=W4, method="rtn", progress=False)
    model = add_lora(tersor.load(tmp_path / "q"), LoraConfig(r=4, task_type="CAUSAL_LM"))
    randomize(model)
    want = logits(model)
    model.save_pretrained(tmp_path / "a")
    loaded = PeftModel.from_pretrained(prepare_lora(tersor.load(tmp_path / "q")), tmp_path / "a")
    assert torch.equal(logits(loaded), want)
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(
        prepare_lora(tersor.load(tmp_path / "q")), tmp_path / "a", is_trainable=True
    )
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == set(adapters(model))
    saved = {p.name for p in (tmp_path / "a").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= saved


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = add_lora(base(), LoraConfig(r=4))
    model.save_pretrained(tmp_path)
    other = tiny.model("llama", intermediate_size=128)
    tersor.swap_linears(other, W4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(prepare_lora(other), tmp_path)


def test_get_peft_model_itself_takes_a_prepared_model() -> None:
    plain = base()
    want = logits(plain)
    with pytest.warns(UserWarning, match="modify a model with PEFT"):
        model = get_peft_model(prepare_lora(plain), LoraConfig(r=2, target_modules=["q_proj"]))
    assert torch.equal(logits(model), want)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapters(model))


def test_state_dict_keeps_the_packed_base() -> None:
    model, _ = net("w4")
    want = model[0].state_dict()
    model = add_lora(model, LoraConfig(r=2))
    randomize(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert torch.equal(state["base_model.model.0.base_layer.weight_packed"], want["weight_packed"])
    other = add_lora(net("w4")[0], LoraConfig(r=2))
    other.load_state_dict(state)
    x = torch.randn(2, 128)
    assert torch.equal(other(x), model(x))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "rank r of a LoraConfig is at least 1, not 0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank q_proj in rank_pattern .* at least 1, not 0"),
        ({"exclude_modules": ".*"}, "nothing is left to put adapters on"),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
            "nothing is left to put adapters on",
        ),
        ({"use_dora": True}, "use_dora is not supported on quantized linears"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes or reads the base weight"),
        ({"init_lora_weights": "olora"}, "'olora' changes or reads"),
        ({"bias": "all"}, "bias='all' trains the biases"),
        ({"target_modules": ["q_proj", "nope"]}, "'nope' matches no module.*called like model"),
        ({"target_modules": r".*\.nope"}, "matches no module"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    model = base()
    want = logits(model)
    with pytest.raises(TersorError, match=message):
        add_lora(model, LoraConfig(**settings))
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    assert not any(isinstance(m, AdaptedLinear) for m in model.modules())
    assert torch.equal(logits(model), want)


@pytest.mark.filterwarnings("ignore:You are trying to modify")
def test_variants_are_refused_by_the_layer_too() -> None:
    with pytest.raises(TersorError, match="use_dora is not supported"):
        get_peft_model(prepare_lora(base()), LoraConfig(use_dora=True, target_modules=["q_proj"]))


def test_wrong_models() -> None:
    with pytest.raises(TersorError, match="no quantized linear; quantize it first"):
        add_lora(tiny.model("llama"), LoraConfig())
    with pytest.raises(TersorError, match=r"config is a peft\.LoraConfig, not a dict"):
        add_lora(base(), {"r": 4})
    with pytest.raises(TersorError, match=r"config is a peft\.LoraConfig, not a IA3Config"):
        add_lora(base(), peft.IA3Config())
    model = add_lora(base(), LoraConfig())
    with pytest.raises(TersorError, match="has adapters already; add another with"):
        add_lora(model, LoraConfig())
    with pytest.raises(TersorError, match=r"q_proj has an adapter already"):
        add_lora(model.get_base_model(), LoraConfig())
    with pytest.raises(TersorError, match="has adapters already"):
        prepare_lora(model)


def test_merging_by_peft_points_to_ours() -> None:
    model = add_lora(base(), LoraConfig(r=2))
    with pytest.raises(TersorError, match=r"tersor\.merge_lora"):
        model.merge_and_unload()
    with pytest.raises(TersorError, match=r"tersor\.merge_lora"):
        model.merge_adapter()


def test_layers_without_a_weight() -> None:
    q = linear("w4")[0].qweight()
    empty = QuantLinear(QWeight(q.spec, q.codes.to("meta"), q.scales.to("meta")))
    with pytest.raises(TersorError, match="0 has no weight yet; load the model's weights"):
        add_lora(nn.Sequential(empty))


def test_preparing_twice_is_harmless() -> None:
    model = prepare_lora(prepare_lora(base()))
    assert not any(
        isinstance(m.base_layer, AdaptedLinear)
        for m in model.modules()
        if isinstance(m, AdaptedLinear)
    )
    assert torch.equal(logits(add_lora(model, LoraConfig(r=2))), logits(base()))


def test_without_peft_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TersorError, match=r"run pip install tersor\[adapters\]"):
        add_lora(base(), None)


def test_a_prepared_layer_computes_what_its_base_does() -> None:
    made, dense = linear("nf4")
    x = torch.randn(3, 128, generator=torch.manual_seed(0))
    want = F.linear(x, dense.float(), made.bias)
    torch.testing.assert_close(prepare_lora(nn.Sequential(made))(x), want)
