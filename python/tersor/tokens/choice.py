"""Which tokens of a prompt go, and what becomes of them: tensors in, tensors out, no model.

Letters: b rows of a batch, h heads, q queries, s tokens (keys), d width. A *slot* is the place of a
token in the whole input, padding included, counted from 0: what is left of a row after pruning is a
list of slots, int64 [b, s], ascending. `real` is bool [b, slots], false for padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 128  # queries, or dropped tokens, at a time: never a table of all tokens by all tokens


def visible(
    queries: Tensor, keys: Tensor, real: Tensor | None, causal: bool, window: int | None
) -> Tensor:
    """What may be attended, bool [b, 1, q, s].

    queries, keys: slots, int64 [b, q] and [b, s]. real: None where there is no padding.
    window: a query sees the keys less than so many slots behind it.
    Every token sees itself, padding too, so that no row of a softmax is empty.
    """
    q, k = queries[:, :, None], keys[:, None, :]
    mask = k <= q if causal else (k >= 0).expand(-1, queries.shape[1], -1)
    if window is not None:
        mask = mask & (k > q - window)
    if real is not None:
        mask = mask & real.gather(1, keys)[:, None, :]
    return (mask | (k == q)).unsqueeze(1)


def first_of(real: Tensor, count: int) -> Tensor:
    """The first `count` real tokens of each row, bool like `real`."""
    return real & (real.cumsum(1) <= count)


def last_of(real: Tensor, count: int) -> Tensor:
    """The last `count` real tokens of each row, bool like `real`."""
    return real & (real.flip(1).cumsum(1).flip(1) <= count)


@torch.no_grad()
def attention_received(
    query: Tensor,
    key: Tensor,
    slots: Tensor,
    real: Tensor | None,
    *,
    causal: bool,
    last: int | None,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The attention that each token receives, float32 or finer [b, s]: the mean of the weights
    softmax(q kᵀ · scaling) over all heads and over the queries that count.

    query: [b, h, s, d]; key: [b, h / n, s, d], a head of keys being read by n of queries; both as
        the attention multiplies them, after any rotation.
    slots: int64 [b, s]. real: bool [b, slots] or None; padding neither attends nor is attended.
    last: the queries that count are the last so many real tokens of a row, as SnapKV's observation
        window (arXiv:2404.14469); None: all of them.
    softcap: scores become softcap · tanh(score / softcap).
    Needs memory for the weights of CHUNK queries, not of all.
    """
    batch, heads, tokens, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    here = torch.ones_like(slots, dtype=torch.bool) if real is None else real.gather(1, slots)
    counted = here if last is None else last_of(here, last)
    # Those that count to the front; rows with fewer of them are filled with some that weigh 0.
    most = int(counted.sum(1).max())
    order = counted.int().sort(dim=1, descending=True, stable=True).indices[:, :most]
    keys = key.to(dtype).transpose(2, 3)
    total = query.new_zeros(batch, tokens, dtype=dtype)
    for chosen in order.split(CHUNK, dim=1):
        count = chosen.shape[1]
        index = chosen[:, None, :, None].expand(-1, heads, -1, query.shape[3])
        q = query.gather(2, index).to(dtype).reshape(batch, key.shape[1], -1, query.shape[3])
        score = (q @ keys).view(batch, heads, count, tokens) * scaling
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        mask = visible(slots.gather(1, chosen), slots, real, causal, window)
        weights = score.masked_fill(~mask, -torch.inf).softmax(-1).mean(1)
        total += (weights * counted.gather(1, chosen)[..., None]).sum(1)
    return total / counted.sum(1, keepdim=True).clamp(min=1)


def choose(scores: Tensor, real: Tensor, safe: Tensor, count: int) -> Tensor:
    """The places of the `count` tokens to keep, int64 [b, count], ascending.

    scores: [b, s], at least 0. real, safe: bool [b, s]. What is safe is kept whatever its score,
    padding only where the row has too little else; of equal scores the later token is kept.
    """
    rank = scores.masked_fill(~real, -1.0).masked_fill(safe, torch.inf)
    order = rank.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :count]
    return (scores.shape[1] - 1 - order).sort(dim=1).values


def merge(
    hidden: Tensor, weight: Tensor, kept: Tensor, real: Tensor, safe: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Averages the tokens that go into the most similar of those that stay.

    As in ToMe (arXiv:2210.09461) a token weighs as much as the tokens it already holds; similarity
    is the cosine of hidden states. A token goes only where it can do no harm: never into a safe
    one, nor into or out of padding, and in a causal model only into a later one, which has seen it
    already. Where there is no such token it is dropped.

    hidden: [b, s, d]. weight: [b, s], how many tokens each one holds. kept: int64 [b, count],
    ascending. real, safe: bool [b, s].
    Returns the kept states [b, count, d], their weights [b, count], and for each of the s tokens
    the place (in s) of the one that it is now part of: its own where it is kept or dropped.
    """
    batch, tokens, width = hidden.shape
    rows = torch.arange(batch, device=hidden.device)[:, None]
    stays = torch.zeros_like(real).scatter(1, kept, True)
    target = (real & ~safe).gather(1, kept)
    gone = (~stays).nonzero()[:, 1].view(batch, -1)
    fine = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    unit = F.normalize(fine.detach(), dim=-1)
    candidates = unit[rows, kept].transpose(1, 2)
    into = torch.empty_like(gone)
    merges = torch.empty_like(gone, dtype=torch.bool)
    for start in range(0, gone.shape[1], CHUNK):
        part = gone[:, start : start + CHUNK]
        allowed = target[:, None, :] & real.gather(1, part)[:, :, None]
        if causal:
            allowed = allowed & (kept[:, None, :] > part[:, :, None])
        likeness = (unit[rows, part] @ candidates).masked_fill(~allowed, -torch.inf)
        best, where = likeness.max(-1)
        into[:, start : start + CHUNK] = where
        merges[:, start : start + CHUNK] = best > -torch.inf

    added = weight.gather(1, gone) * merges
    total = weight.gather(1, kept)
    states = (fine[rows, kept] * total[..., None]).scatter_add(
        1, into[..., None].expand(-1, -1, width), fine[rows, gone] * added[..., None]
    )
    total = total.scatter_add(1, into, added)
    owner = torch.arange(tokens, device=hidden.device).repeat(batch, 1)
    owner = owner.scatter(1, gone, torch.where(merges, kept.gather(1, into), gone))
    return (states / total[..., None]).to(hidden.dtype), total, owner
