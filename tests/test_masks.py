"""Masks that are learned in training, against formulas and slow selections in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from regression import K, N, Regression, batch, top, train
from tersor.errors import TersorError
from tersor.pruning import Gradient, Movement, Schedule, SoftMovement, Taylor
from tersor.sparsity import Sparsity
from tersor.training.masking import HoldZeros, MaskTraining

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
    held = Schedule(warmup=2, ramp=5, hold=6, every=3)
    assert [t for t in range(30) if held.changes(t)] == [2, 5, 7, 8, 11, 13]
    assert [held.share(t) for t in range(7, 14)] == [1.0] * 7 and held.frozen == 13
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
    pairs = itertools.pairwise(seen)
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
        return model, MaskTraining(sparsity, Schedule(2, 10, cooldown=2), criterion).attach(model)

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


@pytest.mark.parametrize("prior", [0.0, 7.0])
def test_movement_may_begin_with_what_the_weights_are(prior: float) -> None:
    model = Regression()
    weight = model.first.weight.detach().clone()
    MaskTraining(Sparsity(0.5), Schedule(4), Movement(prior=prior)).attach(model)
    wanted = prior * weight.double().abs() / weight.double().square().mean().sqrt()
    begun = model.first.parametrizations.weight[0].scores.value
    torch.testing.assert_close(begun.double(), wanted, rtol=1e-5, atol=0)
