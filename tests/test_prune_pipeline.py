"""Pruning from folder to folder: what is written, who can open it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from folders import tensors, weights
from tersor import pipeline
from tersor.calibrate import Calibration, load_tokenizer
from tersor.errors import TersorError
from tersor.inmemory import prune_model
from tersor.linear import QuantLinear
from tersor.loading import load
from tersor.pipeline import prune_checkpoint, quantize_checkpoint
from tersor.qweight import QSpec, Scheme
from tersor.report import Report
from tersor.solvers import GPTQ, RTN, Magnitude, SparseGPT, Wanda
from tersor.sparsity import Sparsity

TEXT = Calibration(texts=(tiny.text(),), samples=40, seq_len=64)
HALF, TWO_OF_FOUR = Sparsity(0.5), Sparsity(pattern=(2, 4))
W4 = Scheme(QSpec(4, 32))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "llama", dtype=torch.bfloat16)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def in_pattern(w: Tensor, kept: int = 2, of: int = 4) -> bool:
    return bool(((w.view(w.shape[0], -1, of) != 0).sum(-1) <= kept).all())


def test_magnitude_writes_what_the_solver_gives(llama: Path, out: Path) -> None:
    report = prune_checkpoint(llama, out, method=Magnitude(HALF))
    before, after = tensors(llama), tensors(out)
    assert before.keys() == after.keys()
    linears = {f"{layer.name}.weight" for layer in report.layers}
    assert len(linears) == 14
    for name, tensor in before.items():
        want = Magnitude(HALF)(tensor, None) if name in linears else tensor
        assert isinstance(want, Tensor)
        assert torch.equal(after[name], want), name
        assert after[name].dtype == tensor.dtype
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (llama / "config.json").read_text()
    )
    assert report.sparsity == pytest.approx(0.5)
    assert report.bytes_before == report.bytes_after
    read = Report.read(out)
    assert read is not None
    assert [layer.sparsity for layer in read.layers] == [0.5] * 14


@pytest.mark.parametrize("method", [Wanda(TWO_OF_FOUR), SparseGPT(TWO_OF_FOUR, refit=True)])
def test_a_pattern_opens_in_plain_transformers(llama: Path, out: Path, method: Any) -> None:
    report = prune_checkpoint(llama, out, method=method, calibration=TEXT)
    after = tensors(out)
    for layer in report.layers:
        assert in_pattern(after[f"{layer.name}.weight"])
        assert layer.tokens == 40 * 64
        assert 0 < layer.error < 1
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    ids = torch.arange(10).unsqueeze(0)
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (1, 15)


def test_the_joint_pass_writes_zero_codes(llama: Path, out: Path) -> None:
    report = prune_checkpoint(
        llama, out, method=SparseGPT(TWO_OF_FOUR), scheme=W4, calibration=TEXT
    )
    quantized = weights(out)
    assert len(quantized) == len(report.layers) == 14
    assert all(in_pattern(q.dequantize()) for q in quantized.values())
    assert report.bits_per_weight < 5
    model = load(out)
    ids = torch.arange(10).unsqueeze(0)
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (1, 15)


def test_quantizing_a_pruned_folder_keeps_its_zeros(llama: Path, out: Path) -> None:
    prune_checkpoint(llama, out / "pruned", method=SparseGPT(TWO_OF_FOUR), calibration=TEXT)
    for method in (RTN(), GPTQ()):
        quantize_checkpoint(
            out / "pruned", out / method.name, scheme=W4, method=method, calibration=TEXT
        )
        assert all(in_pattern(q.dequantize()) for q in weights(out / method.name).values())


def test_the_pattern_is_of_inputs_however_the_file_has_them(tmp_path: Path, out: Path) -> None:
    """GPT-2 keeps its weights as [in, out]."""
    folder = tiny.save(tmp_path / "gpt2", "gpt2")
    prune_checkpoint(folder, out, method=Magnitude(TWO_OF_FOUR))
    before, after = tensors(folder), tensors(out)
    name = next(name for name in after if name.endswith("h.0.mlp.c_fc.weight"))
    assert after[name].shape == before[name].shape == (64, 256)
    assert in_pattern(after[name].t().contiguous())
    assert not in_pattern(after[name])


def test_an_interrupted_run_goes_on(
    llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"method": SparseGPT(TWO_OF_FOUR), "calibration": TEXT}
    prune_checkpoint(llama, out / "whole", **arguments)
    solve = pipeline.compress_block
    done: list[str] = []

    def once(model: Any, block: Any, *rest: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(block.path)
        return solve(model, block, *rest)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(pipeline, "compress_block", once)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(llama, out / "twice", **arguments)
    with pytest.raises(TersorError, match="unfinished run with other settings: sparsity was"):
        prune_checkpoint(llama, out / "twice", method=SparseGPT(HALF), calibration=TEXT)
    prune_checkpoint(llama, out / "twice", **arguments)
    whole, twice = tensors(out / "whole"), tensors(out / "twice")
    assert all(torch.equal(whole[name], twice[name]) for name in whole)


def test_experts_without_tokens_are_pruned_by_magnitude(tmp_path: Path, out: Path) -> None:
    folder = tiny.save(tmp_path / "mixtral", "mixtral", num_local_experts=8)
    report = prune_checkpoint(
        folder,
        out,
        method=SparseGPT(TWO_OF_FOUR),
        calibration=Calibration(texts=(tiny.text(),), samples=1, seq_len=2),
    )
    unseen = [layer for layer in report.layers if not layer.tokens]
    assert unseen
    assert {layer.method for layer in unseen} == {"magnitude"}
    for layer in unseen:
        assert "no calibration token reached it" in report.departures[layer.name]
        assert layer.sparsity == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": RTN()}, "prunes nothing"),
        ({"method": None}, "a solver, not None"),
        ({"method": Magnitude(HALF), "scheme": QSpec(4, 32)}, r"a Scheme\(QSpec"),
        ({"method": Magnitude(HALF), "calibration": "cal.txt"}, "a tersor.Calibration"),
        ({"method": Magnitude(HALF), "ignore": "*.down_proj"}, "a list of patterns"),
        ({"method": Magnitude(HALF, refit=True)}, "or leave --refit out"),
        ({"method": "sparsegpt"}, r"give SparseGPT\(Sparsity"),
        ({"method": SparseGPT(TWO_OF_FOUR)}, "needs text to calibrate on.*--method magnitude"),
        ({"method": Magnitude(Sparsity(pattern=(32, 64)))}, "32:64 does not divide.*--pattern 4:8"),
        ({"method": Magnitude(HALF), "scheme": Scheme(QSpec(4, 128))}, "group 128 does not divide"),
    ],
)
def test_bad_input(llama: Path, out: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        prune_checkpoint(llama, out, **arguments)
    assert not list(out.parent.iterdir())


# --- in memory -----------------------------------------------------------------------------------


def test_a_model_in_memory_is_pruned_as_its_folder_is(tmp_path: Path, out: Path) -> None:
    folder = tiny.save(tmp_path / "llama")
    model, method = tiny.model("llama"), SparseGPT(TWO_OF_FOUR)
    windows = TEXT.windows(load_tokenizer(folder), 64)
    report = prune_model(model, windows, method=method)
    assert len(report.layers) == 14
    prune_checkpoint(folder, out, method=method, calibration=TEXT)
    for name, tensor in tensors(out).items():
        mine = model.get_parameter(name)
        if mine.dim() == 2 and "layers" in name:
            assert in_pattern(mine)
        # Sums over batches of another size may round to the other side of a tie.
        close = (mine - tensor).abs() <= 1e-4 * (1 + tensor.abs())
        assert close.float().mean() > 0.99, name


def test_joint_pruning_in_memory(tmp_path: Path) -> None:
    model = tiny.model("llama")
    prune_model(model, method=Magnitude(TWO_OF_FOUR), scheme=W4)
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, QuantLinear)
    assert in_pattern(layer.qweight().dequantize())
    assert model.generate(torch.arange(5).unsqueeze(0), max_new_tokens=3).shape[1] == 8


def test_bad_input_in_memory() -> None:
    with pytest.raises(TersorError, match="prunes nothing"):
        prune_model(tiny.model("llama"), method=GPTQ())
    with pytest.raises(TersorError, match="prune its folder"):
        prune_model(tiny.model("gpt2"), method=Magnitude(HALF))
    with pytest.raises(
        TersorError, match="pass token ids as `calibration`, or use method=Magnitude"
    ):
        prune_model(tiny.model("llama"), method=Wanda(HALF))
