"""What is cut out of a model: settled, with the configuration of what is left, before any work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.models import (
    GROUPS,
    QUERIES,
    FoundArch,
    Groups,
    Structure,
    config_value,
)
from tersor.models.arch import respell
from tersor.pruning import best, select
from tersor.source import Source
from tersor.surgery.smaller import channels_left, is_number, smaller_skeleton


@dataclass(frozen=True)
class Cut:
    """One kind of groups in every block. what: "heads" or "ffn".

    count, kept: groups, and those that stay. each, kept_each: query heads in each group, and those
    that stay of every group that does; 1 where a group is one piece.
    """

    what: str
    groups: Groups
    count: int
    kept: int
    each: int = 1
    kept_each: int = 1

    @property
    def pieces(self) -> int:
        """Query heads, or groups that are one piece: equal parts of what the columns' linear
        reads."""
        return self.count * self.each

    @property
    def first(self) -> Tensor:
        """The pieces that would stay if all were equal."""
        everything = torch.arange(self.pieces).view(self.count, self.each)
        return everything[: self.kept, : self.kept_each].flatten()

    def departure(self, asked: float) -> str | None:
        """What to say where whole groups make another share than was asked for."""
        share = 1 - self.kept / self.count
        if not asked or abs(share - asked) <= 0.05:
            return None
        return f"{asked:g} became {share:.2g}: {self.kept} of {self.count} stay in every block"

    def settings(self) -> dict[str, str]:
        """For people."""
        result = {self.what: f"{self.kept} of {self.count}"}
        if self.kept_each < self.each:
            result["query_heads"] = f"{self.kept_each} of {self.each} in a group"
        return result

    def choose(self, scores: Callable[[str], Tensor]) -> Tensor:
        """The numbers of the pieces that stay, int64, ascending: of the best groups the best query
        heads. scores: of all groups (GROUPS) or of all pieces (QUERIES), more is more."""
        everything = torch.arange(self.pieces).view(self.count, self.each)
        kept = torch.arange(self.count)
        if self.kept < self.count:
            kept = best(scores(GROUPS), self.kept)
        if self.kept_each == self.each:
            return everything[kept].flatten()
        own = scores(QUERIES).view(self.count, self.each)[kept]
        return everything[kept].gather(1, best(own, self.kept_each)).flatten()

    def rows(self, tensors: Mapping[str, Tensor], kind: str) -> list[Tensor]:
        """The weights whose outputs are the pieces (QUERIES), or the groups with all that is of
        them (GROUPS). tensors: of a block, by their names in it."""
        return [
            part
            for linear in self.groups.rows
            for holds, part in self._parts(linear, tensors[f"{linear}.weight"])
            if kind == GROUPS or self.each == 1 or holds == QUERIES
        ]

    def apply(self, tensors: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
        """The tensors of a block, by their names in it, that the cut changes. kept: numbers of the
        pieces that stay, int64. On the meta device: the shapes."""
        result, groups = {}, (kept // self.each).unique()
        for linear in self.groups.rows:
            for name in (f"{linear}.weight", f"{linear}.bias"):
                if name in tensors:
                    parts = [
                        select(part, 0, self.pieces, kept)
                        if holds == QUERIES
                        else select(part, 0, self.count, groups)
                        for holds, part in self._parts(linear, tensors[name])
                    ]
                    result[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
        name = f"{self.groups.columns}.weight"
        return result | {name: select(tensors[name], 1, self.pieces, kept)}

    def _parts(self, linear: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        holds = self.groups.rows[linear]
        counts = [self.pieces if kind == QUERIES else self.count for kind in holds]
        width = tensor.shape[0] // sum(counts)
        return zip(holds, tensor.split([width * count for count in counts]), strict=True)


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
            groups, pieces = cut.groups, cut.kept * cut.kept_each
            for name, number in ((groups.count, cut.kept), (groups.queries, pieces)):
                if name is not None and hasattr(before, name):
                    config[name] = number
            if groups.width is not None:
                columns = source.blocks[0].get_submodule(groups.columns).in_features
                config[groups.width] = columns // cut.pieces
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
        return smaller_skeleton(source, self.config(source, kept), dict(self._shapes(source, kept)))

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
                tensors |= cut.apply(tensors, cut.first)
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
    source: Source,
    *,
    heads: float = 0.0,
    query_heads: float = 0.0,
    ffn: float = 0.0,
    layers: int | Sequence[int] = 0,
    multiple: int | None = None,
) -> Cuts:
    """heads, query_heads, ffn: shares to cut. layers: how many blocks, or which. multiple: of which
    the number of channels that is left shall be one; None: as the model's, up to 128.

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
    for what, share in (("heads", heads), ("query_heads", query_heads), ("ffn", ffn)):
        if not is_number(share) or not 0 <= share < 1:
            raise TersorError(
                f"{what} is a share from 0 to less than 1, such as 0.25, not {share!r}"
            )
    cuts = []
    if heads or query_heads:
        cuts.append(_cut_heads(source, structure.heads, heads, query_heads))
    if ffn:
        cuts.append(_cut_ffn(source, structure.ffn, ffn, multiple))
    if not cuts and not drop:
        raise TersorError("nothing is to be cut; give heads, query_heads, ffn or layers")
    whole = Cuts(tuple(cuts), drop, depth)
    for cut in cuts:
        _check_class(source, cut, depth)
    whole.skeleton(source, range(whole.left))
    return whole


