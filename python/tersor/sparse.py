"""Whether a kernel that leaves the zeros of a 2:4 weight out is faster than the dense one: measured
on this machine, for the shape at hand. The dense one of 16-bit values is torch's."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor import timing
from tersor.errors import TersorError
from tersor.kernels import PATTERN, explain, explain_values, keeps_pattern
from tersor.oracle import random_qweight, random_values
from tersor.qweight import ActSpec, QSpec, QWeight

VALUES = (torch.bfloat16, torch.float16)  # in which a weight may be without being quantized
CHOICES = ("auto", "always", "never")
_choice = "auto"


def use_sparse(choice: str) -> None:
    """Which kernel serves weights of the pattern that are loaded from now on: "auto" measures both
    once for each shape, on one token, and takes the faster; "always" and "never" do not measure.

    The two add in another order, so that results with 16-bit activations may differ in the last
    bits between a process that chose one and a process that chose the other; and with bfloat16
    activations between a few tokens and many.
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
    """Both kernels in turn, on a random weight."""
    weight = random_qweight(n, k, spec, torch.bfloat16, pattern=PATTERN)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    calls = [timing.quantized_call(x, weight, activation, each) for each in ((0, 0), PATTERN)]
    return Measured(*timing.in_turn(*calls))


@functools.cache
def measure_values(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Measured:
    """The same for a weight of bfloat16 or float16 values, against torch's linear."""
    w = random_values(n, k, dtype)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Measured(*timing.in_turn(timing.torch_call(x, w), timing.sparse_call(x, w)))
