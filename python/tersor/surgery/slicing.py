"""Structured pruning of the hidden width: the residual stream of a checkpoint is rotated once for
all blocks, and what is least of it left out. See tersor.pruning.rotation for the arithmetic."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tersor import _core
from tersor.blocks import Flow, HiddenFile
from tersor.calibrate import Calibration, watching
from tersor.checkpoint import check_finite
from tersor.errors import TersorError
from tersor.models import config_value, empty, parts_of
from tersor.progress import Progress
from tersor.pruning.rotation import (
    Moment,
    Transfer,
    embedding,
    keeping,
    normed,
    principal,
    reading,
    writing,
)
from tersor.report import Report, Timings
from tersor.runs import Run, identity, text_windows
from tersor.shards import ShardWriter, refuse_existing
from tersor.source import Source
from tersor.surgery.smaller import PRUNED, begin_report, is_pruned, parameters
from tersor.surgery.width import UPDATES, Width, check_tokens, settle_slice

OVERFLOW = "rotation made it too large for its dtype: convert the model to bfloat16 or float32"


def slice_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    hidden: float,
    multiple: int | None = None,
    update: str = "least-squares",
    damp: float = 0.01,
    calibration: Calibration | None = None,
    strict: bool = False,
    progress: bool | None = None,
) -> Report:
    """Makes the residual stream of a Hugging Face checkpoint narrower, and writes an ordinary one
    of the same class (SliceGPT, arXiv:2401.15024).

    SliceGPT gives every block a rotation of its own and puts a matrix into every shortcut, which
    needs a class of its own. Here one rotation, the principal components in float64 of what all
    norms put out before their weights, serves the whole model, and no more is needed than other
    numbers in config.json. The norms' weights go into the linears behind them; a head that was tied
    to the embeddings is tied no longer.

    hidden: the share of the channels to cut.
    multiple: what the width that is left is rounded to, up or down; None: what the model's is a
        multiple of, up to 128.
    update: "least-squares" gives what reads the stream the values that come closest to what it
        read in the original model, each block after those before it; "none" cuts.
    damp: of that, as a share of the inputs' mean square.
    calibration: the text. It goes through the original model once, and for least squares once more,
        and twice through the narrower one.
    The rest, and what happens when a run is interrupted, is as in quantize_checkpoint. Beside a
    block of each model, three to five matrices as wide and high as the stream are in memory.

    Returns the report, which is in the folder as well; its `structure` says how much of what each
    norm puts out is lost. Raises TersorError for bad input, before any work where that can be
    known, and for a model whose stream cannot be rotated.
    """
    refuse_existing(out)
    source = Source.open(model)
    width = settle_slice(source, hidden=hidden, multiple=multiple, update=update, damp=damp)
    if calibration is None:
        raise TersorError(
            "the directions of the residual stream that matter are found on text; give "
            "--calibration FILE"
        )
    windows = text_windows(source, calibration)
    check_tokens(width, windows)
    report = begin_report(
        source,
        {
            "method": "slicing",
            "hidden": f"{width.kept} of {width.count}",
            "update": update,
            "damp": damp,
        },
        calibration,
        windows,
    )
    small = width.skeleton(source)
    report.structure = {
        "parameters_before": parameters(source.model),
        "parameters_after": parameters(small),
        "dropped": [],
        "blocks": [],
    }
    with ShardWriter(out, identity(report)) as writer, Progress(progress) as bar:
        run = _Run(source=source, writer=writer, bar=bar, width=width, small=small, damp=damp)
        report.structure["energy"] = run.find_directions(windows)
        keys = run.write(windows if update == UPDATES[0] else None)
        run.complete(report, keys, width.config(source), strict)
    return report


DIRECTIONS = "directions"  # the file with P, and the commit after which it is on disk


def _whole(number: int) -> str:
    """The file with what enters a block of the original model, while directions are sought."""
    return f"whole-{number}"


def _again(number: int) -> str:
    """The same, while the narrower model is made."""
    return f"again-{number}"


def _narrow(number: int) -> str:
    """The file with what enters a block of the narrower model."""
    return f"narrow-{number}"


def _moment(number: int) -> str:
    """The file with the second moment of what norms put out before a block."""
    return f"moment-{number}"


@dataclass(frozen=True)
class _Flows:
    """The text on its way through both models."""

    whole: Flow
    narrow: Flow


@dataclass
class _Found:
    """What became of the norms of a block, or of the last one.

    transfers: T by the path of the norm in the model. tensors: of the narrower model, by name.
    lost: the share of what each norm puts out that T does not give back.
    """

    transfers: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    departures: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class _Run(Run):
    """small: the narrower model, on the meta device."""

    width: Width
    small: nn.Module
    damp: float

    # --- the directions

    def find_directions(self, windows: Tensor) -> float:
        """Has P on disk; returns the share of the energy of what the norms put out that it holds,
        averaged over them."""
        paths = [path for path, _ in self.source.found.blocks(self.source.model)]
        keys = [f"moment of {path}" for path in paths]
        if DIRECTIONS not in self.writer.done:
            todo = [number for number, key in enumerate(keys) if key not in self.writer.done]
            if todo:
                flow = self.begin(windows, "whole model", _whole)
                self.bar.expect(len(todo) * len(flow.batches))
                for number in todo:
                    self.bar.say(f"directions, block {number + 1} of {len(paths)}")
                    self._add_moment(keys[number], number, paths[number], flow)
                    _core.trim_memory()
            self._settle_directions(len(paths))
        for key in (*keys, DIRECTIONS):
            self.timings.add(self.writer.done[key]["seconds"])
        share: float = self.writer.done[DIRECTIONS]["energy"]
        return share

    def _add_moment(self, key: str, number: int, path: str, flow: Flow) -> None:
        timings, block = Timings(), self.source.model.get_submodule(path)
        last = number + 1 == len(self.source.blocks)
        moment = Moment(self.width.count)
        if number:
            moment.matrix = self._load(_moment(number), self.width.count, self.width.count)

        def outputs() -> Iterator[Tensor]:
            for y in flow.through(number, block):
                if last:  # what the final norm reads
                    moment.update(normed(y, self._eps))
                yield y

        state = {}
        norms = {norm: block.get_submodule(norm) for norm in self._norms(block)}
        with timings.stage("rank"), self.source.loaded(self.source.names(path)):
            with watching(norms, lambda _, x: moment.update(normed(x, self._eps))):
                if last:
                    deque(outputs(), maxlen=0)
                else:
                    state[_whole(number + 1)] = flow.write(number + 1, outputs())
            if not bool(moment.matrix.isfinite().all()):
                raise TersorError(
                    f"the residual stream in {path} holds NaN or Inf; the model overflows in its "
                    "own dtype, so convert it to bfloat16 or float32, or check its weights"
                )
            state[_moment(number + 1)] = self._save(_moment(number + 1), moment.matrix)
        self.writer.commit(key, {"bytes": 0, "seconds": timings.seconds}, state)
        flow.forget(number)
        self.writer.state_path(_moment(number)).unlink(missing_ok=True)

    def _settle_directions(self, depth: int) -> None:
        timings = Timings()
        self.bar.say("principal components")
        with timings.stage("rank"):
            moment = self._load(_moment(depth), self.width.count, self.width.count)
            directions, share = principal(moment, self.width.kept)
            digest = self._save(DIRECTIONS, directions)
        info = {"bytes": 0, "seconds": timings.seconds, "energy": share, "digest": digest}
        self.writer.commit(DIRECTIONS, info, {DIRECTIONS: digest})
        self.writer.state_path(_moment(depth)).unlink(missing_ok=True)

    # --- the narrower model

    def write(self, windows: Tensor | None) -> Iterator[str]:
        """Yields the key of each block, and of the head, once it is written, now or in an earlier
        run. windows: the text, where what reads the stream is updated."""
        directions = self._load(DIRECTIONS, self.width.count, self.width.kept)
        paths = [path for path, _ in self.source.found.blocks(self.source.model)]
        todo = [number for number, path in enumerate(paths) if path not in self.writer.done]
        if "embeddings" not in self.writer.done:
            with self.timings.stage("write"):
                self._commit(
                    "embeddings", self._outside()[:-2], directions, _Found(), {}, Timings()
                )
        flows = None
        if windows is not None and self.width.head not in self.writer.done:
            flows = self._flows(windows, directions)
            self.bar.expect(3 * len(todo) * len(flows.whole.batches))
        for number, path in enumerate(paths):
            if number in todo:
                self.bar.say(f"block {number + 1} of {len(paths)}")
                self._block(number, path, directions, flows)
                _core.trim_memory()
            self.timings.add(self.writer.done[path]["seconds"])
            yield path
        if self.width.head not in self.writer.done:
            self._head(directions, flows)
        self.timings.add(self.writer.done[self.width.head]["seconds"])
        yield self.width.head

    def _outside(self) -> list[str]:
        """The parameters in no block; the last norm and the head are the last two."""
        before, after = self.source.found.outside(self.source.where)
        last = [f"{self.width.norm}.weight", self.width.head]
        return [name for name in (*before, *after) if name not in last] + last

    def _flows(self, windows: Tensor, directions: Tensor) -> _Flows:
        self.bar.say("the text up to the first block")
        source, writer = self.source, self.writer
        blocks = [block for _, block in source.found.blocks(self.small)]
        with ExitStack() as memory, self.timings.stage("run"):
            memory.enter_context(source.loaded(source.before()))
            memory.enter_context(self._embedded(directions))

            def flow(
                model: nn.Module, blocks: Sequence[nn.Module], name: Callable[[int], str]
            ) -> Flow:
                return Flow(
                    model, blocks, windows, lambda n: writer.state_path(name(n)), self.bar.step
                )

            whole = flow(source.model, source.blocks, _again)
            flows = _Flows(whole, flow(self.small, blocks, _narrow))
            if "text" not in writer.done:
                state = {_again(0): flows.whole.enter(), _narrow(0): flows.narrow.enter()}
                state[DIRECTIONS] = writer.done[DIRECTIONS]["digest"]
                writer.commit("text", {"bytes": 0}, state, quick=True)
        return flows

    @contextmanager
    def _embedded(self, directions: Tensor) -> Iterator[None]:
        """While it lasts, what the narrower model has before its first block is in memory."""
        names = self.source.before()
        self._put({name: self._sliced(name, directions, {}) for name in names})
        try:
            yield
        finally:
            empty(self.small, names)

    def _block(self, number: int, path: str, directions: Tensor, flows: _Flows | None) -> None:
        source, timings, found = self.source, Timings(), _Found()
        names, state = source.names(path), {}
        prior = keeping(directions, self.writer.done[DIRECTIONS]["energy"])
        norms = [f"{path}.{norm}" for norm in self._norms(source.model.get_submodule(path))]
        found.transfers = dict.fromkeys(norms, prior)
        if flows:
            with ExitStack() as memory:
                with timings.stage("read"):
                    memory.enter_context(source.loaded(names))
                with timings.stage("solve"):
                    state = self._match(number, path, directions, flows, found)
            with timings.stage("run"):
                narrow = self.small.get_submodule(path)
                state[_narrow(number + 1)] = flows.narrow.advance(number, narrow)
                empty(self.small, names)
        with self.timings.stage("write"):
            self._commit(path, names, directions, found, state, timings)
        if flows:
            flows.whole.forget(number)
            flows.narrow.forget(number)

    def _match(
        self, number: int, path: str, directions: Tensor, flows: _Flows, found: _Found
    ) -> dict[str, str]:
        """Finds the transfer of each norm of a block, after those before it, and has the narrower
        block in memory. Returns the state: what leaves the block in the original model."""
        state: dict[str, str] = {}
        linears = self.source.names(path)
        for place, (norm, prior) in enumerate(tuple(found.transfers.items())):
            transfer = Transfer(self.width.count, self.width.kept)
            if place == 0:
                self._compare(number, flows, transfer)
            else:
                outputs = self._run_both(number, path, norm, flows, transfer)
                if place + 1 == len(found.transfers):
                    state[_again(number + 1)] = flows.whole.write(number + 1, outputs)
                else:
                    deque(outputs, maxlen=0)
            self._settle(norm, transfer, prior, found)
            behind = [n for n in linears if place == 0 or self._norm_of(n) == norm]
            new = {name: self._sliced(name, directions, found.transfers) for name in behind}
            found.tensors |= new
            self._put(new)
        return state

    def _compare(self, number: int, flows: _Flows, transfer: Transfer) -> None:
        """Adds to `transfer` what a norm makes of the hidden states that enter a block."""
        both = zip(flows.whole.entering(number), flows.narrow.entering(number), strict=True)
        for x, z in both:
            transfer.update(normed(x, self._eps), normed(z, self._eps))

    def _run_both(
        self, number: int, path: str, norm: str, flows: _Flows, transfer: Transfer
    ) -> Iterator[Tensor]:
        """Runs the text through a block of both models; yields what leaves that of the original,
        and adds to `transfer` what the norm makes of what it reads."""
        seen: dict[str, Tensor] = {}

        def note(which: str, x: Tensor) -> None:
            seen[which] = normed(x, self._eps)

        models = {"whole": self.source.model, "narrow": self.small}
        pairs = (
            flow.pairs(number, models[which].get_submodule(path))
            for which, flow in (("whole", flows.whole), ("narrow", flows.narrow))
        )
        with watching({which: m.get_submodule(norm) for which, m in models.items()}, note):
            for (_, y), _ in zip(*pairs, strict=True):
                transfer.update(seen["whole"], seen["narrow"])
                yield y

    def _settle(self, norm: str, transfer: Transfer, prior: Tensor, found: _Found) -> None:
        found.transfers[norm], used = transfer.solve(prior, self.damp)
        found.lost[norm] = transfer.error(found.transfers[norm])
        if used > self.damp:
            found.departures[norm] = (
                f"damping raised from {self.damp:g} to {used:g} to solve for it"
            )

    def _head(self, directions: Tensor, flows: _Flows | None) -> None:
        timings, found, norm = Timings(), _Found(), self.width.norm
        self.bar.say("the head")
        prior = keeping(directions, self.writer.done[DIRECTIONS]["energy"])
        found.transfers[norm] = prior
        if flows:
            with timings.stage("solve"):
                transfer = Transfer(self.width.count, self.width.kept)
                self._compare(len(self.source.blocks), flows, transfer)
                self._settle(norm, transfer, prior, found)
        with self.timings.stage("write"):
            self._commit(self.width.head, self._outside()[-2:], directions, found, {}, timings)

    # --- tensors

    @property
    def _eps(self) -> float:
        eps: float = config_value(self.source.model.config, self.width.stream.eps)
        return eps

    def _norms(self, block: nn.Module) -> list[str]:
        """Paths in a block, in the order of the forward pass."""
        norms = (norm for norm, _ in self.width.stream.reads)
        return parts_of(self.source.found.arch, block, norms)

    def _norm_of(self, name: str) -> str | None:
        """The norm through which a parameter reads the stream."""
        part = self.width.parts.get(name)
        return part.norm if part else None

    def _read(self, name: str) -> Tensor:
        tensor = self.source.where[name].read(self.source.checkpoint)
        check_finite(self.source.where[name].name, tensor)
        return tensor

    def _sliced(self, name: str, directions: Tensor, transfers: Mapping[str, Tensor]) -> Tensor:
        """A parameter of the narrower model, in the dtype of the files.
        transfers: T by the path of a norm."""
        tensor, part = self._read(name), self.width.parts.get(name)
        offset = self.source.found.arch.norm_offset
        if part is None:
            return tensor
        if part.kind == "embeds":
            return embedding(tensor, directions, self.width.scale)
        if part.kind == "writes":
            return writing(tensor, directions)
        if part.kind == "norm":
            return tensor.new_full((self.width.kept,), 1 - offset)
        gain = offset + self._read(f"{part.norm}.weight").double()
        return reading(tensor, gain, transfers[part.norm])

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        """Has them in the narrower model."""
        state = {name: tensor.to(self.source.dtype) for name, tensor in tensors.items()}
        self.small.load_state_dict(state, strict=False, assign=True)

    def _commit(
        self,
        key: str,
        names: Sequence[str],
        directions: Tensor,
        found: _Found,
        state: Mapping[str, str],
        timings: Timings,
    ) -> None:
        """Writes the parameters with these names. key: what they are, the path of a block."""
        nbytes = 0
        for name in names:
            tensor = found.tensors.get(name)
            if tensor is None:
                tensor = self._sliced(name, directions, found.transfers)
            tensor = self.source.as_stored(name, tensor)
            check_finite(name, tensor, OVERFLOW)
            if tensor.dim() == 2 and is_pruned(
                self.source.where[name].read(self.source.checkpoint)
            ):
                found.departures[name] = PRUNED
            own = name in self.width.twins  # one tensor before, two now
            self.writer.add(name if own else self.source.where[name].saved_as, tensor)
            nbytes += tensor.nbytes
        lost = {norm.removeprefix(f"{key}."): share for norm, share in found.lost.items()}
        info = {
            "layers": [],
            "departures": found.departures,
            "structure": {"was": key, "is": key, **({"lost": lost} if lost else {})},
            "bytes": nbytes,
            "seconds": timings.seconds,
        }
        self.writer.commit(key, info, {**state, DIRECTIONS: self.writer.done[DIRECTIONS]["digest"]})

    def _save(self, name: str, matrix: Tensor) -> str:
        """Keeps a float64 matrix beside the hidden states; returns the digest of its file."""
        file = self._file(name, len(matrix), matrix.shape[1])
        return file.write(iter([matrix]))

    def _load(self, name: str, rows: int, columns: int) -> Tensor:
        return next(iter(self._file(name, rows, columns)))

    def _file(self, name: str, rows: int, columns: int) -> HiddenFile:
        return HiddenFile(self.writer.state_path(name), [rows], [columns], torch.float64)
