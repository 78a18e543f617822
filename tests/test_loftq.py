"""LoftQ: one layer against a float64 oracle, and models that come closer to the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny

pytest.importorskip("peft")
from peft import LoftQConfig, LoraConfig, PeftModel

import tersor
from tersor import GPTQ, QSpec, QuantLinear, Scheme, SparseGPT, Sparsity, TersorError
from tersor.adapters.codebook import FP4, NF4, Codebook, quantize_codebook
from tersor.adapters.loftq import LoftQ, cancel, loftq_model
from tersor.adapters.lora import add_lora, prepare_lora
from tersor.adapters.nf4_linear import NF4Linear
from tersor.calibrate import GramStats
from tersor.saving import save
from tersor.solvers import RTN
from tersor.svd import root_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

N, K = 40, 64
W2 = Scheme(QSpec(2, 32))
IDS = torch.randint(0, tiny.VOCAB, (6, 32), generator=torch.manual_seed(0))


def weight(seed: int = 0) -> Tensor:
    return torch.randn(N, K, generator=torch.manual_seed(seed))


def inputs(tokens: int = 400) -> Tensor:
    """Correlated, and of very different sizes."""
    draw = torch.manual_seed(3)
    mix = torch.randn(K, K, generator=draw) * torch.logspace(-1, 1, K)
    return torch.randn(tokens, K, generator=draw) @ mix


def statistics() -> GramStats:
    stats = GramStats(K)
    stats.update(inputs())
    return stats


def quantizers() -> dict[str, Any]:
    stats, needed = statistics(), GPTQ()
    return {
        "rtn": lambda w: RTN()(w, None, W2.weight),
        "nf4": lambda w: quantize_codebook(w, NF4(64)),
        "gptq": lambda w: needed(w, stats, W2.weight),
    }


def relative(error: Tensor, w: Tensor, x: Tensor | None = None) -> float:
    if x is not None:
        error, w = error @ x.T, w @ x.T
    return float((error.square().sum() / w.square().sum()).detach())


# --- one layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("kind", ["rtn", "nf4", "gptq"])
def test_one_iteration_leaves_the_tail_of_the_singular_values(kind: str, rank: int) -> None:
    w, quantize = weight(), quantizers()[kind]
    q, b, a, (plain, error) = cancel(w, quantize, rank)
    residual = w.double() - quantize(w).dequantize(torch.float64)
    tail = torch.linalg.svdvals(residual)[rank:].square().sum()
    left = w.double() - q.dequantize(torch.float64) - b.double() @ a.double()
    assert left.square().sum() == pytest.approx(float(tail), rel=1e-4)
    assert error == pytest.approx(float(tail / w.double().square().sum()), rel=1e-4)
    assert plain == pytest.approx(relative(residual, w.double()), rel=1e-4)
    assert (b.shape, a.shape) == ((N, rank), (rank, K))


@pytest.mark.parametrize("kind", ["rtn", "nf4"])
def test_iterations_are_those_of_the_paper_and_the_best_is_kept(kind: str) -> None:
    w, quantize, rank = weight(), quantizers()[kind], 8
    product = torch.zeros(N, K, dtype=torch.float64)
    errors = []
    for _ in range(4):  # algorithm 1
        q = quantize((w.double() - product).float()).dequantize(torch.float64)
        u, s, vt = torch.linalg.svd(w.double() - q)
        product = u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank]
        errors.append(relative(w.double() - q - product, w.double()))
        *_, (_, got) = cancel(w, quantize, rank, len(errors))
        assert got == pytest.approx(min(errors), rel=1e-3)


def test_weighted_factors_are_the_best_for_the_outputs() -> None:
    """Against the closed form through the symmetric root of the Gram matrix, in float64."""
    w, quantize, rank, damp = weight(), quantizers()["rtn"], 6, 0.01
    stats = statistics()
    q, b, a, (_, error) = cancel(w, quantize, rank, root=root_of(stats, damp))
    x = inputs().double()
    gram = x.T @ x / len(x)
    gram += damp * gram.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gram)
    half = vectors @ torch.diag(values.sqrt()) @ vectors.T
    residual = w.double() - q.dequantize(torch.float64)
    tail = torch.linalg.svdvals(residual @ half)[rank:].square().sum()
    left = residual - b.double() @ a.double()
    total = (w.double() @ half).square().sum()
    assert (left @ half).square().sum() == pytest.approx(float(tail), rel=1e-3)
    assert error == pytest.approx(float(tail / total), rel=1e-3)
    _, b0, a0, _ = cancel(w, quantize, rank)
    plain = residual - b0.double() @ a0.double()
    assert relative(left, w.double(), x) < 0.7 * relative(plain, w.double(), x)


def test_full_rank_cancels_everything_and_rank_0_nothing() -> None:
    w, quantize = weight(), quantizers()["rtn"]
    *_, (_, error) = cancel(w, quantize, N)
    assert error < 1e-10
    q, b, a, (plain, error) = cancel(w, quantize, 0, iterations=3)
    assert plain == error and not (b @ a).any()
    assert torch.equal(q.codes, quantize(w).codes)


def test_works_in_the_precision_of_the_weight() -> None:
    *_, b, a, _ = cancel(weight().double(), quantizers()["nf4"], 3)
    assert b.dtype == a.dtype == torch.float64


# --- models ---------------------------------------------------------------------------------------


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def distance(model: Any, kind: str = "llama") -> float:
    want = logits(tiny.model(kind))
    return float((logits(model) - want).square().mean())


CASES = [
    (Scheme(QSpec(3, 32)), "rtn", LoftQ()),
    (Scheme(QSpec(3, 32)), "rtn", LoftQ(5)),
    (Scheme(QSpec(2, 32, symmetric=False)), "gptq", LoftQ()),
    (W2, GPTQ(act_order=True), LoftQ(2, "activation")),
    (NF4(64), "rtn", LoftQ(1, "activation")),
    (FP4(64), "rtn", LoftQ()),
]


@pytest.mark.parametrize(("to", "method", "settings"), CASES, ids=range(len(CASES)))
def test_model_is_closer_to_the_original_than_a_quantized_one(
    to: Any, method: Any, settings: LoftQ
) -> None:
    config = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")
    model, done = loftq_model(
        tiny.model("llama"), config, to=to, method=method, calibration=IDS, settings=settings
    )
    kind = NF4Linear if isinstance(to, Codebook) else QuantLinear
    names = [n for n, m in model.get_base_model().named_modules() if isinstance(m, kind)]
    assert len(names) == len(done) == 14
    assert all(each.rank == 8 and each.error < 0.8 * each.plain for each in done)

    plain = tiny.model("llama")
    if isinstance(to, Codebook):
        tersor.adapters.nf4_linear.nf4_model(plain, to)
    else:
        tersor.quantize_model(plain, IDS, scheme=to, method=method)
    assert distance(model) < 0.7 * distance(plain)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora" in n)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if "lora" in n
    }


def test_the_model_is_made_of_the_reported_factors() -> None:
    """scaling B A of the layer plus its base is Q + b a of the formula, to the original's W."""
    original = tiny.model("llama")
    config = LoraConfig(r=6, lora_alpha=3, use_rslora=True)
    model, done = loftq_model(tiny.model("llama"), config, to=W2)
    inner = model.get_base_model()
    for each in done:
        layer, w = inner.get_submodule(each.name), original.get_submodule(each.name).weight
        b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        made = layer.base_layer.qweight().dequantize() + layer.scaling["default"] * b @ a
        assert relative(made.double() - w, w.double()) == pytest.approx(each.error, rel=1e-3)
        residual = w - RTN()(w, None, W2.weight).dequantize()
        assert relative(residual, w) == pytest.approx(each.plain, rel=1e-4)


