"""The contract tests of a kernel, for the kernels in this package and for anyone else's.

    from tersor import testing
    testing.check_kernel("w4a8_avx2")        # a kernel that tersor knows, by name
    testing.check_capsule(my_package.kernels())   # a table that has not been registered

Everything here talks to a kernel through the C struct of kernel.h, as the dispatcher does, so that
what is tested is the contract itself. The expected values come from `oracle`, a float64 product
with an error bound that follows from the arithmetic. A failed check raises AssertionError.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.oracle import assert_close, oracle, random_qweight, random_values
from tersor.qweight import ActSpec, QSpec, QWeight

__all__ = (
    *("SHAPES", "SPARSE_SHAPES", "Case", "Kernel", "cases", "check_capsule", "check_kernel"),
    *("kernel", "kernels_of", "assert_close", "oracle", "random_qweight", "random_values"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of enum tersor_dtype
GUARD = 256  # bytes watched on either side of every buffer that a kernel writes
ALIGN = 64
ABI = 1
CAPSULE = b"tersor.kernels.v1"


# --- the cases -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One request: shape m x n x k with groups of g, and how it is stored and computed. bits=16:
    values of scale_dtype and no scales, g = k."""

    m: int
    n: int
    k: int
    g: int
    bits: int
    symmetric: bool
    activation: ActSpec | None
    dtype: torch.dtype
    scale_dtype: torch.dtype
    bias: bool
    pattern: tuple[int, int] = (0, 0)  # kept, of: zeros that the kernel is told of

    def weight(self, seed: int) -> QWeight | Tensor:
        if self.bits == 16:
            return random_values(self.n, self.k, self.scale_dtype, seed, self.pattern)
        spec = QSpec(self.bits, None if self.g == self.k else self.g, self.symmetric)
        return random_qweight(self.n, self.k, spec, self.scale_dtype, seed, self.pattern)


# Every dimension below, at and above the widths of registers and tiles, and ragged tails.
SHAPES = (
    (1, 1, 1, 1), (1, 16, 16, 16), (1, 17, 33, 33), (2, 15, 48, 16), (3, 33, 64, 32),
    (4, 16, 128, 128), (5, 31, 160, 32), (6, 65, 336, 112), (7, 64, 96, 48), (8, 100, 256, 128),
    (9, 40, 384, 64), (16, 48, 256, 64), (17, 66, 80, 16), (33, 37, 272, 272), (64, 16, 128, 64),
    (130, 7, 112, 112), (1, 131, 512, 128), (2, 3, 1001, 1001),
)  # fmt: skip

# For weights with 2:4 zeros: groups of whole steps of 128 columns, and ragged rows and tokens.
SPARSE_SHAPES = (
    (1, 16, 128, 128), (1, 131, 512, 128), (2, 33, 256, 256), (3, 40, 384, 128), (4, 16, 640, 640),
    (5, 31, 512, 256), (7, 3, 256, 128), (8, 48, 256, 128), (9, 65, 384, 384), (17, 40, 256, 128),
    (66, 20, 384, 128), (130, 7, 256, 256), (2, 17, 8192, 8192),
)  # fmt: skip


Shape = tuple[int, int, int, int]  # m, n, k, g


