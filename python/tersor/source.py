"""A checkpoint as the model that it is of, whose weights come and go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tersor.checkpoint import Checkpoint, check_finite
from tersor.devices import CPU, move_buffers
from tersor.errors import TersorError
from tersor.models import (
    FoundArch,
    Stored,
    build_skeleton,
    check_all_used,
    empty,
    fill,
    find_arch,
    plain_linears,
    stored,
)


class _Ahead:
    """A reader of a checkpoint that can be told what will be asked for, and reads it meanwhile."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._thread = ThreadPoolExecutor(1, "tersor-read")
        self._coming: dict[str, Future[Tensor]] = {}

    def expect(self, names: Iterable[str]) -> None:
        """Tensors by their names in the checkpoint, each to be loaded once."""
        for name in names:
            if name not in self._coming:
                self._coming[name] = self._thread.submit(self._checkpoint.load, name)

    def load(self, name: str) -> Tensor:
        coming = self._coming.pop(name, None)
        return self._checkpoint.load(name) if coming is None else coming.result()

    def load_slice(self, name: str, index: int) -> Tensor:
        return self._checkpoint.load_slice(name, index)


@dataclass(frozen=True)
class Source:
    """model: on the meta device, all its linears nn.Linear. where: the place of each of its
    parameters in the checkpoint. dtype: what the model computes in. device: where its parameters
    are while they are loaded."""

    checkpoint: Checkpoint
    model: nn.Module
    found: FoundArch
    where: dict[str, Stored]
    dtype: torch.dtype
    device: torch.device = CPU
    _reader: _Ahead = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_reader", _Ahead(self.checkpoint))

    @classmethod
    def open(cls, folder: str | Path, device: torch.device = CPU) -> Source:
        """TersorError for a checkpoint that is damaged, quantized already or holds what the model
        has no place for, and for a model that cannot be built or whose blocks cannot be found."""
        checkpoint = Checkpoint.open(folder)
        if "quantization_config" in checkpoint.config:
            raise TersorError(f"{folder} is quantized already; give the original model")
        dtype = _dtype(checkpoint)
        _check_depth(checkpoint)
        model = build_skeleton(checkpoint.config, dtype)
        model.config.use_cache = False
        found = find_arch(model)
        plain_linears(model, found.arch)
        where = stored(model, found, checkpoint.names)
        check_all_used(model, set(checkpoint.names) - {place.name for place in where.values()})
        move_buffers(model, device)
        return cls(checkpoint, model, found, where, dtype, device)

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for _, block in self.found.blocks(self.model)]

    @property
    def context(self) -> int | None:
        """The most positions that the model has, where it says so."""
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        for name, module in self.model.named_modules():
            # RoBERTa counts its positions from the padding token's number on.
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
                limit = module.num_embeddings - module.padding_idx - 1
        return limit if isinstance(limit, int) and limit > 0 else None

    def before(self) -> list[str]:
        """The parameters of what runs before the first block."""
        return self.found.outside(self.where)[0]

    def names(self, block: str) -> list[str]:
        """The parameters of the block with that path."""
        return [name for name in self.where if name.startswith(f"{block}.")]

    @contextmanager
    def loaded(self, names: Iterable[str]) -> Iterator[None]:
        """While it lasts, these parameters are in memory, in the model's dtype.
        TersorError where one holds NaN or infinity."""
        names = list(names)
        try:
            self._fill(names)
            yield
        finally:
            empty(self.model, names)

    def expect(self, names: Iterable[str]) -> None:
        """Begins to read parameters that will be loaded next, beside what is done until then. They
        wait in the memory of the host."""
        places = (self.where[name] for name in names)
        self._reader.expect(place.name for place in places if place.expert is None)

    def whole(self) -> nn.Module:
        """The model with all its parameters in memory from now on, raising as loaded()."""
        self._fill(list(self.where))
        return self.model

    def _fill(self, names: list[str]) -> None:
        fill(self.model, names, self.where, self._reader, self.dtype, self.device)
        for name in names:
            check_finite(self.where[name].name, _tensor(self.model, name))

    def unchanged(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """These parameters as (name to write, tensor) with the bits and the order of the files."""
        for name in names:
            place = self.where[name]
            if place.expert is None:
                yield place.saved_as, self.checkpoint.load(place.name)
            else:  # a slice of a fused tensor, whose name stands for all of it
                yield place.saved_as, place.read(self.checkpoint)

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """A new value for a parameter, in the order and the dtype that its tensor in the files
        has."""
        place = self.where[name]
        dtype = self.checkpoint.metadata(place.name).torch_dtype
        return (tensor.t() if place.transposed else tensor).to(dtype).contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        return sum(self.checkpoint.metadata(name).nbytes for name in self.checkpoint.names)

    def outside(self, limit: int, tables: bool = True) -> list[list[str]]:
        """Tensors of the checkpoint that are in no block, by their names in it, in parts of at most
        `limit` bytes or one tensor.

        tables: with those in files of old (masks, frequencies) that belong to a block, but to no
        parameter of it."""
        blocks = tuple(f"{path}." for path, _ in self.found.blocks(self.model))
        inside = {place.name for name, place in self.where.items() if name.startswith(blocks)}
        between = f".{self.found.arch.blocks}."
        parts: list[list[str]] = []
        room = 0
        for name in self.checkpoint.names:
            if name in inside or (not tables and between in f".{name}"):
                continue
            nbytes = self.checkpoint.metadata(name).nbytes
            if not parts or nbytes > room:
                parts.append([])
                room = limit
            parts[-1].append(name)
            room -= nbytes
        return parts


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), last)
    return tensor


def _check_depth(checkpoint: Checkpoint) -> None:
    """TersorError for more blocks than there are tensors, before time is spent on building them."""
    config = checkpoint.config.get("text_config") or checkpoint.config
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        depth = config.get(key)
        if isinstance(depth, int) and depth > len(checkpoint.names):
            raise TersorError(
                f"config.json says {key} is {depth}, but the files hold {len(checkpoint.names)} "
                "tensors; correct it, or download the model again"
            )


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What the configuration says, or else what the first matrix of the files is in."""
    config = checkpoint.config.get("text_config") or checkpoint.config
    named = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    if isinstance(dtype, torch.dtype):
        return dtype
    matrices = (checkpoint.metadata(n) for n in checkpoint.names)
    return next((m.torch_dtype for m in matrices if len(m.shape) == 2), None) or torch.float32
