"""Checkpoints whose linears have schemes of their own: what each became, resumed, loaded by tersor
and by transformers with compressed-tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tersor
import tiny
from folders import content, plain, tensors, weights
from tersor import pipeline
from tersor.calibrate import Calibration, GramStats
from tersor.errors import TersorError
from tersor.layerwise import Treatment, compress_linear
from tersor.pipeline import compress_checkpoint, quantize_checkpoint
from tersor.qweight import ActSpec, QSpec, Scheme
from tersor.report import Report
from tersor.solvers import GPTQ, RTN, SparseGPT
from tersor.sparsity import Sparsity
from test_real_clients import BF16_TOLERANCE, IDS, assert_close, job, run_client

TEXT = Calibration(texts=(tiny.text(),), samples=8, seq_len=64)
W2, W3, W4, W8 = (Scheme(QSpec(bits, 32)) for bits in (2, 3, 4, 8))
TWO_OF_FOUR = Sparsity(pattern=(2, 4))
SCHEMES = {"*.0.*.q_proj": None, "*.down_proj": W8, "*.1.self_attn.*": W3, "*": W4}


def expected(name: str) -> int | None:
    """Bits of a linear by SCHEMES, written out by hand."""
    if name == "model.layers.0.self_attn.q_proj":
        return None
    if name.endswith("down_proj"):
        return 8
    return 3 if name.startswith("model.layers.1.self_attn") else 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def mixed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "out"
    quantize_checkpoint(llama, out, scheme=SCHEMES, calibration=TEXT, sequential=True)
    return out


def test_each_linear_has_its_own_scheme(llama: Path, mixed: Path) -> None:
    found = weights(mixed)
    names = [n.removesuffix(".weight") for n in tensors(llama) if ".layers." in n and "proj" in n]
    assert len(names) == 14
    for name in names:
        bits = found[name].spec.bits if name in found else None
        assert bits == expected(name), name
    stays = "model.layers.0.self_attn.q_proj"
    assert torch.equal(tensors(mixed)[f"{stays}.weight"], tensors(llama)[f"{stays}.weight"])
    report = Report.read(mixed)
    assert report is not None
    assert report.kept[stays] == "left as it is, *.0.*.q_proj"
    assert {layer.name: layer.scheme for layer in report.layers}[names[-1]]
    assert report.bytes_after == sum(tensor.nbytes for tensor in tensors(mixed).values())
    assert [pattern for pattern, _ in report.settings["treatments"]] == list(SCHEMES)
    treatments = dict(report.settings["treatments"])
    assert treatments["*.down_proj"]["bits"] == 8
    assert treatments["*.0.*.q_proj"] is None


def test_weights_are_those_of_one_scheme_where_nothing_came_before(
    llama: Path, mixed: Path, tmp_path: Path
) -> None:
    """The first block's k_proj reads what no quantized linear has touched."""
    quantize_checkpoint(llama, tmp_path / "w4", scheme=W4, calibration=TEXT)
    name = "model.layers.0.self_attn.k_proj"
    assert torch.equal(weights(mixed)[name].codes, weights(tmp_path / "w4")[name].codes)


