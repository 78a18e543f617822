"""The writer: bit-exact against the safetensors library, and whole whatever interrupts it.

Crashes are tried at every system call that changes a folder: a forked child kills itself with
SIGKILL before the n-th one, for every n, and a second run must give the same bytes as one that was
never interrupted. The same is done with a disk that is full from the n-th call on.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stored import bits, memory_folder
from tersor import shards
from tersor.checkpoint import Checkpoint, ShardWriter
from tersor.durable import durable
from tersor.errors import TersorError
from tersor.tensorfile import DTYPES, write_tensors

SETTINGS = {"bits": 4, "group": (128, None), "ignore": ["lm_head"]}
CONFIG = {"model_type": "llama", "b": 1, "a": [2.5, None]}
STEPS = 4


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        yield path


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each commit keeps a shard of its own."""
    monkeypatch.setattr(shards, "MAX_SHARD", 256)


# Bytes of a commit of run(): 2 tensors of 8 x 8 in bfloat16, 256. The last three merge parts.
LIMITS = {"apart": 256, "pairs": 600, "three": 1023, "one": shards.MAX_SHARD}


@pytest.fixture(params=LIMITS.values(), ids=LIMITS)
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(shards, "MAX_SHARD", request.param)
    return int(request.param)


@pytest.fixture
def source(folder: Path) -> Path:
    path = folder / "source"
    path.mkdir()
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "LICENSE",
        "model.safetensors",
        "x.py",
    ):
        (path / name).write_text(f"content of {name}\n")
    return path


