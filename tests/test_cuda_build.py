"""What the CUDA compiler makes of the kernels, for every architecture: nothing of a kernel that is
called for every token may spill registers to memory. Skipped where there is no nvcc."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
nvcc = shutil.which("nvcc")
pytestmark = [
    pytest.mark.skipif(nvcc is None, reason="there is no CUDA compiler"),
    pytest.mark.slow,
]


def architectures() -> list[str]:
    """Those that wheels are built for, as CMakeLists.txt has them: 75, ..., 90a, ..."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(r"set\(TERSOR_WHEEL_ARCHITECTURES ([^)]+)\)", text)
    assert found is not None
    return [each.removesuffix("-real") for each in found[1].split()]


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture."""

    kernel: str
    registers: int
    stack: int
    spilled: int  # bytes, stores and loads


def resources(source: Path, arch: str, folder: Path) -> list[Resources]:
    target = f"arch=compute_{arch},code=sm_{arch}"
    command = [
        nvcc, "-std=c++17", "-cubin", "-gencode", target, "-Xptxas", "-v", "-I", CSRC, source,
        "-o", folder / f"{source.stem}.{arch}.cubin",
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    report = done.stderr + done.stdout
    assert done.returncode == 0, report
    assert "serialized" not in report and "setmaxnreg" not in report, report
    found = []
    for part in re.split(r"Compiling entry function '", report)[1:]:
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert stack is not None and registers is not None, part
        spilled = int(stack[2]) + int(stack[3])
        name = part.partition("'")[0]
        found.append(Resources(name, int(registers[1]), int(stack[1]), spilled))
    return found


@pytest.mark.parametrize("source", sorted(CSRC.glob("cuda/*.cu")), ids=lambda path: path.stem)
def test_no_kernel_spills_on_any_architecture(source, tmp_path):
    supported = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    known = [arch for arch in architectures() if f"sm_{arch.rstrip('a')}" in supported.split()]
    if "wgmma" in source.stem:
        known = [arch for arch in known if arch == "90a"]  # which alone has the instructions
    assert known
    with ThreadPoolExecutor(2) as pool:
        each = pool.map(lambda arch: (arch, resources(source, arch, tmp_path)), known)
        for arch, kernels in each:
            assert kernels, f"no kernel of {source.name} for {arch}"
            for kernel in kernels:
                assert (kernel.stack, kernel.spilled) == (0, 0), (arch, kernel)
                # A block of 384 threads starts with what setmaxnreg hands from warp to warp.
                assert "wgmma" not in source.stem or kernel.registers == 168, kernel
