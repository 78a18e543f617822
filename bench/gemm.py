"""Our linear layers against torch and ONNX Runtime, and against what the machine can do.

    python bench/gemm.py [--quick] [--isa avx2 ...]

One process for each instruction set (TERSOR_ISA); in it every candidate takes its turn in every
round, so that what disturbs the machine disturbs all. Weights are copies that together are four
times the last-level cache. Before each turn the process sleeps, so that no other runtime's threads
are still spinning; then one call warms the candidate's own up. Writes bench/results/gemm.json.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import limits
import machine
from gemm_peers import PEERS
from tersor import _core, kernels
from tersor.errors import TersorError
from tersor.linear import QuantLinear
from tersor.qweight import ActSpec, QSpec, QWeight
from tersor.solvers.rtn import RTN

GROUP = 128
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # n, k
TOKENS = (1, 4, 16, 128, 512)
MODES = {
    "W4A8": (QSpec(4, GROUP), ActSpec()),
    "W4A16": (QSpec(4, GROUP), None),
    "W8A8": (QSpec(8, None), ActSpec()),
    "W8A16": (QSpec(8, GROUP), None),
}
SLOW = {"scalar"}  # measured on few tokens and one shape: it is the reference, not meant to be fast
CACHES = 4  # all copies of a weight, in last-level caches
MOST_BYTES = 1 << 30
TOLERANCE = 0.05  # of the output's norm: whoever computes something else is not timed

Row = dict[str, Any]
Peaks = dict[tuple[str, int], float]  # multiply-adds a second, by ISA and bits of activations


@dataclass
class Candidate:
    """calls: one for each copy of the weight; products: matrix products in each call."""

    name: str
    calls: list[Callable[[], object]]
    products: int = 1
    turns: list[float] = field(default_factory=list)  # median seconds of a product, by turn

    def __post_init__(self) -> None:
        self.rotation = itertools.cycle(self.calls)

    def take_turn(self, seconds: float) -> None:
        time.sleep(0.02)
        next(self.rotation)()
        taken: list[float] = []
        while sum(taken) < seconds:
            call = next(self.rotation)
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        self.turns.append(median(taken) / self.products)


def copies(nbytes: int) -> int:
    """How many copies of a weight are more than the caches hold."""
    wanted = math.ceil(CACHES * machine.last_level_cache() / nbytes) + 1
    return max(2, min(wanted, MOST_BYTES // nbytes))


def ours(mode: str, q: QWeight, w: Tensor) -> QuantLinear:
    spec, activation = MODES[mode]
    return QuantLinear(q if spec.bits == 4 else RTN()(w, None, spec), None, activation)


def measure_shape(n: int, k: int, tokens: list[int], settings: argparse.Namespace) -> list[Row]:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(1, 16, (n, k), dtype=torch.uint8, generator=draw)
    scales = (0.5 + torch.rand(n, k // GROUP, generator=draw)).mul_(0.01).bfloat16()
    q = QWeight(QSpec(4, GROUP), codes, scales)
    w = q.dequantize(torch.bfloat16)

    layers: dict[str, list[QuantLinear]] = {}
    for mode in MODES:
        try:
            layer = ours(mode, q, w)
        except TersorError as error:  # an instruction set without a kernel for it
            print(f"  {mode}: {error}", file=sys.stderr)
            continue
        count = copies(layer.packed.numel())
        layers[mode] = [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]
    peers = {name: make(q, w, copies) for name, make in PEERS.items()}

    rows: list[Row] = []
    for m in tokens:
        x = torch.randn(m, k, generator=draw).bfloat16()
        expected = x.float() @ w.float().T
        candidates = []
        for mode, made in layers.items():
            check(mode, made[0](x), expected)
            candidates.append(Candidate(mode, [partial(layer, x) for layer in made]))
        for name, peer in peers.items():
            calls, result = peer.bind(x)
            candidates.append(Candidate(name, calls, peer.products))
            candidates[-1].calls[0]()
            check(name, result(), expected)
        with torch.inference_mode():
            for _ in range(settings.rounds):
                for candidate in candidates:
                    candidate.take_turn(settings.seconds)
        for candidate in candidates:
            made = layers.get(candidate.name)
            rows.append(
                {
                    "name": candidate.name,
                    "n": n,
                    "k": k,
                    "m": m,
                    **machine.summary(candidate.turns),
                    **(kernel_of(candidate.name, made[0], m) if made else {}),
                }
            )
            show(rows[-1])
    return rows


def check(name: str, y: Tensor, expected: Tensor) -> None:
    error = float((y.float() - expected).norm() / expected.norm())
    if not error < TOLERANCE:
        raise SystemExit(f"{name} is off by {error:.3f} of the output's norm: not timed")


def kernel_of(mode: str, layer: QuantLinear, m: int) -> Row:
    spec, activation = MODES[mode]
    reasons = kernels.explain(m, layer.out_features, layer.in_features, spec, activation)
    name = next(name for name, reason in reasons if not reason)
    return {"kernel": name, "bytes": layer.packed.numel()}


def limit(row: Row, bandwidth: float, peaks: Peaks) -> float:
    """The least milliseconds that reading the weight, or the multiply-adds, can take here."""
    isa = next(kernel.isa for kernel in kernels.table() if kernel.name == row["kernel"])
    peak = peaks.get((isa, 8 if MODES[row["name"]][1] else 16))
    seconds = row["bytes"] / bandwidth
    if peak:
        seconds = max(seconds, row["m"] * row["n"] * row["k"] / peak)
    return round(1e3 * seconds, 4)


def show(row: Row) -> None:
    print(
        f"  {row['n']:6d}×{row['k']:<6d} m={row['m']:<4d} {row['name']:12s} "
        f"{row['median_ms']:9.3f} ms  ({row['least_ms']:.3f} to {row['most_ms']:.3f})",
        file=sys.stderr,
        flush=True,
    )


def child(isa: str, settings: argparse.Namespace, out: Path) -> None:
    """One instruction set, in a process of its own."""
    threads = torch.get_num_threads()
    shapes, tokens = SHAPES, list(TOKENS)
    if settings.quick:
        shapes, tokens = ((1024, 1024),), [1, 128]
    if isa in SLOW:
        shapes, tokens = shapes[:1], [m for m in tokens if m <= 16]
    available = {kernel.isa for kernel in kernels.table() if kernel.unavailable is None}
    measured = {key: 0.0 for key in limits.PEAKS if key[0] in available}
    bandwidth, rows = 0.0, []
    for n, k in shapes:
        # The neighbours on a shared machine come and go: a limit is the best of all the run.
        bandwidth = max(bandwidth, limits.read_bandwidth(threads))
        for key in measured:
            measured[key] = max(measured[key], limits.multiply_adds(*key, threads) or 0.0)
        rows += measure_shape(n, k, tokens, settings)
    bandwidth = max(bandwidth, limits.read_bandwidth(threads))
    for row in rows:
        if "kernel" in row:
            row["limit_ms"] = limit(row, bandwidth, measured)
    peaks = {f"{isa} A{bits}": peak for (isa, bits), peak in measured.items()}
    out.write_text(
        json.dumps(
            {
                "threads": threads,
                "read_bandwidth_bytes_per_second": bandwidth,
                "multiply_adds_per_second": peaks,
                "rows": rows,
            }
        )
    )


def print_table(isa: str, rows: list[Row]) -> None:
    out = Table(title=f"{isa}: milliseconds (× torch bf16, share of the limit)")
    names = list(dict.fromkeys(row["name"] for row in rows))
    for head in ("n×k", "m", *names):
        out.add_column(head, justify="right")
    for key, cells in itertools.groupby(rows, key=lambda row: (row["n"], row["k"], row["m"])):
        line = {row["name"]: row for row in cells}
        base = line["torch bf16"]["median_ms"]
        texts = []
        for name in names:
            row = line[name]
            text = f"{row['median_ms']:.3f} ({base / row['median_ms']:.2f}×"
            if "limit_ms" in row:
                text += f", {row['limit_ms'] / row['median_ms']:.0%}"
            texts.append(text + ")")
        out.add_row(f"{key[0]}×{key[1]}", str(key[2]), *texts)
    Console(width=200).print(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape, few rounds")
    parser.add_argument("--isa", nargs="*", help="instruction sets (default: all of this machine)")
    parser.add_argument("--rounds", type=int, help="turns of each candidate (7)")
    parser.add_argument("--seconds", type=float, help="of each turn (0.1)")
    parser.add_argument("--child", nargs=2, metavar=("ISA", "FILE"), help=argparse.SUPPRESS)
    settings = parser.parse_args()
    settings.rounds = settings.rounds or (2 if settings.quick else 7)
    settings.seconds = settings.seconds or (0.02 if settings.quick else 0.1)
    warnings.filterwarnings("ignore", message=".*quantize_per_channel")  # deprecated, still fast
    if settings.child:
        child(settings.child[0], settings, Path(settings.child[1]))
        return
    present = [k["isa"] for k in _core.kernels() if k["unavailable"] is None]
    # "dispatched" is what a user gets: the best kernel for each request.
    isas = settings.isa or ["dispatched", *dict.fromkeys(present)]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for isa in isas:
            print(isa, file=sys.stderr)
            out = Path(folder) / f"{isa}.json"
            environment = dict(os.environ)
            if isa != "dispatched":
                environment["TERSOR_ISA"] = isa
            subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--child", isa, str(out)],
                env=environment,
                check=True,
            )
            results[isa] = json.loads(out.read_text())
    for isa, result in results.items():
        print_table(isa, result["rows"])
    if not settings.quick:
        print(machine.save("gemm", {"group": GROUP, "rounds": settings.rounds, "isas": results}))


if __name__ == "__main__":
    main()
