"""Adapters merged into quantized weights: what the codes are, and what the report says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny

pytest.importorskip("peft")
from peft import LoraConfig

import tersor
from reference import check_gptq_codes, damped, spread
from tersor import ActSpec, QSpec, QuantLinear, Scheme, SparseLinear, TersorError
from tersor.adapters.codebook import FP4, NF4, Codebook, quantize_codebook
from tersor.adapters.lora import add_lora
from tersor.adapters.merge import _rebuilt, _requantized, merge_lora
from tersor.adapters.nf4_linear import NF4Linear, nf4_model
from tersor.saving import save
from tersor.solvers import RTN

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

W4 = Scheme(QSpec(4, 32))
IDS = torch.randint(0, tiny.VOCAB, (6, 32), generator=torch.manual_seed(0))


def adapted(base: Any, size: float = 0.1, config: LoraConfig | None = None) -> Any:
    model = add_lora(base, config or LoraConfig(r=4, lora_alpha=8))
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(size * torch.randn(p.shape, generator=draw))
    return model.eval()


def llama(scheme: Scheme = W4, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny.model("llama", dtype)
    tersor.swap_linears(model, scheme)
    return model


def merged_weights(model: Any) -> dict[str, Tensor]:
    """W + scaling B A of every layer, in float64."""
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if "default" in getattr(layer, "lora_A", {}):
            base = layer.base_layer
            w = base.qweight() if isinstance(base, QuantLinear) else base
            b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            product = layer.scaling["default"] * b.double() @ a.double()
            found[name] = w.dequantize(torch.float64) + product
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def relative(error: Tensor, of: Tensor) -> float:
    return float((error.square().sum() / of.square().sum()).detach())


# --- requantized ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme", [W4, Scheme(QSpec(3, None, symmetric=False)), Scheme(QSpec(8, 32), ActSpec())]
)
def test_codes_are_those_of_rounding_the_sum(scheme: Scheme) -> None:
    model = adapted(llama(scheme))
    codes = {
        name: layer.base_layer.qweight().codes
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "base_layer")
    }
    wanted = merged_weights(model)
    plain, report = merge_lora(model)
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert [each.name for each in report.layers] == list(wanted)
    for each in report.layers:
        layer = plain.get_submodule(each.name)
        assert type(layer) is QuantLinear and layer.scheme == scheme
        q, m = layer.qweight(), wanted[each.name]
        oracle = RTN()(m.float(), None, scheme.weight)
        differ = q.codes != oracle.codes  # where the sum of products was rounded otherwise
        assert float(differ.double().mean()) < 1e-3
        got = relative(q.dequantize(torch.float64) - m, m)
        assert each.weight_error == pytest.approx(got, rel=1e-3)
        assert each.changed == float((q.codes != codes[each.name]).double().mean()) > 0
        assert each.method == "rtn" and each.output_error is None
    assert not any("lora" in name for name, _ in plain.named_parameters())


def test_the_report_measures_the_adapter() -> None:
    model = adapted(llama())
    wanted = merged_weights(model)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    product = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    _, report = merge_lora(model)
    each = next(x for x in report.layers if x.name == "model.layers.0.mlp.up_proj")
    assert each.adapter == pytest.approx(relative(product.double(), wanted[each.name]), rel=1e-3)
    mean = sum(x.weight_error for x in report.layers) / len(report.layers)
    assert report.weight_error == pytest.approx(mean)


def test_gptq_is_that_of_the_inputs_and_better_for_the_outputs() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 64) @ (torch.randn(64, 64) * torch.logspace(-1, 1, 64))

    def net() -> Any:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64))
        tersor.swap_linears(model, W4, ignore=["2"])
        return adapted(model)

    by_gptq = net()
    m = merged_weights(by_gptq)["0"]
    made, solved = merge_lora(by_gptq, [x], method="gptq")
    _, rounded = merge_lora(net(), [x])
    q = made[0].qweight()
    group, zeros = torch.arange(64) // 32, torch.full_like(q.scales, 8)
    gram = damped(x.T @ x, 0.01)
    check_gptq_codes(q.codes, m.float(), gram, spread(q.scales, group), spread(zeros, group), 16)
    outputs = x.double() @ m.T
    error = x.double() @ q.dequantize(torch.float64).T - outputs
    assert solved.layers[0].output_error == pytest.approx(relative(error, outputs), rel=1e-3)
    assert solved.layers[0].output_error < rounded.layers[0].output_error
    assert solved.layers[0].method == "gptq"


def test_blocks_see_the_merged_ones_before_them() -> None:
    """The statistics of the last linear are those of the merged model's own input to it."""
    model = adapted(llama())
    wanted = merged_weights(model)
    plain, report = merge_lora(model, IDS)
    name = "model.layers.1.self_attn.q_proj"
    seen: list[Tensor] = []
    handle = plain.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    logits(plain)
    handle.remove()
    x, m = seen[0].reshape(-1, 64).double(), wanted[name]
    error = x @ (plain.get_submodule(name).qweight().dequantize(torch.float64) - m).T
    each = next(layer for layer in report.layers if layer.name == name)
    assert each.output_error == pytest.approx(relative(error, x @ m.T), rel=1e-3)


