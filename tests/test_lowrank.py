"""Factorized linears: Eckart-Young in the plain and the whitened norm, models, folders."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tersor
import tiny
from tersor import QSpec, Scheme, TersorError
from tersor.calibrate import GramStats
from tersor.surgery.lowrank import (
    ENTRY,
    LowRankLinear,
    factorize_model,
    load_factorized,
    save_factorized,
)
from tersor.svd import decompose, root_of

IDS = torch.randint(0, tiny.VOCAB, (6, 32), generator=torch.manual_seed(0))
N, K = 48, 64


def weight() -> Tensor:
    """With singular values that fall."""
    draw = torch.manual_seed(0)
    return torch.randn(N, K, generator=draw) @ (
        torch.randn(K, K, generator=draw) * torch.logspace(0, -1.5, K)
    )


def inputs(tokens: int = 500) -> Tensor:
    draw = torch.manual_seed(3)
    return torch.randn(tokens, K, generator=draw) @ (
        torch.randn(K, K, generator=draw) * torch.logspace(-1, 1, K)
    )


def net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(K, N, bias=bias), nn.ReLU(), nn.Linear(N, 8))
    with torch.no_grad():
        model[0].weight.copy_(weight())
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def damped_gram(x: Tensor, damp: float) -> Tensor:
    gram = x.double().T @ x.double() / len(x)
    return gram + damp * gram.diagonal().mean() * torch.eye(x.shape[1], dtype=torch.float64)


# --- the decomposition ----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 7, N])
def test_plain_error_is_the_tail(rank: int) -> None:
    w = weight()
    found = decompose(w)
    b, a = found.factors(rank)
    values = torch.linalg.svdvals(w.double())
    tail = float(values[rank:].square().sum())
    scale = float(values.square().sum())
    error = float((w.double() - b.double() @ a.double()).square().sum())
    assert error == pytest.approx(tail, rel=1e-3, abs=1e-10 * scale)
    assert found.tail(rank) == pytest.approx(tail, rel=1e-3, abs=1e-10 * scale)
    torch.testing.assert_close(b.square().sum(0), a.square().sum(1), rtol=1e-5, atol=0)  # balanced


@pytest.mark.parametrize("rank", [1, 7, 30])
def test_whitened_error_is_the_least_in_the_outputs_norm(rank: int) -> None:
    """Against the closed form through the symmetric root, which shares nothing with Cholesky."""
    w, x = weight(), inputs()
    stats = GramStats(K)
    stats.update(x)
    b, a = decompose(w, root_of(stats, 0.01)).factors(rank)
    gram = damped_gram(x, 0.01)
    values, vectors = torch.linalg.eigh(gram)
    half = vectors @ torch.diag(values.sqrt()) @ vectors.T
    tail = float(torch.linalg.svdvals(w.double() @ half)[rank:].square().sum())

    def loss(b: Tensor, a: Tensor) -> float:
        return float(((w.double() - b.double() @ a.double()) @ half).square().sum())

    assert loss(b, a) == pytest.approx(tail, rel=1e-3)
    assert loss(b, a) < loss(*decompose(w).factors(rank))
    draw = torch.manual_seed(5)
    for _ in range(5):  # nothing near it is better
        db, da = (1e-3 * torch.randn(t.shape, generator=draw) * t.std() for t in (b, a))
        assert loss(b + db, a + da) > loss(b, a)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_rank_is_the_least_with_that_energy(energy: float) -> None:
    squares = torch.linalg.svdvals(weight().double()).square()
    share = squares.cumsum(0) / squares.sum()
    want = next(i + 1 for i, s in enumerate(share.tolist()) if s >= energy - 1e-12)
    assert decompose(weight().double()).rank_for(energy) == want


def test_a_weight_of_low_rank_or_of_zeros() -> None:
    draw = torch.manual_seed(0)
    w = torch.randn(N, 3, generator=draw) @ torch.randn(3, K, generator=draw)
    assert decompose(w).rank_for(0.99999) == 3
    b, a = decompose(torch.zeros(N, K)).factors(2)
    assert decompose(torch.zeros(N, K)).rank_for(0.5) == 1
    assert not (b @ a).any()


def test_inputs_that_never_fire_do_no_harm() -> None:
    x = inputs()
    x[:, :10] = 0
    stats = GramStats(K)
    stats.update(x)
    b, a = decompose(weight(), root_of(stats, 0.01)).factors(20)
    assert b.isfinite().all() and a.isfinite().all()
    zeros = GramStats(K)
    assert root_of(zeros, 0.01) is None
    zeros.update(torch.zeros(4, K))
    assert root_of(zeros, 0.01) is None


def test_damping_grows_until_there_is_a_root() -> None:
    """Fewer tokens than inputs, with rounding that makes eigenvalues below zero."""
    stats = GramStats(K)
    stats.update(1e3 * inputs(K // 4))
    gram = stats.gram.double() / stats.tokens
    damped = gram + 1e-16 * gram.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(damped)
    root = root_of(stats, 1e-16)
    assert root is not None
    more = root @ root.T - gram
    added = more.diagonal().mean()
    assert 0 < added < 1e-4 * gram.diagonal().mean()
    off = more - added * torch.eye(K, dtype=torch.float64)
    assert off.abs().max() <= 1e-12 * gram.abs().max()


# --- models ---------------------------------------------------------------------------------------


def test_rank_for_every_linear() -> None:
    model, x = net(), inputs()
    before = sum(p.numel() for p in model.parameters())
    report = factorize_model(model, rank=5, ignore=[])
    first, last = model[0], model[2]
    assert isinstance(first, LowRankLinear) and first.rank == 5
    assert torch.equal(first.up.bias, net()[0].bias) and first.down.bias is None
    assert isinstance(last, LowRankLinear)
    down, up = first.down.weight.double(), first.up.weight.double()
    bound = 2.0**-24 * (K + 8) * (x.double().abs() @ down.abs().T @ up.abs().T + 1)
    want = x.double() @ (up @ down).T + first.up.bias
    assert bool(((first(x) - want).abs() <= bound).all())
    after = sum(p.numel() for p in model.parameters())
    assert (report.parameters_before, report.parameters_after) == (before, after)
    saved = sum(layer.before - layer.after for layer in report.layers)
    assert before - after == saved > 0
    each = report.layers[0]
    assert (each.rank, each.before, each.after) == (5, N * K, 5 * (N + K))
    s = torch.linalg.svdvals(weight().double())
    error = s[5:].square().sum() / s.square().sum()
    assert each.weight_error == pytest.approx(float(error), rel=1e-3)
    assert each.output_error is None
    assert all(p.requires_grad for p in model.parameters())


def test_energy_gives_each_its_own_rank_and_keeps_what_would_not_shrink() -> None:
    model = net()
    report = factorize_model(model, energy=0.9)
    squares = torch.linalg.svdvals(weight().double()).square().cumsum(0)
    want = int((squares < 0.9 * squares[-1]).sum()) + 1
    assert report.layers[0].rank == want == model[0].rank
    assert report.layers[1].rank is None and type(model[2]) is nn.Linear
    assert "no smaller" in report.kept["2"]
    assert torch.equal(model[2].weight, net()[2].weight)


def test_calibration_makes_the_outputs_closer() -> None:
    x = inputs()
    want = x.double() @ weight().double().T

    def error(model: nn.Sequential) -> float:
        got = x.double() @ (model[0].up.weight.double() @ model[0].down.weight.double()).T
        return float(((got - want).square().sum() / want.square().sum()).detach())

    plain, aware = net(), net()
    factorize_model(plain, rank=6)
    report = factorize_model(aware, rank=6, calibration=[x])
    assert report.layers[0].output_error == pytest.approx(error(aware), rel=1e-3)
    assert error(aware) < error(plain)


@pytest.mark.parametrize("given", [{"rank": 16}, {"energy": 0.9, "calibration": IDS}])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt", "bert"])
def test_saves_and_loads(kind: str, given: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.model(kind)
    report = factorize_model(model, **given)
    assert report.parameters_after < report.parameters_before
    save_factorized(model, tmp_path / "out")
    for load in (load_factorized, tersor.load):
        loaded = load(tmp_path / "out")
        assert torch.equal(logits(loaded), logits(model))
        assert type(loaded) is type(model) and not loaded.training
    ranks = json.loads((tmp_path / "out/config.json").read_text())[ENTRY]["ranks"]
    assert ranks == {layer.name: layer.rank for layer in report.layers if layer.rank}
    save_factorized(loaded, tmp_path / "again")
    assert torch.equal(logits(tersor.load(tmp_path / "again")), logits(model))


def test_loads_in_another_dtype_and_keeps_what_is_tied(tmp_path: Path) -> None:
    model = tiny.model("llama", tie_word_embeddings=True)
    factorize_model(model, rank=8)
    save_factorized(model, tmp_path / "out")
    loaded = load_factorized(tmp_path / "out", torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(p.requires_grad for p in loaded.parameters())


def test_plain_transformers_refuses_the_folder(tmp_path: Path) -> None:
    """Instead of making up the weights that it misses."""
    model = tiny.model("llama")
    factorize_model(model, rank=8)
    save_factorized(model, tmp_path / "out")
    with pytest.raises(ValueError, match=ENTRY):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_blocks_see_the_factorized_ones_before_them() -> None:
    model, original = tiny.model("llama"), tiny.model("llama")
    report = factorize_model(model, rank=8, calibration=IDS)
    name = "model.layers.1.self_attn.q_proj"
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    logits(model)
    x, w = seen[0].reshape(-1, 64).double(), original.get_submodule(name).weight.double()
    layer = model.get_submodule(name)
    want = x @ w.T
    got = x @ (layer.up.weight.double() @ layer.down.weight.double()).T
    error = float(((got - want).square().sum() / want.square().sum()).detach())
    each = next(layer for layer in report.layers if layer.name == name)
    assert each.output_error == pytest.approx(error, rel=1e-3)


def test_can_be_trained() -> None:
    model = net()
    factorize_model(model, rank=4)
    model(inputs(4)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give rank or energy, one of them"),
        ({"rank": 4, "energy": 0.5}, "give rank or energy, one of them"),
        ({"rank": 0}, "rank is a number from 1, not 0"),
        ({"rank": 2.0}, "rank is a number from 1"),
        ({"rank": True}, "rank is a number from 1"),
        ({"energy": 0.0}, "energy is above 0 and at most 1"),
        ({"energy": 1.5}, "energy is above 0 and at most 1, not 1.5"),
        ({"energy": math.nan}, "energy is above 0"),
        ({"energy": "0.9"}, "energy is above 0"),
        ({"rank": 4, "damp": 0.0}, "damp must be between 0 and 1"),
        ({"rank": 40}, "rank 40 makes no linear smaller; the largest that would is 38"),
        ({"rank": 4, "ignore": ["*.nope"]}, "matches no module"),
        ({"energy": 1.0}, "energy 1.0 makes no linear smaller"),
    ],
)
def test_wrong_settings(given: dict[str, Any], message: str) -> None:
    model = tiny.model("llama")
    with pytest.raises(TersorError, match=message):
        factorize_model(model, **given)
    assert torch.equal(logits(model), logits(tiny.model("llama")))


def test_wrong_models() -> None:
    with pytest.raises(TersorError, match=r"bare nn\.Linear"):
        factorize_model(nn.Linear(8, 8), rank=1)
    with pytest.raises(TersorError, match="on meta"):
        factorize_model(nn.Sequential(nn.Linear(8, 8, device="meta")), rank=1)
    with pytest.raises(TersorError, match=r"would have to become nn\.Linear to be factorized"):
        factorize_model(tiny.model("gpt2"), rank=4)
    quantized = tiny.model("llama")
    tersor.swap_linears(quantized, Scheme(QSpec(4, 32)))
    with pytest.raises(TersorError, match="holds a QuantLinear already"):
        factorize_model(quantized, rank=4)
    twice = tiny.model("llama")
    factorize_model(twice, rank=4)
    with pytest.raises(TersorError, match="is a LowRankLinear already"):
        factorize_model(twice, rank=2)
    bad = net()
    with torch.no_grad():
        bad[2].weight[0, 0] = math.inf
    with pytest.raises(TersorError, match=r"2\.weight'? holds 0 NaN and 1 infinite"):
        factorize_model(bad, rank=2)
    assert type(bad[0]) is nn.Linear


def test_wrong_saving(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="no model of transformers with LowRankLinear"):
        save_factorized(tiny.model("llama"), tmp_path / "a")
    model = net()
    factorize_model(model, rank=2)
    with pytest.raises(TersorError, match="no model of transformers with LowRankLinear"):
        save_factorized(model, tmp_path / "a")
    real = tiny.model("llama")
    factorize_model(real, rank=2)
    save_factorized(real, tmp_path / "a")
    with pytest.raises(TersorError, match="exists already"):
        save_factorized(real, tmp_path / "a")


def _rank(value: object) -> Callable[[dict[str, Any]], object]:
    return lambda c: c[ENTRY]["ranks"].update({"model.layers.0.self_attn.q_proj": value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop(ENTRY), "has no ranks under"),
        (lambda c: c.update({ENTRY: []}), "has no ranks under"),
        (lambda c: c[ENTRY].update(ranks={}), "has no ranks under"),
        (lambda c: c[ENTRY].pop("model_type"), "has no model 'LlamaForCausalLM' of type None"),
        (_rank(9), "shape"),
        (_rank(0), "the rank 0, and it has from 1 to 64"),
        (_rank(10**9), "and it has from 1 to 64"),
        (_rank("8"), "gives .*q_proj the rank '8'"),
        (_rank(True), "the rank True"),
        (lambda c: c[ENTRY]["ranks"].update(nope=3), "factorizes nope, which is no linear"),
        (lambda c: c[ENTRY]["ranks"].update({"model.norm": 3}), "model.norm, which is no linear"),
        (lambda c: c[ENTRY]["ranks"].pop("model.layers.0.mlp.up_proj"), "up_proj"),
    ],
)
def test_wrong_folders(damage: Callable[[dict[str, Any]], object], message: str,
                       tmp_path: Path) -> None:  # fmt: skip
    model = tiny.model("llama")
    factorize_model(model, rank=8)
    save_factorized(model, tmp_path / "out")
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    damage(config)
    path.write_text(json.dumps(config))
    with pytest.raises(TersorError, match=message):
        load_factorized(tmp_path / "out")
