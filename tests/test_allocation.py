"""How a ratio is spread over a model: by outliers, and by one threshold for all weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from folders import tensors
from tersor import pipeline
from tersor.allocation import OUTLIER, global_ratios, owl_ratios
from tersor.calibrate import Calibration, load_tokenizer
from tersor.errors import TersorError
from tersor.pipeline import prune_checkpoint
from tersor.solvers import Magnitude, SparseGPT
from tersor.sparsity import Sparsity

TEXT = Calibration(texts=(tiny.text(),), samples=40, seq_len=64)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=3)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.7])
def test_global_is_the_share_below_one_threshold(ratio: float) -> None:
    draw = torch.Generator().manual_seed(0)
    weights = {f"w{i}": torch.randn(30, 40 + i, generator=draw) * (1 + i) for i in range(4)}
    weights["w0"][0] = 0  # as many ties as there can be
    everything = torch.cat([w.abs().flatten() for w in weights.values()]).sort().values
    threshold = everything[int(ratio * everything.numel())]
    found = global_ratios(weights, weights.__getitem__, ratio)
    for name, w in weights.items():
        assert found[name] == pytest.approx(int((w.abs() < threshold).sum()) / w.numel(), abs=1e-3)


def test_of_equal_weights_as_many_go_as_have_to() -> None:
    draw = torch.Generator().manual_seed(0)
    ternary = {
        name: torch.randint(-1, 2, (64, 64), generator=draw).float() * size
        for name, size in (("a", 1), ("b", 1), ("c", 2))
    }
    found = global_ratios(ternary, ternary.__getitem__, 0.5)
    assert sum(found.values()) / 3 == pytest.approx(0.5, abs=1e-3)
    assert found["a"] == pytest.approx(found["b"], abs=0.05)
    assert found["c"] < found["a"]


def test_owl_is_the_published_formula() -> None:
    shares = {"a": 0.02, "b": 0.05, "c": 0.01}
    found = owl_ratios(shares, 0.6, spread=0.1)
    # Yin et al., arXiv:2310.05175: shares of kept weights, stretched to [0, 2 spread], centred.
    kept = {name: (d - 0.01) * 0.2 / 0.04 for name, d in shares.items()}
    mean = sum(kept.values()) / 3
    assert found == pytest.approx({name: 1 - (k - mean + 0.4) for name, k in kept.items()})
    assert sum(found.values()) / 3 == pytest.approx(0.6)
    assert found["b"] < found["a"] < found["c"]
    assert owl_ratios(dict.fromkeys("abc", 0.01), 0.6) == dict.fromkeys("abc", 0.6)
    for ratio in (0.05, 0.97):
        with pytest.raises(TersorError, match="leaves OWL no room"):
            owl_ratios(shares, ratio)


def test_global_magnitude_is_magnitude_over_the_model(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = prune_checkpoint(llama, out, method=Magnitude(Sparsity(0.5)), allocation="global")
    before, after = tensors(llama), tensors(out)
    names = [f"{layer.name}.weight" for layer in report.layers]
    everything = torch.cat([before[name].abs().flatten() for name in names]).sort().values
    threshold = everything[int(0.5 * everything.numel())]
    for name in names:
        assert torch.equal(after[name] != 0, before[name].abs() >= threshold)
    assert report.settings["allocation"] == "global"
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert len({layer.sparsity for layer in report.layers}) > 3


def test_owl_counts_outliers_of_the_original(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = prune_checkpoint(
        llama, out, method=SparseGPT(Sparsity(0.6)), allocation="owl", calibration=TEXT
    )
    model = tiny.model("llama", num_hidden_layers=3).double()
    windows = TEXT.windows(load_tokenizer(llama), 64)
    norms: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(
                lambda m, x, name=name: norms.__setitem__(name, x[0].flatten(0, 1).norm(dim=0))
            )
    with torch.no_grad():
        model(windows)
    shares = {}
    for block in range(3):
        path = f"model.layers.{block}"
        scores = torch.cat(
            [
                (model.get_submodule(name).weight.abs() * norm).flatten()
                for name, norm in norms.items()
                if name.startswith(f"{path}.")
            ]
        )
        shares[path] = float((scores > OUTLIER * scores.mean()).double().mean())
    expected = owl_ratios(shares, 0.6)
    for layer in report.layers:
        ratio = expected[layer.name.partition(".self_attn")[0].partition(".mlp")[0]]
        assert layer.sparsity == pytest.approx(ratio, abs=5e-3), layer.name
    assert report.sparsity == pytest.approx(0.6, abs=5e-3)


def test_an_interrupted_run_does_not_count_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {
        "method": SparseGPT(Sparsity(0.6)),
        "allocation": "owl",
        "calibration": TEXT,
    }
    prune_checkpoint(llama, tmp_path / "whole", **arguments)
    cut = OSError("the plug is pulled")
    with monkeypatch.context() as interrupted:
        interrupted.setattr(pipeline, "compress_block", lambda *_: (_ for _ in ()).throw(cut))
        with pytest.raises(OSError, match="pulled"):
            prune_checkpoint(llama, tmp_path / "twice", **arguments)
    monkeypatch.setattr(pipeline, "outliers", lambda *_: pytest.fail("counted again"))
    prune_checkpoint(llama, tmp_path / "twice", **arguments)
    whole, twice = tensors(tmp_path / "whole"), tensors(tmp_path / "twice")
    assert all(torch.equal(whole[name], twice[name]) for name in whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"allocation": "best"}, "must be one of uniform, owl, global"),
        ({"allocation": "owl"}, "owl counts outliers with text"),
        ({"allocation": "global", "method": Magnitude(Sparsity(pattern=(2, 4)))}, "for a ratio"),
        ({"allocation": "global", "method": Magnitude(Sparsity(0.999))}, "a global threshold"),
        ({"allocation": "owl", "calibration": TEXT, "method": Magnitude(Sparsity(0.01))}, "room"),
    ],
)
def test_bad_input(llama: Path, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        prune_checkpoint(
            llama, tmp_path / "out", **({"method": Magnitude(Sparsity(0.5))} | arguments)
        )
    assert not (tmp_path / "out").exists()
