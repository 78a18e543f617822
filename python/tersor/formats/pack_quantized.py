"""compressed-tensors "pack-quantized": codes in a dense stream of bits, kept in int32 words.

    weight_packed      int32 [n, ceil(k * bits / 32)]       codes along k
    weight_shape       int64 [2]                            n, k
    weight_scale       float [n, groups]
    weight_zero_point  int32 [ceil(n * bits / 32), groups]  zero points along n; asymmetric only
    weight_g_idx       int32 [k]                            only where it is not column // group

Code i of a row sits in bits [i * bits, (i + 1) * bits) of the row's stream, lowest bit first, and
may straddle two words when bits is 3:

    bits 4   word 0  |c7  |c6  |c5  |c4  |c3  |c2  |c1  |c0  |
    bits 3   word 0  |c10|c9 |c8 |c7 |c6 |c5 |c4 |c3 |c2 |c1 |c0 |   with c10's top bit in word 1

Releases of compressed-tensors before 0.18 gave 3-bit codes ten to a word instead; 2, 4 and 8 bits
have not changed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.formats.grid import (
    check_writable,
    infer_spec,
    read_order,
    read_scales,
    read_signed_zeros,
    refuse,
    settle_zeros,
    take,
    take_matrix,
    write_grid,
)
from tersor.qweight import BITS, QSpec, QWeight

LANES = 8  # eight codes of b bits fill exactly b bytes, whatever b is


def words(count: int, bits: int) -> int:
    """int32 words that hold `count` codes."""
    return -(-count * bits // 32)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, count], each below 2**bits -> int32 [rows, words(count, bits)]."""
    rows, count = codes.shape
    blocks = -(-count // LANES)
    codes = torch.nn.functional.pad(codes, (0, blocks * LANES - count))
    block = torch.zeros(rows, blocks, dtype=torch.int64, device=codes.device)
    for lane in range(LANES):
        block |= codes[:, lane::LANES].long() << (bits * lane)
    stream = block.view(torch.uint8).view(rows, blocks, 8)[..., :bits].reshape(rows, -1)
    stream = torch.nn.functional.pad(stream, (0, max(0, 4 * words(count, bits) - stream.shape[1])))
    # clone, since a slice of a single row passes for contiguous with the stride that it had
    cut = stream[:, : 4 * words(count, bits)].clone(memory_format=torch.contiguous_format)
    return cut.view(torch.int32)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: int32 [rows, words(count, bits)] -> uint8 [rows, count]."""
    rows = packed.shape[0]
    blocks = -(-count // LANES)
    # A copy, not contiguous(): a transposed column counts as contiguous and cannot be viewed.
    stream = packed.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    stream = torch.nn.functional.pad(stream, (0, max(0, blocks * bits - stream.shape[1])))
    block = stream.new_zeros(rows, blocks, 8)
    block[..., :bits] = stream[:, : blocks * bits].view(rows, blocks, bits)
    value = block.view(torch.int64).squeeze(-1)
    codes = stream.new_empty(rows, blocks, LANES)
    for lane in range(LANES):
        codes[..., lane] = (value >> (bits * lane)) & ((1 << bits) - 1)
    return codes.view(rows, -1)[:, :count].contiguous()


class PackQuantized:
    name = "pack-quantized"
    tensors: tuple[str, ...] = (
        "weight_packed",
        "weight_shape",
        "weight_scale",
        "weight_zero_point",
        "weight_g_idx",
    )

    def pack(self, q: QWeight) -> dict[str, Tensor]:
        """The tensors above, in memory of their own. TersorError where a code is out of range."""
        check_writable(q)
        packed = {
            "weight_packed": pack_bits(q.codes, q.spec.bits),
            "weight_shape": torch.tensor([q.n, q.k], device=q.codes.device),
            **write_grid(q),
        }
        if q.zeros is not None:
            packed["weight_zero_point"] = pack_bits(q.zeros.T, q.spec.bits).T.contiguous()
        return packed

    def unpack(self, tensors: Mapping[str, Tensor], spec: QSpec | None = None) -> QWeight:
        """The inverse of `pack`, in memory of its own; tensors of other names are not looked at.
        Without a spec, the shapes tell bits and groups. TersorError names the tensor that is wrong.
        """
        packed = take_matrix(tensors, "weight_packed", torch.int32)
        n, k = _shape(tensors, packed)
        spec = spec or infer_spec(tensors, _bits(packed, k), k)
        groups = spec.groups(k)
        if packed.shape[1] != words(k, spec.bits):
            refuse(
                "weight_packed",
                f"{packed.shape[1]} words a row, but {k} codes of {spec.bits} bits take "
                f"{words(k, spec.bits)}",
            )
        return QWeight(
            spec=spec,
            codes=unpack_bits(packed, spec.bits, k),
            scales=read_scales(tensors, n, groups),
            zeros=settle_zeros(_zeros(tensors, spec, n, groups), spec),
            order=read_order(tensors, k, groups),
        )


def _shape(tensors: Mapping[str, Tensor], packed: Tensor) -> tuple[int, int]:
    """n and k as weight_shape gives them, which must agree with the packed rows."""
    shape = take(tensors, "weight_shape", (torch.int64, torch.int32))
    if tuple(shape.shape) != (2,):
        refuse("weight_shape", f"shape {tuple(shape.shape)}, expected two numbers")
    n, k = (int(v) for v in shape)
    if n != packed.shape[0] or k <= 0:
        refuse("weight_shape", f"({n}, {k}), but weight_packed has {packed.shape[0]} rows")
    return n, k


def _bits(packed: Tensor, k: int) -> int:
    """The width of a code, from the words that k of them take."""
    fits = [bits for bits in BITS if words(k, bits) == packed.shape[1]]
    if len(fits) != 1:
        raise TersorError(
            f"weight_packed: {packed.shape[1]} words for {k} codes do not tell the number of bits; "
            f"pass a QSpec, as the folder's config.json has it"
        )
    return fits[0]


def _zeros(tensors: Mapping[str, Tensor], spec: QSpec, n: int, groups: int) -> Tensor | None:
    """Zero points as uint8 [n, groups]. Packed along n in general; int8 where one zero point serves
    the whole weight, which compressed-tensors leaves as it is."""
    if "weight_zero_point" not in tensors:
        return None
    zeros = take(tensors, "weight_zero_point", (torch.int32, torch.int8))
    if zeros.dtype == torch.int8:
        return read_signed_zeros(zeros, spec.bits, n, groups)
    expected = (words(n, spec.bits), groups)
    if tuple(zeros.shape) != expected:
        refuse("weight_zero_point", f"shape {tuple(zeros.shape)}, expected {expected}")
    return unpack_bits(zeros.T, spec.bits, n).T.contiguous()
