"""Weights and linear layers on NVIDIA GPUs: the native CUDA kernels seen from Python.

A weight in CUDA order is a uint8 tensor on the device, without a header, so that no call has to
read from the device what it is: its Grid goes along with it. All kernels share that order.

The kernels serve few tokens, in float16 and bfloat16; with int8 activations any number. Many
tokens, float32 and the backward pass go through a weight that is dequantized for the call, and
torch's product. Kernels that leave 2:4 zeros out have an order of their own; 16-bit values are in
no other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tersor import _core, cuda_calls, cuda_int8
from tersor.activations import rounded
from tersor.errors import TersorError
from tersor.kernels import (
    DTYPES,
    PATTERN,
    define_backward,
    define_operator,
    dtype_code,
    is_eager,
    keeps_pattern,
    recentre,
    rows_of,
    stored_bits,
)
from tersor.qweight import ActSpec, QSpec, QWeight
from tersor.two_level import split_scales

_SLAB = 256 << 20  # bytes of a dequantized weight that are there at a time
_TOKENS = 4096  # with int8 activations, in one call
_SPARSE = (8, 0)  # the first compute capability with products that leave zeros out
_WIDEST_SUM = 131071  # columns of int8 products that fit in int32


@dataclass(frozen=True)
class Grid:
    """What the bytes of a weight in CUDA order stand for, and how activations meet it; bits,
    asymmetric, scale_dtype and activation as in kernel.h. sparse: without 2:4 zeros. two_level: the
    scales are kept as those of the rows and multipliers, which int8 activations gain from."""

    n: int
    k: int
    g: int
    bits: int
    asymmetric: bool
    scale_dtype: int
    activation: int
    sparse: bool = False
    two_level: bool = False

    @classmethod
    def of(cls, q: QWeight, activation: ActSpec | None, sparse: bool = False) -> Grid:
        whole = activation is not None and activation.outliers is None and _levels(q) is not None
        return cls.of_spec(q.n, q.k, q.spec, activation, q.scales.dtype, sparse, whole)

    @classmethod
    def of_spec(
        cls,
        n: int,
        k: int,
        spec: QSpec,
        activation: ActSpec | None,
        scale_dtype: torch.dtype = torch.bfloat16,
        sparse: bool = False,
        two_level: bool = False,
    ) -> Grid:
        return cls(
            n, k, k // spec.groups(k), stored_bits(spec), not spec.symmetric,
            dtype_code(scale_dtype), int(activation is not None), sparse, two_level,
        )  # fmt: skip

    @classmethod
    def of_values(cls, w: Tensor) -> Grid:
        """w: bfloat16 or float16 [n, k] with 2:4 zeros."""
        n, k = w.shape
        return cls(n, k, k, 16, False, dtype_code(w.dtype), 0, True)

    @property
    def layout(self) -> str:
        return "CUDA without zeros" if self.sparse else "CUDA"

    def fields(self) -> tuple[int, int, int, int, bool, int, int, bool, bool]:
        shape, codes = (self.n, self.k, self.g), (self.bits, self.asymmetric, self.scale_dtype)
        return *shape, *codes, self.activation, self.sparse, self.two_level


_FIELDS = len(fields(Grid))


def unavailable(device: torch.device | None = None) -> str | None:
    """Why no CUDA kernel can run here, or on that device; None where one can."""
    reason: str | None = _core.cuda_unavailable()
    if reason is None and not torch.cuda.is_available():
        reason = f"torch {torch.__version__} is not built for CUDA; install a torch that is"
    if reason is None and device is not None:
        reason = _core.cuda_refuses_device(device.index or 0)
    return reason


def built() -> bool:
    """Whether this build has CUDA kernels, if for another machine."""
    return bool(_core.cuda_architectures())


def status() -> str:
    """Whether CUDA kernels can run here, and for what this build has some; a phrase."""
    if (reason := unavailable()) is not None:
        return reason
    return f"{torch.cuda.get_device_name()} can run them, built for {_core.cuda_architectures()}"


def serving(m: int, grid: Grid, dtype: torch.dtype) -> str:
    """What serves such a product on the current device, or why nothing does; a phrase."""
    if (reason := unavailable()) is not None:
        return reason
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := refusal(grid, device)) is not None:
        return reason
    name = kernel(m, grid, dtype, device)
    return f"{name} serves" if name else "torch serves, with a weight dequantized for the call"


def kernel(m: int, grid: Grid, dtype: torch.dtype, device: torch.device) -> str:
    """The name of the kernel that serves m tokens of the dtype on a device, or ""."""
    number = cuda_calls.place(device)[0]
    found: str = _core.cuda_serves(_weight(*grid.fields()), m, dtype_code(dtype), number)
    return found


def refusal(grid: Grid, device: torch.device | None = None) -> str | None:
    """Why such a weight cannot be on GPUs, or on this one; None where it can."""
    reason: str | None = _core.cuda_refuses(*_native(*grid.fields()))
    if reason is None and grid.sparse and device is not None:
        found = torch.cuda.get_device_capability(device)
        if found < _SPARSE:
            return (
                f"kernels that leave zeros out need compute capability {_SPARSE[0]}.{_SPARSE[1]}, "
                f"this GPU has {found[0]}.{found[1]}"
            )
    return reason


def _native(*fields: Any) -> tuple[Any, ...]:
    """The fields of a Grid as the native functions take them."""
    *grid, sparse, two_level = fields
    return *grid, *(PATTERN if sparse else (0, 0)), two_level


@functools.lru_cache(maxsize=4096)
def _weight(*fields: Any) -> _core.CudaWeight:
    """Checked once for each shape of a model."""
    return _core.CudaWeight(*_native(*fields))


def _levels(q: QWeight) -> tuple[Tensor, Tensor] | None:
    """The scales of the rows and the multipliers of the groups, where q is on a two-level grid that
    the kernels know."""
    known = stored_bits(q.spec) == 4 and q.spec.symmetric and q.spec.group is not None
    return split_scales(q.scales) if known and q.k <= _WIDEST_SUM else None


# --- CUDA order and back --------------------------------------------------------------------------


def pack_weight(
    q: QWeight,
    device: torch.device,
    activation: ActSpec | None = None,
    sparse: bool = False,
) -> Tensor:
    """The weight in CUDA order on a device, whose Grid is Grid.of(q, activation, sparse). q: on any
    device, without an order. sparse: without its 2:4 zeros; TersorError where it has fewer."""
    if (reason := unavailable()) is not None:
        raise TersorError(f"the layer cannot run on {device}: {reason}")
    if q.order is not None:
        raise TersorError("pack_weight needs contiguous groups; sort the columns by q.order first")
    grid, q = Grid.of(q, activation, sparse), q.to(device)
    weight = _weight(*grid.fields())
    codes = (q.codes + recentre(q.spec)).contiguous()
    scales, zeros = (_levels(q) if grid.two_level else None) or (q.scales, q.zeros)
    scales, zeros = scales.contiguous(), None if zeros is None else zeros.contiguous()
    if int(codes.max()) >> stored_bits(q.spec):
        raise TersorError(f"codes must be below {1 << stored_bits(q.spec)}")
    if sparse and not keeps_pattern(q, *PATTERN):
        raise TersorError("the codes are not 2:4; pack them with their zeros")
    return _pack(weight, codes, scales, zeros)


def pack_values(w: Tensor, device: torch.device) -> Tensor:
    """A weight of bfloat16 or float16 values [n, k] in CUDA order, without its 2:4 zeros;
    TersorError where it has fewer. The sign of a zero is not kept."""
    if (reason := unavailable()) is not None:
        raise TersorError(f"the layer cannot run on {device}: {reason}")
    w = w.detach().to(device).contiguous()
    weight = _weight(*Grid.of_values(w).fields())
    if not keeps_pattern(w, *PATTERN):
        raise TersorError("the values are not 2:4; keep the nn.Linear")
    return _pack(weight, w, None, None)


def _pack(
    weight: _core.CudaWeight, codes: Tensor, scales: Tensor | None, zeros: Tensor | None
) -> Tensor:
    packed = torch.empty(weight.bytes, dtype=torch.uint8, device=codes.device)
    _core.cuda_pack(
        weight, codes.data_ptr(), 0 if scales is None else scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(), packed.data_ptr(), packed.numel(),
        *cuda_calls.place(codes.device),
    )  # fmt: skip
    return packed


def unpack_weight(packed: Tensor, grid: Grid, spec: QSpec) -> QWeight:
    """The inverse of pack_weight, exactly, on the device of `packed`."""
    groups = grid.k // grid.g
    codes = torch.empty(grid.n, grid.k, dtype=torch.uint8, device=packed.device)
    scales = torch.empty(
        grid.n, 1 if grid.two_level else groups, dtype=DTYPES[grid.scale_dtype],
        device=packed.device,
    )  # fmt: skip
    zeros = None
    if grid.asymmetric or grid.two_level:
        zeros = torch.empty(grid.n, groups, dtype=torch.uint8, device=packed.device)
    _core.cuda_unpack(
        _weight(*grid.fields()), packed.data_ptr(), packed.numel(), codes.data_ptr(),
        scales.data_ptr(), 0 if zeros is None else zeros.data_ptr(),
        *cuda_calls.place(packed.device),
    )  # fmt: skip
    if grid.two_level:
        scales, zeros = scales * zeros, None  # exact, in the dtype of the scales
    return QWeight(spec, codes.sub_(recentre(spec)), scales, zeros)


def unpack_values(packed: Tensor, grid: Grid) -> Tensor:
    """The inverse of pack_values: [n, k], on the device of `packed`."""
    w = torch.empty(grid.n, grid.k, dtype=DTYPES[grid.scale_dtype], device=packed.device)
    _core.cuda_unpack(
        _weight(*grid.fields()), packed.data_ptr(), packed.numel(), w.data_ptr(), 0, 0,
        *cuda_calls.place(packed.device),
    )  # fmt: skip
    return w


def dequantize(packed: Tensor, grid: Grid, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows [begin, end) of the weight: [end - begin, k] of the dtype."""
    w = torch.empty(end - begin, grid.k, dtype=dtype, device=packed.device)
    _core.cuda_dequantize(
        _weight(*grid.fields()), packed.data_ptr(), packed.numel(), begin, end, w.data_ptr(),
        dtype_code(dtype), *cuda_calls.place(packed.device),
    )  # fmt: skip
    return w