def test_an_adapter_of_nothing_leaves_the_layer_as_it_is() -> None:
    base = llama()
    want = logits(base)
    plain, report = merge_lora(adapted(base, size=0.0), IDS, method="gptq")
    assert torch.equal(logits(plain), want)
    assert all(x.method == "unchanged" and x.changed == x.weight_error == 0 for x in report.layers)


@pytest.mark.parametrize("spec", [NF4(64), FP4(32)], ids=str)
def test_nf4_is_rounded_to_nf4_and_fp4_to_fp4(spec: Codebook) -> None:
    base = tiny.model("llama")
    nf4_model(base, spec)
    model = adapted(base)
    wanted = merged_weights(model)
    plain, report = merge_lora(model)
    for each in report.layers:
        layer = plain.get_submodule(each.name)
        assert type(layer) is NF4Linear and each.method == spec.values and 0 < each.changed < 1
        oracle = quantize_codebook(wanted[each.name].float(), spec)
        assert float((layer.packed != oracle.packed).double().mean()) < 1e-3
        got = relative(layer.dequantize(torch.float64) - wanted[each.name], wanted[each.name])
        assert each.weight_error == pytest.approx(got, rel=1e-3)


def test_the_merged_model_is_saved_and_loaded(tmp_path: Path) -> None:
    plain, _ = merge_lora(adapted(llama(dtype=torch.bfloat16)))
    save(plain, tmp_path / "out")
    loaded = tersor.load(tmp_path / "out")
    want = plain.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in loaded.state_dict().items())
    layer = loaded.model.layers[0].self_attn.q_proj
    assert layer.qweight().scales.dtype == layer.dtype == torch.bfloat16


def test_activation_order_becomes_that_of_columns() -> None:
    q = RTN()(torch.randn(16, 64, generator=torch.manual_seed(0)), None, QSpec(4, 32))
    q.order = (torch.arange(64) % 2).int()
    model = adapted(nn.Sequential(QuantLinear(q)))
    wanted = merged_weights(model)["0"]
    plain, report = merge_lora(model)
    got = plain[0].qweight()
    assert got.order is None
    error = relative(got.dequantize(torch.float64) - wanted, wanted)
    assert report.layers[0].weight_error == pytest.approx(error, rel=1e-3)


