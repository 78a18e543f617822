"""Which tokens go and what becomes of them, against float64 loops written from the definitions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import tersor
from tersor.tokens.choice import attention_received, choose, first_of, last_of, merge

if TYPE_CHECKING:
    from tersor.demo_model import DemoModel


def scores_by_hand(
    q: Tensor, k: Tensor, real: Tensor, window: int | None, softcap: float | None, last: int | None
) -> Tensor:
    """One row, causal where last is given: float64 loops over heads and queries. q: [h, s, d]."""
    heads, tokens, width = q.shape
    group = heads // len(k)
    places = real.nonzero()[:, 0].tolist()
    queries = places if last is None else places[-last:]
    total = torch.zeros(tokens, dtype=torch.float64)
    for head in range(heads):
        for i in queries:
            seen = [
                j for j in places if last is None or (j <= i and (window is None or i - window < j))
            ]
            score = torch.stack([q[head, i] @ k[head // group, j] for j in seen]) / width**0.5
            if softcap:
                score = softcap * torch.tanh(score / softcap)
            total[seen] += torch.exp(score) / torch.exp(score).sum()
    return total / (heads * len(queries))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("last", [None, 1, 7, 400])
def test_scores_by_hand(
    last: int | None, softcap: float | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.tokens.choice.CHUNK", 5)
    if last is None and window is not None:
        pytest.skip("encoders have no window")
    draw = torch.manual_seed(3)
    q = torch.randn(2, 4, 24, 8, generator=draw, dtype=torch.float64)
    k = torch.randn(2, 2, 24, 8, generator=draw, dtype=torch.float64)
    real = torch.ones(2, 24, dtype=torch.bool)
    real[1, :15] = False
    how: dict[str, Any] = {"causal": last is not None, "last": last, "scaling": 8**-0.5}
    slots = torch.arange(24).repeat(2, 1)
    found = attention_received(q, k, slots, real, window=window, softcap=softcap, **how)
    for row in range(2):
        wanted = scores_by_hand(q[row], k[row], real[row], window, softcap, last)
        torch.testing.assert_close(found[row], wanted, rtol=1e-12, atol=1e-14)
    assert (
        attention_received(q.bfloat16(), k.bfloat16(), slots, real, window=window, **how).dtype
        == torch.float32
    )


def test_choice() -> None:
    real = torch.tensor([[True] * 6, [False, False, False, True, True, True]])
    safe = first_of(real, 1) | last_of(real, 1)
    assert safe.tolist() == [[True, *[False] * 4, True], [False, False, False, True, False, True]]
    scores = torch.tensor([[0.0, 0.3, 0.1, 0.3, 0.2, 0.1], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert choose(scores, real, safe, 4).tolist() == [[0, 1, 3, 5], [2, 3, 4, 5]]
    assert choose(scores, real, safe, 3).tolist() == [[0, 3, 5], [3, 4, 5]]  # the later of equals


@pytest.mark.parametrize("causal", [False, True])
def test_merging_by_hand(causal: bool) -> None:
    draw = torch.manual_seed(1)
    tokens, first, last = 14, 2, 3
    hidden = torch.randn(2, tokens, 5, generator=draw, dtype=torch.float64)
    weight = torch.randint(1, 4, (2, tokens), generator=draw).double()
    real = torch.ones(2, tokens, dtype=torch.bool)
    real[1, :4] = False
    kept = torch.tensor([[0, 1, 4, 7, 8, 11, 12, 13], [3, 4, 5, 8, 10, 11, 12, 13]])
    safe = first_of(real, first) | last_of(real, last)
    states, total, owner = merge(hidden, weight, kept, real, safe, causal)
    dropped = 0
    for row in range(2):
        holds = {i: [i] for i in kept[row].tolist()}
        for i in sorted(set(range(tokens)) - set(holds)):
            could = [
                j
                for j in holds
                if real[row, i] and real[row, j] and not safe[row, j] and (j > i or not causal)
            ]
            if not could:
                assert owner[row, i] == i
                dropped += 1
                continue
            x = hidden[row]
            cosine = [float(x[i] @ x[j] / (x[i].norm() * x[j].norm())) for j in could]
            best = could[cosine.index(max(cosine))]
            assert owner[row, i] == best
            holds[best].append(i)
        for place, (i, inside) in enumerate(holds.items()):
            assert owner[row, i] == i
            w = weight[row, inside]
            assert total[row, place] == w.sum()
            mean = (w[:, None] * hidden[row, inside]).sum(0) / w.sum()
            torch.testing.assert_close(states[row, place], mean)
    assert dropped == (5 if causal else 3)  # 3 of padding


def test_attention_beats_chance(demo_model: DemoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a trained model: without the least attended quarter of a prompt, predictions behind it
    stay closer to those of the whole prompt than without a quarter drawn at random."""
    from tersor import demo

    model: Any = demo.original(demo_model)
    ids = demo.held_out_windows(demo_model)["code"][:32].view(16, -1)[:, :448]

    def predicted(share: float) -> Tensor:
        with tersor.prune_tokens(model, {1: share}), torch.no_grad():
            cache = model(ids[:, :384], logits_to_keep=1).past_key_values
            return model(ids[:, 384:], past_key_values=cache).logits.double().log_softmax(-1)

    def at_random(query: Tensor, key: Tensor, slots: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.rand(slots.shape, generator=draw)

    draw = torch.manual_seed(0)
    whole, by_attention = predicted(1e-9), predicted(0.25)
    monkeypatch.setattr("tersor.tokens.run.attention_received", at_random)
    chance = predicted(0.25)
    near, far = ((whole.exp() * (whole - p)).sum(-1).mean() for p in (by_attention, chance))
    assert 0 < near < far
