"""Masks on the weights of linears while they are trained: what holds them, what decides on them.

A masked linear computes with W * mask in every call, whatever an optimizer does to W: the mask is a
parametrization of the weight (torch.nn.utils.parametrize). The parameter stays the same object.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.errors import TersorError
from tersor.pruning.criteria import Criterion, Movement, SoftMovement
from tersor.sparsity import Sparsity, keep_largest


@dataclass(frozen=True)
class Layout:
    """How the scores of a unit lie on the weight W [n, k] of one of its linears.

    along: "elements", a score each; "rows" or "columns", in equal groups, a score for each group.
    groups: how many. parts: of the rows, one after the other, that each have all the groups; how
    high they are relative to one another.
    """

    along: str = "elements"
    groups: int = 1
    parts: tuple[int, ...] = (1,)

    def reduce(self, x: Tensor) -> Tensor:
        """x [n, k] summed to the shape of the scores: as it is, or [1, groups]."""
        if self.along == "elements":
            return x
        if self.along == "columns":
            return x.reshape(x.shape[0], self.groups, -1).sum((0, 2))[None]
        parts = x.split(self._heights(x.shape[0]))
        return torch.stack([part.reshape(self.groups, -1).sum(1) for part in parts]).sum(0)[None]

    def expand(self, keep: Tensor, n: int, k: int) -> Tensor:
        """A mask of the shape of the scores as one that broadcasts to [n, k]."""
        if self.along == "elements":
            return keep
        if self.along == "columns":
            return keep.repeat_interleave(k // self.groups, dim=1)
        heights = self._heights(n)
        rows = [keep[0].repeat_interleave(height // self.groups) for height in heights]
        return torch.cat(rows)[:, None]

    def _heights(self, n: int) -> list[int]:
        return [n // sum(self.parts) * part for part in self.parts]


class Scores(nn.Module):
    """What a unit has learned: the buffers of its criterion and the number of steps that are done.
    It is saved and loaded with the model, so that a training can go on where it was."""

    steps: Tensor  # int64 []

    def __init__(self, criterion: Criterion, shape: Sequence[int], device: torch.device) -> None:
        super().__init__()
        for name in criterion.buffers:
            self.register_buffer(name, torch.zeros(*shape, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.done = 0  # the same number, to be read without waiting for a device

    def advance(self) -> None:
        self.done += 1
        self.steps.fill_(self.done)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.done = int(self.steps)

    def _apply(self, fn: Any, recurse: bool = True) -> Scores:
        """Follows the model to other devices, but stays float32 whatever becomes of the model."""
        for name, buffer in self.named_buffers():
            self.register_buffer(name, buffer.to(fn(buffer).device))
        return self


class Mask(nn.Module):
    """The parametrization W -> W * mask; what is masked is +0, whatever W holds.

    keep: bool, broadcasts to W [n, k]. transposed: W is stored as [k, n].
    """

    keep: Tensor

    def __init__(
        self, keep: Tensor, layout: Layout | None = None, transposed: bool = False
    ) -> None:
        super().__init__()
        self.register_buffer("keep", keep)
        self.layout = layout or Layout()
        self.transposed = transposed
        self.unit: Unit | None = None  # that learns from the gradient
        self.scores: Scores | None = None  # registered with one of the masks of a unit
        self.ends = False  # whether a Trainer's callback takes it away after the training

    def forward(self, weight: Tensor) -> Tensor:
        keep = self.keep.t() if self.transposed else self.keep
        masked = torch.where(keep, weight, weight.new_zeros(()))
        if self.unit is not None and self.unit.listens and torch.is_grad_enabled():
            if not masked.requires_grad:  # a frozen weight may have a mask that learns
                masked.requires_grad_()
            masked.register_hook(partial(self._hear, weight.detach()))
        return masked

    @torch.no_grad()
    def _hear(self, weight: Tensor, gradient: Tensor) -> None:
        assert self.unit is not None
        x = gradient.float()
        if self.unit.criterion.signal == "gw":
            x = x * weight
        self.unit.add(self.layout.reduce(x.t() if self.transposed else x))


class Unit:
    """Scores and the masks that follow from them: one linear's, or those of the linears that share
    groups, the one whose columns they are first. name: for messages and reports. kind: units of a
    kind may be ranked together. until: the step from which on the masks stay as they are.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        linears: Sequence[tuple[nn.Module, Layout]],
        criterion: Criterion,
        until: int,
    ) -> None:
        self.name, self.kind, self.criterion, self.until = name, kind, criterion, until
        self.linears = [linear for linear, _ in linears]
        self.layout = linears[0][1]
        self.heard: Tensor | None = None
        self.masks = []
        for linear, layout in linears:
            transposed = not isinstance(linear, nn.Linear)
            keep = as_matrix(linear, linear.weight).new_ones((1, 1), dtype=torch.bool)
            self.masks.append(Mask(keep, layout, transposed))
            self.masks[-1].unit = self
        weight = as_matrix(linears[0][0], linears[0][0].weight)
        self.grouped = self.layout.along != "elements"
        shape = (1, self.layout.groups) if self.grouped else tuple(weight.shape)
        self.scores = Scores(criterion, shape, weight.device)
        self.masks[0].scores = self.scores
        if isinstance(criterion, Movement) and criterion.prior:
            size = self._magnitude().sqrt() if self.grouped else self._magnitude()
            scale = size.square().mean().sqrt().clamp(min=torch.finfo(size.dtype).tiny)
            self.scores.get_buffer("value").copy_(size).mul_(criterion.prior / scale)
        self.set(torch.ones(shape, dtype=torch.bool, device=weight.device))

    @property
    def listens(self) -> bool:
        """Whether gradients still teach it anything."""
        return self.criterion.signal is not None and self.scores.done < self.until

    def attach(self) -> None:
        for linear, mask in zip(self.linears, self.masks, strict=True):
            parametrize.register_parametrization(linear, "weight", mask)

    def add(self, signal: Tensor) -> None:
        """More of this step's signal: of another linear, or of another backward pass."""
        self.heard = signal.clone() if self.heard is None else self.heard.add_(signal)

    def learn(self, pull: float) -> None:
        """Ends a step. What is not finite, as after an overflow in float16, teaches nothing."""
        if self.listens and self.heard is not None and bool(self.heard.isfinite().all()):
            buffers = dict(self.scores.named_buffers())
            self.criterion.update(buffers, self.heard, self.scores.done, pull)
        self.heard = None

    @torch.no_grad()
    def value(self) -> Tensor:
        """The scores, float32, of the shape of the unit's."""
        if self.criterion.buffers:
            value: Tensor = self.scores.get_buffer("value")
            return value
        return self._magnitude()

    @torch.no_grad()
    def _magnitude(self) -> Tensor:
        """|W|, or the sum of squares of every group."""
        total = None
        for linear, mask in zip(self.linears, self.masks, strict=True):
            weight = as_matrix(linear, original(linear)).float()
            part = mask.layout.reduce(weight.square() if self.grouped else weight.abs())
            total = part if total is None else total + part
        assert total is not None
        return total

    def set(self, keep: Tensor) -> None:
        """keep: bool, of the shape of the scores."""
        for linear, mask in zip(self.linears, self.masks, strict=True):
            n, k = as_matrix(linear, original(linear)).shape
            mask.keep = mask.layout.expand(keep, n, k).clone()  # none shares memory, to be saved

    @property
    def pruned(self) -> list[int]:
        """Numbers of the groups that are masked."""
        first = self.masks[0].keep.view(self.layout.groups, -1)[:, 0]
        return (~first).nonzero().flatten().tolist()


