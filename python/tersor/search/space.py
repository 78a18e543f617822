"""What a search chooses from: one candidate for each unit, a linear or several that must agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tersor.errors import TersorError
from tersor.layerwise import Treatment, find_solver
from tersor.qweight import ActSpec, QSpec, Scheme
from tersor.scope import Scope
from tersor.solvers import PRUNERS, SOLVERS
from tersor.sparsity import Sparsity

Choice = tuple[int, ...]  # the number of a candidate for each unit
GRANULARITIES = ("linear", "input", "block", "kind")
_GROUP = 128  # columns that share a scale, where it is left open


@dataclass(frozen=True)
class Candidate:
    """What a linear may become: a grid (None: 16 bits), zeros (None: none), and by which method.

    method: a key of SOLVERS, of PRUNERS where there are zeros, or None for the linear as it is.
    """

    scheme: Scheme | None = None
    sparsity: Sparsity | None = None
    method: str | None = None

    def __post_init__(self) -> None:
        if self.untouched:
            return
        known: Mapping[str, Any] = PRUNERS if self.sparsity else SOLVERS
        if self.method not in known:
            what = "pruned" if self.sparsity else "quantized"
            raise TersorError(
                f"a weight is {what} by one of {', '.join(known)}, not {self.method}; give one of "
                "these methods"
            )

    @property
    def untouched(self) -> bool:
        return self.scheme is None and self.sparsity is None

    @property
    def treatment(self) -> Treatment | None:
        """How to make it of a linear, or None where that stays as it is."""
        if self.untouched or self.method is None:
            return None
        if self.sparsity is not None:
            return Treatment(PRUNERS[self.method](self.sparsity), self.scheme)
        return Treatment(find_solver(self.method), self.scheme)

    def __str__(self) -> str:
        if self.untouched:
            return "16 bits"
        parts = [str(self.scheme or "16 bits"), str(self.sparsity or ""), f"by {self.method}"]
        return " ".join(filter(None, parts))

    def to_dict(self) -> dict[str, Any]:
        """For a file. sparsity: a pattern as text, or a ratio."""
        weight = self.scheme.weight if self.scheme else None
        sparsity = self.sparsity
        return {
            "bits": weight.bits if weight else 16,
            "group": weight.group if weight else None,
            "symmetric": weight.symmetric if weight else None,
            "activations": self.scheme.activation.bits
            if self.scheme and self.scheme.activation
            else 16,
            "sparsity": (str(sparsity) if sparsity.pattern else sparsity.ratio)
            if sparsity
            else None,
            "method": self.method,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Candidate:
        """The inverse of to_dict."""
        scheme = sparsity = None
        if content["bits"] != 16:
            activation = None if content["activations"] == 16 else ActSpec(content["activations"])
            spec = QSpec(content["bits"], content["group"], content["symmetric"])
            scheme = Scheme(spec, activation)
        if isinstance(content["sparsity"], str):
            sparsity = Sparsity.parse(content["sparsity"])
        elif content["sparsity"] is not None:
            sparsity = Sparsity(content["sparsity"])
        return cls(scheme, sparsity, content["method"])


@dataclass(frozen=True)
class Unit:
    """Linears, paths in the model, that become the same candidate."""

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Space:
    """The candidates, which are the same for every unit, and how linears are put into units.

    bits: of codes, to choose from; () leaves all weights in 16 bits. activations: None for 16 bits,
        ActSpec() for int8.
    group, symmetric: of every grid. group: columns that share a scale; None is one per row, and
        "auto" as in quantize: 128, but one per row for an 8-bit weight under int8 activations.
    sparsities: zeros to choose from, beside none; each with every grid and in 16 bits.
    methods: keys of SOLVERS for what is not pruned, and of PRUNERS for what is. Several of a sort
        are candidates of their own.
    keep: a linear may also stay as it is.
    granularity: what is chosen on its own. "linear": every linear. "input": linears that read the
        same activation agree, as runtimes want that fuse them (query, key and value; gate and up).
        "block": all of a block. "kind": those of the same name in all blocks, and of all experts.
    """

    bits: tuple[int, ...] = (2, 3, 4, 8)
    group: int | str | None = "auto"
    symmetric: bool = True
    activations: tuple[ActSpec | None, ...] = (None,)
    sparsities: tuple[Sparsity, ...] = ()
    methods: tuple[str, ...] = ("gptq", "sparsegpt")
    keep: bool = True
    granularity: str = "linear"

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise TersorError(
                f"granularity must be one of {', '.join(GRANULARITIES)}, not {self.granularity!r}"
            )
        if isinstance(self.group, str) and self.group != "auto":
            raise TersorError(
                f"group is a number of columns, None for the whole row, or auto, not {self.group!r}"
            )
        for method in self.methods:
            if method not in SOLVERS and method not in PRUNERS:
                raise TersorError(
                    f"method must be one of {', '.join([*SOLVERS, *PRUNERS])}, not {method!r}"
                )
        if any(each is not None and each.outliers is not None for each in self.activations):
            raise TersorError(
                "outliers is how a layer runs, which no folder of a search can hold; leave it out, "
                "and give it to tersor.load"
            )
        if any(each is not None and not each.dynamic for each in self.activations):
            raise TersorError(
                "a search compares dynamic int8 activations; choose among those, then quantize "
                "with static ones"
            )
        for wanted, known, what in (
            (self.bits, SOLVERS, "quantize"),
            (self.sparsities, PRUNERS, "prune"),
        ):
            if wanted and not any(method in known for method in self.methods):
                raise TersorError(
                    f"none of the methods ({', '.join(self.methods)}) can {what}; add one of "
                    f"{', '.join(known)}"
                )
        if len(self.candidates) < 2:
            raise TersorError(
                "there is nothing to choose: give at least two candidates, such as bits=(3, 4)"
            )

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All of them, each once: from many bits to few, dense before sparse."""
        return tuple(dict.fromkeys(self._candidates()))

    def _candidates(self) -> Iterator[Candidate]:
        if self.keep:
            yield Candidate()
        pruners = [method for method in self.methods if method in PRUNERS]
        for scheme in (None, *self._schemes()):
            if scheme is not None:
                for method in self.methods:
                    if method in SOLVERS:
                        yield Candidate(scheme, None, method)
            for sparsity in sorted(self.sparsities, key=lambda each: (each.zeros, str(each))):
                for method in pruners:
                    yield Candidate(scheme, sparsity, method)

    def _schemes(self) -> Iterator[Scheme]:
        for bits in sorted(set(self.bits), reverse=True):
            for activation in dict.fromkeys(self.activations):
                group = self.group
                if isinstance(group, str):  # "auto"
                    group = None if bits == 8 and activation else _GROUP
                yield Scheme(QSpec(bits, group, self.symmetric), activation)

    def units(self, scope: Scope) -> tuple[Unit, ...]:
        """The linears of a scope, each in one unit, in the order of the forward pass."""
        found: dict[str, list[str]] = {}
        for block in scope.blocks:
            for tap in block.taps:
                for path in tap:
                    found.setdefault(self._name(path, tap, block.path), []).append(path)
        return tuple(Unit(name, tuple(linears)) for name, linears in found.items())

    def _name(self, path: str, tap: tuple[str, ...], block: str) -> str:
        if self.granularity == "block":
            return block
        if self.granularity == "kind":
            return _without_numbers(path.removeprefix(f"{block}."))
        if self.granularity == "input" and len(tap) > 1:
            stem = tap[0].rpartition(".")[0]
            return f"{stem}.{'+'.join(name.rpartition('.')[2] for name in tap)}"
        return path


def _without_numbers(path: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))
