"""What is cut out of a model: settled, with the configuration of what is left, before any work."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.models import (
    FoundArch,
    Groups,
    Structure,
    build_skeleton,
    config_value,
    find_arch,
    plain_linears,
)
from tersor.models.arch import respell
from tersor.pruning import select
from tersor.source import Source

MULTIPLE = 128  # channels: the usual group of a quantized weight, and what matrix units take whole


@dataclass(frozen=True)
class Cut:
    """One kind of groups in every block: `kept` of `count` stay. what: "heads" or "ffn"."""

    what: str
    groups: Groups
    count: int
    kept: int

    def apply(self, tensors: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
        """The tensors of a block, by their names in it, that the cut changes. kept: numbers of the
        groups that stay, int64. On the meta device: the shapes."""
        result = {}
        for linear in self.groups.rows:
            for name in (f"{linear}.weight", f"{linear}.bias"):
                if name in tensors:
                    parts = tensors[name].chunk(self.groups.parts)
                    result[name] = torch.cat([select(p, 0, self.count, kept) for p in parts])
        name = f"{self.groups.columns}.weight"
        return result | {name: select(tensors[name], 1, self.count, kept)}


@dataclass(frozen=True)
class Cuts:
    """All that is cut.

    groups: inside every block. drop: blocks, by number, that are left out, or how many of the least
    influence. depth: the blocks there are.
    """

    groups: tuple[Cut, ...]
    drop: int | tuple[int, ...]
    depth: int

    @property
    def left(self) -> int:
        """Blocks that stay."""
        return self.depth - (self.drop if isinstance(self.drop, int) else len(self.drop))

    def config(self, source: Source, kept: Sequence[int]) -> dict[str, Any]:
        """config.json of a model with these blocks."""
        config, before = copy.deepcopy(source.checkpoint.config), source.model.config
        structure = structure_of(source.found)
        for cut in self.groups:
            for name in filter(lambda name: hasattr(before, name), cut.groups.counts):
                whole = getattr(before, name) or cut.count
                config[name] = whole * cut.kept // cut.count
            if cut.groups.width is not None:
                columns = source.blocks[0].get_submodule(cut.groups.columns).in_features
                config[cut.groups.width] = columns // getattr(before, cut.groups.counts[-1])
        if len(kept) < self.depth:
            config[structure.depth] = len(kept)
            for name in structure.per_block:
                items = getattr(before, name, None)
                if items is not None:
                    config[name] = [items[number] for number in kept]
        return config

    def skeleton(self, source: Source, kept: Sequence[int]) -> nn.Module:
        """The smaller model with these blocks, as plain transformers makes it, on the meta device.
        TersorError unless it has a place of exactly the right shape for every tensor."""
        model = build_skeleton(self.config(source, kept), source.dtype)
        model.config.use_cache = False
        found = find_arch(model)
        plain_linears(model, found.arch)
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        shapes = dict(self._shapes(source, kept))
        for name in (name for name, _ in model.named_parameters() if name not in shapes):
            raise TersorError(f"{type(model).__name__} wants {name}, which nothing is left for")
        for name, shape in shapes.items():
            if wanted.get(name) != shape:
                asked = f"the shape {wanted[name]}" if name in wanted else "no place"
                raise TersorError(
                    f"{type(model).__name__} has {asked} for {name}, which would be {shape}: its "
                    "code takes no other number than the one that follows from the hidden size"
                )
        return model

    def _shapes(self, source: Source, kept: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every parameter of the smaller model."""
        state = source.model.state_dict()
        paths = [path for path, _ in source.found.blocks(source.model)]
        for name in source.where:
            if not name.startswith(tuple(f"{path}." for path in paths)):
                yield name, tuple(state[name].shape)
        for place, number in enumerate(kept):
            prefix = f"{paths[number]}."
            names = source.names(paths[number])
            tensors = {name.removeprefix(prefix): state[name] for name in names}
            for cut in self.groups:
                tensors |= cut.apply(tensors, torch.arange(cut.kept))
            for local, tensor in tensors.items():
                yield (
                    f"{renumbered(source.found, paths[number], place)}.{local}",
                    tuple(tensor.shape),
                )


def structure_of(found: FoundArch) -> Structure:
    """TersorError for an architecture that says nothing of its structure."""
    if found.arch.structure is None:
        raise TersorError(
            f"what can be cut out of this model is not known ({found.how}); structured pruning "
            "needs a Structure in tersor.models, and works for no mixture of experts"
        )
    return found.arch.structure


def renumbered(found: FoundArch, path: str, number: int) -> str:
    """The path of something in a block, in a model or in files, once the block has that number."""
    blocks = found.arch.blocks
    old = f".{path}".partition(f".{blocks}.")[2].partition(".")[0]
    return respell(path, f"{blocks}.{old}", f"{blocks}.{number}")


