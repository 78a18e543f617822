"""Kernels that leave the zeros of 2:4 weights out, against the dense ones of the same weights; for
16-bit weights that is torch's.

    python bench/sparse.py [--quick]

Both take turns on copies that together exceed the caches. Beside them the time that reading the
packed weight takes at the machine's read bandwidth. Writes bench/results/sparse.json.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import limits
import machine
from tersor import sparse
from tersor.kernels import PATTERN, pack_values, pack_weight
from tersor.qweight import ActSpec, QSpec
from tersor.testing import random_qweight, random_values

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # n, k
TOKENS = (1, 2, 4, 8, 32, 128)
MODES = {
    "W4A8": (QSpec(4, 128), ActSpec()),
    "W4A16": (QSpec(4, 128), None),
    "W8A8": (QSpec(8, 128), ActSpec()),
    "W8A16": (QSpec(8, 128), None),
    "bfloat16": (None, None),
}


def packed_bytes(n: int, k: int, spec: QSpec | None, activation: ActSpec | None) -> dict[str, int]:
    if spec is None:
        w = random_values(n, k, torch.bfloat16)
        return {"dense": w.nbytes, "sparse": pack_values(w, PATTERN).numel()}
    q = random_qweight(n, k, spec, torch.bfloat16, 0, PATTERN)
    patterns = {"dense": (0, 0), "sparse": PATTERN}
    return {name: pack_weight(q, activation, each).numel() for name, each in patterns.items()}


def measure(n: int, k: int, tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    for mode, (spec, activation) in MODES.items():
        nbytes = packed_bytes(n, k, spec, activation)
        for m in tokens:
            if spec:
                found = sparse.measure(m, n, k, spec, activation)
            else:
                found = sparse.measure_values(m, n, k)
            rows.append(
                {"n": n, "k": k, "m": m, "mode": mode, "seconds": asdict(found), "gain": found.gain}
                | {"bytes": nbytes}
            )
            print(f"{n}×{k} m={m} {mode}: {found.gain:.2f}×", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small shape")
    quick = parser.parse_args().quick
    shapes, tokens = (((1024, 1024),), (1, 8)) if quick else (SHAPES, TOKENS)
    threads = torch.get_num_threads()
    bandwidth, rows = 0.0, []
    for n, k in shapes:
        # The neighbours on a shared machine come and go: a limit is the best of all the run.
        bandwidth = max(bandwidth, limits.read_bandwidth(threads))
        rows += measure(n, k, tokens)
    bandwidth = max(bandwidth, limits.read_bandwidth(threads))

    shown = Table(title=f"sparse against dense; read bandwidth {bandwidth / 1e9:.1f} GB/s")
    for head in ("n×k", "m", "mode", "dense ms", "sparse ms", "gain", "bits", "bytes / bandwidth"):
        shown.add_column(head, justify="right")
    for row in rows:
        least = {name: size / bandwidth for name, size in row["bytes"].items()}
        row["limit_seconds"] = least
        seconds = row["seconds"]
        shown.add_row(
            f"{row['n']}×{row['k']}",
            str(row["m"]),
            row["mode"],
            f"{1e3 * seconds['dense']:.3f}",
            f"{1e3 * seconds['sparse']:.3f}",
            f"{row['gain']:.2f}×",
            f"{8 * row['bytes']['sparse'] / (row['n'] * row['k']):.2f}",
            f"{1e3 * least['sparse']:.3f} ms",
        )
    Console(width=120).print(shown)
    if not quick:
        result = {"threads": threads, "read_bandwidth_bytes_per_second": bandwidth, "rows": rows}
        print(machine.save("sparse", result))


if __name__ == "__main__":
    main()
