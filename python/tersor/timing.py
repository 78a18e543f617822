"""How long linear layers take on this machine: calls in turn, on weights that come from memory."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tersor import cuda
from tersor.errors import TersorError
from tersor.kernels import PATTERN, explain, explain_values, pack_values, pack_weight
from tersor.oracle import random_qweight, random_values
from tersor.qweight import ActSpec, QSpec, QWeight, Scheme

if TYPE_CHECKING:
    from rich.table import Table

Call = Callable[[Tensor], Tensor]
_ROUNDS = 7
_COPIES = 64  # of a weight on a GPU, at most
_CALLS = 16  # that a graph has at least, so that its own launch counts for little


def in_turn(*calls: tuple[Call, Tensor]) -> list[float]:
    """The median seconds of each call, all taking turns; each on copies of its weight that together
    exceed the caches, as the layers of a model do. On a GPU the time is the GPU's own, between two
    events: the calls are in a graph, so that nothing of what Python takes is in it."""
    with torch.inference_mode():
        clocks = [(_gpu_clock if w.is_cuda else _clock)(call, _copies(w)) for call, w in calls]
        taken = [[clock() for clock in clocks] for _ in range(_ROUNDS + 1)][1:]
    return [median(column) for column in zip(*taken, strict=True)]


def quantized_call(
    x: Tensor, q: QWeight, activation: ActSpec | None, pattern: tuple[int, int]
) -> tuple[Call, Tensor]:
    """x [m, k] by a quantized weight, on the device of x."""
    outliers = activation.outliers if activation else None
    if x.is_cuda:
        grid = cuda.Grid.of(q, activation, bool(pattern[1]))
        return _on_gpu(x, grid, outliers), cuda.pack_weight(q, x.device, activation, grid.sparse)
    return _native(x, q.n, outliers), pack_weight(q, activation, pattern)


def sparse_call(x: Tensor, w: Tensor) -> tuple[Call, Tensor]:
    """x [m, k] by a 2:4 weight of 16-bit values [n, k], on the device of x."""
    if x.is_cuda:
        grid = cuda.Grid.of_values(w)
        return _on_gpu(x, grid), cuda.pack_values(w, x.device)
    return _native(x, w.shape[0]), pack_values(w, PATTERN)


def torch_call(x: Tensor, w: Tensor) -> tuple[Call, Tensor]:
    """x [m, k] by a weight [n, k] of its dtype, by torch."""
    return lambda weight: torch.nn.functional.linear(x, weight), w


def _native(x: Tensor, n: int, outliers: float | None = None) -> Call:
    def call(weight: Tensor) -> Tensor:
        y: Tensor = torch.ops.tersor.linear(x, weight, None, n, outliers)
        return y

    return call


def _on_gpu(x: Tensor, grid: cuda.Grid, outliers: float | None = None) -> Call:
    return lambda weight: cuda.linear(x, weight, None, grid, outliers)


def _copies(weight: Tensor) -> list[Tensor]:
    if weight.is_cuda:
        cache = torch.cuda.get_device_properties(weight.device).L2_cache_size
        count = min(_COPIES, math.ceil(1.5 * cache / weight.nbytes))
    else:
        count = math.ceil(1.5 * _last_level_cache() / weight.nbytes)
    return [weight, *(weight.clone() for _ in range(count - 1))]


def _clock(call: Call, weights: list[Tensor]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.perf_counter()
        for weight in weights:
            call(weight)
        return (time.perf_counter() - start) / len(weights)

    return seconds


def _gpu_clock(call: Call, weights: list[Tensor]) -> Callable[[], float]:
    device, count = weights[0].device, max(_CALLS, len(weights))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        # What is done once (libraries that are loaded, workspaces) cannot be in a graph.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            call(weights[0])
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            for i in range(count):
                call(weights[i % len(weights)])

    def seconds() -> float:
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / count

    return seconds


def _last_level_cache() -> int:
    """Bytes; 32 MB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20}
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [path.read_text(encoding="ascii").strip() for path in files]
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=32 << 20)


