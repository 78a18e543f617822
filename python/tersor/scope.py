"""What of a model is to be compressed, what is not, and why: settled before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from tersor.errors import TersorError
from tersor.models import FoundArch, routers_of, taps_of, untapped
from tersor.models.arch import spellings
from tersor.qweight import QSpec
from tersor.sparsity import Sparsity

GROUPS = (128, 64, 32, 16)  # that a message may propose
NEVER = (nn.Embedding, nn.Conv1d, nn.Conv2d)  # weights in a block that no one expects quantized


@dataclass(frozen=True)
class BlockScope:
    """One block. path: in the model. taps: paths, in the model too, of the linears to compress;
    those in one tuple read the same activation."""

    path: str
    taps: tuple[tuple[str, ...], ...]

    @property
    def linears(self) -> list[str]:
        return [path for tap in self.taps for path in tap]

    def rounds(self, sequential: bool) -> list[tuple[tuple[str, ...], ...]]:
        """The taps in parts, each observed in one forward pass."""
        if sequential:
            return [(tap,) for tap in self.taps]
        return [self.taps] if self.taps else []


@dataclass
class Scope:
    """A whole model.

    kept: modules with a weight matrix that are not to be compressed, each with the rule or pattern.
    departures: those that ought to be and cannot, each with the reason.
    unquantized: names of the linears in both, in every spelling that a reader may know.
    """

    blocks: list[BlockScope] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    departures: dict[str, str] = field(default_factory=dict)
    unquantized: list[str] = field(default_factory=list)

    @property
    def linears(self) -> list[str]:
        return [path for block in self.blocks for path in block.linears]


def settle(model: nn.Module, found: FoundArch, ignore: Sequence[str]) -> Scope:
    """The scope of a model (after plain_linears; a skeleton will do).

    ignore: shell patterns over module paths, in any spelling; each must match something.
    Raises TersorError where there is no block, a pattern matches nothing, or nothing is left.
    """
    if not any(found.blocks(model)):
        raise TersorError(
            f"the model has no block in {found.prefix}{found.arch.blocks}, so there is nothing to "
            "compress; correct the number of layers in its configuration (num_hidden_layers)"
        )
    scope = Scope()
    aliases, routers = found.arch.aliases, routers_of(found.arch)
    patterns = _Patterns(ignore, aliases)
    for path, block in found.blocks(model):
        taps = taps_of(found.arch, block)
        for name, reason in untapped(found.arch, block, taps).items():
            ignored = patterns.match(f"{path}.{name}")
            meant = name in routers or isinstance(block.get_submodule(name), NEVER)
            known = scope.kept if ignored or meant else scope.departures
            known[f"{path}.{name}"] = ignored or reason
        chosen = []
        for tap in taps:
            linears = {f"{path}.{name}": patterns.match(f"{path}.{name}") for name in tap.linears}
            scope.kept.update({name: why for name, why in linears.items() if why})
            chosen.append(tuple(name for name, why in linears.items() if not why))
        scope.blocks.append(BlockScope(path, tuple(filter(None, chosen))))
    prefix = f"{found.prefix}{found.arch.blocks}."
    for name, module in model.named_modules():
        if not name.startswith(prefix) and isinstance(module, (nn.Linear, nn.Embedding)):
            kind = "an embedding" if isinstance(module, nn.Embedding) else "outside the blocks"
            scope.kept[name] = patterns.match(name) or f"{kind}, kept by rule"
    for name in (*scope.kept, *scope.departures):
        if not isinstance(model.get_submodule(name), nn.Embedding):
            scope.unquantized += spellings(name, aliases)
    _check(scope, patterns)
    return scope


def settle_all(model: nn.Module, ignore: Sequence[str]) -> Scope:
    """The scope of a module of which nothing is known: every nn.Linear, each with an input of its
    own, all in one block. Raises as `settle` does."""
    scope = Scope()
    taps: list[tuple[str, ...]] = []
    patterns = _Patterns(ignore, ())
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if ignored := patterns.match(name):
            scope.kept[name] = ignored
        elif type_before_parametrizations(module) is nn.Linear:
            taps.append((name,))
        else:  # such as nn.MultiheadAttention's, whose weight is read from outside
            scope.departures[name] = f"{type(module).__name__} may do more than a linear does"
    scope.blocks.append(BlockScope("", tuple(taps)))
    _check(scope, patterns)
    return scope


def _check(scope: Scope, patterns: _Patterns) -> None:
    example = next(iter((*scope.linears, *scope.kept)), None)
    if example is None:
        raise TersorError("the model has no nn.Linear to compress")
    if patterns.unused:
        raise TersorError(
            f"--ignore {' '.join(patterns.unused)} matches no module of this model; modules are "
            f"called like {example}"
        )
    if not scope.linears:
        raise TersorError("--ignore leaves nothing to compress; give narrower patterns")


def check_inputs(
    model: nn.Module, linears: Iterable[str], spec: QSpec | None, sparsity: Sparsity | None
) -> None:
    """TersorError unless the group, and the M of a pattern N:M, divide every linear's number of
    input features; it names the linears and how to go on."""
    inputs = {name: model.get_submodule(name).in_features for name in linears}
    if spec is not None and spec.group:
        others = [f"--group {g}" for g in GROUPS if _divides(g, inputs)][:1]
        _check_division(spec.group, f"group {spec.group}", inputs, [*others, "--group row"])
    if sparsity is not None and sparsity.pattern:
        kept, of = sparsity.pattern
        others = [f"--pattern {m * kept // of}:{m}" for m in (8, 4, 2) if m * kept % of == 0]
        fits = [other for other in others if _divides(int(other.partition(":")[2]), inputs)][:1]
        ratio = f"--sparsity {sparsity.zeros:g}"
        _check_division(of, f"the pattern {sparsity}", inputs, [*fits, ratio])


def _divides(size: int, inputs: dict[str, int]) -> bool:
    return all(k % size == 0 for k in inputs.values())


def _check_division(size: int, what: str, inputs: dict[str, int], fixes: list[str]) -> None:
    bad = {name: k for name, k in inputs.items() if k % size}
    if not bad:
        return
    endings = sorted({name.rpartition(".")[2] for name in bad})
    if len(bad) < len(inputs) and len(endings) < 4:
        fixes = [*fixes, "--ignore " + " ".join(f"'*.{ending}'" for ending in endings)]
    first = ", ".join(f"{name} with {k}" for name, k in list(bad.items())[:3])
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    raise TersorError(
        f"{what} does not divide the input features of {first}{more}; use {' or '.join(fixes)}"
    )


class _Patterns:
    """The patterns of --ignore. unused: those that have matched nothing yet."""

    def __init__(self, patterns: Iterable[str], aliases: tuple[tuple[str, str], ...]) -> None:
        self.patterns = tuple(dict.fromkeys(patterns))
        self.unused = list(self.patterns)
        self.aliases = aliases

    def match(self, path: str) -> str | None:
        """Why the module is ignored, or None."""
        names = spellings(path, self.aliases)
        hits = [p for p in self.patterns if any(fnmatchcase(name, p) for name in names)]
        self.unused = [pattern for pattern in self.unused if pattern not in hits]
        return f"ignored, {hits[0]}" if hits else None
