"""How sparse each linear is to be, for one ratio over the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tersor.blocks import Flow
from tersor.calibrate import NormStats, capture
from tersor.errors import TersorError
from tersor.scope import BlockScope
from tersor.source import Source

ALLOCATIONS = ("uniform", "owl", "global")
OUTLIER = 5.0  # times the mean score of a block; 5 and 7 are what the paper recommends
SPREAD = 0.08  # of a block's ratio around the mean, at most
MOST = 0.99  # of a linear's weights that a global threshold may take
_HALF = 1 << 16


def global_ratios(
    linears: Iterable[str], load: Callable[[str], Tensor], ratio: float
) -> dict[str, float]:
    """The share of each linear's weights that is among the smallest of all, which are `ratio`.

    load: gives the weight of a linear, [n, k]; called twice for each, so that one is in memory.
    """
    linears = list(linears)
    found = rank = 0
    counts: dict[str, Tensor] = {}
    # Floats that are not negative are in the order of their bits: two counts of 16 bits each.
    for shift in (16, 0):
        for name in linears:
            bits = load(name).float().abs().view(torch.int32).flatten()
            if shift == 0:
                bits = bits[bits >> 16 == found >> 16]
            counts[name] = torch.bincount(bits >> shift & _HALF - 1, minlength=_HALF)
        total = torch.stack(list(counts.values())).sum(0)
        if shift == 16:
            sizes = {name: int(count.sum()) for name, count in counts.items()}
            rank = min(int(ratio * sum(sizes.values())), sum(sizes.values()) - 1)
            below = dict.fromkeys(linears, 0)
        digit = int((total.cumsum(0) <= rank).sum())
        rank -= int(total[:digit].sum())
        for name, count in counts.items():
            below[name] += int(count[:digit].sum())
        found |= digit << shift
    # Weights that are just at the threshold: each linear gives the same part of those it has.
    equal = {name: int(count[digit]) for name, count in counts.items()}
    part = rank / max(1, sum(equal.values()))
    ratios = {name: (below[name] + part * equal[name]) / sizes[name] for name in linears}
    worst = max(ratios, key=lambda name: ratios[name])
    if ratios[worst] > MOST:
        raise TersorError(
            f"a global threshold for {ratio} makes {100 * ratios[worst]:.1f} % of {worst} zero; "
            "use a lower sparsity, --allocation uniform, or --ignore it"
        )
    return ratios


def owl_ratios(
    outliers: Mapping[str, float], ratio: float, spread: float = SPREAD
) -> dict[str, float]:
    """OWL (Yin et al., arXiv:2310.05175): blocks with more outliers are pruned less, within
    `spread` of the ratio, and the mean over blocks is the ratio.

    outliers: the share of outliers of each block. Raises TersorError where a ratio would leave
    [0, 1).
    """
    shares = torch.tensor(list(outliers.values()), dtype=torch.float64)
    width = float(shares.max() - shares.min())
    kept = (shares - shares.min()) * (2 * spread / width if width else 0.0)
    ratios = ratio - (kept - kept.mean())
    if not bool(((ratios >= 0) & (ratios < 1)).all()):
        raise TersorError(
            f"a sparsity of {ratio} leaves OWL no room: its blocks differ by up to {2 * spread}; "
            f"use one from {2 * spread} to {1 - 2 * spread}, or --allocation uniform"
        )
    return dict(zip(outliers, ratios.tolist(), strict=True))


def outliers(
    source: Source,
    blocks: list[BlockScope],
    windows: Tensor,
    path: Callable[[int], Path],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The share of each block's weights whose score |w_ij| ‖x_j‖ is over OUTLIER times the mean of
    the block: one pass of the text through the original model, one block in memory at a time.

    path: of files for the hidden states in between, which are removed again.
    """
    with source.loaded(source.before()):
        flow = Flow(source.model, source.blocks, windows, path, tick, source.device)
        flow.enter()
    found = {}
    for number, block in enumerate(blocks):
        module = source.model.get_submodule(block.path)
        with source.loaded(source.names(block.path)), torch.no_grad():
            taps = {tap[0]: source.model.get_submodule(tap[0]) for tap in block.taps}
            # What comes out of the block is what enters the next one.
            passes = (flow.advance(number, module) for _ in range(1))
            stats = capture(taps, passes, NormStats)
            scores = [
                source.model.get_submodule(name).weight.float().abs()
                * stats[tap[0]].diagonal.sqrt()
                for tap in block.taps
                for name in tap
            ]
        flow.forget(number)
        weights = sum(score.numel() for score in scores)
        limit = OUTLIER * sum(float(score.sum(dtype=torch.float64)) for score in scores) / weights
        found[block.path] = sum(int((score > limit).sum()) for score in scores) / weights
    flow.forget(len(blocks))
    return found
