"""What pruning costs the demo model: the order of the methods, by layer and from end to end."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import pytest

from conftest import all_cores
from tersor import demo
from tersor.calibrate import Calibration, load_tokenizer
from tersor.demo_model import DemoModel, Recipe, split_documents
from tersor.demo_training import Training, fine_tune
from tersor.evaluate import Quality, evaluate
from tersor.layerwise import Solver
from tersor.loading import load
from tersor.pipeline import prune_checkpoint, quantize_checkpoint
from tersor.qweight import QSpec, Scheme
from tersor.solvers import RTN, Magnitude, SparseGPT, Wanda
from tersor.sparsity import Sparsity
from tersor.surgery.shrink import shrink_checkpoint

WINDOWS = 120  # 30 720 tokens that the model was not trained on
INT4 = Scheme(QSpec(4))
TUNING = Training(steps=40, warmup=5, muon=0.004, adamw=0.0015, seed=1)
HALF, TWO_OF_FOUR = Sparsity(0.5), Sparsity(pattern=(2, 4))


def methods(sparsity: Sparsity) -> dict[str, Solver]:
    return {
        "magnitude": Magnitude(sparsity),
        "wanda": Wanda(sparsity),
        "sparsegpt": SparseGPT(sparsity),
        "refit": SparseGPT(sparsity, refit=True),
    }


class Pruned:
    """Median relative layer errors and qualities, by sparsity and method."""

    def __init__(self) -> None:
        self.error: dict[tuple[str, str], float] = {}
        self.quality: dict[tuple[str, str], Quality] = {}

    def delta(self, sparsity: Sparsity, name: str) -> float:
        delta = self.quality[str(sparsity), name].delta
        assert delta is not None
        return delta.mean

    def kl(self, sparsity: Sparsity, name: str) -> float:
        kl = self.quality[str(sparsity), name].kl
        assert kl is not None
        return kl.mean


@pytest.fixture(scope="module")
def pruned(demo_model: DemoModel, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    folder, found = tmp_path_factory.mktemp("pruned"), Pruned()
    text = Calibration((str(demo_model.calibration),), samples=48, seq_len=demo.WINDOW)
    outs: dict[tuple[str, str], Path] = {}

    def prune(sparsity: Sparsity, name: str, method: Solver, scheme: Scheme | None = None) -> None:
        key = str(sparsity), name
        outs[key] = folder / f"{sparsity}-{name}".replace(" ", "")
        report = prune_checkpoint(
            demo_model.folder, outs[key], method=method, scheme=scheme, calibration=text
        )
        assert report.sparsity >= sparsity.zeros - 1e-3
        found.error[key] = median(layer.error for layer in report.layers)

    with all_cores():
        for sparsity in (HALF, TWO_OF_FOUR):
            for name, method in methods(sparsity).items():
                prune(sparsity, name, method)
        prune(TWO_OF_FOUR, "joint refit", SparseGPT(TWO_OF_FOUR, refit=True), INT4)
        rounded = folder / "rounded"
        quantize_checkpoint(outs["2:4", "sparsegpt"], rounded, scheme=INT4, method=RTN())
        outs["2:4", "rounded"] = rounded
        windows = demo.held_out_windows(demo_model)["code"][:WINDOWS]
        original = demo.original(demo_model)
        for key, out in outs.items():
            quantized = "quantization_config" in (out / "config.json").read_text()
            made = DemoModel(out, demo_model.calibration, demo_model.held_out, {})
            model = load(out) if quantized else demo.original(made)
            both = {"original": original, "pruned": model}
            found.quality[key] = evaluate(both, windows, baseline="original", batch=8)["pruned"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR], ids=str)
def test_the_order_of_layer_errors(pruned: Pruned, sparsity: Sparsity) -> None:
    errors = [pruned.error[str(sparsity), name] for name in methods(sparsity)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize(("sparsity", "bar"), [(HALF, 0.5), (TWO_OF_FOUR, 0.6)], ids=str)
def test_sparsegpt_costs_a_part_of_what_magnitude_does(
    pruned: Pruned, sparsity: Sparsity, bar: float
) -> None:
    assert 0 < pruned.delta(sparsity, "sparsegpt") <= bar * pruned.delta(sparsity, "magnitude")
    assert pruned.kl(sparsity, "refit") < pruned.kl(sparsity, "sparsegpt")


@pytest.mark.slow
def test_the_joint_pass_costs_less_than_pruning_and_then_rounding(pruned: Pruned) -> None:
    """With the refit. Without it the two are alike: of 2:4 and INT4 it is the zeros that cost."""
    assert pruned.kl(TWO_OF_FOUR, "joint refit") <= 0.8 * pruned.kl(TWO_OF_FOUR, "rounded")


@pytest.mark.slow
def test_what_is_cut_out_costs_less_with_text_and_least_squares(
    demo_model: DemoModel, tmp_path: Path
) -> None:
    text = Calibration((str(demo_model.calibration),), samples=16, seq_len=demo.WINDOW)

    def kl(**settings: Any) -> float:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        shrink_checkpoint(demo_model.folder, out, calibration=text, **settings)
        small = demo.original(DemoModel(out, demo_model.calibration, demo_model.held_out, {}))
        both = {"original": original, "small": small}
        found = evaluate(both, windows, baseline="original", batch=8)["small"].kl
        assert found is not None
        return found.mean

    with all_cores():
        original = demo.original(demo_model)
        windows = demo.held_out_windows(demo_model)["code"][:20]
        cut = kl(ffn=0.5, update="none")
        assert cut < kl(ffn=0.5, importance="magnitude", update="none")
        assert kl(ffn=0.5) < 0.6 * cut
        assert kl(heads=0.5) < 0.8 * kl(heads=0.5, update="none")


@pytest.mark.slow
def test_a_short_fine_tune_brings_half_of_the_loss_back(
    demo_model: DemoModel, tmp_path: Path
) -> None:
    """Half of the query heads, 25 % of the channels and 2 of 6 blocks; bench/structured.py has a
    model of which 20 % of the heads can go, and what the same steps do to the original."""
    text = Calibration((str(demo_model.calibration),), samples=32, seq_len=demo.WINDOW)
    report = shrink_checkpoint(
        *(demo_model.folder, tmp_path / "small"),
        query_heads=0.5,
        ffn=0.25,
        layers=2,
        multiple=64,
        calibration=text,
    )
    assert report.structure is not None
    tokenizer = load_tokenizer(demo_model.folder)
    _, texts = split_documents(Recipe())
    with all_cores():
        original = demo.original(demo_model)
        small, tuned = (
            demo.original(DemoModel(tmp_path / "small", **_texts(demo_model))) for _ in range(2)
        )
        assert small.num_parameters() == report.structure["parameters_after"]
        tuned.float()
        fine_tune(tuned, tokenizer, texts, TUNING)
        windows = demo.held_out_windows(demo_model)["code"][:60]
        models = {"original": original, "small": small, "tuned": tuned}
        found = evaluate(models, windows, baseline="original", batch=8)
        ids = small.generate(windows[:1, :8], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert ids.shape == (1, 13)
    lost, left = found["small"].delta, found["tuned"].delta
    assert lost is not None and left is not None
    assert lost.mean > 4 * lost.error  # or there is nothing to bring back
    assert left.mean <= 0.5 * lost.mean


def _texts(source: DemoModel) -> dict[str, Any]:
    return {name: value for name, value in vars(source).items() if name != "folder"}
