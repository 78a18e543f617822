"""LLM.int8() in models: from folders, in training, on the command line, and what it is for."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tersor
import tiny
from tersor import ActSpec, QSpec, QuantLinear, Scheme, TersorConfig, TersorError, cli
from tersor.activations import rounded
from tersor.formats import quantization_config
from tersor.search import Space
from tersor.training.fake import fake_quantize_activation

W8A8 = Scheme(QSpec(8, None), ActSpec())
LLM_INT8 = Scheme(QSpec(8, None), ActSpec(outliers=1.5))  # tiny models have no larger values
IDS = torch.arange(40).view(2, 20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("outliers")
    plain = tiny.save(home / "plain")
    for name, scheme in (("w8a8", W8A8), ("w8a16", Scheme(QSpec(8, None)))):
        tersor.quantize_checkpoint(plain, home / name, scheme=scheme, method="rtn", progress=False)
    (home / "text.txt").write_text(tiny.text())
    return {name: home / name for name in ("plain", "w8a8", "w8a16", "text.txt")}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def layers(model: nn.Module) -> list[QuantLinear]:
    return [each for each in model.modules() if isinstance(each, QuantLinear)]


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_is_loaded_with_outliers(folders: dict[str, Path]) -> None:
    plain, kept = tersor.load(folders["w8a8"]), tersor.load(folders["w8a8"], outliers=1.5)
    assert layers(kept) and all(each.scheme == LLM_INT8 for each in layers(kept))
    assert all(each.scheme == W8A8 for each in layers(plain))
    assert not torch.equal(logits(plain), logits(kept))
    huge = tersor.load(folders["w8a8"], outliers=1e6)
    assert torch.equal(logits(plain), logits(huge))
    before = json.loads((folders["w8a8"] / "config.json").read_text())["quantization_config"]
    assert kept.config.quantization_config == before


def test_from_pretrained_with_outliers(folders: dict[str, Path]) -> None:
    pytest.importorskip("compressed_tensors")
    dtype = "dtype" if transformers.__version__ >= "4.56" else "torch_dtype"
    model = AutoModelForCausalLM.from_pretrained(
        folders["w8a8"], quantization_config=TersorConfig(outliers=1.5), **{dtype: "auto"}
    )
    assert all(each.scheme == LLM_INT8 for each in layers(model))
    assert torch.equal(logits(model), logits(tersor.load(folders["w8a8"], outliers=1.5)))
    with pytest.raises(TersorError, match="positive number beyond which"):
        TersorConfig(outliers=-1.0)
    with pytest.raises(TersorError, match="no int8 activations beside which"):
        AutoModelForCausalLM.from_pretrained(
            folders["w8a16"], quantization_config=TersorConfig(outliers=1.5)
        )


@pytest.mark.parametrize("name", ["plain", "w8a16"])
def test_a_folder_without_int8_activations_is_refused(name: str, folders: dict[str, Path]) -> None:
    from tersor.loading import load_any

    for load in (tersor.load, load_any):
        with pytest.raises(TersorError, match="no int8 activations beside which outliers could"):
            load(folders[name], outliers=6.0)


def test_no_folder_holds_outliers_and_that_is_said(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=r"tersor.load\(folder, outliers=1.5\)"):
        written = quantization_config({"a": LLM_INT8, "b": W8A8})
    assert written == quantization_config({"a": W8A8, "b": W8A8})
    model = tersor.load(folders["w8a8"], outliers=1.5)
    with pytest.warns(UserWarning, match=r"tersor.load\(folder, outliers=1.5\)"):
        tersor.save(model, tmp_path / "saved")
    again = tersor.load(tmp_path / "saved", outliers=1.5)
    assert torch.equal(logits(again), logits(model))
    out = tmp_path / "made"
    with pytest.warns(UserWarning, match=r"tersor.load\(folder, outliers=1.5\)"):
        tersor.quantize_checkpoint(
            folders["plain"], out, scheme=LLM_INT8, method="rtn", progress=False
        )
    assert torch.equal(logits(tersor.load(out, outliers=1.5)), logits(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantization_config(W8A8)


# --- what it is for -------------------------------------------------------------------------------


def test_large_channels_cost_int8_activations_much_and_these_little() -> None:
    """Four channels behind each norm times 64, the columns that read them divided: the very same
    function. Codes of a token's other channels are lost, unless those four stay in 16 bits."""
    torch.manual_seed(0)
    model = tiny.model("llama").eval()
    expected = logits(model)
    for block in model.model.layers:
        for norm, readers in (
            (block.input_layernorm, [getattr(block.self_attn, f"{x}_proj") for x in "qkv"]),
            (block.post_attention_layernorm, [block.mlp.gate_proj, block.mlp.up_proj]),
        ):
            norm.weight.data[:4] *= 64
            for each in readers:
                each.weight.data[:, :4] /= 64
    assert torch.equal(logits(model), expected)

    def rounded(activation: ActSpec | None) -> Tensor:
        quantized = copy.deepcopy(model)
        report = tersor.swap_linears(quantized, Scheme(QSpec(8, None), activation))
        assert report.settings.get("outliers") == (activation and activation.outliers)
        return logits(quantized)

    # The part of the activations: against the same weights with inputs as they are. The step of
    # int8 codes is some 64 times as large where those channels are among them.
    exact = rounded(None)
    int8, kept = (
        float((rounded(each) - exact).square().mean())
        for each in (ActSpec(), ActSpec(outliers=6.0))
    )
    assert kept < int8 / 100


# --- training and search --------------------------------------------------------------------------


def test_training_and_search_round_as_the_kernels_do() -> None:
    x = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0)).clamp(-5, 5)
    x[1, 3, 17], x[0, 0, 5] = 80.0, -9.0
    how = ActSpec(outliers=6.0)
    rest = x.clone()
    rest[..., [5, 17]] = 0
    expected = fake_quantize_activation(rest)
    expected[..., [5, 17]] = x[..., [5, 17]]
    assert torch.equal(fake_quantize_activation(x, how), expected)
    torch.testing.assert_close(rounded(x, how).to(x.dtype), expected)
    leaf = x.clone().requires_grad_()
    fake_quantize_activation(leaf, how).backward(torch.ones_like(x))
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.ones_like(x))
    with pytest.raises(TersorError, match="outliers is how a layer runs"):
        Space(activations=(how,))


# --- the command line -----------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(each) for each in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_eval_and_generate(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = folders["w8a8"], folders["text.txt"]
    common = ("--text", text, "--samples", 2, "--seq-len", 32, "--json")
    code, out, _ = run(capsys, "eval", folder, "--outliers", 1.5, "--baseline", folder, *common)
    assert code == 0
    found = json.loads(out)
    kept = found[f"{folder} (outliers beyond 1.5)"]["quality"]
    assert kept["kl"]["mean"] > 0 and found[str(folder)]["quality"]["kl"]["mean"] == 0
    code, out, _ = run(capsys, "generate", folder, "ter so", "--outliers", 1.5, "--max-tokens", 3)
    assert code == 0 and out.startswith("ter so")
    code, _, err = run(capsys, "eval", folders["w8a16"], "--outliers", 6, *common)
    assert code == 2 and "no int8 activations beside which outliers could" in err
    for wrong in ("0", "-1", "many"):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["generate", str(folder), "a", "--outliers", wrong])
        assert stopped.value.code == 2
        assert "--outliers" in capsys.readouterr().err
