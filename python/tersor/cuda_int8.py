"""Activations as int8 on a GPU, made once for all linears that read them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor import _core, cuda_calls
from tersor.kernels import define_operator, dtype_code, scale_address


def quantize(
    x: Tensor, g: int, outliers: float | None = None, input_scale: Tensor | None = None
) -> Tensor:
    """x [..., k] of 16 bits as int8 (csrc/cuda/layout_int8.h), for weights in groups of g."""
    k = x.shape[-1]
    (rows, stride), m = cuda_calls.rows(x, k), x.numel() // k
    quantized = torch.empty(_bytes(_rows(m), k, g), dtype=torch.uint8, device=x.device)
    if m:
        _core.cuda_quantize(
            rows.data_ptr(), m, k, g, stride, dtype_code(x.dtype),
            outliers or 0.0, scale_address(input_scale, x.device),
            quantized.data_ptr(), quantized.numel(), *cuda_calls.place(x.device),
        )  # fmt: skip
    return quantized


def _quantize_fake(
    x: Tensor, g: int, outliers: float | None = None, input_scale: Tensor | None = None
) -> Tensor:
    k = x.shape[-1]
    size = _bytes(_symbolic_rows(x.numel() // k), k, g)
    return x.new_empty((size,), dtype=torch.uint8)


def _rows(m: int) -> int:
    """Tokens of whole tiles, as csrc/cuda/layout_int8.h has them."""
    return next((tile for tile in (8, 16, 32) if m <= tile), _up(m, 64))


def _symbolic_rows(m: int) -> int:
    """The same of a symbol, of which nothing is asked that a graph would then hold for alone:
    torch.export refuses to have it narrowed, and torch.compile would make a graph for each tile."""
    beyond = [torch.sym_min(1, (torch.sym_max(m, 1) - 1) // tile) for tile in (8, 16, 32)]
    rows: int = 8 + 8 * beyond[0] + 16 * beyond[1] + beyond[2] * (_up(m, 64) - 32)
    return rows


def _bytes(rows: int, k: int, g: int) -> int:
    """As csrc/cuda/layout_int8.h has it."""
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


@dataclass(frozen=True)
class _Made:
    """x as int8: of which tensor, when and where, and which linears have had it."""

    x: weakref.ref[Tensor]
    key: tuple[Any, ...]
    quantized: Tensor
    users: set[int]


class Shared:
    """For the linears of a tap, which read one input: it is made int8 by the first that is called,
    for all. Nothing is kept beyond the last of them, or the input's own life.

    Whether it is the same input is told by the tensor itself, its version, and that no linear asks
    for it twice, since not everything that writes to a tensor counts as a version.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._made: _Made | None = None  # replaced as a whole: other threads may be here too

    def of(
        self,
        user: object,
        x: Tensor,
        g: int,
        outliers: float | None,
        scale: tuple[Tensor, float] | None,
    ) -> Tensor:
        """x [..., k] of 16 bits on a GPU as int8. user: the linear that asks; scale: that of all
        tokens, on the device and here."""
        tensor, number = scale or (None, None)
        device, stream = cuda_calls.place(x.device)
        capture = _core.cuda_capture(device, stream)  # a graph must hold what it reads
        version = None if x.is_inference() else x._version
        key = (version, g, outliers, number, device, stream, capture)
        made = self._made
        if made is None or made.x() is not x or made.key != key or id(user) in made.users:
            quantized = quantize(x.detach(), g, outliers, tensor)
            made = self._made = _Made(weakref.ref(x, self._forget), key, quantized, set())
        made.users.add(id(user))
        if len(made.users) == self.count:
            self._made = None
        return made.quantized

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        made = self._made
        if made is not None and made.x is gone:
            self._made = None

    def __reduce__(self) -> tuple[type[Shared], tuple[int]]:
        return Shared, (self.count,)  # for copies of a layer: what was made stays here


def share(layers: Sequence[Any]) -> None:
    """Lets the linears of a tap share their input as int8. layers: PackedLinears and others, of
    which those with int8 activations do."""
    able = [each for each in layers if getattr(each, "activation", None) is not None]
    if len(able) > 1:
        shared = Shared(len(able))
        for layer in able:
            layer.shared = shared
