"""Pruning by gradients in one shot; which weights are masked; and all that is refused."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import tersor
import tiny
from regression import Regression, batch, top, train
from tersor.errors import TersorError
from tersor.pruning import Movement, Schedule, SoftMovement, Taylor
from tersor.sparsity import Sparsity
from tersor.training.masking import HoldZeros, MaskTraining, Structured, prune_by_gradient

# One shot.


def test_taylor_in_one_shot_is_the_formula() -> None:
    model = Regression()
    model.second.weight.grad = torch.ones_like(model.second.weight)
    model.second.bias.requires_grad_(False)
    weights = {name: getattr(model, name).weight.detach().clone() for name in ("first", "second")}
    whole = Regression()
    scores = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}
    for seed in range(3):
        whole.zero_grad()
        whole(**batch(seed)).loss.backward()
        for name, w in weights.items():
            scores[name] += (getattr(whole, name).weight.grad.double() * w.double()).abs()
    pruned = prune_by_gradient(model.train(), [batch(s) for s in range(3)], Sparsity(0.6))
    for name, w in weights.items():
        keep = top(scores[name], int(0.6 * w.numel()))
        assert torch.equal(getattr(model, name).weight, w * keep), name
    assert pruned.sparsity == pytest.approx(0.6, abs=0.01)
    assert model.training and model.first.weight.requires_grad
    assert not model.second.bias.requires_grad and model.first.weight.grad is None
    assert bool((model.second.weight.grad == 1).all())


def test_one_shot_that_fails_leaves_the_model_as_it_was() -> None:
    model = Regression()
    before = copy.deepcopy(model.state_dict())
    bad = batch(0) | {"labels": torch.full((32, 8), math.nan)}
    with pytest.raises(TersorError, match="loss on a batch is not finite"):
        prune_by_gradient(model, [batch(0), bad], Sparsity(0.5))
    assert not parametrize.is_parametrized(model.first)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    llama = tiny.model("llama")
    with pytest.raises(TersorError, match="gives no loss for a batch; give batches with labels"):
        prune_by_gradient(llama, [{"input_ids": torch.arange(8)[None]}], Sparsity(0.5))
    with pytest.raises(TersorError, match="no batches"):
        prune_by_gradient(model, [], Sparsity(0.5))
    with pytest.raises(TersorError, match="taylor or gradient, not movement"):
        prune_by_gradient(model, [batch(0)], Sparsity(0.5), "movement")


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, Schedule(1)), "give Sparsity"),
        ((None, Schedule(1)), "give Sparsity"),
        ((Sparsity(0.5), Schedule(1), "moving"), "criterion is one of magnitude, gradient"),
        ((Sparsity(0.5), Schedule(1), "soft movement"), "needs its λ"),
        ((Sparsity(0.5), Schedule(1), SoftMovement(1.0)), "in place of a sparsity"),
        ((Sparsity(0.5), Schedule()), "learns its scores in training; give warmup or ramp"),
        ((Sparsity(0.5), Schedule(1, initial=0.5)), "initial must be 0"),
        ((Structured(heads=0.5), Schedule(1), "gradient"), "use taylor for heads"),
    ],
)
def test_bad_settings(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        MaskTraining(*arguments)


def test_more_bad_settings() -> None:
    for ratio in (0, 1, 1.5, -0.1):
        with pytest.raises(TersorError, match="between 0 and 1"):
            Sparsity(ratio)
    with pytest.raises(TersorError, match='per is "layer" or "global"'):
        MaskTraining(Sparsity(0.5), Schedule(1), per="row")
    with pytest.raises(TersorError, match='leave per at "layer"'):
        MaskTraining(Sparsity(pattern=(2, 4)), Schedule(1), per="global")
    with pytest.raises(TersorError, match="Structured takes all blocks"):
        MaskTraining(Structured(ffn=0.5), Schedule(1), ignore=["*"])
    for bad in ({"heads": 1.0}, {"ffn": -0.5}):
        with pytest.raises(TersorError, match="is a share from 0 to less than 1"):
            Structured(**bad)
    with pytest.raises(TersorError, match="give heads or ffn"):
        Structured()
    with pytest.raises(TersorError, match="decay"):
        Taylor(decay=0)
    for settings in ({"strength": 0}, {"strength": 1, "rate": -1}, {"strength": 1, "threshold": 1}):
        with pytest.raises(TersorError, match=r"strength and rate|threshold"):
            SoftMovement(**settings)


def test_models_that_cannot_be_masked() -> None:
    masks = MaskTraining(Sparsity(0.5), Schedule(1))
    with pytest.raises(TersorError, match="attach"):
        masks.step()
    with pytest.raises(TersorError, match=r"experts.*prune its folder"):
        masks.attach(tiny.model("mixtral"))
    with pytest.raises(TersorError, match=r"no nn\.Linear"):
        masks.attach(nn.Sequential(nn.Embedding(4, 4)))
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    pattern = MaskTraining(Sparsity(pattern=(2, 4)), Schedule(1))
    with pytest.raises(
        TersorError, match=r"0: the pattern 2:4 does not divide the 6 input.*ignore"
    ):
        pattern.attach(model)
    model[1].weight = nn.Parameter(torch.ones(4, 4))
    model.append(nn.Linear(4, 4))
    model[2].weight = model[1].weight
    with pytest.raises(TersorError, match=r"1 shares its weight with 2.weight"):
        masks.attach(model)
    with pytest.raises(TersorError, match="include x matches no linear"):
        MaskTraining(Sparsity(0.5), Schedule(1), include=["x"]).attach(Regression())
    with pytest.raises(TersorError, match="matches no module"):
        MaskTraining(Sparsity(0.5), Schedule(1), ignore=["x"]).attach(Regression())
    with pytest.raises(TersorError, match="none of 2 linears has a zero"):
        HoldZeros().attach(Regression())
    with pytest.raises(TersorError, match="no zeros are held"):
        HoldZeros().finish()
    assert masks.model is None


def test_a_quantized_model_is_refused() -> None:
    from tersor import QSpec, Scheme, swap_linears

    model = Regression()
    swap_linears(model, Scheme(QSpec(8, None)))
    for masks in (MaskTraining(Sparsity(0.5), Schedule(1)), HoldZeros()):
        with pytest.raises(TersorError, match="first is a QuantLinear, whose weight is frozen"):
            masks.attach(model)


def test_attaching_twice_and_to_what_is_sparse_already() -> None:
    model = Regression()
    masks = MaskTraining(Sparsity(0.5), Schedule(1), "magnitude").attach(model)
    with pytest.raises(TersorError, match="attached already"):
        masks.attach(Regression())
    with pytest.raises(TersorError, match="the weight of first is parametrized already"):
        MaskTraining(Sparsity(0.6), Schedule(1)).attach(model)
    with pytest.raises(TersorError, match="the weight of first is parametrized already"):
        HoldZeros().attach(model)
    with pytest.raises(TersorError, match=r"prunes for 1 steps and 0 are done"):
        masks.finish()
    masks.step()
    assert masks.finish().sparsity == 0.5
    with pytest.raises(TersorError, match=r"50 % of the weights are zero already.*HoldZeros"):
        MaskTraining(Sparsity(0.4), Schedule(1)).attach(model)
    held = HoldZeros().attach(model)
    with pytest.raises(TersorError, match="held already"):
        held.attach(model)
    held.finish()


def test_finishing_early_takes_what_there_is() -> None:
    model = Regression()
    masks = MaskTraining(Sparsity(0.8), Schedule(0, 10)).attach(model)
    train(model, masks, 5)
    pruned = masks.finish(early=True)
    assert pruned.sparsity == pytest.approx(0.8 * (1 - 0.5**3), abs=0.01)


def test_where_scores_would_learn_from_something_else() -> None:
    """Other processes' gradients, or gradients that are scaled."""

    def begin(criterion: str, **settings: object) -> None:
        usual = {"world_size": 1, "n_gpu": 0, "fp16": False}
        MaskTraining(Sparsity(0.5), Schedule(1), criterion).on_init_end(
            SimpleNamespace(**(usual | settings)), None, None, model=Regression()
        )

    begin("movement")
    begin("magnitude", fp16=True)
    for settings in ({"world_size": 2}, {"n_gpu": 2}):
        with pytest.raises(TersorError, match="one process and on one device, not on 2"):
            begin("movement", **settings)
    with pytest.raises(TersorError, match="movement listens to gradients, which fp16 scales"):
        begin("movement", fp16=True)


