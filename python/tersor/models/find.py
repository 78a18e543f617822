"""Which architecture a model is, and what its blocks hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tersor.errors import TersorError
from tersor.models.arch import Arch, Tap, spellings
from tersor.models.linears import is_linear, widths


@dataclass(frozen=True)
class FoundArch:
    """An architecture as it is in one model.

    arch: from the table, or made by the generic finder.
    how: one line for the report: where `arch` comes from.
    prefix: path of the base model in this model with a dot behind, "model." or "bert."; or "".
    base: the prefix that files may or may not have, whatever this model does; or "".
    head: path of the output projection in this model, or None.
    """

    arch: Arch
    how: str
    prefix: str = ""
    base: str = ""
    head: str | None = None

    def blocks(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """(path in the model, block), from first to last."""
        path = self.prefix + self.arch.blocks
        for number, block in enumerate(model.get_submodule(path)):
            yield f"{path}.{number}", block

    def outside(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """Of the names of parameters, those used before the first block and after the last.

        The generic finder knows only the head to be after; all else is before, needed or not.
        """
        blocks = self.prefix + self.arch.blocks
        late = tuple(f"{self.prefix}{path}." for path in self.arch.after)
        if self.head is not None:
            late += (f"{self.head}.",)
        before: list[str] = []
        after: list[str] = []
        for name in names:
            if not name.startswith(f"{blocks}."):
                is_late = not name.startswith(self.prefix) or name.startswith(late)
                (after if is_late else before).append(name)
        return before, after


def from_table(model: nn.Module, config: Any, arch: Arch) -> FoundArch | None:
    """`arch` as it is in the model, or None where the model does not have its blocks there."""
    lists = (name for name, m in model.named_modules() if isinstance(m, nn.ModuleList))
    paths = [p for p in lists if f".{p}".endswith(f".{arch.blocks}")]
    if not paths:
        return None
    prefix = min(paths, key=len).removesuffix(arch.blocks)

    def holds(condition: str | None) -> bool:
        return condition is None or bool(config_value(config, condition))

    taps = tuple(tap if holds(tap.source_if) else replace(tap, source=None) for tap in arch.taps)
    heads = spellings(arch.head, arch.aliases) if arch.head else []
    modules = dict(model.named_modules())
    return FoundArch(
        arch=replace(arch, taps=taps),
        how=f"the table's {arch.name}",
        prefix=prefix,
        base=prefix or _base_prefix(model),
        head=next((head for head in heads if head in modules), None),
    )


def generic(model: nn.Module, config: Any) -> FoundArch:
    """An architecture for a model that keeps its blocks in one nn.ModuleList.

    The blocks are the longest list of modules of one class that hold linears and are in no other
    such list. Nothing is known of what the linears read, so every one is a tap of its own.
    Raises TersorError where there is no such list.
    """
    model_type = config_value(config, "model_type") or type(model).__name__
    if config_value(config, "is_encoder_decoder"):
        raise TersorError(
            f"{model_type} has an encoder and a decoder; give a model with one stack of blocks"
        )
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in lists)
        if isinstance(module, nn.ModuleList) and not inside and _linears(module):
            lists[name] = module
    path = max(lists, key=lambda name: len(lists[name]), default=None)
    if path is None or len({type(block) for block in lists[path]}) != 1:
        reason = (
            "no nn.ModuleList of blocks with linears"
            if path is None
            else f"blocks of more than one class in {path}"
        )
        raise TersorError(
            f"cannot find the blocks of {model_type}: {reason}; describe the architecture in "
            "tersor/models and add it to ARCHS"
        )
    blocks = lists[path]
    linears = dict.fromkeys(name for block in blocks for name in _linears(block))
    prefix = _base_prefix(model)
    prefix = prefix if path.startswith(prefix) else ""
    arch = Arch(
        name="generic",
        blocks=path.removeprefix(prefix),
        taps=tuple(Tap((name,)) for name in linears),
        causal=_can_generate(model),
    )
    count = f"{len(blocks)} {type(blocks[0]).__name__} in {path}"
    how = f"the generic finder: {model_type} has {count}, each linear with an input of its own"
    return FoundArch(arch, how, prefix, prefix or _base_prefix(model), _generic_head(model))


def taps_of(arch: Arch, block: nn.Module) -> list[Tap]:
    """The taps of this block: paths as they are here, one tap per expert, usable sources only.

    block: after plain_linears. A linear that is not here is left out, a tap without any too;
    what the architecture does not name is found by untapped.
    """
    modules = dict(block.named_modules())

    def here(path: str) -> str | None:
        return next((p for p in spellings(path, arch.aliases) if p in modules), None)

    count = _experts(arch, modules)
    result = []
    for general in arch.taps:
        for tap in _per_expert(general, count):
            linears = tuple(filter(None, map(here, tap.linears)))
            if linears:
                source = here(tap.source) if tap.source else None
                if source and _out_width(modules[source]) != widths(modules[linears[0]])[0]:
                    source = None
                result.append(Tap(linears, source))
    return result


def parts_of(arch: Arch, block: nn.Module, paths: Iterable[str]) -> list[str]:
    """Those of the paths that this block has, as spelled here; `*` stands for every expert."""
    modules = dict(block.named_modules())
    count = _experts(arch, modules)
    each = (
        part for path in paths for tap in _per_expert(Tap((path,)), count) for part in tap.linears
    )
    found = (next((p for p in spellings(e, arch.aliases) if p in modules), None) for e in each)
    return [path for path in found if path]


def untapped(arch: Arch, block: nn.Module, taps: Iterable[Tap]) -> dict[str, str]:
    """Modules of the block with a weight matrix that no tap names, each with the reason."""
    named = {path for tap in taps for path in tap.linears}
    routers = routers_of(arch)
    result = {}
    for path, module in block.named_modules():
        shapes = [tuple(p.shape) for p in module.parameters(recurse=False) if p.dim() >= 2]
        if not shapes or path in named:
            continue
        if path in routers:
            result[path] = "a router of the experts"
        elif is_linear(module):
            result[path] = f"no tap of {arch.name} names it"
        else:
            result[path] = f"not a linear but {type(module).__name__} with a weight {shapes[0]}"
    return result


def routers_of(arch: Arch) -> list[str]:
    """Paths in a block, in every spelling, of what decides among experts."""
    routers = arch.experts.routers if arch.experts else ()
    return [path for router in routers for path in spellings(router, arch.aliases)]


def _experts(arch: Arch, modules: Mapping[str, nn.Module]) -> int:
    """How many experts there are among the modules of a block; 0 where it is none of a mixture."""
    paths = spellings(arch.experts.module, arch.aliases) if arch.experts else []
    many = next((modules[path] for path in paths if path in modules), None)
    return len(many) if isinstance(many, nn.ModuleList) else 0


def _per_expert(tap: Tap, count: int) -> Iterator[Tap]:
    if not any("*" in path for path in tap.linears):
        yield tap
        return
    for number in range(count):
        linears = tuple(path.replace("*", str(number)) for path in tap.linears)
        yield Tap(linears, tap.source.replace("*", str(number)) if tap.source else None)


def _linears(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if is_linear(child)]


def _out_width(module: nn.Module) -> int | None:
    """Output channels of a linear or a norm; None for a norm without weights."""
    if is_linear(module):
        return widths(module)[1]
    weight = getattr(module, "weight", None)
    return None if weight is None else weight.shape[0]


def _base_prefix(model: nn.Module) -> str:
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix else ""


def _generic_head(model: nn.Module) -> str | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    return next((name for name, m in model.named_modules() if m is head), None) if head else None


def _can_generate(model: nn.Module) -> bool:
    can = getattr(model, "can_generate", None)  # of a transformers model
    return bool(can is not None and can())


def config_value(config: Any, name: str) -> Any:
    """An entry of a configuration, object or dict; None if it has none or there is no config."""
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)
