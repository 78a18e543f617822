"""int8 activations: the values that they stand for, and static scales from calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.calibrate import GramStats
from tersor.qweight import ActSpec

_PATTERNS = 1 << 16  # of a bfloat16
_SCALES = torch.logspace(0, -6, 193, base=2, dtype=torch.float64)  # that are tried, of the largest


def rounded(x: Tensor, activation: ActSpec, input_scale: Tensor | None = None) -> Tensor:
    """What x [..., k] stands for once it is int8 (see ActSpec), float32, with the columns that stay
    in 16 bits beside them as they are. input_scale: float32 [1], of static scales."""
    kept, x = activation.kept(x), x.float()
    rest = x if kept is None else x.masked_fill(kept, 0)
    largest = rest.abs().amax(-1, keepdim=True)
    # Divided by a tensor: by a number, some devices multiply with its reciprocal. A token with a
    # value that is not finite stands for nothing.
    scale = largest / torch.full_like(largest, 127.5)
    if input_scale is not None:
        scale = input_scale + 0 * largest
    codes = (rest / torch.where(scale > 0, scale, 1)).round_().clamp_(-128, 127)
    return codes * scale if kept is None else torch.where(kept, x, codes * scale)


class StaticStats(GramStats):
    """A Gram matrix, and how often each value was seen, by its bits in bfloat16: what a static
    scale is chosen by."""

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        super().__init__(k, device)
        self._seen = torch.zeros(_PATTERNS, dtype=torch.int64, device=device)

    def update(self, x: Tensor) -> None:
        super().update(x)
        patterns = x.to(torch.bfloat16).flatten().view(torch.int16).int() + _PATTERNS // 2
        self._seen += torch.bincount(patterns, minlength=_PATTERNS)

    def scale(self) -> Tensor | None:
        """The scale with the least squared error over all values seen, float64 [1]; None where none
        but zero was. Where it cuts off a few large values, the others have finer steps."""
        seen = self._seen.cpu()
        some = seen.nonzero().flatten()
        values = (some - _PATTERNS // 2).to(torch.int16).view(torch.bfloat16).double()
        counts, largest = seen[some].double(), values.abs().max() / 127.5
        if not largest > 0:
            return None
        scales = largest * _SCALES
        errors = torch.stack([_error(values, counts, scale) for scale in scales])
        return scales[errors.argmin()].view(1)


def _error(values: Tensor, counts: Tensor, scale: Tensor) -> Tensor:
    codes = (values / scale).round_().clamp_(-128, 127)
    return codes.mul_(scale).sub_(values).square_().dot(counts)
