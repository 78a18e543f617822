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


def rows(x: Tensor, k: int) -> tuple[Tensor, int]:
    """Memory with the rows of x [..., k], each from 16 bytes on, and the elements from one to the
    next. The memory is x itself where it can be."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0 and not x.is_neg():
        return x, k
    matrix = rows_of(x, k)
    unit = 16 // x.element_size()
    if matrix.data_ptr() % 16 or (matrix.shape[0] > 1 and matrix.stride(0) % unit):
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    return matrix, matrix.stride(0) if matrix.shape[0] > 1 else k
