"""The two-level grid: the scale of a group is that of its row times a whole number from 1 to 15.

(code - zero) times that number fits in int8, so that a kernel can sum a whole row in int32 and
scale it once. To every other reader it is an ordinary group-wise weight.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tersor import _core
from tersor.errors import TersorError
from tersor.kernels import dtype_code
from tersor.qweight import QSpec

MOST = 15  # the largest multiplier: 8 * 15 fits in int8
_MANTISSA = 24  # bits of a float32, the widest scale
_FEW = 8  # rows that tell of most weights that they are on no such grid


def check_two_level(spec: QSpec) -> None:
    """TersorError for codes that have no such grid."""
    if spec.bits != 4:
        raise TersorError(
            f"a two-level grid is of 4 bits, not {spec.bits}, whose codes times a number up to "
            f"{MOST} are "
            + ("no bytes" if spec.bits > 4 else "as fast without it")
            + "; use --bits 4, or leave --two-level out"
        )
    if not spec.symmetric:
        raise TersorError(
            "a two-level grid is symmetric: codes minus a zero point of each group, times a number "
            f"up to {MOST}, are no bytes; leave --asymmetric or --two-level out"
        )
    if spec.group is None:
        raise TersorError(
            "one scale a row is a single level, and kernels gain from it as it is; give --group, "
            "or leave --two-level out"
        )


def two_level_scales(w: Tensor, scales: Tensor) -> Tensor:
    """float32 scales [n, groups] of symmetric 4-bit codes as products that the dtype of w holds: of
    those nearest to them the ones of the least squared error of w [n, k]. Works on the CPU."""
    weights = w.float().cpu().contiguous()
    found: Tensor = _core.two_level_scales(weights, scales.cpu(), dtype_code(w.dtype))
    return found.to(scales.device)


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
