"""What all runs from folder to folder have in common: the text, what makes two runs one, and the
way to the first block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tersor.blocks import Flow
from tersor.calibrate import Calibration, digest, load_tokenizer
from tersor.checkpoint import check_finite
from tersor.devices import peak_bytes
from tersor.errors import TersorError
from tersor.progress import Progress
from tersor.report import REPORT, TIMINGS, Report, Timings
from tersor.shards import ShardWriter
from tersor.source import Source

OUTSIDE_BYTES = 1 << 30  # of tensors outside the blocks that are written together


def text_windows(source: Source, calibration: Calibration, fewer: bool = False) -> Tensor:
    """The token ids, int64 [samples, seq_len], checked against the model. fewer: see
    Calibration.windows."""
    if not isinstance(calibration, Calibration):
        raise TersorError(
            f'calibration is a Calibration, such as Calibration(("text.txt",)), not a '
            f"{type(calibration).__name__}"
        )
    windows = calibration.windows(load_tokenizer(source.checkpoint.folder), source.context, fewer)
    vocabulary = source.model.get_input_embeddings().num_embeddings
    if int(windows.max()) >= vocabulary:
        raise TersorError(
            f"the tokenizer gives token {int(windows.max())}, but the model has {vocabulary} "
            f"embeddings; the tokenizer files in {source.checkpoint.folder} are of another model"
        )
    return windows


def describe(calibration: Calibration | None, windows: Tensor | None) -> dict[str, Any] | None:
    """The text, for a report; None where none was used."""
    if calibration is None or windows is None:
        return None
    return {
        "sources": list(calibration.sources) or "texts in memory",
        "samples": windows.shape[0],
        "seq_len": windows.shape[1],
        "seed": calibration.seed,
        "bos": calibration.bos,
        "tokens": windows.numel(),
        "sha256": digest(windows),
    }


def identity(report: Report) -> dict[str, Any]:
    """What two runs must have in common for one to continue the other."""
    text = {k: v for k, v in (report.calibration or {}).items() if k != "sources"}
    return {
        **report.settings,
        "model": report.fingerprint,
        **{f"calibration {key}": value for key, value in text.items()},
        **{f"version of {key}": value for key, value in report.versions.items()},
    }


@dataclass(kw_only=True)
class Run:
    """The work between the checks and the last rename. Whatever a commit covers is durable and is
    passed over when the run is started again."""

    source: Source
    writer: ShardWriter
    bar: Progress
    timings: Timings = field(default_factory=Timings)

    def write_outside(self, tables: bool = True) -> None:
        """Copies the tensors that are in no block, some at a time. tables: see Source.outside."""
        for number, part in enumerate(self.source.outside(OUTSIDE_BYTES, tables)):
            key = f"outside {number}"
            if key in self.writer.done:
                continue
            self.bar.say("copying what is outside the blocks")
            with self.timings.stage("copy"):
                for name in part:
                    tensor = self.source.checkpoint.load(name)
                    check_finite(name, tensor)
                    self.writer.add(name, tensor)
                nbytes = sum(self.source.checkpoint.metadata(name).nbytes for name in part)
                self.writer.commit(key, {"bytes": nbytes}, quick=True)

    def begin(self, windows: Tensor, key: str, hidden: Callable[[int], str]) -> Flow:
        """The text at the first block, or where an interrupted run has left it.

        key: of the commit after which what enters the first block is on disk. hidden: the name of
        the file with what enters a block."""
        self.bar.say("the text up to the first block")
        with self.timings.stage("run"), self.source.loaded(self.source.before()):
            flow = Flow(
                self.source.model,
                self.source.blocks,
                windows,
                lambda number: self.writer.state_path(hidden(number)),
                self.bar.step,
                self.source.device,
            )
            if key not in self.writer.done:
                self.writer.commit(key, {"bytes": 0}, {hidden(0): flow.enter()}, quick=True)
        return flow

    def complete(
        self, report: Report, keys: Iterable[str], config: Mapping[str, Any], strict: bool
    ) -> None:
        """Adds to the report what was recorded under each of the keys, which come as the work is
        done, and puts the checkpoint together. config: its config.json. strict: raise TersorError
        as soon as a module is not treated as asked."""
        for key in keys:
            report.add(self.writer.done[key])
            if strict:
                report.require_strict()
        report.bytes_after = self.nbytes
        timings = self.timings.to_json(peak_bytes(self.source.device))
        files = {REPORT: report.to_json(), TIMINGS: timings}
        self.writer.finish(config, self.source.checkpoint.folder, files)

    @property
    def nbytes(self) -> int:
        """Of all tensors that were committed."""
        return sum(info["bytes"] for info in self.writer.done.values())
