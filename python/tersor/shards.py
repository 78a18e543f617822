"""The writer of a checkpoint: one file for each finished piece of work, durable once committed, and
in the end shards of a usual size.

While it works, everything is in a folder beside the output:

    out.partial/
      journal.json               settings, and the commits so far; what it lacks does not exist
      lock                       held with flock by the run that writes
      part-00001.safetensors     one per commit that had tensors
      shard-00001.safetensors    while finish() merges parts: those from that commit on, as one
      state/                     the caller's own files, such as hidden states
      out/                       while finish() assembles what is then renamed to `out`

A run may be killed at any moment. Files get their names only when whole, the journal is written
last, and opening again with equal settings brings the folder back to the last commit, whose files
are checked against their digests in the journal.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import warnings
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tersor.durable import digest_of, disk_errors, durable, full_disk, sync_folder
from tersor.errors import TersorError
from tersor.folder import companions
from tersor.tensorfile import (
    TensorFile,
    loose_json,
    merge_files,
    show,
    stored_dtype,
    stored_size,
    write_tensors,
)

_JOURNAL = "journal.json"
LOCK = "lock"
_STATE = "state"
_STAGING = "out"
_VERSION = 3


# Bytes of tensors that are merged into one shard, if more than one commit fits: the size that
# save_pretrained has long used. Merging needs room for one shard on the disk, none in memory.
MAX_SHARD = 5 * 10**9


class ShardWriter:
    """Writes a sharded safetensors checkpoint to `out`, which appears whole or not at all.

    settings: JSON data that determines the result; a partial run continues only with equal ones.
        With others, one that has committed nothing (or nothing but what is quick) is begun anew.
    resume: False throws away a partial run, whatever its settings.

    Raises TersorError if `out` exists, if another run is writing it, or if the settings differ.
    Use it in a with statement, or call close(): the folder stays locked until then.

    done: the info of every commit so far, by key, in order; a resumed run skips these.
    finished: a run with these settings had renamed its folder to `out` and was stopped while it
    cleaned up. All commits are done, and finish() completes the cleaning.
    """

    def __init__(self, out: str | Path, settings: Mapping[str, Any], resume: bool = True) -> None:
        self.out = Path(os.path.abspath(out))
        self.folder = _partial(self.out)
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self.finished = False
        self._pending: dict[str, Tensor] = {}
        self._commits: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}  # committed tensor -> file
        refuse_existing(out)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)
            self._lock: int | None = lock_folder(self.folder)
        try:
            with disk_errors(self.folder):
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
        self,
        key: str,
        info: Mapping[str, Any],
        state: Mapping[str, str] | None = None,
        quick: bool = False,
    ) -> None:
        """Write what was added as one file, then record the commit; durable on return.

        info: JSON data, given back in `done`. A commit without tensors is only recorded. After an
        error (a full disk) nothing is recorded and the same commit may be tried again.
        state: name -> digest of the files (see state_path) that a run resumed after this commit
        reads; it is refused if one of them is gone or differs.
        quick: the work is soon done again, and need not stand in the way of other settings.
        """
        if key in self.done:
            raise TersorError(f"{show(key)} was committed before")
        commit: dict[str, Any] = {"key": key, "file": None, "bytes": 0, "digest": None}
        commit |= {"info": json.loads(json.dumps(dict(info))), "state": dict(state or {})}
        commit |= {"quick": quick, "tensor_bytes": sum(t.nbytes for t in self._pending.values())}
        if self._pending:
            commit["file"] = f"part-{len(self._commits) + 1:05d}.safetensors"
            commit["bytes"] = stored_size(self._pending)
            self.require_space(commit["bytes"])
            with durable(self.folder / commit["file"], commit["bytes"]) as file:
                write_tensors(file, self._pending)
            commit["digest"] = file.digest
        self._write_journal([*self._commits, commit])
        self._commits.append(commit)
        self._names.update(dict.fromkeys(self._pending, commit["file"]))
        self._pending = {}

    def require_space(self, nbytes: int) -> None:
        """TersorError unless that many bytes are free: better at the start than hours later."""
        with disk_errors(self.folder):
            free = shutil.disk_usage(self.folder).free
        if free < nbytes:
            raise TersorError(full_disk(self.folder, nbytes, free))

    def state_path(self, name: str) -> Path:
        """Where the caller may keep a file of its own until finish(): the same name, the same path.

        Write it with tersor.durable.durable, whose digest is for commit(); files named *.tmp are
        removed when a run is resumed.
        """
        with disk_errors(self.folder):
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
            if not self._files:
                raise TersorError("there is nothing to write: no tensor was committed")
            with disk_errors(self.folder):
                self._merge()
                self._assemble(config, copy_from, extra_files or {})
                os.rename(self.folder / _STAGING, self.out)
                sync_folder(self.out.parent)
            self.finished = True
        with disk_errors(self.folder):
            self._remove_partial()
        self.close()
        return self.out

    @property
    def _files(self) -> dict[str, dict[str, Any]]:
        """Every file with tensors, in order, and a commit that says its bytes and digest."""
        return {commit["file"]: commit for commit in self._commits if commit["file"]}

    def _merge(self) -> None:
        """Make shards of the parts. The journal changes with every shard, and parts are removed
        only when it no longer knows them; what goes together follows from the commits alone, so
        that a run that was killed here goes on to the same shards."""
        shards: list[list[int]] = []  # numbers of commits
        room = 0
        for number, commit in enumerate(self._commits):
            if commit["file"]:
                if not shards or commit["tensor_bytes"] > room:
                    shards.append([])
                    room = MAX_SHARD
                shards[-1].append(number)
                room -= commit["tensor_bytes"]
        for numbers in shards:
            parts = {self._commits[number]["file"]: None for number in numbers}
            if len(parts) == 1:  # or merged already
                continue
            name = f"shard-{numbers[0] + 1:05d}.safetensors"
            nbytes = sum(self._files[part]["bytes"] for part in parts)
            self.require_space(nbytes)
            with durable(self.folder / name, nbytes) as file:
                merge_files(file, [self.folder / part for part in parts])
            size = (self.folder / name).stat().st_size
            merged = {"file": name, "bytes": size, "digest": file.digest}
            commits = list(self._commits)
            for number in numbers:
                commits[number] = commits[number] | merged
            self._write_journal(commits)
            self._commits = commits
            for part in parts:
                (self.folder / part).unlink()
            self._names = {t: name if file in parts else file for t, file in self._names.items()}

    def _final_names(self) -> dict[str, str]:
        """File in the partial folder -> its name in the checkpoint."""
        files = list(self._files)
        if len(files) == 1:
            return {files[0]: "model.safetensors"}
        total = len(files)
        return {
            file: f"model-{i:05d}-of-{total:05d}.safetensors" for i, file in enumerate(files, 1)
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
                    "metadata": {"total_size": sum(c["tensor_bytes"] for c in self._commits)},
                    "weight_map": {name: final[file] for name, file in self._names.items()},
                }
            )
        for name, text in texts.items():
            with durable(staging / name, len(text)) as file:
                file.write(text.encode())
        for part, name in final.items():
            os.replace(self.folder / part, staging / name)
        sync_folder(staging)

    def _open(self, resume: bool) -> None:
        """Bring the locked folder to the state of its last commit, or to that of a new run."""
        journal = self._read_journal()
        if journal is None:
            strangers = set(os.listdir(self.folder)) - {LOCK, _JOURNAL + ".tmp"}
            if strangers:
                raise TersorError(
                    f"{self.folder} is not a partial run of tersor (it holds "
                    f"{show(min(strangers))}); move it away"
                )
        elif os.path.lexists(self.out):
            self._commits = journal["commits"]
            self.finished = resume and journal["settings"] == self.settings and self._is_in_out()
            if not self.finished:
                raise TersorError(exists_already(self.out))
            return
        elif resume and self._worth(journal):
            self._commits = journal["commits"]
            self._recover()
            return
        self._empty()
        self._write_journal([])

    def _worth(self, journal: Mapping[str, Any]) -> bool:
        """Whether to go on with an earlier run; TersorError where its settings are others and its
        work is not to be thrown away unasked."""
        before, commits = journal["settings"], journal["commits"]
        if before == self.settings:
            return bool(commits)
        if not all(commit["quick"] for commit in commits):
            raise TersorError(self._differences(before))
        return False

    def _recover(self) -> None:
        """Undo a finish() that was interrupted, remove what the journal does not know and check
        what will still be read."""
        for file, name in self._final_names().items():
            if (self.folder / _STAGING / name).exists():
                os.replace(self.folder / _STAGING / name, self.folder / file)
        known = {LOCK, _JOURNAL, _STATE, *self._files}
        self._empty(keep=known)
        for path in (self.folder / _STATE).glob("*.tmp"):
            path.unlink()
        for file, commit in self._files.items():
            self._check(self.folder / file, commit["digest"])
            self._names.update(dict.fromkeys(TensorFile.open(self.folder / file).tensors, file))
        for name, digest in self._commits[-1]["state"].items():
            self._check(self.folder / _STATE / name, digest)

    def _check(self, path: Path, digest: str) -> None:
        if not path.is_file() or digest_of(path) != digest:
            raise TersorError(f"{path} is missing or changed; remove {self.folder} to start again")

    def _is_in_out(self) -> bool:
        """Whether `out` is the folder that a run of this journal made."""
        files, names = self._files, self._final_names()
        for file, commit in files.items():
            path = self.out / names[file]
            if not path.is_file() or path.stat().st_size != commit["bytes"]:
                return False
        return bool(files)

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
            f"{self.folder} holds an unfinished run with other settings: {told}; to go on with it, "
            f"use those again; to start anew, remove it: rm -r {shlex.quote(str(self.folder))}"
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
            if name in keep or name == LOCK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _remove_partial(self) -> None:
        self._empty()
        (self.folder / LOCK).unlink()
        with contextlib.suppress(OSError):  # a run that waits for this output may have come in
            self.folder.rmdir()


def lock_folder(folder: Path) -> int:
    """Lock the folder until the returned file is closed or the process ends, however it does."""
    path = folder / LOCK
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


def refuse_existing(out: str | Path) -> None:
    """TersorError if `out` exists, unless a run may have been stopped just after it made it."""
    out = Path(os.path.abspath(out))
    if os.path.lexists(out) and not (_partial(out) / _JOURNAL).exists():
        raise TersorError(exists_already(out))


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def exists_already(out: Path) -> str:
    return f"{out} exists already; remove it or choose another output folder"


def _brief(settings: Mapping[str, Any], key: str) -> str:
    text = json.dumps(settings[key]) if key in settings else "absent"
    return text if len(text) <= 80 else text[:77] + "..."


def _json(data: Mapping[str, Any], sort_keys: bool = True) -> str:
    return json.dumps(dict(data), indent=2, sort_keys=sort_keys) + "\n"