def run(out: Path, source: Path, size: int = 8) -> None:
    """A small pipeline: it skips what is done, keeps a state of its own, and finishes."""
    with ShardWriter(out, SETTINGS) as writer:
        for step in range(STEPS):
            if f"block {step}" in writer.done:
                continue
            hidden = json.loads(writer.state_path(f"hidden-{step}").read_text()) if step else 0
            assert hidden == step * (step - 1) // 2
            for name in ("w", "bias"):
                value = torch.arange(size * size).reshape(size, size) + hidden + len(name)
                writer.add(f"layers.{step}.{name}", value.to(torch.bfloat16))
            with durable(writer.state_path(f"hidden-{step + 1}")) as file:
                file.write(json.dumps(hidden + step).encode())
            writer.commit(f"block {step}", {"error": step / 3})
        if "note" not in writer.done:
            writer.commit("note", {})
        writer.finish(CONFIG, source, {"report.json": json.dumps(writer.done)})


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def in_child(action: Callable[[], None]) -> int:
    """Fork, act, and leave without any cleaning up; the child's process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fork with threads: the child uses none of torch's
        child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "fcntl.flock"}


def kill_before(call: int) -> None:
    """From now on in this process: SIGKILL to itself before the call-th change of a folder."""
    count = 0

    def step(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in EVENTS:
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)

    sync = os.fsync

    def fsync(handle: int) -> None:
        step("open", ())
        sync(handle)

    os.fsync = fsync
    sys.addaudithook(step)


def killed(call: int, action: Callable[[], None]) -> bool:
    """Whether a child that is to be killed before that call got as far as that."""

    def doomed() -> None:
        kill_before(call)
        action()

    code = status(in_child(doomed))
    assert code in (0, -signal.SIGKILL)
    return code != 0


def complete(out: Path, source: Path, size: int = 8) -> None:
    """Run again after a kill, unless nothing but the last cleaning was missing: `out` has its name
    and the journal is gone, which is how a run ends."""
    if not out.exists() or out.with_name(out.name + ".partial").joinpath("journal.json").exists():
        run(out, source, size)


def check(out: Path) -> None:
    """The finished folder, as the safetensors library and the reader see it."""
    checkpoint = Checkpoint.open(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(checkpoint.names) == 2 * STEPS
    assert index["metadata"]["total_size"] == 2 * STEPS * 8 * 8 * 2
    assert sorted(index["weight_map"]) == sorted(checkpoint.names)
    for name, shard in index["weight_map"].items():
        assert bits(load_file(out / shard)[name]) == bits(checkpoint.load(name))
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert json.loads((out / "report.json").read_text())["block 2"] == {"error": 2 / 3}
    shards = [f"model-{i:05d}-of-{STEPS:05d}.safetensors" for i in range(1, STEPS + 1)]
    small = ["LICENSE", "config.json", "generation_config.json", "model.safetensors.index.json"]
    assert sorted(content(out)) == sorted([*shards, *small, "report.json", "tokenizer.json"])
    assert not out.with_name(out.name + ".partial").exists()


def test_an_uninterrupted_run(folder: Path, source: Path, apart: None) -> None:
    run(folder / "one", source)
    check(folder / "one")
    run(folder / "two", source)
    assert content(folder / "one") == content(folder / "two")


def test_parts_become_shards_up_to_a_size(folder: Path, source: Path, limit: int) -> None:
    """Each shard is, to the byte, the file of its tensors; and a merge takes whole commits."""
    run(folder / "out", source)
    blocks = min(STEPS, limit // 256)
    found = sorted(path for path in (folder / "out").glob("*.safetensors"))
    assert len(found) == -(-STEPS // blocks)
    assert (folder / "out" / "model.safetensors.index.json").exists() == (len(found) > 1)
    for number, path in enumerate(found):
        tensors = load_file(path)
        steps = {int(name.split(".")[1]) for name in tensors}
        assert steps == set(range(STEPS)[number * blocks : (number + 1) * blocks])
        with (folder / "again").open("wb") as file:
            write_tensors(file, tensors)
        assert (folder / "again").read_bytes() == path.read_bytes()
    names = [f"layers.{step}.{name}" for step in range(STEPS) for name in ("w", "bias")]
    assert sorted(Checkpoint.open(folder / "out").names) == sorted(names)


def test_every_dtype_and_layout_is_bit_exact(folder: Path) -> None:
    base = torch.arange(24).reshape(4, 6)
    tensors = {
        stored: torch.arange(8).to(dtype).reshape(2, 4)
        for stored, dtype in (
            (key, getattr(torch, name or "", None)) for key, (_, name) in DTYPES.items()
        )
        if dtype is not None
    }
    tensors |= {
        "transposed": base.T,
        "strided": base[:, ::2],
        "shared 1": base,
        "shared 2": base[1:3],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "parameter": torch.nn.Parameter(torch.randn(3, 3)),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 7),
        "nan": torch.tensor([float("nan"), -0.0]),
        "näme": torch.ones(1, dtype=torch.uint8),
    }
    with ShardWriter(folder / "out", {}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.commit("all", {})
        out = writer.finish(CONFIG, None)
    assert sorted(content(out)) == ["config.json", "model.safetensors"]
    with safe_open(out / "model.safetensors", "pt") as oracle:
        assert oracle.metadata() == {"format": "pt"}
        assert sorted(oracle.keys()) == sorted(tensors)
        for name, tensor in tensors.items():
            assert bits(oracle.get_tensor(name)) == bits(tensor)
    for name, tensor in tensors.items():
        meta = Checkpoint.open(out).metadata(name)
        assert meta.offset % tensor.element_size() == 0  # aligned for readers that map the file


def test_the_order_of_adding_does_not_matter(folder: Path) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(2), "c": torch.zeros(2)}
    for out, names in (("one", "abc"), ("two", "cab")):
        with ShardWriter(folder / out, {}) as writer:
            for name in names:
                writer.add(name, tensors[name])
            writer.commit("all", {})
            writer.finish(CONFIG, None)
    assert content(folder / "one") == content(folder / "two")


def test_killed_before_every_call(folder: Path, source: Path, limit: int) -> None:
    out, partial = folder / "out", folder / "out.partial"
    run(folder / "reference", source)
    expected = content(folder / "reference")
    call, half_way, cleaning = 0, 0, 0
    while killed(call := call + 1, lambda: run(out, source)):
        if out.exists():
            assert content(out) == expected  # whole from the moment it has its name
        half_way += (partial / "part-00002.safetensors").exists()
        cleaning += out.exists() and (partial / "journal.json").exists()
        complete(out, source)
        assert content(out) == expected
        assert not partial.exists() or set(os.listdir(partial)) <= {"lock"}
        shutil.rmtree(out)
    assert content(out) == expected
    assert half_way >= 10  # the kills did fall into every phase
    assert cleaning >= 2


def test_killed_again_and_again(folder: Path, source: Path, limit: int) -> None:
    """The recovery from a kill can be killed as well."""
    run(folder / "reference", source)
    expected = content(folder / "reference")
    rng = random.Random(0)
    for trial in range(10):
        out = folder / f"out-{trial}"
        for _ in range(4):
            killed(rng.randrange(1, 110), lambda out=out: complete(out, source))
        complete(out, source)
        assert content(out) == expected


def test_killed_at_random_moments(folder: Path, source: Path) -> None:
    """From outside, and with shards large enough that some kills fall inside a write."""
    size = 700
    begin = time.perf_counter()
    assert status(in_child(lambda: run(folder / "reference", source, size))) == 0
    duration = time.perf_counter() - begin
    expected = content(folder / "reference")
    rng = random.Random(1)
    for trial in range(12):
        out = folder / f"out-{trial}"
        for _ in range(3):
            child = in_child(lambda out=out: complete(out, source, size))
            time.sleep(rng.uniform(0, duration))
            os.kill(child, signal.SIGKILL)  # it has not been waited for: the id is still its own
            assert status(child) in (0, -signal.SIGKILL)
        complete(out, source, size)
        assert content(out) == expected
        shutil.rmtree(out)


def test_what_the_journal_lacks_does_not_exist(folder: Path, source: Path) -> None:
    out, partial = folder / "out", folder / "out.partial"
    with ShardWriter(out, SETTINGS) as writer:
        writer.add("w", torch.ones(2))
        writer.commit("first", {"error": (1, 2)})
        assert writer.done == {"first": {"error": [1, 2]}}  # as a resumed run will see it
    for stray in ("part-00002.safetensors", "part-00003.safetensors.tmp", "journal.json.tmp"):
        (partial / stray).write_text("half a shard")
    with ShardWriter(out, SETTINGS) as writer:
        writer.state_path("hidden.tmp").write_text("half a state")
        writer.state_path("hidden").write_text("a state")
    with ShardWriter(out, SETTINGS) as writer:
        assert sorted(os.listdir(partial)) == [
            "journal.json",
            "lock",
            "part-00001.safetensors",
            "state",
        ]
        assert os.listdir(partial / "state") == ["hidden"]
        assert writer.done == {"first": {"error": [1, 2]}}
        with pytest.raises(TersorError, match="'w' was added twice"):
            writer.add("w", torch.ones(2))
        with pytest.raises(TersorError, match="'first' was committed before"):
            writer.commit("first", {})


def test_refuses_an_output_that_exists(folder: Path, source: Path) -> None:
    for name, create in (
        ("folder", os.mkdir),
        ("file", lambda path: path.write_text("")),
        ("link", lambda path: path.symlink_to("nowhere")),
    ):
        create(folder / name)
        with pytest.raises(TersorError, match=f"{name} exists already"):
            ShardWriter(folder / name, {})
        assert not (folder / f"{name}.partial").exists()
    # It appears while a run is under way, or between two runs.
    with ShardWriter(folder / "late", {}) as writer:
        writer.add("w", torch.ones(2))
        writer.commit("all", {})
        (folder / "late").mkdir()
        (folder / "late" / "mine").write_text("precious")
        with pytest.raises(TersorError, match=r"cannot write in .*not empty"):
            writer.finish(CONFIG, None)
    for resume in (True, False):
        with pytest.raises(TersorError, match="late exists already"):
            ShardWriter(folder / "late", {}, resume)
    (folder / "late" / "mine").unlink()
    (folder / "late").rmdir()
    with ShardWriter(folder / "late", {}) as writer:
        assert load_file(writer.finish(CONFIG, None) / "model.safetensors")["w"].sum() == 2


def test_refuses_a_partial_folder_that_is_not_its_own(folder: Path) -> None:
    partial = folder / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("precious")
    for resume in (True, False):
        with pytest.raises(TersorError, match=r"not a partial run of tersor \(it holds 'thesis"):
            ShardWriter(folder / "out", {}, resume)
    (partial / "thesis.txt").rename(folder / "thesis.txt")
    for text in ("{", "[]", "{}", '{"version": 0, "settings": {}}'):
        (partial / "journal.json").write_text(text)
        with pytest.raises(TersorError, match=r"journal\.json cannot be used: .*; remove"):
            ShardWriter(folder / "out", {})


def test_one_run_at_a_time(folder: Path) -> None:
    first = ShardWriter(folder / "out", {})
    with pytest.raises(TersorError, match="another run is writing"):
        ShardWriter(folder / "out", {})
    with pytest.raises(TersorError, match="another run is writing"):
        ShardWriter(folder / "out", {}, resume=False)
    ShardWriter(folder / "other", {}).close()
    first.close()
    first.close()  # harmless
    ShardWriter(folder / "out", {}).close()


def test_a_run_that_fails_lets_go_of_the_lock(folder: Path) -> None:
    with ShardWriter(folder / "out", {"bits": 4}) as writer:
        writer.commit("first", {})
    with pytest.raises(ZeroDivisionError), ShardWriter(folder / "out", {"bits": 4}):
        raise ZeroDivisionError
    with pytest.raises(TersorError, match="other settings"):
        ShardWriter(folder / "out", {"bits": 3})
    ShardWriter(folder / "out", {"bits": 4}).close()


def test_a_file_system_without_locks_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked"):
        ShardWriter(folder / "out", {}).close()


def test_refuses_what_cannot_be_stored(folder: Path) -> None:
    with ShardWriter(folder / "out", {}) as writer:
        for tensor in (
            torch.empty(2, device="meta"),
            torch.eye(2).to_sparse(),
            torch.zeros(2, dtype=torch.complex128),
        ):
            with pytest.raises(TersorError, match=r"'w' .* cannot be stored"):
                writer.add("w", tensor)
        with pytest.raises(TersorError, match="no tensor was committed"):
            writer.finish(CONFIG, None)
        writer.add("w", torch.ones(1))
        with pytest.raises(TersorError, match="1 tensors were added and not committed"):
            writer.finish(CONFIG, None)


def test_durable_leaves_nothing_behind(folder: Path) -> None:
    path = folder / "state"
    path.write_text("old")
    with pytest.raises(TypeError), durable(path) as file:
        file.writelines([b"half", None])
    assert content(folder) == {"state": b"old"}


def fill_disk(patch: pytest.MonkeyPatch, calls: int) -> None:
    """From the call after that many on, whatever must reach the disk meets a full one."""
    left = iter(range(calls))

    def guard(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        return call

    for name in ("fsync", "replace", "rename"):
        patch.setattr(os, name, guard(getattr(os, name)))


def test_the_disk_is_full_from_every_call_on(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    run(folder / "reference", source)
    expected = content(folder / "reference")
    out = folder / "out"
    for calls in range(1000):
        message = ""
        with monkeypatch.context() as patch:
            fill_disk(patch, calls)
            try:
                run(out, source)
            except TersorError as error:
                message = str(error)
        if out.exists():
            assert content(out) == expected
        if not message:
            break
        assert "the disk is full" in message
        assert str(folder) in message
        run(out, source)
        assert content(out) == expected
        shutil.rmtree(out)
    assert 30 < calls < 999