def test_steps_without_gradients_teach_nothing() -> None:
    masks = MaskTraining(Sparsity(0.5), Schedule(2), "movement").attach(Regression())
    with pytest.raises(TersorError, match="no gradient has reached the masks"):
        masks.step()
    for option in ("include", "ignore"):
        with pytest.raises(TersorError, match=f"{option} is a list of patterns"):
            MaskTraining(Sparsity(0.5), Schedule(2), **{option: "first"}).attach(Regression())
    broken = Regression()
    broken.first.weight.data[0, 0] = math.nan
    with pytest.raises(TersorError, match="'first' holds 1 NaN"):
        MaskTraining(Sparsity(0.5), Schedule(2)).attach(broken)


def test_the_same_ratio_again_is_refused() -> None:
    """Though rounding down left a little less than it."""
    model = Regression()
    for _ in range(2):
        masks = MaskTraining(Sparsity(0.6), Schedule(), "magnitude")
        if masks_of_first := (model.first.weight == 0).any():
            with pytest.raises(TersorError, match="are zero already"):
                masks.attach(model)
        else:
            masks.attach(model)
            masks.finish()
    assert masks_of_first


def test_what_is_no_criterion() -> None:
    with pytest.raises(TersorError, match="Magnitude is no criterion of masks"):
        MaskTraining(Sparsity(0.5), Schedule(1), tersor.Magnitude(Sparsity(0.5)))
    with pytest.raises(TersorError, match="prior is 0 or more"):
        Movement(prior=-1.0)


