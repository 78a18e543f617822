"""Measures what this machine can do at most, in the same run as the thing that is compared with it.

    python bench/limits.py

Read bandwidth: all threads read buffers of more than 1 GB in turn. Arithmetic: a loop over
registers, one per kind of instruction. Needs a C++ compiler (CXX, or c++).
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

BUFFER_BYTES = 1 << 28
BUFFERS = 5

# The arithmetic that a kernel's inner loop is made of: (ISA, activations of 8 or 16 bits).
PEAKS = {
    ("avx2", 8): "int8_avx2",
    ("avx2", 16): "fma_avx2",
    ("avx512vnni", 8): "int8_avx512vnni",
    ("avx512vnni", 16): "fma_avx512",
    ("avx512bf16", 16): "bf16_avx512bf16",
}


@functools.cache
def library() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="tersor-limits-"))
    target = folder / "limits.so"
    compiler = os.environ.get("CXX", "c++")
    source = Path(__file__).with_name("limits.cpp")
    subprocess.run(
        [compiler, "-O3", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(target)],
        check=True,
    )
    lib = ctypes.CDLL(str(target))
    lib.read_all.restype = ctypes.c_uint64
    lib.read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    for name in PEAKS.values():
        if hasattr(lib, name):
            function = getattr(lib, name)
            function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int64]
    return lib


def best(function, repeats: int = 5) -> float:
    """The highest rate of some runs: a limit is what the machine can do undisturbed."""
    return max(function() for _ in range(repeats))


def read_bandwidth(threads: int) -> float:
    """Bytes a second, read by all threads together."""
    lib = library()
    buffers = [torch.ones(BUFFER_BYTES, dtype=torch.uint8) for _ in range(BUFFERS)]
    part = BUFFER_BYTES // threads // 4096 * 4096
    with ThreadPoolExecutor(threads) as pool:

        def once() -> float:
            start = time.perf_counter()
            for buffer in buffers:
                parts = range(buffer.data_ptr(), buffer.data_ptr() + threads * part, part)
                list(pool.map(lib.read_all, parts, [part] * threads))
            return BUFFERS * part * threads / (time.perf_counter() - start)

        return best(once)


def multiply_adds(isa: str, activation_bits: int, threads: int) -> float | None:
    """Multiply-adds a second of all threads together; None where there is no such instruction.

    The caller knows that the machine has the ISA.
    """
    name = PEAKS.get((isa, activation_bits))
    if name is None or not hasattr(library(), name):
        return None
    loop = getattr(library(), name)
    rounds = 20_000_000
    with ThreadPoolExecutor(threads) as pool:

        def once() -> float:
            start = time.perf_counter()
            done = sum(pool.map(loop, [rounds] * threads))
            return done / (time.perf_counter() - start)

        return best(once, 3)


if __name__ == "__main__":
    from tersor import _core

    count = torch.get_num_threads()
    print(f"{count} threads")
    print(f"read bandwidth   {read_bandwidth(count) / 1e9:8.1f} GB/s")
    isas = {k["isa"] for k in _core.kernels() if k["unavailable"] is None}
    for isa, bits in PEAKS:
        if isa in isas:
            rate = multiply_adds(isa, bits, count)
            print(f"{isa:11s} A{bits:<3d} {rate / 1e9:9.1f} G multiply-adds/s")
