"""Quantizing models that are in memory, of transformers and not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tersor
import tiny
from reference import check_gptq_codes, damped, spread
from tersor import ActSpec, QSpec, QuantLinear, Scheme, TersorError
from tersor.calibrate import Calibration, load_tokenizer
from tersor.solvers import RTN

W4 = Scheme(QSpec(4, 32))


def quantized(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "mixtral", "qwen2_moe", "bert"])
def test_same_as_through_a_folder(kind: str, sequential: bool, tmp_path: Path) -> None:
    """The weights, to the bit, that quantize_checkpoint writes and load reads."""
    source = tiny.save(tmp_path / "m", kind)
    text = Calibration(texts=(tiny.text(),), samples=40, seq_len=32)
    tersor.quantize_checkpoint(
        source, tmp_path / "out", scheme=W4, calibration=text, sequential=sequential
    )
    want = quantized(tersor.load(tmp_path / "out"))
    model = tiny.model(kind)
    windows = text.windows(load_tokenizer(source))
    report = tersor.quantize_model(model, windows, scheme=W4, sequential=sequential)
    got = quantized(model)
    assert got.keys() == want.keys() == {layer.name for layer in report.layers}
    for name, layer in got.items():
        assert torch.equal(layer.qweight().codes, want[name].qweight().codes)
        assert torch.equal(layer.qweight().scales, want[name].qweight().scales)
    assert model.config.use_cache == tiny.model(kind).config.use_cache


class Net(nn.Module):
    """No transformer: two inputs, one of them by name, and a linear that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 48)
        self.second = nn.Linear(48, 16)
        self.unused = nn.Linear(32, 16)

    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)) + shift)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def calls(count: int = 4) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(50, 32, generator=draw), "shift": torch.randn(48, generator=draw)}
        for _ in range(count)
    ]


def test_any_module() -> None:
    model, original = net(), net()
    report = tersor.quantize_model(model, calls(), scheme=Scheme(QSpec(4, 16)))
    assert set(quantized(model)) == {"first", "second", "unused"}
    assert report.departures.keys() == {"unused"}
    with torch.no_grad():
        rows = torch.cat([torch.relu(original.first(c["x"])) + c["shift"] for c in calls()])
    q = model.second.qweight()
    group_of = torch.arange(48) // 16
    gram = damped(rows.T @ rows, 0.01)
    zeros = torch.full_like(q.scales, 8)
    weight = original.second.weight.detach()
    check_gptq_codes(q.codes, weight, gram, spread(q.scales, group_of), spread(zeros, group_of), 16)
    assert torch.equal(model.second.bias, original.second.bias.detach())


def test_inputs_as_tensors_and_tuples() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16))

    tensors = [call["x"] for call in calls()]
    one, two = model(), model()
    tersor.quantize_model(one, tensors, scheme=W4)
    tersor.quantize_model(two, [(x,) for x in tensors], scheme=W4)
    assert torch.equal(one[2].qweight().codes, two[2].qweight().codes)


def test_what_blocks_are_called_with_may_depend_on_the_input() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, hidden: Tensor, scale: Tensor) -> Tensor:
            return hidden + torch.tanh(self.linear(hidden * scale))

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            hidden = x
            for layer in self.layers:
                hidden = layer(hidden, scale=x.mean())
            return hidden

    torch.manual_seed(0)
    model = Stack()
    inputs = [torch.randn(30, 16) + i for i in range(3)]
    report = tersor.quantize_model(model, inputs, scheme=Scheme(QSpec(4, 16)))
    assert [layer.tokens for layer in report.layers] == [90, 90]
    assert "generic finder" in report.architecture


