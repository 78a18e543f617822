"""Weights with 2:4 zeros: when their zeros are left out, and that nothing else changes by it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
import torch

from tersor import _core, sparse
from tersor.errors import TersorError
from tersor.kernels import (
    PATTERN,
    keeps_pattern,
    pack_values,
    pack_weight,
    packed_spec,
    unpack_values,
    unpack_weight,
)
from tersor.linear import QuantLinear
from tersor.qweight import ActSpec, QSpec, QWeight
from tersor.sparse import Measured
from tersor.testing import assert_close, oracle, random_qweight, random_values

LEFT_OUT, WHOLE = "tile16s24", "tile16"


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    sparse.use_sparse("auto")


def weight(bits: int = 4, symmetric: bool = True, n: int = 40, k: int = 256) -> QWeight:
    """2:4, whatever its zero points are."""
    q = random_qweight(n, k, QSpec(bits, 128, symmetric), torch.bfloat16, 0)
    zero = torch.full((n, k), q.spec.midpoint, dtype=torch.uint8)
    if q.zeros is not None:
        zero = q.zeros.repeat_interleave(128, dim=1)
    pruned = torch.rand(n, k // 4, 4).argsort(dim=-1).view(n, k) >= 2
    return QWeight(q.spec, torch.where(pruned, zero, q.codes), q.scales, q.zeros)


def layout(layer: QuantLinear) -> str:
    return str(packed_spec(layer.packed)["layout"])


@pytest.mark.parametrize("activation", [None, ActSpec()])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_are_left_out_and_come_back(bits: int, activation: ActSpec | None) -> None:
    q = weight(bits)
    sparse.use_sparse("always")
    layer = QuantLinear(q, torch.randn(40), activation)
    assert layout(layer) == LEFT_OUT
    back = layer.qweight()
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scales, q.scales)
    for m in (1, 5, 20):
        x = torch.randn(m, 256)
        expected, tolerance = oracle(x, q, layer.bias, activation)
        assert_close(layer(x), expected, tolerance, f"m={m}")
    sparse.use_sparse("never")
    dense = QuantLinear(q, layer.bias, activation)
    assert layout(dense) == WHOLE
    assert all(
        torch.equal(a, b)
        for a, b in zip(layer.state_dict().values(), dense.state_dict().values(), strict=True)
    )
    if activation:  # integers have one sum
        assert torch.equal(layer(x), dense(x))


def test_four_bits_take_less_than_three() -> None:
    packed = pack_weight(weight(n=1024, k=4096), None, PATTERN)
    assert 8 * packed.numel() / (1024 * 4096) < 2.9


@pytest.mark.parametrize(("gain", "expected"), [(1.3, LEFT_OUT), (0.9, WHOLE)])
def test_auto_takes_what_measures_faster(
    monkeypatch: pytest.MonkeyPatch, gain: float, expected: str
) -> None:
    asked, devices = [], []

    def measure(*what: object, device: torch.device) -> Measured:
        asked.append(what)
        devices.append(device)
        return Measured(gain, 1.0)

    monkeypatch.setattr(sparse, "measure", measure)
    layer = QuantLinear(weight(), None, ActSpec())
    assert layout(layer) == expected
    assert asked == [(1, 40, 256, QSpec(4, 128), ActSpec())] and devices == [sparse.CPU]


def test_what_has_no_such_kernel_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "measure", lambda *what, **where: pytest.fail("measured"))
    dense = random_qweight(40, 256, QSpec(4, 128), torch.bfloat16)
    small_groups = random_qweight(40, 256, QSpec(4, 32), torch.bfloat16, pattern=(2, 4))
    for q in (dense, small_groups, weight(symmetric=False)):
        assert layout(QuantLinear(q)) == WHOLE


def test_measuring_gives_times_of_both() -> None:
    found = sparse.measure(1, 256, 256, QSpec(4, 128), ActSpec())
    assert found.dense > 0
    assert found.sparse > 0
    assert found.gain == found.dense / found.sparse
    assert sparse.measure(1, 256, 256, QSpec(4, 128), ActSpec()) is found, "once for a shape"


def test_which_weights_keep_the_pattern() -> None:
    for symmetric in (True, False):
        q = weight(symmetric=symmetric)
        assert keeps_pattern(q, 2, 4)
        assert not keeps_pattern(q, 1, 4)
        assert not keeps_pattern(q, 2, 3)  # does not divide
        q.codes[7, 8:12] = (q.spec.midpoint if q.zeros is None else int(q.zeros[7, 0])) ^ 1
        assert not keeps_pattern(q, 2, 4)
        assert keeps_pattern(q, 2, 4) == (not _violations(q))


def _violations(q: QWeight) -> int:
    zero = q.dequantize() == 0
    return int(((~zero).view(q.n, -1, 4).sum(-1) > 2).sum())


def test_bad_input() -> None:
    with pytest.raises(TersorError, match="auto, always, never"):
        sparse.use_sparse("sometimes")
    dense = random_qweight(40, 256, QSpec(4, 128), torch.bfloat16)
    with pytest.raises(TersorError, match="the codes are not 2:4"):
        pack_weight(dense, None, (2, 4))
    q = weight()
    for kept, of in ((2, 3), (4, 4), (0, 4), (-1, 4), (2, 256), (1, 0)):
        with pytest.raises(TersorError, match="a pattern keeps"):
            _core.packed_bytes(q.codes, q.scales, None, 4, 0, kept, of)


@pytest.mark.parametrize("activation", [None, ActSpec()])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_patterns_that_no_packing_gives(bits: int, activation: ActSpec | None) -> None:
    """There are six, and three bits to write them in: the other two keep the first two columns, to
    every kernel and to unpacking."""
    if bits == 16:
        if activation:
            pytest.skip("16-bit weights meet activations as they are")
        packed = pack_values(random_values(40, 256, torch.bfloat16), PATTERN)
    else:
        packed = pack_weight(weight(bits), activation, PATTERN)
    step, tiles = (3 + 2 * bits) * 64, 3
    body = packed[128:].view(tiles, -1)[:, : 2 * step]  # without the scales
    draw = torch.Generator().manual_seed(0)
    noise = torch.randint(256, body.shape, dtype=torch.uint8, generator=draw)
    if bits == 16:  # finite: the bits of an exponent that are not all set
        values = noise.view(tiles, 2, -1)[..., 3 * 64 :]
        values[..., 1::2] &= 0xBF
    body.copy_(noise)
    found = unpack_values(packed) if bits == 16 else unpack_weight(packed)
    for m in (1, 5, 20):
        x = torch.randn(m, 256, generator=draw)
        expected, tolerance = oracle(x, found, None, activation)
        y = torch.ops.tersor.linear(x, packed, None, 40)
        assert_close(y, expected, tolerance, f"m={m}")


def forged(layout: str, n: int, k: int, bits: int, pattern: tuple[int, int]) -> torch.Tensor:
    """A header that promises more than there is."""
    spec = struct.pack("<3q6i", n, k, k, bits, 0, 1, 0, *pattern)
    head = b"tersor02" + layout.encode().ljust(32, b"\0") + spec + bytes(40)
    memory = torch.zeros(192 + 128, dtype=torch.uint8)
    packed = memory[-memory.data_ptr() % 64 :][:128]
    packed.copy_(torch.tensor(list(head), dtype=torch.uint8))
    return packed


def test_a_forged_header_is_never_unpacked() -> None:
    with pytest.raises(TersorError, match="no kernel reads 0 bytes"):
        unpack_values(forged(LEFT_OUT, 4096, 4096, 16, (2, 4)))
    with pytest.raises(TersorError, match="no kernel reads 0 bytes"):  # narrower than a step
        unpack_weight(forged(LEFT_OUT, 4, 16, 8, (0, 0)))


def test_no_pattern_is_no_pattern() -> None:
    q = weight()
    with pytest.raises(TersorError, match="kept:of"):
        _core.keeps_pattern(q.codes, q.scales, None, 4, 0, 0)
