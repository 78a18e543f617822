"""The two-level grid: found in scales exactly, and searched for before weights are rounded."""

from __future__ import annotations

import pytest
import torch

from tersor.two_level import MOST, split_scales

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --- in scales that are there --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [-24, -9, 0, 3])
def test_products_are_taken_apart(dtype, exponent):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 16, (200, 1), generator=draw) * 2.0**exponent
    multipliers = torch.randint(1, MOST + 1, (200, 6), generator=draw)
    scales = (rows * multipliers).to(dtype)
    assert torch.equal(scales.double(), rows * multipliers)
    found = split_scales(scales)
    assert found is not None
    rows, multipliers = found
    assert (rows.dtype, rows.shape) == (dtype, (200, 1))
    assert (multipliers.dtype, multipliers.shape) == (torch.uint8, (200, 6))
    assert int(multipliers.min()) >= 1 and int(multipliers.max()) <= MOST
    assert torch.equal(rows.double() * multipliers, scales.double())
    assert torch.equal(rows * multipliers, scales)  # in their own dtype


def test_what_is_no_product():
    """One scale in a row that comes late is enough."""
    for wrong in (1.0 + 2.0**-10, 16.0, 31.0, 0.0, -1.0, float("nan"), float("inf")):
        scales = torch.full((40, 3), 2.0)
        scales[:, 1] = 1.0
        assert split_scales(scales) is not None
        scales[30, 2] = wrong
        assert split_scales(scales) is None
    assert split_scales(torch.rand(40, 8, generator=torch.Generator().manual_seed(0)) + 0.5) is None


def test_multiples_without_a_common_unit_in_their_row():
    """16 and 15 are both small, but not of one scale."""
    assert split_scales(torch.tensor([[16.0, 15.0]])) is None
    assert split_scales(torch.tensor([[30.0, 28.0]])) is not None
