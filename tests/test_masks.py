"""Masks that are learned in training, against formulas and slow selections in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import tiny
from tersor.errors import TersorError
from tersor.masking import HoldZeros, MaskTraining, Structured, prune_by_gradient
from tersor.pruning import Gradient, Movement, Schedule, SoftMovement, Taylor
from tersor.sparsity import Sparsity

K, N = 16, 12


class Regression(nn.Module):
    """Two linears; its output has a loss, as that of a model of transformers has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(K, N), nn.Linear(N, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Regression:
        self.loss = (self.second(torch.tanh(self.first(x))) - labels).square().mean()
        return self


def batch(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(32, K, generator=draw)
    return {"x": x, "labels": x[:, :8].sin() * 2}


def train(
    model: nn.Module,
    masks: MaskTraining,
    steps: int,
    each: Callable[[int], None] = lambda step: None,
    lr: float = 1e-2,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.1)
    for step in range(steps):
        each(step)
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.step()


def top(scores: Tensor, zeros: int) -> Tensor:
    """A mask without the lowest scores, by sorting."""
    keep = torch.ones(scores.numel(), dtype=torch.bool)
    keep[scores.flatten().double().argsort()[:zeros]] = False
    return keep.view(scores.shape)


# The schedule.


@pytest.mark.parametrize("initial", [0.0, 0.25])
def test_schedule_is_the_cubic_one(initial: float) -> None:
    schedule = Schedule(warmup=5, ramp=20, cooldown=7, initial=initial)
    final = 0.85
    for t in range(40):
        if t < 5:
            wanted = initial * final
        elif t < 25:
            wanted = final + (initial * final - final) * (1 - (t - 5) / 20) ** 3
        else:
            wanted = final
        assert final * schedule.share(t) == pytest.approx(wanted, abs=1e-12)
    assert (schedule.frozen, schedule.steps) == (25, 32)


def test_schedule_changes_every_so_often_and_at_its_end() -> None:
    schedule = Schedule(warmup=2, ramp=10, every=4)
    assert [t for t in range(30) if schedule.changes(t)] == [2, 6, 10, 12]
    once = Schedule(warmup=3)
    assert [t for t in range(9) if once.changes(t)] == [3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": -1}, "warmup is a whole number of steps, 0 or more"),
        ({"ramp": 2.5}, "ramp is a whole number"),
        ({"ramp": True}, "ramp is a whole number"),
        ({"every": 0}, "every is a whole number of steps, 1 or more"),
        ({"initial": 1.0}, "initial is a share"),
        ({"initial": float("nan")}, "initial is a share"),
    ],
)
def test_bad_schedules(settings: dict[str, float], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        Schedule(**settings)


# Scores and the masks that follow from them.


def gradients(model: Regression, step: int, keep: dict[str, Tensor]) -> dict[str, Tensor]:
    """∂L/∂W', W' = W * mask, of each linear, written out in float64."""
    weights = {
        name: getattr(model, name).parametrizations.weight.original.detach().double() * mask
        for name, mask in keep.items()
    }
    bias = {name: getattr(model, name).bias.detach().double() for name in keep}
    x, labels = (each.double() for each in batch(step).values())
    hidden = torch.tanh(x @ weights["first"].T + bias["first"])
    out = hidden @ weights["second"].T + bias["second"]
    d_out = 2 * (out - labels) / out.numel()
    d_hidden = (d_out @ weights["second"]) * (1 - hidden**2)
    return {"first": d_hidden.T @ x, "second": d_out.T @ hidden}


class Oracle:
    """The scores of the two linears, in float64, from the gradients of every step."""

    def __init__(self, kind: str, model: Regression) -> None:
        self.kind, self.model, self.t = kind, model, 0
        weights = {name: getattr(model, name).weight.double() for name in ("first", "second")}
        zero = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.scores, self.mean, self.square = (copy.deepcopy(zero) for _ in range(3))
        self.keep = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}

    def observe(self, step: int) -> None:
        """Before the optimizer moves the weights."""
        self.t += 1
        for name, g in gradients(self.model, step, self.keep).items():
            w = getattr(self.model, name).parametrizations.weight.original.detach().double()
            if self.kind == "gradient":
                self.scores[name] = 0.9 * self.scores[name] + g.abs()
            elif self.kind == "taylor":
                self.scores[name] = 0.9 * self.scores[name] + (g * w).abs()
            elif self.kind == "descent":
                self.scores[name] -= g * w
            elif self.kind == "movement":
                self.mean[name] = 0.9 * self.mean[name] + 0.1 * g * w
                self.square[name] = 0.999 * self.square[name] + 0.001 * (g * w) ** 2
                unbiased = self.mean[name] / (1 - 0.9**self.t)
                size = (self.square[name] / (1 - 0.999**self.t)).sqrt() + 1e-12
                self.scores[name] -= unbiased / size


CRITERIA = {
    "gradient": Gradient(decay=0.9),
    "taylor": Taylor(decay=0.9),
    "descent": Movement(adam=False),
    "movement": Movement(),
    "magnitude": "magnitude",
}


@pytest.mark.parametrize("per", ["layer", "global"])
@pytest.mark.parametrize("kind", CRITERIA)
def test_masks_are_the_best_of_the_scores_at_every_step(kind: str, per: str) -> None:
    model = Regression()
    oracle = Oracle(kind, model)
    schedule = Schedule(warmup=3, ramp=12, cooldown=5, every=2)
    masks = MaskTraining(Sparsity(0.7), schedule, CRITERIA[kind], per=per).attach(model)
    changed = []

    def each(step: int) -> None:
        mine = {name: getattr(model, name).weight != 0 for name in oracle.keep}
        if schedule.changes(step):
            changed.append(step)
            scores = oracle.scores
            if kind == "magnitude":
                scores = {
                    name: getattr(model, name).parametrizations.weight.original.detach().abs()
                    for name in scores
                }
            share = 1 - (1 - (step - 3) / 12) ** 3
            sizes = [score.numel() for score in scores.values()]
            if per == "global":
                whole = torch.cat([score.flatten() for score in scores.values()])
                parts = top(whole, int(0.7 * share * len(whole))).split(sizes)
            else:
                pairs = zip(scores.values(), sizes, strict=True)
                parts = [top(score, int(0.7 * share * size)) for score, size in pairs]
            for (name, score), part in zip(scores.items(), parts, strict=True):
                wanted = part.view(score.shape)
                assert torch.equal(mine[name], wanted), (step, name)
                oracle.keep[name] = wanted
        for name, wanted in oracle.keep.items():  # in between, and once frozen, they stay
            assert torch.equal(mine[name], wanted), (step, name)
        oracle.observe(step)

    train(model, masks, 20, each)
    assert changed == [3, 5, 7, 9, 11, 13, 15]
    assert masks.done == 20


def test_a_weight_that_was_pruned_can_come_back() -> None:
    model = Regression()
    masks = MaskTraining(Sparsity(0.5), Schedule(warmup=2, ramp=30)).attach(model)
    seen: list[Tensor] = []
    train(model, masks, 32, lambda step: seen.append(model.first.weight != 0))
    pairs = zip(seen, seen[1:], strict=False)
    assert any(bool((later & ~earlier).any()) for earlier, later in pairs)


def test_the_signal_is_of_all_backward_passes_of_a_step() -> None:
    """Two halves of a batch, each with half the loss, teach what the whole does."""
    whole, halves = Regression(), Regression()
    for model, parts in ((whole, 1), (halves, 2)):
        masks = MaskTraining(Sparsity(0.5), Schedule(4), Movement(adam=False)).attach(model)
        inputs = batch(0)
        for x, labels in zip(*(each.chunk(parts) for each in inputs.values()), strict=True):
            (model(x=x, labels=labels).loss / parts).backward()
        masks.step()
    one, two = (m.first.parametrizations.weight[0].scores.value for m in (whole, halves))
    assert bool(one.any())
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-9)


