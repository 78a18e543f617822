"""Four bits as an index into sixteen values, not a uniform grid: NF4, the data type of QLoRA
(Dettmers et al., arXiv:2305.14314), and FP4, the floating-point numbers of 4 bits.

Blocks that share a scale run along the flattened weight, and scales can be quantized themselves
(double quantization). Neither QSpec nor the kernels and formats made from it know any of this, so
these weights have a class of their own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tersor.errors import TersorError

BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # weights that may share a scale
STEP_BLOCK = 256  # scales that share a step of their own quantization
_CHUNK = 1 << 20  # blocks' weights quantized at a time, so that temporaries stay small


@functools.cache
def nf4_values() -> Tensor:
    """The sixteen values of NF4, ascending from -1 to 1, with 0 among them; float32.

    Quantiles of the normal distribution, eight of the positive half and seven of the negative one
    at even steps from 1/2 to δ = 1 - (1/32 + 1/30) / 2, divided by the largest (appendix E).
    """
    end = 1 - (1 / 32 + 1 / 30) / 2
    upper = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    lower = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([lower, torch.zeros(1, dtype=torch.float64), upper.flip(0)])
    return (values / values.abs().max()).float()


@functools.cache
def fp4_values() -> Tensor:
    """The sixteen values of FP4 by their codes, divided by the largest: float32, from -1 to 1.

    E2M1: a sign, two bits of exponent and one of mantissa (MX formats, arXiv:2310.10537), so that
    the codes 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4 and 6, and 8 to 15 the same below zero, with a
    second zero at 8 that rounding never gives. bitsandbytes' "fp4" has 1/32 in the place of 1/2,
    and its codes in another order.
    """
    upper = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64) / 6
    return torch.cat([upper, -upper]).float()


VALUES: dict[str, Callable[[], Tensor]] = {"nf4": nf4_values, "fp4": fp4_values}  # by code


@dataclass(frozen=True)
class Codebook:
    """How a weight is stored as indices into sixteen values: NF4(...) or FP4(...).

    block: weights that share a scale, their largest absolute value; consecutive ones of the weight
        [n, k] as it lies in memory, so that no size has to divide another.
    double: store the scales in 8 bits: their mean in float32, and what they differ from it as int8
        with a float32 step for each 256. Blocks of 64 then take 4.127 bits per weight, not 4.5.
    """

    values: ClassVar[str]  # the key of VALUES

    block: int = 64
    double: bool = True

    def __post_init__(self) -> None:
        if type(self) is Codebook:
            raise TersorError("a Codebook is NF4(...) or FP4(...); make one of these")
        if type(self.block) is not int or self.block not in BLOCKS:
            kind = type(self).__name__
            raise TersorError(f"a block of {kind} is one of {BLOCKS}, not {self.block!r}; use 64")

    @property
    def bits(self) -> float:
        """Bits per weight, scales included, of a weight with many blocks."""
        return 4 + ((8 + 32 / STEP_BLOCK) if self.double else 32) / self.block

    def __str__(self) -> str:
        return f"{type(self).__name__} g{self.block}" + (" double" if self.double else "")


@dataclass(frozen=True)
class NF4(Codebook):
    """Values at even steps of the normal distribution: the best of the two for weights."""

    values: ClassVar[str] = "nf4"


@dataclass(frozen=True)
class FP4(Codebook):
    """Floating-point numbers, E2M1."""

    values: ClassVar[str] = "fp4"


@dataclass
class CodebookWeight:
    """A weight in NF4 or FP4; n output features, k input features.

    packed: uint8 [ceil(n * k / 2)], two codes to a byte, the first in the low half.
    scales: float32 [blocks], or with double quantization int8 [blocks].
    steps: float32 [ceil(blocks / 256)], and mean: float32 [1], with double quantization, or None.

    The scale of block b is scales[b], or scales[b] * steps[b // 256] + mean; weight i of the
    flattened matrix is the value of code i times the scale of block i // block.
    """

    spec: Codebook
    shape: tuple[int, int]
    packed: Tensor
    scales: Tensor
    steps: Tensor | None = None
    mean: Tensor | None = None

    @property
    def nbytes(self) -> int:
        parts = (self.packed, self.scales, self.steps, self.mean)
        return sum(part.nbytes for part in parts if part is not None)

    def block_scales(self) -> Tensor:
        """float32 [blocks]"""
        if self.steps is None or self.mean is None:
            return self.scales
        steps = self.steps.repeat_interleave(STEP_BLOCK)[: self.scales.numel()]
        return self.scales.float() * steps + self.mean

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, [n, k]; computed in float32, then cast."""
        count, block = math.prod(self.shape), self.spec.block
        values = _pairs(self.spec.values, self.packed.device)[self.packed.int()].flatten()
        whole = count // block * block
        scales = self.block_scales()
        weight = torch.empty(count, dtype=dtype, device=self.packed.device)
        body = values[:whole].view(-1, block) * scales[: whole // block, None]
        weight[:whole] = body.flatten()
        if whole < count:
            weight[whole:] = values[whole:count] * scales[-1]
        return weight.view(self.shape)


def quantize_codebook(w: Tensor, spec: Codebook) -> CodebookWeight:
    """Rounds each weight of w [n, k], floating point, to the nearest value of its block's scale.

    Scales are stored before any code is chosen, so that codes are the best ones for the very scales
    that dequantize() multiplies by.
    Raises TersorError where w is not finite, not a matrix, or on the meta device.
    """
    if w.dim() != 2 or not w.is_floating_point() or not w.numel():
        raise TersorError(f"{spec} takes a weight [n, k], not {w.dtype} {list(w.shape)}")
    if w.is_meta:
        raise TersorError("the weight is on the meta device; load the model's weights first")
    flat = w.detach().reshape(-1)
    largest = _largest(flat, spec.block)
    if not bool(largest.isfinite().all()):
        raise TersorError(
            "the weight holds NaN or infinite values; download or export the model again"
        )
    scales, steps, mean = _store_scales(largest) if spec.double else (largest, None, None)
    n, k = w.shape
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=w.device)
    made = CodebookWeight(spec, (n, k), packed, scales, steps, mean)
    divisors = made.block_scales()
    divisors = torch.where(divisors > 0, divisors, 1.0)
    bounds, nearest = _bounds(spec.values, w.device)
    for i in range(0, flat.numel(), _CHUNK):  # a multiple of every block, and of two codes
        part = flat[i : i + _CHUNK].float()
        each = divisors[i // spec.block : (i + _CHUNK) // spec.block]
        part = part / each.repeat_interleave(spec.block)[: part.numel()]
        codes = nearest[torch.bucketize(part, bounds)]
        if codes.numel() % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        packed[i // 2 : (i + _CHUNK) // 2] = codes[0::2] | codes[1::2] << 4
    return made


def scale_shapes(spec: Codebook, shape: tuple[int, int]) -> dict[str, tuple[int, torch.dtype]]:
    """The length and dtype of each tensor of a CodebookWeight of this shape, by their names."""
    count = math.prod(shape)
    blocks = math.ceil(count / spec.block)
    packed = {"packed": ((count + 1) // 2, torch.uint8)}
    if not spec.double:
        return packed | {"scales": (blocks, torch.float32)}
    return packed | {
        "scales": (blocks, torch.int8),
        "steps": (math.ceil(blocks / STEP_BLOCK), torch.float32),
        "mean": (1, torch.float32),
    }


def _largest(flat: Tensor, block: int) -> Tensor:
    """The largest absolute value of each block, float32; of the last one, which may be short."""
    whole = flat.numel() // block * block
    largest = flat[:whole].view(-1, block).abs().amax(1).float()
    if whole < flat.numel():
        largest = torch.cat([largest, flat[whole:].abs().amax().float().view(1)])
    return largest


def _store_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes, a step for each STEP_BLOCK of them, and the mean that they are relative to."""
    mean = scales.double().mean().float().view(1)
    rest = scales - mean
    steps = _largest(rest, STEP_BLOCK) / 127
    each = torch.where(steps > 0, steps, 1.0).repeat_interleave(STEP_BLOCK)[: rest.numel()]
    codes = (rest / each).round().clamp(-127, 127)
    return codes.to(torch.int8), steps, mean


@functools.cache
def _bounds(values: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Half way between neighbouring values, float32, and the code between each two: uint8."""
    each = VALUES[values]().double()
    codes = each.argsort(stable=True)
    each = each[codes]
    distinct = torch.cat([torch.ones(1, dtype=torch.bool), each[1:] > each[:-1]])
    each, codes = each[distinct], codes[distinct]
    return ((each[1:] + each[:-1]) / 2).float().to(device), codes.to(torch.uint8).to(device)


@functools.cache
def _pairs(values: str, device: torch.device) -> Tensor:
    """The two values of each byte, [256, 2]."""
    each, byte = VALUES[values](), torch.arange(256)
    return torch.stack([each[byte & 15], each[byte >> 4]], 1).to(device)
