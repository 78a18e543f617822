"""A run that is killed and started again ends with the same bytes as one that was left alone."""

from __future__ import annotations

import itertools
import os
import random
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import tiny
from folders import content
from tersor.calibrate import Calibration
from tersor.errors import TersorError
from tersor.pipeline import quantize_checkpoint
from tersor.qweight import QSpec, Scheme
from tersor.report import Report
from tersor.solvers import GPTQ

W4 = Scheme(QSpec(4, 32))
TEXT = Calibration(texts=(tiny.text(),), samples=40, seq_len=64)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def in_child(work: Callable[[], object], kill_after: float | None = None) -> int:
    """Runs work in a forked process, killed with SIGKILL after some seconds; the signal or 0."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def killing(work: Callable[[], object], count: int) -> Callable[[], object]:
    """work, which kills itself when it is about to rename a file for the count-th time."""

    def wrapped() -> object:
        names = itertools.count(1)

        def replace(*args: Any) -> None:
            if next(names) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*args)

        rename, os.replace, os.rename = os.replace, replace, replace
        return work()

    return wrapped


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run gives."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize_checkpoint(llama, out, scheme=W4, calibration=TEXT)
    return out


def test_killed_at_every_rename_and_resumed(llama: Path, whole: Path, tmp_path: Path) -> None:
    """Whatever is durable appears by a rename, so these are all the states that can be left."""
    for count in itertools.count(1):
        out = tmp_path / f"{count}" / "out"
        run = partial(quantize_checkpoint, llama, out, scheme=W4, calibration=TEXT)
        if not in_child(killing(run, count)):
            break
        run()
        assert content(out) == content(whole)
        assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert count > 20


def test_killed_at_random_moments_and_resumed(llama: Path, whole: Path, out: Path) -> None:
    draw = random.Random(0)
    for _ in range(3):
        if not out.exists():
            in_child(
                lambda: quantize_checkpoint(llama, out, scheme=W4, calibration=TEXT),
                kill_after=draw.uniform(0.05, 0.6),
            )
    if not out.exists() or out.with_name("out.partial").exists():
        quantize_checkpoint(llama, out, scheme=W4, calibration=TEXT)
    assert content(out) == content(whole)


@pytest.fixture
def half_done(llama: Path, out: Path) -> Iterator[Callable[..., Report]]:
    """A run that has been killed after its first block; the call that would continue it."""

    def run(**changes: Any) -> Report:
        return quantize_checkpoint(llama, out, **({"scheme": W4, "calibration": TEXT} | changes))

    assert in_child(killing(run, 9)) == signal.SIGKILL
    assert "model.layers.0" in (out.with_name("out.partial") / "journal.json").read_text()
    assert not out.exists()
    return run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": Scheme(QSpec(3, 32))}, "bits was 4 and is 3"),
        ({"method": GPTQ(act_order=True)}, "act_order was false and is true"),
        ({"ignore": ["*.down_proj"]}, "ignore was"),
        (
            {"calibration": Calibration(texts=(tiny.text(),), samples=39)},
            "samples was 40 and is 39",
        ),
        (
            {"calibration": Calibration(texts=(tiny.text(seed=1),), samples=40, seq_len=64)},
            "calibration sha256 was",
        ),
        ({"sequential": True}, "sequential was false and is true"),
    ],
)
def test_other_arguments_do_not_continue_a_run(
    half_done: Callable[..., Report], whole: Path, changes: dict[str, Any], message: str, out: Path
) -> None:
    with pytest.raises(TersorError, match=message):
        half_done(**changes)
    half_done()  # and the refusal has broken nothing
    assert content(out) == content(whole)


def test_another_model_does_not_continue_a_run(
    half_done: Callable[..., Report], llama: Path, tmp_path: Path, out: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    stored = load_file(other / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(stored, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(TersorError, match="model was"):
        quantize_checkpoint(other, out, scheme=W4, calibration=TEXT)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 99), flip])
@pytest.mark.parametrize("files", ["part-*", "state/hidden-*"])
def test_changed_bits_are_not_continued(
    half_done: Callable[..., Report], out: Path, files: str, damage: Callable[[Path], None]
) -> None:
    partial = out.with_name("out.partial")
    first, *_ = sorted(partial.glob(files))  # of what has been committed
    damage(first)
    with pytest.raises(TersorError, match=rf"{first} is missing .*; remove {partial} to start"):
        half_done()
    assert not out.exists()


def with_nan(model: Path, to: Path, name: str) -> Path:
    shutil.copytree(model, to)
    stored = load_file(to / "model.safetensors")
    stored[name].view(-1)[stored[name].numel() // 2] = float("nan")  # where fingerprints look
    save_file(stored, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize("name", ["embed_tokens", "layers.0.mlp.up_proj"])
def test_a_repaired_model_is_not_held_up_by_a_run_without_a_whole_block(
    llama: Path, whole: Path, tmp_path: Path, out: Path, name: str
) -> None:
    bad = with_nan(llama, tmp_path / "bad", f"model.{name}.weight")
    with pytest.raises(TersorError, match=rf"{name}.* holds"):
        quantize_checkpoint(bad, out, scheme=W4, calibration=TEXT)
    assert out.with_name("out.partial").exists()
    quantize_checkpoint(llama, out, scheme=W4, calibration=TEXT)
    assert content(out) == content(whole)


def test_a_whole_block_is_thrown_away_by_the_user_alone(
    llama: Path, whole: Path, tmp_path: Path, out: Path
) -> None:
    """And the message is a command that does it."""
    bad = with_nan(llama, tmp_path / "bad", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(TersorError, match=r"layers\.1\.mlp\.up_proj.* holds"):
        quantize_checkpoint(bad, out, scheme=W4, calibration=TEXT)
    with pytest.raises(TersorError, match=r"model was .* use those again; to start anew") as error:
        quantize_checkpoint(llama, out, scheme=W4, calibration=TEXT)
    subprocess.run(shlex.split(str(error.value).rpartition(": ")[2]), check=True)
    quantize_checkpoint(llama, out, scheme=W4, calibration=TEXT)
    assert content(out) == content(whole)


def test_a_full_disk(llama: Path, whole: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops with one line; with room again, it continues."""
    from tersor import shards

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    for target in ("write_tensors", "sync_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(shards, target, full)
            with pytest.raises(TersorError, match="the disk is full"):
                quantize_checkpoint(llama, out, scheme=W4, calibration=TEXT)
        assert not out.exists()
    quantize_checkpoint(llama, out, scheme=W4, calibration=TEXT)
    assert content(out) == content(whole)
