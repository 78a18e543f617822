"""Tasks through EleutherAI's lm-eval, where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml

from tersor.errors import TersorError

_LARGEST = 1 << 20  # bytes of a task's YAML
_CODE = ("trust_remote_code", "unsafe_code", "hf_evaluate")  # what lets a file's code run
_FOREIGN = "lm-eval would run it; tersor runs code of lm-eval's own, installed tasks alone"


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
    failed: dict[str, str] | None = None,
) -> dict[str, dict[str, float]]:
    """task -> metric -> value, as lm-eval has them: "acc", "acc_stderr" and so on.

    folder: a model, quantized or not. model: what was loaded from it, where it was already.
    tasks: names that lm-eval knows (which it downloads), or YAML files, such as write_tasks makes,
        which need no network where their data are files.
    batch: sequences per forward pass. limit: items of each task, the first ones; all by default.
    failed: is given why each task failed that did, by its name, and the others are measured; None:
        the first failure is raised.
    Raises TersorError where lm-eval is not installed or knows no such task, and for a file that
    names code (see `check`).
    """
    with _prepared(tasks) as (names, manager):
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        from tersor.calibrate import load_tokenizer
        from tersor.loading import load_any

        wrapped = HFLM(
            pretrained=model if model is not None else load_any(folder),
            tokenizer=load_tokenizer(Path(folder)),
            batch_size=batch,
            device="cpu",
            # Where one choice is two tokens and another, behind the first of them, is the second
            # alone, lm-eval 0.4.13 reads the shorter one's probability from the wrong place of its
            # cache.
            logits_cache=False,
        )
        scores: dict[str, dict[str, float]] = {}
        for name in names:
            try:
                found = lm_eval.simple_evaluate(
                    model=wrapped,
                    tasks=[name],
                    task_manager=manager,
                    limit=limit,
                    log_samples=False,
                )
            except Exception as error:  # of a download, of the task's data, of the model
                if failed is None:
                    raise
                failed[name] = f"{type(error).__name__}: {error}"
                continue
            scores |= {task: _metrics(values) for task, values in found["results"].items()}
        return scores


def check(tasks: Sequence[str | Path]) -> list[str]:
    """The names of the tasks. For before the work as well.

    Files may include others of their folder. lm-eval's YAML can name Python functions, which it
    imports from beside the file (`!function`), let the code of data sets or of metrics run
    (trust_remote_code, unsafe_code, hf_evaluate; a metric that it does not know it downloads): all
    that is refused, and templates are rendered in a sandbox.
    Raises TersorError as lm_eval_tasks does.
    """
    with _prepared(tasks) as (names, _):
        return names


@contextmanager
def _prepared(tasks: Sequence[str | Path]) -> Iterator[tuple[list[str], Any]]:
    """The names of the tasks, and lm-eval's manager that has them: of files what was checked, from
    a folder of its own, so that nothing else is taken from where they lie."""
    require()
    paths = {str(task): Path(task) for task in tasks if Path(task).suffix in (".yaml", ".yml")}
    files = {given: task_of(path) for given, path in paths.items()}
    names = [files[str(task)]["task"] if str(task) in files else str(task) for task in tasks]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise TersorError(f"the task {twice} is given twice; leave one out, or rename it")

    importlib.import_module("lm_eval.api.metrics")  # which registers them
    from lm_eval.api.registry import METRIC_REGISTRY
    from lm_eval.tasks import TaskManager

    for given, content in files.items():
        for each in content.get("metric_list") or ():
            if each["metric"] not in METRIC_REGISTRY:
                raise TersorError(
                    f"{given}: lm-eval has no metric {each['metric']!r} and would download one as "
                    "code; use one of its own"
                )
    with tempfile.TemporaryDirectory(prefix="tersor-tasks-") as scratch:
        for number, content in enumerate(files.values()):
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
            Path(scratch, f"{number}.yaml").write_text(text, encoding="utf-8")
        manager = TaskManager(
            include_path=[scratch] if files else None,
            include_defaults=len(files) < len(tasks),  # an index of thousands, which takes seconds
        )
        if unknown := sorted(set(names) - set(manager.all_tasks)):
            raise TersorError(
                f"lm-eval knows no task {unknown[0]}; give one that `lm_eval ls tasks` lists, or a "
                "file"
            )
        with _sandbox() if files else nullcontext():
            yield names, manager


@contextmanager
def _sandbox() -> Iterator[None]:
    """Meanwhile lm-eval renders the templates of tasks, which are Jinja, where they cannot reach
    Python."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    before = utils.env
    utils.env = SandboxedEnvironment(
        loader=before.loader,
        undefined=before.undefined,
        keep_trailing_newline=before.keep_trailing_newline,
    )
    utils.env.filters.update(before.filters)
    try:
        yield
    finally:
        utils.env = before


