"""compressed-tensors "int-quantized": one code per byte, whatever its width.

It is what compressed-tensors writes for every integer weight whose activations are quantized too
(W8A8, and W4A8 as well), and what its "naive-quantized" means for integers.

    weight             int8 [n, k]       code - 2**(bits - 1)
    weight_scale       float [n, groups]
    weight_zero_point  int8 [n, groups]  zero - 2**(bits - 1); asymmetric only
    weight_g_idx       int32 [k]         group of each column; only where it is not column // group
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tersor.formats.grid import (
    check_writable,
    infer_spec,
    read_order,
    read_scales,
    read_signed_zeros,
    settle_zeros,
    signed,
    take,
    take_matrix,
    unsigned,
    write_grid,
)
from tersor.qweight import QSpec, QWeight


class IntQuantized:
    name = "int-quantized"
    tensors: tuple[str, ...] = ("weight", "weight_scale", "weight_zero_point", "weight_g_idx")

    def pack(self, q: QWeight) -> dict[str, Tensor]:
        """The tensors above, in memory of their own. TersorError where a code is out of range."""
        check_writable(q)
        packed = {"weight": signed(q.codes, q.spec.bits), **write_grid(q)}
        if q.zeros is not None:
            packed["weight_zero_point"] = signed(q.zeros, q.spec.bits)
        return packed

    def unpack(self, tensors: Mapping[str, Tensor], spec: QSpec | None = None) -> QWeight:
        """The inverse of `pack`, in memory of its own; tensors of other names are not looked at.
        Without a spec the codes are taken for 8 bits. TersorError names the tensor that is wrong.
        """
        weight = take_matrix(tensors, "weight", torch.int8)
        n, k = weight.shape
        spec = spec or infer_spec(tensors, 8, k)
        groups = spec.groups(k)
        zeros = None
        if "weight_zero_point" in tensors:
            zeros = take(tensors, "weight_zero_point", (torch.int8,))
            zeros = read_signed_zeros(zeros, spec.bits, n, groups)
        return QWeight(
            spec=spec,
            codes=unsigned("weight", weight, spec.bits),
            scales=read_scales(tensors, n, groups),
            zeros=settle_zeros(zeros, spec),
            order=read_order(tensors, k, groups),
        )
