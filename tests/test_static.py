"""Static scales of int8 activations: how they are found, kept and used."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM

import tersor
import tiny
from tersor import (
    ActSpec,
    Calibration,
    QSpec,
    QuantLinear,
    Scheme,
    TersorConfig,
    TersorError,
    cli,
    quantize_checkpoint,
    quantize_model,
)
from tersor.activations import StaticStats, rounded
from tersor.calibrate import load_tokenizer, watching
from tersor.formats import parse_config, quantization_config
from tersor.layerwise import Treatment, compress_linear
from tersor.oracle import assert_close, oracle, random_qweight
from tersor.search import Space
from tersor.solvers.rtn import RTN

STATIC = ActSpec(dynamic=False)
W8A8 = Scheme(QSpec(8, None), STATIC)
W4A8 = Scheme(QSpec(4, 32), STATIC)
TEXT = Calibration(texts=(tiny.text(),), samples=40, seq_len=64)
IDS = torch.arange(40).view(2, 20)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def static(llama: Path) -> Path:
    out = llama.parent / "static"
    quantize_checkpoint(llama, out, scheme=W8A8, calibration=TEXT, progress=False)
    return out


def layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {n: each for n, each in model.named_modules() if isinstance(each, QuantLinear)}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})


# --- the layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [QSpec(8, None), QSpec(4, 32), QSpec(4, 64, False)], ids=str)
def test_a_layer_is_its_oracle(spec: QSpec, dtype: torch.dtype) -> None:
    q, scale = random_qweight(80, 192, spec, torch.float32), 0.0131
    layer = QuantLinear(q, None, STATIC, torch.float32, input_scale=torch.tensor(scale))
    draw = torch.Generator().manual_seed(0)
    for m in (1, 3, 40):
        x = torch.randn(m, 192, generator=draw).to(dtype)
        expected, room = oracle(x, q, None, STATIC, 0.0, float(torch.tensor(scale)))
        assert_close(layer(x), expected, room, f"{spec} of {m} tokens")
        compiled = torch.ops.tersor.linear(x, layer.packed, None, 80, None, layer.input_scale)
        assert torch.equal(compiled, layer(x))


def test_values_are_those_of_compressed_tensors() -> None:
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    arguments = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs(
        num_bits=8, type="int", symmetric=True, strategy="tensor", dynamic=False
    )
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    for scale in (torch.tensor([0.011]), torch.tensor([2.0**-6])):
        theirs = forward.fake_quantize(x, scale, torch.zeros(1, dtype=torch.int8), arguments)
        assert torch.equal(rounded(x, STATIC, scale), theirs)
        assert bool((theirs != x.clamp(-100, 100)).any()) and float(theirs.max()) < float(x.max())


def test_the_operator_takes_no_other_scale() -> None:
    layer = QuantLinear(
        random_qweight(32, 64, QSpec(8, None)), None, STATIC, input_scale=torch.tensor([0.02])
    )
    for wrong in (torch.ones(1).bfloat16(), torch.ones(0), torch.ones(2), torch.ones(1).cdouble()):
        with pytest.raises(TersorError, match=r"input_scale must be float32 \[1\] on cpu"):
            torch.ops.tersor.linear(torch.ones(1, 64), layer.packed, None, 32, None, wrong)


def test_a_token_that_is_not_finite_stands_for_nothing() -> None:
    layer = QuantLinear(
        random_qweight(32, 64, QSpec(8, None)), None, STATIC, input_scale=torch.tensor([0.02])
    )
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    clean = layer(x)
    for value in (float("nan"), float("inf"), -float("inf")):
        x[3, 7] = value
        found = layer(x)
        assert not bool(found[3].isfinite().any()) and torch.equal(found[:3], clean[:3])
        assert not bool(rounded(x, STATIC, layer.input_scale)[3].isfinite().any())


def test_a_state_dict_holds_the_scale_as_it_was() -> None:
    q = random_qweight(32, 64, QSpec(8, None), torch.bfloat16)
    layer = QuantLinear(q, None, STATIC, input_scale=torch.tensor([[0.0625]]).bfloat16())
    state = layer.state_dict()
    assert torch.equal(state["input_scale"], torch.tensor([0.0625]).bfloat16())
    assert layer.input_scale is not None and layer.input_scale.dtype == torch.float32
    with torch.device("meta"):
        awaiting = QuantLinear(q.to(torch.device("meta")), None, STATIC)
    assert awaiting.state_dict()["input_scale"].is_meta
    awaiting.load_state_dict(state, assign=True)
    other = QuantLinear(q, None, STATIC, input_scale=torch.tensor(3.0))
    other.load_state_dict(state)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for each in (awaiting, other, copy.deepcopy(layer), layer.half().float()):
        assert torch.equal(each(x), layer(x))
        assert torch.equal(each.state_dict()["input_scale"], state["input_scale"])
        assert each.static_scale == 0.0625


def test_a_state_dict_with_a_bad_scale_changes_nothing() -> None:
    def layer(seed: int) -> QuantLinear:
        q = random_qweight(32, 64, QSpec(8, None), seed=seed)
        return QuantLinear(q, None, STATIC, input_scale=torch.tensor([0.0625]))

    kept, state = layer(0), layer(1).state_dict()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    before = kept(x)
    bad = {name: tensor for name, tensor in state.items() if name != "input_scale"}
    for wrong in (bad, bad | {"input_scale": torch.zeros(1)}):
        with pytest.raises(RuntimeError, match="input_scale"):
            kept.load_state_dict(wrong)
        assert torch.equal(kept(x), before) and kept.static_scale == 0.0625
    kept.load_state_dict(state)
    assert not torch.equal(kept(x), before)


def test_vmap_and_make_fx_see_the_operator() -> None:
    """Their tensors are of class Tensor too; a kernel called at once would be in no graph."""
    q = random_qweight(32, 64, QSpec(8, None))
    layer = QuantLinear(q, None, STATIC, input_scale=torch.tensor([0.02]))
    x, other = torch.randn(2, 5, 3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.func.vmap(layer)(x), layer(x))
    assert torch.equal(make_fx(layer)(x)(other), layer(other))


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (None, "one floating-point number in a tensor, not None"),
        (0.5, "one floating-point number in a tensor, not 0.5"),
        (torch.ones(2), r"one floating-point number in a tensor, not torch.float32 \[2\]"),
        (torch.ones(1, dtype=torch.int8), "one floating-point number in a tensor, not torch.int8"),
        (torch.zeros(1), "finite in float32, not 0"),
        (torch.tensor([-0.5]), "finite in float32, not -0.5"),
        (torch.tensor([float("nan")]), "finite in float32, not nan"),
        (
            torch.tensor([1e300], dtype=torch.float64),
            r"finite in float32, not 1e\+300",
        ),
        (torch.tensor([1e-300], dtype=torch.float64), "finite in float32, not 1e-300"),
    ],
)
def test_what_is_no_scale(scale: Any, said: str) -> None:
    with pytest.raises(TersorError, match=said):
        QuantLinear(random_qweight(32, 64, QSpec(8, None)), None, STATIC, input_scale=scale)


def test_what_does_not_go_together() -> None:
    q = random_qweight(32, 64, QSpec(8, None))
    with pytest.raises(TersorError, match="input_scale is of static activations"):
        QuantLinear(q, None, ActSpec(), input_scale=torch.ones(1))
    with pytest.raises(TersorError, match="outliers are kept apart from int8 with a scale"):
        ActSpec(outliers=6.0, dynamic=False)
    with pytest.raises(TersorError, match="dynamic is True or False, not 'no'"):
        ActSpec(dynamic="no")  # type: ignore[arg-type]
    with pytest.raises(TersorError, match="from_linear sees no inputs"):
        QuantLinear.from_linear(nn.Linear(64, 32), W8A8)
    with pytest.raises(TersorError, match="quantization-aware training measures no inputs"):
        tersor.QuantizationTraining(W8A8)
    with pytest.raises(TersorError, match="quantization-aware training measures no inputs"):
        tersor.QAT(scheme=W8A8)
    with pytest.raises(TersorError, match="a search compares dynamic int8 activations"):
        Space(activations=(STATIC,))
    with pytest.raises(TersorError, match="come of inputs; pass token ids"):
        tersor.swap_linears(tiny.model("llama"), W8A8)


# --- calibration ----------------------------------------------------------------------------------


def squared_error(x: Tensor, scale: float) -> float:
    codes = (x.double() / scale).round().clamp(-128, 127)
    return float((codes * scale - x.double()).square().sum())


def check_scale(scale: float, x: Tensor) -> None:
    """No other scale has an error much smaller."""
    largest = float(x.abs().max()) / 127.5
    least = min(squared_error(x, largest * 0.97**i) for i in range(120))
    assert squared_error(x, scale) <= 1.02 * least
    assert scale <= 1.01 * largest


@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform", "one"])
def test_a_scale_has_the_least_squared_error(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 16, generator=draw)
    if kind == "heavy":
        x = x / torch.rand(300, 16, generator=draw).clamp(min=0.01)
    if kind == "uniform":
        x = torch.rand(300, 16, generator=draw) * 2 - 1
    if kind == "one":
        x[7, 3] = -400.0
    stats = StaticStats(16)
    for part in (x[:100].bfloat16(), x[100:].bfloat16().float().view(2, 100, 16)):
        stats.update(part)
    check_scale(float(stats.scale()), x.bfloat16())
    nothing = StaticStats(16)
    nothing.update(torch.zeros(3, 16))
    assert nothing.scale() is None


def test_float16_holds_the_scales_of_small_inputs() -> None:
    stats, x = StaticStats(64), torch.randn(300, 64, generator=torch.manual_seed(0)) * 1e-4
    stats.update(x)
    linear = nn.Linear(64, 32, dtype=torch.float16)
    solved = compress_linear("a", linear, stats, Treatment(RTN(), W8A8), stats.scale())
    assert solved.input_scale is not None and solved.input_scale.dtype == torch.float16
    check_scale(float(solved.input_scale), x)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_scales_are_those_of_what_was_read(
    llama: Path, tmp_path: Path, method: str, sequential: bool
) -> None:
    """Of the model itself with the quantized blocks in place of those before, seen from outside."""
    out = tmp_path / "out"
    report = quantize_checkpoint(
        *(llama, out), scheme=W4A8, method=method, calibration=TEXT, sequential=sequential
    )
    assert not report.departures and {each.scheme for each in report.layers} == {"W4A8 static"}
    assert report.settings["dynamic"] is False
    found, seen = tensors(out), {}
    model = AutoModelForCausalLM.from_pretrained(llama, torch_dtype="auto").eval()
    windows = TEXT.windows(load_tokenizer(llama), tiny.CONTEXT)
    quantized = {name: each.qweight() for name, each in layers(tersor.load(out)).items()}

    def see(name: str, x: Tensor) -> None:
        seen[name] = torch.cat([seen.get(name, x.new_empty(0)), x.flatten()])

    parts = [
        *(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]),
        *(["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]),
    ]
    for block in range(2):
        taps = [[f"model.layers.{block}.{name}" for name in part] for part in parts]
        for names in taps if sequential else [[name for tap in taps for name in tap]]:
            with watching({n: model.get_submodule(n) for n in names}, see), torch.no_grad():
                for batch in windows.split(32):
                    model(batch)
            for name in names:
                scale = found[f"{name}.input_scale"]
                assert scale.shape == (1,) and scale.dtype == torch.bfloat16
                check_scale(float(scale), seen[name])
                model.get_submodule(name).weight.data = quantized[name].dequantize(torch.bfloat16)


def test_the_same_model_in_memory_and_from_a_folder(llama: Path, static: Path) -> None:
    windows = TEXT.windows(load_tokenizer(llama), tiny.CONTEXT)
    model = AutoModelForCausalLM.from_pretrained(llama, torch_dtype="auto").eval()
    report = quantize_model(model, windows, scheme=W8A8)
    loaded = tersor.load(static)
    there, here = layers(loaded), layers(model)
    assert there.keys() == here.keys() and len(there) == 14
    for name, layer in there.items():
        assert layer.scheme == here[name].scheme == W8A8
        assert layer.static_scale == here[name].static_scale > 0
    assert torch.equal(logits(loaded), logits(model))
    stored = tensors(static)
    for each in report.layers:
        parts = [t.nbytes for n, t in stored.items() if n.rpartition(".")[0] == each.name]
        assert sum(parts) == each.bytes


def test_saved_again_and_opened_by_transformers(static: Path, tmp_path: Path) -> None:
    model = tersor.load(static)
    tersor.save(model, tmp_path / "again")
    before, after = tensors(static), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(tersor.load(tmp_path / "again")), logits(model))
    pytest.importorskip("compressed_tensors")
    ours = AutoModelForCausalLM.from_pretrained(static, quantization_config=TersorConfig())
    assert all(each.scheme == W8A8 for each in layers(ours).values())
    theirs = AutoModelForCausalLM.from_pretrained(static)
    linear = theirs.model.layers[0].self_attn.q_proj
    arguments = linear.quantization_scheme.input_activations
    assert not arguments.dynamic and "tensor" in str(arguments.strategy).lower()
    name = "model.layers.0.self_attn.q_proj"
    assert linear.input_scale.item() == layers(model)[name].static_scale


def test_transformers_computes_the_same(tmp_path: Path) -> None:
    """In float32, where quotients are not rounded to 16 bits before they become codes; linear by
    linear, since one value on the other side of a tie changes all that comes after."""
    pytest.importorskip("compressed_tensors")
    quantize_checkpoint(tiny.save(tmp_path / "m"), tmp_path / "q", scheme=W8A8, calibration=TEXT)
    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "q"), tersor.load(tmp_path / "q")
    checked = []

    def check(name: str, x: Tensor, y: Tensor) -> None:
        layer = layers(ours)[name]
        expected, room = oracle(x[0], layer.qweight(), None, STATIC, 0.0, layer.static_scale)
        assert_close(y[0], expected, room, name)
        assert_close(layer(x)[0], expected, room, name)
        checked.append(name)

    for name in layers(ours):
        theirs.get_submodule(name).register_forward_hook(
            lambda module, given, y, name=name: check(name, given[0], y)
        )
    logits(theirs)
    assert len(checked) == 14


def test_it_is_nearly_the_original(llama: Path, static: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(llama, torch_dtype="auto").eval()
    expected, found = logits(original).float(), logits(tersor.load(static)).float()
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_experts_that_no_token_reached_have_a_scale_too(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "m", "mixtral")
    two = Calibration(texts=(tiny.text(),), samples=1, seq_len=2)  # tokens, and four experts
    report = quantize_checkpoint(source, tmp_path / "q", scheme=W8A8, method="rtn", calibration=two)
    found = tensors(tmp_path / "q")
    unreached = [each.name for each in report.layers if not each.tokens]
    assert unreached
    for name in unreached:
        assert "its input_scale is a guess" in report.departures[name]
    scales = {n: float(t) for n, t in found.items() if n.endswith("input_scale")}
    assert len(scales) == len(report.layers) and min(scales.values()) > 0
    assert bool(logits(tersor.load(tmp_path / "q")).isfinite().all())


def test_an_expert_has_the_largest_scale_of_its_block_whichever_comes_first(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "m", "mixtral")
    two = Calibration(texts=(tiny.text(),), samples=1, seq_len=2)
    rest = {"scheme": W8A8, "method": "rtn", "calibration": two}
    report = quantize_checkpoint(source, tmp_path / "q", ignore=["*self_attn*"], **rest)
    found, firsts = tensors(tmp_path / "q"), set()
    for block in ("layers.0.", "layers.1."):
        scales = {
            name.removesuffix(".input_scale").partition("experts")[2]: float(tensor)
            for name, tensor in found.items()
            if block in name and name.endswith("input_scale")
        }
        inside = {
            each.name.partition("experts")[2]: each.tokens
            for each in report.layers
            if block in each.name
        }
        largest = max(scales[name] for name, seen in inside.items() if seen)
        unreached = [name for name, seen in inside.items() if not seen]
        assert unreached and all(scales[name] == largest for name in unreached)
        firsts.add(next(iter(inside.values())))
    assert 0 in firsts
    silent = StaticStats(64)
    with pytest.raises(TersorError, match=r"^a: no calibration token reached it, nor another"):
        compress_linear("a", nn.Linear(64, 32), silent, Treatment(RTN(), W8A8), torch.ones(0))


def test_a_linear_that_read_only_zeros_has_the_scale_of_another() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    model[0].bias.data.fill_(-1e3)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    report = quantize_model(model, [x], scheme=W8A8, method="rtn")
    why = {"2": "its input_scale is a guess: calibration showed it nothing but zeros"}
    assert report.departures == why
    assert model[2].static_scale == model[0].static_scale < 0.1


# --- what is said ---------------------------------------------------------------------------------


def test_config_json_says_so() -> None:
    config = quantization_config(W8A8)
    inputs = config["config_groups"]["group_0"]["input_activations"]
    assert inputs["dynamic"] is False and inputs["strategy"] == "tensor"
    assert parse_config(config).scheme_for("any") == W8A8
    inputs |= {"dynamic": 0}
    with pytest.raises(TersorError, match="one dynamic scale per token or one static scale"):
        parse_config(config)


def test_text_is_asked_for_before_any_work(llama: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(TersorError, match="static scales of activations need text"):
        quantize_checkpoint(llama, tmp_path / "out", scheme=W8A8, method="rtn")
    arguments = ["--out", str(tmp_path / "out"), "--method", "rtn", "--bits", "8"]
    assert cli.main(["quantize", str(llama), *arguments, "--activations", "int8-static"]) == 2
    assert "give --calibration FILE" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["qat", "search"])
def test_commands_without_static_scales_offer_none(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    assert "--activations {int8}" in said and "int8-static" not in said


def test_the_cli(llama: Path, static: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.txt").write_text(tiny.text())
    text = ["--calibration", str(tmp_path / "text.txt"), "--samples", "40", "--seq-len", "64"]
    out = tmp_path / "out"
    static_int8 = ["--bits", "8", "--activations", "int8-static"]
    assert cli.main(["quantize", str(llama), "--out", str(out), *text, *static_int8]) == 0
    assert cli.main(["inspect", str(out)]) == 0
    assert "W8A8 static" in capsys.readouterr().out
    mine, other = tensors(out), tensors(static)
    assert {n: t.dtype for n, t in mine.items()} == {n: t.dtype for n, t in other.items()}


def damage(static: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    folder.mkdir()
    for file in static.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    edit(folder, change)


def test_a_folder_that_lacks_scales_or_has_some_too_many(static: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    damage(static, tmp_path / "less", lambda held: held.pop(f"{name}.input_scale"))
    with pytest.raises(TersorError, match=f"{name}: input_scale must be one floating-point"):
        tersor.load(tmp_path / "less")
    damage(static, tmp_path / "bad", lambda held: held[f"{name}.input_scale"].fill_(-1))
    with pytest.raises(TersorError, match=f"{name}: input_scale must be positive"):
        tersor.load(tmp_path / "bad")
    damage(static, tmp_path / "more", lambda held: None)
    file = tmp_path / "more" / "config.json"
    config = json.loads(file.read_text())
    inputs = config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    inputs |= {"dynamic": True, "strategy": "token"}
    file.write_text(json.dumps(config))
    with pytest.raises(TersorError, match="input_scale is of static activations"):
        tersor.load(tmp_path / "more")


def test_zero_points_of_a_symmetric_grid_are_read_over(static: Path, tmp_path: Path) -> None:
    """Some releases of compressed-tensors write them."""

    def zeros(held: dict[str, Tensor]) -> None:
        for name in [name for name in held if name.endswith("input_scale")]:
            held[name.replace("scale", "zero_point")] = torch.zeros(1, dtype=torch.int8)

    damage(static, tmp_path / "zeros", zeros)
    assert torch.equal(logits(tersor.load(tmp_path / "zeros")), logits(tersor.load(static)))
    edit(tmp_path / "zeros", lambda held: [t.fill_(3) for n, t in held.items() if "zero_p" in n])
    with pytest.raises(TersorError, match="input_zero_point is not zero"):
        tersor.load(tmp_path / "zeros")


def test_outliers_do_not_go_with_it(static: Path) -> None:
    with pytest.raises(TersorError, match="static scales of activations, which outliers"):
        tersor.load(static, outliers=6.0)