# --- `tersor bench` ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """One way to compute a linear of n x k.

    scheme: None for 16-bit values. kernel: that serves one token, "torch" for torch's own.
    bits: of memory a weight takes. seconds: by number of tokens.
    """

    scheme: Scheme | None
    sparse: bool
    kernel: str
    bits: float
    seconds: dict[int, float]


def compare(
    n: int,
    k: int,
    tokens: Sequence[int],
    group: int | None = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Timed]:
    """torch's 16-bit linear, and every scheme that a kernel serves, with and without leaving out
    2:4 zeros. The first is torch's. dtype: bfloat16 or float16, of inputs and 16-bit weights.
    W8A8 has a scale per row, the others one per group."""
    if k % 16:
        raise TersorError(f"k={k} is no multiple of 16, as every group of columns is; give one")
    ways = list(_ways(n, k, group, dtype))
    seconds: list[dict[int, float]] = [{} for _ in ways]
    for m in tokens:
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        calls = [way.call(x) for way in ways]
        for each, taken in zip(seconds, in_turn(*calls), strict=True):
            each[m] = taken
        sizes = [8 * weight.nbytes / (n * k) for _, weight in calls]
    return [
        Timed(way.scheme, way.sparse, way.kernel, bits, taken)
        for way, bits, taken in zip(ways, sizes, seconds, strict=True)
    ]


@dataclass(frozen=True)
class _Way:
    scheme: Scheme | None
    sparse: bool
    kernel: str
    weight: QWeight | Tensor

    def call(self, x: Tensor) -> tuple[Call, Tensor]:
        if isinstance(self.weight, Tensor):
            return (sparse_call if self.sparse else torch_call)(x, self.weight)
        assert self.scheme is not None
        pattern = PATTERN if self.sparse else (0, 0)
        return quantized_call(x, self.weight, self.scheme.activation, pattern)


def _ways(n: int, k: int, group: int | None, dtype: torch.dtype) -> Iterator[_Way]:
    values = random_values(n, k, dtype)
    yield _Way(None, False, "torch", values)
    if kernel := _serving(explain_values(1, n, k, dtype, dtype, PATTERN)):
        yield _Way(None, True, kernel, values)
    for bits, activation in itertools.product((4, 8), (None, ActSpec())):
        scheme = Scheme(QSpec(bits, None if bits == 8 and activation else group), activation)
        q, served = random_qweight(n, k, scheme.weight, dtype, pattern=PATTERN), set()
        for sparse, pattern in ((False, (0, 0)), (True, PATTERN)):
            rows = explain(1, n, k, scheme.weight, activation, dtype, pattern=pattern)
            kernel = _serving(rows)
            if kernel is not None and kernel not in served:
                yield _Way(scheme, sparse, kernel, q)
            served.add(kernel)


def shapes_of(folder: str | Path) -> dict[tuple[int, int], int]:
    """(n, k) of the linears in a model's blocks, and how many there are of each."""
    from tersor.checkpoint import Checkpoint
    from tersor.models import build_skeleton, find_arch, plain_linears

    model = build_skeleton(Checkpoint.open(folder).config)
    found = find_arch(model)
    plain_linears(model, found.arch)
    shapes: dict[tuple[int, int], int] = {}
    for _, block in found.blocks(model):
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                shape = module.out_features, module.in_features
                shapes[shape] = shapes.get(shape, 0) + 1
    return shapes


def _serving(rows: Sequence[tuple[str, str | None]]) -> str | None:
    return next((name for name, reason in rows if reason is None), None)


def table(title: str, rows: Sequence[Timed]) -> Table:
    """Milliseconds, and how many times as fast as torch."""
    from rich.table import Table

    shown = Table(title=title)
    for head in ("weight", "zeros", "kernel for 1 token", "bits"):
        shown.add_column(head)
    for m in rows[0].seconds:
        shown.add_column(f"{m} token{'s' * (m > 1)}", justify="right")
    for row in rows:
        cells = [
            f"{1e3 * taken:.3f} ms  {rows[0].seconds[m] / taken:5.2f}×"
            for m, taken in row.seconds.items()
        ]
        name = str(row.scheme) if row.scheme else "16 bits"
        shown.add_row(name, "left out" if row.sparse else "", row.kernel, f"{row.bits:.2f}", *cells)
    return shown


def to_dict(n: int, k: int, rows: Sequence[Timed]) -> dict[str, Any]:
    return {
        "n": n,
        "k": k,
        "rows": [
            {
                "scheme": str(row.scheme) if row.scheme else "16 bits",
                "sparse": row.sparse,
                "kernel": row.kernel,
                "bits_per_weight": round(row.bits, 4),
                "seconds": row.seconds,
            }
            for row in rows
        ],
    }
