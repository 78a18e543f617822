"""Pruning while a model is trained, by transformers.Trainer or in any loop; and training that keeps
the zeros of a model that was pruned before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import TrainerCallback

from tersor.checkpoint import check_finite
from tersor.errors import TersorError
from tersor.pruning.criteria import (
    Criterion,
    Gradient,
    SoftMovement,
    Taylor,
    find_criterion,
)
from tersor.pruning.masks import (
    Layout,
    Mask,
    Unit,
    as_matrix,
    bake,
    choose,
    detach,
    masked,
    original,
)
from tersor.pruning.schedule import Schedule
from tersor.sparsity import Sparsity
from tersor.training.finite import is_sharded
from tersor.training.mask_targets import (
    Structured,
    check_pattern,
    group_targets,
    groups_gone,
    linear_targets,
    zeros,
)


@dataclass(frozen=True)
class Pruned:
    """What came of it.

    sparsity: share of zeros among the weights that had masks. layers: the same of each, by path.
    groups: of structured pruning, the numbers of the groups that are zero, by the path of the
        linear whose columns they are.
    """

    sparsity: float
    layers: dict[str, float]
    groups: dict[str, list[int]] = field(default_factory=dict)


class MaskTraining(TrainerCallback):
    """Learns which weights go while the model is trained.

        schedule = Schedule(warmup=100, ramp=600, cooldown=300)
        Trainer(model, ..., callbacks=[MaskTraining(Sparsity(0.85), schedule)])

    or, in a loop of one's own, with any optimizer:

        masks = MaskTraining(Sparsity(0.85), schedule).attach(model)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step(); optimizer.zero_grad()
            masks.step()
        masks.finish()

    sparsity: a ratio or a pattern, of the linears in the blocks; or Structured, shares of heads and
        channels; None for soft movement, whose λ decides.
    criterion: "movement", "taylor", "gradient" or "magnitude", or one of tersor.pruning with
        settings.
    per: reach a ratio in each "layer" (each linear, or each block's heads and channels), or over
        all of them, "global".
    include, ignore: shell patterns over the paths of linears.

    Until finish() the linears are parametrized: the masks, the scores and the number of steps are
    in the model's state_dict under parametrizations.weight, so that checkpoints of a Trainer can be
    resumed, and a loop goes on after load_state_dict on a model with masks attached. Afterwards the
    model is an ordinary one with zeros; the Trainer's last checkpoint is still from before that, so
    save it with save_model().

    The zeros of a Structured model that is saved are cut out, exactly, by
    shrink_checkpoint(..., importance="magnitude", update="none") with the same shares, multiple=1
    and per "layer".
    """

    def __init__(
        self,
        sparsity: Sparsity | Structured | None,
        schedule: Schedule,
        criterion: str | Criterion = "movement",
        *,
        per: str = "layer",
        include: Sequence[str] = (),
        ignore: Sequence[str] = (),
    ) -> None:
        self.sparsity, self.schedule, self.per = sparsity, schedule, per
        self.criterion = find_criterion(criterion)
        self.include, self.ignore = include, ignore
        self.model: nn.Module | None = None
        self.units: list[Unit] = []
        _check(sparsity, schedule, self.criterion, per, self.include or self.ignore)

    @property
    def done(self) -> int:
        """Steps that are done, also those before a checkpoint that was loaded."""
        self._attached()
        return self.units[0].scores.done

    @property
    def zeros(self) -> float:
        """The share of the weights with masks that is zero now."""
        self._attached()
        with torch.no_grad():
            return zeros([masked(linear) for unit in self.units for linear in unit.linears])

    def attach(self, model: nn.Module) -> MaskTraining:
        """Puts masks on the model's linears, in place; before or after an optimizer is made.
        Raises TersorError where that cannot be."""
        if self.model is not None:
            raise TersorError("these masks are attached already; finish() them, or make others")
        units = self._units(model)
        for unit in units:
            for linear in unit.linears:
                check_finite(unit.name, original(linear), "look at how the model was made")
        if isinstance(self.sparsity, Sparsity):
            weights = [original(linear) for unit in units for linear in unit.linears]
            have = zeros(weights)
            wanted = sum(int(self.sparsity.zeros * weight.numel()) for weight in weights)
            if round(have * sum(weight.numel() for weight in weights)) >= wanted:
                raise TersorError(
                    f"{100 * have:.4g} % of the weights are zero already, and {self.sparsity} is "
                    "asked for; ask for more, or keep those zeros with HoldZeros"
                )
        for unit in units:
            unit.attach()
        self.model, self.units = model, units
        self._choose()
        return self

    def step(self) -> None:
        """After each step of the optimizer: the scores learn, and the next step has its mask."""
        self._attached()
        done, schedule = self.done, self.schedule
        count = sum(unit.scores.get_buffer("value").numel() for unit in self._soft())
        pull = schedule.share(done) / count if count else 0.0
        listening = [unit for unit in self.units if unit.listens]
        if listening and all(unit.heard is None for unit in listening):
            raise TersorError(
                f"no gradient has reached the masks, which {self.criterion.name} learns from; call "
                "step() after loss.backward() of the model that they are on"
            )
        for unit in self.units:
            unit.learn(pull)
            unit.scores.advance()
        if schedule.changes(done + 1):
            self._choose()

    def finish(self, early: bool = False) -> Pruned:
        """Writes the zeros into the weights and takes the masks away: an ordinary model again.
        early: also where the schedule is not over."""
        self._attached()
        if self.done < self.schedule.frozen and not early:
            raise TersorError(
                f"the schedule prunes for {self.schedule.frozen} steps and {self.done} are done "
                "(a training that stopped early, or the best of its checkpoints); train on, or "
                "take what there is with finish(early=True)"
            )
        linears = self._linears()
        bake(linears.values())
        layers = {name: zeros([original(linear)]) for name, linear in linears.items()}
        result = Pruned(
            zeros([original(linear) for linear in linears.values()]),
            layers,
            {unit.name: unit.pruned for unit in self.units if unit.grouped},
        )
        self.model, self.units = None, []
        return result

    def detach(self) -> None:
        """Takes the masks away and leaves all weights as they are below them."""
        for linear in self._linears().values():
            detach(linear)
        self.model, self.units = None, []

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _check_trainer(args, self.criterion)
        if self.model is None:
            self.attach(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _check_trainer(args, self.criterion)
        if self.model is None:
            self.attach(kwargs["model"])
        if self.model is not kwargs["model"]:
            raise TersorError("the trainer trains another model than the one with the masks")
        if self.done != state.global_step:
            raise TersorError(
                f"the trainer begins at step {state.global_step} and the masks have done "
                f"{self.done}; resume from a checkpoint that was made with masks, and give them "
                "to Trainer(callbacks=[...]) so that they are there when it is read"
            )
        if state.max_steps < self.schedule.steps:
            raise TersorError(
                f"the schedule has {self.schedule.steps} steps and the training {state.max_steps}; "
                "shorten the schedule or train longer"
            )
        for unit in self.units:
            for mask in unit.masks:
                mask.ends = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish()

    def _units(self, model: nn.Module) -> list[Unit]:
        if isinstance(self.sparsity, Structured):
            return [
                Unit(
                    target.linears[0],
                    target.kind,
                    [
                        (model.get_submodule(name), layout)
                        for name, layout in zip(target.linears, target.layouts, strict=True)
                    ],
                    self.criterion,
                    self.schedule.frozen,
                )
                for target in group_targets(model, self.sparsity)
            ]
        names = linear_targets(model, self.include, self.ignore)
        if self.sparsity is not None:
            check_pattern(model, names, self.sparsity)
        return [
            Unit(
                name,
                "weights",
                [(model.get_submodule(name), Layout())],
                self.criterion,
                self.schedule.frozen,
            )
            for name in names
        ]

    def _choose(self) -> None:
        share = self.schedule.share(self.done)
        kinds = {unit.kind: [u for u in self.units if u.kind == unit.kind] for unit in self.units}
        for kind, units in kinds.items():
            sparsity = self.sparsity
            if isinstance(sparsity, Structured):
                count = units[0].layout.groups
                gone = groups_gone(count, getattr(sparsity, kind))
                sparsity = Sparsity((gone + 1e-6) / count)  # so that rounding down gives it again
            choose(units, sparsity, share, self.per == "global")

    def _soft(self) -> list[Unit]:
        return self.units if isinstance(self.criterion, SoftMovement) else []

    def _linears(self) -> dict[str, nn.Module]:
        """By path, those with masks."""
        self._attached()
        assert self.model is not None
        mine = {id(linear) for unit in self.units for linear in unit.linears}
        return {name: m for name, m in self.model.named_modules() if id(m) in mine}

    def _attached(self) -> None:
        if self.model is None:
            raise TersorError("the masks are on no model; attach(model) first")


class HoldZeros(TrainerCallback):
    """Training after pruning, whichever way the model was pruned: what is zero stays zero.

        Trainer(model, ..., callbacks=[HoldZeros()])

    or, in a loop of one's own: `held = HoldZeros().attach(model)` before it, `held.finish()` after.
    Linears without a zero are left alone.

    include, ignore: shell patterns over the paths of linears.
    """

    def __init__(self, include: Sequence[str] = (), ignore: Sequence[str] = ()) -> None:
        self.include, self.ignore = tuple(include), tuple(ignore)
        self.model: nn.Module | None = None
        self.linears: dict[str, nn.Module] = {}

    def attach(self, model: nn.Module) -> HoldZeros:
        """Puts masks where the model's linears are zero now."""
        if self.model is not None:
            raise TersorError("the zeros are held already; finish() first")
        names = linear_targets(model, self.include, self.ignore)
        linears = {name: model.get_submodule(name) for name in names}
        linears = {name: each for name, each in linears.items() if zeros([each.weight]) > 0}
        if not linears:
            raise TersorError(
                f"none of {len(names)} linears has a zero to hold; prune the model first"
            )
        for linear in linears.values():
            keep = as_matrix(linear, linear.weight.detach()) != 0
            mask = Mask(keep.contiguous(), transposed=not isinstance(linear, nn.Linear))
            parametrize.register_parametrization(linear, "weight", mask)
        self.model, self.linears = model, linears
        return self

    def finish(self) -> Pruned:
        """Writes the zeros into the weights and takes the masks away: an ordinary model again."""
        if self.model is None:
            raise TersorError("no zeros are held; attach(model) first")
        bake(self.linears.values())
        layers = {name: zeros([original(linear)]) for name, linear in self.linears.items()}
        result = Pruned(zeros([original(linear) for linear in self.linears.values()]), layers)
        self.model, self.linears = None, {}
        return result

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.model is None:
            self.attach(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.model is None:
            self.attach(kwargs["model"])
        if self.model is not kwargs["model"]:
            raise TersorError("the trainer trains another model than the one whose zeros are held")
        for name, linear in self.linears.items():
            if is_sharded(original(linear)):
                raise TersorError(
                    f"the zeros of {name} are held in whole weights, and no process has those "
                    "(FSDP); train with data parallelism alone"
                )
            linear.parametrizations.weight[0].ends = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish()


def prune_by_gradient(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    sparsity: Sparsity | Structured,
    criterion: str | Criterion = "taylor",
    *,
    per: str = "layer",
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Pruned:
    """Prunes a model in memory, without training, by the gradient of its loss on some batches.

    batches: arguments of the model that make it give a loss, with labels; each counts alike.
    criterion: "taylor", Σ |g W|, or "gradient", Σ |g|, over the batches.
    The model's own gradients and its mode are left as they are. The rest is as in MaskTraining.
    """
    chosen = find_criterion(criterion)
    if not isinstance(chosen, (Gradient, Taylor)):
        raise TersorError(f"criterion is taylor or gradient, not {chosen.name}: nothing is trained")
    inputs = list(batches)
    if not inputs:
        raise TersorError("there are no batches to take gradients on; pass at least one")
    masks = MaskTraining(
        sparsity,
        Schedule(warmup=len(inputs)),
        replace(chosen, decay=1.0),
        per=per,
        include=include,
        ignore=ignore,
    ).attach(model)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval().requires_grad_(False)  # the masks listen all the same
        for batch in inputs:
            _loss(model, batch).backward()
            masks.step()
    except BaseException:
        masks.detach()
        raise
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter in learning:
            parameter.requires_grad_()
    return masks.finish()


def _check_trainer(args: Any, criterion: Criterion) -> None:
    """TersorError where scores would learn from less, or from more, than the gradient."""
    count = max(args.world_size, args.n_gpu)
    if count > 1:
        raise TersorError(
            f"masks learn in one process and on one device, not on {count}: each would learn masks "
            "of its own; train on one, or prune before (tersor prune) and keep the zeros with "
            "HoldZeros"
        )
    if args.fp16 and criterion.signal is not None:
        raise TersorError(
            f"{criterion.name} listens to gradients, which fp16 scales; use bf16, or magnitude"
        )


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with torch.enable_grad():
        loss: Tensor | None = getattr(model(**batch), "loss", None)
    if loss is None:
        raise TersorError("the model gives no loss for a batch; give batches with labels")
    if not bool(loss.isfinite()):
        raise TersorError(
            "the loss on a batch is not finite; look at the batch and the model's dtype"
        )
    return loss


def _check(
    sparsity: Sparsity | Structured | None,
    schedule: Schedule,
    criterion: Criterion,
    per: str,
    patterns: Sequence[str],
) -> None:
    if not isinstance(schedule, Schedule):
        raise TersorError(f"schedule is a Schedule(...), not {schedule!r}")
    structured, soft = isinstance(sparsity, Structured), isinstance(criterion, SoftMovement)
    if soft and sparsity is not None:
        raise TersorError(
            "soft movement has a λ (strength) in place of a sparsity; give None, or movement"
        )
    if not soft and not isinstance(sparsity, (Sparsity, Structured)):
        raise TersorError(f"give Sparsity(...) or Structured(...), not {sparsity!r}")
    if per not in ("layer", "global"):
        raise TersorError(f'per is "layer" or "global", not {per!r}')
    if per == "global" and (soft or (isinstance(sparsity, Sparsity) and sparsity.pattern)):
        raise TersorError('a pattern, as a threshold, is of each layer; leave per at "layer"')
    if structured and isinstance(criterion, Gradient):
        raise TersorError("the gradient ranks single weights; use taylor for heads and channels")
    if structured and patterns:
        raise TersorError("include and ignore are for single weights; Structured takes all blocks")
    if criterion.signal is not None:
        if schedule.initial:
            raise TersorError(
                f"{criterion.name} has no scores at the first step, so initial must be 0"
            )
        if not schedule.frozen:
            raise TersorError(
                f"{criterion.name} learns its scores in training; give warmup or ramp steps"
            )
