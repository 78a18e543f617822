"""Whether a kernel that leaves the zeros of a 2:4 weight out is faster than the dense one: measured
on this machine, for the shape at hand. The dense one of 16-bit values is torch's."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor import cuda, timing
from tersor.errors import TersorError
from tersor.kernels import PATTERN, explain, explain_values, keeps_pattern
from tersor.oracle import random_qweight, random_values
from tersor.qweight import ActSpec, QSpec, QWeight

VALUES = (torch.bfloat16, torch.float16)  # in which a weight may be without being quantized
CHOICES = ("auto", "always", "never")
CPU = torch.device("cpu")
_ROWS = 256  # that are random, of a weight that is measured
_choice = "auto"


def use_sparse(choice: str) -> None:
    """Which kernel serves weights of the pattern that are loaded from now on, or moved to another
    device: "auto" measures both there, once for each shape, on one token, and takes the faster;
    "always" and "never" do not measure. 16-bit weights are measured when they are swapped
    (swap_sparse_linears), and stay what they are when they are moved.

    The two add in another order, so that results with 16-bit activations may differ in the last
    bits between a process that chose one and a process that chose the other; and with bfloat16
    activations between a few tokens and many.
    """
    if choice not in CHOICES:
        given = repr(choice) if isinstance(choice, str) else type(choice).__name__
        raise TersorError(f"use_sparse takes one of {', '.join(CHOICES)}, not {given}")
    global _choice
    _choice = choice


def pattern_of(
    q: QWeight, activation: ActSpec | None, device: torch.device = CPU
) -> tuple[int, int]:
    """The pattern to pack a weight by for a device: (2, 4) where its zeros allow that and a kernel
    gains by it, else (0, 0). q: on any device."""
    if _choice == "never" or not serves(q.n, q.k, q.spec, activation, device):
        return 0, 0
    if not keeps_pattern(q, *PATTERN):
        return 0, 0
    gains = _choice == "always" or measure(1, q.n, q.k, q.spec, activation, device=device).gain > 1
    return PATTERN if gains else (0, 0)


def refusal(weight: Tensor) -> str | None:
    """Why a 2:4 weight of 16-bit values [n, k] is left to torch, or None where a kernel of its
    device gains."""
    if _choice == "never":
        return "use_sparse says never"
    (n, k), device = weight.shape, weight.device
    if device.type == "cuda":
        why = cuda.unavailable(device) or cuda.refusal(cuda.Grid.of_values(weight), device)
        if why is not None:
            return why
    elif all(why for _, why in explain_values(0, n, k, weight.dtype, weight.dtype, PATTERN)):
        return f"no kernel of this machine serves {n} x {k}"
    if _choice == "auto":
        gain = measure_values(1, n, k, weight.dtype, device).gain
        if gain <= 1:
            return f"torch is faster here ({gain:.2f} times)"
    return None


def serves(
    n: int, k: int, spec: QSpec, activation: ActSpec | None, device: torch.device = CPU
) -> bool:
    """Whether there is a kernel that leaves zeros out for such a weight."""
    if k % PATTERN[1]:
        return False
    if device.type == "cuda":
        grid = cuda.Grid.of_spec(n, k, spec, activation, sparse=True)
        return cuda.unavailable(device) is None and cuda.refusal(grid, device) is None
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
    device: torch.device = CPU,
) -> Measured:
    """Both kernels in turn, on a random weight."""
    some = random_qweight(min(n, _ROWS), k, spec, torch.bfloat16, pattern=PATTERN)
    zeros = None if some.zeros is None else _repeated(some.zeros, n)
    weight = QWeight(spec, _repeated(some.codes, n), _repeated(some.scales, n), zeros)
    x = _inputs(m, k, dtype, device)
    calls = [timing.quantized_call(x, weight, activation, each) for each in ((0, 0), PATTERN)]
    return Measured(*timing.in_turn(*calls))


@functools.cache
def measure_values(
    m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, device: torch.device = CPU
) -> Measured:
    """The same for a weight of bfloat16 or float16 values, against torch's linear."""
    w = _repeated(random_values(min(n, _ROWS), k, dtype), n).to(device)
    x = _inputs(m, k, dtype, device)
    return Measured(*timing.in_turn(timing.torch_call(x, w), timing.sparse_call(x, w)))


def _inputs(m: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _repeated(rows: Tensor, n: int) -> Tensor:
    """n rows, the same again and again."""
    return rows.repeat(-(-n // rows.shape[0]), 1)[:n]