def original(linear: nn.Module) -> Tensor:
    """The weight without its mask, as it is stored."""
    if parametrize.is_parametrized(linear, "weight"):
        weight: Tensor = linear.parametrizations.weight.original
        return weight
    return linear.weight


def masked(linear: nn.Module) -> Tensor:
    """The weight with its mask, where it has one, before what may come after that."""
    steps = linear.parametrizations.weight if parametrize.is_parametrized(linear, "weight") else ()
    weight = original(linear)
    return steps[0](weight) if steps and isinstance(steps[0], Mask) else weight


def as_matrix(linear: nn.Module, weight: Tensor) -> Tensor:
    """[n, k], out of transformers' Conv1D too, which stores [k, n]."""
    return weight if isinstance(linear, nn.Linear) else weight.t()


@torch.no_grad()
def bake(linears: Iterable[nn.Module]) -> None:
    """Writes the zeros into the weights and takes the masks away. The parameters stay the same
    objects, so that an optimizer still knows them."""
    for linear in linears:
        original(linear).copy_(masked(linear))
        detach(linear)


def detach(linear: nn.Module) -> None:
    """Takes away what is first on the weight, such as its mask, and leaves the weight as it is
    below it; with what else is on it."""
    steps = linear.parametrizations.weight
    if len(steps) > 1:
        del steps[0]
        return
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
    own = linear._parameters
    for name in [name for name in own if name != "weight"]:  # the weight is first, as it was
        own[name] = own.pop(name)


def choose(units: Sequence[Unit], sparsity: Sparsity | None, share: float, together: bool) -> None:
    """Sets the masks of units of one kind by their scores.

    sparsity: the final one; None for soft movement, where the threshold decides. share: of it, that
        is to be reached now. Of a pattern N:M it is the share of the zeros: those with the lowest
        scores of the elements that the whole pattern would drop.
    together: rank the scores of all the units as one, for a ratio.
    """
    criterion = units[0].criterion
    if isinstance(criterion, SoftMovement):
        for unit in units:
            unit.set(unit.value().sigmoid() > criterion.threshold)
        return
    assert sparsity is not None
    if not together:
        for unit in units:
            unit.set(kept(unit.value(), sparsity, share))
        return
    values = [unit.value() for unit in units]
    keep = kept(torch.cat([value.flatten() for value in values])[None], sparsity, share)[0]
    sizes = [value.numel() for value in values]
    for unit, part, value in zip(units, keep.split(sizes), values, strict=True):
        unit.set(part.view_as(value))


def kept(scores: Tensor, sparsity: Sparsity, share: float) -> Tensor:
    """The elements that stay at a share of the sparsity, bool [n, k]."""
    if share == 1:
        return keep_largest(scores, sparsity)
    if sparsity.pattern is not None:
        scores = scores.masked_fill(keep_largest(scores, sparsity), float("inf"))
    ratio = share * sparsity.zeros
    if int(ratio * scores.numel()) == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    return keep_largest(scores, Sparsity(ratio))


def refuse_masked(names: Iterable[str], model: nn.Module) -> None:
    """TersorError where a weight is a parametrization already."""
    for name in names:
        if parametrize.is_parametrized(model.get_submodule(name), "weight"):
            raise TersorError(
                f"the weight of {name} is parametrized already; finish() what masks it, or "
                "torch.nn.utils.parametrize.remove_parametrizations, and attach again (masks come "
                "first in callbacks, QuantizationTraining after them)"
            )
