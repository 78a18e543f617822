"""The contract of a format, run over FORMATS; golden bytes against a packer of a few lines and
against compressed-tensors; files that other releases wrote; damaged tensors."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tersor.errors import TersorError
from tersor.formats import FORMATS
from tersor.formats.pack_quantized import pack_bits, unpack_bits, words
from tersor.qweight import BITS, QSpec, QWeight

DATA = Path(__file__).parent / "data"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SPECS = [QSpec(b, g, s) for b in BITS for g in (None, 16, 48) for s in (True, False)]
SIZES = {None: [(1, 1), (3, 7), (5, 33), (37, 101)], 16: [(1, 16), (33, 80)], 48: [(7, 96)]}
CASES = [(spec, n, k) for spec in SPECS for n, k in SIZES[spec.group]]


def random_weight(
    spec: QSpec, n: int, k: int, dtype: torch.dtype = torch.bfloat16, ordered: bool = False
) -> QWeight:
    draw = torch.Generator().manual_seed(n * 1000 + k)
    grid = (n, spec.groups(k))
    order = torch.randint(0, grid[1], (k,), generator=draw, dtype=torch.int32)
    return QWeight(
        spec=spec,
        codes=torch.randint(0, spec.levels, (n, k), generator=draw, dtype=torch.uint8),
        scales=torch.randn(grid, generator=draw).to(dtype),
        zeros=None
        if spec.symmetric
        else torch.randint(0, spec.levels, grid, generator=draw, dtype=torch.uint8),
        order=order if ordered else None,
    )


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal in dtype, shape and every bit."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def assert_same(a: QWeight, b: QWeight) -> None:
    assert a.spec == b.spec
    for field in ("codes", "scales", "zeros", "order"):
        assert same(getattr(a, field), getattr(b, field)), field


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("spec", "n", "k"), CASES, ids=str)
def test_round_trip_is_exact(name: str, spec: QSpec, n: int, k: int, tmp_path: Path) -> None:
    for dtype, ordered in itertools.product(DTYPES, (False, True)):
        q = random_weight(spec, n, k, dtype, ordered)
        packed = FORMATS[name].pack(q)
        assert set(packed) <= set(FORMATS[name].tensors)
        assert all(tensor.is_contiguous() for tensor in packed.values())
        assert_same(FORMATS[name].unpack(packed, spec), q)
    save_file(packed, tmp_path / "layer.safetensors")
    assert_same(FORMATS[name].unpack(load_file(tmp_path / "layer.safetensors"), spec), q)


@pytest.mark.parametrize("name", FORMATS)
def test_transposed_memory_makes_no_difference(name: str) -> None:
    q = random_weight(QSpec(4, 16, symmetric=False), 6, 32)
    turned = QWeight(q.spec, *(t.T.contiguous().T for t in (q.codes, q.scales, q.zeros)))
    packed, expected = FORMATS[name].pack(turned), FORMATS[name].pack(q)
    assert all(tensor.is_contiguous() and same(tensor, expected[n]) for n, tensor in packed.items())
    turned = {n: tensor.T.contiguous().T for n, tensor in packed.items() if tensor.dim() == 2}
    assert_same(FORMATS[name].unpack(packed | turned, q.spec), q)


@pytest.mark.parametrize("name", FORMATS)
def test_name_is_the_key(name: str) -> None:
    assert FORMATS[name].name == name


@pytest.mark.parametrize("name", FORMATS)
def test_unpacked_weight_has_memory_of_its_own(name: str) -> None:
    q = random_weight(QSpec(8, 16, symmetric=False), 4, 32, ordered=True)
    packed = FORMATS[name].pack(q)
    unpacked = FORMATS[name].unpack(packed, q.spec)
    for tensor in packed.values():
        tensor.zero_()
    assert_same(unpacked, random_weight(q.spec, 4, 32, ordered=True))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_shapes_tell_the_spec(bits: int, symmetric: bool) -> None:
    for group, k in ((None, 144), (48, 144)):
        q = random_weight(QSpec(bits, group, symmetric), 5, k)
        assert_same(FORMATS["pack-quantized"].unpack(FORMATS["pack-quantized"].pack(q)), q)
        if bits == 8:
            assert_same(FORMATS["int-quantized"].unpack(FORMATS["int-quantized"].pack(q)), q)


def test_shapes_that_tell_nothing_are_refused() -> None:
    q = random_weight(QSpec(4, None), 2, 2)
    with pytest.raises(TersorError, match="do not tell the number of bits; pass a QSpec"):
        FORMATS["pack-quantized"].unpack(FORMATS["pack-quantized"].pack(q))


# --- golden bytes ---------------------------------------------------------------------------------


def plain_pack(codes: Tensor, bits: int) -> bytes:
    """Each row as one large integer, code i shifted to bit i * bits, in whole 32-bit words."""
    packed = b""
    for row in codes.tolist():
        stream = sum(code << (bits * i) for i, code in enumerate(row))
        packed += stream.to_bytes(4 * ((len(row) * bits + 31) // 32), "little")
    return packed


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [1, 7, 8, 10, 11, 31, 32, 33, 100, 128])
def test_packed_bytes(bits: int, k: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, k), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, words(k, bits))
    assert packed.numpy().astype("<i4").tobytes() == plain_pack(codes, bits)
    assert torch.equal(unpack_bits(packed, bits, k), codes)


def test_packed_words_by_hand() -> None:
    q = QWeight(
        QSpec(4, None, symmetric=False),
        codes=torch.arange(16, dtype=torch.uint8).view(1, 16),
        scales=torch.ones(1, 1),
        zeros=torch.tensor([[9]], dtype=torch.uint8),
    )
    packed = FORMATS["pack-quantized"].pack(q)
    assert packed["weight_packed"].numpy().view(np.uint32).tolist() == [[0x76543210, 0xFEDCBA98]]
    assert packed["weight_zero_point"].tolist() == [[9]]
    assert packed["weight_shape"].tolist() == [1, 16]
    unpacked = FORMATS["int-quantized"].pack(q)
    assert unpacked["weight"].tolist() == [list(range(-8, 8))]
    assert unpacked["weight_zero_point"].tolist() == [[1]]


@pytest.mark.parametrize(("spec", "n", "k"), CASES, ids=str)
def test_compressed_tensors_agrees(spec: QSpec, n: int, k: int) -> None:
    """Its packer gives our words, and its decompression our weight, bit for bit."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor, pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "channel" if spec.group is None else "group"
    args = QuantizationArgs(
        num_bits=spec.bits, symmetric=spec.symmetric, strategy=strategy, group_size=spec.group
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    for dtype in DTYPES:
        q = random_weight(spec, n, k, dtype)
        for name, fmt in FORMATS.items():
            packed = fmt.pack(q)
            theirs = BaseCompressor.get_value_from_registry(name).decompress(packed, scheme)
            assert same(theirs["weight"], q.dequantize(dtype)), name
        packed = FORMATS["pack-quantized"].pack(q)
        signed = (q.codes.short() - spec.midpoint).to(torch.int8)
        assert same(packed["weight_packed"], pack_to_int32(signed, spec.bits))
        if q.zeros is not None:
            signed = (q.zeros.short() - spec.midpoint).to(torch.int8)
            zeros = pack_to_int32(signed, spec.bits, packed_dim=0)
            assert same(packed["weight_zero_point"], zeros)


@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
def test_column_order_of_an_older_release(symmetry: str) -> None:
    tensors = load_file(DATA / f"g_idx_{symmetry}.safetensors")
    expected = tensors.pop("dequantized")
    fmt = FORMATS["pack-quantized"]
    q = fmt.unpack(tensors, QSpec(4, 32, symmetry == "symmetric"))
    assert same(q.dequantize(torch.bfloat16), expected)
    packed = fmt.pack(q)
    assert packed.keys() == tensors.keys()
    assert all(same(packed[name], tensors[name]) for name in tensors)


# --- what older or other writers do ---------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_one_scale_for_the_whole_weight(name: str) -> None:
    for symmetric, shape in itertools.product((True, False), ((), (1,), (1, 1))):
        q = random_weight(QSpec(4, None, symmetric), 6, 20)
        q.scales = q.scales[:1].expand(6, 1).contiguous()
        packed = FORMATS[name].pack(q)
        packed["weight_scale"] = q.scales[0].reshape(shape)
        if q.zeros is not None:
            q.zeros = q.zeros[:1].expand(6, 1).contiguous()
            packed["weight_zero_point"] = (q.zeros[0].short() - 8).to(torch.int8).reshape(shape)
        assert_same(FORMATS[name].unpack(packed, q.spec), q)


@pytest.mark.parametrize("name", FORMATS)
def test_zero_points_that_say_nothing(name: str) -> None:
    q = random_weight(QSpec(8, 16), 4, 32)
    packed = FORMATS[name].pack(q) | {"weight_zero_point": torch.zeros(4, 2, dtype=torch.int8)}
    assert_same(FORMATS[name].unpack(packed, q.spec), q)
    packed["weight_zero_point"][1, 1] = 3
    with pytest.raises(TersorError, match="weight_zero_point: not zero, though"):
        FORMATS[name].unpack(packed, q.spec)


@pytest.mark.parametrize("name", FORMATS)
def test_column_order_that_was_never_set(name: str) -> None:
    q = random_weight(QSpec(4, 16), 4, 32)
    packed = FORMATS[name].pack(q) | {"weight_g_idx": torch.full((32,), -1, dtype=torch.int32)}
    assert_same(FORMATS[name].unpack(packed, q.spec), q)


# --- damaged tensors ------------------------------------------------------------------------------


Damage = Callable[[dict[str, Tensor]], object]


def change(name: str, index: object, value: object) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name][index] = value

    return damage


