"""The demo model: how it is made and kept; and on it, what quantization costs."""

from __future__ import annotations

import json
import math
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import all_cores
from tersor import demo, demo_training
from tersor import demo_model as dm
from tersor.demo_training import Muon, Training, orthogonal
from tersor.errors import TersorError
from tersor.evaluate import Quality, evaluate
from tersor.loading import load

TINY = dm.Recipe(
    vocabulary=300,
    held_out=5000,
    calibration=4000,
    training=Training(
        hidden=32,
        intermediate=48,
        layers=1,
        heads=2,
        key_value_heads=1,
        length=16,
        batch=2,
        steps=3,
    ),
)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A cache of its own, and a small library in place of Python's."""
    texts = [f"def function_{i}(x):\n    return x + {i}\n" * 20 for i in range(40)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dm, "library_documents", lambda: texts)
    return texts


def test_texts_are_kept_apart(library: list[str]) -> None:
    made = dm.demo_model(TINY, say=lambda line: None)
    code, calibration, prose = (
        path.read_text()
        for path in (made.held_out["code"], made.calibration, made.held_out["prose"])
    )
    assert (len(code), len(prose), len(calibration)) == (5000, 5000, 4000)
    held_out = [text for text in library if text[:30] in code]
    assert held_out
    assert code == "\n\n".join(library)[:5000]
    assert not any(text[:30] in calibration for text in held_out)
    assert made.folder.joinpath("config.json").is_file()
    assert made.record["steps"] == made.record["steps_planned"] == 3


