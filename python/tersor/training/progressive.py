"""Chains of students, each the teacher of the next: a large gap in small steps (teacher assistants,
Mirzadeh et al., arXiv:1902.03393).

    out/
      stage-1/            the first student, an ordinary checkpoint, and stage.json
      stage-2/            the next one
      stage-3.training/   what the training of a stage keeps until it is done, and stage.json
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedModel, TrainingArguments

from tersor.durable import disk_errors, durable, sync_folder
from tersor.errors import TersorError
from tersor.packed_linear import PackedLinear
from tersor.tensorfile import loose_json
from tersor.training.features import Features
from tersor.training.losses import Distillation
from tersor.training.offline import digest_of_weights
from tersor.training.on_policy import OnPolicy
from tersor.training.resuming import NoneAtTheEnd, last_checkpoint
from tersor.training.students import student_of
from tersor.training.trainer import DistillTrainer

# Trains a student, in place, from a teacher, and may keep what it needs to go on in the folder. If
# it has a method `settings`, what that gives (JSON data, by name) is recorded.
Train: TypeAlias = Callable[[PreTrainedModel, PreTrainedModel, Path], Any]
_STAGE = "stage.json"
# Arguments that the result does not depend on.
_NO_MATTER = {
    *("save_strategy", "save_steps", "save_total_limit", "logging_strategy", "logging_steps"),
    *("report_to", "disable_tqdm"),
}


def progressive(
    teacher: PreTrainedModel,
    students: Sequence[int | Callable[[PreTrainedModel], PreTrainedModel]],
    train: Train | Sequence[Train],
    out: str | Path,
) -> PreTrainedModel:
    """Trains the students one after the other and returns the last one, in evaluation mode.

    students: from large to small; each the number of its teacher's blocks that it keeps (see
        student_of), or a function that makes it of its teacher.
    train: what trains a student, such as by_distillation(...); one for all stages or one for each.
    out: a folder for all stages. Those that are finished there are not done again; one that was
        killed goes on where its `train` can.

    Raises TersorError where a stage that is finished, or was begun, is of another teacher, kind of
    student or settings of by_distillation, where a student comes out of its training quantized, and
    for sizes that do not become smaller.
    """
    if not students:
        raise TersorError("a chain needs students; give their numbers of blocks, such as [6, 4, 2]")
    sizes = [each for each in students if isinstance(each, int)]
    if sorted(set(sizes), reverse=True) != sizes:
        raise TersorError(f"the sizes {sizes} are to become smaller from student to student")
    ways = [train] * len(students) if callable(train) else list(train)
    if len(ways) != len(students):
        raise TersorError(f"there are {len(students)} students and {len(ways)} ways to train them")
    out = Path(out)
    with disk_errors(out.parent):
        out.mkdir(parents=True, exist_ok=True)
    for number, (kind, way) in enumerate(zip(students, ways, strict=True), 1):
        teacher = _stage(teacher, kind, way, out / f"stage-{number}")
    return teacher


def by_distillation(
    distillation: Distillation, train_dataset: Any, given: dict[str, Any] | None = None, **args: Any
) -> Train:
    """For progressive: a DistillTrainer with TrainingArguments(folder, **args), which goes on from
    the last checkpoint in the folder. given: more for the DistillTrainer."""
    return _Distilling(distillation, train_dataset, given or {}, args)


@dataclass(frozen=True)
class _Distilling:
    distillation: Distillation
    train_dataset: Any
    given: dict[str, Any]
    args: dict[str, Any]

    def __call__(self, student: PreTrainedModel, teacher: PreTrainedModel, folder: Path) -> None:
        trainer = DistillTrainer(
            student,
            teacher,
            self.distillation,
            args=TrainingArguments(str(folder), **self.args),
            train_dataset=self.train_dataset,
            **self.given,
        )
        trainer.add_callback(NoneAtTheEnd())
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))

    def settings(self) -> dict[str, Any]:
        """What the result depends on, as JSON data."""
        rows = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
        args = {name: value for name, value in self.args.items() if name not in _NO_MATTER}
        everything = self.distillation.settings() | {"rows": rows} | args | self.given
        return {name: _plain(value) for name, value in everything.items()}


def _stage(teacher: PreTrainedModel, kind: Any, train: Train, folder: Path) -> PreTrainedModel:
    settings = getattr(train, "settings", None)
    made = {
        "teacher": digest_of_weights(teacher),
        "student": kind if isinstance(kind, int) else getattr(kind, "__name__", repr(kind)),
        "training": json.loads(json.dumps(settings())) if callable(settings) else None,
    }
    done = _read(folder)
    work = folder.with_name(f"{folder.name}.training")
    begun = _read(work) if done is None else None
    for place, found in ((folder, done), (work, begun)):
        changed = [] if found is None else _changes(found, made)
        if changed:
            raise TersorError(
                f"{place} was made with another {', '.join(changed)}; use that again, or remove "
                "the folder and the stages after it"
            )
    student = student_of(teacher, kind) if isinstance(kind, int) else kind(teacher)
    if student is teacher:
        raise TersorError("a student is its teacher itself; make a model of its own")
    if done is None:
        if begun is None:
            with disk_errors(folder.parent):
                work.mkdir()
                _write(work, made)
        student.train()
        train(student, teacher, work)
        _check_plain(student, work)
        partial = folder.with_name(f"{folder.name}.partial")
        with disk_errors(folder.parent):
            shutil.rmtree(partial, ignore_errors=True)
            student.save_pretrained(partial)
            _write(partial, made)
            os.rename(partial, folder)
            sync_folder(folder.parent)
    loaded = _load(type(student), folder)
    shutil.rmtree(work, ignore_errors=True)
    return loaded.to(dtype=student.dtype, device=student.device).eval()


def _load(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """TersorError where weights are missing, in whose place transformers puts random ones."""
    model: PreTrainedModel
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"]:
        raise TersorError(
            f"{folder} lacks {sorted(info['missing_keys'])[0]}; let students be models that "
            "from_pretrained reads again, and remove the folder to train the stage anew"
        )
    return model


def _check_plain(student: PreTrainedModel, work: Path) -> None:
    found = next((name for name, m in student.named_modules() if isinstance(m, PackedLinear)), None)
    if found is not None:
        raise TersorError(
            f"the student came out of its training with {found} quantized, and the next one cannot "
            f"be made of it; quantize after the chain (the checkpoints are in {work})"
        )


def _changes(found: dict[str, Any], made: dict[str, Any]) -> list[str]:
    """What a stage was made with otherwise; of its training, where both ways tell settings."""
    changed = [key for key in ("teacher", "student") if found.get(key) != made[key]]
    before, now = found.get("training"), made["training"]
    if before is not None and now is not None:
        names = sorted(before.keys() | now.keys())
        changed += [name for name in names if before.get(name) != now.get(name)]
    return changed


def _plain(value: Any) -> Any:
    """As JSON data: settings by what they say, other things by their kind."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if value is None or isinstance(value, (str, int, float)):
        return value
    return repr(value) if isinstance(value, (Features, OnPolicy)) else type(value).__name__


def _write(folder: Path, made: dict[str, Any]) -> None:
    with durable(folder / _STAGE) as file:
        file.write((json.dumps(made, indent=2) + "\n").encode())


def _read(folder: Path) -> dict[str, Any] | None:
    """What a stage was made of, or None where there is none."""
    if not folder.exists():
        return None
    try:
        return loose_json((folder / _STAGE).read_bytes())
    except (OSError, ValueError) as error:
        raise TersorError(
            f"{folder} is no stage of a chain ({error}); move it away, or choose another folder"
        ) from error
