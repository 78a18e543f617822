"""The writer of a checkpoint: one shard for each finished piece of work, durable once committed.

While it works, everything is in a folder beside the output:

    out.partial/
      journal.json               settings, and the commits so far; what it lacks does not exist
      lock                       held with flock by the run that writes
      shard-00001.safetensors    one per commit that had tensors
      state/                     the caller's own files, such as hidden states
      out/                       while finish() assembles what is then renamed to `out`

A run may be killed at any moment. Files get their names only when whole, the journal is written
last, and opening again with equal settings brings the folder back to the last commit, whose files
are checked against their digests in the journal.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tersor.errors import TersorError
from tersor.folder import companions
from tersor.tensorfile import TensorFile, loose_json, show, stored_dtype, stored_size, write_tensors

_JOURNAL = "journal.json"
_LOCK = "lock"
_STATE = "state"
_STAGING = "out"
_VERSION = 2
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


def _digest(path: Path) -> str:
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
        with _disk_errors(path.parent, nbytes):
            with HashedFile(temporary) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, not only the files' contents."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _disk_errors(folder: Path, nbytes: int = 0) -> Iterator[None]:
    """Turn an OSError from writing into a TersorError that names the folder and what it needs."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TersorError(_full_disk(folder, nbytes)) from error
        raise TersorError(f"cannot write in {folder}: {error.strerror or error}") from error