def test_blocks_that_are_not_called_one_after_the_other() -> None:
    """Then the model is taken as a whole."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

        def forward(self, x: Tensor, which: int) -> Tensor:
            return self.branches[which](x)

    inputs = [(torch.randn(20, 16), 1), (torch.randn(20, 16), 0)]
    report = tersor.quantize_model(Branches(), inputs, scheme=Scheme(QSpec(4, 16)))
    assert [layer.tokens for layer in report.layers] == [20, 20]
    assert report.architecture == "every nn.Linear of the module"


def test_swap_needs_no_calibration() -> None:
    model, original = net(), net()
    scheme = Scheme(QSpec(8, None), ActSpec())
    report = tersor.swap_linears(model, scheme, ignore=["unused"])
    assert set(quantized(model)) == {"first", "second"}
    assert report.kept == {"unused": "ignored, unused"}
    want = RTN()(original.first.weight.detach(), None, scheme.weight)
    assert torch.equal(model.first.qweight().codes, want.codes)
    assert model.first.activation == ActSpec()
    with torch.no_grad():
        close, exact = model(**calls()[0]), original(**calls()[0])
    assert (close - exact).norm() < 0.02 * exact.norm()


def test_a_subclass_of_linear_is_left_alone() -> None:
    """nn.MultiheadAttention reads the weight of its projection from outside."""
    model = nn.ModuleDict({"attend": nn.MultiheadAttention(32, 2), "out": nn.Linear(32, 32)})
    report = tersor.swap_linears(model, W4)
    assert set(quantized(model)) == {"out"}
    assert "attend.out_proj" in report.departures


def test_mode_is_restored() -> None:
    model = net().train()
    tersor.quantize_model(model, calls(), scheme=Scheme(QSpec(4, 16)))
    assert model.training


@pytest.mark.parametrize(
    ("calibration", "arguments", "message"),
    [
        (None, {}, 'gptq needs inputs to calibrate on; .* or use method="rtn"'),
        ([], {}, "the calibration inputs are empty"),
        (torch.randn(3, 32), {}, "holds token ids, int64"),
        (calls(), {"scheme": Scheme(QSpec(4, 128))}, "group 128 does not divide"),
        (calls(), {"ignore": ["thrid"]}, "thrid matches no module .* called like first"),
        ([call | {"x": call["x"] * torch.nan} for call in calls()], {}, "first reads hold NaN"),
    ],
)
def test_bad_input(calibration: object, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        tersor.quantize_model(net(), calibration, **({"scheme": Scheme(QSpec(4, 16))} | arguments))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Net()


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.full((2, 8), tiny.VOCAB), f"from {tiny.VOCAB} to {tiny.VOCAB}, but the model has"),
        (torch.full((2, 8), -1), "from -1 to -1, but the model has"),
        (torch.zeros(8, dtype=torch.int64), r"\[samples, seq_len\] on the CPU, not int64 \[8\]"),
        (torch.zeros(2, 8, dtype=torch.int32), r"not int32 \[2, 8\]"),
        (torch.zeros(0, 8, dtype=torch.int64), r"are empty, \(0, 8\)"),
        (torch.zeros(2, 0, dtype=torch.int64), r"are empty, \(2, 0\)"),
        ([torch.full((2, 8), tiny.VOCAB)], r"LlamaForCausalLM cannot be run .*\(int64 \[2, 8\]\)"),
        ([torch.randn(2, 8)], r"cannot be run .*\(float32 \[2, 8\]\)"),
        ([{"ids": torch.zeros(2, 8)}], r"cannot be run .*\(ids=\.\.\.\)"),
        (["some text"], r"cannot be run .*\(str\)"),
        ("some text", "not a str; .* Calibration"),
        ({"input_ids": torch.zeros(2, 8, dtype=torch.int64)}, "not a dict; put a single input in"),
        (3, "not a int"),
    ],
)
def test_inputs_that_the_model_cannot_take(calibration: object, message: str) -> None:
    model = tiny.model("llama")
    with pytest.raises(TersorError, match=message) as error:
        tersor.quantize_model(model, calibration, scheme=W4)
    assert "\n" not in str(error.value)
    assert not quantized(model)


def test_more_positions_than_the_model_has() -> None:
    ids = torch.zeros(2, tiny.CONTEXT + 1, dtype=torch.int64)
    with pytest.raises(TersorError, match=r"GPT2LMHeadModel cannot be run .*IndexError"):
        tersor.quantize_model(tiny.model("gpt2"), ids, scheme=W4)


def test_weights_that_are_not_in_memory() -> None:
    with pytest.raises(TersorError, match=r"first\.weight is on meta; load .* quantize_checkpoint"):
        tersor.swap_linears(on_meta(), W4)


def test_a_model_without_blocks() -> None:
    model = tiny.model("llama", num_hidden_layers=0, layer_types=None)
    for ids in (None, torch.zeros(2, 8, dtype=torch.int64)):
        method = "rtn" if ids is None else "gptq"
        with pytest.raises(TersorError, match=r"no block in model\.layers"):
            tersor.quantize_model(model, ids, scheme=W4, method=method)


def test_weights_that_hooks_make_are_refused() -> None:
    model = net()
    torch.nn.utils.weight_norm(model.second)
    with pytest.raises(TersorError, match=r"second is made of weight_g, weight_v .*remove_weight"):
        tersor.swap_linears(model, Scheme(QSpec(4, 16)))


def test_hooks_stay() -> None:
    """They are called as before, with what they were promised, and can be removed."""
    model, seen = net(), []
    first = model.first
    handles = [
        first.register_forward_pre_hook(lambda m, args: seen.append("pre")),
        first.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(f"pre {len(kwargs)}"), with_kwargs=True
        ),
        first.register_forward_hook(lambda m, args, out: out * 0),
        first.register_forward_hook(
            lambda m, args, out: seen.append(f"after {type(m).__name__}"), always_call=True
        ),
        first.register_full_backward_hook(lambda m, inputs, outputs: seen.append("backward")),
    ]
    tersor.swap_linears(model, Scheme(QSpec(4, 16)))
    seen.clear()
    x, shift = calls()[0].values()
    model(x.requires_grad_(), shift=shift).sum().backward()
    assert seen == ["pre", "pre 0", "after QuantLinear", "backward"]
    assert not x.grad.any()
    for handle in handles:
        handle.remove()
    seen.clear()
    assert model.first(x).any()
    assert not seen


def test_nothing_to_quantize() -> None:
    with pytest.raises(TersorError, match=r"no nn\.Linear"):
        tersor.swap_linears(nn.ReLU(), W4)


def test_a_linear_used_in_two_places_stays_one() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 32)})
    model["b"] = model["a"]
    tersor.swap_linears(model, W4)
    assert isinstance(model["a"], QuantLinear)
    assert model["b"] is model["a"]


def test_what_cannot_be_swapped_says_why() -> None:
    with pytest.raises(TersorError, match="from_linear"):
        tersor.swap_linears(nn.Linear(64, 32), W4)
    model = nn.Sequential(nn.Linear(64, 32))
    tersor.swap_linears(model, W4)
    with pytest.raises(TersorError, match="holds a QuantLinear already"):
        tersor.swap_linears(model, W4)
