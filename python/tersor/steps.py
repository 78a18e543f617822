"""Steps of a compression as values: settings without the folders that they work on.

    small = Shrink(heads=0.2, ffn=0.25, layers=2)
    report = small("path/to/model", "model-small", text)

Each step reads a checkpoint and writes another one, by the function named in its docstring, whose
arguments are its fields. They are frozen and compare by value, so that a list of them says what was
done to a model.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tersor.calibrate import Calibration
from tersor.layerwise import Solver
from tersor.pipeline import prune_checkpoint, quantize_checkpoint
from tersor.qweight import Scheme
from tersor.report import Report
from tersor.surgery.experts import drop_experts
from tersor.surgery.shrink import shrink_checkpoint
from tersor.surgery.slicing import slice_checkpoint


class Step:
    """What all steps have in common: (model, out, calibration) -> Report, of folders."""

    def __call__(
        self,
        model: str | Path,
        out: str | Path,
        calibration: Calibration | None = None,
        *,
        strict: bool = False,
        progress: bool | None = None,
    ) -> Report:
        """Reads the folder `model`, and makes the folder `out`."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        run = FUNCTIONS[type(self)]
        report: Report = run(
            model, out, calibration=calibration, strict=strict, progress=progress, **settings
        )
        return report


@dataclass(frozen=True)
class Quantize(Step):
    """quantize_checkpoint."""

    scheme: Scheme
    method: str | Solver = "gptq"
    ignore: tuple[str, ...] = ()
    sequential: bool = False


@dataclass(frozen=True)
class Prune(Step):
    """prune_checkpoint."""

    method: Solver
    scheme: Scheme | None = None
    allocation: str = "uniform"
    ignore: tuple[str, ...] = ()
    sequential: bool = False


@dataclass(frozen=True)
class Shrink(Step):
    """shrink_checkpoint."""

    heads: float = 0.0
    query_heads: float = 0.0
    ffn: float = 0.0
    layers: int | tuple[int, ...] = 0
    multiple: int | None = None
    importance: str = "output"
    head_importance: str | None = None
    layer_importance: str = "influence"
    ranking: str = "local"
    update: str = "least-squares"
    damp: float = 0.01


@dataclass(frozen=True)
class Slice(Step):
    """slice_checkpoint."""

    hidden: float
    multiple: int | None = None
    update: str = "least-squares"
    damp: float = 0.01


@dataclass(frozen=True)
class DropExperts(Step):
    """drop_experts."""

    experts: float
    importance: str = "output"


FUNCTIONS: dict[type[Step], Any] = {
    Quantize: quantize_checkpoint,
    Prune: prune_checkpoint,
    Shrink: shrink_checkpoint,
    Slice: slice_checkpoint,
    DropExperts: drop_experts,
}
