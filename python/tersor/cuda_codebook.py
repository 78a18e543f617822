"""NF4 and FP4 weights on NVIDIA GPUs: the native CUDA kernels for them seen from Python.

As in tersor.cuda: a weight in CUDA order is a uint8 tensor without a header, and its Blocks go
along with it. Its bits are those that it has in portable order, scales included. A kernel serves up
to 64 tokens in float16 (from sm_75 on) and bfloat16 (sm_80); more tokens, other dtypes and the
backward pass go through a weight that is dequantized for the call, and torch's product.

Kernels multiply with the values of the codebook in 16 bits, of the dtype of x: FP4's are exact,
NF4's are off by at most half a unit in the last place, as a weight dequantized to 16 bits is. Sums
are float32, and the scales come into them as they are meant.
"""

from __future__ import annotations

import functools
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from tersor import _core, cuda, cuda_calls
from tersor.adapters.codebook import VALUES, Codebook, CodebookWeight, scale_shapes
from tersor.errors import TersorError
from tersor.kernels import (
    DTYPES,
    define_backward,
    define_operator,
    dtype_code,
    is_eager,
    rows_of,
)


@dataclass(frozen=True)
class Blocks:
    """What the bytes of a weight in CUDA order stand for. g: weights that share a scale; doubled:
    scales are quantized themselves; values: a key of VALUES."""

    n: int
    k: int
    g: int
    doubled: bool
    values: str

    @classmethod
    def of(cls, shape: tuple[int, int], spec: Codebook) -> Blocks:
        return cls(*shape, spec.block, spec.double, spec.values)

    def fields(self) -> tuple[int, int, int, bool, str]:
        return self.n, self.k, self.g, self.doubled, self.values


def refusal(blocks: Blocks) -> str | None:
    """Why no CUDA kernel takes such a weight here, or None where one does."""
    reason: str | None = cuda.unavailable() or _core.cuda_codebook_refuses(*astuple(blocks)[:4])
    return reason


def takes(blocks: Blocks, device: torch.device) -> bool:
    """Whether a weight on that device is to be in CUDA order."""
    return device.type == "cuda" and refusal(blocks) is None


def serving(m: int, blocks: Blocks, dtype: torch.dtype) -> str:
    """What serves such a product on the current device, or why nothing does; a phrase."""
    if (reason := refusal(blocks)) is not None:
        return f"torch serves, with a weight dequantized for the call: {reason}"
    place = torch.cuda.current_device()
    name = _core.cuda_codebook_serves(_weight(*blocks.fields()), m, dtype_code(dtype), place)
    return f"{name} serves" if name else "torch serves, with a weight dequantized for the call"


@functools.lru_cache(maxsize=4096)
def _weight(n: int, k: int, g: int, doubled: bool, values: str) -> _core.CudaCodebookWeight:
    """Checked once for each shape of a model."""
    return _core.CudaCodebookWeight(n, k, g, doubled, VALUES[values]().tolist())


# --- CUDA order and back --------------------------------------------------------------------------


def pack_weight(q: CodebookWeight) -> Tensor:
    """The weight in CUDA order, on the device that it is on."""
    blocks = Blocks.of(q.shape, q.spec)
    if (reason := refusal(blocks)) is not None:
        raise TersorError(
            f"a {blocks.n} x {blocks.k} weight in {q.spec} has no CUDA order: {reason}; leave it "
            "in portable order, in which it is dequantized for every product"
        )
    weight, device = _weight(*blocks.fields()), q.packed.device
    codes, scales = q.packed.contiguous(), q.scales.contiguous()
    steps = None if q.steps is None else q.steps.contiguous()
    # Zeros, so that padding too is the same every time.
    packed = torch.zeros(weight.bytes, dtype=torch.uint8, device=device)
    _core.cuda_codebook_pack(
        weight, codes.data_ptr(), scales.data_ptr(), _address(steps), _address(q.mean),
        packed.data_ptr(), packed.numel(), *cuda_calls.place(device),
    )  # fmt: skip
    return packed


def unpack_weight(packed: Tensor, spec: Codebook, shape: tuple[int, int]) -> CodebookWeight:
    """The inverse of pack_weight, exactly, on the device of `packed`."""
    parts = {
        name: torch.empty(length, dtype=dtype, device=packed.device)
        for name, (length, dtype) in scale_shapes(spec, shape).items()
    }
    q = CodebookWeight(spec, shape, **parts)
    _core.cuda_codebook_unpack(
        _weight(*Blocks.of(shape, spec).fields()), packed.data_ptr(), packed.numel(),
        q.packed.data_ptr(), q.scales.data_ptr(), _address(q.steps), _address(q.mean),
        *cuda_calls.place(packed.device),
    )  # fmt: skip
    return q


