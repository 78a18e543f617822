"""What the tests of checkpoints share: equality of stored tensors, and a folder in memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """What must be equal for tensors to be stored equally: NaNs and signs of zero count."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, data.numpy().tobytes()


@contextlib.contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where the machine has one: thousands of fsyncs and rewrites are free."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="tersor-", dir=memory))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
