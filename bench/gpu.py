"""What the benchmarks of a GPU have in common: a build for it, parts in processes of their own,
clocks, and the limits of the device."""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import machine

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "cuda"

Part = Callable[[bool], Any]  # given whether to be quick


def build() -> None:
    """tersor for the GPU of this machine, into build/cuda."""
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}{'a' * (major == 9)}"  # wgmma is Hopper's alone
    shutil.rmtree(SITE, ignore_errors=True)
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps",
            "--target", str(SITE), "-C", f"build-dir={ROOT / 'build' / 'cuda-objects'}",
            "-C", "cmake.define.TERSOR_CUDA=on",
            "-C", f"cmake.define.TERSOR_CUDA_ARCHITECTURES={arch}-real", str(ROOT),
        ],
        check=True,
    )  # fmt: skip


def child(part: str, *before: str, quick: bool) -> subprocess.CompletedProcess[str]:
    """A part of the script that runs, in a process of its own."""
    command = [*before, sys.executable, sys.argv[0], "--part", part, *["--quick"] * quick]
    return subprocess.run(command, capture_output=True, text=True)


def result(part: str, quick: bool) -> Any:
    done = child(part, quick=quick)
    if done.returncode:
        return {"failed": (done.stdout + done.stderr).strip()[-2000:]}
    return json.loads(done.stdout.splitlines()[-1])


def sanitize() -> dict[str, str]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"compute-sanitizer": "not installed"}
    found = {}
    for each in ("memcheck", "racecheck"):
        done = child("check", tool, "--tool", each, "--error-exitcode", "9", quick=True)
        last = [line for line in (done.stdout + done.stderr).splitlines() if "SUMMARY" in line]
        found[each] = f"exit {done.returncode}; {last[-1].strip('= ') if last else 'no summary'}"
    return found


METRICS = {  # of Nsight Compute; shares in percent of the peak
    "gpu__time_duration.sum": "nanoseconds",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "cache",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor cores",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "instructions",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps",
    "launch__registers_per_thread": "registers",
}


def profile(part: str, quick: bool) -> Any:
    """What bounds the kernels that the part launches: a row of METRICS for each launch."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"ncu": "not installed"}
    asked = [tool, "--csv", "--page", "raw", "--metrics", ",".join(METRICS)]
    ours = "--kernel-name-base", "demangled", "--kernel-name", "regex:tersor"
    done = child(part, *asked, *ours, quick=quick)
    lines = done.stdout.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if done.returncode or start is None:
        return {"failed": (done.stdout + done.stderr).strip()[-2000:]}
    launches = list(csv.DictReader(lines[start:]))[1:]  # the first row has the units
    return [
        {"kernel": each["Kernel Name"]} | {name: each.get(key) for key, name in METRICS.items()}
        for each in launches
    ]


def tests(*names: str) -> str:
    """The outcome of files of tests/."""
    paths = [str(ROOT / "tests" / name) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip().splitlines()[-1] if done.stdout else done.stderr


def seconds(calls: list[Callable[[], object]], rounds: int = 15) -> float:
    """Median of a call, by replays of a graph that holds one of each."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    taken = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / 1e3 / len(calls))
    return median(taken)


def limits() -> dict[str, float]:
    """Of a large copy, and of a large product."""
    source = torch.randint(256, (2 << 30,), dtype=torch.uint8, device="cuda")
    to = torch.empty_like(source)
    copy = 2 * source.numel() / seconds([lambda: to.copy_(source)])
    a, b = (torch.randn(8192, 8192, device="cuda").half() for _ in range(2))
    product = 2 * 8192**3 / seconds([lambda: a @ b])
    return {"copy_bytes_per_second": copy, "float16_flop_per_second": product}


def device() -> dict[str, Any]:
    found = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True,
    )  # fmt: skip
    return {
        "gpu": found.name, "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}", "memory_bytes": found.total_memory,
        "driver": driver.stdout.strip(), "cuda": torch.version.cuda,
    }  # fmt: skip


def run(
    about: str,
    name: str,
    parts: Mapping[str, Part],
    tested: Sequence[str],
    show: Callable[[dict[str, Any]], None],
) -> None:
    """The command line of such a script. parts: by name; that of "check" runs under the sanitizer
    too, that of "profile" under ncu alone. tested: files of tests/. show: prints what was found."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few shapes; not saved")
    parser.add_argument("--no-build", action="store_true", help="the tersor that is installed")
    parser.add_argument("--no-sanitizer", action="store_true", help="without compute-sanitizer")
    parser.add_argument(
        "--only", nargs="+", choices=parts, help="these parts; of the same GPU the others are kept"
    )
    parser.add_argument("--part", choices=parts, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no NVIDIA GPU that torch can use; nothing was measured")
    if given.part:
        print(json.dumps(parts[given.part](given.quick)))
        return
    if not given.no_build:
        build()
        paths = [str(SITE), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    found: dict[str, Any] = {"device": device(), "limits": limits()}
    for part in given.only or parts:
        found[part] = (profile if part == "profile" else result)(part, given.quick)
        if part == "check":
            found["sanitizer"] = "not asked for" if given.no_sanitizer else sanitize()
            found["tests"] = tests(*tested)
    show(found)
    if not given.quick:
        before = machine.saved(name) if given.only else {}
        kept = before if before.get("device") == found["device"] else {}
        print(machine.save(name, kept | found))