def cases(shapes: Iterable[Shape] = SHAPES, sparse: Iterable[Shape] = ()) -> Iterator[Case]:
    """Every shape with every grid and dtype of activations; scale dtype and bias take turns. Those
    in `sparse` are of weights with 2:4 zeros."""
    shapes, turn = tuple(shapes), itertools.cycle(itertools.product(DTYPES, (True, False)))
    for (m, n, k, g), bits, symmetric, activation in itertools.product(
        shapes, (4, 8), (True, False), (None, ActSpec())
    ):
        for dtype in DTYPES:
            scale_dtype, bias = next(turn)
            yield Case(m, n, k, g, bits, symmetric, activation, dtype, scale_dtype, bias)
        next(turn)  # 3 dtypes, 6 turns: without this step each dtype would see two turns only
    for i, (m, n, k, g) in enumerate(shapes):  # with static activations: nine for all dtypes
        dtype, scale_dtype, static = DTYPES[i % 3], DTYPES[i // 3 % 3], ActSpec(dynamic=False)
        for bits, symmetric in itertools.product((4, 8), (True, False)):
            yield Case(m, n, k, g, bits, symmetric, static, dtype, scale_dtype, i % 2 == 0)
    for (m, n, k, g), bits, activation, dtype in itertools.product(
        sparse, (4, 8), (None, ActSpec()), DTYPES
    ):
        scale_dtype, bias = next(turn)
        yield Case(m, n, k, g, bits, True, activation, dtype, scale_dtype, bias, (2, 4))
        next(turn)
    for (m, n, k, _), values, dtype in itertools.product(sparse, DTYPES[1:], DTYPES):
        bias = next(turn)[1]
        yield Case(m, n, k, k, 16, True, None, dtype, values, bias, (2, 4))


# --- kernel.h, seen from Python ------------------------------------------------------------------

_I32, _I64, _U32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32
_P, _S, _SIZE = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t


class _Spec(ctypes.Structure):
    _fields_ = [("n", _I64), ("k", _I64), ("g", _I64), ("bits", _I32), ("asymmetric", _I32),
                ("scale_dtype", _I32), ("activation", _I32), ("kept", _I32),
                ("of", _I32)]  # fmt: skip


class _View(ctypes.Structure):
    _fields_ = [("codes", _P), ("scales", _P), ("zeros", _P)]


class _Args(ctypes.Structure):
    _fields_ = [("spec", _Spec), ("m", _I64), ("packed", _P), ("x", _P), ("y", _P),
                ("ldx", _I64), ("ldy", _I64), ("dtype", _I32), ("bias", _P),
                ("x_scale", _P), ("workspace", _P)]  # fmt: skip


_SPEC, _VIEW, _ARGS = ctypes.POINTER(_Spec), ctypes.POINTER(_View), ctypes.POINTER(_Args)


class Kernel(ctypes.Structure):
    """struct tersor_kernel: its fields can be read and its functions called from Python."""

    _fields_ = [
        ("name", _S), ("isa", _S), ("layout", _S), ("priority", _I32), ("column_step", _I64),
        ("unavailable", ctypes.CFUNCTYPE(_S)),
        ("refuses", ctypes.CFUNCTYPE(_S, _SPEC, _I64, _I32)),
        ("packed_bytes", ctypes.CFUNCTYPE(_SIZE, _SPEC)),
        ("pack", ctypes.CFUNCTYPE(None, _SPEC, _VIEW, _P, _I64, _I64)),
        ("unpack", ctypes.CFUNCTYPE(None, _SPEC, _P, _VIEW, _I64, _I64)),
        ("workspace_bytes", ctypes.CFUNCTYPE(_SIZE, _SPEC, _I64, _I32)),
        ("prepare", ctypes.CFUNCTYPE(None, _ARGS, _I64, _I64)),
        ("gemm", ctypes.CFUNCTYPE(None, _ARGS, _I64, _I64)),
    ]  # fmt: skip


class _Table(ctypes.Structure):
    _fields_ = [("abi", _U32), ("kernel_size", _U32), ("count", _U32),
                ("kernels", ctypes.POINTER(Kernel))]  # fmt: skip


def kernel(name: str) -> Kernel:
    """The kernel that tersor knows under this name."""
    from tersor import kernels

    for entry in kernels.table():
        if entry.name == name:
            return Kernel.from_address(entry.address)
    raise AssertionError(f"no kernel is called {name!r}; there are "
                         f"{', '.join(entry.name for entry in kernels.table())}")  # fmt: skip


def kernels_of(capsule: object) -> list[Kernel]:
    """The kernels in a PyCapsule such as the entry point `tersor.kernels` returns, checked."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = _P, [ctypes.py_object, _S]
    table = _Table.from_address(get(capsule, CAPSULE))  # ValueError on a capsule of another name
    assert table.abi == ABI, f"the table is of ABI {table.abi}, this tersor reads {ABI}"
    assert table.kernel_size == ctypes.sizeof(Kernel), (
        f"the table's kernels have {table.kernel_size} bytes, not {ctypes.sizeof(Kernel)}: "
        "it was built with another kernel.h"
    )
    assert table.count > 0, "the table is empty"
    return [table.kernels[i] for i in range(table.count)]


# --- the checks ----------------------------------------------------------------------------------


def check_capsule(capsule: object, weight_eps: float = 0.0) -> int:
    """Checks every kernel of a table that this machine can run; returns how many those are."""
    usable = [entry for entry in kernels_of(capsule) if entry.unavailable() is None]
    for entry in usable:
        check_kernel(entry, weight_eps)
    return len(usable)


def check_kernel(
    which: str | Kernel, weight_eps: float = 0.0, requests: Iterable[Case] | None = None
) -> int:
    """Runs a kernel over `requests` (by default `cases` of all shapes) and compares with `oracle`.

    For each request that the kernel serves: unpack is the exact inverse of pack; the results lie
    within the bound; nothing outside the buffers is written; what the buffers held before does
    not matter; results do not depend on how tokens, columns or rows were divided; a token that
    is not finite spoils its own row, visibly, and no other. `weight_eps`: see `oracle`.

    Returns the number of requests served; AssertionError when a check fails or none was served.
    """
    entry = kernel(which) if isinstance(which, str) else which
    reason = entry.unavailable()
    assert reason is None, f"{entry.name.decode()} cannot run here: {reason.decode()}"
    _check_fields(entry)
    served = 0
    everything = cases(SHAPES, SPARSE_SHAPES)
    for seed, case in enumerate(everything if requests is None else requests):
        run = _Run(entry, case, seed)
        if run.refused(0) is not None or run.refused(case.m) is not None:
            continue
        served += 1
        run.check_pack()
        run.check_results(weight_eps)
        run.check_isolation()
    assert served, f"{entry.name.decode()} refused every request"
    return served


def _check_fields(entry: Kernel) -> None:
    assert entry.name and entry.isa and entry.layout, "name, isa and layout must be set"
    assert len(entry.layout) <= 31, f"layout {entry.layout.decode()} is longer than 31 characters"
    assert entry.column_step > 0, "column_step must be positive"
    for field in ("refuses", "packed_bytes", "pack", "unpack", "workspace_bytes", "gemm"):
        assert getattr(entry, field), f"{field} must be set"


class _Buffer:
    """Aligned memory of a known size, filled with a byte, between two guards."""

    def __init__(self, size: int, fill: int) -> None:
        self.size = size
        self.memory = torch.full((size + 2 * GUARD + ALIGN,), fill, dtype=torch.uint8)
        self.start = GUARD + (-(self.memory.data_ptr() + GUARD)) % ALIGN
        self.fill = fill

    @property
    def pointer(self) -> int:
        return self.memory.data_ptr() + self.start

    def view(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return self.memory[self.start : self.start + self.size].view(dtype).view(shape)

    def check(self, what: str) -> None:
        end = self.start + self.size
        outside = torch.cat([self.memory[: self.start], self.memory[end:]])
        assert bool((outside == self.fill).all()), f"{what}: memory outside the buffer was written"


class _Run:
    """One kernel at one request."""

    def __init__(self, entry: Kernel, case: Case, seed: int) -> None:
        self.entry, self.case, self.seed = entry, case, seed
        self.spec = _Spec(
            case.n, case.k, case.g, case.bits, int(not case.symmetric),
            DTYPES.index(case.scale_dtype), int(case.activation is not None), *case.pattern,
        )  # fmt: skip
        self.q = case.weight(seed)
        r = torch.Generator().manual_seed(seed)
        self.x = torch.randn(case.m, case.k, generator=r).to(case.dtype)
        self.bias = torch.randn(case.n, generator=r) if case.bias else None
        # Of static activations: a power of two, so that ties are exact, and cut off is what is
        # beyond two standard deviations. Or each code is at an end of the range.
        static = case.activation is not None and not case.activation.dynamic
        self.input_scale = (2**-7 if seed % 4 == 3 else 2**-6) if static else None
        if seed % 4 == 3:  # the largest sums there are: integer accumulators must not saturate
            if isinstance(self.q, QWeight):
                zero = self.q.codes == self.q.spec.midpoint if case.pattern[1] else torch.tensor(0)
                self.q.codes.fill_(self.q.spec.levels - 1)
                self.q.codes.masked_fill_(zero.bool(), self.q.spec.midpoint)
            self.x = torch.where(self.x < 0, -1.0, 1.0).to(case.dtype)
            self.x[0] = 1.0
        elif case.m > 2:
            self.x[0] = 0.0  # a token without a scale
            steps = torch.randint(-126, 126, (case.k,), generator=r) + 0.5  # ties, all exact:
            self.x[1] = steps.to(case.dtype)
            self.x[1, 0] = 127.5  # the scale is 1

    def refused(self, m: int) -> bytes | None:
        reason: bytes | None = self.entry.refuses(self.spec, m, DTYPES.index(self.case.dtype))
        return reason

    def what(self) -> str:
        return f"{self.entry.name.decode()} at {self.case}"

    def parts(self) -> dict[str, Tensor | None]:
        """What a tersor_view points to."""
        if isinstance(self.q, Tensor):
            return {"codes": self.q, "scales": None, "zeros": None}
        return {"codes": self.q.codes, "scales": self.q.scales, "zeros": self.q.zeros}

    def packed(self, fill: int, bounds: list[int]) -> _Buffer:
        packed = _Buffer(self.entry.packed_bytes(self.spec), fill)
        view = _View(*(None if part is None else part.data_ptr() for part in self.parts().values()))
        for begin, end in itertools.pairwise(bounds):
            self.entry.pack(self.spec, view, packed.pointer, begin, end)
        packed.check(f"{self.what()}: pack")
        return packed

    def bounds(self, count: int, step: int, seed: int) -> list[int]:
        """0, a few random multiples of step in order, count."""
        r = torch.Generator().manual_seed(seed)
        cuts = torch.randint(0, (count + step - 1) // step, (3,), generator=r) * step
        return sorted({0, count, *(int(cut) for cut in cuts)})

    def run(self, packed: _Buffer, x: Tensor, fill: int, seed: int | None) -> Tensor:
        """y [m, n]; tokens and columns divided at random by the seed, or not at all."""
        case, entry = self.case, self.entry
        m, n, k = case.m, case.n, case.k
        rows = torch.full((m, k + 3), float("nan"), dtype=case.dtype)
        rows[:, 1 : k + 1] = x  # unaligned, and between columns that are not the kernel's
        workspace = _Buffer(entry.workspace_bytes(self.spec, m, DTYPES.index(case.dtype)), fill)
        y = _Buffer(m * (n + 5) * case.dtype.itemsize, fill)
        bias = None if self.bias is None else self.bias.data_ptr()
        scale = None if self.input_scale is None else torch.tensor([self.input_scale])
        args = _Args(self.spec, m, packed.pointer, rows[:, 1:].data_ptr(), y.pointer, k + 3, n + 5,
                     DTYPES.index(case.dtype), bias,
                     None if scale is None else scale.data_ptr(), workspace.pointer)  # fmt: skip
        tokens = [0, m] if seed is None else self.bounds(m, 1, seed)
        columns = [0, n] if seed is None else self.bounds(n, entry.column_step, seed + 1)
        if entry.prepare:
            for begin, end in itertools.pairwise(tokens):
                entry.prepare(args, begin, end)
        for begin, end in reversed(list(itertools.pairwise(columns))):
            entry.gemm(args, begin, end)
        workspace.check(f"{self.what()}: workspace")
        y.check(f"{self.what()}: y")
        beyond = y.view(torch.uint8, m, -1)[:, n * case.dtype.itemsize :]
        assert bool((beyond == fill).all()), f"{self.what()}: y was written beyond its columns"
        return y.view(case.dtype, m, n + 5)[:, :n]

    def check_pack(self) -> None:
        n, step = self.case.n, self.entry.column_step
        packed = self.packed(0xA5, self.bounds(n, step, self.seed))
        parts = {name: part for name, part in self.parts().items() if part is not None}
        buffers = {name: _Buffer(part.nbytes, 0xEE) for name, part in parts.items()}
        view = _View(**{name: buffer.pointer for name, buffer in buffers.items()})
        for begin, end in itertools.pairwise(self.bounds(n, step, self.seed + 1)):
            self.entry.unpack(self.spec, packed.pointer, view, begin, end)
        for name, expected in parts.items():
            buffers[name].check(f"{self.what()}: unpack of {name}")
            found = buffers[name].view(torch.uint8, -1)
            same = torch.equal(found, expected.view(torch.uint8).flatten())
            assert same, f"{self.what()}: unpack does not give back the {name}"

    def check_results(self, weight_eps: float) -> None:
        whole = self.packed(0xFF, [0, self.case.n])
        y = self.run(whole, self.x, 0xFF, None)
        expected, tolerance = oracle(
            self.x, self.q, self.bias, self.case.activation, weight_eps, self.input_scale
        )
        assert_close(y, expected, tolerance, self.what())
        parts = self.packed(0x5A, self.bounds(self.case.n, self.entry.column_step, self.seed + 2))
        again = self.run(parts, self.x, 0x5A, self.seed)
        assert torch.equal(y, again), (
            f"{self.what()}: results depend on how the work was divided, or on what the packed "
            "weight, the workspace or y held before"
        )

    def check_isolation(self) -> None:
        if self.case.m < 2:
            return
        packed = self.packed(0xFF, [0, self.case.n])
        clean = self.run(packed, self.x, 0xFF, None)
        x, row = self.x.clone(), self.case.m - 1
        x[row, self.seed % self.case.k] = float("nan" if self.seed % 2 else "inf")
        y = self.run(packed, x, 0xFF, None)
        assert torch.equal(y[:row], clean[:row]), (
            f"{self.what()}: a token that is not finite changes other rows"
        )
        assert not bool(torch.isfinite(y[row]).any()), (
            f"{self.what()}: a token that is not finite gives finite results"
        )