def test_a_gradient_that_is_not_finite_teaches_nothing() -> None:
    model = Regression()
    masks = MaskTraining(Sparsity(0.5), Schedule(4)).attach(model)
    (model(**batch(0)).loss * float("inf")).backward()
    masks.step()
    assert not model.first.parametrizations.weight[0].scores.value.any()
    assert masks.done == 1


def test_a_frozen_weight_may_have_a_mask_that_learns() -> None:
    model = Regression()
    model.first.weight.requires_grad_(False)
    before = model.first.weight.clone()
    masks = MaskTraining(Sparsity(0.5), Schedule(2, 6)).attach(model)
    train(model, masks, 8)
    masks.finish()
    assert not model.first.weight.requires_grad
    kept = model.first.weight != 0
    assert int(kept.sum()) == N * K // 2
    assert torch.equal(model.first.weight[kept], before[kept])


def test_soft_movement_is_the_published_form() -> None:
    """S by Adam on g W + λ_t σ'(S) / count, and W stays where σ(S) > τ."""
    model = Regression()
    soft = SoftMovement(strength=2.0, rate=0.1, threshold=0.3)
    schedule = Schedule(warmup=2, ramp=20, cooldown=4)
    masks = MaskTraining(None, schedule, soft).attach(model)
    oracle = Oracle("none", model)
    count, zeros = N * K + 8 * N, []

    def each(step: int) -> None:
        for name, keep in oracle.keep.items():
            if schedule.changes(step):
                keep.copy_(torch.sigmoid(oracle.scores[name]) > 0.3)
            assert torch.equal(getattr(model, name).weight != 0, keep), step
        zeros.append(masks.zeros)
        if step >= 22:
            return
        strength = 2.0 * (1 - (1 - (step - 2) / 20) ** 3) if step >= 2 else 0.0
        oracle.t += 1
        for name, g in gradients(model, step, oracle.keep).items():
            w = getattr(model, name).parametrizations.weight.original.detach().double()
            s = torch.sigmoid(oracle.scores[name])
            d = g * w + strength / count * s * (1 - s)
            oracle.mean[name] = 0.9 * oracle.mean[name] + 0.1 * d
            oracle.square[name] = 0.999 * oracle.square[name] + 0.001 * d**2
            unbiased = oracle.mean[name] / (1 - 0.9**oracle.t)
            size = (oracle.square[name] / (1 - 0.999**oracle.t)).sqrt() + 1e-12
            oracle.scores[name] -= 0.1 * unbiased / size

    train(model, masks, 26, each)
    assert zeros[0] == 0 and 0.1 < zeros[-1] < 1


