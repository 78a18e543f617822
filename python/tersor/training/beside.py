"""Modules that are trained beside a model, in the same steps, without being part of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tersor.durable import durable
from tersor.errors import TersorError
from tersor.tensorfile import TensorFile, write_tensors
from tersor.training.finite import StopAtNaN


class Forget(TrainerCallback):
    """What a Trainer does with the gradients of its model alone: it looks whether they are numbers,
    clips them to max_grad_norm, and forgets them after a step.

    They are clipped on their own. Under one norm with the model's, a module that begins at random,
    or with a large weight in the loss, would shorten the model's steps, and the model would be
    clipped where the norm of its gradient, which is what a Trainer logs, is below max_grad_norm.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._stop = StopAtNaN()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop.on_pre_optimizer_step(args, state, control, model=self.module)
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(self.module.parameters(), args.max_grad_norm)

    def on_step_end(self, *given: Any, **named: Any) -> None:
        self.module.zero_grad()


def check_trained(optimizer: Any, module: nn.Module, what: str) -> None:
    """TersorError where an optimizer that was given, or None, would never step the module."""
    if optimizer is None:
        return
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(p.requires_grad and id(p) not in known for p in module.parameters()):
        raise TersorError(
            f"the optimizer that was given does not train {what}; let the Trainer make one "
            "(optim, learning_rate), or give it those parameters as well"
        )


def add_to(optimizer: Any, module: nn.Module) -> None:
    """At the model's learning rate, without decay."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if parameters:
        optimizer.add_param_group({"params": parameters, "weight_decay": 0.0})


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable(path) as file:
        write_tensors(file, tensors)


def load(path: Path, tensors: Mapping[str, Tensor], what: str) -> None:
    """Into these tensors, in place; TersorError where the file is absent or of others."""
    if not path.is_file():
        raise TersorError(f"{path} is missing; go on from a checkpoint with these {what}")
    file = TensorFile.open(path)
    if {n: m.shape for n, m in file.tensors.items()} != {n: t.shape for n, t in tensors.items()}:
        raise TersorError(f"{path} is of other {what}; use those that it was begun with")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(file.read(file.tensors[name]))
