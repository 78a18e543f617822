"""The CUDA kernels on the CPU: tests/emulator compiled, with numpy arrays in and out."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tersor import _core, cuda_solver

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of enum tersor_dtype


def compiler() -> str | None:
    """A C++ compiler of this machine."""
    configured = (sysconfig.get_config_var("CXX") or "").split()
    for name in (os.environ.get("CXX"), *configured[:1], "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    return None


_built: dict[str, ctypes.CDLL] = {}  # by source, once in a process


def build(folder: Path, source: str = "emulate") -> ctypes.CDLL:
    """One of the files of tests/emulator, compiled."""
    if source in _built:
        return _built[source]
    library = folder / f"{source}.so"
    command = [
        compiler(), "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC",
        "-Wall", "-Wextra", "-Wno-unknown-pragmas",
        "-I", ROOT / "csrc", "-I", ROOT / "tests" / "emulator",
        ROOT / "tests" / "emulator" / f"{source}.cpp", "-o", library,
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    if source == "emulate":
        loaded.packed_bytes.restype = loaded.quantized_bytes.restype = ctypes.c_int64
    _built[source] = loaded
    return loaded


def pointer(array: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if array is None else array.data_ptr())


@dataclass
class Weight:
    """A random weight in portable order.

    sparse: that 2:4 zeros are left out. bits: 16 for values, which are the codes; then the scales
    [n, 1] are none, but for their dtype.
    """

    codes: Tensor  # uint8 [n, k]
    scales: Tensor  # [n, k / g]
    zeros: Tensor | None
    bits: int
    sparse: bool = False
    multipliers: Tensor | None = None  # uint8 [n, k / g]; then the scales are [n, 1]

    @classmethod
    def random(
        cls, n: int, k: int, g: int, bits: int, asymmetric: bool, dtype: torch.dtype, seed: int = 0
    ) -> Weight:
        draw = torch.Generator().manual_seed(seed)
        codes = torch.randint(1 << bits, (n, k), generator=draw, dtype=torch.uint8)
        scales = (torch.rand(n, k // g, generator=draw) + 0.5).to(dtype)
        zeros = torch.randint(1 << bits, (n, k // g), generator=draw, dtype=torch.uint8)
        return cls(codes, scales, zeros if asymmetric else None, bits)

    @classmethod
    def pruned(
        cls, n: int, k: int, g: int, bits: int, asymmetric: bool, dtype: torch.dtype, seed: int = 0
    ) -> Weight:
        """2:4: two codes of every four are the zero point, and of some fours three or all. bits: 4,
        or 16 for values of the dtype, with the signs of zeros."""
        draw = torch.Generator().manual_seed(seed)
        order = torch.rand(n, k // 4, 4, generator=draw).argsort(dim=-1)
        kept = torch.tensor([0, 1, 2, 2, 2, 2])[torch.randint(6, (n, k // 4, 1), generator=draw)]
        pruned = (order >= kept).view(n, k)
        if bits == 16:
            values = torch.randn(n, k, generator=draw)
            values = torch.where(pruned, values.sign() * 0.0, values).to(dtype)
            return cls(values, torch.zeros(n, 1, dtype=dtype), None, 16, True)
        made = cls.random(n, k, g, bits, asymmetric, dtype, seed)
        zeros = torch.full_like(made.codes, 1 << (bits - 1))
        if made.zeros is not None:
            zeros = made.zeros.repeat_interleave(g, dim=1)
        made.codes, made.sparse = torch.where(pruned, zeros, made.codes), True
        return made

    @classmethod
    def two_level(cls, n: int, k: int, g: int, dtype: torch.dtype, seed: int = 0) -> Weight:
        weight = cls.random(n, k, k, 4, False, dtype, seed)
        draw = torch.Generator().manual_seed(seed)
        weight.multipliers = torch.randint(1, 16, (n, k // g), generator=draw, dtype=torch.uint8)
        return weight

    @property
    def g(self) -> int:
        grid = self.scales if self.multipliers is None else self.multipliers
        return self.codes.shape[1] // grid.shape[1]

    def spec(self) -> ctypes.Array[ctypes.c_int64]:
        n, k = self.codes.shape
        scale_bytes = 0 if self.bits == 16 else self.scales.element_size()
        grid = (self.zeros is not None, scale_bytes, self.sparse, self.multipliers is not None)
        return (ctypes.c_int64 * 8)(n, k, self.g, self.bits, *grid)

    def dense(self) -> np.ndarray:
        """float64 [n, k]."""
        codes = self.codes.double().numpy()
        if self.bits == 16:
            return codes
        scales = self.scales.double()
        if self.multipliers is not None:
            scales = scales * self.multipliers
        scales = np.repeat(scales.numpy(), self.g, axis=1)
        if self.zeros is None:
            return (codes - (1 << (self.bits - 1))) * scales
        return (codes - np.repeat(self.zeros.double().numpy(), self.g, axis=1)) * scales

    def empty(self) -> Weight:
        zeros = None if self.zeros is None else torch.full_like(self.zeros, 0xEE)
        scales = torch.full_like(self.scales, float("nan"))
        multipliers = None if self.multipliers is None else torch.full_like(self.multipliers, 0xEE)
        codes = torch.full_like(self.codes, 0xEE)
        return Weight(codes, scales, zeros, self.bits, self.sparse, multipliers)

    def _arrays(self) -> tuple[ctypes.c_void_p, ...]:
        scales = None if self.bits == 16 else self.scales
        zeros = self.zeros if self.multipliers is None else self.multipliers
        return pointer(self.codes), pointer(scales), pointer(zeros)

    def pack(self, library: ctypes.CDLL, workers: int = 3) -> Tensor:
        size = library.packed_bytes(self.spec())
        room = torch.full((size + 256,), 0xEE, dtype=torch.uint8)
        begin = -room.data_ptr() % 128
        packed = room[begin : begin + size]
        library.pack(self.spec(), pointer(packed), *self._arrays(), workers)
        assert bool((room[begin + size :] == 0xEE).all()) and bool((room[:begin] == 0xEE).all())
        return packed

    def unpack(self, library: ctypes.CDLL, packed: Tensor, workers: int = 2) -> Weight:
        made = self.empty()
        library.unpack(self.spec(), pointer(packed), *made._arrays(), workers)
        return made

    def dequantize(
        self, library: ctypes.CDLL, packed: Tensor, begin: int, end: int, dtype: torch.dtype
    ) -> Tensor:
        made = torch.full((end - begin, self.codes.shape[1]), float("nan"), dtype=dtype)
        library.dequantize(
            self.spec(), DTYPES.index(self.scales.dtype), pointer(packed),
            ctypes.c_int64(begin), ctypes.c_int64(end), pointer(made), DTYPES.index(dtype), 2,
        )  # fmt: skip
        return made


def linear(
    library: ctypes.CDLL,
    weight: Weight,
    packed: Tensor,
    x: Tensor,
    bias: Tensor | None,
    kernel: tuple[str, int],
    resident: int,
    seed: int,
    eager: bool,
    outliers: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """kernel: "mma", "wgmma", "int8", "rows" or "outliers", and the tokens of a tile; any where
    zeros are left out.
    x [m, k] with any row stride that is a multiple of 8 -> [m, n]. What lies around y is
    watched. outliers: columns beyond this stay in 16 bits, by the kernel of that name. scale: of
    int8 activations, or None for one of each token."""
    m, n = x.shape[0], weight.codes.shape[0]
    room = torch.full((m + 2, n + 3), float("nan"), dtype=x.dtype)
    y = room[1:-1, :n]
    quantized, tokens = None, max(m, kernel[1])
    if kernel[0] in ("int8", "rows", "outliers"):
        threshold = outliers if kernel[0] == "outliers" else 0.0
        quantized = quantize(library, x, weight.g, threshold, scale, tokens, seed, eager)
    library.linear(
        weight.spec(), DTYPES.index(weight.scales.dtype), pointer(packed), pointer(x), pointer(y),
        pointer(bias), m, ctypes.c_int64(x.stride(0)), ctypes.c_int64(y.stride(0)),
        DTYPES.index(x.dtype), kernel[0].encode(), kernel[1], resident, seed, int(eager),
        pointer(quantized), *map(ctypes.c_int64, (tokens, 0)),
    )  # fmt: skip
    around = room.clone()
    around[1:-1, :n] = float("nan")
    assert bool(around.isnan().all())
    return y


def quantize(
    library: ctypes.CDLL,
    x: Tensor,
    g: int,
    outliers: float = 0.0,
    scale: float | None = None,
    room: int = 0,
    seed: int = 0,
    eager: bool = False,
) -> Tensor:
    """x [m, k] as int8 (csrc/cuda/layout_int8.h), in memory for `room` tokens or more."""
    m, k = x.shape
    room = max(m, room)
    sizes = [*map(ctypes.c_int64, (room, k, g))]
    size = library.quantized_bytes(*sizes)
    memory = torch.full((size + 256,), 0x55, dtype=torch.uint8)
    given = None if scale is None else torch.tensor([scale])
    begin = -memory.data_ptr() % 128
    made = memory[begin : begin + size]
    library.quantize(
        pointer(x), m, *sizes, ctypes.c_int64(x.stride(0)), DTYPES.index(x.dtype),
        ctypes.c_float(outliers), pointer(given), pointer(made), seed, int(eager),
    )  # fmt: skip
    assert bool((memory[begin + size :] == 0x55).all()) and bool((memory[:begin] == 0x55).all())
    return made


def find_outliers(library: ctypes.CDLL, x: Tensor, threshold: float, seed: int = 0) -> Tensor:
    """A bit for each column of x [m, k]: uint8 [steps * 8]."""
    k = x.shape[1]
    return quantize(library, x, k, threshold, seed=seed)[-(-(-k // 64) * 8) :]


def as_int8(
    x: np.ndarray, outliers: float = np.inf, scale: float | np.ndarray | None = None
) -> np.ndarray:
    """What int8 activations stand for, as compressed-tensors defines them; in float32 as there.
    Columns with a finite value beyond `outliers` stay as they are. scale: or one of each token."""
    x = x.astype(np.float32)
    exact = ((np.abs(x) > np.float32(outliers)) & np.isfinite(x)).any(axis=0)
    rest = np.where(exact, 0, x)
    if scale is None:
        scale = np.abs(rest).max(axis=1, keepdims=True) / np.float32(127.5)
    scale = np.asarray(scale, np.float32)
    codes = np.clip(np.rint(rest / np.where(scale > 0, scale, 1)), -128, 127)
    return np.where(exact, x, codes.astype(np.float64) * scale.astype(np.float64))


def use_solver(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of emulate_solve.cpp in the place of those that need a GPU; tensors are on the
    CPU."""
    long = ctypes.c_int64
    seeds = iter(range(1 << 30))

    def search_grid(w, group, bits, symmetric, clip, scale_dtype, scales, zeros, stream):
        library.search_grid(
            long(scales.numel()), long(group), pointer(w), bits, symmetric, clip, scale_dtype,
            pointer(scales), pointer(zeros),
        )  # fmt: skip

    def solve_block(
        w, unit, values, first, width, *, scales, zeros, group_of_column, levels, keep, pivots,
        kept, of, codes, errors, losses, stream,
    ):  # fmt: skip
        assert all(each.is_contiguous() for each in (w, unit, values))
        assert keep is None or keep.stride(1) == 1
        library.solve_block(
            *map(long, (*w.shape, scales.shape[1] if scales is not None else 0)), first, width,
            *map(pointer, (w, unit, values, scales, zeros, group_of_column)), levels, pointer(keep),
            long(keep.stride(0) if keep is not None else 0), pointer(pivots), kept, of,
            *map(pointer, (codes, errors, losses)), next(seeds),
        )  # fmt: skip

    monkeypatch.setattr(_core, "cuda_search_grid", search_grid)
    monkeypatch.setattr(_core, "cuda_solve_block", solve_block)
    monkeypatch.setattr(cuda_solver, "_stream", lambda tensor: 0)