def test_targets_and_ranks_by_pattern() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 7})
    model, done = loftq_model(tiny.model("llama"), config, to=W2)
    ranks = {each.name.rpartition(".")[2]: each.rank for each in done}
    assert (ranks["q_proj"], ranks["up_proj"], ranks["k_proj"]) == (4, 7, 0)
    assert all(each.error == each.plain for each in done if not each.rank)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert layer.lora_A["default"].weight.shape == (7, 64)
    assert config.target_modules == {"q_proj", "up_proj"}


@pytest.mark.parametrize("kind", ["gpt2", "qwen2_moe"])
def test_saves_base_and_adapters_and_loads_them(kind: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, task_type="CAUSAL_LM")
    model, _ = loftq_model(tiny.model(kind), config, to=W2)
    save(model, tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = prepare_lora(tersor.load(tmp_path / "base"))
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_a_linear_that_no_token_reached_is_rounded() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.used, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    net = Net()
    kept = net.unused.weight.detach().clone()
    model, done = loftq_model(
        net,
        LoraConfig(r=3),
        to=W2,
        method="gptq",
        calibration=[torch.randn(50, 32)],
        settings=LoftQ(1, "activation"),
    )
    assert {each.name for each in done} == {"used", "unused"}
    codes = model.base_model.model.unused.base_layer.qweight().codes
    assert torch.equal(codes, RTN(clip=True)(kept, None, W2.weight).codes)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations is at least 1, not 0"),
        ({"weighting": "gram"}, "weighting is none or activation, not 'gram'"),
        ({"damp": 0.0}, "damp must be between 0 and 1"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        LoftQ(**settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"to": "nf4"}, r"`to` is a Scheme\(QSpec\(\.\.\.\)\), NF4"),
        ({"to": NF4(), "method": "gptq"}, "NF4 g64 double rounds to nearest"),
        ({"to": W2, "method": "gptq"}, "gptq needs inputs to calibrate on"),
        ({"to": W2, "settings": LoftQ(1, "activation")}, 'weighting="activation" needs inputs'),
        ({"to": W2, "method": SparseGPT(Sparsity(0.5))}, "sparsegpt prunes"),
        ({"to": W2, "config": {"r": 4}}, r"config is a peft\.LoraConfig"),
        ({"to": W2, "config": LoraConfig(r=65)}, "rank 65 is more than .*q_proj has, 64"),
        ({"to": W2, "config": LoraConfig(r=0)}, "rank r of a LoraConfig is at least 1"),
        ({"to": W2, "config": LoraConfig(target_modules=["lm_head"])}, "none of the linears"),
        ({"to": W2, "config": LoraConfig(exclude_modules=".*")}, "exclude_modules leaves none"),
        ({"to": W2, "config": LoraConfig(rank_pattern={"q_proj": 0})}, "in rank_pattern"),
        ({"to": W2, "config": LoraConfig(use_dora=True)}, "use_dora is not supported"),
        ({"to": Scheme(QSpec(4, 128))}, "group 128 does not divide"),
    ],
)
def test_wrong_input_leaves_the_model_as_it_was(given: dict[str, Any], message: str) -> None:
    model = tiny.model("llama")
    with pytest.raises(TersorError, match=message):
        loftq_model(model, **given)
    assert torch.equal(logits(model), logits(tiny.model("llama")))


def test_a_quantized_model_has_nothing_left_to_cancel() -> None:
    model = tiny.model("llama")
    tersor.swap_linears(model, W2)
    with pytest.raises(TersorError, match="holds a QuantLinear already"):
        loftq_model(model, to=W2)
    with pytest.raises(TersorError, match="has adapters already"):
        loftq_model(add_lora(model), to=W2)


def test_lora_points_to_it() -> None:
    pytest.importorskip("scipy")  # without which peft refuses such a configuration itself
    model = tiny.model("llama")
    tersor.swap_linears(model, W2)
    with pytest.raises(TersorError, match=r"tersor\.loftq_model, which quantizes it"):
        add_lora(model, LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig()))