# Patterns.


@pytest.mark.parametrize("criterion", ["movement", "magnitude", "taylor"])
def test_a_pattern_is_kept_at_every_step(criterion: str) -> None:
    """On the way no four lose more than two; from the end of the ramp on each loses two."""
    model = Regression()
    schedule = Schedule(warmup=2, ramp=10, cooldown=4)
    masks = MaskTraining(Sparsity(pattern=(2, 4)), schedule, criterion).attach(model)

    def each(step: int) -> None:
        for linear in (model.first, model.second):
            lost = (linear.weight == 0).view(linear.out_features, -1, 4).sum(-1)
            share = 0.0 if step < 2 else 1 - max(0, 1 - (step - 2) / 10) ** 3
            assert int(lost.max()) <= 2
            assert int(lost.sum()) == int(share / 2 * linear.weight.numel())
            if step >= 12:
                assert bool((lost == 2).all())

    train(model, masks, 16, each)
    each(16)
    masks.finish()
    each(16)


def test_a_pattern_keeps_the_best_of_each_four() -> None:
    model = Regression()
    masks = MaskTraining(Sparsity(pattern=(1, 4)), Schedule(3), Taylor(decay=1.0)).attach(model)
    train(model, masks, 3)
    scores = model.first.parametrizations.weight[0].scores.value
    best = scores.view(N, -1, 4).argmax(-1)
    kept = (model.first.weight != 0).view(N, -1, 4)
    assert torch.equal(kept.int().argmax(-1), best) and bool((kept.sum(-1) == 1).all())


# What survives.


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_zeros_survive_the_optimizer_and_its_state(
    optimizer: type[torch.optim.Optimizer],
) -> None:
    model = Regression()
    settings = {"momentum": 0.9} if optimizer is not torch.optim.AdamW else {}
    made = optimizer(model.parameters(), lr=1e-2, weight_decay=0.1, **settings)
    for step in range(5):  # momentum from before there were masks
        model(**batch(step)).loss.backward()
        made.step()
        made.zero_grad()
    parameter = model.first.weight
    masks = MaskTraining(Sparsity(0.5), Schedule(), "magnitude").attach(model)
    gone = model.first.weight == 0
    assert int(gone.sum()) == N * K // 2
    for step in range(50):
        model(**batch(step)).loss.backward()
        made.step()
        made.zero_grad()
        masks.step()
        assert torch.equal(model.first.weight == 0, gone)
    assert bool(parameter[gone].any())  # W itself has moved there, which must not show
    pruned = masks.finish()
    assert model.first.weight is parameter and type(model.first) is nn.Linear
    assert torch.equal(parameter == 0, gone) and not parameter[gone].signbit().any()
    assert pruned.layers["first"] == 0.5
    assert list(model.state_dict()) == list(Regression().state_dict())


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_training_after_pruning_keeps_the_zeros(weight_decay: float) -> None:
    model = Regression()
    with torch.no_grad():
        model.first.weight.view(N, -1, 4)[..., 1:3] = 0
    before = model.first.weight.clone()
    held = HoldZeros().attach(model)
    assert type(model.second) is nn.Linear  # nothing to hold there
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=weight_decay)
    for step in range(50):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(model.first.weight == 0, before == 0)
    pruned = held.finish()
    assert torch.equal(model.first.weight == 0, before == 0)
    assert bool((model.first.weight != before)[before != 0].all())
    assert pruned.sparsity == 0.5 and pruned.layers == {"first": 0.5}


