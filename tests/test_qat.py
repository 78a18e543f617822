"""Quantization-aware training of models: what it becomes, how it goes on, what goes with it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

pytest.importorskip("accelerate")

import tersor
import tiny
from regression import Regression
from tersor import ActSpec, QSpec, QuantLinear, Scheme, TersorError
from tersor.oracle import random_qweight
from tersor.solvers import GPTQ, RTN, SparseGPT
from tersor.sparsity import Sparsity
from tersor.training.masking import HoldZeros
from tersor.training.qat import QuantizationTraining
from test_mask_trainer import Texts, reopened, trainer

W4 = Scheme(QSpec(4, 32))
W2 = Scheme(QSpec(2, 16))
IDS = Texts().ids
SCHEMES = [
    Scheme(QSpec(bits, group, symmetric), activation)
    for bits in (2, 3, 4, 8)
    for group in (16, None)
    for symmetric in (True, False)
    for activation in (None, ActSpec())
]


def linears(model: nn.Module, kind: type = QuantLinear) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


def run(model: nn.Module, steps: int = 3, rate: float = 1e-3) -> None:
    """A plain loop."""
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for step in range(steps):
        part = IDS[step % 4 :: 4].contiguous()
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class Recorder:
    """What linears read and give in a pass of the model."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        self.read: dict[str, Tensor] = {}
        handles = []
        for name in names:
            linear = model.get_submodule(name)

            def read(module: nn.Module, args: Any, name: str = name) -> None:
                self.read[name] = args[0].clone()  # before its activations are rounded

            def give(module: nn.Module, args: Any, out: Tensor, name: str = name) -> None:
                self.seen[name] = (self.read.pop(name), out.clone())

            handles.append(linear.register_forward_pre_hook(read, prepend=True))
            handles.append(linear.register_forward_hook(give))
        with torch.no_grad():
            self.logits = model(input_ids=IDS).logits
        for handle in handles:
            handle.remove()


# What it becomes.


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_layers_give_what_the_training_gave(scheme: Scheme) -> None:
    """Every QuantLinear on what the linear read, to 1e-5; and its weight to the bit. (Over the
    whole model a rounded activation near a tie may fall to the other side.)"""
    model = tiny.model("llama", num_hidden_layers=1).train()
    training = QuantizationTraining(scheme).attach(model)
    names = list(training.linears)
    before = training.qweights()
    run(model)
    moved = training.qweights()
    assert all(not torch.equal(moved[name].scales, before[name].scales) for name in names)
    weights = {name: model.get_submodule(name).weight.detach() for name in names}
    record = Recorder(model.eval(), names)
    result = training.finish()
    assert list(linears(model)) == names and result.scheme == scheme
    for name, layer in linears(model).items():
        assert layer.scheme == scheme
        assert torch.equal(layer.qweight().dequantize(), weights[name])
        assert torch.equal(layer.qweight().codes, moved[name].codes)
        x, y = record.seen[name]
        assert float((layer(x) - y).abs().max()) <= 1e-5 * float(y.abs().max())
        zero = float((weights[name] == 0).double().mean())
        assert result.layers[name] == pytest.approx(zero, abs=1e-9)
    if scheme.activation is None:
        with torch.no_grad():
            off = model(input_ids=IDS).logits - record.logits
        assert float(off.abs().max()) <= 1e-5 * float(record.logits.abs().max())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "opt", "phi3"])
