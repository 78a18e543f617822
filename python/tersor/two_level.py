"""The two-level grid: the scale of a group is that of its row times a whole number from 1 to 15.

(code - zero) times that number fits in int8, so that a kernel can sum a whole row in int32 and
scale it once. To every other reader it is an ordinary group-wise weight.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MOST = 15  # the largest multiplier: 8 * 15 fits in int8
_MANTISSA = 24  # bits of a float32, the widest scale
_FEW = 8  # rows that tell of most weights that they are on no such grid


def split_scales(scales: Tensor) -> tuple[Tensor, Tensor] | None:
    """scales [n, groups] as those of the rows [n, 1], in the same dtype, and multipliers uint8
    [n, groups] whose products are the scales exactly; None where they are not so.

    The scale of a row is the greatest common divisor of those of its groups.
    """
    if _split(scales[:_FEW]) is None:
        return None
    return _split(scales)


def _split(scales: Tensor) -> tuple[Tensor, Tensor] | None:
    wide = scales.double()
    if not bool(((wide > 0) & wide.isfinite()).all()):
        return None
    least, largest = wide.aminmax(dim=1, keepdim=True)
    if bool((largest > MOST * least).any()):
        return None
    # As whole numbers, in units of the last binary place of the row's least scale.
    mantissa, exponent = torch.frexp(wide)
    whole = (mantissa * 2**_MANTISSA).long() << (exponent - torch.frexp(least).exponent).long()
    divisor = functools.reduce(torch.gcd, whole.unbind(1)).unsqueeze(1)
    multipliers = whole // divisor
    if bool((multipliers > MOST).any()):
        return None
    rows = wide[:, :1] / multipliers[:, :1]
    return rows.to(scales.dtype), multipliers.to(torch.uint8)
