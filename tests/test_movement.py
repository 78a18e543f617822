"""Which weights can go is learned from the task: movement against magnitude on the demo model."""

from __future__ import annotations

import pytest
import torch

from conftest import all_cores
from tersor.demo_model import DemoModel
from tersor.demo_task import KINDS, Excerpts, accuracy, batches, classifier, excerpts, kinds
from tersor.pruning import Schedule
from tersor.sparsity import Sparsity
from tersor.training.masking import MaskTraining

STEPS, SCHEDULE = 40, Schedule(warmup=4, ramp=24, cooldown=12)


def test_kinds_of_characters() -> None:
    source = "def f(a, b=1):  # why\n    return g(a.b, c='x')\n"
    found = kinds(source)
    assert len(found) == len(source) and set(found) <= set(KINDS)
    seen = {
        "def": "keyword",
        "f": "defined",
        "1": "number",
        "# why": "comment",
        "g(": "called",
        ".b": "operator",
        "b,": "attribute",
        "c=": "argument",
        "'x'": "string",
    }
    for text, kind in seen.items():
        assert found[source.rindex(text)] == kind, text


@pytest.fixture(scope="module")
def data(demo_model: DemoModel) -> tuple[Excerpts, Excerpts]:
    return excerpts(demo_model, 32)


def test_excerpts(data: tuple[Excerpts, Excerpts]) -> None:
    train, held_out = data
    assert train.ids.shape == train.labels.shape and train.ids.shape[1] == 32
    assert 0.2 < len(held_out) / (len(train) + len(held_out)) < 0.3
    for part in data:
        assert sorted(set(part.labels.flatten().tolist())) == list(range(len(KINDS)))


def fine_tuned(
    model: DemoModel,
    data: tuple[Excerpts, Excerpts],
    criterion: str,
    seed: int,
    rate: float,
    frozen: bool,
) -> float:
    """Accuracy on held-out text. frozen: all weights but those of the head."""
    network = classifier(model, seed, layers=2).train()
    masks = MaskTraining(Sparsity(0.85), SCHEDULE, criterion).attach(network)
    if frozen:
        network.model.requires_grad_(False)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, rate)
    for batch in batches(data[0], STEPS, 16, seed):
        network(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.step()
    assert masks.finish().sparsity == pytest.approx(0.85, abs=1e-4)
    return accuracy(network, Excerpts(data[1].ids[:400], data[1].labels[:400]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_movement_is_better_where_weights_stay_near_where_they_were(
    seed: int, demo_model: DemoModel, data: tuple[Excerpts, Excerpts]
) -> None:
    """As in fine-tuning at a usual rate (Sanh et al. have 3e-5), where magnitudes say what mattered
    before; and, at the better of two rates for each, where weights do not move at all. At rates so
    high that weights move as far as they are large, magnitudes tell as much: see bench/movement.py.
    """
    with all_cores():

        def accuracy_of(criterion: str, rate: float, frozen: bool) -> float:
            return fine_tuned(demo_model, data, criterion, seed, rate, frozen)

        def best(criterion: str) -> float:
            return max(accuracy_of(criterion, rate, True) for rate in (3e-3, 1e-2))

        assert accuracy_of("movement", 1e-4, False) > accuracy_of("magnitude", 1e-4, False)
        assert best("movement") > best("magnitude")
