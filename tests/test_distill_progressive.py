"""Chains of students: who teaches whom, and that a chain goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback

import tiny

pytest.importorskip("accelerate")

from tersor import QSpec, Scheme, TersorError, swap_linears
from tersor.training import Distillation, Features
from tersor.training.losses import SkewedKL
from tersor.training.progressive import by_distillation, progressive
from test_distill_trainer import examples, weights

HOW: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",  # so that fewer steps are the first of more
}


def teacher() -> Any:
    return tiny.model("llama", num_hidden_layers=4)


def distil(**changes: Any) -> Any:
    return by_distillation(Distillation(), examples(), **(HOW | changes))


class KilledError(Exception):
    pass


class Kill(TrainerCallback):
    """After the first step, and its checkpoint."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            raise KilledError


def killed(student: Any, source: Any, folder: Path) -> None:
    way = by_distillation(Distillation(), examples(), {"callbacks": [Kill()]}, **HOW)
    way(student, source, folder)


def test_chain(tmp_path: Path) -> None:
    """Each student is made of, and trained from, the one before, as it was saved."""
    seen = []
    plain = distil()

    def train(student: Any, source: Any, folder: Path) -> None:
        seen.append((weights(student), weights(source)))
        plain(student, source, folder)

    first = teacher()
    last = progressive(first, [3, 1], train, tmp_path / "chain")
    assert sorted(path.name for path in (tmp_path / "chain").iterdir()) == ["stage-1", "stage-2"]
    middle = AutoModelForCausalLM.from_pretrained(tmp_path / "chain" / "stage-1")
    torch.testing.assert_close(seen[0][1], weights(first), rtol=0, atol=0)
    torch.testing.assert_close(seen[1][1], weights(middle), rtol=0, atol=0)
    begun = seen[1][0]["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(begun, middle.model.layers[0].mlp.up_proj.weight)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "chain" / "stage-2")
    torch.testing.assert_close(weights(again), weights(last), rtol=0, atol=0)
    assert not torch.equal(begun, last.model.layers[0].mlp.up_proj.weight)
    assert not last.training and last.config.num_hidden_layers == 1


@pytest.mark.parametrize("stage", [1, 2])
def test_killed(tmp_path: Path, stage: int) -> None:
    """In the training of a stage, after a checkpoint: what is done stays, the rest goes on."""
    whole = progressive(teacher(), [3, 1], distil(), tmp_path / "whole")
    calls: list[int] = []

    def train(student: Any, source: Any, folder: Path) -> None:
        calls.append(student.config.num_hidden_layers)
        way = killed if len(calls) == stage else distil()
        way(student, source, folder)

    with pytest.raises(KilledError):
        progressive(teacher(), [3, 1], train, tmp_path / "again")
    assert (tmp_path / "again" / f"stage-{stage}.training" / "checkpoint-1").is_dir()
    assert (tmp_path / "again" / "stage-1").exists() == (stage == 2)
    calls.clear()
    last = progressive(teacher(), [3, 1], distil(), tmp_path / "again")
    torch.testing.assert_close(weights(last), weights(whole), rtol=0, atol=0)
    assert not list((tmp_path / "again").glob("*.training"))

    def never(student: Any, source: Any, folder: Path) -> None:
        raise AssertionError("all stages are done")

    last = progressive(teacher(), [3, 1], never, tmp_path / "again")
    torch.testing.assert_close(weights(last), weights(whole), rtol=0, atol=0)


def test_begun_with_another_teacher(tmp_path: Path) -> None:
    """A stage that was killed is not gone on with from what another one learnt."""

    with pytest.raises(KilledError):
        progressive(teacher(), [3], killed, tmp_path / "chain")
    begun = tmp_path / "chain" / "stage-1.training"
    other = tiny.model("llama", num_hidden_layers=5)
    with pytest.raises(TersorError, match=r"stage-1\.training was made with another teacher"):
        progressive(other, [3], distil(), tmp_path / "chain")
    with pytest.raises(TersorError, match=r"stage-1\.training was made with another student"):
        progressive(teacher(), [2], distil(), tmp_path / "chain")
    assert (begun / "checkpoint-1").is_dir()
    progressive(teacher(), [3], distil(), tmp_path / "chain")
    begun.mkdir()  # as if it had been killed just after the stage had its name
    progressive(teacher(), [3], distil(), tmp_path / "chain")
    assert not begun.exists()


def test_other_settings_of_the_training(tmp_path: Path) -> None:
    """Are refused for a stage that is begun and for one that is done, by name; but not those that
    change nothing in the result."""

    class Killed:
        def __init__(self, plain: Any) -> None:
            self.settings = plain.settings

        def __call__(self, student: Any, source: Any, folder: Path) -> None:
            killed(student, source, folder)

    with pytest.raises(KilledError):
        progressive(teacher(), [3], Killed(distil()), tmp_path / "chain")
    slower, featured = distil(learning_rate=1e-3, seed=1), {"features": Features(hidden=1.0)}
    with pytest.raises(TersorError, match=r"training was made with another learning_rate, seed;"):
        progressive(teacher(), [3], slower, tmp_path / "chain")
    for other, name in (
        (by_distillation(Distillation("reverse_kl"), examples(), **HOW), "loss"),
        (by_distillation(Distillation(SkewedKL(0.3)), examples(), **HOW), "loss"),
        (by_distillation(Distillation(), examples()[1:], **HOW), "rows"),
        (by_distillation(Distillation(), examples(), featured, **HOW), "features"),
    ):
        with pytest.raises(TersorError, match=rf"training was made with another {name};"):
            progressive(teacher(), [3], other, tmp_path / "chain")
    rarely = {"save_steps": 5, "logging_steps": 7}
    last = progressive(teacher(), [3], distil(**rarely), tmp_path / "chain")
    whole = progressive(teacher(), [3], distil(), tmp_path / "whole")
    torch.testing.assert_close(weights(last), weights(whole), rtol=0, atol=0)
    with pytest.raises(TersorError, match="stage-1 was made with another learning_rate, seed;"):
        progressive(teacher(), [3], slower, tmp_path / "chain")


def test_killed_at_the_end_of_a_stage(tmp_path: Path) -> None:
    """After its last step, and before it has its name: no step is done twice or once more. There
    are more steps than one pass of the data has, and the last one is in the middle of a pass."""
    how: dict[str, Any] = {"max_steps": 3}
    whole = progressive(teacher(), [3], distil(**how), tmp_path / "whole")

    def killed(student: Any, source: Any, folder: Path) -> None:
        distil(**how)(student, source, folder)
        newest = folder / "checkpoint-2" / "trainer_state.json"
        assert newest.exists() and not (folder / "checkpoint-3").exists()
        (folder / "checkpoint-9").mkdir()  # as a machine that goes down leaves it
        (folder / "checkpoint-9" / "trainer_state.json").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        progressive(teacher(), [3], killed, tmp_path / "chain")
    last = progressive(teacher(), [3], distil(**how), tmp_path / "chain")
    torch.testing.assert_close(weights(last), weights(whole), rtol=0, atol=0)


def test_a_student_that_comes_out_quantized(tmp_path: Path) -> None:
    """No folder of transformers holds it, and what was trained is not thrown away."""

    def train(student: Any, source: Any, folder: Path) -> None:
        (folder / "checkpoint-2").mkdir()
        swap_linears(student, Scheme(QSpec(4, 32)))

    with pytest.raises(TersorError, match=r"q_proj quantized.*quantize after the chain"):
        progressive(teacher(), [3], train, tmp_path / "chain")
    assert (tmp_path / "chain" / "stage-1.training" / "checkpoint-2").is_dir()
    assert not (tmp_path / "chain" / "stage-1").exists()


def test_a_stage_that_lacks_weights(tmp_path: Path) -> None:
    progressive(teacher(), [2], distil(), tmp_path / "chain")
    file = tmp_path / "chain" / "stage-1" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(TersorError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        progressive(teacher(), [2], distil(), tmp_path / "chain")


def test_students_of_ones_own(tmp_path: Path) -> None:
    def narrow(source: Any) -> Any:
        return tiny.model("llama", num_hidden_layers=2, hidden_size=32)

    ways = [distil(), distil(learning_rate=1e-3)]
    last = progressive(teacher(), [3, narrow], ways, tmp_path / "chain")
    assert last.config.hidden_size == 32
    with pytest.raises(TersorError, match=r"stage-1 was made with another teacher"):
        progressive(tiny.model("llama", num_hidden_layers=5), [3, narrow], ways, tmp_path / "chain")
    with pytest.raises(TersorError, match=r"stage-1 was made with another student"):
        progressive(teacher(), [2, narrow], ways, tmp_path / "chain")


def test_refusals(tmp_path: Path) -> None:
    for students, train, message in (
        ([], distil(), "a chain needs students"),
        ([2, 3], distil(), "are to become smaller"),
        ([2, 2], distil(), "are to become smaller"),
        ([3, 2], [distil()], "2 students and 1 ways"),
        ([9], distil(), "layers is 9"),
        ([lambda model: model], distil(), "its teacher itself"),
    ):
        with pytest.raises(TersorError, match=message):
            progressive(teacher(), students, train, tmp_path / "chain")
    (tmp_path / "chain" / "stage-1").mkdir(parents=True)
    with pytest.raises(TersorError, match="is no stage of a chain"):
        progressive(teacher(), [2], distil(), tmp_path / "chain")
