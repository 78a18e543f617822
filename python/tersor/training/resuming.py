"""Where a Trainer goes on after it was stopped, so that it ends as one that never was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class NoneAtTheEnd(TrainerCallback):
    """No checkpoint after the last step, from which a Trainer would go on with one more. The best
    of all checkpoints may be that one, so where the Trainer looks for it, it stays."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and not args.load_best_model_at_end:
            control.should_save = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)


def discard_unfinished(folder: Path) -> None:
    """Removes what was being written when a run stopped, which would only take the disk's room."""
    for path in folder.glob("checkpoint-*"):
        if not _is_json(path / "trainer_state.json"):
            shutil.rmtree(path)


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint of a Trainer in its folder that is whole: the state is what it writes
    last. None where there is none."""
    states = folder.glob("checkpoint-*/trainer_state.json")
    found = [path.parent for path in states if _is_json(path)]
    return str(max(found, key=lambda p: int(p.name.rpartition("-")[2]))) if found else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):  # none, or a machine that went down while it was written
        return False
    return True
