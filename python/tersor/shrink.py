"""Structured pruning: a checkpoint in, a smaller one of the same class out, which any program that
knows the class loads. It is read as quantize_checkpoint reads, one block at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from tersor import _core
from tersor.blocks import Flow
from tersor.calibrate import Calibration, GramStats, capture
from tersor.cuts import Cut, Cuts, renumbered, settle_cuts
from tersor.errors import TersorError
from tersor.layerwise import machine
from tersor.progress import Progress
from tersor.pruning import IMPORTANCES, best, importance, output_error, reconstruct
from tersor.report import REPORT, TIMINGS, LayerReport, Report, Timings, ranges, versions
from tersor.runs import Run, describe, identity, text_windows
from tersor.shards import ShardWriter, refuse_existing
from tersor.source import Source


def shrink_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    heads: float = 0.0,
    ffn: float = 0.0,
    layers: int | Sequence[int] = 0,
    multiple: int | None = None,
    importance: str = "output",
    update: bool = True,
    damp: float = 0.01,
    calibration: Calibration | None = None,
    strict: bool = False,
    progress: bool | None = None,
) -> Report:
    """Cuts heads, channels and blocks out of a Hugging Face checkpoint, and writes an ordinary one
    that is smaller.

    heads: share of the attention heads, the same number in every block, since config.json has one
        for all; under grouped-query attention a head of keys and values with its query heads.
    ffn: share of the channels of the MLPs, the same number in every block too.
    layers: how many blocks to leave out: those of the least influence, 1 - cos(x, y) between what
        enters a block and what leaves it, averaged over tokens, in the original model (ShortGPT,
        arXiv:2403.03853; as there, any block may go, the first and the last as well). Or which, by
        their numbers.
    multiple: what the number of channels that stay is rounded to, up or down; None: what the
        model's is a multiple of, up to 128, so that a group of a quantized weight still divides it.
    importance: by which groups are ranked within a block: "output", "magnitude" or "activation"
        (see tersor.pruning.importance).
    update: give what stays of the linear behind the groups the values that come closest to what it
        put out, by least squares.
    damp: of that, as a share of the inputs' mean square.
    calibration: the text; None where nothing asked for needs any. Each block is calibrated on what
        the smaller blocks before it give.
    The rest, and what happens when a run is interrupted, is as in quantize_checkpoint.

    Returns the report, which is in the folder as well; its `structure` says what was cut.
    Raises TersorError for bad input, before any work where that can be known, and for a model of
    which transformers makes no smaller one of that kind.
    """
    refuse_existing(out)
    if importance not in IMPORTANCES:
        raise TersorError(f"importance is {', '.join(IMPORTANCES)}, not {importance!r}")
    if not 0 < damp < 1:
        raise TersorError(f"damp must be between 0 and 1, not {damp}; 0.01 is usual")
    source = Source.open(model)
    cuts = settle_cuts(source, heads, ffn, layers, multiple)
    ranks = isinstance(cuts.drop, int) and cuts.drop > 0
    observes = bool(cuts.groups) and (update or importance != "magnitude")
    windows = None
    if ranks or observes:
        if calibration is None:
            raise TersorError(
                "structured pruning needs text to calibrate on; give --calibration FILE (only "
                "heads and ffn by --importance magnitude --no-update need none)"
            )
        windows = text_windows(source, calibration)
    report = Report(
        model=source.checkpoint.folder.resolve().name,
        fingerprint=source.checkpoint.fingerprint(),
        architecture=source.found.how,
        settings={
            "method": "structured",
            **{cut.what: f"{cut.kept} of {cut.count}" for cut in cuts.groups},
            "layers": cuts.drop if isinstance(cuts.drop, int) else list(cuts.drop),
            "importance": importance,
            "update": update,
            "damp": damp,
            **machine(),
        },
        versions=versions(),
        calibration=describe(calibration, windows),
        bytes_before=source.nbytes,
    )
    before = _parameters(source.model)  # now, since weights that come and go do not stay tied
    with ShardWriter(out, identity(report)) as writer, Progress(progress) as bar:
        run = _Run(
            source=source,
            writer=writer,
            bar=bar,
            cuts=cuts,
            importance=importance,
            update=update,
            damp=damp,
        )
        run.write_outside(tables=False)
        influence = run.influence(windows) if ranks and windows is not None else {}
        kept = _kept(cuts, influence)
        small = cuts.skeleton(source, kept)
        paths = [path for path, _ in source.found.blocks(source.model)]
        report.structure = {
            "parameters_before": before,
            "parameters_after": _parameters(small),
            "dropped": [path for number, path in enumerate(paths) if number not in kept],
            "influence": influence,
            "blocks": [],
        }
        for path in run.blocks(kept, small, windows if observes else None):
            report.add(writer.done[path])
            if strict:
                report.require_strict()
        report.bytes_after = run.nbytes
        files = {REPORT: report.to_json(), TIMINGS: run.timings.to_json()}
        writer.finish(cuts.config(source, kept), source.checkpoint.folder, files)
    return report


def _kept(cuts: Cuts, influence: dict[str, float]) -> list[int]:
    """The numbers of the blocks that stay."""
    if isinstance(cuts.drop, tuple):
        return [number for number in range(cuts.depth) if number not in cuts.drop]
    if not cuts.drop:
        return list(range(cuts.depth))
    scores = torch.tensor(list(influence.values()), dtype=torch.float64)
    kept: list[int] = best(scores, cuts.left).tolist()
    return kept


def _parameters(model: nn.Module) -> int:
    """As transformers counts them, what is tied once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _whole(number: int) -> str:
    """The file with what enters a block of the original model."""
    return f"whole-{number}"


