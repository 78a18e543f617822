"""Structured pruning of mixtures: a checkpoint in, one of the same class with fewer experts out."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor import _core
from tersor.blocks import Flow
from tersor.calibrate import Calibration
from tersor.errors import TersorError
from tersor.models import ExpertList, Experts, config_value, empty, parts_of
from tersor.models.arch import respell
from tersor.progress import Progress
from tersor.pruning import best
from tersor.pruning.experts import EXPERT_IMPORTANCES, ExpertStats, expert_importance
from tersor.report import Report, Timings, ranges
from tersor.runs import Run, identity, text_windows
from tersor.shards import ShardWriter, refuse_existing
from tersor.source import Source
from tersor.surgery.smaller import begin_report, is_number, parameters, smaller_skeleton


def drop_experts(
    model: str | Path,
    out: str | Path,
    *,
    experts: float,
    importance: str = "output",
    calibration: Calibration | None = None,
    strict: bool = False,
    progress: bool | None = None,
) -> Report:
    """Leaves experts out of a mixture in a Hugging Face checkpoint, with their rows of the routers,
    and writes an ordinary one of the same class.

    A token whose expert is gone goes to the next one that the router would have chosen; the weights
    that stay keep their values.

    experts: the share of them to cut, the same number in every block that has any, since
        config.json has one for all. As many as a token chooses must stay.
    importance: by which they are ranked within a block: "output", "activation", "frequency" or
        "magnitude" (see tersor.pruning.experts).
    calibration: the text; "magnitude" needs none. Each block is calibrated on what the smaller
        blocks before it give.
    The rest, and what happens when a run is interrupted, is as in quantize_checkpoint.

    Returns the report, which is in the folder as well; its `structure` says of every block which
    experts stayed, how many tokens chose each there was, and the share of Σ g² |E(x)|² that went.
    Raises TersorError for bad input, before any work where that can be known, and for a model
    without experts.
    """
    refuse_existing(out)
    source = Source.open(model)
    mixture = settle_drop(source, experts=experts, importance=importance)
    windows = None
    if importance != "magnitude":
        if calibration is None:
            raise TersorError(
                "experts are ranked on text; give --calibration FILE (only --importance magnitude "
                "needs none)"
            )
        windows = text_windows(source, calibration)
    report = begin_report(
        source,
        {
            "method": "experts",
            "experts": f"{mixture.kept} of {mixture.count}",
            "importance": importance,
        },
        calibration,
        windows,
    )
    small = mixture.skeleton(source)
    report.structure = {
        "parameters_before": parameters(source.model),
        "parameters_after": parameters(small),
        "dropped": [],
        "blocks": [],
    }
    with ShardWriter(out, identity(report)) as writer, Progress(progress) as bar:
        run = _Run(
            source=source,
            writer=writer,
            bar=bar,
            mixture=mixture,
            small=small,
            importance=importance,
        )
        run.write_outside(tables=False)
        run.complete(report, run.blocks(windows), mixture.config(source), strict)
    return report


@dataclass(frozen=True)
class Mixture:
    """`kept` of `count` experts stay in every block that has experts.

    lists, routers: paths in the model of the experts and of what chooses them, by the block's path.
    """

    names: Experts
    count: int
    kept: int
    lists: dict[str, str]
    routers: dict[str, str]

    def config(self, source: Source) -> dict[str, Any]:
        """config.json of the smaller model."""
        config = copy.deepcopy(source.checkpoint.config)
        for name in [n for n in self.names.counts if n in config] or self.names.counts[:1]:
            config[name] = self.kept
        return config

    def skeleton(self, source: Source) -> nn.Module:
        """The smaller model, as plain transformers makes it, on the meta device."""
        state = source.model.state_dict()
        shapes = {name: tuple(state[name].shape) for name in source.where}
        for path in self.lists:
            now = self.renamed(path, source.names(path), range(self.kept))
            for name in source.names(path):
                shape = shapes.pop(name)
                if name in now:
                    rows = self.kept if self.is_router(path, name) else shape[0]
                    shapes[now[name]] = (rows, *shape[1:])
        return smaller_skeleton(source, self.config(source), shapes)

    def is_router(self, block: str, name: str) -> bool:
        """Whether a parameter of a block has a row for each expert."""
        return block in self.routers and name.startswith(f"{self.routers[block]}.")

    def renamed(self, block: str, names: Sequence[str], kept: Sequence[int]) -> dict[str, str]:
        """The parameters of a block that stay, and their names then. kept: numbers of experts."""
        result = {}
        for name in names:
            number = self._expert(block, name)
            if number is None:
                result[name] = name
            elif number in kept:
                result[name] = self.respelled(block, name, name, kept)
        return result

    def respelled(self, block: str, name: str, spelling: str, kept: Sequence[int]) -> str:
        """How files or the model call a parameter of a block once its expert has its new number.
        name: the parameter, in the model now. spelling: of it, in the same place."""
        number = self._expert(block, name)
        if number is None:
            return spelling
        last = self.lists[block].rpartition(".")[2]
        return respell(spelling, f"{last}.{number}", f"{last}.{kept.index(number)}")

    def weights(self, block: str, names: Sequence[str]) -> list[list[str]]:
        """The parameters of each expert of a block."""
        result: list[list[str]] = [[] for _ in range(self.count)]
        for name in names:
            number = self._expert(block, name)
            if number is not None:
                result[number].append(name)
        return result

    def check_observable(self, source: Source) -> None:
        """TersorError where the experts do not say what the router takes of them."""
        for path in self.lists.values():
            if not isinstance(source.model.get_submodule(path), ExpertList):
                raise TersorError(
                    "this version of transformers does not show how experts are chosen; install "
                    "transformers 5, or use --importance magnitude"
                )

    def _expert(self, block: str, name: str) -> int | None:
        prefix = f"{self.lists[block]}." if block in self.lists else None
        if prefix is None or not name.startswith(prefix):
            return None
        return int(name.removeprefix(prefix).partition(".")[0])


def settle_drop(source: Source, *, experts: float, importance: str) -> Mixture:
    """What drop_experts leaves. TersorError for what it refuses by the model's configuration
    alone."""
    if importance not in EXPERT_IMPORTANCES:
        raise TersorError(
            f"importance of experts is {', '.join(EXPERT_IMPORTANCES)}, not {importance!r}"
        )
    mixture = settle_experts(source, experts)
    if importance != "magnitude":
        mixture.check_observable(source)
    return mixture


def settle_experts(source: Source, experts: float) -> Mixture:
    """experts: the share to cut. TersorError for a model without experts, where nothing would go or
    too few stay, and where transformers cannot make the smaller model."""
    names, config = source.found.arch.experts, source.model.config
    if not is_number(experts) or not 0 < experts < 1:
        raise TersorError(f"experts is a share between 0 and 1, such as 0.25, not {experts}")
    lists, routers = {}, {}
    for path, block in source.found.blocks(source.model) if names else ():
        assert names is not None
        for here in parts_of(source.found.arch, block, (names.module,)):
            lists[path] = f"{path}.{here}"
            (router,) = parts_of(source.found.arch, block, names.routers[:1])
            routers[path] = f"{path}.{router}"
    if names is None or not lists:
        raise TersorError(
            f"no expert can be cut: this model has none, or they are not known "
            f"({source.found.how}); use heads, ffn, layers or hidden"
        )
    counts = {len(source.model.get_submodule(path)) for path in lists.values()}
    if len(counts) > 1:
        raise TersorError(f"experts cannot be cut where blocks have different numbers: {counts}")
    (count,) = counts
    kept, chosen = round(count * (1 - experts)), config_value(config, names.chosen)
    if kept >= count:
        raise TersorError(
            f"experts={experts:g} of {count} rounds to none; use experts={1 / count:.2g}"
        )
    if kept < chosen:
        fix = f"use experts={1 - chosen / count:.2g} or less" if chosen < count else "cut none"
        raise TersorError(
            f"experts={experts:g} of {count} leaves {kept}, and a token chooses {chosen} "
            f"({names.chosen}); {fix}"
        )
    return Mixture(names, count, kept, lists, routers)


def _hidden(number: int) -> str:
    """The file with what enters a block of the smaller model."""
    return f"hidden-{number}"


@dataclass(kw_only=True)
class _Run(Run):
    """small: the smaller model, on the meta device."""

    mixture: Mixture
    small: nn.Module
    importance: str

    def blocks(self, windows: Tensor | None) -> Iterator[str]:
        """Yields the path of each block once it is done, now or in an earlier run."""
        paths = [path for path, _ in self.source.found.blocks(self.source.model)]
        todo = [number for number, path in enumerate(paths) if path not in self.writer.done]
        flow = None
        if todo and windows is not None:
            flow = self.begin(windows, "smaller model", _hidden)
            mixed = sum(paths[number] in self.mixture.lists for number in todo)
            self.bar.expect((mixed + len(todo) - 1) * len(flow.batches))  # the last is not run on
        for number, path in enumerate(paths):
            if number in todo:
                self.bar.say(f"block {number + 1} of {len(paths)}")
                self._block(number, path, flow, number + 1 == len(paths))
            self.timings.add(self.writer.done[path]["seconds"])
            yield path

    def _block(self, number: int, path: str, flow: Flow | None, last: bool) -> None:
        source, mixture, timings = self.source, self.mixture, Timings()
        names, state = source.names(path), {}
        structure: dict[str, Any] = {"was": path, "is": path}
        kept: list[int] = []
        with ExitStack() as memory:
            with timings.stage("read"):
                memory.enter_context(source.loaded(names))
            if path in mixture.lists:
                stats = None
                if flow:
                    with timings.stage("observe"):
                        stats = self._observe(number, path, flow)
                kept = self._rank(path, names, stats)
                structure["experts"] = ranges(kept)
                if stats is not None:
                    structure["tokens"] = ", ".join(map(str, stats.tokens.tolist()))
                    total = float(stats.energy.sum())
                    stay = float(stats.energy[kept].sum())
                    structure["lost"] = max(0.0, 1 - stay / total) if total > 0 else 0.0
            now = mixture.renamed(path, names, kept)
            if flow and not last:
                with timings.stage("run"):
                    whole = dict(source.model.named_parameters())
                    values = {
                        new: self._rows(path, old, whole[old], kept) for old, new in now.items()
                    }
                    self.small.load_state_dict(values, strict=False, assign=True)
                    block = self.small.get_submodule(path)
                    state[_hidden(number + 1)] = flow.advance(number, block)
                    empty(self.small, now.values())
        with self.timings.stage("write"):
            self._write(path, now, kept, state, structure, timings)
        if flow:
            flow.forget(number)
        _core.trim_memory()

    def _observe(self, number: int, path: str, flow: Flow) -> ExpertStats:
        block = self.source.model.get_submodule(path)
        many = self.source.model.get_submodule(self.mixture.lists[path])
        assert isinstance(many, ExpertList)  # see check_observable
        stats = ExpertStats(self.mixture.count)
        many.seen = stats.update
        try:
            deque(flow.through(number, block), maxlen=0)
        finally:
            many.seen = None
        stats.check(path)
        return stats

    def _rank(self, path: str, names: Sequence[str], stats: ExpertStats | None) -> list[int]:
        """The numbers of the experts that stay."""
        weights = [
            [self.source.model.get_parameter(name) for name in each]
            for each in self.mixture.weights(path, names)
        ]
        scores = expert_importance(self.importance, weights, stats)
        kept: list[int] = best(scores, self.mixture.kept).tolist()
        return kept

    def _rows(self, path: str, name: str, tensor: Tensor, kept: Sequence[int]) -> Tensor:
        """The tensor of a block, of a router the rows of the experts that stay."""
        if not self.mixture.is_router(path, name):
            return tensor
        return tensor.detach().index_select(0, torch.tensor(kept))

    def _write(
        self,
        path: str,
        now: Mapping[str, str],
        kept: Sequence[int],
        state: Mapping[str, str],
        structure: Mapping[str, Any],
        timings: Timings,
    ) -> None:
        """now: the parameters that stay, and their names in the smaller model."""
        nbytes = 0
        for name in now:
            ((saved_as, tensor),) = self.source.unchanged([name])
            tensor = self._rows(path, name, tensor, kept).contiguous()
            self.writer.add(self.mixture.respelled(path, name, saved_as, kept), tensor)
            nbytes += tensor.nbytes
        info = {
            "layers": [],
            "departures": {},
            "structure": structure,
            "bytes": nbytes,
            "seconds": timings.seconds,
        }
        self.writer.commit(path, info, state)