def dequantize(packed: Tensor, blocks: Blocks, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows [begin, end) of the weight: [end - begin, k], computed in float32, then cast."""
    made = dtype if dtype in DTYPES else torch.float32
    w = torch.empty(end - begin, blocks.k, dtype=made, device=packed.device)
    _core.cuda_codebook_dequantize(
        _weight(*blocks.fields()), packed.data_ptr(), packed.numel(), begin, end, w.data_ptr(),
        dtype_code(made), *cuda_calls.place(packed.device),
    )  # fmt: skip
    return w.to(dtype)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# --- the operator ---------------------------------------------------------------------------------


def _product(x: Tensor, packed: Tensor, bias: Tensor | None, blocks: Blocks) -> Tensor:
    n, k, m = blocks.n, blocks.k, x.numel() // blocks.k
    y = x.new_empty((*x.shape[:-1], n))
    half = x.dtype in (torch.float16, torch.bfloat16)
    if m == 0 or (half and _served(x, packed, bias, blocks, y)):
        return y
    matrix, rows = rows_of(x, k), y.view(m, n)
    for part in cuda._slabs(n, k, matrix.element_size()):
        w = dequantize(packed, blocks, part.start, part.stop, matrix.dtype)
        if bias is None:
            rows[:, part] = matrix @ w.t()
        else:
            rows[:, part] = torch.addmm(bias[part].to(matrix.dtype), matrix, w.t())
    return y


def _served(x: Tensor, packed: Tensor, bias: Tensor | None, blocks: Blocks, y: Tensor) -> bool:
    """x [..., k] -> y [..., n], or False where no kernel serves."""
    (rows, stride), m = cuda_calls.rows(x, blocks.k), x.numel() // blocks.k
    device, stream = cuda_calls.place(x.device)
    workspace = cuda_calls.workspace(device)
    wide = None if bias is None else bias.to(torch.float32).contiguous()
    served: bool = _core.cuda_codebook_linear(
        _weight(*blocks.fields()), packed.data_ptr(), packed.numel(), rows.data_ptr(), m,
        stride, dtype_code(x.dtype), _address(wide),
        y.data_ptr(), blocks.n, workspace.data_ptr(), workspace.numel(), device, stream,
    )  # fmt: skip
    return served


def _linear(
    x: Tensor, packed: Tensor, bias: Tensor | None,
    n: int, k: int, g: int, doubled: bool, values: str,
) -> Tensor:  # fmt: skip
    return _product(x, packed, bias, Blocks(n, k, g, doubled, values))


def _linear_fake(
    x: Tensor, packed: Tensor, bias: Tensor | None,
    n: int, k: int, g: int, doubled: bool, values: str,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], n))


def _backward_product(
    grad: Tensor, packed: Tensor, n: int, k: int, g: int, doubled: bool, values: str
) -> Tensor:
    """grad [..., n] @ dequantize(W) [n, k]; parts of a large W are summed in float32 or wider."""
    matrix, blocks = rows_of(grad, n), Blocks(n, k, g, doubled, values)
    slabs = cuda._slabs(n, k, grad.element_size())
    parts = (
        matrix[:, part] @ dequantize(packed, blocks, part.start, part.stop, grad.dtype)
        for part in slabs
    )
    if len(slabs) == 1:
        result = next(parts)
    else:
        sums = torch.promote_types(grad.dtype, torch.float32)
        result = functools.reduce(torch.add, (part.to(sums) for part in parts)).to(grad.dtype)
    return result.view(*grad.shape[:-1], k)


def _backward_fake(
    grad: Tensor, packed: Tensor, n: int, k: int, g: int, doubled: bool, values: str
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], k))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.blocks = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (packed,) = ctx.saved_tensors
    return torch.ops.tersor.codebook_cuda_backward(grad, packed, *ctx.blocks), *(None,) * 7


_BLOCKS = "int n, int k, int g, bool doubled, str values"
define_operator(
    f"codebook_cuda_backward(Tensor grad, Tensor packed, {_BLOCKS}) -> Tensor",
    "CUDA",
    _backward_product,
    _backward_fake,
)
define_operator(
    f"codebook_cuda(Tensor x, Tensor packed, Tensor? bias, {_BLOCKS}) -> Tensor",
    "CUDA",
    _linear,
    _linear_fake,
)
define_backward("codebook_cuda", _save_for_backward, _backward)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, blocks: Blocks) -> Tensor:
    """x [..., k] @ dequantize(W).T + bias -> [..., n], all on one device. x: floating point; bias
    [n] or None, of any floating-point dtype."""
    if x.device != packed.device:
        raise TersorError(f"the input is on {x.device}, the layer on {packed.device}; move one")
    if x.dim() == 0 or x.shape[-1] != blocks.k:
        raise TersorError(f"the layer takes inputs [..., {blocks.k}], not {list(x.shape)}")
    if x.is_cuda and is_eager(x):
        return _product(x, packed, bias, blocks)
    y: Tensor = torch.ops.tersor.codebook_cuda(x, packed, bias, *blocks.fields())
    return y