# --- the operator ---------------------------------------------------------------------------------


def _product(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    grid: Grid,
    outliers: float | None = None,
    input_scale: Tensor | None = None,
    quantized: Tensor | None = None,
) -> Tensor:
    """quantized: x as int8, if it is that already (cuda_int8)."""
    n, k, m = grid.n, grid.k, x.numel() // grid.k
    y = x.new_empty((*x.shape[:-1], n))
    if m == 0:
        return y
    if x.dtype != torch.float32:
        if grid.activation and quantized is None:
            quantized = cuda_int8.quantize(x, grid.g, outliers, input_scale)
        if _served(x, packed, bias, grid, quantized, outliers is not None, y):
            return y
    matrix, rows = rows_of(x, k), y.view(m, n)
    if grid.activation:
        matrix = rounded(matrix, ActSpec(outliers=outliers), input_scale)
    for part in _slabs(n, k, matrix.element_size()):
        w = dequantize(packed, grid, part.start, part.stop, matrix.dtype)
        if bias is None:
            rows[:, part] = matrix @ w.t()
        else:
            rows[:, part] = torch.addmm(bias[part].to(matrix.dtype), matrix, w.t())
    return y


def _served(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    grid: Grid,
    quantized: Tensor | None,
    apart: bool,
    y: Tensor,
) -> bool:
    """x [..., k] of 16 bits -> y [..., n], or False where no kernel serves. apart: some columns may
    be in 16 bits beside those of `quantized`."""
    (rows, stride), m = cuda_calls.rows(x, grid.k), x.numel() // grid.k
    weight, code = _weight(*grid.fields()), dtype_code(x.dtype)
    device, stream = cuda_calls.place(x.device)
    workspace = cuda_calls.workspace(device)
    # With outliers a tile has half as many rows, and there are only so many tiles.
    tokens = m if not grid.activation else _TOKENS // 2 if apart else _TOKENS
    for begin in range(0, m, tokens):
        served: bool = _core.cuda_linear(
            weight, packed.data_ptr(), packed.numel(),
            rows.data_ptr() + begin * stride * 2, min(tokens, m - begin), stride, code,
            0 if bias is None else bias.data_ptr(), y.data_ptr() + begin * grid.n * 2, grid.n,
            workspace.data_ptr(), workspace.numel(),
            0 if quantized is None else quantized.data_ptr(),
            0 if quantized is None else quantized.numel(), m, begin, apart, device, stream,
        )  # fmt: skip
        if not served:
            return False
    return True


