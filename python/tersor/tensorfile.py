"""One safetensors file: a header that is checked before it is believed, and the bytes it describes.

    8 bytes, little endian   length of the header
    JSON object              {"name": {"dtype": "BF16", "shape": [n, k], "data_offsets": [a, b]}}
    data                     the tensors, in any order, without gaps

Bytes are read with plain reads into the tensor's own memory, not through a memory map as the
safetensors library does: mapped pages count as resident memory, which streaming is there to bound,
and a mapped file that shrinks ends the process with SIGBUS instead of an error.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tersor.errors import TersorError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_CHUNK = 1 << 20  # bytes that are copied at a time
MAX_DIMS = 64  # dimensions; PyTorch's own iterators stop there

# dtype in the header -> bits per element, and the name in torch. None, or a name that the installed
# torch lacks: such a tensor is listed and cannot be loaded. F4 and F6 pack several elements into a
# byte, which no torch dtype of the same shape does.
DTYPES: dict[str, tuple[int, str | None]] = {
    "F64": (64, "float64"),
    "F32": (32, "float32"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
    "C64": (64, "complex64"),
    "I64": (64, "int64"),
    "I32": (32, "int32"),
    "I16": (16, "int16"),
    "I8": (8, "int8"),
    "U64": (64, "uint64"),
    "U32": (32, "uint32"),
    "U16": (16, "uint16"),
    "U8": (8, "uint8"),
    "BOOL": (8, "bool"),
}
_STORED = {
    getattr(torch, name): stored
    for stored, (_, name) in DTYPES.items()
    if name is not None and hasattr(torch, name)
}


def show(name: str) -> str:
    """A name from a file, made fit for a one-line message: quoted, escaped and not too long."""
    return repr(name if len(name) <= 120 else name[:117] + "...")


@dataclass(frozen=True)
class TensorMeta:
    """Where a stored tensor is and what it is; its bytes stay on disk.

    dtype: the name in the file, such as "BF16"; torch_dtype gives torch's.
    offset: of the first byte in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype; TersorError where the installed torch has none for it."""
        dtype = getattr(torch, DTYPES[self.dtype][1] or "", None)
        if dtype is None:
            raise TersorError(
                f"tensor {show(self.name)} in {self.file} is stored as {self.dtype}, which torch "
                f"{torch.__version__} cannot hold; convert it to BF16 first"
            )
        return dtype


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header has been checked; `tensors` is in the order of the data."""

    path: Path
    tensors: dict[str, TensorMeta]
    stamp: tuple[int, int]

    @classmethod
    def open(cls, path: Path) -> TensorFile:
        """Read and check the header alone; TersorError says what is wrong with the file.

        Accepted are files that the safetensors library accepts, less those that two readers could
        understand differently: a name given twice, unknown fields, a blank before the header.
        """
        try:
            with open(path, "rb", buffering=0) as file:
                stamp = _stamp(file)
                header = _read_header(path, file, stamp[0])
        except OSError as error:
            raise TersorError(f"cannot read {path}: {error.strerror or error}") from error
        return cls(path, header, stamp)

    def read(self, meta: TensorMeta, index: int | None = None) -> Tensor:
        """The tensor, or its slice [index] along the first dimension, in memory of its own."""
        dtype, shape, offset, nbytes = meta.torch_dtype, meta.shape, meta.offset, meta.nbytes
        if index is not None:
            if not shape or not 0 <= index < shape[0]:
                raise IndexError(f"index {index} of tensor {show(meta.name)} of shape {shape}")
            nbytes //= shape[0]
            offset, shape = offset + index * nbytes, shape[1:]
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        try:
            with open(self.path, "rb", buffering=0) as file:
                if _stamp(file) != self.stamp:
                    raise TersorError(
                        f"{self.path} changed while it was in use; let whatever writes it finish, "
                        "then start again"
                    )
                file.seek(offset)
                _fill(file, memoryview(buffer.numpy()))
        except OSError as error:
            raise TersorError(f"cannot read {self.path}: {error.strerror or error}") from error
        return buffer.view(dtype).reshape(shape)


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; equal names, dtypes, shapes and values give equal bytes.

    Tensors may be strided, on any device, and share storage; each is copied alone where it must be.
    """
    header, order = _encode_header(_described(tensors))
    file.write(header)
    for name in order:
        data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        file.write(memoryview(data.numpy()))


def stored_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that write_tensors makes."""
    return len(_encode_header(_described(tensors))[0]) + sum(t.nbytes for t in tensors.values())


def merge_files(file: BinaryIO, parts: Iterable[Path]) -> None:
    """Write what write_tensors makes of all tensors in the files `parts`, a chunk in memory at a
    time. No two of them may hold a tensor of one name."""
    found = {name: meta for part in parts for name, meta in TensorFile.open(part).tensors.items()}
    header, order = _encode_header({n: (m.dtype, m.shape, m.nbytes) for n, m in found.items()})
    file.write(header)
    buffer = bytearray(_CHUNK)
    for meta in (found[name] for name in order):
        with open(meta.file, "rb", buffering=0) as part:
            part.seek(meta.offset)
            for start in range(0, meta.nbytes, _CHUNK):
                view = memoryview(buffer)[: min(_CHUNK, meta.nbytes - start)]
                _fill(part, view)
                file.write(view)


