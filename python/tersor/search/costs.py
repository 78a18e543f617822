"""What every candidate of every unit costs: bytes as they are stored, seconds as measured here."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tersor import sparse, timing
from tersor.formats import FORMATS
from tersor.formats.config import default_format
from tersor.kernels import PATTERN, explain_values
from tersor.oracle import random_qweight, random_values
from tersor.qweight import ActSpec, QSpec, QWeight, Scheme
from tersor.search.additive import Array
from tersor.search.space import Candidate, Unit

Shape = tuple[int, int]
ORIGINAL = -1  # in a choice: the unit's linears as they were


@dataclass(frozen=True)
class Costs:
    """Sums over the linears of a unit, by unit and candidate: each [units, candidates].

    size: bytes of the tensors that are stored, int64. latency: seconds of one call with `tokens`
    tokens, float64. nonzeros: weights that are not zero by the shares asked for, float64.
    fixed: bytes of all tensors that no candidate changes.
    size_before, latency_before, weights: of the original's linears, by unit.
    """

    size: Array
    latency: Array
    nonzeros: Array
    fixed: int
    size_before: Array
    latency_before: Array
    weights: Array
    tokens: int

    @property
    def original(self) -> dict[str, float]:
        """What the original takes, by name of a constraint."""
        return {
            "size": self.fixed + float(self.size_before.sum()),
            "latency": float(self.latency_before.sum()),
            "sparsity": float(self.weights.sum()),
        }

    def table(self, name: str) -> Array:
        """float64 [units, candidates] of what a constraint bounds. What is fixed counts once, in
        the first unit, so that a sum over units is that of the model."""
        if name == "size":
            table = self.size.astype(np.float64)
            table[0] += self.fixed
            return table
        return (self.latency if name == "latency" else self.nonzeros).astype(np.float64)

    def of(self, choice: Sequence[int]) -> tuple[int, float, float]:
        """Bytes, seconds and share of zeros of a model. choice: a candidate for each unit, or
        ORIGINAL."""
        size, latency, nonzeros = self.fixed, 0.0, 0.0
        for unit, number in enumerate(choice):
            if number == ORIGINAL:
                size += int(self.size_before[unit])
                latency += float(self.latency_before[unit])
                nonzeros += float(self.weights[unit])
            else:
                size += int(self.size[unit, number])
                latency += float(self.latency[unit, number])
                nonzeros += float(self.nonzeros[unit, number])
        return size, latency, 1 - nonzeros / float(self.weights.sum())


@dataclass(frozen=True)
class _Call:
    """What a kernel can tell apart of a linear: codes of 2 and 3 bits are kept in 4.

    spec: None for 16 bits. pattern: whether there are 2:4 zeros to leave out."""

    spec: QSpec | None
    activation: ActSpec | None = None
    pattern: bool = False


def _call_of(candidate: Candidate, shape: Shape, dtype: torch.dtype) -> _Call:
    scheme, sparsity = candidate.scheme, candidate.sparsity
    zeros = sparsity is not None and sparsity.pattern == PATTERN
    n, k = shape
    if scheme is None:
        served = zeros and dtype in sparse.VALUES
        rows = explain_values(0, n, k, dtype, dtype, PATTERN) if served else []
        return _Call(None, None, any(reason is None for _, reason in rows))
    spec = replace(scheme.weight, bits=max(4, scheme.weight.bits))
    zeros = zeros and spec.symmetric and sparse.serves(n, k, spec, scheme.activation)
    return _Call(spec, scheme.activation, zeros)


def measure(
    shape: Shape, candidates: Sequence[Candidate], tokens: int, dtype: torch.dtype
) -> list[float]:
    """Seconds of a linear of n x k in 16 bits and as each of the candidates, on this machine: the
    median of calls that take turns, on weights that come from memory (see tersor.timing).

    dtype: of its input, and of its weight in 16 bits. A weight with 2:4 zeros runs on the faster of
    the kernels with and without them, as when it is loaded. Other zeros gain nothing.
    """
    n, k = shape
    calls = [_Call(None), *(_call_of(candidate, shape, dtype) for candidate in candidates)]
    calls += [replace(call, pattern=False) for call in calls]
    distinct = list(dict.fromkeys(calls))
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    timed = []
    for call in distinct:
        if call.spec is None:
            w = random_values(n, k, dtype)
            timed.append((timing.sparse_call if call.pattern else timing.torch_call)(x, w))
            continue
        q = random_qweight(
            n, k, call.spec, dtype, pattern=PATTERN if k % PATTERN[1] == 0 else (0, 0)
        )
        pattern = PATTERN if call.pattern else (0, 0)
        timed.append(timing.quantized_call(x, q, call.activation, pattern))
    seconds = dict(zip(distinct, timing.in_turn(*timed), strict=True))
    return [
        min(seconds[call], seconds[replace(call, pattern=False)])
        for call in calls[: len(candidates) + 1]
    ]


@functools.cache
def stored_bytes(n: int, k: int, scheme: Scheme, dtype: torch.dtype) -> int:
    """Bytes of the tensors of a quantized weight in a checkpoint. dtype: of its scales."""
    spec, grid = scheme.weight, (n, scheme.weight.groups(k))
    zeros = None if spec.symmetric else torch.zeros(grid, dtype=torch.uint8)
    codes = torch.zeros(n, k, dtype=torch.uint8)
    packed = FORMATS[default_format(scheme)].pack(
        QWeight(spec, codes, torch.ones(grid, dtype=dtype), zeros)
    )
    return sum(tensor.nbytes for tensor in packed.values())


@dataclass(frozen=True)
class LinearCosts:
    """Of one linear, n x k. before: bytes of its weight in the original. sizes, nonzeros: by
    candidate. calls: the share of tokens that reach it, less than 1 for an expert."""

    shape: Shape
    before: int
    sizes: tuple[int, ...]
    nonzeros: tuple[float, ...]
    calls: float = 1.0

    @classmethod
    def of(
        cls,
        shape: Shape,
        candidates: Sequence[Candidate],
        file_dtype: torch.dtype,
        dtype: torch.dtype,
        calls: float = 1.0,
    ) -> LinearCosts:
        """file_dtype: of its weight in the original's files; dtype: in which the model computes.

        Zeros are those that were asked for; that a grid makes more of them is no merit."""
        n, k = shape
        before = n * k * file_dtype.itemsize
        sizes = (
            stored_bytes(n, k, each.scheme, dtype) if each.scheme else before for each in candidates
        )
        zeros = (each.sparsity.zeros if each.sparsity else 0.0 for each in candidates)
        nonzeros = (n * k * (1 - share) for share in zeros)
        return cls(shape, before, tuple(sizes), tuple(nonzeros), calls)


def add_up(
    units: Iterable[Unit],
    linears: Mapping[str, LinearCosts],
    seconds: Mapping[Shape, Sequence[float]],
    nbytes: int,
    tokens: int,
) -> Costs:
    """The costs of units. seconds: by shape, as `measure` gives them. nbytes: of all tensors of the
    original."""
    rows = [[linears[name] for name in unit.linears] for unit in units]
    before = np.array([sum(each.before for each in row) for row in rows], dtype=np.int64)
    taken = [sum(each.calls * np.array(seconds[each.shape]) for each in row) for row in rows]
    latency = np.stack(taken)
    return Costs(
        size=np.stack([np.sum([each.sizes for each in row], axis=0) for row in rows]),
        latency=latency[:, 1:],
        nonzeros=np.stack([np.sum([each.nonzeros for each in row], axis=0) for row in rows]),
        fixed=nbytes - int(before.sum()),
        size_before=before,
        latency_before=latency[:, 0],
        weights=np.array([sum(each.shape[0] * each.shape[1] for each in row) for row in rows]),
        tokens=tokens,
    )
