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


class Forget(TrainerCallback):
    """After a step the Trainer forgets the gradients of its model alone."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def on_step_end(self, *given: Any, **named: Any) -> None:
        self.module.zero_grad()


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
