"""Tasks through EleutherAI's lm-eval, where it is installed."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tersor.errors import TersorError


def require() -> None:
    """TersorError where lm-eval is not installed. For before the work."""
    if importlib.util.find_spec("lm_eval") is None:
        raise TersorError("tasks need lm-eval, not installed; run pip install tersor[tasks]")


def lm_eval_tasks(
    folder: str | Path,
    tasks: Sequence[str | Path],
    *,
    model: Any = None,
    batch: int = 8,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """task -> metric -> value, as lm-eval has them: "acc", "acc_stderr" and so on.

    folder: a model, quantized or not. model: what was loaded from it, where it was already.
    tasks: names that lm-eval knows (which it downloads), or YAML files, such as write_tasks makes,
        which need no network where their data are files.
    batch: sequences per forward pass. limit: items of each task, the first ones; all by default.
    Raises TersorError where lm-eval is not installed or knows no such task.
    """
    names, manager = check(tasks)

    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from tersor.calibrate import load_tokenizer
    from tersor.loading import load_any

    wrapped = HFLM(
        pretrained=model if model is not None else load_any(folder),
        tokenizer=load_tokenizer(Path(folder)),
        batch_size=batch,
        device="cpu",
        # Where one choice is two tokens and another, behind the first of them, is the second alone,
        # lm-eval 0.4.13 reads the shorter one's probability from the wrong place of its cache.
        logits_cache=False,
    )
    found = lm_eval.simple_evaluate(
        model=wrapped, tasks=names, task_manager=manager, limit=limit, log_samples=False
    )
    return {name: _metrics(values) for name, values in found["results"].items()}


def check(tasks: Sequence[str | Path]) -> tuple[list[str], Any]:
    """The names of the tasks and lm-eval's manager that has them. For before the work as well.
    Raises TersorError as lm_eval_tasks does."""
    require()
    files = [path for task in tasks if (path := Path(task)).suffix in (".yaml", ".yml")]
    for path in files:
        if not path.is_file():
            raise TersorError(f"there is no task file {path}; check the path")
    names = [_name_in(Path(t)) if Path(t) in files else str(t) for t in tasks]

    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=sorted({str(path.parent) for path in files}) or None,
        include_defaults=len(files) < len(tasks),  # an index of thousands, which takes seconds
    )
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise TersorError(
            f"lm-eval knows no task {unknown[0]}; give one that `lm_eval ls tasks` lists, or a file"
        )
    return names, manager


def _name_in(path: Path) -> str:
    """Read as text: lm-eval's YAML may name Python functions, which nothing here should load."""
    found = re.search(r"^task:\s*[\"']?([^\s\"'#]+)", path.read_text(encoding="utf-8"), re.M)
    if found is None:
        raise TersorError(f"{path} has no line `task: NAME`; give a task of lm-eval")
    return found.group(1)


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """The numbers, without the name of lm-eval's standard filter."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and "," in name
    }
