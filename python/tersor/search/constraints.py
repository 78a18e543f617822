"""What a compressed model may cost: `size<=0.3x,latency<=5ms,sparsity>=0.5`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from tersor.errors import TersorError

UNITS: dict[str, dict[str, float]] = {
    "size": {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30},
    "latency": {"us": 1e-6, "ms": 1e-3, "s": 1.0},
    "sparsity": {"%": 0.01, "": 1.0},
}
SIGNS = {"size": "<=", "latency": "<=", "sparsity": ">="}
EXAMPLES = {
    "size": "size<=0.3x or size<=500MB",
    "latency": "latency<=0.5x or latency<=4ms",
    "sparsity": "sparsity>=0.5",
}
_PART = re.compile(r"([a-z]+)(<=|>=|<|>|=)([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)([a-z%]*)")


@dataclass(frozen=True)
class Constraint:
    """A bound on one cost.

    name: "size", bytes of all tensors of the checkpoint; "latency", seconds that the linears in
        its blocks take, measured; "sparsity", the share of zeros among their weights, at least.
    relative: the bound is a share of what the original takes.
    """

    name: str
    bound: float
    relative: bool = False

    def __post_init__(self) -> None:
        if self.name not in UNITS:
            raise TersorError(
                f"{self.name!r} cannot be bounded; use {', '.join(EXAMPLES.values())}"
            )
        good = 0 < self.bound < (1 if self.name == "sparsity" else math.inf)
        if not good or (self.relative and self.name == "sparsity"):
            raise TersorError(
                f"{self.name}{SIGNS[self.name]}{self.bound:g}{'x' * self.relative} is no bound; "
                f"use one like {EXAMPLES[self.name]}"
            )

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """From one part of `parse_constraints`."""
        plain = "".join(text.split()).lower()
        match = _PART.fullmatch(plain)
        if match is None:
            raise TersorError(
                f"{text.strip()!r} is no constraint; use {', '.join(EXAMPLES.values())}"
            )
        name, sign, number, unit = match.groups()
        if name not in UNITS:
            raise TersorError(f"{name!r} cannot be bounded; use {', '.join(EXAMPLES.values())}")
        if sign != SIGNS[name]:
            raise TersorError(f"{name} is bounded by {SIGNS[name]}, as in {EXAMPLES[name]}")
        if unit == "x":
            return cls(name, float(number), relative=True)
        if unit not in UNITS[name]:
            units = ", ".join(filter(None, ["x" if name != "sparsity" else "", *UNITS[name]]))
            raise TersorError(
                f"{text.strip()!r} has no unit of {name} ({units}); use {EXAMPLES[name]}"
            )
        return cls(name, float(number) * UNITS[name][unit])

    def limit(self, original: float) -> float:
        """The most of the cost that is allowed, for a model whose original takes `original`. The
        cost behind sparsity is the number of weights that are not zero, so that all costs are
        bounded from above."""
        if self.name == "sparsity":
            return (1 - self.bound) * original
        return self.bound * original if self.relative else self.bound

    def __str__(self) -> str:
        """As `parse` reads it; up to the twelfth digit the same bound."""
        number = f"{self.bound:.12g}x" if self.relative else show(self.name, self.bound, 12)
        return f"{self.name}{SIGNS[self.name]}{number}"


def parse_constraints(text: str) -> tuple[Constraint, ...]:
    """From text with commas between; TersorError names the part that is none, or comes twice."""
    found = [Constraint.parse(part) for part in text.split(",") if part.strip()]
    names = [each.name for each in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise TersorError(f"{twice} is bounded twice; give it one bound")
    return tuple(found)


def show(name: str, amount: float, digits: int = 4) -> str:
    """An amount of a cost, as people write it: of size in MB, of latency in ms, of sparsity the
    share of zeros."""
    if name == "size":
        return f"{amount / 1e6:.{digits}g}MB"
    if name == "latency":
        return f"{1e3 * amount:.{digits}g}ms"
    return f"{amount:.{digits}g}"