def test_only_active_adapters_and_biases_of_adapters() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 32))
    tersor.swap_linears(base, Scheme(QSpec(8, 32)))
    model = adapted(base, config=LoraConfig(r=4, lora_bias=True))
    model.add_adapter("other", LoraConfig(r=4, init_lora_weights=False, target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].bias.fill_(0.5)
    x = torch.randn(5, 64)
    want = model(x)  # of "default" alone
    plain, _ = merge_lora(model)
    torch.testing.assert_close(plain(x), want, rtol=0.05, atol=0.05)
    both = adapted(_linear(), config=LoraConfig(r=4))
    both.add_adapter("other", LoraConfig(r=4, init_lora_weights=False, target_modules=["0"]))
    both.base_model.set_adapter(["default", "other"])
    want = both(x)
    torch.testing.assert_close(merge_lora(both)[0](x), want, rtol=0.05, atol=0.05)


def _linear() -> nn.Sequential:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 32))
    tersor.swap_linears(base, Scheme(QSpec(8, 32)))
    return base


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (3, 4)])
@pytest.mark.parametrize("scheme", [W4, Scheme(QSpec(4, 32, symmetric=False))])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_zeros_in_a_pattern_are_held(pattern: tuple[int, int], scheme: Scheme, method: str) -> None:
    """Where at least half are zero; fewer could be those of rounding."""
    kept, of = pattern
    draw = torch.manual_seed(0)
    w = torch.randn(32, 64 // of, of, generator=draw)
    w = w.scatter(2, w.abs().topk(of - kept, largest=False).indices, 0.0).view(32, 64)
    model = adapted(nn.Sequential(QuantLinear(RTN()(w, None, scheme.weight))), size=1.0)
    wanted = merged_weights(model)["0"]
    layer = model.base_model.model[0].base_layer
    zeros = layer.qweight().dequantize() == 0
    x = torch.randn(40, 64, generator=draw)
    plain, report = merge_lora(model, [x], method=method)
    got = plain[0].qweight().dequantize(torch.float64)
    holds = 2 * kept <= of
    assert bool((got[zeros] == 0).all()) == holds
    assert report.layers[0].held == (float(zeros.double().mean()) if holds else 0)
    assert report.layers[0].weight_error == pytest.approx(relative(got - wanted, wanted), rel=1e-3)
    assert (got != 0).double().mean() > 0.3 and report.layers[0].changed > 0


# --- dense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["w4", "nf4"])
def test_a_dense_model_computes_what_the_adapted_one_did(kind: str) -> None:
    base = tiny.model("llama")
    _ = nf4_model(base) if kind == "nf4" else tersor.swap_linears(base, W4)
    model = adapted(base)
    want = logits(model)
    plain, report = merge_lora(model, IDS, dense=True)
    torch.testing.assert_close(logits(plain), want, rtol=1e-3, atol=1e-4)
    assert all(type(plain.get_submodule(x.name)) is nn.Linear for x in report.layers)
    assert all(x.weight_error < 1e-12 and x.changed is None for x in report.layers)


def test_sparse_linears_and_others_of_peft() -> None:
    w = torch.randn(32, 32, 4, generator=torch.manual_seed(0))
    w.scatter_(2, w.abs().topk(2, largest=False).indices, 0.0)

    def net() -> Any:
        sparse = SparseLinear(w.view(32, 128).bfloat16(), torch.ones(32))
        torch.manual_seed(3)
        made = nn.Sequential(sparse, nn.ReLU(), nn.Linear(32, 8).bfloat16())
        return adapted(made, config=LoraConfig(r=4, target_modules=["0", "2"]))

    with pytest.raises(TersorError, match=r"0 is 2:4 sparse and W \+ B A is not"):
        merge_lora(net())
    x = torch.randn(4, 128, generator=torch.manual_seed(5)).bfloat16()
    want = net()(x)
    plain, report = merge_lora(net(), dense=True)
    assert [type(m).__name__ for m in plain] == ["Linear", "ReLU", "Linear"]
    assert [layer.name for layer in report.layers] == ["0"]
    torch.testing.assert_close(plain(x).float(), want.float(), rtol=0.05, atol=0.05)


# --- bad input ------------------------------------------------------------------------------------


def test_wrong_models() -> None:
    with pytest.raises(TersorError, match="is no PeftModel; give what"):
        merge_lora(llama())
    dense = tiny.model("llama")
    from peft import get_peft_model

    with pytest.raises(TersorError, match="no quantized linear has an adapter"):
        merge_lora(get_peft_model(dense, LoraConfig(target_modules=["q_proj"])))
    model = adapted(llama())
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = torch.nan
    with pytest.raises(TersorError, match="holds NaN or infinite values; train it anew"):
        merge_lora(model)


def test_wrong_methods() -> None:
    model = adapted(llama())
    want = logits(model)
    with pytest.raises(TersorError, match="gptq needs inputs to calibrate on"):
        merge_lora(model, method="gptq")
    with pytest.raises(TersorError, match="method must be one of"):
        merge_lora(model, method="best")
    with pytest.raises(TersorError, match="wanda prunes"):
        merge_lora(model, IDS, method=tersor.Wanda(tersor.Sparsity(0.5)))
    with pytest.raises(TersorError, match="a calibration tensor holds token ids"):
        merge_lora(model, torch.zeros(3))
    assert torch.equal(logits(model), want)
    model.get_base_model().lm_head.to("meta")
    with pytest.raises(TersorError, match="is on meta, and calibration runs on the CPU"):
        merge_lora(model, IDS)


def test_saving_wants_a_quantized_model_of_transformers(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="no model of transformers with QuantLinear"):
        save(tiny.model("llama"), tmp_path / "a")
    with pytest.raises(TersorError, match="no model of transformers with QuantLinear"):
        save(_linear(), tmp_path / "b")
    mixed = tiny.model("llama")
    tersor.swap_linears(mixed, W4, ignore=["*.q_proj"])
    layer = mixed.model.layers[0].self_attn
    layer.q_proj = NF4Linear.from_linear(layer.q_proj)
    with pytest.raises(TersorError, match="in a form that no folder holds"):
        save(mixed, tmp_path / "c")
    save(llama(), tmp_path / "d")
    with pytest.raises(TersorError, match="exists already"):
        save(llama(), tmp_path / "d")


def test_a_folder_that_is_saved_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    saved = type(model).save_pretrained

    def stopped(self: Any, folder: str, **settings: Any) -> None:
        saved(self, folder, **settings)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(model), "save_pretrained", stopped)
        with pytest.raises(KeyboardInterrupt):
            save(model, tmp_path / "new" / "out")
    assert not list((tmp_path / "new").iterdir())
    assert getattr(model.config, "quantization_config", None) is None
    save(model, tmp_path / "new" / "out")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "bert"])
