"""What a partial folder is taken up from: its own settings, and files with the bits committed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tersor.checkpoint import ShardWriter
from tersor.durable import durable
from tersor.errors import TersorError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def flip(path: Path) -> None:
    """Another last byte; the size stays."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def begin(out: Path, settings: dict[str, object]) -> None:
    """A run with a shard, a state that is read no more and one that the next step reads."""
    with ShardWriter(out, settings) as writer:
        for step in range(2):
            with durable(writer.state_path(f"hidden-{step}")) as file:
                file.writelines([b"some", b"thing"])
            writer.add(f"w{step}", torch.ones(2))
            writer.commit(f"block {step}", {}, {f"hidden-{step}": file.digest})


def test_settings_that_differ_are_named(out: Path) -> None:
    begin(out, {"bits": 4, "seed": 0, "old": 1})
    with pytest.raises(
        TersorError, match="bits was 4 and is 3; new was absent and is null; old was 1"
    ):
        ShardWriter(out, {"bits": 3, "seed": 0, "new": None})
    with ShardWriter(out, {"bits": 4, "seed": 0, "old": 1}) as writer:  # and nothing was lost
        assert len(writer.done) == 2
    with ShardWriter(out, {"bits": 3}, resume=False) as writer:
        assert writer.done == {}
        writer.commit("first", {})
    fix = rf"bits was 3 .* use those again; to start anew, remove it: rm -r {out}\.partial$"
    with pytest.raises(TersorError, match=fix):
        ShardWriter(out, {"bits": 4})


def test_a_run_that_committed_nothing_is_begun_anew(out: Path) -> None:
    with ShardWriter(out, {"bits": 4}) as writer:
        writer.state_path("hidden-0").write_text("of 4 bits")
    with ShardWriter(out, {"bits": 3}) as writer:
        assert not writer.state_path("hidden-0").exists()
        writer.add("w", torch.ones(2))
        writer.commit("first", {})
    with ShardWriter(out, {"bits": 3}) as writer:
        assert list(writer.done) == ["first"]


def test_quick_work_does_not_stand_in_the_way(out: Path) -> None:
    with ShardWriter(out, {"bits": 4}) as writer:
        writer.add("embeddings", torch.ones(2))
        writer.commit("outside", {}, quick=True)
    with ShardWriter(out, {"bits": 4}) as writer:
        assert list(writer.done) == ["outside"]  # the same run goes on
    with ShardWriter(out, {"bits": 3}) as writer:
        assert writer.done == {}
        assert not list(writer.folder.glob("part-*"))
        writer.commit("outside", {}, quick=True)
        writer.commit("block 0", {})
    with pytest.raises(TersorError, match="bits was 3"):
        ShardWriter(out, {"bits": 4})


@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 5), flip])
@pytest.mark.parametrize("name", ["part-00001.safetensors", "state/hidden-1"])
def test_files_that_were_lost_or_changed_are_noticed(
    out: Path, name: str, damage: Callable[[Path], None]
) -> None:
    begin(out, {})
    partial = out.with_name("out.partial")
    flip(partial / "state" / "hidden-0")  # which nobody will read
    with ShardWriter(out, {}) as writer:
        assert len(writer.done) == 2
    damage(partial / name)
    with pytest.raises(
        TersorError, match=rf"{name} is missing or changed; remove {partial} to start again"
    ):
        ShardWriter(out, {})
