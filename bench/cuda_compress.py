"""Compression on the GPU of this machine: the solver, and a checkpoint from disk to disk.

    python bench/cuda_compress.py [--quick] [--no-build] [--only PART ...]

Needs an NVIDIA GPU, nvcc, and Torch for CUDA; builds tersor for this GPU as cuda_linear.py does.

1. check: factor, grids, codes and masks of the GPU against the CPU's on the same input, where two
   that are equally good may differ; a part of it under compute-sanitizer; the tests of the solver.
2. solver: GPTQ of one linear given its Gram matrix, 4 bits g128, against the loop over columns as
   published, in torch on the same GPU, and against llm-compressor where it is installed.
3. disk: a Llama shape of 8 billion random weights from disk to disk, INT4 g128 by GPTQ: seconds of
   each stage, and the peaks of the memory of GPU and host.

Writes bench/results/cuda_compress.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import gpu
from solve import BITS, BLOCK, DAMP, GROUP, gram, theirs
from streaming import make_checkpoint

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # n, k
MODELS = {  # for streaming.make_checkpoint
    "8 B": {"hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "intermediate": 14336,
            "vocabulary": 128256},
    "0.2 B": {"hidden": 1024, "layers": 12, "heads": 16, "kv_heads": 4, "intermediate": 4096,
              "vocabulary": 32000},
}  # fmt: skip


# --- 1. right -------------------------------------------------------------------------------------


def check(quick: bool) -> dict[str, float]:
    """The least share of rows that are the same on both devices, for each way to solve."""
    from tersor import column_solver

    found: dict[str, float] = {}
    draw = torch.Generator().manual_seed(0)
    n, k = (96, 320) if quick else (1024, 2048)
    w, h = torch.randn(n, k, generator=draw), gram(k, draw)
    sides: dict[str, list[Tensor]] = {}
    for device in ("cpu", "cuda"):
        there, unit = w.to(device), h.clone().to(device)
        _, _, pivots = column_solver.factor(unit, DAMP)
        groups = torch.arange(k, dtype=torch.int32, device=device) // 64
        outcomes = [unit.triu(1).cpu()]
        for symmetric in (True, False):
            scales, zeros = column_solver.search_grid(there, 64, BITS, symmetric, True, 1)
            grid = (scales, zeros, groups, 1 << BITS)
            for how in WAYS.values():
                for given in (grid, (None, None, None, 0)):
                    settings = {"mask": None, "share": 0.0, "kept": 0, "of": 0} | how
                    solved = column_solver.solve_columns(
                        there, unit, *given, pivots=pivots, **settings
                    )
                    outcomes.append((solved if given is grid else solved != 0).cpu())
        sides[device] = outcomes
    factor, *here = sides["cpu"]
    found["factor"] = float((sides["cuda"][0] - factor).abs().max() / factor.abs().max())
    if not found["factor"] <= 1e-5:
        raise SystemExit(f"the factors differ by {found['factor']}")
    names = [f"{how}, {kind}" for _ in range(2) for how in WAYS for kind in ("codes", "zeros")]
    for name, a, b in zip(names, here, sides["cuda"][1:], strict=True):
        same = float((a == b).all(1).double().mean())
        found[name] = min(found.get(name, 1.0), same)
        if same < 0.95:
            raise SystemExit(f"{name}: {same} of the rows are the same on both devices")
    return found


WAYS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "half of them": {"share": 0.5},
    "2:4": {"kept": 2, "of": 4},
    "16:32": {"kept": 16, "of": 32},
}


# --- 2. the solver --------------------------------------------------------------------------------


def ours(w: Tensor, h: Tensor, scales: Tensor, stages: dict[str, float]) -> Tensor:
    from tersor import cuda_solver

    n, k = w.shape
    groups = torch.arange(k, dtype=torch.int32, device=w.device) // GROUP
    start = _now()
    _, _, pivots = cuda_solver.factor(h, DAMP)
    middle = _now()
    codes = cuda_solver.solve_columns(
        w, h, scales, None, groups, 1 << BITS, mask=None, pivots=pivots, share=0.0, kept=0, of=0
    )
    stages["factor"], stages["columns"] = middle - start, _now() - middle
    midpoint = 1 << (BITS - 1)
    return (codes.view(n, -1, GROUP).float() - midpoint).mul_(scales.unsqueeze(-1)).view_as(w)


def loop(w: Tensor, h: Tensor, scales: Tensor, stages: dict[str, float]) -> Tensor:
    """GPTQ as published: the factor of the inverse, and a column after the other in Python."""
    k, midpoint = w.shape[1], 1 << (BITS - 1)
    start = _now()
    diagonal = h.diagonal()
    diagonal += DAMP * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    middle = _now()
    w, result = w.clone(), torch.empty_like(w)
    for first in range(0, k, BLOCK):
        block, u = w[:, first : first + BLOCK], upper[first : first + BLOCK, first : first + BLOCK]
        errors = torch.empty_like(block)
        for i in range(block.shape[1]):
            scale = scales[:, (first + i) // GROUP]
            rounded = torch.clamp(torch.round(block[:, i] / scale), -midpoint, midpoint - 1) * scale
            result[:, first + i] = rounded
            error = (block[:, i] - rounded) / u[i, i]
            block[:, i:] -= error.unsqueeze(1) * u[i, i:].unsqueeze(0)
            errors[:, i] = error
        w[:, first + BLOCK :] -= errors @ upper[first : first + BLOCK, first + BLOCK :]
    stages["factor"], stages["columns"] = middle - start, _now() - middle
    return result


def _now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def solver(quick: bool) -> list[dict[str, Any]]:
    from tersor import column_solver

    contestants: dict[str, Callable[..., Tensor]] = {"tersor": ours, "loop over columns": loop}
    if importlib.util.find_spec("llmcompressor") is not None:
        contestants["llm-compressor"] = theirs
    rows = []
    for n, k in SHAPES[: 1 if quick else None]:
        draw = torch.Generator().manual_seed(0)
        w, h = (torch.randn(n, k, generator=draw) * 0.02).cuda(), gram(k, draw).cuda()
        scales, _ = column_solver.search_grid(w, GROUP, BITS, True, False, 1)
        row: dict[str, Any] = {"n": n, "k": k}
        taken: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(2 if quick else 6):  # the first one warms up
            for name, solve in contestants.items():
                stages: dict[str, float] = {}
                given = w.clone(), h.clone(), scales.clone()  # some are overwritten
                start = _now()
                result = solve(*given, stages)
                taken[name].append(_now() - start)
                e = w - result
                error = float(((e @ h) * e).sum() / ((w @ h) * w).sum())
                row[name] = {"relative_output_error": error, "stages": stages}
        for name, seconds in taken.items():
            row[name]["seconds"] = median(seconds[1:])
        rows.append(row)
        torch.cuda.empty_cache()
    return rows


# --- 3. from disk to disk -------------------------------------------------------------------------


def disk(quick: bool) -> dict[str, Any]:
    import tersor
    from tersor.demo_model import library_documents
    from tersor.report import TIMINGS

    name = "0.2 B" if quick else "8 B"
    calibration = tersor.Calibration(
        texts=tuple(library_documents()), samples=16 if quick else 128, seq_len=2048
    )
    with tempfile.TemporaryDirectory(dir=gpu.ROOT / "build") as folder:
        model, out = Path(folder) / "model", Path(folder) / "out"
        weights = make_checkpoint(model, argparse.Namespace(**MODELS[name]), "cuda")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        report = tersor.quantize_checkpoint(
            *(model, out), scheme=tersor.Scheme(tersor.QSpec(BITS, GROUP)),
            calibration=calibration, device="cuda", progress=False,
        )  # fmt: skip
        taken = time.perf_counter() - start
        timings = json.loads((out / TIMINGS).read_text())
    return {
        "model": name, "weights": weights, "tokens": report.layers[0].tokens, "seconds": taken,
        "stages": timings["seconds"], "host_peak_bytes": timings["peak_resident_bytes"],
        "gpu_peak_bytes": torch.cuda.max_memory_allocated(),
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    out = Console()
    for name, value in found.items():
        out.print(f"{name}: {value}", highlight=False)


if __name__ == "__main__":
    parts = {"check": check, "solver": solver, "disk": disk}
    gpu.run(__doc__, "cuda_compress", parts, ["test_cuda_solver.py", "test_devices.py"], show)
