"""Logits that are trained: the layer that matters is found, costs count, runs repeat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tiny
from tersor.calibrate import Calibration
from tersor.errors import TersorError
from tersor.models import find_arch
from tersor.qweight import ActSpec
from tersor.scope import settle
from tersor.search import Differentiable, Effort, Space, run, search_checkpoint
from tersor.search.costs import LinearCosts, add_up
from tersor.search.differentiable import Mixture, Shares, descend
from tersor.search.solutions import Solutions
from tersor.search.space import Choice, Unit
from tersor.sparsity import Sparsity

PLANTED = "model.layers.1.mlp.down_proj"
SPACE = Space(bits=(8, 4), group=32, methods=("rtn",), keep=False)
IDS = torch.arange(96).view(4, 24)


def planted(settings: Differentiable) -> tuple[list[str], list[Choice]]:
    """What is found where the smaller candidate is as good as the original in every linear but one,
    which it makes zero."""
    model = tiny.model("llama")
    scope = settle(model, find_arch(model), ())
    units = [Unit(name, (name,)) for name in scope.linears]
    solutions, linears = {}, {}
    for name in scope.linears:
        w = model.get_submodule(name).weight.detach()
        solutions[name] = Solutions((w, 0 * w if name == PLANTED else w), (0.0, 0.0))
        linears[name] = LinearCosts.of(tuple(w.shape), SPACE.candidates, w.dtype, w.dtype)
    seconds = {each.shape: [1.0, 0.5, 0.5] for each in linears.values()}
    costs = add_up(units, linears, seconds, 500_000, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = descend(model, units, SPACE.candidates, solutions, IDS, costs, settings)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return scope.linears, found


def test_the_layer_that_matters_is_found() -> None:
    names, found = planted(Differentiable(strengths=(1.0, 1e4), steps=60, windows=2))
    assert [name for name, number in zip(names, found[0], strict=True) if number == 0] == [PLANTED]
    assert set(found[1]) == {1}  # at any price


def test_the_same_seed_trains_the_same() -> None:
    settings = Differentiable(strengths=(0.1, 1.0), steps=6, seed=3)
    assert planted(settings) == planted(settings)


def test_candidates_share_the_logits_of_what_they_share() -> None:
    space = Space(bits=(4, 2), group=32, sparsities=(Sparsity(pattern=(2, 4)),))
    candidates = space.candidates
    shares = Shares(3, candidates)
    assert [tuple(each.shape) for each in shares.logits] == [(3, 3), (3, 2), (3, 3)]
    bits, masks, methods = shares.logits
    with torch.no_grad():
        bits[0, 1] = 1.0  # W4, the second grid after 16 bits
        masks[0, 1] = 10.0  # 2:4
        methods[0, 2] = 100.0  # gptq, after none and sparsegpt
    names = dict(zip(map(str, candidates), shares.scores()[0].tolist(), strict=True))
    assert names == {
        "16 bits": 0.0,
        "16 bits 2:4 by sparsegpt": 10.0,
        "W4A16 by gptq": 101.0,
        "W4A16 2:4 by sparsegpt": 11.0,
        "W2A16 by gptq": 100.0,
        "W2A16 2:4 by sparsegpt": 10.0,
    }
    assert shares.choice() == (list(names).index("W4A16 by gptq"), 0, 0)
    drawn = shares.draw(0.5, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.sum(1), torch.ones(3))


def test_shares_are_drawn_as_often_as_the_softmax_says() -> None:
    """The Gumbel-max theorem: the largest is candidate c with probability softmax(scores)[c]."""
    shares = Shares(20_000, SPACE.candidates)
    with torch.no_grad():
        shares.logits[0][:, 0] = 1.0
    drawn = shares.draw(0.1, torch.Generator().manual_seed(0)).argmax(1)
    expected = np.exp(1) / (1 + np.exp(1))
    error = np.sqrt(expected * (1 - expected) / 20_000)
    assert float((drawn == 0).float().mean()) == pytest.approx(expected, abs=4 * error)


def test_a_mixture_computes_what_its_shares_say() -> None:
    torch.manual_seed(0)
    weights, bias, x = torch.randn(3, 8, 16), torch.randn(8), torch.randn(5, 16)
    mixture = Mixture(weights, bias, torch.tensor([False, True, False]), ActSpec())
    mixture.shares = torch.tensor([0.2, 0.5, 0.3], requires_grad=True)
    weight = 0.2 * weights[0] + 0.5 * weights[1] + 0.3 * weights[2]
    step = x.abs().amax(1, keepdim=True) / 127.5
    rounded = 0.5 * x + 0.5 * (x / step).round().clamp(-128, 127) * step
    assert torch.allclose(mixture(x), F.linear(rounded, weight, bias), atol=1e-5)
    mixture(x).square().sum().backward()
    assert bool((mixture.shares.grad != 0).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strengths": ()}, "strengths are numbers"),
        ({"strengths": (-1.0,)}, "strengths are numbers"),
        ({"costs": ("zeros",)}, "costs are some of size, latency"),
        ({"steps": 0}, "at least one step"),
        ({"rate": 0.0}, "must be more than 0"),
        ({"temperatures": (1.0, 0.0)}, "must be more than 0"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        Differentiable(**arguments)


def test_a_whole_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs no optuna, and keeps the constraint whatever the training comes to."""
    monkeypatch.setattr(run, "measure", lambda shape, each, *_: [1.0] * (1 + len(each)))
    monkeypatch.setitem(sys.modules, "optuna", None)
    source = tiny.save(tmp_path / "llama", dtype=torch.bfloat16)
    front = search_checkpoint(
        *(source, tmp_path / "out", "size<=0.6x"),
        calibration=Calibration(texts=(tiny.text(),), samples=4, seq_len=48),
        space=Space(bits=(2, 8), group=32),
        effort=Effort(windows=2, population=4),
        differentiable=Differentiable(strengths=(0.1, 10.0), steps=4),
        progress=False,
    )
    assert front.points[front.chosen or 0].bytes <= 0.6 * front.original["size"]
    assert front.settings["differentiable"]["steps"] == 4
    assert {point.origin for point in front.points} <= {"uniform", "additive", "differentiable"}
