"""The hinge of the package: every solver returns a QWeight, every format stores it, every kernel
is made from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.errors import TersorError

BITS = (2, 3, 4, 8)
_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class QSpec:
    """The arithmetic of a quantized weight, never its bytes.

    bits: width of a code, one of 2, 3, 4, 8.
    group: columns that share a scale, or None for one scale per row.
    symmetric: True puts the zero point at 2**(bits - 1); False stores one per group.
    """

    bits: int
    group: int | None = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise TersorError(f"bits must be one of {BITS}, not {self.bits}")
        if self.group is not None and (self.group <= 0 or self.group % 16):
            raise TersorError(
                f"group must be a positive multiple of 16, or None for one scale per row, "
                f"not {self.group}"
            )

    @property
    def levels(self) -> int:
        """Number of codes, 2**bits."""
        return 1 << self.bits

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric grid, 2**(bits - 1)."""
        return 1 << (self.bits - 1)

    def groups(self, k: int) -> int:
        """Scales per row for k input features; TersorError if the group does not divide k."""
        if self.group is None:
            return 1
        if k % self.group:
            divisors = [g for g in (128, 64, 32, 16) if k % g == 0]
            hint = f"--group {divisors[0]} or " if divisors else ""
            raise TersorError(
                f"group {self.group} does not divide the {k} input features; "
                f"use {hint}--group row (one scale per row)"
            )
        return k // self.group


@dataclass(frozen=True)
class ActSpec:
    """How activations enter the product: bits=8 is int8, codes -128 to 127 as in
    compressed-tensors.

    dynamic: True has a scale for each token, its absmax / 127.5, found in the call. False has one
        for all that a linear reads ("static"), found by calibration and kept with the weight:
        quantizing is cheaper, values beyond what calibration saw are cut off, and an error larger.
    outliers: LLM.int8() (Dettmers et al., arXiv:2208.07339): the columns of the input that hold a
        finite |value| beyond this in any token of the call stay in 16 bits (6.0 is usual), and
        only the others are int8, with scales that do not see them. The result of a token depends
        on the others of its call, through which columns are kept. None: all are int8.

    `outliers` says how a layer runs, not what a checkpoint holds, and compressed-tensors has no
    field for it: give it to tersor.load(folder, outliers=6.0). Writing a folder leaves it out, with
    a warning. LLM.int8() as bitsandbytes has it is Scheme(QSpec(8, None), ActSpec(outliers=6.0)),
    for tersor.swap_linears say.
    """

    bits: int = 8
    outliers: float | None = None
    dynamic: bool = True

    def __post_init__(self) -> None:
        if self.bits != 8:
            raise TersorError(f"activations can be quantized to 8 bits, not {self.bits}")
        if not isinstance(self.dynamic, bool):
            raise TersorError(f"dynamic is True or False, not {self.dynamic!r}")
        if self.outliers is not None and not (
            isinstance(self.outliers, (int, float))
            and _FLOAT32.tiny <= self.outliers <= _FLOAT32.max
        ):
            raise TersorError(
                f"outliers is the positive number beyond which columns stay in 16 bits, such as "
                f"6.0, or None, not {self.outliers!r}"
            )
        if self.outliers is not None and not self.dynamic:
            raise TersorError(
                "outliers are kept apart from int8 with a scale for each token; leave out either "
                "outliers or dynamic=False"
            )

    def kept(self, x: Tensor) -> Tensor | None:
        """Which columns of x [..., k] stay in 16 bits: bool [k], or None where outliers are not
        kept apart."""
        if self.outliers is None:
            return None
        size = x.detach().abs().reshape(-1, x.shape[-1])
        # As a tensor, so that the threshold is not rounded to the dtype of x.
        beyond = size.float() > torch.full((), self.outliers, dtype=torch.float32, device=x.device)
        return (beyond & size.isfinite()).any(0)


@dataclass(frozen=True)
class Scheme:
    """What one linear layer becomes: its weight's grid, and its activations' (None: 16 bits)."""

    weight: QSpec
    activation: ActSpec | None = None

    @property
    def static(self) -> bool:
        """Whether activations have a scale that calibration finds."""
        return self.activation is not None and not self.activation.dynamic

    def refuse_static(self, what: str) -> None:
        """TersorError where it is, for what has no scales of activations to give."""
        if self.static:
            raise TersorError(
                f"{what}, which static scales of activations come of; use dynamic ones "
                "(--activations int8), or tersor quantize"
            )

    def __str__(self) -> str:
        if self.activation is None:
            return f"W{self.weight.bits}A16"
        outliers = self.activation.outliers
        kept = "" if outliers is None else f", outliers beyond {outliers:g}"
        static = " static" if self.static else ""
        return f"W{self.weight.bits}A{self.activation.bits}{static}{kept}"


@dataclass
class QWeight:
    """A quantized weight in portable order; n output features, k input features.

    codes: uint8 [n, k], each below 2**bits.
    scales: float32, bfloat16 or float16 [n, groups].
    zeros: uint8 [n, groups], or None when the spec is symmetric.
    order: int32 [k], the group of each column, or None where it is column // group.

    dequantize()[i, j] = (codes[i, j] - zero) * scale, of row i and column j's group.
    """

    spec: QSpec
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 2:
            raise TersorError(
                f"codes must be uint8 [n, k], not {self.codes.dtype} {tuple(self.codes.shape)}"
            )
        grid = (self.n, self.spec.groups(self.k))
        if tuple(self.scales.shape) != grid or not self.scales.dtype.is_floating_point:
            raise TersorError(
                f"scales must be floating point {grid}, not {self.scales.dtype} "
                f"{tuple(self.scales.shape)}"
            )
        if self.spec.symmetric != (self.zeros is None):
            raise TersorError("zeros must be given exactly when the spec is asymmetric")
        if self.zeros is not None and (
            tuple(self.zeros.shape) != grid or self.zeros.dtype != torch.uint8
        ):
            raise TersorError(
                f"zeros must be uint8 {grid}, not {self.zeros.dtype} {tuple(self.zeros.shape)}"
            )
        if self.order is not None and tuple(self.order.shape) != (self.k,):
            raise TersorError(f"order must have one group per column ({self.k})")

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    def rows(self, part: slice) -> QWeight:
        """Some of its output features; a view."""
        zeros = None if self.zeros is None else self.zeros[part]
        return QWeight(self.spec, self.codes[part], self.scales[part], zeros, self.order)

    def to(self, device: torch.device) -> QWeight:
        """On another device; its tensors are not copied where they are there already."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        order = None if self.order is None else self.order.to(device)
        return QWeight(self.spec, self.codes.to(device), self.scales.to(device), zeros, order)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, [n, k]; computed in float32, then cast."""
        codes = self.codes.float()
        zeros = float(self.spec.midpoint) if self.zeros is None else self.zeros.float()
        if self.order is not None:
            index = self.order.long()
            z = zeros[:, index] if isinstance(zeros, Tensor) else zeros
            return ((codes - z) * self.scales.float()[:, index]).to(dtype)
        grid = codes.view(self.n, self.scales.shape[1], -1)
        z = zeros.unsqueeze(-1) if isinstance(zeros, Tensor) else zeros
        weight = (grid - z) * self.scales.float().unsqueeze(-1)
        return weight.view(self.n, self.k).to(dtype)
