"""int8 activations: the values that they stand for, and scales that calibration gives."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.qweight import ActSpec


def rounded(x: Tensor, activation: ActSpec, input_scale: Tensor | None = None) -> Tensor:
    """What x [..., k] stands for once it is int8 (see ActSpec), float32, with the columns that stay
    in 16 bits beside them as they are. input_scale: float32 [1], of static scales."""
    kept, x = activation.kept(x), x.float()
    rest = x if kept is None else x.masked_fill(kept, 0)
    largest = rest.abs().amax(-1, keepdim=True)
    # A token with a value that is not finite stands for nothing.
    scale = scale_of(largest) if input_scale is None else input_scale + 0 * largest
    codes = (rest / torch.where(scale > 0, scale, 1)).round_().clamp_(-128, 127)
    return codes * scale if kept is None else torch.where(kept, x, codes * scale)


def scale_of(largest: Tensor) -> Tensor:
    """The scale that gives the largest absolute value a code at the end of the range."""
    # A tensor: by a number, some devices multiply with its reciprocal.
    return largest / torch.full_like(largest, 127.5)
