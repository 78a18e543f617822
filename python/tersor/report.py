"""What a run did, layer by layer: `tersor_report.json` in the output folder.

The report holds nothing that differs between two runs with the same arguments, so that it is the
same, byte for byte, whether or not the run was interrupted. What does differ, the seconds and the
peak of memory, is in `tersor_timings.json` beside it.
"""

from __future__ import annotations

import json
import math
import platform
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.errors import TersorError

if TYPE_CHECKING:
    from rich.table import Table

REPORT = "tersor_report.json"
TIMINGS = "tersor_timings.json"


@dataclass
class LayerReport:
    """One compressed linear.

    error: tr((W - Q) H (W - Q)ᵀ) / tr(W H Wᵀ), the squared error of its outputs relative to the
        outputs, over the calibration tokens; without calibration H is the identity.
    sparsity: share of its weights that are zero.
    tokens: calibration tokens that it read; 0 where there were none.
    bytes: of the tensors that are stored for it, with scales and zero points.
    notes: what a reader should know; nothing here departs from what was asked.
    """

    name: str
    shape: tuple[int, int]
    scheme: str
    method: str
    error: float
    sparsity: float
    tokens: int
    bytes: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        n, k = self.shape
        return 8 * self.bytes / (n * k)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> LayerReport:
        """The inverse of asdict, also after JSON."""
        return cls(**(content | {"shape": tuple(content["shape"])}))


@dataclass
class Report:
    """A whole run.

    fingerprint: of the checkpoint's contents. architecture: where it was found.
    settings: everything that the result depends on, except the checkpoint and the text.
    calibration: sources, number of windows and tokens, and the SHA-256 of the token ids; or None.
    layers: the linears that were compressed, in order.
    kept: modules that were not meant to be, each with the rule or the pattern.
    departures: modules that were not treated as asked, each with the reason.
    bytes_before, bytes_after: of all tensors of the checkpoint.
    structure: of a model that was made smaller (see tersor.surgery), what went and what stayed.
    training: of a model that was trained: steps, tokens, and "log", [step, name -> value].
    """

    model: str
    fingerprint: str
    architecture: str
    settings: dict[str, Any]
    versions: dict[str, str]
    calibration: dict[str, Any] | None
    layers: list[LayerReport] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    departures: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    structure: dict[str, Any] | None = None
    training: dict[str, Any] | None = None

    @property
    def bits_per_weight(self) -> float:
        """Mean over the weights of the layers, with scales and zero points."""
        weights = self._weights
        return 8 * sum(layer.bytes for layer in self.layers) / weights if weights else 0.0

    @property
    def sparsity(self) -> float:
        """Share of the layers' weights that are zero."""
        zeros = sum(layer.sparsity * math.prod(layer.shape) for layer in self.layers)
        return zeros / self._weights if self._weights else 0.0

    @property
    def _weights(self) -> int:
        return sum(math.prod(layer.shape) for layer in self.layers)

    def add(self, block: dict[str, Any]) -> None:
        """What was recorded of a block when it was done: layers, departures, and what stayed."""
        self.layers += [LayerReport.from_dict(layer) for layer in block["layers"]]
        self.departures |= block["departures"]
        if self.structure is not None:
            self.structure["blocks"].append(block["structure"])

    def to_json(self) -> str:
        means = {"bits_per_weight": self.bits_per_weight, "sparsity": self.sparsity}
        content = asdict(self) | means
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Report | None:
        """The report in a folder that tersor wrote; None where there is none.
        TersorError where it is not a report."""
        path = folder / REPORT
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for mean in ("bits_per_weight", "sparsity"):
                content.pop(mean, None)
            layers = [LayerReport.from_dict(layer) for layer in content.pop("layers")]
            return cls(layers=layers, **content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TersorError(
                f"{path} is not a tersor report ({error}); remove it, the model does not need it"
            ) from None

    def require_strict(self) -> None:
        """TersorError naming the modules that were not treated as asked, if there are any."""
        refuse_departures(self.departures)


def refuse_departures(departures: Mapping[str, str]) -> None:
    """TersorError naming the modules, each with the reason, if there are any."""
    count = len(departures)
    if count:
        first = "; ".join(f"{name}: {why}" for name, why in list(departures.items())[:3])
        more = f"; and {count - 3} more" if count > 3 else ""
        raise TersorError(
            f"{count} module{'s were' if count > 1 else ' was'} not treated as asked "
            f"({first}{more}); mend the cause, --ignore them, or leave out --strict"
        )


@dataclass
class Timings:
    """Seconds per stage, and the peak of resident memory, and of a GPU's where one is used. Where a
    run was interrupted and started again, reading, observing and solving count in all its parts,
    the rest in the last one."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add({name: time.perf_counter() - start})

    def add(self, seconds: dict[str, float]) -> None:
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    def to_json(self, gpu_bytes: int | None = None) -> str:
        """gpu_bytes: the peak of a GPU's memory, where one was used."""
        content: dict[str, Any] = {
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "peak_resident_bytes": peak_resident_bytes(),
        }
        if gpu_bytes is not None:
            content["peak_gpu_bytes"] = gpu_bytes
        return json.dumps(content, indent=2) + "\n"


def table(report: Report) -> Table:
    """The relative output error for people: a row for each block, a column for each of its linears,
    of experts the worst."""
    from rich.table import Table

    rows: dict[str, dict[str, float]] = {}
    for layer in report.layers:
        block, column = in_block(layer.name)
        row = rows.setdefault(block, {})
        row[column] = max(layer.error, row.get(column, 0.0))
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    calibrated = any(layer.tokens for layer in report.layers)
    what = "outputs, by what became of the weights" if calibrated else "weights"
    shown = Table(title=f"relative squared error of the {what}")
    shown.add_column("block")
    for column in columns:
        shown.add_column(column.rpartition(".")[2], justify="right")
    for name, row in rows.items():
        shown.add_row(name, *(f"{row[c]:.2e}" if c in row else "" for c in columns))
    return shown


def in_block(name: str) -> tuple[str, str]:
    """The block that a linear is in, "" if in none, and what it is called there, with any expert
    for all of them.

    >>> in_block("model.layers.3.mlp.experts.7.w1")
    ('model.layers.3', 'mlp.experts.*.w1')
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), -1)
    within = ("*" if part.isdecimal() else part for part in parts[at + 1 :])
    return ".".join(parts[: at + 1]), ".".join(within)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, as people write them.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


@dataclass
class Peak:
    """bytes: the most that were resident, known at the end."""

    bytes: int = 0


_LIFE = Peak()
_PEAKS = [_LIFE]  # those that are being watched


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """The most memory that this process holds meanwhile, as Linux counts it; may be nested, and
    disturbs no peak_resident_bytes. Where the system does not let its mark be set back, the most
    that it has ever held."""
    _note()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    _PEAKS.append(peak := Peak())
    try:
        yield peak
    finally:
        _note()
        _PEAKS[:] = [each for each in _PEAKS if each is not peak]


def peak_resident_bytes() -> int:
    """The most memory that this process has held, as Linux counts it."""
    _note()
    return _LIFE.bytes


def _note() -> None:
    mark = _high_water()
    for peak in _PEAKS:
        peak.bytes = max(peak.bytes, mark)


def _high_water() -> int:
    """Bytes. Where the system tells it, of this program alone: ru_maxrss takes in what the process
    held before it became this program."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").split("\n"):
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions() -> dict[str, str]:
    """Of everything that the bits of a result can depend on."""
    names = ("tersor", "torch", "transformers", "tokenizers", "safetensors")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}