def task_of(path: Path) -> dict[str, Any]:
    """What a YAML file says of a task, with what it includes. TersorError for one that names code,
    or that is no task."""
    content = _with_included(path, path.resolve().parent, ())
    if not isinstance(content.get("task"), str):
        raise TersorError(f"{path} has no line `task: NAME`; give a task of lm-eval")
    if str(content.get("dataset_path")).endswith(".py"):
        raise TersorError(f"{path}: dataset_path is a Python file: {_FOREIGN}; use data files")
    if "class" in content or "group" in content:
        raise TersorError(f"{path} is a class or a group; give the YAML files of single tasks")
    metrics = content.get("metric_list") or []
    if not isinstance(metrics, list) or not all(
        isinstance(each, dict) and isinstance(each.get("metric"), str) for each in metrics
    ):
        raise TersorError(f"{path}: metric_list is a list of {{metric: NAME}}; correct it")
    return content


def _with_included(path: Path, home: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A file's content over that of the files it includes, as lm-eval merges them. home: the folder
    that they must be in; above: the files that include it."""
    content = _read(path)
    included = content.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        if not isinstance(name, str):
            raise TersorError(f"{path}: include is the name of a file, not {name!r}")
        other = (path.parent / name).resolve()
        if not other.is_relative_to(home):
            raise TersorError(
                f"{path} includes {name}, which is not in its folder; copy that there"
            )
        if other in (path.resolve(), *above):
            raise TersorError(f"{path} includes itself; leave that out")
        merged |= _with_included(other, home, (path.resolve(), *above))
    return merged | content


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise TersorError(f"there is no task file {path}; check the path")
    try:
        if path.stat().st_size > _LARGEST:
            raise TersorError("is too large for a task; give lm-eval's YAML, not its data")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except TersorError as error:
        raise TersorError(f"{path} {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        cause = " ".join(str(error).split())
        raise TersorError(f"{path} is not YAML that can be read ({cause})") from None
    if not isinstance(content, dict):
        raise TersorError(f"{path} has no line `task: NAME`; give a task of lm-eval")
    if (code := _code_in(content)) is not None:
        raise TersorError(f"{path} sets {code}, by which code is run: {_FOREIGN}; leave it out")
    return content


class _Loader(yaml.SafeLoader):
    """Refuses the tag by which lm-eval imports a function."""


def _function(loader: Any, node: Any) -> Any:
    raise TersorError(f"names a Python function (!function {node.value}): {_FOREIGN}; leave it out")


_Loader.add_constructor("!function", _function)


def _code_in(content: Any) -> str | None:
    """A key, at any depth, that lets code run and is not false."""
    left, seen = [content], set()
    while left:
        each = left.pop()
        if id(each) in seen:  # an alias, of which YAML can make very many
            continue
        seen.add(id(each))
        if isinstance(each, dict):
            for key in _CODE:
                if each.get(key) not in (False, None):
                    return key
            left += each.values()
        elif isinstance(each, list):
            left += each
    return None


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """The numbers, without the name of lm-eval's standard filter."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and "," in name
    }
