"""A Hugging Face checkpoint folder, read lazily and trusted in nothing.

What cannot be opened here is refused with the cause and the fix: pickled weights, a damaged or
missing shard, an index or a link that leads out of the folder. ShardWriter, its counterpart, is in
tersor.shards and can be imported from here.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.folder import companions, member
from tersor.shards import ShardWriter
from tersor.tensorfile import TensorFile, TensorMeta, loose_json, show, strict_json

__all__ = ["Checkpoint", "ShardWriter", "TensorMeta", "check_finite"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON = 100_000_000  # bytes of config.json or the index
_SAMPLE = 4096  # bytes of each tensor that enter the fingerprint
_CHUNK = 1 << 22  # elements that check_finite looks at together


class Checkpoint:
    """A validated reader of config.json and safetensors weights, one file or sharded.

    folder: as given. config: config.json. names: every stored tensor, in the order of the files.
    companions: the small files (tokenizer, generation config, licence) that a derived model needs.

    A tied weight is stored once: with `tie_word_embeddings` in the config, `names` usually lacks
    "lm_head.weight", and the head is the embedding. Nothing is invented for it here.

    Where index and shards disagree, what transformers does decides if it is unambiguous: a tensor
    that a listed shard holds beyond the index is part of the model. A tensor in two shards, of
    which transformers takes the one that it happens to load last, is an error.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], files: list[TensorFile], companions: list[Path]
    ) -> None:
        self.folder = folder
        self.config = config
        self.companions = companions
        self._files = {file.path: file for file in files}
        self._tensors = {name: meta for file in files for name, meta in file.tensors.items()}

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read the headers and config.json; TersorError says what is wrong and what to do."""
        folder = Path(folder)
        if not os.path.isdir(folder):
            raise TersorError(_not_a_folder(folder))
        try:
            config = _read_json(folder, "config.json")
            if config.get("quantization_config", ...) is None:  # null says what absence says
                del config["quantization_config"]
            files = _open_files(folder)
            if not any(file.tensors for file in files):
                raise TersorError(f"{folder} holds no tensor at all; download the model again")
            return cls(folder, config, files, companions(folder))
        except OSError as error:
            raise TersorError(
                f"cannot read {error.filename or folder}: {error.strerror}"
            ) from error

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def metadata(self, name: str) -> TensorMeta:
        """Dtype, shape, bytes and file of a tensor, without reading it."""
        try:
            return self._tensors[name]
        except KeyError:
            raise TersorError(
                f"{self.folder} has no tensor {show(name)}; the checkpoint is incomplete, or not "
                "of the architecture that its config.json names"
            ) from None

    def load(self, name: str) -> Tensor:
        """The tensor, in memory of its own, on the CPU, in the dtype of the file."""
        meta = self.metadata(name)
        return self._files[meta.file].read(meta)

    def load_slice(self, name: str, index: int) -> Tensor:
        """load(name)[index], reading that slice alone: one expert of a fused tensor."""
        meta = self.metadata(name)
        return self._files[meta.file].read(meta, index)

    def fingerprint(self) -> str:
        """A hex digest that changes when the model does, made without reading all of it.

        It covers config.json, every name, dtype, shape and position, and 4 KiB from the middle of
        each tensor, so that weights trained further are told apart although their shapes agree.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted(self._files.values(), key=lambda file: file.path.name):
            digest.update(f"\n{file.path.name} {file.stamp[0]}".encode())
            try:
                with open(file.path, "rb", buffering=0) as data:
                    for meta in file.tensors.values():
                        place = f"\n{meta.name!r} {meta.dtype} {meta.shape} {meta.offset}"
                        digest.update(place.encode())
                        sample = min(meta.nbytes, _SAMPLE)
                        data.seek(meta.offset + (meta.nbytes - sample) // 2)
                        digest.update(data.read(sample))
            except OSError as error:
                raise TersorError(f"cannot read {file.path}: {error.strerror}") from error
        return digest.hexdigest()


def check_finite(
    name: str, tensor: Tensor, fix: str = "the checkpoint is damaged: download or export it again"
) -> None:
    """TersorError, with the count, if a tensor (of any shape and dtype) holds a NaN or infinity."""
    if not tensor.dtype.is_floating_point:
        return
    nan = infinite = 0
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        if part.dtype not in (torch.float32, torch.float64):
            part = part.float()  # exact, and every dtype has it
        # aminmax carries NaN along, in one pass without a temporary: the common case ends here.
        if not all(bound.isfinite() for bound in torch.aminmax(part)):
            nan += int(part.isnan().sum())
            infinite += int(part.isinf().sum())
    if nan or infinite:
        raise TersorError(
            f"tensor {show(name)} holds {nan} NaN and {infinite} infinite values among "
            f"{tensor.numel()}; {fix}"
        )


def _not_a_folder(folder: Path) -> str:
    if os.path.lexists(folder):
        return f"{folder} is not a folder; give the folder that holds config.json and the weights"
    message = f"there is no folder {folder}"
    if not folder.is_absolute() and len(folder.parts) == 2 and ".." not in folder.parts:
        message += f"; if it is a model of the hub, run `hf download {folder} --local-dir DIR`"
        return message + " and give DIR"
    return message + "; give the folder that holds config.json and the weights"


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = member(folder, name)
    # transformers reads config.json with Python's parser, which takes Infinity (Mamba's configs
    # have it) and repeated keys; the index decides which bytes are read and must not be ambiguous.
    parse = strict_json if name == INDEX else loose_json
    if path.stat().st_size > MAX_JSON:
        raise TersorError(f"{path} is larger than {MAX_JSON} bytes; it cannot be what it says")
    try:
        return parse(path.read_bytes())
    except ValueError as error:
        raise TersorError(f"{path} is not valid JSON: {error}; download it again") from error


def _open_files(folder: Path) -> list[TensorFile]:
    """The weight files, headers checked: one file if there is one (as transformers), or shards."""
    if os.path.lexists(folder / SINGLE):
        return [TensorFile.open(member(folder, SINGLE))]
    if not os.path.lexists(folder / INDEX):
        raise TersorError(_no_weights(folder))
    index = _read_json(folder, INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(type(v) is str for v in index.values()):
        raise TersorError(
            f"{folder / INDEX} has no weight_map from tensor to file; download it again"
        )
    files: dict[str, TensorFile] = {}
    holder: dict[str, str] = {}
    for shard in sorted(set(index.values())):
        if not shard.endswith(".safetensors"):
            raise TersorError(f"{folder / INDEX} names {show(shard)}, which is not safetensors")
        files[shard] = TensorFile.open(member(folder, shard))
        for name in files[shard].tensors:
            if name in holder:
                raise TersorError(
                    f"tensor {show(name)} is in both {holder[name]} and {shard} of {folder}; "
                    "remove stale files and download the model again"
                )
            holder[name] = shard
    for name, shard in index.items():
        if holder.get(name) != shard:
            raise TersorError(
                f"{folder / INDEX} puts tensor {show(name)} in {shard}, which does not hold it; "
                "download the model again"
            )
    return list(files.values())


def _no_weights(folder: Path) -> str:
    files = sorted(entry.name for entry in os.scandir(folder))
    pickled = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    others = [name for name in files if name.endswith((".safetensors", ".gguf"))]
    if pickled:
        return (
            f"{folder} holds its weights as pickle ({show(pickled[0])}), which can run code when "
            "read; convert to safetensors where you trust it: "
            "AutoModel.from_pretrained(...).save_pretrained(...)"
        )
    found = f" (found {show(others[0])}, which is not one)" if others else ""
    return f"{folder} has neither {SINGLE} nor {INDEX}{found}; download or export the whole model"
