"""Where a run computes: the CPU, or an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tersor import cuda
from tersor.errors import TersorError

CPU = torch.device("cpu")
AUTO = "auto"


def find_device(named: str | torch.device = AUTO) -> torch.device:
    """The device of that name: "cpu", "cuda" or "cuda:1"; "auto" is an NVIDIA GPU where one can be
    used, and else the CPU.

    Raises TersorError for a device that is not there, or that has no kernels.
    """
    if named == AUTO:
        return CPU if cuda.unavailable() or cuda.unavailable(_current()) else _current()
    try:
        device = torch.device(named)
    except (RuntimeError, TypeError) as error:
        raise TersorError(f"device is auto, cpu, cuda or cuda:N, not {named!r}") from error
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        raise TersorError(f"there are no kernels for {device}; use --device cpu, or cuda")
    if (reason := cuda.unavailable()) is not None:
        raise TersorError(f"{named} cannot be used: {reason}; use --device cpu")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise TersorError(f"there is no {device}, of {count} here; use cuda:0 to cuda:{count - 1}")
    device = device if device.index is not None else _current()
    if (reason := cuda.unavailable(device)) is not None:
        raise TersorError(f"{named} cannot be used: {reason}; use --device cpu")
    return device


def _current() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def described(device: torch.device) -> dict[str, Any]:
    """A device for the settings of a report: on a GPU sums have another order. Nothing of the CPU,
    which is described anyway."""
    return {} if device.type == "cpu" else {"device": torch.cuda.get_device_name(device)}


def peak_bytes(device: torch.device) -> int | None:
    """Of a GPU the most memory that tensors took since watch_memory; None of the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def watch_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def enough_memory(device: torch.device) -> Iterator[None]:
    """TersorError where the memory of a GPU was not enough."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise TersorError(
            f"the memory of {device} is not enough for a block of this model and its statistics "
            f"({str(error).splitlines()[0]}); use --device cpu, or a shorter --seq-len"
        ) from error


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Those that are no parameters and real: rotary frequencies, masks and the like."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
