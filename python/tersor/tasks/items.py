"""What a task is made of, and the files that hold one: NAME.jsonl, an item a line, and NAME.yaml,
which tells lm-eval how to read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from tersor.corpus import check_characters
from tersor.durable import durable
from tersor.errors import TersorError


@dataclass(frozen=True)
class Item:
    """A context, several texts that may go on from it, and which of them does.

    Nothing is put between context and choice: a space, or the end of a line, is part of either.
    """

    context: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or not all(self.choices):
            raise TersorError("an item needs two choices at the least, and none that is empty")
        if len(set(self.choices)) < len(self.choices):
            raise TersorError("two choices of an item are the same; each must differ")
        if not 0 <= self.answer < len(self.choices):
            raise TersorError(
                f"the answer is {self.answer}, and the choices are 0 to {len(self.choices) - 1}"
            )


@dataclass(frozen=True)
class Task:
    """name: of letters, digits, "-" and "_", as it is also a file's."""

    name: str
    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "-_" for c in self.name):
            raise TersorError(f"{self.name!r} is no name of a task; use letters, digits, - and _")
        if not self.items:
            raise TersorError(f"the task {self.name} has no items; give it some")


def write_tasks(tasks: Sequence[Task], folder: str | Path) -> list[Path]:
    """Writes two files for each task into a folder, which is made if need be; returns the YAML
    ones. lm-eval reads them without a network: lm_eval --include_path FOLDER --tasks NAME."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for task in tasks:
        data = folder / f"{task.name}.jsonl"
        with durable(data) as file:
            for item in task.items:
                file.write(json.dumps(asdict(item), ensure_ascii=False).encode() + b"\n")
        metrics = [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ]
        content = {
            "task": task.name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "num_fewshot": 0,
            "metric_list": metrics,
            "metadata": {"version": 1.0},
        }
        written.append(folder / f"{task.name}.yaml")
        with durable(written[-1]) as file:
            file.write(yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())
    return written


def read_task(path: str | Path) -> Task:
    """A task from its JSON Lines, named after the file. TersorError names the line that is none."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # no other character ends a line
    except (OSError, UnicodeDecodeError) as error:
        raise TersorError(f"cannot read {path} ({error}); give a task as JSON Lines") from None
    items = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                items.append(_item(json.loads(line)))
            except (ValueError, RecursionError) as error:  # TersorError is a ValueError
                raise TersorError(f"{path}, line {number}: {error}") from None
    return Task(path.stem, tuple(items))


def _item(record: Any) -> Item:
    match record:
        case {"context": str(context), "choices": [*choices], "answer": int(answer)} if all(
            isinstance(choice, str) for choice in choices
        ) and not isinstance(answer, bool):
            for text in (context, *choices):
                check_characters(text, "a text")
            return Item(context, tuple(choices), answer)
    raise TersorError(
        'no item; each is {"context": TEXT, "choices": [TEXT, ...], "answer": NUMBER FROM 0}'
    )
