"""What the parts of a model are ranked by where the weights and inputs of one linear do not tell:
how far a block moves its input, gradients of the loss, and where heads look."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from tersor.blocks import batches
from tersor.durable import digest_of, durable
from tersor.errors import TersorError
from tersor.models import GROUPS, QUERIES
from tersor.report import Timings
from tersor.runs import Run
from tersor.source import Source
from tersor.surgery.cuts import Cut
from tersor.tensorfile import TensorFile, write_tensors

# How far a token's state y behind a block is from what it was before, by the cosine of the two.
DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "influence": lambda cosine: 1 - cosine,
    "angular": lambda cosine: cosine.clamp(-1, 1).arccos() / math.pi,
}
CONTIGUOUS = "contiguous"  # the third way to rank blocks: as runs, by the angle
TAYLOR = "taylor-scores"  # the file with them, while a run lasts

Scores = dict[tuple[str, str], Tensor]  # by path of the linear, and GROUPS or QUERIES
Watch = Callable[[Tensor, Tensor], None]  # of what enters a block and what leaves it
Found = tuple[dict[str, Any], dict[str, str]]  # JSON data, and files by their digests

# --- blocks ---------------------------------------------------------------------------------------


def block_distances(run: Run, windows: Tensor, kind: str) -> dict[str, float]:
    """Of every block of the original model, by path, the mean over all tokens; in one pass.

    kind: "influence", 1 - cos(x, y) (ShortGPT, arXiv:2403.03853), or "angular", arccos(cos) / π.
    """
    paths = [path for path, _ in run.source.found.blocks(run.source.model)]
    keys = [f"{kind} of {path}" for path in paths]

    def distance(number: int) -> tuple[Watch, Callable[[], Found]]:
        away: list[Tensor] = []

        def watch(x: Tensor, y: Tensor) -> None:
            cosine = cosine_similarity(x.double(), y.double(), dim=-1)
            away.append(DISTANCES[kind](cosine).flatten())

        return watch, lambda: ({"distance": float(torch.cat(away).mean())}, {})

    _through(run, windows, keys, distance)
    return {p: run.writer.done[key]["distance"] for p, key in zip(paths, keys, strict=True)}


def run_distances(run: Run, windows: Tensor, count: int) -> dict[str, float]:
    """Of every run of `count` blocks of the original model, by the path of its first one: the mean
    over windows of arccos(cos(x, y)) / π, x what enters the run and y what leaves it, of the last
    token (Gromov et al., arXiv:2403.17887). One pass."""
    paths = [path for path, _ in run.source.found.blocks(run.source.model)]
    whole, keys = f"runs of {count} blocks", [f"last tokens behind {path}" for path in paths]
    if whole not in run.writer.done:

        def last(number: int) -> tuple[Watch, Callable[[], Found]]:
            before: list[Tensor] = []
            after: list[Tensor] = []

            def watch(x: Tensor, y: Tensor) -> None:
                before.append(x[:, -1].clone())  # not a view, which would keep all of x
                after.append(y[:, -1].clone())

            def result() -> Found:
                name = f"last-{number}"
                tensors = {"x": torch.cat(before), "y": torch.cat(after)}
                digest = _save(run, name, tensors)
                return {"digest": digest}, {name: digest}

            return watch, result

        _through(run, windows, keys, last)
        ends = [
            _saved(run, f"last-{number}", run.writer.done[key]["digest"])
            for number, key in enumerate(keys)
        ]
        angles = [
            DISTANCES["angular"](cosine_similarity(x["x"].double(), y["y"].double(), dim=-1))
            for x, y in zip(ends, ends[count - 1 :], strict=False)
        ]
        means = [float(each.mean()) for each in angles]
        run.writer.commit(whole, {"distances": means, "bytes": 0}, quick=True)
    return dict(zip(paths, run.writer.done[whole]["distances"], strict=False))


def _through(
    run: Run,
    windows: Tensor,
    keys: list[str],
    observe: Callable[[int], tuple[Watch, Callable[[], Found]]],
) -> None:
    """The text through the original model, block by block, each committed under its key.

    observe: gives for a block, by its number, what is shown every batch before and behind it, and
        what then says what is to be recorded of it.
    """
    blocks = list(run.source.found.blocks(run.source.model))
    todo = [number for number, key in enumerate(keys) if key not in run.writer.done]
    if todo:
        flow = run.begin(windows, "whole model", _whole)
        run.bar.expect(len(todo) * len(flow.batches))
    for number in todo:
        run.bar.say(f"ranking block {number + 1} of {len(blocks)}")
        timings, state = Timings(), {}
        path, block = blocks[number]
        watch, result = observe(number)
        with timings.stage("rank"), run.source.loaded(run.source.names(path)):
            outputs = _watched(flow.pairs(number, block), watch)
            if number + 1 < len(blocks):
                state[_whole(number + 1)] = flow.write(number + 1, outputs)
            else:
                deque(outputs, maxlen=0)
            info, files = result()
        info |= {"bytes": 0, "seconds": timings.seconds}
        run.writer.commit(keys[number], info, state | files)
        flow.forget(number)
    for key in keys:
        run.timings.add(run.writer.done[key]["seconds"])


def _watched(pairs: Iterable[tuple[Tensor, Tensor]], watch: Watch) -> Iterator[Tensor]:
    """The second of each pair, once both were shown."""
    for x, y in pairs:
        watch(x, y)
        yield y


def _whole(number: int) -> str:
    """The file with what enters a block of the original model."""
    return f"whole-{number}"


def _save(run: Run, name: str, tensors: Mapping[str, Tensor]) -> str:
    """A file of the run's own, for as long as it lasts; its digest."""
    with durable(run.writer.state_path(name)) as file:
        write_tensors(file, tensors)
    return file.digest


