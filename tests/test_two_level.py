"""The two-level grid: found in scales exactly, and searched for before weights are rounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tersor
import tiny
from tersor import QSpec, QuantLinear, QWeight, Scheme, TersorError
from tersor.calibrate import GramStats
from tersor.cli import main
from tersor.layerwise import Treatment
from tersor.solvers import GPTQ, RTN, Magnitude, SparseGPT, Wanda
from tersor.solvers.rtn import find_grid
from tersor.sparsity import Sparsity
from tersor.steps import Prune, Quantize, State
from tersor.two_level import MOST, split_scales, two_level_scales

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


# --- searched for --------------------------------------------------------------------------------

W = torch.randn(48, 512, generator=torch.Generator().manual_seed(1))
SPREAD = 0.25 + torch.rand(48, 8, generator=torch.Generator().manual_seed(2))
UNEVEN = W * SPREAD.repeat_interleave(64, 1)


def errors(w: Tensor, scales: Tensor) -> Tensor:
    """Squared, of rounding to nearest: float64 [n, groups]; w [n, groups, g]."""
    steps = (w / scales.unsqueeze(-1)).round().clamp(-8, 7)
    return (w - steps * scales.unsqueeze(-1)).square().sum(-1)


def best_of_the_nearest(w: Tensor, free: Tensor, dtype: torch.dtype, tried: int = 8) -> float:
    """Of one row [groups, g], by the definition, in float64: candidates are the numbers of seven
    binary digits from a 16th to a 7th of the largest scale, and their products that the dtype
    holds; the `tried` ones nearest to the free scales are measured."""
    w, free = w.double(), free.double()
    peak = float(free.max())
    found = []
    for exponent in range(-40, 40):
        for digits in range(64, 128):
            row = digits * 2.0**exponent
            if not peak / 16 <= row <= peak / 7:
                continue
            products = row * torch.arange(1, 16, dtype=torch.float64)
            products = products[products.to(dtype).double() == products]
            if not products.numel():
                continue
            above = torch.searchsorted(products, free).clamp(max=products.numel() - 1)
            below = (above - 1).clamp(min=0)
            below = torch.where(products[above] <= free, above, below)
            sides = torch.stack([products[below], products[above]])
            distance = (sides - free).abs().amin(0).square().sum()
            found.append((float(distance), sides))
    found.sort(key=lambda each: each[0])
    nearest = [sides for _, sides in found[:tried]]
    return min(float(torch.stack([errors(w, s) for s in sides]).amin(0).sum()) for sides in nearest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("w", [W, UNEVEN, 1e-3 * W], ids=["even", "uneven", "small"])
def test_the_grid_of_least_error_is_chosen(w, clip, dtype):
    spec, w = QSpec(4, 64), w.to(dtype)
    free, _ = find_grid(w, spec, clip)
    scales, zeros = find_grid(w, spec, clip, two_level=True)
    assert (scales.dtype, zeros) == (dtype, None)
    assert split_scales(scales) is not None
    groups = w.double().view(48, 8, 64)
    made = errors(groups, scales.double()).sum(1)
    for row in range(48):
        # Errors are told apart as far as float32 sums of 64 squares can.
        least = best_of_the_nearest(groups[row], free[row], dtype)
        assert float(made[row]) <= least * (1 + 4 * 80 * 2.0**-24)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_search_grid_never_gives_are_refused(bad):
    scales = torch.ones(48, 8)
    scales[40, 7] = bad
    with pytest.raises(TersorError, match="positive and finite"):
        two_level_scales(W, scales)
    with pytest.raises(TersorError, match="divide its columns"):
        two_level_scales(W, torch.ones(48, 7))


def test_zeros_and_sizes_far_apart():
    """A row without weights, groups without, and a group that is next to nothing beside another."""
    w = W[:4].clone()
    w[0] = 0
    w[1, 64:192] = 0
    w[2, :64] *= 1e-6
    w[3, 3:] = 0
    scales, _ = find_grid(w, QSpec(4, 64), clip=True, two_level=True)
    assert bool((scales[0] == 1).all())
    assert bool((scales > 0).all()) and split_scales(scales) is not None
    q = RTN(clip=True, two_level=True)(w, None, QSpec(4, 64))
    assert bool((q.dequantize()[w == 0] == 0).all())
    # The small group is below half a step of the least scale there can be.
    assert bool((q.dequantize()[2, :64] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-7, 1e-4, 1e4])
def test_scales_at_the_ends_of_a_dtype(dtype, size):
    w = (W * size).to(dtype)
    if not bool(w.isfinite().all()):
        return
    scales, _ = find_grid(w, QSpec(4, 64), clip=True, two_level=True)
    assert split_scales(scales) is not None


SOLVING = [
    RTN(two_level=True),
    GPTQ(two_level=True),
    Magnitude(Sparsity(0.5), two_level=True),
    Magnitude(Sparsity(0.5), refit=True, two_level=True),
    Wanda(Sparsity(pattern=(2, 4)), two_level=True),
    SparseGPT(Sparsity(pattern=(2, 4)), two_level=True),
    SparseGPT(Sparsity(0.5), refit=True, two_level=True),
]


@pytest.mark.parametrize("solver", SOLVING, ids=lambda solver: solver.name)
def test_every_solver_has_it(solver):
    stats = GramStats(512)
    stats.update(torch.randn(600, 512, generator=torch.Generator().manual_seed(3)))
    for made in (solver, solver.without_input()):
        q = made(UNEVEN, stats, QSpec(4, 64))
        assert split_scales(q.scales) is not None
        plain = replace(made, two_level=False)(UNEVEN, stats, QSpec(4, 64))
        assert split_scales(plain.scales) is None


def test_gptq_absorbs_the_difference():
    """Its loss stays under that of rounding to nearest on free scales."""
    stats = GramStats(512)
    mix = torch.randn(512, 512, generator=torch.Generator().manual_seed(4)) / 512**0.5
    x = torch.randn(2000, 512, generator=torch.Generator().manual_seed(3)) @ (mix + torch.eye(512))
    stats.update(x)

    def loss(q: QWeight) -> float:
        return float((x @ (UNEVEN - q.dequantize()).T).square().sum())

    found = loss(GPTQ(two_level=True)(UNEVEN, stats, QSpec(4, 64)))
    assert found < loss(RTN(clip=True)(UNEVEN, None, QSpec(4, 64)))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (QSpec(8, 64), "4 bits, not 8"),
        (QSpec(3, 64), "4 bits, not 3"),
        (QSpec(4, 64, symmetric=False), "is symmetric"),
        (QSpec(4, None), "one scale a row is a single level"),
    ],
)
def test_what_has_no_two_levels_is_refused(spec, reason):
    with pytest.raises(TersorError, match=reason):
        RTN(two_level=True)(W, None, spec)
    with pytest.raises(TersorError, match=reason):  # before any work
        Treatment(GPTQ(two_level=True), Scheme(spec))


def test_pruning_alone_has_no_levels():
    with pytest.raises(TersorError, match="give a scheme"):
        Treatment(SparseGPT(Sparsity(0.5), two_level=True))
    with pytest.raises(TersorError, match="--two-level is of a grid; add --quantize"):
        Prune(sparsity=0.5, two_level=True).call()
    with pytest.raises(TersorError, match="4 bits, not 8"):
        Quantize(bits=8, group=64, two_level=True).after(State())


def test_a_checkpoint_of_the_command(tmp_path, capsys):
    """An ordinary one, whose every scale is on the grid."""
    folder, out = tiny.save(tmp_path / "plain"), tmp_path / "quantized"
    main(["quantize", str(folder), "--out", str(out), "--method", "rtn", "--group", "32",
          "--activations", "int8", "--two-level"])  # fmt: skip
    capsys.readouterr()
    model = tersor.load(out)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert layers
    for layer in layers:
        assert str(layer.scheme) == "W4A8"
        assert split_scales(layer.qweight().scales) is not None