def replace(name: str, make: Callable[[Tensor], Tensor]) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name] = make(tensors[name])

    return damage


SHARED = [
    ("weight_scale: missing", lambda t: t.pop("weight_scale")),
    ("weight_scale: dtype torch.int32", replace("weight_scale", lambda t: t.int())),
    ("weight_scale: dtype torch.float64", replace("weight_scale", lambda t: t.double())),
    (r"weight_scale: shape \(6, 1\)", replace("weight_scale", lambda t: t[:, :1])),
    ("weight_scale: holds NaN", change("weight_scale", (0, 0), float("nan"))),
    ("weight_scale: holds NaN", change("weight_scale", (5, 1), float("inf"))),
    ("weight_zero_point: missing", lambda t: t.pop("weight_zero_point")),
    ("weight_zero_point: dtype", replace("weight_zero_point", lambda t: t.float())),
    ("weight_zero_point: shape", replace("weight_zero_point", lambda t: t[:, :1])),
    ("weight_g_idx: groups from 0 to 2", change("weight_g_idx", 3, 2)),
    ("weight_g_idx: groups from -2 to 1", change("weight_g_idx", 3, -2)),
    ("weight_g_idx: shape", replace("weight_g_idx", lambda t: t[:-1])),
    ("weight_g_idx: dtype", replace("weight_g_idx", lambda t: t.float())),
]
DAMAGED = {
    "pack-quantized": [
        *SHARED,
        ("weight_packed: missing", lambda t: t.pop("weight_packed")),
        ("weight_packed: dtype", replace("weight_packed", lambda t: t.long())),
        ("weight_packed: shape", replace("weight_packed", lambda t: t[0])),
        ("weight_packed: shape", replace("weight_packed", lambda t: t[:0])),
        ("weight_packed: 3 words a row, but", replace("weight_packed", lambda t: t[:, :3])),
        ("weight_shape: missing", lambda t: t.pop("weight_shape")),
        ("weight_shape: dtype", replace("weight_shape", lambda t: t.float())),
        ("weight_shape: shape", replace("weight_shape", lambda t: t[:1])),
        (r"weight_shape: \(7, 32\)", change("weight_shape", 0, 7)),
        (r"weight_shape: \(-6, 32\)", change("weight_shape", 0, -6)),
        (r"weight_shape: \(6, -32\)", change("weight_shape", 1, -32)),
        ("but 48 codes of 4 bits take 6", change("weight_shape", 1, 48)),
        ("group 16 does not divide the 31", change("weight_shape", 1, 31)),
        ("group 16 does not divide", change("weight_shape", 1, 2**62 + 1)),
    ],
    "int-quantized": [
        *SHARED,
        ("weight: missing", lambda t: t.pop("weight")),
        ("weight: dtype", replace("weight", lambda t: t.to(torch.uint8))),
        ("weight: shape", replace("weight", lambda t: t[0])),
        ("weight: values from -9 to", change("weight", (2, 2), -9)),
        ("weight: values from -8 to 8,", change("weight", (2, 2), 8)),
        ("weight_zero_point: values from", change("weight_zero_point", (2, 1), -128)),
        ("weight_zero_point: shape", replace("weight", lambda t: t[:3])),
    ],
}