def _saved(run: Run, name: str, digest: str) -> dict[str, Tensor]:
    """TersorError where the file is not as it was written."""
    path = run.writer.state_path(name)
    if not path.is_file() or digest_of(path) != digest:
        raise TersorError(
            f"{path} is missing or changed; remove {run.writer.folder} to start again"
        )
    stored = TensorFile.open(path)
    return {name: stored.read(meta) for name, meta in stored.tensors.items()}


# --- gradients ------------------------------------------------------------------------------------


def check_taylor(source: Source) -> None:
    """TersorError where a model has no loss on plain text, or where it does not fit into memory."""
    if not source.found.arch.causal or source.model.get_output_embeddings() is None:
        raise TersorError(
            'importance "taylor" is of the loss in predicting the next token, which '
            f"{type(source.model).__name__} does not; use output"
        )
    free = _free_memory()
    if free is not None and source.nbytes > free:
        raise TersorError(
            f'importance "taylor" needs the whole model in memory, {source.nbytes / 1e9:.1f} GB, '
            f"and {free / 1e9:.1f} GB are free; use output, which needs one block at a time"
        )


def taylor_scores(run: Run, cuts: Iterable[Cut], windows: Tensor) -> Scores:
    """First-order importance of all groups in the original model, float64 [groups] and, for query
    heads, [pieces]: the mean over windows of |Σ a · ∂L/∂a|, where a is what the linear reads of a
    group, the sum is over its columns and the window's tokens, and L is the window's mean
    cross-entropy (Michel et al., arXiv:1905.10650, for heads; Molchanov et al., arXiv:1906.10771).

    It needs gradients, and so the whole model in memory with the activations of a few windows.
    Where the run is resumed the scores are those in its file.
    """
    if TAYLOR not in run.writer.done:
        timings = Timings()
        with timings.stage("rank"):
            found = _taylor(run, list(cuts), windows)
            digest = _save(run, TAYLOR, {f"{kind}:{path}": t for (path, kind), t in found.items()})
        noted = {"bytes": 0, "digest": digest, "seconds": timings.seconds}
        run.writer.commit(TAYLOR, noted, {TAYLOR: digest})
    info = run.writer.done[TAYLOR]
    run.timings.add(info["seconds"])
    stored = _saved(run, TAYLOR, info["digest"])
    return {(n.partition(":")[2], n.partition(":")[0]): tensor for n, tensor in stored.items()}