def test_saving_is_the_inverse_of_loading(kind: str, tmp_path: Path) -> None:
    ignore = {"gpt2": ["*.c_attn"], "llama": ["*.q_proj"]}.get(kind, [])
    model = tiny.model(kind)
    tersor.swap_linears(model, W4, ignore=ignore)
    save(model, tmp_path / "out")
    loaded = tersor.load(tmp_path / "out", torch.float32)
    assert torch.equal(logits(loaded), logits(model))
    assert getattr(model.config, "quantization_config", None) is None


def test_saving_a_model_with_adapters_saves_its_base(tmp_path: Path) -> None:
    base = llama()
    want = logits(base)
    targets = ["q_proj", "embed_tokens"]
    model = adapted(base, config=LoraConfig(target_modules=targets, modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.zero_()
    save(model, tmp_path / "out")
    assert torch.equal(logits(tersor.load(tmp_path / "out", torch.float32)), want)


def test_a_static_scale_is_kept_as_it_was_saved() -> None:
    """By a layer that is quantized again, and by one of which only the bias is another."""
    scale = torch.tensor([0.0625], dtype=torch.bfloat16)
    how, q = ActSpec(dynamic=False), RTN()(torch.randn(64, 64), None, QSpec(8, None))
    base = QuantLinear(q, torch.zeros(64), how, input_scale=scale)
    bias = torch.ones(64)
    made, _ = _requantized(base, torch.randn(64, 64), bias, None, RTN())
    for layer in (made, _rebuilt(base, bias)):
        saved = layer.state_dict()["input_scale"]
        assert saved.dtype == torch.bfloat16 and torch.equal(saved, scale)
