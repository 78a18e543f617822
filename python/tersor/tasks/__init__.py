"""Downstream tasks of multiple choice: made from text at hand, scored here or by lm-eval."""

from tersor.tasks.items import Item, Task, read_task, write_tasks
from tersor.tasks.local import local_tasks
from tersor.tasks.scoring import Score, run_tasks, table, to_dict

__all__ = [
    "Item",
    "Score",
    "Task",
    "local_tasks",
    "read_task",
    "run_tasks",
    "table",
    "to_dict",
    "write_tasks",
]
