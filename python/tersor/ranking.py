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

from tersor.blocks import Flow, batches
from tersor.cuts import Cut
from tersor.durable import digest_of, durable
from tersor.errors import TersorError
from tersor.models import GROUPS, QUERIES
from tersor.report import Timings
from tersor.runs import Run
from tersor.source import Source
from tersor.tensorfile import TensorFile, write_tensors

# How far a token's state y behind a block is from what it was before, by the cosine of the two.
DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "influence": lambda cosine: 1 - cosine,
    "angular": lambda cosine: cosine.clamp(-1, 1).arccos() / math.pi,
}
TAYLOR = "taylor-scores"  # the file with them, while a run lasts


# --- blocks ---------------------------------------------------------------------------------------


def block_distances(run: Run, windows: Tensor, kind: str) -> dict[str, float]:
    """Of every block of the original model, by path, the mean over all tokens; in one pass.

    kind: "influence", 1 - cos(x, y) (ShortGPT, arXiv:2403.03853), or "angular", arccos(cos) / π
        (arXiv:2403.17887, which takes the last token of each text alone).
    """
    paths = [path for path, _ in run.source.found.blocks(run.source.model)]
    keys = [f"{kind} of {path}" for path in paths]
    todo = [number for number, key in enumerate(keys) if key not in run.writer.done]
    if todo:
        flow = run.begin(windows, "whole model", _whole)
        run.bar.expect(len(todo) * len(flow.batches))
        for number in todo:
            run.bar.say(f"{kind} of block {number + 1} of {len(paths)}")
            _block_distance(run, keys[number], kind, number, flow)
    done = [run.writer.done[key] for key in keys]
    for info in done:
        run.timings.add(info["seconds"])
    return {path: info["distance"] for path, info in zip(paths, done, strict=True)}


def _block_distance(run: Run, key: str, kind: str, number: int, flow: Flow) -> None:
    timings, state = Timings(), {}
    blocks = list(run.source.found.blocks(run.source.model))
    path, block = blocks[number]
    away: list[Tensor] = []
    with timings.stage("rank"), run.source.loaded(run.source.names(path)):
        outputs = _watched(flow.pairs(number, block), DISTANCES[kind], away)
        if number + 1 < len(blocks):
            state[_whole(number + 1)] = flow.write(number + 1, outputs)
        else:
            deque(outputs, maxlen=0)
    mean = float(torch.cat(away).mean())
    run.writer.commit(key, {"distance": mean, "bytes": 0, "seconds": timings.seconds}, state)
    flow.forget(number)


def _watched(
    pairs: Iterable[tuple[Tensor, Tensor]], distance: Callable[[Tensor], Tensor], away: list[Tensor]
) -> Iterator[Tensor]:
    """The second of each pair; how far it is from the first is noted token by token."""
    for x, y in pairs:
        away.append(distance(cosine_similarity(x.double(), y.double(), dim=-1)).flatten())
        yield y


def _whole(number: int) -> str:
    """The file with what enters a block of the original model."""
    return f"whole-{number}"


# --- gradients ------------------------------------------------------------------------------------

Scores = dict[tuple[str, str], Tensor]  # by path of the linear, and GROUPS or QUERIES


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
    path = run.writer.state_path(TAYLOR)
    if TAYLOR not in run.writer.done:
        timings = Timings()
        with timings.stage("rank"):
            found = _taylor(run, list(cuts), windows)
            tensors = {f"{kind}:{linear}": t for (linear, kind), t in found.items()}
            with durable(path) as file:
                write_tensors(file, tensors)
        noted = {"bytes": 0, "digest": file.digest, "seconds": timings.seconds}
        run.writer.commit(TAYLOR, noted, {TAYLOR: file.digest})
    info = run.writer.done[TAYLOR]
    if not path.is_file() or digest_of(path) != info["digest"]:
        raise TersorError(
            f"{path} is missing or changed; remove {path.parent.parent} to start again"
        )
    run.timings.add(info["seconds"])
    stored = TensorFile.open(path)
    return {
        (name.partition(":")[2], name.partition(":")[0]): stored.read(meta)
        for name, meta in stored.tensors.items()
    }


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
