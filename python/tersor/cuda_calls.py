"""What all calls of CUDA kernels need: where they run, rows that they can read, and memory."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor import _core
from tersor.kernels import rows_of


def place(device: torch.device) -> tuple[int, int]:
    """The number of a device, and its current stream."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def workspace(device: int) -> Tensor:
    """Memory for the partial sums of a call; of a graph that is captured, in its own pool."""
    return torch.empty(_core.cuda_workspace_bytes(device), dtype=torch.uint8, device=device)


def rows(x: Tensor, k: int) -> Tensor:
    """x [..., k] as a matrix whose rows begin at 16 bytes."""
    matrix = rows_of(x, k)
    unit = 16 // x.element_size()
    if matrix.data_ptr() % 16 or (matrix.shape[0] > 1 and matrix.stride(0) % unit):
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    return matrix
