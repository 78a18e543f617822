"""Files that are whole under their names or not there, whatever interrupts the writing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tersor.errors import TersorError

_CHUNK = 1 << 20  # bytes that are hashed at a time


class HashedFile(io.BufferedWriter):
    """A new file, and the digest of what has been written to it one call after the other."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self._hash = _hasher()

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return super().write(data)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def _hasher() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


def digest_of(path: Path) -> str:
    """What HashedFile.digest was, if the file is as it was written."""
    found = _hasher()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


@contextlib.contextmanager
def durable(path: Path, nbytes: int = 0) -> Iterator[HashedFile]:
    """Open a file for writing that appears under its name whole and synced to disk, or not at all.

    Until then its name is `path` + ".tmp". nbytes, where known, is for the message of a full disk.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with disk_errors(path.parent, nbytes):
            with HashedFile(temporary) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, not only the files' contents."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_errors(folder: Path, nbytes: int = 0) -> Iterator[None]:
    """Turn an OSError from writing into a TersorError that names the folder and what it needs."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TersorError(full_disk(folder, nbytes)) from error
        raise TersorError(f"cannot write in {folder}: {error.strerror or error}") from error


def full_disk(folder: Path, nbytes: int, free: int | None = None) -> str:
    need = f"needs {nbytes / 1e6:,.1f} MB" if nbytes else "needs more space"
    have = "" if free is None else f" and {free / 1e6:,.1f} MB are free"
    return (
        f"the disk is full: {folder} {need}{have}; free some space and run the same command again "
        "to continue"
    )
