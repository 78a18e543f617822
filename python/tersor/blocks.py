"""Running a model one block at a time: what its blocks are called with, and the hidden states
between them, which wait in a file instead of in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.durable import durable
from tersor.errors import TersorError

BATCH_TOKENS = 2048  # windows are run together up to this many tokens, so activations stay small


@dataclass(frozen=True)
class Call:
    """What a block is called with beside the hidden states: masks, positions and the like."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states after the block, of the same shape."""
        out = block(hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


def batches(windows: Tensor) -> tuple[Tensor, ...]:
    """Token ids [samples, seq_len] in batches of BATCH_TOKENS tokens, at least one window each."""
    return windows.split(max(1, BATCH_TOKENS // windows.shape[1]))


class _CaughtError(Exception):
    """Raised by the last block, since nothing after it is wanted."""


@contextmanager
def _recording(blocks: Sequence[nn.Module]) -> Iterator[list[Call]]:
    """While it lasts, blocks do not compute: they hand on their input and note their arguments."""
    seen: list[Call] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append(Call(args, kwargs))
        if len(seen) == len(blocks):
            raise _CaughtError
        # Some models take the first element of what a block returns and some the whole; either is
        # only handed to the next block, which does not look at it.
        return args[:1] if args else (kwargs["hidden_states"],)

    for block in blocks:
        block.forward = record
    try:
        yield seen
    finally:
        for block in blocks:
            del block.forward


def catch(
    model: nn.Module, blocks: Sequence[nn.Module], *args: Any, **kwargs: Any
) -> tuple[Tensor, list[Call]]:
    """Runs the model's own forward up to its blocks.

    args, kwargs: of the model. Returns the hidden states that enter the first block and, for every
    block, what else it is called with: that differs where, say, windowed and full attention take
    turns.
    """
    with _recording(blocks) as seen, torch.no_grad():
        try:
            model(*args, **kwargs)
        except _CaughtError:
            pass
        except Exception as error:  # such as a block's result that is taken apart before the next
            raise TersorError(
                f"the model cannot be run up to its last block ({type(error).__name__}: {error}); "
                f"if it works otherwise, quantize it in memory (tersor.quantize_model)"
            ) from error
        else:
            raise TersorError(
                f"the model calls {len(seen)} of its {len(blocks)} blocks; only models that call "
                f"each block once, in order, can be quantized with calibration"
            )
    hidden = [call.args[0] if call.args else call.kwargs.pop("hidden_states") for call in seen]
    return hidden[0], [Call(call.args[1:], call.kwargs) for call in seen]


class Calls:
    """The calls of every block, by the number of windows in a batch.

    All windows are equally long and whole, so that masks and positions are those of any other batch
    of the same size; a model where that does not hold is refused."""

    def __init__(self) -> None:
        self._by_size: dict[int, list[Call]] = {}

    def add(self, size: int, calls: list[Call]) -> None:
        known = self._by_size.setdefault(size, calls)
        for i, (a, b) in enumerate(zip(known, calls, strict=True)):
            if not _same((a.args, a.kwargs), (b.args, b.kwargs)):
                raise TersorError(
                    f"block {i} of this model is given more than hidden states that depend on the "
                    f"text; such models can only be quantized in memory (tersor.quantize_model)"
                )

    def get(self, size: int, block: int) -> Call:
        return self._by_size[size][block]

    def __contains__(self, size: int) -> bool:
        return size in self._by_size


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a is b or bool(a == b)


class HiddenFile:
    """Hidden states in a file: the bytes of the windows, one after the other, and no header.

    Plain reads and writes rather than a memory map, whose pages would count as resident memory.
    """

    def __init__(
        self, path: Path, sizes: Sequence[int], shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        """sizes: windows in each batch; shape: of one window, [seq_len, features]."""
        self.path, self.sizes, self.shape, self.dtype = path, sizes, shape, dtype

    def __iter__(self) -> Iterator[Tensor]:
        with self.path.open("rb") as file:
            for size in self.sizes:
                batch = torch.empty(size, *self.shape, dtype=self.dtype)
                view = memoryview(batch.view(torch.uint8).numpy()).cast("B")
                if file.readinto(view) != len(view):
                    raise TersorError(
                        f"{self.path} changed while it was in use; run the same command again"
                    )
                yield batch

    def write(self, stream: Iterator[Tensor]) -> str:
        """Replaces the file by what the stream yields; durable, and whole or not there. Returns the
        digest of the file."""
        with durable(self.path) as file:
            for size, batch in zip(self.sizes, stream, strict=True):
                if batch.shape != (size, *self.shape) or batch.dtype != self.dtype:
                    raise TersorError(
                        f"a block of this model makes {batch.dtype} {tuple(batch.shape)} of "
                        f"{self.dtype} {(size, *self.shape)}; models whose hidden states change "
                        f"can only be quantized in memory (tersor.quantize_model)"
                    )
                view = batch.cpu().contiguous().view(torch.uint8).numpy()
                file.write(memoryview(view).cast("B"))
        return file.digest


class Flow:
    """The calibration text on its way through a model. What enters block i waits in a file i."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        windows: Tensor,
        path: Callable[[int], Path],
        tick: Callable[[], None] = lambda: None,
        device: torch.device | str = "cpu",
    ) -> None:
        """model: all that runs before the first block must be in memory, for `enter` too.
        path: of the file with the hidden states that enter a block. tick: called after every batch
        that went through a block. device: of the model."""
        self.batches = batches(windows.to(device))
        self._device = device
        self._model, self._blocks, self._path, self._tick = model, blocks, path, tick
        self._calls = Calls()
        for ids in {len(ids): ids for ids in self.batches}.values():
            hidden, calls = catch(model, blocks, ids)
            self._calls.add(len(ids), calls)
        self._shape, self._dtype = hidden.shape[1:], hidden.dtype

    def enter(self) -> str:
        """Writes what enters the first block; returns the digest of the file."""
        return self._file(0).write(self._entering())

    def entering(self, number: int) -> Iterable[Tensor]:
        """What enters a block, a batch of windows at a time."""
        return (hidden.to(self._device) for hidden in self._file(number))

    def pairs(self, number: int, block: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """What enters a block and what comes out of it, a batch of windows at a time."""
        for hidden in self.entering(number):
            with torch.no_grad():
                out = self._calls.get(len(hidden), number)(block, hidden)
            self._tick()
            yield hidden, out

    def through(self, number: int, block: nn.Module) -> Iterator[Tensor]:
        """What comes out of a block, a batch of windows at a time."""
        return (out for _, out in self.pairs(number, block))

    def advance(self, number: int, block: nn.Module) -> str:
        """Writes what comes out of a block, durably; it enters the next one. Returns the digest of
        the file."""
        return self.write(number + 1, self.through(number, block))

    def write(self, number: int, stream: Iterator[Tensor]) -> str:
        """Writes what enters a block, durably. Returns the digest of the file."""
        return self._file(number).write(stream)

    def forget(self, number: int) -> None:
        """Removes what enters a block that is done."""
        self._path(number).unlink(missing_ok=True)

    def _entering(self) -> Iterator[Tensor]:
        for ids in self.batches:
            hidden, calls = catch(self._model, self._blocks, ids)
            self._calls.add(len(ids), calls)
            yield hidden

    def _file(self, number: int) -> HiddenFile:
        sizes = [len(ids) for ids in self.batches]
        return HiddenFile(self._path(number), sizes, self._shape, self._dtype)