@pytest.mark.parametrize("kind", ["movement", "taylor", "soft", "magnitude"])
def test_a_loop_goes_on_from_a_state_dict(kind: str) -> None:
    def made() -> tuple[Regression, MaskTraining]:
        criterion = SoftMovement(5.0, rate=0.1) if kind == "soft" else kind
        sparsity = None if kind == "soft" else Sparsity(0.75)
        model = Regression()
        return model, MaskTraining(sparsity, Schedule(2, 10, 2), criterion).attach(model)

    def run(model: Regression, masks: MaskTraining, steps: range) -> None:
        for step in steps:
            model(**batch(step)).loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
            masks.step()

    whole, masks = made()
    run(whole, masks, range(14))
    masks.finish()
    first, masks = made()
    run(first, masks, range(6))
    second, masks = made()
    run(second, masks, range(13))  # somewhere else, and already frozen
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert masks.done == 6
    run(second, masks, range(6, 14))
    masks.finish()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_scores_stay_in_float32() -> None:
    model = Regression()
    masks = MaskTraining(Sparsity(0.5), Schedule(4)).attach(model)
    train(model, masks, 1)
    before = model.first.parametrizations.weight[0].scores.value.clone()
    model.bfloat16()
    assert torch.equal(model.first.parametrizations.weight[0].scores.value, before)
    assert model.first.weight.dtype == torch.bfloat16
    assert model.first.parametrizations.weight[0].keep.dtype == torch.bool


def test_a_copy_of_the_model_learns_on_its_own() -> None:
    model = Regression()
    MaskTraining(Sparsity(0.5), Schedule(4)).attach(model)
    other = copy.deepcopy(model)
    other(**batch(0)).loss.backward()
    mask, its = (m.first.parametrizations.weight[0] for m in (model, other))
    assert mask.unit.heard is None and its.unit.heard is not None
    assert its.unit.scores is its.scores is not mask.scores


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
        with pytest.raises(TersorError, match="strength and rate|threshold"):
            SoftMovement(**settings)


def test_models_that_cannot_be_masked() -> None:
    masks = MaskTraining(Sparsity(0.5), Schedule(1))
    with pytest.raises(TersorError, match="attach"):
        masks.step()
    with pytest.raises(TersorError, match=r"experts.*prune its folder"):
        masks.attach(tiny.model("mixtral"))
    with pytest.raises(TersorError, match="no nn.Linear"):
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
        with pytest.raises(TersorError, match="first is quantized and its weight frozen"):
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


def test_include_and_ignore() -> None:
    model = tiny.model("llama")
    schedule = Schedule(1)
    masks = MaskTraining(
        Sparsity(0.5), schedule, include=["*.mlp.*"], ignore=["*.1.*.up_proj"]
    ).attach(model)
    masks.step()
    pruned = masks.finish(early=True)
    mlp = ("gate_proj", "up_proj", "down_proj")
    wanted = {f"model.layers.{number}.mlp.{name}" for number in (0, 1) for name in mlp}
    assert set(pruned.layers) == wanted - {"model.layers.1.mlp.up_proj"}


def test_embeddings_and_heads_are_left_alone(tmp_path: Path) -> None:
    for tied in (True, False):
        model = tiny.model("llama", tie_word_embeddings=tied)
        masks = MaskTraining(Sparsity(0.5), Schedule(), "magnitude").attach(model)
        assert not parametrize.is_parametrized(model.lm_head)
        pruned = masks.finish()
        assert len(pruned.layers) == 14
        assert int((model.lm_head.weight == 0).sum()) == 0
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
