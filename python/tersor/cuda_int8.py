"""Activations as int8 on a GPU, made once for all linears that read them."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from tersor import _core, cuda_calls
from tersor.kernels import define_operator, dtype_code


def quantize(
    x: Tensor, g: int, outliers: float | None = None, input_scale: Tensor | None = None
) -> Tensor:
    """x [..., k] of 16 bits as int8 (csrc/cuda/layout_int8.h), for weights in groups of g."""
    k = x.shape[-1]
    (rows, stride), m = cuda_calls.rows(x, k), x.numel() // k
    quantized = torch.empty(_quantized_bytes(m, k, g), dtype=torch.uint8, device=x.device)
    if m:
        _core.cuda_quantize(
            rows.data_ptr(), m, k, g, stride, dtype_code(x.dtype),
            outliers or 0.0, 0 if input_scale is None else input_scale.data_ptr(),
            quantized.data_ptr(), quantized.numel(), *cuda_calls.place(x.device),
        )  # fmt: skip
    return quantized


def _quantize_fake(
    x: Tensor, g: int, outliers: float | None = None, input_scale: Tensor | None = None
) -> Tensor:
    k = x.shape[-1]
    size = _quantized_bytes(x.numel() // k, k, g)
    return x.new_empty((size,), dtype=torch.uint8)


def _quantized_bytes(m: int, k: int, g: int) -> int:
    """As csrc/cuda/layout_int8.h has it, also for numbers that are symbols."""
    tiles = [tile for tile in (8, 16, 32) if m <= tile]
    rows = tiles[0] if tiles else _up(m, 64)
    steps = _up(k, 64) // 64
    groups = 2 * steps if g == 32 and k > 32 else -(-steps // (_up(g, 64) // 64))
    return _up(rows * steps * 64) + _up(rows * 4) + _up(rows * groups * 4) + steps * 8


def _up(value: int, unit: int = 128) -> int:
    return (value + unit - 1) // unit * unit


define_operator(
    "quantize_cuda(Tensor x, int g, float? outliers=None, Tensor? input_scale=None) -> Tensor",
    "CUDA",
    quantize,
    _quantize_fake,
)


class _Latest(threading.local):
    """The last input that was quantized in this thread, for as long as it lives. Linears that read
    the same one (query, key and value; gate and up) come one after the other: the first of them
    quantizes it for all."""

    key: tuple[Any, ...] | None = None
    x: weakref.ref[Tensor] | None = None
    quantized: Tensor | None = None

    def of(
        self, x: Tensor, g: int, outliers: float | None, scale: tuple[Tensor, float] | None
    ) -> Tensor:
        """scale: that of all tokens, on the device and here."""
        tensor, number = scale or (None, None)
        if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cuda:
            # Equal calls in a graph become one.
            made: Tensor = torch.ops.tersor.quantize_cuda(x.detach(), g, outliers, tensor)
            return made
        if x.is_inference():  # what is written to it would not be seen
            return quantize(x, g, outliers, tensor)
        device, stream = cuda_calls.place(x.device)
        capture = _core.cuda_capture(device, stream)  # a graph must hold what it reads
        key = (x._version, g, outliers, number, device, stream, capture)
        if self.x is None or self.x() is not x or self.key != key:
            self.quantized, self.key = quantize(x.detach(), g, outliers, tensor), key
            self.x = weakref.ref(x, self._forget)
        assert self.quantized is not None
        return self.quantized

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self.x is gone:
            self.key = self.x = self.quantized = None


latest = _Latest()