def test_a_cached_model_is_taken_and_a_damaged_one_made_again(
    library: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    made = dm.demo_model(TINY, said.append)
    weights = (made.folder / "model.safetensors").read_bytes()
    with monkeypatch.context() as no_training:
        no_training.setattr(dm, "train", lambda *args: pytest.fail("trained again"))
        assert dm.demo_model(TINY, said.append) == made
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            dm.demo_model(replace(TINY, held_out=4900), said.append)
    assert not any("damaged" in line for line in said)

    (made.folder / "model.safetensors").write_bytes(weights[:-1] + b"\0")
    again = dm.demo_model(TINY, said.append)
    assert any("damaged" in line for line in said)
    # The seeds make it the same model on the same machine.
    assert (again.folder / "model.safetensors").read_bytes() == weights


def test_an_interrupted_training_leaves_nothing_that_looks_whole(
    library: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(dm, "save_model", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            dm.demo_model(TINY, say=lambda line: None)
    assert not entries(tmp_path)
    dm.demo_model(TINY, say=lambda line: None)


def entries(cache: Path) -> list[str]:
    """Names in the cache, but for the locks that processes wait for each other with."""
    found = (entry.name for entry in (cache / "tersor").iterdir())
    return [name for name in found if not name.endswith(".lock")]


def test_of_two_that_want_it_at_once_one_trains(library: list[str], tmp_path: Path) -> None:
    made: list[dm.DemoModel] = []
    said: list[str] = []
    barrier = threading.Barrier(2)

    def want() -> None:
        barrier.wait(60)
        made.append(dm.demo_model(TINY, said.append))

    threads = [threading.Thread(target=want) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2 and made[0].folder == made[1].folder
    assert sum(line.startswith("Training") for line in said) == 1
    assert entries(tmp_path) == [made[0].folder.parent.name]
    manifest = json.loads((made[0].folder.parent / "manifest.json").read_text())
    assert made[0].record == made[1].record == manifest["record"]


def test_python_without_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dm.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(TersorError, match="has 0 Python files, too few to train"):
        dm.library_documents()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(TersorError, match="comes without pydoc_data"):
        dm.help_topics()


def test_the_library_is_text_of_one_kind_in_a_fixed_order() -> None:
    documents = dm.library_documents()
    assert documents == dm.library_documents()
    assert sum(map(len, documents)) > 3_000_000  # more than the training reads
    assert sum(map(len, dm.help_topics())) > dm.Recipe().held_out


def test_the_clock_ends_the_training_with_its_schedule(
    library: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the steps fit: the learning rate falls to zero all the same."""
    clock = SimpleNamespace(now=0.0)
    rates: list[float] = []
    monkeypatch.setattr(demo_training.time, "perf_counter", lambda: clock.now)

    def step(self: Muon, rate: float) -> None:
        clock.now += 1.0
        rates.append(rate)

    monkeypatch.setattr(Muon, "step", step)
    tokenizer = demo_training.train_tokenizer(library, 300)
    recipe = replace(TINY.training, steps=20, seconds=10.0, warmup=1, muon=1.0)
    _, record = demo_training.train(tokenizer, library, recipe)
    assert (record["steps"], record["steps_planned"]) == (10, 20)
    assert rates == pytest.approx([1 - done / 10 for done in range(10)])

    said: list[str] = []
    dm.demo_model(replace(TINY, training=recipe), said.append)
    assert "after 10 of 20 steps" in said[-1] and "to train it again" in said[-1]
    again: list[str] = []
    dm.demo_model(replace(TINY, training=recipe), again.append)  # out of the cache
    assert again == said[-1:]


def test_muon_updates_are_nearly_orthogonal() -> None:
    x = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    got = orthogonal(x)
    # The same singular vectors; the quintic takes singular values of (0, 1] into [0.68, 1.21].
    along = u.mT @ got @ v.mT
    values = along.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6
    assert values.max() < 1.25
    assert (along - torch.diag_embed(values)).abs().max() < 1e-4
    assert s.max() / s.min() > 2


# --- what quantization costs on the trained model ------------------------------------------------

WINDOWS = 240  # of each text: 122 880 tokens in all


@pytest.fixture(scope="module")
def qualities(
    demo_model: dm.DemoModel, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Quality]]:
    """By text and method; beside them the quality of gptq with rtn as the baseline."""
    with all_cores():
        models = {demo.BASELINE: demo.original(demo_model)}
        for name, (method, bits) in demo.METHODS.items():
            out = tmp_path_factory.mktemp("demo") / "out"
            demo.quantize(demo_model, out, method, bits)
            models[name] = load(out)
        found = {}
        for text, windows in demo.held_out_windows(demo_model).items():
            part = windows[:WINDOWS]
            found[text] = evaluate(models, part, baseline=demo.BASELINE, batch=8)
            for bits in (4, 3):
                pair = {name: models[name] for name in (f"rtn INT{bits}", f"gptq INT{bits}")}
                paired = evaluate(pair, part, baseline=f"rtn INT{bits}", batch=8)
                found[text][f"gptq INT{bits} - rtn"] = paired[f"gptq INT{bits}"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("text", ["code", "prose"])
@pytest.mark.parametrize("bits", [4, 3])
def test_gptq_costs_less_than_rounding(
    qualities: dict[str, dict[str, Quality]], text: str, bits: int
) -> None:
    """On text that it was not calibrated on, of the same kind and of another."""
    # Perplexity is judged on the kind of text that the model has learnt. On another kind its
    # predictions are poor, and moving the weights in any direction may improve them by chance; the
    # distance from the original cannot shrink by chance.
    of = qualities[text]
    rtn, gptq, paired = (
        of[name.format(bits)] for name in ("rtn INT{}", "gptq INT{}", "gptq INT{} - rtn")
    )
    assert gptq.windows == WINDOWS
    assert paired.delta is not None
    assert rtn.delta is not None
    assert gptq.delta is not None
    assert rtn.kl is not None
    assert gptq.kl is not None
    # Three standard errors: chance would do it once in 700.
    if text == "code":
        assert paired.delta.mean < -3 * paired.delta.error
        assert gptq.delta.mean < rtn.delta.mean
    assert gptq.kl.mean < rtn.kl.mean - 3 * math.hypot(gptq.kl.error, rtn.kl.error)
    assert gptq.kl_99 < rtn.kl_99
    assert gptq.top1 > rtn.top1


@pytest.mark.slow
def test_the_trained_model_has_learnt(qualities: dict[str, dict[str, Quality]]) -> None:
    """A unigram model of the same text has a perplexity of several hundred."""
    assert qualities["code"][demo.BASELINE].perplexity.mean < 120
    assert qualities["prose"][demo.BASELINE].perplexity.mean < 300