class ShardWriter:
    """Writes a sharded safetensors checkpoint to `out`, which appears whole or not at all.

    settings: JSON data that determines the result; a partial run continues only with equal ones.
        One that has committed nothing is begun anew.
    resume: False throws away a partial run, whatever its settings.

    Raises TersorError if `out` exists, if another run is writing it, or if the settings differ.
    Use it in a with statement, or call close(): the folder stays locked until then.

    done: the info of every commit so far, by key, in order; a resumed run skips these.
    finished: a run with these settings had renamed its folder to `out` and was stopped while it
    cleaned up. All commits are done, and finish() completes the cleaning.
    """

    def __init__(self, out: str | Path, settings: Mapping[str, Any], resume: bool = True) -> None:
        self.out = Path(os.path.abspath(out))
        self.folder = self.out.with_name(self.out.name + ".partial")
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self.finished = False
        self._pending: dict[str, Tensor] = {}
        self._commits: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}  # committed tensor -> shard
        self._tensor_bytes = 0
        if os.path.lexists(self.out) and not (self.folder / _JOURNAL).exists():
            raise TersorError(_exists(self.out))
        with _disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            _sync_folder(self.folder.parent)
            self._lock: int | None = _lock(self.folder)
        try:
            with _disk_errors(self.folder):
                self._open(resume)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder; what is committed stays for the next run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def done(self) -> dict[str, dict[str, Any]]:
        return {commit["key"]: commit["info"] for commit in self._commits}

    def add(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into the next shard. It is held, not copied, until commit()."""
        if name in self._pending or name in self._names:
            raise TersorError(f"tensor {show(name)} was added twice")
        stored_dtype(name, tensor)
        self._pending[name] = tensor

    def commit(
        self, key: str, info: Mapping[str, Any], state: Mapping[str, str] | None = None
    ) -> None:
        """Write what was added as one shard, then record the commit; durable on return.

        info: JSON data, given back in `done`. A commit without tensors is only recorded. After an
        error (a full disk) nothing is recorded and the same commit may be tried again.
        state: name -> digest of the files (see state_path) that a run resumed after this commit
        reads; it is refused if one of them is gone or differs.
        """
        if key in self.done:
            raise TersorError(f"{show(key)} was committed before")
        commit: dict[str, Any] = {"key": key, "file": None, "bytes": 0, "digest": None}
        commit |= {"info": json.loads(json.dumps(dict(info))), "state": dict(state or {})}
        if self._pending:
            commit["file"] = f"shard-{len(self._shards) + 1:05d}.safetensors"
            commit["bytes"] = stored_size(self._pending)
            self.require_space(commit["bytes"])
            with durable(self.folder / commit["file"], commit["bytes"]) as file:
                write_tensors(file, self._pending)
            commit["digest"] = file.digest
        self._write_journal([*self._commits, commit])
        self._commits.append(commit)
        self._names.update(dict.fromkeys(self._pending, commit["file"]))
        self._tensor_bytes += sum(tensor.nbytes for tensor in self._pending.values())
        self._pending = {}

    def require_space(self, nbytes: int) -> None:
        """TersorError unless that many bytes are free: better at the start than hours later."""
        with _disk_errors(self.folder):
            free = shutil.disk_usage(self.folder).free
        if free < nbytes:
            raise TersorError(_full_disk(self.folder, nbytes, free))

    def state_path(self, name: str) -> Path:
        """Where the caller may keep a file of its own until finish(): the same name, the same path.

        Write it with tersor.shards.durable, whose digest is for commit(); files named *.tmp are
        removed when a run is resumed.
        """
        with _disk_errors(self.folder):
            (self.folder / _STATE).mkdir(exist_ok=True)
        return self.folder / _STATE / name

    def finish(
        self,
        config: Mapping[str, Any],
        copy_from: Path | None,
        extra_files: Mapping[str, str] | None = None,
    ) -> Path:
        """Assemble the checkpoint, rename it to `out` and remove the partial folder.

        config: becomes config.json. copy_from: the folder whose companions (tokenizer, licence) are
        copied. extra_files: name -> text, in place of a companion of that name. The same calls give
        the same bytes. Killed at any point, it can be repeated by a writer opened again.
        """
        if not self.finished:
            if self._pending:
                raise TersorError(f"{len(self._pending)} tensors were added and not committed")
            if not self._shards:
                raise TersorError("there is nothing to write: no tensor was committed")
            with _disk_errors(self.folder):
                self._assemble(config, copy_from, extra_files or {})
                os.rename(self.folder / _STAGING, self.out)
                _sync_folder(self.out.parent)
            self.finished = True
        with _disk_errors(self.folder):
            self._remove_partial()
        self.close()
        return self.out

    @property
    def _shards(self) -> list[dict[str, Any]]:
        return [commit for commit in self._commits if commit["file"]]

    def _final_names(self) -> dict[str, str]:
        """Shard in the partial folder -> its name in the checkpoint."""
        shards = [commit["file"] for commit in self._shards]
        if len(shards) == 1:
            return {shards[0]: "model.safetensors"}
        total = len(shards)
        return {
            shard: f"model-{i:05d}-of-{total:05d}.safetensors" for i, shard in enumerate(shards, 1)
        }

    def _assemble(
        self, config: Mapping[str, Any], copy_from: Path | None, extra_files: Mapping[str, str]
    ) -> None:
        staging = self.folder / _STAGING
        staging.mkdir(exist_ok=True)
        for source in companions(copy_from) if copy_from else []:
            with open(source, "rb") as data, durable(staging / source.name) as file:
                shutil.copyfileobj(data, file)
        final = self._final_names()
        texts = {**extra_files, "config.json": _json(config)}
        if len(final) > 1:
            texts["model.safetensors.index.json"] = _json(
                {
                    "metadata": {"total_size": self._tensor_bytes},
                    "weight_map": {name: final[shard] for name, shard in self._names.items()},
                }
            )
        for name, text in texts.items():
            with durable(staging / name, len(text)) as file:
                file.write(text.encode())
        for shard, name in final.items():
            os.replace(self.folder / shard, staging / name)
        _sync_folder(staging)

    def _open(self, resume: bool) -> None:
        """Bring the locked folder to the state of its last commit, or to that of a new run."""
        journal = self._read_journal()
        if journal is None:
            strangers = set(os.listdir(self.folder)) - {_LOCK, _JOURNAL + ".tmp"}
            if strangers:
                raise TersorError(
                    f"{self.folder} is not a partial run of tersor (it holds "
                    f"{show(min(strangers))}); move it away"
                )
        elif os.path.lexists(self.out):
            self._commits = journal["commits"]
            self.finished = resume and journal["settings"] == self.settings and self._is_in_out()
            if not self.finished:
                raise TersorError(_exists(self.out))
            return
        elif resume and journal["commits"]:
            if journal["settings"] != self.settings:
                raise TersorError(self._differences(journal["settings"]))
            self._commits = journal["commits"]
            self._recover()
            return
        self._empty()
        self._write_journal([])

    def _recover(self) -> None:
        """Undo a finish() that was interrupted, remove what the journal does not know and check
        what will still be read."""
        for shard, name in self._final_names().items():
            if (self.folder / _STAGING / name).exists():
                os.replace(self.folder / _STAGING / name, self.folder / shard)
        known = {_LOCK, _JOURNAL, _STATE, *(commit["file"] for commit in self._shards)}
        self._empty(keep=known)
        for path in (self.folder / _STATE).glob("*.tmp"):
            path.unlink()
        for commit in self._shards:
            path = self.folder / commit["file"]
            self._check(path, commit["digest"])
            stored = TensorFile.open(path).tensors
            self._names.update(dict.fromkeys(stored, commit["file"]))
            self._tensor_bytes += sum(meta.nbytes for meta in stored.values())

        for name, digest in self._commits[-1]["state"].items():
            self._check(self.folder / _STATE / name, digest)

    def _check(self, path: Path, digest: str) -> None:
        if not path.is_file() or _digest(path) != digest:
            raise TersorError(f"{path} is missing or changed; remove {self.folder} to start again")

    def _is_in_out(self) -> bool:
        """Whether `out` is the folder that a run of this journal made."""
        for commit in self._shards:
            path = self.out / self._final_names()[commit["file"]]
            if not path.is_file() or path.stat().st_size != commit["bytes"]:
                return False
        return bool(self._shards)

    def _differences(self, before: Mapping[str, Any]) -> str:
        keys = [
            key
            for key in sorted({*before, *self.settings})
            if before.get(key, ...) != self.settings.get(key, ...)
        ]
        told = "; ".join(
            f"{key} was {_brief(before, key)} and is {_brief(self.settings, key)}" for key in keys
        )
        return (
            f"{self.folder} was begun with other settings: {told}; use those again, or remove "
            "the folder to start anew"
        )

    def _read_journal(self) -> dict[str, Any] | None:
        path = self.folder / _JOURNAL
        if not path.exists():
            return None
        try:
            journal = loose_json(path.read_bytes())
            if journal["version"] == _VERSION and isinstance(journal["settings"], dict):
                return journal
            why = "another version of tersor wrote it"
        except (ValueError, KeyError) as error:
            why = f"it is damaged ({error})"
        raise TersorError(f"{path} cannot be used: {why}; remove {self.folder} to start again")

    def _write_journal(self, commits: list[dict[str, Any]]) -> None:
        journal = {"version": _VERSION, "settings": self.settings, "commits": commits}
        with durable(self.folder / _JOURNAL) as file:
            file.write(_json(journal, sort_keys=False).encode())

    def _empty(self, keep: Container[str] = ()) -> None:
        """Remove what is in the partial folder: the journal after all else, never the lock."""
        for name in sorted(os.listdir(self.folder), key=lambda name: (name == _JOURNAL, name)):
            path = self.folder / name
            if name in keep or name == _LOCK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _remove_partial(self) -> None:
        self._empty()
        (self.folder / _LOCK).unlink()
        with contextlib.suppress(OSError):  # a run that waits for this output may have come in
            self.folder.rmdir()


def _lock(folder: Path) -> int:
    """Lock the folder until the returned file is closed or the process ends, however it does."""
    path = folder / _LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The run that held it may have finished and removed the file that we opened.
        if os.fstat(handle).st_nlink:
            return handle
    except BlockingIOError:
        pass
    except OSError as error:  # some network file systems have no locks
        warning = f"{folder} cannot be locked ({error.strerror}): let only one run use it"
        warnings.warn(warning, stacklevel=3)
        return handle
    os.close(handle)
    raise TersorError(f"another run is writing {folder}; wait for it, or choose another output")


def _exists(out: Path) -> str:
    return f"{out} exists already; remove it or choose another output folder"


def _brief(settings: Mapping[str, Any], key: str) -> str:
    text = json.dumps(settings[key]) if key in settings else "absent"
    return text if len(text) <= 80 else text[:77] + "..."


def _json(data: Mapping[str, Any], sort_keys: bool = True) -> str:
    return json.dumps(dict(data), indent=2, sort_keys=sort_keys) + "\n"


def _full_disk(folder: Path, nbytes: int, free: int | None = None) -> str:
    need = f"needs {nbytes / 1e6:,.1f} MB" if nbytes else "needs more space"
    have = "" if free is None else f" and {free / 1e6:,.1f} MB are free"
    return (
        f"the disk is full: {folder} {need}{have}; free some space and run the same command again "
        "to continue"
    )
