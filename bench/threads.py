"""Whose threads should run our kernels: the OpenMP runtime that Torch has loaded, or our own pool?

    python bench/threads.py [--quick]

In a model our linear layers run between Torch's own operations, whose threads go on spinning for a
while. So the question is put there: a Torch operation, one of ours, and so on, both timed, with
either backend in turn; and ours alone, where nothing spins. Writes bench/results/threads.json.
"""

from __future__ import annotations

import argparse
import itertools
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

import machine
from tersor import _core
from tersor.linear import QuantLinear
from tersor.qweight import QSpec, QWeight

BACKENDS = ("openmp", "pool")
CASES = ((1024, 1024, 1), (4096, 4096, 1), (4096, 4096, 16))  # n, k, m


def layer(n: int, k: int) -> QuantLinear:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (n, k), dtype=torch.uint8, generator=draw)
    return QuantLinear(QWeight(QSpec(4), codes, torch.full((n, k // 128), 0.01).bfloat16()))


def pair(mine: QuantLinear, weight: Tensor | None, x: Tensor, count: int) -> tuple[float, float]:
    """Median seconds of torch's operation (0 where there is none) and of ours right after it."""
    theirs, ours = [], []
    for _ in range(count):
        start = time.perf_counter()
        if weight is not None:
            torch.nn.functional.linear(x, weight)
        middle = time.perf_counter()
        mine(x)
        theirs.append(middle - start)
        ours.append(time.perf_counter() - middle)
    return median(theirs), median(ours)


def measure(n: int, k: int, m: int, rounds: int, count: int) -> list[dict[str, Any]]:
    mine = layer(n, k)
    weight, x = torch.randn(n, k).bfloat16(), torch.randn(m, k).bfloat16()
    taken: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for backend, after_torch in itertools.product(BACKENDS, (True, False)):
            _core.set_threads_backend(backend)
            time.sleep(0.02)
            beside = weight if after_torch else None
            pair(mine, beside, x, 3)
            taken.setdefault((backend, after_torch), []).append(pair(mine, beside, x, count))
    return [
        {
            "n": n,
            "k": k,
            "m": m,
            "backend": backend,
            "after_torch": after_torch,
            "ours": machine.summary([ours for _, ours in pairs]),
            "torch": machine.summary([theirs for theirs, _ in pairs]),
        }
        for (backend, after_torch), pairs in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small case, two rounds")
    settings = parser.parse_args()
    cases, rounds, count = (CASES[:1], 2, 20) if settings.quick else (CASES, 9, 200)
    rows = []
    with torch.inference_mode():
        for case in cases:
            for row in measure(*case, rounds, count):
                rows.append(row)
                where = "after torch" if row["after_torch"] else "alone"
                print(
                    f"{row['n']}×{row['k']} m={row['m']:<3d} {row['backend']:7s} {where:12s} "
                    f"ours {row['ours']['median_ms']:.4f} ms, "
                    f"torch {row['torch']['median_ms']:.4f} ms",
                    flush=True,
                )
    if not settings.quick:
        print(machine.save("threads", {"threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