def settle_cuts(
    source: Source, heads: float, ffn: float, layers: int | Sequence[int], multiple: int | None
) -> Cuts:
    """heads, ffn: shares to cut. layers: how many blocks, or which. multiple: of which the number
    of channels that is left shall be one; None: as the model's, up to 128.

    Raises TersorError where nothing or everything would go, where groups are not equal, and where
    transformers cannot make the smaller model.
    """
    structure = structure_of(source.found)
    depth = len(source.blocks)
    drop = _drop(layers, depth)
    if drop and any(config_value(source.model.config, name) for name in structure.by_number):
        lists = [getattr(source.model.config, name, None) for name in structure.per_block]
        if not any(lists):
            raise TersorError(
                f"no layer can be taken out of this model: {' or '.join(structure.by_number)} in "
                "its config.json makes what a block does depend on its number"
            )
    cuts = []
    for what, share, groups in (("heads", heads, structure.heads), ("ffn", ffn, structure.ffn)):
        if not 0 <= share < 1:
            raise TersorError(f"{what} is a share from 0 to less than 1, such as 0.25, not {share}")
        if not share:
            continue
        if groups is None:
            raise TersorError(
                f"{what} of {source.found.arch.name} cannot be cut: a linear of it holds more than "
                "one thing, in pieces of which none can be cut out whole"
            )
        cuts.append(_cut(source, what, share, groups, multiple if what == "ffn" else 1))
    if not cuts and not drop:
        raise TersorError("nothing is to be cut; give heads, ffn or layers")
    whole = Cuts(tuple(cuts), drop, depth)
    for cut in cuts:
        _check_class(source, cut, depth)
    whole.skeleton(source, range(whole.left))
    return whole


def _drop(layers: int | Sequence[int], depth: int) -> int | tuple[int, ...]:
    if isinstance(layers, int):
        if not 0 <= layers < depth:
            raise TersorError(
                f"layers is from 0 to {depth - 1} for a model of {depth} blocks, not {layers}"
            )
        return layers
    numbers = tuple(sorted(set(layers)))
    if len(numbers) == depth or not all(0 <= number < depth for number in numbers):
        raise TersorError(
            f"layers names blocks from 0 to {depth - 1}, not all of them; {list(layers)} does not"
        )
    return numbers


def _cut(source: Source, what: str, share: float, groups: Groups, multiple: int | None) -> Cut:
    shapes = set()
    for block in source.blocks:
        linears = [block.get_submodule(path) for path in groups.rows]
        columns = block.get_submodule(groups.columns).in_features
        shapes.add((columns, *(linear.out_features // groups.parts for linear in linears)))
    if len(shapes) > 1:
        raise TersorError(f"{what} cannot be cut where blocks have different sizes: {shapes}")
    (sizes,) = shapes
    stated = (config_value(source.model.config, name) for name in groups.counts)
    count = next(filter(None, stated), sizes[0])
    if any(size % count for size in sizes):
        raise TersorError(f"{what}: {count} groups do not divide the features {sizes}")
    multiple = math.gcd(count, MULTIPLE) if multiple is None else multiple
    if not 1 <= multiple <= count:
        raise TersorError(f"multiple is from 1 to the {count} channels there are, not {multiple}")
    kept = max(1, round(count * (1 - share) / multiple)) * multiple
    if kept >= count:
        unit = "heads of keys and values" if what == "heads" else f"channels by {multiple}"
        fix = f"use {what}={multiple / count:.2g}" if multiple < count else "use"
        if what == "ffn":
            fix += " or a smaller multiple" if multiple < count else " a smaller multiple"
        raise TersorError(f"{what}={share:g} of {count} {unit} rounds to none; {fix}")
    return Cut(what, groups, count, kept)


def _check_class(source: Source, cut: Cut, depth: int) -> None:
    """TersorError where transformers makes no model with the cut; it says with which it does."""

    def error(kept: int) -> TersorError | None:
        other = Cuts((Cut(cut.what, cut.groups, cut.count, kept),), depth - 1, depth)
        try:
            other.skeleton(source, [0])
        except TersorError as why:
            return why
        return None

    reason = error(cut.kept)
    if reason is None:
        return
    others = [n for n in range(1, cut.count) if error(n) is None] if cut.what == "heads" else []
    shares = ", ".join(f"{cut.what}={1 - n / cut.count:.2g}" for n in reversed(others))
    fix = f"what works is {shares}" if others else "use ffn and layers"
    raise TersorError(f"{cut.what} cannot be cut to {cut.kept} of {cut.count} ({reason}); {fix}")