def _linear(
    x: Tensor, packed: Tensor, bias: Tensor | None,
    n: int, k: int, g: int, bits: int, asymmetric: bool, scale_dtype: int, activation: int,
    sparse: bool, two_level: bool, outliers: float | None = None,
    input_scale: Tensor | None = None, quantized: Tensor | None = None,
) -> Tensor:  # fmt: skip
    grid = Grid(n, k, g, bits, asymmetric, scale_dtype, activation, sparse, two_level)
    return _product(x, packed, bias, grid, outliers, input_scale, quantized)


def _slabs(n: int, k: int, element: int) -> list[slice]:
    rows = max(1, _SLAB // (k * element))
    return [slice(begin, min(begin + rows, n)) for begin in range(0, n, rows)]


def _linear_fake(
    x: Tensor, packed: Tensor, bias: Tensor | None,
    n: int, k: int, g: int, bits: int, asymmetric: bool, scale_dtype: int, activation: int,
    sparse: bool, two_level: bool, outliers: float | None = None,
    input_scale: Tensor | None = None, quantized: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], n))


def _backward_product(
    grad: Tensor, packed: Tensor,
    n: int, k: int, g: int, bits: int, asymmetric: bool, scale_dtype: int, activation: int,
    sparse: bool, two_level: bool,
) -> Tensor:  # fmt: skip
    """grad [..., n] @ dequantize(W) [n, k], summed in float32."""
    grid = Grid(n, k, g, bits, asymmetric, scale_dtype, activation, sparse, two_level)
    matrix = rows_of(grad, n)
    slabs = _slabs(n, k, grad.element_size())
    parts = (
        matrix[:, part] @ dequantize(packed, grid, part.start, part.stop, grad.dtype)
        for part in slabs
    )
    if len(slabs) == 1:
        result = next(parts)
    else:
        result = functools.reduce(torch.add, (part.float() for part in parts)).to(grad.dtype)
    return result.view(*grad.shape[:-1], k)


