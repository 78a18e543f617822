"""What is measured on the machine at hand, from the command line: linears, and whole models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import tiny
from tersor import timing
from test_cli import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("timing")
    tiny.save(home / "model")
    tiny.save(home / "bert", "bert")
    return home


def test_bench(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "bench", "--shape", 64, 256, "--tokens", 1, 3, "--json")
    assert code == 0
    (found,) = json.loads(out)["shapes"]
    assert (found["n"], found["k"]) == (64, 256)
    first, *others = found["rows"]
    assert (first["scheme"], first["kernel"], first["bits_per_weight"]) == ("16 bits", "torch", 16)
    kinds = {(row["scheme"], row["sparse"]): row for row in others}
    schemes = ("W4A16", "W4A8", "W8A16", "W8A8")
    wanted = {("16 bits", True), *((name, s) for name in schemes for s in (False, True))}
    if os.environ.get("TERSOR_ISA") != "avx512bf16":  # which has no kernel for int8 activations
        assert set(kinds) == wanted
    for (_, sparse), row in kinds.items():
        assert row["kernel"].startswith("s24") == sparse
        assert sorted(row["seconds"]) == ["1", "3"]
        assert min(row["seconds"].values()) > 0
    code, out, _ = run(capsys, "bench", folder / "model", "--tokens", 1, "--group", "row")
    assert code == 0
    assert "64 x 64, 4 in the model" in out
    for options, cause in (
        ([], "give a model or --shape"),
        ([folder / "model", "--shape", 16, 16], "give a model or --shape"),
        (["--shape", 16, 100], "multiple of 16"),
        (["--shape", 16, 160], "group 128 does not divide"),
    ):
        code, _, err = run(capsys, "bench", *options)
        assert code == 2
        assert cause in err


def test_speed_before_and_after(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", "magnitude", "--pattern", "2:4", "--speed"]
    code, out, _ = run(capsys, "prune", folder / "model", "--out", tmp_path / "out", *options)
    assert code == 0
    assert " tokens/s" in out.splitlines()[-1]
    speed = json.loads((tmp_path / "out" / "tersor_timings.json").read_text())["speed"]
    assert set(speed) == {"before", "after"}
    assert all(each["prefill"] > 0 and each["decode"] > 0 for each in speed.values())
    code, _, err = run(capsys, "prune", folder / "bert", "--out", tmp_path / "no", *options)
    assert code == 2
    assert "does not predict the next token" in err
    assert not (tmp_path / "no").exists()


class _Fake:
    """Whatever torch.cuda has, counted; two events are 3 ms apart."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.done: list[str] = []

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def wait_stream(self, other: object) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: object) -> float:
        return 3.0

    def replay(self) -> None:
        self.done.append("replay")


def test_a_gpu_is_timed_by_its_own_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of calls in a graph: each copy in turn, sixteen calls at least; once before that outside."""
    graph, seen = _Fake(), []
    for name in ("device", "Stream", "stream", "current_stream", "graph", "Event"):
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, _Fake)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    weights = [torch.tensor([float(i)]) for i in range(3)]

    def call(weight: torch.Tensor) -> torch.Tensor:
        seen.append(int(weight))
        return weight

    seconds = timing._gpu_clock(call, weights)
    assert seen == [0, *(i % 3 for i in range(16))]
    assert seconds() == 3e-3 / 16
    assert seconds() == 3e-3 / 16
    assert graph.done == ["replay"] * 2
    seen.clear()
    timing._gpu_clock(call, weights * 7)
    assert len(seen) == 1 + 21