def stored_dtype(name: str, tensor: Tensor) -> str:
    """The dtype's name in a file; TersorError for a tensor that a file cannot hold."""
    stored = _STORED.get(tensor.dtype)
    if stored is None or tensor.is_meta or tensor.layout is not torch.strided:
        raise TersorError(
            f"tensor {show(name)} ({tensor.dtype}, {tensor.layout}, on {tensor.device}) cannot be "
            "stored in safetensors; give a dense tensor of a common dtype that holds its values"
        )
    return stored


def strict_json(text: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8 whose only numbers are natural and in which no key comes twice.

    ValueError otherwise: what two parsers may read differently is read by none.
    """

    def reject(word: str) -> Any:
        raise ValueError(f"the number {word[:40]}")

    def natural(word: str) -> int:
        if word.startswith("-") or len(word) > 20:  # no uint64 has more digits
            reject(word)
        return int(word)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore
            raise ValueError(f"the key {show(twice)} twice")
        return found

    return _load_object(
        text,
        object_pairs_hook=unique,
        parse_int=natural,
        parse_float=reject,
        parse_constant=reject,
    )


def loose_json(text: bytes) -> dict[str, Any]:
    """A JSON object as Python and transformers read it; ValueError for anything else."""
    return _load_object(text)


def _load_object(text: bytes, **hooks: Any) -> dict[str, Any]:
    try:
        found = json.loads(text.decode("utf-8"), **hooks)
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} where an object should be")
    return found


def _stamp(file: BinaryIO | Any) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _fill(file: Any, view: memoryview) -> None:
    while len(view):  # one read of a raw file gives at most 2 GB
        count = file.readinto(view)
        if not count:
            raise OSError("the file ends too early")
        view = view[count:]


def _read_header(path: Path, file: Any, size: int) -> dict[str, TensorMeta]:
    def damaged(why: str) -> TersorError:
        return TersorError(f"{path} is not a valid safetensors file: {why}; download it again")

    start = file.read(8)
    if start == b"version ":
        raise TersorError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` there")
    if len(start) < 8:
        raise damaged(f"it has only {size} bytes")
    (length,) = struct.unpack("<Q", start)
    if length > MAX_HEADER:
        raise damaged(f"its header claims {length} bytes, more than the limit of {MAX_HEADER}")
    if length > size - 8:
        raise damaged(f"its header claims {length} bytes and the file has {size} (truncated?)")
    text = bytearray(length)
    _fill(file, memoryview(text))
    try:
        if not text.startswith(b"{"):
            raise ValueError("no '{' at its start")
        entries = strict_json(bytes(text))
        _check_metadata(entries.pop("__metadata__", {}))
        tensors = [_parse_entry(path, name, entry, 8 + length) for name, entry in entries.items()]
    except ValueError as error:  # includes malformed JSON and UTF-8
        raise damaged(f"bad header ({error})") from error

    # Sorted by position, each tensor begins where the last one ended, and the last ends the file:
    # so none overlap, none leave the file, and no byte is without an owner.
    tensors.sort(key=lambda meta: (meta.offset, meta.nbytes))
    position = 8 + length
    for meta in tensors:
        if meta.offset != position:
            kind = "overlaps its neighbour" if meta.offset < position else "leaves a hole before it"
            raise damaged(f"tensor {show(meta.name)} {kind}")
        position += meta.nbytes
    if position != size:
        state = "truncated" if position > size else "with bytes that belong to no tensor"
        raise damaged(f"its tensors end at byte {position} and the file at {size}: {state}")
    return {meta.name: meta for meta in tensors}


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("a __metadata__ that is not an object of strings")


def _parse_entry(path: Path, name: str, entry: object, data: int) -> TensorMeta:
    """One entry of the header, data beginning at that byte; ValueError says what is wrong."""
    if any("\ud800" <= c <= "\udfff" for c in name):
        raise ValueError(f"the tensor name {show(name)}, which is not Unicode")
    where = f"tensor {show(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} without exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where} of unknown dtype {show(str(dtype))}")
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise ValueError(f"{where} with a shape that is not a list of at most {MAX_DIMS} sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where} with data_offsets that are not a begin and an end")
    if math.prod(max(size, 1) for size in shape) >= 2**56:  # no int64 stride can overflow
        raise ValueError(f"{where} with an impossible shape")
    bits = math.prod(shape) * DTYPES[dtype][0]
    nbytes = offsets[1] - offsets[0]
    if bits != 8 * nbytes:
        raise ValueError(f"{where} of {nbytes} bytes where {dtype} {shape} takes {bits / 8:.10g}")
    return TensorMeta(name, dtype, tuple(shape), nbytes, path, data + offsets[0])


def _naturals(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


_Described = Mapping[str, tuple[str, Sequence[int], int]]  # dtype in the file, shape and bytes


def _described(tensors: Mapping[str, Tensor]) -> _Described:
    return {name: (stored_dtype(name, t), t.shape, t.nbytes) for name, t in tensors.items()}


def _encode_header(tensors: _Described) -> tuple[bytes, list[str]]:
    # Widest elements first, as the safetensors library does: then every tensor is aligned to its
    # element size, because the header is padded to 8 bytes.
    order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]][0], name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # older transformers insist on it
    position = 0
    for name in order:
        dtype, shape, nbytes = tensors[name]
        offsets = [position, position + nbytes]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order
