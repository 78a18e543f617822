"""The grid of one layer as both formats store it: scales, zero points and column order, checked
tensor by tensor. A message names the tensor, so that a bad file can be mended where it is bad."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NoReturn

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.qweight import QSpec, QWeight

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuse(name: str, problem: str) -> NoReturn:
    raise TersorError(
        f"{name}: {problem}; the file is damaged or was written for another format or scheme, "
        f"download or quantize it again"
    )


def take(tensors: Mapping[str, Tensor], name: str, dtypes: Iterable[torch.dtype]) -> Tensor:
    """tensors[name], which must be there and have one of the dtypes."""
    if name not in tensors:
        refuse(name, f"missing among {sorted(tensors)}")
    tensor = tensors[name]
    if tensor.dtype not in tuple(dtypes):
        refuse(name, f"dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    return tensor


def take_matrix(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """tensors[name], which must be a matrix with at least one element."""
    tensor = take(tensors, name, (dtype,))
    if tensor.dim() != 2 or tensor.numel() == 0:
        refuse(name, f"shape {tuple(tensor.shape)}, expected a matrix")
    return tensor


def write_grid(q: QWeight) -> dict[str, Tensor]:
    """The tensors that both formats store alike: scales and column order, copied."""
    tensors = {"weight_scale": q.scales.clone(memory_format=torch.contiguous_format)}
    if q.order is not None:
        tensors["weight_g_idx"] = q.order.to(torch.int32, copy=True)
    return tensors


def signed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes (uint8) -> the int8 that compressed-tensors counts in, 2**(bits - 1) lower."""
    # uint8 arithmetic wraps, which is two's complement read as int8.
    return (codes.contiguous() - (1 << (bits - 1))).view(torch.int8)


def unsigned(name: str, values: Tensor, bits: int) -> Tensor:
    """The inverse of `signed`; refuses values that `bits` bits cannot hold."""
    half = 1 << (bits - 1)
    low, high = (int(v) for v in torch.aminmax(values))
    if low < -half or high >= half:
        refuse(name, f"values from {low} to {high}, but {bits} bits hold {-half} to {half - 1}")
    return values.contiguous().view(torch.uint8) + half


def check_writable(q: QWeight) -> None:
    """TersorError for what a file would hold as something else: a code or zero point beyond
    2**bits, an order beyond the groups, scales of an unusual dtype."""
    if q.scales.dtype not in SCALE_DTYPES:
        raise TersorError(
            f"scales are {q.scales.dtype}; convert them to float32, bfloat16 or float16"
        )
    if q.codes.is_meta:
        return  # shapes alone; there are no values to be wrong
    top = q.spec.levels - 1
    for name, tensor in (("codes", q.codes), ("zeros", q.zeros)):
        if tensor is not None and tensor.numel() and int(tensor.max()) > top:
            raise TersorError(
                f"{name} reach {int(tensor.max())}, but {q.spec.bits} bits end at {top}"
            )
    if q.order is not None and (fault := _order_fault(q.order, q.scales.shape[1])):
        raise TersorError(f"order holds {fault}")


def _order_fault(order: Tensor, groups: int) -> str | None:
    low, high = (int(v) for v in torch.aminmax(order))
    if low < 0 or high >= groups:
        return f"groups from {low} to {high}, but there are {groups}"
    return None


def infer_spec(tensors: Mapping[str, Tensor], bits: int, k: int) -> QSpec:
    """The spec that the shapes tell. One scale per row reads as group=None, also where the writer
    called it a group of k."""
    scales = take(tensors, "weight_scale", SCALE_DTYPES)
    groups = scales.shape[1] if scales.dim() == 2 else 1
    if groups > 1 and k % groups:
        refuse("weight_scale", f"{groups} groups, which do not divide {k} columns")
    group = k // groups if groups > 1 else None
    return QSpec(bits, group, symmetric="weight_zero_point" not in tensors)


def read_scales(tensors: Mapping[str, Tensor], n: int, groups: int) -> Tensor:
    """Scales [n, groups] in their own dtype. One scale for the whole weight (strategy "tensor") is
    repeated for every row."""
    scales = take(tensors, "weight_scale", SCALE_DTYPES)
    if scales.numel() == 1 and groups == 1:
        scales = scales.reshape(1, 1).expand(n, 1)
    elif tuple(scales.shape) != (n, groups):
        refuse("weight_scale", f"shape {tuple(scales.shape)}, expected {(n, groups)}")
    if not bool(torch.isfinite(scales).all()):
        refuse("weight_scale", "holds NaN or infinity")
    return scales.clone(memory_format=torch.contiguous_format)


def read_signed_zeros(zeros: Tensor, bits: int, n: int, groups: int) -> Tensor:
    """Zero points stored one per byte, signed -> uint8 [n, groups]."""
    if zeros.numel() == 1 and groups == 1:
        zeros = zeros.reshape(1, 1).expand(n, 1)
    elif tuple(zeros.shape) != (n, groups):
        refuse("weight_zero_point", f"shape {tuple(zeros.shape)}, expected {(n, groups)}")
    return unsigned("weight_zero_point", zeros, bits)


def settle_zeros(zeros: Tensor | None, spec: QSpec) -> Tensor | None:
    """What the spec asks for. Old writers stored the zero points of symmetric weights too: they may
    stay only if they say nothing new."""
    if not spec.symmetric:
        if zeros is None:
            refuse("weight_zero_point", "missing, though the weight is asymmetric")
        return zeros
    if zeros is not None and bool((zeros != spec.midpoint).any()):
        refuse("weight_zero_point", "not zero, though the weight is symmetric")
    return None


def read_order(tensors: Mapping[str, Tensor], k: int, groups: int) -> Tensor | None:
    """weight_g_idx, the group of each column, as int32 [k]; None where it is absent or was never
    set (all -1)."""
    if "weight_g_idx" not in tensors:
        return None
    order = take(tensors, "weight_g_idx", (torch.int32, torch.int64))
    if tuple(order.shape) != (k,):
        refuse("weight_g_idx", f"shape {tuple(order.shape)}, expected {(k,)}")
    if bool((order == -1).all()):
        return None
    if fault := _order_fault(order, groups):
        refuse("weight_g_idx", fault)
    return order.to(torch.int32, copy=True)