@pytest.mark.parametrize(
    ("name", "message", "damage"),
    [(name, *case) for name, cases in DAMAGED.items() for case in cases],
)
def test_damaged_tensors_are_named(name: str, message: str, damage: Damage) -> None:
    q = random_weight(QSpec(4, 16, symmetric=False), 6, 32, ordered=True)
    tensors = FORMATS[name].pack(q)
    damage(tensors)
    with pytest.raises(TersorError, match=message) as caught:
        FORMATS[name].unpack(tensors, q.spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_random_damage_is_refused_or_read(name: str) -> None:
    """Whatever the tensors, the answer is a valid QWeight or a TersorError."""
    draw = random.Random(0)
    q = random_weight(QSpec(4, 16, symmetric=False), 6, 32, ordered=True)
    refused = 0
    for _ in range(500):
        tensors = FORMATS[name].pack(q)
        victim = draw.choice(sorted(tensors))
        tensor = tensors[victim]
        match draw.randrange(5):
            case 0:
                del tensors[victim]
            case 1:
                tensors[victim] = tensor.to(draw.choice([torch.int8, torch.int32, torch.float16]))
            case 2:
                tensors[victim] = tensor.reshape(-1)[: draw.randrange(tensor.numel() + 1)]
            case 3:
                tensors[victim] = tensor.repeat(*[draw.randrange(1, 3)] * tensor.dim())
            case 4:
                raw = tensor.view(-1).view(torch.uint8)
                raw[draw.randrange(raw.numel())] ^= 1 << draw.randrange(8)
        spec = draw.choice([q.spec, QSpec(3, 16), QSpec(8, None, symmetric=False), None])
        try:
            read = FORMATS[name].unpack(tensors, spec)
        except TersorError:
            refused += 1
        else:
            assert int(read.codes.max()) < read.spec.levels
            assert torch.isfinite(read.dequantize()).all()
    assert 250 < refused < 500


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("codes", torch.full((6, 32), 8, dtype=torch.uint8), "codes reach 8, but 3 bits end at 7"),
        ("zeros", torch.full((6, 2), 9, dtype=torch.uint8), "zeros reach 9"),
        ("order", torch.full((32,), 2, dtype=torch.int32), "order holds groups from 2 to 2"),
        ("scales", torch.ones(6, 2, dtype=torch.float64), "scales are torch.float64"),
    ],
)
def test_what_a_file_cannot_hold(name: str, field: str, value: Tensor, message: str) -> None:
    q = random_weight(QSpec(3, 16, symmetric=False), 6, 32)
    setattr(q, field, value)
    with pytest.raises(TersorError, match=message):
        FORMATS[name].pack(q)


def test_three_bits_of_a_single_row() -> None:
    """A row whose bytes do not end with a word: a slice of it passes for contiguous."""
    for count in range(1, 100):
        codes = torch.randint(8, (1, count), dtype=torch.uint8)
        assert torch.equal(unpack_bits(pack_bits(codes, 3), 3, count), codes)
