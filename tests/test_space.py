"""What writing a checkpoint takes: disk space, looked for before it is needed, and no memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stored import memory_folder
from tersor.checkpoint import ShardWriter
from tersor.errors import TersorError


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        yield path


def test_merging_takes_no_memory(folder: Path) -> None:
    """In a process of its own: the most that was ever resident does not go down again."""
    script = """
import resource, sys, torch
from tersor.checkpoint import ShardWriter
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # MiB
with ShardWriter(sys.argv[1], {}) as writer:
    for name in "abcdef":
        writer.add(name, torch.ones(10 << 20))  # 40 MiB
        writer.commit(name, {})
    before = peak()
    writer.finish({}, None)
assert peak() - before < 20, (before, peak())
"""
    subprocess.run([sys.executable, "-c", script, str(folder / "out")], check=True)
    assert (folder / "out" / "model.safetensors").stat().st_size > 240 << 20


def test_free_space_is_checked_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardWriter(folder / "out", {}) as writer:
        writer.add("w", torch.ones(500_000))
        usage = shutil.disk_usage(folder)._replace(free=1_500_000)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: usage)
            message = r"out\.partial needs 2\.0 MB and 1\.5 MB are free"
            with pytest.raises(TersorError, match=message):
                writer.commit("all", {})
            with pytest.raises(TersorError, match=r"needs 1\.6 MB"):
                writer.require_space(1_600_000)
            writer.require_space(1_500_000)
        writer.commit("all", {})  # space was made: the same commit goes through


def test_a_real_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tersor-test", str(disk)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(command).returncode:
        pytest.skip("a small file system can be mounted by root alone")
    try:
        with ShardWriter(disk / "out", {}) as writer:
            writer.add("small", torch.ones(10_000))
            writer.commit("small", {})
            with pytest.raises(
                TersorError, match=r"out\.partial needs 2\.0 MB and [01]\.\d MB are free"
            ):
                writer.require_space(2_000_000)
            # What was free a moment ago can be gone when the bytes are written.
            usage = shutil.disk_usage(folder)._replace(free=10**9)
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
            writer.add("big", torch.ones(500_000))
            with pytest.raises(TersorError, match=r"disk is full: .*out\.partial needs 2\.0 MB"):
                writer.commit("big", {})
        with ShardWriter(disk / "out", {}) as writer:
            assert list(writer.done) == ["small"]
            out = writer.finish({}, None)
        assert load_file(out / "model.safetensors")["small"].sum() == 10_000
    finally:
        subprocess.run(["umount", str(disk)], check=True)