def _backward_fake(
    grad: Tensor, packed: Tensor,
    n: int, k: int, g: int, bits: int, asymmetric: bool, scale_dtype: int, activation: int,
    sparse: bool, two_level: bool,
) -> Tensor:  # fmt: skip
    return grad.new_empty((*grad.shape[:-1], k))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.grid = inputs[3 : 3 + _FIELDS]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (packed,) = ctx.saved_tensors
    return torch.ops.tersor.linear_cuda_backward(grad, packed, *ctx.grid), *(None,) * (_FIELDS + 5)


_GRID = (
    "int n, int k, int g, int bits, bool asymmetric, int scale_dtype, int activation, bool sparse, "
    "bool two_level"
)
define_operator(
    f"linear_cuda_backward(Tensor grad, Tensor packed, {_GRID}) -> Tensor",
    "CUDA",
    _backward_product,
    _backward_fake,
)
define_operator(
    f"linear_cuda(Tensor x, Tensor packed, Tensor? bias, {_GRID}, float? outliers=None, "
    "Tensor? input_scale=None, Tensor? quantized=None) -> Tensor",
    "CUDA",
    _linear,
    _linear_fake,
)
define_backward("linear_cuda", _save_for_backward, _backward)


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    grid: Grid,
    outliers: float | None = None,
    scale: tuple[Tensor, float] | None = None,
    shared: tuple[object, cuda_int8.Shared] | None = None,
) -> Tensor:
    """x [..., k] @ dequantize(W).T + bias -> [..., n], all on one device. x: float16, bfloat16 or
    float32; bias: float32 [n] or None; outliers: of int8 activations (see ActSpec); scale: of
    static ones, as a float32 [1] on the device, and as a number; shared: who calls, and what it
    shares with others that read x."""
    if x.device != packed.device:
        raise TersorError(f"the input is on {x.device}, the layer on {packed.device}; move one")
    if x.dim() == 0 or x.shape[-1] != grid.k:
        raise TersorError(f"the layer takes inputs [..., {grid.k}], not {list(x.shape)}")
    dtype_code(x.dtype)
    tensor, quantized = scale[0] if scale else None, None
    int8 = grid.activation and x.dtype != torch.float32
    if x.is_cuda and is_eager(x):
        if int8 and shared is not None:
            user, others = shared
            quantized = others.of(user, x, grid.g, outliers, scale)
        return _product(x, packed, bias, grid, outliers, tensor, quantized)
    if int8:  # of its own, so that equal ones in a graph become one
        quantized = torch.ops.tersor.quantize_cuda(x.detach(), grid.g, outliers, tensor)
    y: Tensor = torch.ops.tersor.linear_cuda(
        x, packed, bias, *grid.fields(), outliers, tensor, quantized
    )
    return y