def test_the_linears_are_those_of_quantize_model(kind: str) -> None:
    model, other = tiny.model(kind), tiny.model(kind)
    training = QuantizationTraining(W4).attach(model)
    report = tersor.quantize_model(other, scheme=W4, method=RTN(clip=True))
    assert list(training.linears) == [layer.name for layer in report.layers]
    training.finish()
    for name, layer in linears(other).items():
        mine = model.get_submodule(name)
        assert torch.equal(mine.qweight().codes, layer.qweight().codes), name
        assert torch.equal(mine.qweight().scales, layer.qweight().scales), name
        assert (mine.bias is None) == (layer.bias is None)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, other(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ordinary_linears_come_back(kind: str, tmp_path: Path) -> None:
    model = tiny.model(kind)
    names = list(model.state_dict())
    training = QuantizationTraining(W4).attach(model)
    run(model)
    latent = [p.detach().clone() for n, p in model.named_parameters() if "original" in n]
    training.finish(quantize=False)
    assert training.model is None and list(model.state_dict()) == names
    known = {p.data_ptr() for p in model.parameters()}
    assert len(known) == len(list(model.parameters()))
    shapes = [p for p in model.parameters() if any(torch.equal(p, each) for each in latent)]
    assert len(shapes) == len(latent)
    model.save_pretrained(tmp_path)
    reopened(tmp_path)


def test_hooks_stay_and_activations_are_rounded_once() -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    linear = model.model.layers[0].mlp.up_proj
    calls: list[str] = []
    linear.register_forward_hook(lambda *_: calls.append("hook"))
    training = QuantizationTraining(Scheme(QSpec(8, None), ActSpec())).attach(model)
    assert len(linear._forward_pre_hooks) == 1
    training.finish()
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantLinear) and not layer._forward_pre_hooks
    model(input_ids=IDS)
    assert calls == ["hook"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_in_the_dtype_they_are_saved_in(dtype: torch.dtype) -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    training = QuantizationTraining(W4, scale_dtype=dtype).attach(model)
    run(model)
    weights = {name: linear.weight.detach() for name, linear in training.linears.items()}
    training.finish()
    for name, layer in linears(model).items():
        assert layer.qweight().scales.dtype == dtype and layer.dtype == torch.float32
        assert torch.equal(layer.qweight().dequantize(), weights[name])


def test_weights_in_bfloat16() -> None:
    """What the layer holds is what the training computed with, before its rounding to 16 bits."""
    model = tiny.model("llama", torch.bfloat16, num_hidden_layers=1)
    training = QuantizationTraining(W4).attach(model)
    run(model, rate=1e-2)
    weights = {name: linear.weight.detach() for name, linear in training.linears.items()}
    assert all(p.dtype == torch.float32 for p in training.parameters())
    training.finish()
    for name, layer in linears(model).items():
        assert weights[name].dtype == layer.qweight().scales.dtype == torch.bfloat16
        assert torch.equal(layer.qweight().dequantize(torch.bfloat16), weights[name])


def test_gradient_checkpointing_teaches_the_same() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny.model("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        training = QuantizationTraining(Scheme(QSpec(3, 32), ActSpec())).attach(model)
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([each.grad for each in training.parameters()])
    assert all(bool(each.any()) for each in gradients[0])
    torch.testing.assert_close(*gradients)


# Where it starts.


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_starts_at_the_solution_of_gptq(kind: str) -> None:
    model, other = tiny.model(kind), tiny.model(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    windows = torch.randint(2, tiny.VOCAB, (16, 32), generator=torch.manual_seed(0))
    tersor.quantize_model(other, windows, scheme=W2)
    training = QuantizationTraining(W2, start=GPTQ(), ignore=["*.1.*"]).attach(model, windows)
    assert len(training.linears) == len(linears(other)) / 2
    for name, q in training.qweights().items():
        assert torch.equal(q.dequantize(), other.get_submodule(name).qweight().dequantize())
        w = model.get_submodule(name).parametrizations.weight.original
        assert not torch.equal(w, before[f"{name}.weight"])
    again = tiny.model(kind)
    given = QuantizationTraining(W2, start=training.qweights(), ignore=["*.1.*"]).attach(again)
    for name, q in given.qweights().items():
        assert torch.equal(q.codes, training.qweights()[name].codes)
    ours, theirs = (dict(m.named_parameters()) for m in (model, again))
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())


def test_it_starts_from_weights_with_an_order_of_columns() -> None:
    model = Regression()
    spec = QSpec(4, 16, False)
    q = random_qweight(12, 16, spec)
    wide = nn.Linear(64, 12)
    model.first = wide
    q = random_qweight(12, 64, spec)
    q.order = (torch.randperm(64, generator=torch.manual_seed(0)) // 16).to(torch.int32)
    training = QuantizationTraining(Scheme(spec), start={"first": q}, include=["first"])
    training.attach(model)
    x = torch.randn(5, 64)
    with torch.no_grad():
        before = model.first(x)
        torch.testing.assert_close(before, x @ q.dequantize().T + wide.bias)
    training.finish()
    assert torch.equal(model.first.qweight().order, q.order)
    torch.testing.assert_close(model.first(x), before, rtol=1e-5, atol=1e-5)


def test_a_loop_goes_on_from_a_state() -> None:
    model, again = tiny.model("llama"), tiny.model("llama")
    training = QuantizationTraining(W4, start="rtn").attach(model)
    run(model)
    other = QuantizationTraining(W4).attach(again)
    again.load_state_dict(model.state_dict())
    for name, q in training.qweights().items():
        mine = other.qweights()[name]
        assert torch.equal(mine.codes, q.codes) and torch.equal(mine.scales, q.scales)


# Under a Trainer.


@pytest.mark.parametrize("scales", ["learned", "fixed"])
def test_a_resumed_training_gives_the_same_bits(scales: str, tmp_path: Path) -> None:
    windows = torch.randint(2, tiny.VOCAB, (16, 32), generator=torch.manual_seed(0))
    whole, again = tiny.model("llama"), tiny.model("llama")
    first = QuantizationTraining(W2, scales=scales, start="gptq").attach(whole, windows)
    trainer(whole, tmp_path, [first], save_strategy="steps", save_steps=4).train()
    assert first.model is None
    second = QuantizationTraining(W2, scales=scales)  # what GPTQ gave is in the checkpoint
    resumed = trainer(again, tmp_path / "again", [second])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(linears(again)) == 14
    theirs = again.state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_weight_decay_leaves_scales_alone(tmp_path: Path) -> None:
    model = tiny.model("llama")
    training = QuantizationTraining(W4)
    its = trainer(model, tmp_path, [training])
    groups = its.create_optimizer().param_groups
    scales = {id(each) for each in training.parameters()}
    assert len(scales) == 14
    for group in groups:
        mine = [p for p in group["params"] if id(p) in scales]
        assert len(mine) == (0 if group["weight_decay"] else 14)
    assert scales <= {id(p) for p in model.parameters()}


def test_the_callback_trains_as_the_loop_does(tmp_path: Path) -> None:
    its, mine = tiny.model("llama"), tiny.model("llama").train()
    trainer(
        its,
        tmp_path,
        [QuantizationTraining(W4)],
        gradient_accumulation_steps=1,
        per_device_train_batch_size=16,
        weight_decay=0.0,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        max_steps=3,
    ).train()
    loop = QuantizationTraining(W4).attach(mine)
    optimizer = torch.optim.AdamW(mine.parameters(), 1e-3, weight_decay=0.0)
    for _ in range(3):
        mine(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    loop.finish()
    theirs = its.state_dict()
    for name, tensor in mine.state_dict().items():
        torch.testing.assert_close(tensor.float(), theirs[name].float())


def test_trainings_that_do_not_fit(tmp_path: Path) -> None:
    def pruned() -> nn.Module:
        model = tiny.model("llama")
        tersor.prune_model(model, method=tersor.Magnitude(Sparsity(0.5)))
        return model

    for name, masks, message in (
        ("plain", (), r"has a weight for .*layers.0.self_attn.q_proj and no grid"),
        ("held", (HoldZeros,), "begins at step 4 with a checkpoint that has no grid"),
    ):
        saving = {"save_strategy": "steps", "save_steps": 4}
        trainer(pruned(), tmp_path / name, [mask() for mask in masks], **saving).train()
        training = QuantizationTraining(W4, scales="learned" if name == "plain" else "fixed")
        resumed = trainer(pruned(), tmp_path, [*(mask() for mask in masks), training])
        with pytest.raises(TersorError, match=message):
            resumed.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-4"))
    other = QuantizationTraining(W4).attach(tiny.model("llama"))
    with pytest.raises(TersorError, match="another model than the one that is quantized"):
        trainer(tiny.model("llama"), tmp_path, [other]).train()
    with pytest.raises(TersorError, match=r"gptq needs inputs.*attach\(model, calibration\)"):
        trainer(tiny.model("llama"), tmp_path, [QuantizationTraining(W4, start="gptq")])


def test_what_was_trained_elsewhere_is_left_there() -> None:
    """A model that is where no kernels are when the Trainer ends; here, one without memory."""
    model = tiny.model("llama", num_hidden_layers=1)
    training = QuantizationTraining(W4).attach(model)
    model.to("meta")
    with pytest.warns(UserWarning, match=r"on meta, which has no kernels.*finish\(\)"):
        training.on_train_end(None, None, None, model=model)
    assert training.model is model


# Bad input.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": QSpec(4)}, r"scheme is a Scheme\(QSpec"),
        ({"start": GPTQ(two_level=True)}, "leave the two-level grid"),
        ({"scales": "lsq"}, "scales are learned or fixed, not 'lsq'"),
        ({"scale_dtype": torch.float64}, "scale_dtype is float32, bfloat16 or float16"),
        ({"start": "best"}, "method must be one of rtn, gptq"),
        ({"start": 3}, "method is the name of a solver"),
        ({"start": SparseGPT(Sparsity(0.5))}, r"sparsegpt makes zeros.*HoldZeros.*GPTQ\(\)"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        QuantizationTraining(**({"scheme": W4} | settings))


def test_models_that_cannot_be_trained_so() -> None:
    training = QuantizationTraining(W4)
    for call in (training.finish, training.qweights, training.parameters):
        with pytest.raises(TersorError, match=r"on no model; attach\(model\) first"):
            call()
    with pytest.raises(TersorError, match=r"experts.*quantize it \(tersor.quantize_checkpoint\)"):
        training.attach(tiny.model("mixtral"))
    with pytest.raises(TersorError, match=r"no nn\.Linear"):
        training.attach(nn.Sequential(nn.Embedding(4, 4)))
    with pytest.raises(TersorError, match=r"first: group 32 does not divide the 16 .*with ignore"):
        training.attach(Regression())
    with pytest.raises(TersorError, match="include x matches no linear"):
        QuantizationTraining(W4, include=["x"]).attach(tiny.model("llama"))
    for option in ("include", "ignore"):
        with pytest.raises(TersorError, match=f"{option} is a list of patterns"):
            QuantizationTraining(W4, **{option: "first"}).attach(Regression())
    with pytest.raises(TersorError, match="calibration is for a solver to start from"):
        training.attach(tiny.model("llama"), IDS)
    with pytest.raises(TersorError, match="it is on meta"):
        training.attach(tiny.model("llama").to("meta"))
    broken = tiny.model("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(TersorError, match=r"layers.1.mlp.up_proj' holds 1 NaN"):
        training.attach(broken)
    assert training.model is None
    tied = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    tied[1].weight = tied[0].weight
    with pytest.raises(TersorError, match=r"0 shares its weight with 1.weight"):
        training.attach(tied)


def test_attaching_twice() -> None:
    model = tiny.model("llama")
    training = QuantizationTraining(W4).attach(model)
    with pytest.raises(TersorError, match="attached already"):
        training.attach(model)
    with pytest.raises(TersorError, match="q_proj is parametrized already"):
        QuantizationTraining(W4).attach(model)
    training.finish()
    with pytest.raises(TersorError, match="is a QuantLinear, whose weight is frozen"):
        training.attach(model)


def test_starts_that_do_not_fit() -> None:
    model = Regression()
    right = {
        "first": random_qweight(12, 16, QSpec(4, None)),
        "second": random_qweight(8, 12, QSpec(4, None)),
    }
    scheme = Scheme(QSpec(4, None))
    before = copy.deepcopy(model.state_dict())
    for change, message in (
        ({"third": right["first"]}, "a weight for third, which is none"),
        ({"first": right["second"]}, r"8 x 12 for first, which is 12 x 16"),
        ({"first": random_qweight(12, 16, QSpec(3, None))}, r"bits=3.*to become QSpec\(bits=4"),
        ({"first": model.first.weight}, "no QWeight for first but Parameter"),
    ):
        with pytest.raises(TersorError, match=message):
            QuantizationTraining(scheme, start=right | change).attach(model)
    with pytest.raises(TersorError, match=r"no weight for second \(1 of 2 missing\)"):
        QuantizationTraining(scheme, start={"first": right["first"]}).attach(model)
    right["second"].scales[0] = -1
    with pytest.raises(TersorError, match="second: the scales to start from are negative"):
        QuantizationTraining(scheme, start=right).attach(model)
    assert not parametrize.is_parametrized(model.first)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_training_that_diverged_is_not_converted() -> None:
    model = tiny.model("llama")
    training = QuantizationTraining(W4).attach(model)
    linear = training.linears["model.layers.1.mlp.up_proj"]
    linear.parametrizations.weight.original.data[0, 0] = math.inf
    with pytest.raises(TersorError, match=r"up_proj' holds 0 NaN and 1 infinite.*lower rate"):
        training.finish()
    linear.parametrizations.weight.original.data[0, 0] = 0
    training.parameters()[0].data[0, 0] = math.nan
    with pytest.raises(TersorError, match=r"q_proj' holds 1 NaN"):
        training.finish()
    training.parameters()[0].data[0, 0] = 0
    training.finish()