def twin(state: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.nn.Module:
    """A plain model with these weights; its buffers stay in float32, as anyone loads it."""
    model = tiny.model("llama")
    model.load_state_dict({k: v for k, v in state.items() if "weight_" not in k})
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def test_tersor_loads_it(mixed: Path) -> None:
    model = tersor.load(mixed, torch.float32)
    assert "W8A16" in repr(model.model.layers[0].mlp.down_proj)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    dense = {f"{name}.weight": q.dequantize() for name, q in weights(mixed).items()}
    plain_model = twin(tensors(mixed) | dense, torch.float32)
    assert_close(model(IDS).logits, plain_model(IDS).logits, 1e-5)


@torch.no_grad()
def test_transformers_runs_it_without_tersor(mixed: Path, tmp_path: Path) -> None:
    """(Its other way, to dequantize at load, takes one scheme for all linears up to 5.23.)"""
    pytest.importorskip("compressed_tensors", minversion="0.19")
    pytest.importorskip("accelerate")
    copy = shutil.copytree(mixed, tmp_path / "copy")
    run_client(job(copy, torch.bfloat16, dequantize=False))
    client = load_file(copy / "client.safetensors")
    logits = client.pop("logits")
    for name, q in weights(mixed).items():
        assert torch.equal(client[f"{name}.weight"], q.dequantize(torch.bfloat16)), name
    assert_close(logits, twin(client, torch.bfloat16)(IDS).logits, BF16_TOLERANCE)


def test_an_interrupted_run_goes_on_with_the_same_bytes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"scheme": SCHEMES, "calibration": TEXT}
    quantize_checkpoint(llama, tmp_path / "whole", **arguments)
    compress, done = pipeline.compress_block, []

    def once(model: Any, block: Any, *rest: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(block.path)
        return compress(model, block, *rest)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(pipeline, "compress_block", once)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(llama, tmp_path / "twice", **arguments)
    other = SCHEMES | {"*": W2}
    with pytest.raises(TersorError, match="unfinished run with other settings: treatments was"):
        quantize_checkpoint(llama, tmp_path / "twice", scheme=other, calibration=TEXT)
    swapped = dict(sorted(SCHEMES.items(), key=lambda each: (each[0] == "*", each[1] is None)))
    with pytest.raises(TersorError, match="unfinished run with other settings: treatments was"):
        quantize_checkpoint(llama, tmp_path / "twice", scheme=swapped, calibration=TEXT)
    quantize_checkpoint(llama, tmp_path / "twice", **arguments)
    assert content(tmp_path / "whole") == content(tmp_path / "twice")


def test_solvers_and_zeros_of_their_own(llama: Path, out: Path) -> None:
    """Pruned and quantized, pruned in 16 bits, and rounded, beside each other."""
    report = compress_checkpoint(
        llama,
        out,
        treatments={
            "*.gate_proj": Treatment(SparseGPT(TWO_OF_FOUR), W4),
            "*.up_proj": Treatment(SparseGPT(TWO_OF_FOUR)),
            "*.down_proj": Treatment(RTN(), Scheme(QSpec(8, None), ActSpec())),
            "*.v_proj": Treatment(GPTQ(), W4),
        },
        calibration=TEXT,
    )
    layers = {layer.name.removeprefix("model.layers."): layer for layer in report.layers}
    assert len(layers) == 8
    for end, scheme, method, zeros in (
        ("gate_proj", "W4A16", "sparsegpt", 0.5),
        ("up_proj", "W16A16", "sparsegpt", 0.5),
        ("down_proj", "W8A8", "rtn", 0.0),
    ):
        layer = layers[f"0.mlp.{end}"]
        assert (layer.scheme, layer.method) == (scheme, method)
        assert layer.sparsity >= zeros
    assert set(report.kept.values()) >= {"no pattern is for it"}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {len(group["targets"]) for group in config["config_groups"].values()} == {4, 2}
    model = tersor.load(out)
    up = model.model.layers[0].mlp.up_proj
    assert int((up.weight != 0).view(96, -1, 4).sum(-1).max()) <= 2
    with torch.no_grad():
        assert bool(model(IDS).logits.isfinite().all())


@pytest.mark.parametrize("other", [GPTQ(act_order=True), SparseGPT(TWO_OF_FOUR, damp=0.05)])
def test_one_input_is_factored_in_one_way(llama: Path, out: Path, other: Any) -> None:
    treatments = {"*.q_proj": Treatment(other, W4), "*": Treatment(GPTQ(), W4)}
    with pytest.raises(TersorError, match=r"0\.self_attn\.q_proj has .* and .*k_proj has damp"):
        compress_checkpoint(llama, out, treatments=treatments, calibration=TEXT)
    assert not out.with_name("out.partial").exists()
    apart = {"*.down_proj": Treatment(other, W4), "*": Treatment(RTN(), W4)}
    compress_checkpoint(llama, out, treatments=apart, calibration=TEXT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GPTQ(),), "gptq without a scheme does nothing"),
        (("gptq", W4), r"solver is one with its settings, GPTQ\(\) say, not 'gptq'"),
        ((GPTQ, W4), "solver is one with its settings"),
        ((3, W4), "a solver, not 3"),
        ((GPTQ(), 4), "scheme is a Scheme"),
    ],
)
def test_bad_treatments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        Treatment(*arguments)


def test_a_scheme_is_no_treatment(llama: Path, out: Path) -> None:
    treatments: Any = {"*": W4}
    with pytest.raises(TersorError, match="a treatment is a Treatment"):
        compress_checkpoint(llama, out, treatments=treatments)


def test_what_is_only_rounded_departs_from_nothing() -> None:
    """Damping is raised to factor the input that both read: that is of GPTQ alone."""
    linear = torch.nn.Linear(64, 8, bias=False)
    stats = GramStats(64)
    stats.update(torch.ones(4, 64) + 1e-6 * torch.randn(4, 64))
    solved = compress_linear("a", linear, stats, Treatment(GPTQ(damp=1e-12), W4))
    assert solved.departure is not None and solved.report.notes
    rounded = compress_linear("b", linear, stats, Treatment(RTN(), W4))
    assert (rounded.departure, rounded.report.notes) == (None, [])


def test_zeros_alone_leave_an_ordinary_model(llama: Path, out: Path) -> None:
    compress_checkpoint(
        llama,
        out,
        treatments={"*.up_proj": Treatment(SparseGPT(Sparsity(0.5))), "*": None},
        calibration=TEXT,
    )
    assert "quantization_config" not in (out / "config.json").read_text()
    up = plain(out).model.layers[1].mlp.up_proj.weight
    assert float((up == 0).float().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ({"*.q_prj": W4, "*": W8}, "'.*q_prj' matches no linear .* like model.layers.0.self_attn"),
        ({"*": W8, "*.q_proj": W4}, "first pattern counts"),
        ({"*": None}, "every linear is left as it is"),
        ({}, "every linear is left as it is"),
        ({"*": 4}, "scheme is a Scheme"),
        ({"*": W4, "lm_head": W8}, "'lm_head' matches no linear"),
        ({"*.down_proj": Scheme(QSpec(4, 64)), "*": W4}, "group 64 does not divide .*down_proj"),
    ],
)
def test_bad_patterns(llama: Path, out: Path, schemes: Any, message: str) -> None:
    with pytest.raises(TersorError, match=message):
        quantize_checkpoint(llama, out, scheme=schemes, method="rtn")
    assert not out.exists()
