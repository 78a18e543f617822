"""How long and how fast a model is trained."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tersor.errors import TersorError

PRECISIONS = ("float32", "bfloat16")
SCHEDULES = ("linear", "cosine", "constant_with_warmup")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What transformers.Trainer is told.

    steps: of the optimizer. batch: windows in a forward pass; accumulate: passes in a step.
    seq_len: tokens of a window; None: as the calibration has it.
    learning_rate: its peak, reached after the share `warmup` of the steps. schedule: linear, cosine
        or constant_with_warmup. weight_decay, optimizer: as Trainer knows them (`optim`).
    precision: of the matrix products, float32 or bfloat16; weights and sums are float32 always.
    checkpoint_every: steps after which a killed run can go on. seed: of order and dropout.
    """

    steps: int = 200
    batch: int = 8
    accumulate: int = 1
    seq_len: int | None = None
    learning_rate: float = 2e-4
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    optimizer: str = "adamw_torch"
    precision: str = "float32"
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "checkpoint_every"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**31:
                raise TersorError(f"{name} is a whole number from 1 to 2**31 - 1, not {value!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise TersorError(f"seed is a whole number from 0 to 2**32 - 1, not {self.seed!r}")
        rate = self.learning_rate
        if not _number(rate) or not 0 < rate < 10:
            raise TersorError(f"learning_rate is from 0 to 10, such as 2e-4, not {rate!r}")
        if not _number(self.weight_decay) or not 0 <= self.weight_decay < 10:
            decay = self.weight_decay
            raise TersorError(f"weight_decay is from 0 to 10, such as 0.01, not {decay!r}")
        if not _number(self.warmup) or not 0 <= self.warmup < 1:
            raise TersorError(f"warmup is a share of the steps below 1, not {self.warmup!r}")
        if self.precision not in PRECISIONS:
            raise TersorError(f"precision is {' or '.join(PRECISIONS)}, not {self.precision!r}")
        if self.schedule not in SCHEDULES:
            raise TersorError(f"schedule is one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.seq_len is not None and (type(self.seq_len) is not int or self.seq_len < 2):
            raise TersorError(f"seq_len is a number of tokens, 2 or more, not {self.seq_len!r}")

    @property
    def windows(self) -> int:
        """That all the steps read."""
        return self.steps * self.batch * self.accumulate

    def arguments(self, folder: Path) -> Any:
        """transformers.TrainingArguments, with checkpoints in the folder."""
        from transformers import Trainer, TrainingArguments
        from transformers.training_args import OptimizerNames

        names = [name.value for name in OptimizerNames]
        if self.optimizer not in names:
            raise TersorError(
                f"transformers has no optimizer {self.optimizer!r}; it has {', '.join(names)}"
            )
        logged = max(1, self.steps // 100)
        arguments = TrainingArguments(
            str(folder),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch,
            gradient_accumulation_steps=self.accumulate,
            learning_rate=self.learning_rate,
            lr_scheduler_type=self.schedule,
            warmup_steps=math.ceil(self.warmup * self.steps),
            weight_decay=self.weight_decay,
            optim=self.optimizer,
            bf16=self.precision == "bfloat16",
            use_cpu=True,
            seed=self.seed,
            data_seed=self.seed,
            logging_steps=logged,
            # Where a log is due, or its first mean after a resume would be over fewer steps.
            save_steps=-(-self.checkpoint_every // logged) * logged,
            save_total_limit=2,
            report_to=[],
            disable_tqdm=True,
        )
        try:
            Trainer.get_optimizer_cls_and_kwargs(arguments)
        except (ImportError, RuntimeError, ValueError) as error:
            raise TersorError(
                f"the optimizer {self.optimizer} cannot be used here: {error}; install what it "
                "needs, or take adamw_torch"
            ) from error
        return arguments


def plan_of(settings: Any) -> Plan:
    """The fields of a Plan that an object with more fields has."""
    return Plan(**{field.name: getattr(settings, field.name) for field in fields(Plan)})


def plan_settings(plan: Plan) -> dict[str, Any]:
    """For a report: what the result depends on."""
    return {name: value for name, value in asdict(plan).items() if name != "checkpoint_every"}


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
