"""Whether a kernel that leaves the zeros of a 2:4 weight out is faster than the dense one: measured
on this machine, for the shape at hand. The dense one of 16-bit values is torch's."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.kernels import explain, explain_values, keeps_pattern, pack_values, pack_weight
from tersor.qweight import ActSpec, QSpec, QWeight

PATTERN = (2, 4)  # kept, of: the one that kernels of this package know
VALUES = (torch.bfloat16, torch.float16)  # in which a weight may be without being quantized
CHOICES = ("auto", "always", "never")
_ROUNDS = 7
_choice = "auto"


def use_sparse(choice: str) -> None:
    """Which kernel serves weights of the pattern that are loaded from now on: "auto" measures both
    once for each shape, on one token, and takes the faster; "always" and "never" do not measure.

    The two add in another order, so that results with 16-bit activations may differ in the last
    bits between a process that chose one and a process that chose the other.
    """
    if choice not in CHOICES:
        raise TersorError(f"use_sparse takes one of {', '.join(CHOICES)}, not {choice!r}")
    global _choice
    _choice = choice


def pattern_of(q: QWeight, activation: ActSpec | None) -> tuple[int, int]:
    """The pattern to pack a weight by: (2, 4) where its zeros allow that and a kernel gains by it,
    else (0, 0)."""
    if _choice == "never" or not (q.spec.symmetric and keeps_pattern(q, *PATTERN)):
        return 0, 0
    if not serves(q.n, q.k, q.spec, activation):
        return 0, 0
    faster = _choice == "always" or measure(1, q.n, q.k, q.spec, activation).gain > 1
    return PATTERN if faster else (0, 0)


def refusal(weight: Tensor) -> str | None:
    """Why a 2:4 weight of 16-bit values [n, k] is left to torch, or None where a kernel gains."""
    if _choice == "never":
        return "use_sparse says never"
    n, k = weight.shape
    rows = explain_values(0, n, k, weight.dtype, weight.dtype, PATTERN)
    if all(reason is not None for _, reason in rows):
        return f"no kernel of this machine serves {n} x {k}"
    if _choice == "auto" and (gain := measure_values(1, n, k, weight.dtype).gain) <= 1:
        return f"torch is faster here ({gain:.2f} times)"
    return None


def serves(n: int, k: int, spec: QSpec, activation: ActSpec | None) -> bool:
    """Whether there is a kernel that leaves zeros out for such a weight."""
    served = []
    for pattern in ((0, 0), PATTERN):
        rows = explain(0, n, k, spec, activation, pattern=pattern)
        served.append(next((name for name, reason in rows if reason is None), None))
    return served[0] != served[1]


@dataclass(frozen=True)
class Measured:
    """Median seconds of a call."""

    dense: float
    sparse: float

    @property
    def gain(self) -> float:
        """How many times as fast the sparse kernel is."""
        return self.dense / self.sparse


@functools.cache
def measure(
    m: int,
    n: int,
    k: int,
    spec: QSpec,
    activation: ActSpec | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Measured:
    """Both kernels in turn, on copies of a random weight that together exceed the caches, as the
    layers of a model do."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(spec.levels, (n, k), dtype=torch.uint8, generator=draw)
    codes.masked_fill_(_zeros(n, k, draw), spec.midpoint)
    q = QWeight(spec, codes, torch.full((n, spec.groups(k)), 0.01, dtype=torch.bfloat16))
    x = torch.randn(m, k, generator=draw).to(dtype)
    packed = [pack_weight(q, activation, pattern) for pattern in ((0, 0), PATTERN)]

    def call(weight: Tensor) -> Tensor:
        return torch.ops.tersor.linear(x, weight, None, n)

    return _in_turn(*((call, weight) for weight in packed))


@functools.cache
def measure_values(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Measured:
    """The same for a weight of bfloat16 or float16 values, against torch's linear."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(n, k, generator=draw).to(dtype).masked_fill_(_zeros(n, k, draw), 0.0)
    x = torch.randn(m, k, generator=draw).to(dtype)
    return _in_turn(
        (lambda weight: torch.nn.functional.linear(x, weight), w),
        (lambda weight: torch.ops.tersor.linear(x, weight, None, n), pack_values(w, PATTERN)),
    )


def _zeros(n: int, k: int, draw: torch.Generator) -> Tensor:
    return torch.rand(n, k // 4, 4, generator=draw).argsort(dim=-1).view(n, k) < 2


Call = Callable[[Tensor], Tensor]


def _in_turn(*calls: tuple[Call, Tensor]) -> Measured:
    """The median times of two calls, each on copies of its weight that exceed the caches."""
    rounds = [(call, _copies(weight)) for call, weight in calls]
    with torch.inference_mode():
        taken = [[_seconds(*each) for each in rounds] for _ in range(_ROUNDS + 1)][1:]
    return Measured(*(median(column) for column in zip(*taken, strict=True)))


def _copies(weight: Tensor) -> list[Tensor]:
    count = math.ceil(1.5 * _last_level_cache() / weight.nbytes)
    return [weight, *(weight.clone() for _ in range(count - 1))]


def _seconds(call: Call, weights: list[Tensor]) -> float:
    start = time.perf_counter()
    for weight in weights:
        call(weight)
    return (time.perf_counter() - start) / len(weights)


def _last_level_cache() -> int:
    """Bytes; 32 MB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20}
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [path.read_text(encoding="ascii").strip() for path in files]
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=32 << 20)