@dataclass(frozen=True)
class _Block:
    """A block that stays: its number and path now, its number then, and the smaller module."""

    number: int
    path: str
    place: int
    module: nn.Module


@dataclass(frozen=True)
class _Done:
    """A cut that was made. changed: tensors by their names in the block."""

    changed: dict[str, Tensor]
    kept: list[int]
    report: LayerReport
    departure: str | None


@dataclass(kw_only=True)
class _Run(Run):
    cuts: Cuts
    importance: str
    update: bool
    damp: float

    def influence(self, windows: Tensor) -> dict[str, float]:
        """Of every block of the original model, by path; in one pass through it."""
        paths = [path for path, _ in self.source.found.blocks(self.source.model)]
        keys = [f"influence of {path}" for path in paths]
        todo = [number for number, key in enumerate(keys) if key not in self.writer.done]
        if todo:
            flow = self.begin(windows, "whole model", _whole)
            self.bar.expect(len(todo) * len(flow.batches))
            for number in todo:
                self.bar.say(f"influence of block {number + 1} of {len(paths)}")
                self._influence(keys[number], number, paths[number], flow)
        done = [self.writer.done[key] for key in keys]
        for info in done:
            self.timings.add(info["seconds"])
        return {path: info["influence"] for path, info in zip(paths, done, strict=True)}

    def _influence(self, key: str, number: int, path: str, flow: Flow) -> None:
        timings, state = Timings(), {}
        block = self.source.model.get_submodule(path)
        away: list[Tensor] = []
        with timings.stage("rank"), self.source.loaded(self.source.names(path)):
            outputs = _watched(flow.pairs(number, block), away)
            if number + 1 < self.cuts.depth:
                state[_whole(number + 1)] = flow.write(number + 1, outputs)
            else:
                deque(outputs, maxlen=0)
        mean = float(torch.cat(away).mean())
        info = {"influence": mean, "bytes": 0, "seconds": timings.seconds}
        self.writer.commit(key, info, state)
        flow.forget(number)

    def blocks(self, kept: list[int], small: nn.Module, windows: Tensor | None) -> Iterator[str]:
        """Yields the path of each block that stays once it is done, now or in an earlier run."""
        before = [path for path, _ in self.source.found.blocks(self.source.model)]
        after = [module for _, module in self.source.found.blocks(small)]
        todo = [number for number in kept if before[number] not in self.writer.done]

        def hidden(number: int) -> str:
            """What leaves a block goes past those that are left out to the next that stays."""
            return f"hidden-{next(n for n in kept if n >= number)}"

        flow = None
        if todo and windows is not None:
            flow = self.begin(windows, "smaller model", hidden)
            self.bar.expect((2 * len(todo) - 1) * len(flow.batches))  # the last one is not run on
        for place, number in enumerate(kept):
            path = before[number]
            if number in todo:
                self.bar.say(f"block {place + 1} of {len(kept)}")
                following = None if number == kept[-1] else hidden(number + 1)
                self._block(_Block(number, path, place, after[place]), flow, following)
            self.timings.add(self.writer.done[path]["seconds"])
            yield path

    def _block(self, block: _Block, flow: Flow | None, following: str | None) -> None:
        """following: the file for what enters the next block; None for the last one."""
        source, timings = self.source, Timings()
        whole = source.model.get_submodule(block.path)
        names = {n.removeprefix(f"{block.path}."): n for n in source.names(block.path)}
        state: dict[str, str] = {}
        stats: dict[str, GramStats] = {}
        with ExitStack() as memory:
            with timings.stage("read"):
                memory.enter_context(source.loaded(names.values()))
            if flow:
                with timings.stage("observe"):
                    paths = [f"{block.path}.{cut.groups.columns}" for cut in self.cuts.groups]
                    linears = {path: source.model.get_submodule(path) for path in paths}
                    stats = capture(linears, flow.through(block.number, whole))
            done: dict[str, _Done] = {}
            for cut in self.cuts.groups:
                with timings.stage("solve"):
                    seen = stats.pop(f"{block.path}.{cut.groups.columns}", None)
                    done[cut.what] = self._cut(cut, block, names, seen)
            changed = {name: t for each in done.values() for name, t in each.changed.items()}
            if flow and following:
                with timings.stage("run"):
                    now = {n: t for n, t in whole.state_dict().items() if n in names}
                    now |= {n: t.to(source.dtype) for n, t in changed.items()}
                    block.module.load_state_dict(now, strict=False, assign=True)
                    state[following] = flow.advance(block.number, block.module)
                    block.module.to("meta")
        with self.timings.stage("write"):
            self._write(block, names, changed, done, state, timings)
        if flow:
            flow.forget(block.number)
        _core.trim_memory()

    @torch.no_grad()
    def _cut(
        self, cut: Cut, block: _Block, names: Mapping[str, str], stats: GramStats | None
    ) -> _Done:
        """names: of the block's tensors, in the block and in the model."""
        source, name = self.source, f"{cut.groups.columns}.weight"
        linears = (*cut.groups.rows, cut.groups.columns)
        tensors = {  # as the files have them, which may be finer than what the model computes in
            local: source.where[names[local]].read(source.checkpoint)
            for local in names
            if local.rpartition(".")[0] in linears
        }
        w = tensors[name]
        rows = [
            part
            for linear in cut.groups.rows
            for part in tensors[f"{linear}.weight"].chunk(cut.groups.parts)
        ]
        kept = best(importance(self.importance, cut.count, w, rows, stats), cut.kept)
        changed = cut.apply(tensors, kept)
        notes, departure = [], None
        if self.update and stats is not None:
            new, used = reconstruct(w, cut.count, kept, stats, self.damp)
            changed[name] = new.to(w.dtype)
            if stats.tokens < w.shape[1]:
                notes.append(f"only {stats.tokens} tokens for {w.shape[1]} inputs")
            if used > self.damp:
                departure = f"damping raised from {self.damp:g} to {used:g} to factor its inputs"
        report = LayerReport(
            name=f"{renumbered(source.found, block.path, block.place)}.{cut.groups.columns}",
            shape=(changed[name].shape[0], changed[name].shape[1]),
            scheme="W16A16",
            method="least squares" if self.update else "cut",
            error=output_error(w, cut.count, kept, changed[name], stats),
            sparsity=1 - int(changed[name].count_nonzero()) / changed[name].numel(),
            tokens=stats.tokens if stats is not None else 0,
            bytes=changed[name].nbytes,
            notes=notes,
        )
        return _Done(changed, kept.tolist(), report, departure)

    def _write(
        self,
        block: _Block,
        names: Mapping[str, str],
        changed: Mapping[str, Tensor],
        done: Mapping[str, _Done],
        state: Mapping[str, str],
        timings: Timings,
    ) -> None:
        source, nbytes = self.source, 0
        for local, name in names.items():
            if local in changed:
                tensor = source.as_stored(name, changed[local])
            else:
                ((_, tensor),) = source.unchanged([name])
            saved_as = source.where[name].saved_as
            self.writer.add(renumbered(source.found, saved_as, block.place), tensor)
            nbytes += tensor.nbytes
        info = {
            "layers": [asdict(each.report) for each in done.values()],
            "departures": {d.report.name: d.departure for d in done.values() if d.departure},
            "structure": {
                "was": block.path,
                "is": renumbered(source.found, block.path, block.place),
                **{what: ranges(each.kept) for what, each in done.items()},
            },
            "bytes": nbytes,
            "seconds": timings.seconds,
        }
        self.writer.commit(block.path, info, state)


def _watched(pairs: Iterable[tuple[Tensor, Tensor]], away: list[Tensor]) -> Iterator[Tensor]:
    """The second of each pair; how far it is from the first, 1 - cos, is noted token by token."""
    for x, y in pairs:
        away.append(1 - cosine_similarity(x.double(), y.double(), dim=-1).flatten())
        yield y