def test_a_prior_on_a_linear_that_is_all_zero() -> None:
    model = Regression()
    model.second.weight.data.zero_()
    masks = MaskTraining(Sparsity(0.9), Schedule(warmup=1), Movement(prior=1.0)).attach(model)
    assert all(unit.scores.get_buffer("value").isfinite().all() for unit in masks.units)


def test_one_shot_leaves_the_mode_of_every_module() -> None:
    model = Regression().train()
    model.first.eval()
    prune_by_gradient(model, [batch(0)], Sparsity(0.5))
    assert (model.training, model.first.training, model.second.training) == (True, False, True)


def test_include_and_ignore() -> None:
    model = tiny.model("llama")
    schedule = Schedule(1)
    masks = MaskTraining(
        Sparsity(0.5), schedule, "magnitude", include=["*.mlp.*"], ignore=["*.1.*.up_proj"]
    ).attach(model)
    masks.step()
    pruned = masks.finish(early=True)
    mlp = ("gate_proj", "up_proj", "down_proj")
    wanted = {f"model.layers.{number}.mlp.{name}" for number in (0, 1) for name in mlp}
    assert set(pruned.layers) == wanted - {"model.layers.1.mlp.up_proj"}


def test_embeddings_and_heads_are_left_alone() -> None:
    for tied in (True, False):
        model = tiny.model("llama", tie_word_embeddings=tied)
        masks = MaskTraining(Sparsity(0.5), Schedule(), "magnitude").attach(model)
        assert not parametrize.is_parametrized(model.lm_head)
        pruned = masks.finish()
        assert len(pruned.layers) == 14
        assert int((model.lm_head.weight == 0).sum()) == 0
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