def _taylor(run: Run, cuts: list[Cut], windows: Tensor) -> Scores:
    source = run.source
    parts = batches(windows)
    run.bar.expect(len(parts))
    run.bar.say("gradients of the whole model")
    with source.loaded(source.where):
        linears = {
            f"{path}.{cut.groups.columns}": (block.get_submodule(cut.groups.columns), cut)
            for path, block in source.found.blocks(source.model)
            for cut in cuts
        }
        totals: Scores = {}
        with _products(linears, totals, windows.shape[1]), torch.enable_grad():
            for ids in parts:
                logits = source.model(input_ids=ids).logits[:, :-1].flatten(0, 1)
                # A sum, since a mean's gradients would be small for float16.
                loss = cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="sum")
                if not loss.isfinite():
                    raise TersorError(
                        "the model's loss on the calibration text is not finite, so it has no "
                        "gradients; use importance output, or check the weights"
                    )
                loss.backward()
                run.bar.step()
    count = len(windows) * (windows.shape[1] - 1)
    for key, total in totals.items():
        if not total.isfinite().all():
            raise TersorError(
                f"the gradients at {key[0]} hold NaN or Inf; use importance output, or convert the "
                "model to bfloat16 or float32"
            )
        total /= count
    return totals


@contextmanager
def _products(
    linears: Mapping[str, tuple[nn.Module, Cut]], totals: Scores, length: int
) -> Iterator[None]:
    """While it lasts, every backward pass adds to totals |Σ a · ∂L/∂a| of its windows, which are of
    that length: some models give linears all tokens in one dimension."""

    def note(name: str, cut: Cut, x: Tensor, gradient: Tensor) -> None:
        products = x.detach().double() * gradient.double()
        products = products.reshape(-1, length, x.shape[-1]).sum(1)  # [windows, k]
        for kind, count in ((GROUPS, cut.count), (QUERIES, cut.pieces)):
            if kind == GROUPS or cut.each > 1:
                own = products.unflatten(1, (count, -1)).sum(2).abs().sum(0)
                totals[name, kind] = totals.get((name, kind), 0) + own

    def before(name: str, cut: Cut, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if not x.requires_grad:  # no parameter does, so that graphs begin at the first linear
            x.requires_grad_()
        x.register_hook(partial(note, name, cut, x))

    handles = [
        linear.register_forward_pre_hook(partial(before, name, cut))
        for name, (linear, cut) in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _free_memory() -> int | None:
    """Bytes that programs can still have, as Linux counts them; None where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None


# --- attention ------------------------------------------------------------------------------------


class AttentionEntropy:
    """The entropy of what heads attend to, as a share of the most that there could be: log of the
    number of positions that a token sees, 1 for a head that looks everywhere alike. (Clark et al.,
    arXiv:1906.04341, measure heads so.) The first token, which sees but itself, does not count."""

    def __init__(self, heads: int) -> None:
        self.total = torch.zeros(heads, dtype=torch.float64)
        self.rows = 0

    def update(self, weights: Tensor, mask: Tensor | None) -> None:
        """weights: [batch, heads, queries, keys], rows that sum to 1. mask: what was added to the
        scores, or which were allowed (bool); [batch or 1, 1, queries, keys]; None: all."""
        if mask is None:
            seen = torch.full(weights.shape[:3], weights.shape[3])[:, :1]
        else:
            allowed = mask if mask.dtype == torch.bool else mask == 0
            seen = allowed[..., : weights.shape[3]].sum(-1).expand(weights.shape[0], -1, -1)
        for each, count in zip(weights, seen, strict=True):  # a window at a time, in float64
            p = each.double()
            entropy = torch.special.entr(p).sum(-1)  # [heads, queries]
            rows = count[0] > 1
            self.total += (entropy[:, rows] / count[0, rows].double().log()).sum(1)
            self.rows += int(rows.sum())

    @property
    def importance(self) -> Tensor:
        """1 - the mean, float64 [heads]: the most uniform heads have the least."""
        if not self.rows or not self.total.isfinite().all():
            raise TersorError("attention weights hold NaN or Inf; use another importance")
        return 1 - self.total / self.rows


@contextmanager
def watch_attention(module: nn.Module, heads: int) -> Iterator[AttentionEntropy]:
    """While it lasts, the entropy of an attention module is added up. It must run as transformers'
    "eager" does, which alone has the weights (see use_eager)."""
    found = AttentionEntropy(heads)

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None or weights.dim() != 4 or weights.shape[1] != heads:
            raise TersorError(
                f'{type(module).__name__} does not give its attention weights, which "entropy" is '
                "of; use another importance of heads"
            )
        found.update(weights, kwargs.get("attention_mask"))

    handle = module.register_forward_hook(after, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def use_eager(source: Source) -> None:
    """Has the model compute attention in the way that gives its weights, masks included; before
    anything is run."""
    source.model.config._attn_implementation = "eager"
