"""The GPTQ column solver against llm-compressor's, given the same Gram matrix and the same grid.

    python bench/solve.py [--quick] [--shape N,K ...]

One process runs both in turns, so it needs an environment that has both; llm-compressor pins other
packages, so give it one of its own:

    python -m venv .venv-llmcompressor
    .venv-llmcompressor/bin/pip install llmcompressor torch==<the version of yours> .
    .venv-llmcompressor/bin/python bench/solve.py

Without it the solver is timed alone. The limit is the work at the rate of torch's float32 matrix
product, measured in the same run: k³/3 operations for the factor, n·k² for carrying the errors of
each column to those after it (a triangle of products, two operations each) and n·k·128 within the
blocks. Writes bench/results/solve.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import machine
from tersor import _core
from tersor.qweight import QSpec
from tersor.solvers.rtn import find_grid

BITS, GROUP, BLOCK, DAMP = 4, 128, 128, 0.01
SHAPES = ("4096,4096", "14336,4096", "4096,14336")


def gram(k: int, draw: torch.Generator) -> Tensor:
    """Of correlated inputs whose channels differ in size, as a model's do."""
    tokens, rank = max(2048, 5 * k // 4), k // 16
    x = torch.randn(tokens, rank, generator=draw) @ torch.randn(rank, k, generator=draw)
    x = x.div_(rank**0.5).add_(torch.randn(tokens, k, generator=draw), alpha=0.5)
    x *= torch.exp(0.5 * torch.randn(k, generator=draw))
    return x.T @ x / tokens


def ours(w: Tensor, h: Tensor, scales: Tensor, stages: dict[str, float]) -> Tensor:
    k = w.shape[1]
    groups = torch.arange(k, dtype=torch.int32) // GROUP
    start = time.perf_counter()
    _core.factor(h, DAMP)
    middle = time.perf_counter()
    codes = torch.as_tensor(_core.solve_columns(w, h, scales, None, groups, 1 << BITS))
    stages["factor"] = middle - start
    stages["columns"] = time.perf_counter() - middle
    midpoint = 1 << (BITS - 1)
    return (codes.view(len(w), -1, GROUP).float() - midpoint).mul_(scales.unsqueeze(-1)).view_as(w)


def theirs(w: Tensor, h: Tensor, scales: Tensor, stages: dict[str, float]) -> Tensor:
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args = QuantizationArgs(num_bits=BITS, strategy="group", group_size=GROUP, symmetric=True)
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    stacked = (t.unsqueeze(0) for t in (w, h, scales, zeros))
    return quantize_weight(*stacked, None, args, blocksize=BLOCK, percdamp=DAMP)[0][0]


def matmul_rate(size: int = 4096) -> float:
    """Operations a second of torch's float32 product, the best of five."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        taken.append(time.perf_counter() - start)
    return 2 * size**3 / min(taken)


def measure(n: int, k: int, rounds: int, contestants: dict[str, Callable[..., Tensor]]) -> Any:
    draw = torch.Generator().manual_seed(0)
    w, h = torch.randn(n, k, generator=draw) * 0.02, gram(k, draw)
    scales = find_grid(w, QSpec(BITS, GROUP), clip=False)[0]
    limit = (k**3 / 3 + n * k**2 + n * k * BLOCK) / matmul_rate()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    errors: dict[str, float] = {}
    for _ in range(rounds + 1):  # the first one warms up
        for name, solve in contestants.items():
            parts: dict[str, float] = {}
            arguments = w.clone(), h.clone(), scales.clone()  # both solvers overwrite them
            start = time.perf_counter()
            result = solve(*arguments, parts)
            seconds[name].append(time.perf_counter() - start)
            stages[name].append(parts)
            if name not in errors:
                e = w - result
                errors[name] = float(((e @ h) * e).sum() / ((w @ h) * w).sum())
    row: dict[str, Any] = {"n": n, "k": k, "limit_ms": round(1e3 * limit, 1)}
    for name in contestants:
        row[name] = machine.summary(seconds[name][1:]) | {"relative_output_error": errors[name]}
        for stage in stages[name][0]:
            taken = [parts[stage] for parts in stages[name][1:]]
            row[name][f"{stage}_ms"] = machine.summary(taken)["median_ms"]
    return row


def show(row: dict[str, Any]) -> None:
    mine = row["tersor"]["median_ms"]
    print(f"{row['n']}×{row['k']}: limit {row['limit_ms']:.0f} ms")
    for name in ("tersor", "llm-compressor"):
        if name in row:
            one = row[name]
            print(
                f"  {name:15s} {one['median_ms']:9.0f} ms ({one['least_ms']:.0f} to "
                f"{one['most_ms']:.0f}), {row['limit_ms'] / one['median_ms']:.0%} of the limit, "
                f"{one['median_ms'] / mine:.2f}× tersor's time, relative output error "
                f"{one['relative_output_error']:.6f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="512×512, one round")
    parser.add_argument("--shape", nargs="*", metavar="N,K", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    settings = parser.parse_args()
    contestants = {"tersor": ours}
    if importlib.util.find_spec("llmcompressor"):
        contestants["llm-compressor"] = theirs
    else:
        print("llm-compressor is not installed here; see the top of bench/solve.py")
    shapes = ["512,512"] if settings.quick else settings.shape
    rows = []
    for n, k in (map(int, shape.split(",")) for shape in shapes):
        rows.append(measure(n, k, 1 if settings.quick else settings.rounds, contestants))
        show(rows[-1])
    if not settings.quick:
        content = {
            "bits": BITS, "group": GROUP, "rounds": settings.rounds,
            "threads": torch.get_num_threads(), "rows": rows,
        }  # fmt: skip
        print(machine.save("solve", content))


if __name__ == "__main__":
    main()
