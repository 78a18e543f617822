"""Which weights of a model can be masked while it is trained, and which heads and channels they
make up: settled before any work is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.models import QUERIES, FoundArch, Groups, config_value, find_arch
from tersor.models.arch import spellings
from tersor.models.linears import is_conv1d, is_fused
from tersor.packed_linear import PackedLinear
from tersor.pruning.masks import Layout, as_matrix, original, refuse_masked
from tersor.scope import settle, settle_all
from tersor.sparsity import Sparsity
from tersor.surgery.cuts import structure_of
from tersor.surgery.smaller import is_number


@dataclass(frozen=True)
class Structured:
    """Shares of the groups that are to be zero: attention heads (under grouped-query attention one
    of keys and values with its query heads), and channels of the MLPs."""

    heads: float = 0.0
    ffn: float = 0.0

    def __post_init__(self) -> None:
        for what in ("heads", "ffn"):
            share = getattr(self, what)
            if not is_number(share) or not 0 <= share < 1:
                raise TersorError(
                    f"{what} is a share from 0 to less than 1, such as 0.25, not {share!r}"
                )
        if not self.heads and not self.ffn:
            raise TersorError("nothing is to be pruned; give heads or ffn")


@dataclass(frozen=True)
class GroupTarget:
    """Linears that share groups, the one whose columns they are first; layouts in that order."""

    kind: str
    linears: tuple[str, ...]
    layouts: tuple[Layout, ...]


def linear_targets(
    model: nn.Module, include: Sequence[str], ignore: Sequence[str], masked: bool = False
) -> list[str]:
    """Paths of the linears to mask, or to quantize in training: those in the blocks, or all of a
    module without blocks.

    include, ignore: shell patterns over module paths; each must match something. Embeddings, the
    output projection and all else outside the blocks stay as they are.
    masked: there may be masks on them already.
    """
    for option, patterns in (("include", include), ("ignore", ignore)):
        if isinstance(patterns, str):
            raise TersorError(f"{option} is a list of patterns, such as [{patterns!r}]")
    _refuse(model)
    found = _found(model)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)]
    if not masked:
        refuse_masked(names, model)
    scope = settle(model, found, ignore) if found else settle_all(model, ignore)
    chosen = _included(scope.linears, include, found)
    _refuse_shared(model, chosen)
    return chosen


def groups_gone(count: int, share: float) -> int:
    """How many of `count` groups go where this share does; as many as shrink_checkpoint cuts."""
    return count - max(1, round(count * (1 - share)))


def group_targets(model: nn.Module, wanted: Structured) -> list[GroupTarget]:
    """The groups of every block, heads first. TersorError where the architecture has none that can
    be cut out whole."""
    _refuse(model)
    found = find_arch(model)
    structure = structure_of(found)
    targets = []
    for what, share in (("heads", wanted.heads), ("ffn", wanted.ffn)):
        groups = getattr(structure, what)
        if not share:
            continue
        mine = [_group_target(model, what, groups, path) for path, _ in found.blocks(model)]
        for target in mine:
            count = target.layouts[0].groups
            if not groups_gone(count, share):
                raise TersorError(
                    f"{what}={share:g} of the {count} groups of {target.linears[0]} rounds to "
                    f"none; use {1 / count:.2g} or more"
                )
        targets += mine
    names = [name for target in targets for name in target.linears]
    refuse_masked(names, model)
    _refuse_shared(model, names)
    return targets


def check_pattern(model: nn.Module, names: Sequence[str], sparsity: Sparsity) -> None:
    """TersorError that names the linear whose inputs a pattern does not divide."""
    for name in names:
        linear = model.get_submodule(name)
        try:
            sparsity.check(as_matrix(linear, linear.weight).shape[1])
        except TersorError as error:
            raise TersorError(f"{name}: {error}; or leave it out with ignore") from None


def zeros(weights: Sequence[Tensor]) -> float:
    """The share of their elements that is zero."""
    total = sum(weight.numel() for weight in weights)
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / total


def _group_target(model: nn.Module, what: str, groups: Groups, block: str) -> GroupTarget:
    linears = (groups.columns, *groups.rows)
    shapes = []
    for name in linears:
        linear = model.get_submodule(f"{block}.{name}")
        shapes.append(as_matrix(linear, linear.weight).shape)
    columns = shapes[0][1]
    config = getattr(model, "config", None)
    count = config_value(config, groups.count) or columns
    queries = (config_value(config, groups.queries) if groups.queries else None) or count
    layouts = [Layout("columns", count)]
    for holds, (n, _) in zip(groups.rows.values(), shapes[1:], strict=True):
        parts = tuple(queries if kind == QUERIES else count for kind in holds)
        if queries % count or columns % queries or n % sum(parts):
            raise TersorError(f"{what}: {count} groups do not divide {n} rows, {columns} columns")
        layouts.append(Layout("rows", count, parts))
    return GroupTarget(what, tuple(f"{block}.{name}" for name in linears), tuple(layouts))


def _found(model: nn.Module) -> FoundArch | None:
    try:
        return find_arch(model)
    except TersorError:
        return None  # a plain module


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            raise TersorError(
                f"{name or 'the model'} is a {type(module).__name__}, whose weight is frozen; take "
                "the original model, as transformers loads it, and quantize what comes of it"
            )
        if is_fused(module):
            raise TersorError(
                f"{name} holds the weights of many experts in one parameter, which cannot be "
                "masked or quantized in training; prune its folder (tersor.prune_checkpoint) or "
                "quantize it (tersor.quantize_checkpoint)"
            )


def _included(names: Sequence[str], include: Sequence[str], found: FoundArch | None) -> list[str]:
    """Those that a pattern of `include` matches; all of them where there is none."""
    if not include:
        return list(names)
    aliases = found.arch.aliases if found else ()
    known = {name: spellings(name, aliases) for name in names}

    def hits(pattern: str) -> Iterator[str]:
        for name, written in known.items():
            if any(fnmatchcase(each, pattern) for each in written):
                yield name

    for pattern in include:
        if not any(hits(pattern)):
            raise TersorError(
                f"include {pattern} matches no linear in the blocks; they are called like "
                f"{names[0]}"
            )
    wanted = {name for pattern in include for name in hits(pattern)}
    return [name for name in names if name in wanted]


def _refuse_shared(model: nn.Module, names: Sequence[str]) -> None:
    """TersorError where the weight of a linear is somebody else's as well."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in names:
        linear = model.get_submodule(name)
        mine = (_owner(each) for each in owners[id(original(linear))])
        others = [owner for owner in mine if model.get_submodule(owner) is not linear]
        if others:
            raise TersorError(
                f"{name} shares its weight with {others[0]}.weight, so one cannot be masked or "
                "quantized without the other; leave both out with ignore"
            )


def _owner(parameter: str) -> str:
    """The path of the module that it is a parameter of, below a mask or not."""
    return parameter.partition(".parametrizations.")[0].removesuffix(".weight")