def _drop(layers: int | Sequence[int], depth: int) -> int | tuple[int, ...]:
    if isinstance(layers, bool) or not isinstance(layers, (int, list, tuple)):
        raise TersorError(f"layers is how many blocks go, or a list of which, not {layers!r}")
    if isinstance(layers, int):
        if not 0 <= layers < depth:
            raise TersorError(
                f"layers is from 0 to {depth - 1} for a model of {depth} blocks, not {layers}"
            )
        return layers
    if not all(type(number) is int for number in layers):
        raise TersorError(f"layers names blocks by whole numbers, not {list(layers)!r}")
    numbers = tuple(sorted(set(layers)))
    if len(numbers) < len(layers):
        raise TersorError(f"layers names each block once, not {list(layers)}")
    if len(numbers) == depth or not all(0 <= number < depth for number in numbers):
        raise TersorError(
            f"layers names blocks from 0 to {depth - 1}, not all of them; {list(layers)} does not"
        )
    return numbers


def _cut_heads(source: Source, groups: Groups, heads: float, query_heads: float) -> Cut:
    whole = _whole(source, "heads", groups)
    kept, kept_each = whole.count, whole.each
    if heads:
        kept = max(1, round(whole.count * (1 - heads)))
        if kept == whole.count:
            raise TersorError(
                f"heads={heads:g} of {whole.count} heads of keys and values rounds to none; use "
                f"heads={1 / whole.count:.2g}"
            )
    if query_heads:
        if whole.each == 1:
            raise TersorError(
                "query_heads is for models in which several query heads read one head of keys and "
                f"values; this one has {whole.count} of each: use heads"
            )
        kept_each = max(1, round(whole.each * (1 - query_heads)))
        if kept_each == whole.each:
            raise TersorError(
                f"query_heads={query_heads:g} of the {whole.each} query heads of each head of keys "
                f"and values rounds to none; use query_heads={1 / whole.each:.2g}"
            )
    return replace(whole, kept=kept, kept_each=kept_each)


def _cut_ffn(source: Source, groups: Groups, share: float, multiple: int | None) -> Cut:
    whole = _whole(source, "ffn", groups)
    kept = channels_left("ffn", whole.count, share, multiple)
    return replace(whole, kept=kept)


def _whole(source: Source, what: str, groups: Groups) -> Cut:
    """The cut that takes nothing. TersorError where groups are not equal."""
    sizes = {
        tuple(
            block.get_submodule(path).weight.shape[dim]
            for dim, paths in ((1, (groups.columns,)), (0, groups.rows))
            for path in paths
        )
        for block in source.blocks
    }
    if len(sizes) > 1:
        raise TersorError(f"{what} cannot be cut where blocks have different sizes: {sizes}")
    (columns, *rows) = sizes.pop()
    config = source.model.config
    count = config_value(config, groups.count) or columns
    each = (config_value(config, groups.queries) if groups.queries else count) // count
    pieces = count * each
    counts = [sum(pieces if p == QUERIES else count for p in h) for h in groups.rows.values()]
    if columns % pieces or any(n % m for n, m in zip(rows, counts, strict=True)):
        raise TersorError(
            f"{what}: {count} groups of {each} do not divide the features {columns}, {rows}"
        )
    return Cut(what, groups, count, count, each, each)


def _check_class(source: Source, cut: Cut, depth: int) -> None:
    """TersorError where transformers makes no model with the cut; it says with which it does."""

    def error(kept: int, kept_each: int) -> TersorError | None:
        other = Cuts((replace(cut, kept=kept, kept_each=kept_each),), depth - 1, depth)
        try:
            other.skeleton(source, [0])
        except TersorError as why:
            return why
        return None

    reason = error(cut.kept, cut.kept_each)
    if reason is None:
        return
    others = []
    if cut.what == "heads":
        groups = range(cut.count, 0, -1) if cut.kept < cut.count else [cut.count]
        queries = range(cut.each, 0, -1) if cut.kept_each < cut.each else [cut.each]
        found = [(n, m) for n in groups for m in queries if n * m < cut.pieces]
        for n, m in (pair for pair in found if error(*pair) is None):
            shares = {"heads": 1 - n / cut.count, "query_heads": 1 - m / cut.each}
            others.append(" with ".join(f"{k}={v:.2g}" for k, v in shares.items() if v))
    fix = f"what works is {', '.join(others)}" if others else "use ffn and layers"
    left = f"{cut.kept} of {cut.count}"
    if cut.kept_each < cut.each:
        left += f" with {cut.kept_each} of {cut.each} query heads"
    raise TersorError(f"{cut.what} cannot be cut to {left} ({reason}); {fix}")
