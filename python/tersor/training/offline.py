"""A teacher that has read the text once and for all: what is kept of its distributions, on disk.

    cache/
      config.json             what was kept, of which teacher, of which text: the manifest
      model*.safetensors      for part i of the windows:
        ids.i  [windows, length, slots] int32      p.i           [windows, length, slots] float32
        tail.i [windows, length] float32           negentropy.i  [windows, length] float32
        keys.i [windows] int64, a digest of each window's token ids

It is written as checkpoints are (see tersor.shards): killed at any time and started again it goes
on, and it appears under its name whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.folder import member
from tersor.progress import Progress
from tersor.shards import ShardWriter
from tersor.tensorfile import TensorFile, TensorMeta, loose_json
from tersor.training.generation import seed_of
from tersor.training.sparse_targets import Keep, SparseTargets, sparse_targets

_FORMAT = "tersor teacher cache"
_VERSION = 1
_MANIFEST = "config.json"
_NAMES = ("ids", "p", "tail", "negentropy")


def cache_teacher(
    teacher: Callable[..., Any],
    windows: Tensor,
    out: str | Path,
    keep: Keep | None = None,
    *,
    batch: int = 1,
    part: int = 64,
    fingerprint: str | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> TeacherCache:
    """Lets a teacher read windows int64 [count, length] and writes what is kept to the folder out.

    teacher: a causal model of transformers, or a function from token ids to logits
        [batch, length, vocabulary]; position i holds the prediction of token i + 1. A model reads
        in evaluation mode.
    batch: windows per forward pass. part: windows per commit, done again if the run is killed.
    fingerprint: names the teacher; by default a digest of all its weights. A run goes on only with
        the same teacher, text and settings.
    Raises TersorError if out exists, for other settings than those of an unfinished run, for a
    full disk, and where a function that is no module comes without a fingerprint.
    """
    keep = keep or Keep()
    windows = windows.cpu()
    if windows.dim() != 2 or windows.dtype != torch.int64 or not windows.numel():
        raise TersorError(
            f"the windows are {windows.dtype} {list(windows.shape)}; give token ids int64 "
            "[count, length]"
        )
    for name, value in (("batch", batch), ("part", part)):
        if value < 1:
            raise TersorError(f"{name} is {value}; give at least 1")
    settings: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "keep": asdict(keep),
        "teacher": fingerprint or digest_of_weights(teacher),
        "text": hashlib.blake2b(
            windows.cpu().contiguous().numpy().tobytes(), digest_size=16
        ).hexdigest(),
        "windows": windows.shape[0],
        "length": windows.shape[1],
        "part": part,
    }
    with (
        ShardWriter(out, settings, resume) as writer,
        Progress(progress) as bar,
        _evaluating(teacher),
    ):
        parts = windows.split(part)
        bar.expect(len(parts))
        for number, ids in enumerate(parts):
            if str(number) not in writer.done:
                tensors = _read(teacher, ids, keep, batch, number * part)
                vocabulary = tensors.pop("vocabulary")
                for name, tensor in tensors.items():
                    writer.add(f"{name}.{number}", tensor)
                writer.commit(str(number), {"vocabulary": vocabulary})
            bar.step()
        vocabulary = writer.done["0"]["vocabulary"]
        writer.finish(settings | {"vocabulary": vocabulary}, None)
    return TeacherCache.open(out)


@contextmanager
def _evaluating(teacher: Callable[..., Any]) -> Iterator[None]:
    """Without dropout, while it lasts."""
    modules = list(teacher.modules()) if isinstance(teacher, nn.Module) else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@torch.inference_mode()
def _read(
    teacher: Callable[..., Any], windows: Tensor, keep: Keep, batch: int, first: int
) -> dict[str, Any]:
    """The tensors of one part, whose first window has that number, and the size of the vocabulary.
    Draws depend on the seed and the number of a window alone."""
    found: list[SparseTargets] = []
    weights = teacher.parameters() if isinstance(teacher, nn.Module) else ()
    device = next((weight.device for weight in weights), windows.device)
    for ids in windows.split(batch):
        output = teacher(ids.to(device))
        logits = getattr(output, "logits", output)
        if logits.dim() != 3 or logits.shape[:2] != ids.shape:
            raise TersorError(
                f"the teacher gave logits {list(logits.shape)} for token ids {list(ids.shape)}; "
                "it must give [batch, length, vocabulary]"
            )
        for window in logits:
            seed = seed_of("cache", keep.seed, first + len(found))
            draw = torch.Generator(logits.device).manual_seed(seed)
            found.append(sparse_targets(window, keep, draw))
    shape = windows.shape
    tensors: dict[str, Any] = {
        name: torch.cat([getattr(one, name) for one in found]).cpu().unflatten(0, shape)
        for name in _NAMES
    }
    tensors["ids"] = tensors["ids"].int()
    tensors["keys"] = torch.tensor([_key(row) for row in windows], dtype=torch.int64)
    return tensors | {"vocabulary": found[0].vocabulary}


@dataclass(frozen=True)
class TeacherCache:
    """What was kept of a teacher, read from disk a window at a time.

    manifest: config.json. places: digest of a window -> (part, number in it).
    """

    folder: Path
    keep: Keep
    vocabulary: int
    length: int
    manifest: dict[str, Any]
    tensors: dict[str, tuple[TensorFile, TensorMeta]]
    places: dict[int, tuple[int, int]]

    @classmethod
    def open(cls, folder: str | Path) -> TeacherCache:
        """TersorError for a folder that cache_teacher did not write, or that is damaged."""
        folder = Path(folder)
        try:
            manifest = loose_json(member(folder, _MANIFEST).read_bytes())
            if manifest.get("format") != _FORMAT or manifest.get("version") != _VERSION:
                raise ValueError("it is none of this version")
            keep = Keep(**manifest["keep"])
            parts = -(-manifest["windows"] // manifest["part"])
            vocabulary, length = manifest["vocabulary"], manifest["length"]
        except (ValueError, KeyError, TypeError) as error:
            raise TersorError(
                f"{folder} is no teacher cache that can be read ({error}); write it with "
                "cache_teacher"
            ) from error
        files = [TensorFile.open(path) for path in sorted(folder.glob("*.safetensors"))]
        tensors = {name: (file, meta) for file in files for name, meta in file.tensors.items()}
        wanted = {f"{name}.{i}" for name in (*_NAMES, "keys") for i in range(parts)}
        if tensors.keys() != wanted:
            raise TersorError(f"{folder} is incomplete: copy all of its files, or write it again")
        places = {}
        for number in range(parts):
            file, meta = tensors[f"keys.{number}"]
            keys = file.read(meta).tolist()
            places.update({key: (number, place) for place, key in enumerate(keys)})
        return cls(folder, keep, vocabulary, length, manifest, tensors, places)

    def targets(self, windows: Tensor) -> SparseTargets:
        """What was kept for windows int64 [count, length], found by their token ids; the tokens of
        all windows in one dimension. TersorError for a window that the teacher has not read."""
        found: dict[str, list[Tensor]] = {name: [] for name in _NAMES}
        for row in windows.cpu():
            place = self.places.get(_key(row))
            if place is None:
                raise TersorError(
                    f"a window of {len(row)} tokens is not in {self.folder}, whose windows have "
                    f"{self.length}; train on the very windows that the teacher has read, padding "
                    "and all, or write the cache again"
                )
            for name in _NAMES:
                file, meta = self.tensors[f"{name}.{place[0]}"]
                found[name].append(file.read(meta, place[1]))
        kept = {name: torch.cat(rows) for name, rows in found.items()}
        kept["ids"] = kept["ids"].long()
        targets = SparseTargets(**kept, keep=self.keep, vocabulary=self.vocabulary)
        return targets.to(windows.device)


def _key(window: Tensor) -> int:
    return int.from_bytes(_hash(window).digest()[:8], "little", signed=True)


def _hash(ids: Tensor) -> hashlib.blake2b:
    return hashlib.blake2b(ids.cpu().to(torch.int32).contiguous().numpy(), digest_size=16)


def digest_of_weights(teacher: Callable[..., Any]) -> str:
    """Of all weights and buffers, by name."""
    if not isinstance(teacher, nn.Module):
        raise TersorError(
            f"a teacher that is a {type(teacher).__name__} and no module cannot be told from "
            "others; give a fingerprint, a text that names it"
        )
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(teacher.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(memoryview(data.numpy()))
    return total.hexdigest()
