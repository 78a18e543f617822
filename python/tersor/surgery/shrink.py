"""Structured pruning: a checkpoint in, a smaller one of the same class out, which any program that
knows the class loads. It is read as quantize_checkpoint reads, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor import _core
from tersor.blocks import Flow
from tersor.calibrate import Calibration, GramStats, capture
from tersor.errors import TersorError
from tersor.models import GROUPS
from tersor.progress import Progress
from tersor.pruning import BY_STATISTICS, best, bias_for, importance, output_error, reconstruct
from tersor.report import LayerReport, Report, Timings, ranges
from tersor.runs import Run, identity, text_windows
from tersor.shards import ShardWriter, refuse_existing
from tersor.source import Source
from tersor.surgery.cuts import Cut, Cuts, renumbered, settle_cuts
from tersor.surgery.ranking import (
    CONTIGUOUS,
    DISTANCES,
    AttentionEntropy,
    Scores,
    block_distances,
    check_taylor,
    run_distances,
    taylor_scores,
    use_eager,
    watch_attention,
)
from tersor.surgery.smaller import PRUNED, begin_report, is_number, is_pruned, parameters

IMPORTANCES = (*BY_STATISTICS, "taylor", "entropy")  # of heads and channels
UPDATES = ("least-squares", "bias", "none")
RANKINGS = ("local", "global")


def shrink_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    heads: float = 0.0,
    query_heads: float = 0.0,
    ffn: float = 0.0,
    layers: int | Sequence[int] = 0,
    multiple: int | None = None,
    importance: str = "output",
    head_importance: str | None = None,
    layer_importance: str = "influence",
    ranking: str = "local",
    update: str = "least-squares",
    damp: float = 0.01,
    calibration: Calibration | None = None,
    strict: bool = False,
    progress: bool | None = None,
) -> Report:
    """Cuts heads, channels and blocks out of a Hugging Face checkpoint, and writes an ordinary one
    that is smaller.

    heads: share of the attention heads; under grouped-query attention a head of keys and values
        with its query heads.
    query_heads: share of the query heads of every head of keys and values that stays, under
        grouped-query attention; the heads of keys and values stay as they are.
    ffn: share of the channels of the MLPs.
    layers: how many blocks to leave out, those of the least layer_importance in the original model;
        as in ShortGPT any may go, the first and the last as well. Or which, by their numbers.
    multiple: what the number of channels that stay is rounded to, up or down; None: what the
        model's is a multiple of, up to 128, so that a group of a quantized weight still divides it.
    importance: by which groups are ranked within a block: "output", "fluctuation", "magnitude" or
        "activation" (see tersor.pruning.importance), or "taylor" (see ranking.taylor_scores: of the
        original model, which has to fit into memory as a whole).
    head_importance: the same for heads, where it is another one; None: `importance`. Also "entropy"
        (see ranking.AttentionEntropy; a group has the mean of its query heads).
    layer_importance: "influence" or "angular", of single blocks (see ranking.block_distances);
        "contiguous", of blocks that follow one another and go together (see run_distances there).
    ranking: "local": the best groups of every block. An ordinary configuration has one number of
        heads and one of channels for all blocks, so no other choice can be stated in it, and
        "global", the best of the whole model, is refused. Blocks themselves are always ranked over
        the whole model.
    update: "least-squares" gives what stays of the linear behind the groups the values that come
        closest to what it put out; "bias" adds to its bias what the groups gave on average (FLAP,
        arXiv:2312.11983), for models where it has one; "none" leaves it.
    damp: of least squares, as a share of the inputs' mean square.
    calibration: the text; None where nothing asked for needs any. Each block is calibrated on what
        the smaller blocks before it give.
    The rest, and what happens when a run is interrupted, is as in quantize_checkpoint.

    Returns the report, which is in the folder as well; its `structure` says what was cut.
    Raises TersorError for bad input, before any work where that can be known, and for a model of
    which transformers makes no smaller one of that kind.
    """
    refuse_existing(out)
    source = Source.open(model)
    cuts, how = settle_shrink(
        source,
        heads=heads,
        query_heads=query_heads,
        ffn=ffn,
        layers=layers,
        multiple=multiple,
        importance=importance,
        head_importance=head_importance,
        layer_importance=layer_importance,
        ranking=ranking,
        update=update,
        damp=damp,
    )
    ranks = isinstance(cuts.drop, int) and cuts.drop > 0
    observes = update != "none" or any(kind not in ("magnitude", "taylor") for kind in how.values())
    observes = observes and bool(cuts.groups)
    windows = None
    if ranks or observes or "taylor" in how.values():
        if calibration is None:
            raise TersorError(
                "structured pruning needs text to calibrate on; give --calibration FILE (only "
                "heads and ffn by --importance magnitude --update none need none)"
            )
        windows = text_windows(source, calibration)
    report = begin_report(
        source,
        {
            "method": "structured",
            **{name: value for cut in cuts.groups for name, value in cut.settings().items()},
            "layers": cuts.drop if isinstance(cuts.drop, int) else list(cuts.drop),
            **{f"importance of {what}": kind for what, kind in how.items()},
            **({"importance of layers": layer_importance} if ranks else {}),
            "update": update,
            "damp": damp,
        },
        calibration,
        windows,
    )
    for cut in cuts.groups:
        if why := cut.departure({"heads": heads, "ffn": ffn}[cut.what]):
            report.departures[cut.what] = why
    if strict:
        report.require_strict()
    before = parameters(source.model)  # now, since weights that come and go do not stay tied
    if "entropy" in how.values():
        use_eager(source)
    with ShardWriter(out, identity(report)) as writer, Progress(progress) as bar:
        run = _Run(
            source=source, writer=writer, bar=bar, cuts=cuts, how=how, update=update, damp=damp
        )
        run.write_outside(tables=False)
        distances = {}
        if isinstance(cuts.drop, int) and cuts.drop and windows is not None:
            if layer_importance == CONTIGUOUS:
                distances = run_distances(run, windows, cuts.drop)
            else:
                distances = block_distances(run, windows, layer_importance)
        kept = _kept(cuts, list(distances.values()), layer_importance == CONTIGUOUS)
        small = cuts.skeleton(source, kept)
        paths = [path for path, _ in source.found.blocks(source.model)]
        report.structure = {
            "parameters_before": before,
            "parameters_after": parameters(small),
            "dropped": [path for number, path in enumerate(paths) if number not in kept],
            layer_importance: distances,
            "blocks": [],
        }
        done = run.blocks(kept, small, windows, observes)
        run.complete(report, done, cuts.config(source, kept), strict)
    return report


def settle_shrink(
    source: Source,
    *,
    importance: str,
    head_importance: str | None,
    layer_importance: str,
    ranking: str,
    update: str,
    damp: float,
    **parts: Any,
) -> tuple[Cuts, dict[str, str]]:
    """What shrink_checkpoint cuts, and the importance that each kind of it is ranked by. parts: of
    settle_cuts; the rest is as in shrink_checkpoint. TersorError for what it refuses by the model's
    configuration alone."""
    for name, value, known in (
        ("importance", importance, IMPORTANCES),
        ("head_importance", head_importance or importance, IMPORTANCES),
        ("layer_importance", layer_importance, (*DISTANCES, CONTIGUOUS)),
        ("ranking", ranking, RANKINGS),
        ("update", update, UPDATES),
    ):
        if value not in known:
            raise TersorError(f"{name} is {', '.join(known)}, not {value!r}")
    if not is_number(damp) or not 0 < damp < 1:
        raise TersorError(f"damp must be between 0 and 1, not {damp!r}; 0.01 is usual")
    cuts = settle_cuts(source, **parts)
    if head_importance and not any(cut.what == "heads" for cut in cuts.groups):
        raise TersorError("head_importance is of heads, and none are cut; leave it out")
    how = {"heads": head_importance or importance, "ffn": importance}
    how = {cut.what: how[cut.what] for cut in cuts.groups}
    _check(source, cuts, how, ranking, update)
    return cuts, how


def _check(source: Source, cuts: Cuts, how: Mapping[str, str], ranking: str, update: str) -> None:
    """TersorError for what this model has not, or what does not go together."""
    name = type(source.model).__name__
    if ranking == "global" and cuts.groups:
        raise TersorError(
            "a global ranking would leave blocks of different sizes, and config.json of "
            f"{name} has one number of heads and one of channels for all blocks; use ranking "
            "local (layers are ranked over the whole model in any case)"
        )
    if how.get("ffn") == "entropy":
        raise TersorError(
            'importance "entropy" is of attention heads, and channels of an MLP have none; give it '
            "as head_importance (--head-importance), and another importance for ffn"
        )
    if "taylor" in how.values():
        check_taylor(source)
    for cut in cuts.groups:
        path = cut.groups.columns
        if update == "bias" and source.blocks[0].get_submodule(path).bias is None:
            raise TersorError(
                f'update "bias" adds to the bias of what reads {cut.what}, and {path} of this '
                f"{name} has none; use least-squares"
            )


def _kept(cuts: Cuts, distances: Sequence[float], together: bool) -> list[int]:
    """The numbers of the blocks that stay. distances: of every block; or, where they go together,
    of every run of as many as go."""
    if isinstance(cuts.drop, tuple):
        return [number for number in range(cuts.depth) if number not in cuts.drop]
    if not cuts.drop:
        return list(range(cuts.depth))
    if together:
        first = min(range(len(distances)), key=distances.__getitem__)
        return [n for n in range(cuts.depth) if not first <= n < first + cuts.drop]
    scores = torch.tensor(distances, dtype=torch.float64)
    kept: list[int] = best(scores, cuts.left).tolist()
    return kept


@dataclass(frozen=True)
class _Block:
    """A block that stays: its number and path now, its number then, and the smaller module."""

    number: int
    path: str
    place: int
    module: nn.Module


@dataclass(frozen=True)
class _Done:
    """A cut that was made. changed: tensors by their names in the block. kept: by what they are,
    the numbers of what stays."""

    changed: dict[str, Tensor]
    kept: dict[str, str]
    report: LayerReport
    departure: str | None


@dataclass(frozen=True)
class _Seen:
    """What was observed of a block. stats: of what linears read, by path; entropy: of its heads."""

    stats: dict[str, GramStats] = field(default_factory=dict)
    entropy: AttentionEntropy | None = None


@dataclass(kw_only=True)
class _Run(Run):
    """how: the importance by what is cut. taylor: the scores, where they are asked for."""

    cuts: Cuts
    how: dict[str, str]
    update: str
    damp: float
    taylor: Scores = field(default_factory=dict)

    def blocks(
        self, kept: list[int], small: nn.Module, windows: Tensor | None, observes: bool
    ) -> Iterator[str]:
        """Yields the path of each block that stays once it is done, now or in an earlier run.
        observes: whether the text goes through the blocks."""
        before = [path for path, _ in self.source.found.blocks(self.source.model)]
        after = [module for _, module in self.source.found.blocks(small)]
        todo = [number for number in kept if before[number] not in self.writer.done]

        def hidden(number: int) -> str:
            """What leaves a block goes past those that are left out to the next that stays."""
            return f"hidden-{next(n for n in kept if n >= number)}"

        if todo and windows is not None and "taylor" in self.how.values():
            ranked = [cut for cut in self.cuts.groups if self.how[cut.what] == "taylor"]
            self.taylor = taylor_scores(self, ranked, windows)
        flow = None
        if todo and windows is not None and observes:
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
        seen = _Seen()
        with ExitStack() as memory:
            with timings.stage("read"):
                memory.enter_context(source.loaded(names.values()))
            if flow:
                with timings.stage("observe"):
                    seen = self._observe(block.path, flow.through(block.number, whole))
            done: dict[str, _Done] = {}
            for cut in self.cuts.groups:
                with timings.stage("solve"):
                    done[cut.what] = self._cut(cut, block, names, seen)
                    seen.stats.pop(f"{block.path}.{cut.groups.columns}", None)
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

    def _observe(self, path: str, passes: Iterator[Tensor]) -> _Seen:
        model, entropy = self.source.model, None
        with ExitStack() as watching:
            for cut in self.cuts.groups:
                if self.how[cut.what] == "entropy":
                    attention = model.get_submodule(
                        f"{path}.{cut.groups.columns}".rpartition(".")[0]
                    )
                    entropy = watching.enter_context(watch_attention(attention, cut.pieces))
            columns = [f"{path}.{cut.groups.columns}" for cut in self.cuts.groups]
            stats = capture({each: model.get_submodule(each) for each in columns}, passes)
        return _Seen(stats, entropy)

    def _scores(
        self, cut: Cut, block: _Block, tensors: Mapping[str, Tensor], seen: _Seen, kind: str
    ) -> Tensor:
        """How much each group (GROUPS) or each query head (QUERIES) matters, float64."""
        how, columns = self.how[cut.what], f"{block.path}.{cut.groups.columns}"
        if how == "taylor":
            return self.taylor[columns, kind]
        if how == "entropy":
            assert seen.entropy is not None  # since it is observed wherever it is asked for
            own = seen.entropy.importance
            return own.view(cut.count, cut.each).mean(1) if kind == GROUPS else own
        count = cut.count if kind == GROUPS else cut.pieces
        w, rows = tensors[f"{cut.groups.columns}.weight"], cut.rows(tensors, kind)
        return importance(how, count, w, rows, seen.stats.get(columns))

    @torch.no_grad()
    def _cut(self, cut: Cut, block: _Block, names: Mapping[str, str], seen: _Seen) -> _Done:
        """names: of the block's tensors, in the block and in the model."""
        source, columns = self.source, cut.groups.columns
        stats, name = seen.stats.get(f"{block.path}.{columns}"), f"{columns}.weight"
        linears = (*cut.groups.rows, columns)
        tensors = {  # as the files have them, which may be finer than what the model computes in
            local: source.where[names[local]].read(source.checkpoint)
            for local in names
            if local.rpartition(".")[0] in linears
        }
        w = tensors[name]
        kept = cut.choose(lambda kind: self._scores(cut, block, tensors, seen, kind))
        changed = cut.apply(tensors, kept)
        notes, departure, shift = [], None, None
        if self.update == "least-squares" and stats is not None:
            new, used = reconstruct(w, cut.pieces, kept, stats, self.damp)
            changed[name] = new.to(w.dtype)
            if stats.tokens < w.shape[1]:
                notes.append(f"only {stats.tokens} tokens for {w.shape[1]} inputs")
            if used > self.damp:
                departure = f"damping raised from {self.damp:g} to {used:g} to factor its inputs"
            if is_pruned(w):
                departure = PRUNED
        elif self.update == "bias" and stats is not None:
            shift, bias = bias_for(w, cut.pieces, kept, stats), f"{columns}.bias"
            changed[bias] = (tensors[bias].double() + shift).to(tensors[bias].dtype)
        report = LayerReport(
            name=f"{renumbered(source.found, block.path, block.place)}.{columns}",
            shape=(changed[name].shape[0], changed[name].shape[1]),
            scheme="W16A16",
            method={"least-squares": "least squares", "none": "cut"}.get(self.update, self.update),
            error=output_error(w, cut.pieces, kept, changed[name], stats, shift),
            sparsity=1 - int(changed[name].count_nonzero()) / changed[name].numel(),
            tokens=stats.tokens if stats is not None else 0,
            bytes=changed[name].nbytes,
            notes=notes,
        )
        numbers = {cut.what: ranges((kept // cut.each).unique().tolist())}
        if cut.kept_each < cut.each:
            numbers["query_heads"] = ranges(kept.tolist())
        return _Done(changed, numbers, report, departure)

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
                **{what: numbers for each in done.values() for what, numbers in each.kept.items()},
            },
            "bytes": nbytes,
            "seconds": timings.seconds,
        }
        self.writer.commit(block.path, info, state)
