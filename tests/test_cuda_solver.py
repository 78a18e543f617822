"""The column solver on a GPU: the tests of the CPU's (test_solve_native, test_prune_native), with
the CUDA path in its place, its kernels run on the CPU by tests/emulator, and on a GPU where there
is one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import emulated
import test_prune_native
import test_solve_native
from tersor import (
    GPTQ,
    QSpec,
    SparseGPT,
    Sparsity,
    TersorError,
    _core,
    column_solver,
    cuda,
    cuda_solver,
)
from tersor.calibrate import GramStats
from tersor.qweight import QWeight
from tersor.solvers import RTN
from test_solve_native import (
    correlated,
    gaussian,
    gram_of,
)

__all__ = [name for name in dir() if name.startswith("test_")]
WHERE = ["emulated", "gpu"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated.build(tmp_path_factory.mktemp("emulated"), "emulate_solve")


def solver(device: str) -> SimpleNamespace:
    """What test_solve_native and test_prune_native use of _core, by the CUDA path."""

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    def here(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.cpu()

    def search_grid(w: Tensor, *settings: Any) -> tuple[Tensor | None, ...]:
        dtype = settings[4] if len(settings) > 4 else 0
        return tuple(map(here, cuda_solver.search_grid(there(w), *settings[:4], dtype)))

    def factor(gram: Tensor, damp: float) -> tuple[float, int, Tensor | None]:
        moved = there(gram)
        used, dead, pivots = cuda_solver.factor(moved, damp)
        gram.copy_(moved)
        return used, dead, here(pivots)

    def solve_columns(
        w, unit, scales, zeros, groups, levels, *, mask=None, pivots=None, share=0.0, kept=0, of=0
    ):
        pivots = torch.ones(w.shape[1]) if pivots is None else pivots
        return here(
            cuda_solver.solve_columns(
                *map(there, (w, unit, scales, zeros, groups)), levels, mask=there(mask),
                pivots=there(pivots), share=share, kept=kept, of=of,
            )
        )  # fmt: skip

    return SimpleNamespace(
        factor=factor, search_grid=search_grid, solve_columns=solve_columns,
        set_thread_count=lambda count: None,
    )  # fmt: skip


@pytest.fixture(params=WHERE, autouse=True)
def device(request, monkeypatch):
    """The device, with the CUDA path in the place of the CPU's."""
    if request.param == "gpu":
        if (reason := cuda.unavailable()) is not None:
            pytest.skip(reason)
        chosen = "cuda"
    else:
        if emulated.compiler() is None:
            pytest.skip("there is no C++ compiler")
        emulated.use_solver(request.getfixturevalue("library"), monkeypatch)
        chosen = "cpu"
    for module in (test_solve_native, test_prune_native):
        monkeypatch.setattr(module, "_core", solver(chosen))
    return chosen


# --- beside the tests of the CPU ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", range(3))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clip", [False, True])
def test_grids_are_those_of_the_cpu(device, bits, symmetric, clip, dtype):
    """Equal to the bit, but where two ranges are equally good up to the order of a sum."""
    w = gaussian(24, 96)
    w[0] = 0
    w[1] *= 1e-6
    w[2] = w[2].abs()
    found = solver(device).search_grid(w, 32, bits, symmetric, clip, dtype)
    expected = _core.search_grid(w, 32, bits, symmetric, clip, dtype)
    same = found[0] == expected[0]
    if not symmetric:
        same &= found[1] == expected[1]
    assert same.all() if not clip else same.double().mean() >= 0.98


@pytest.mark.parametrize(
    ("how", "bound"),
    [
        ({}, 0.98),
        ({"share": 0.5}, 0.98),
        ({"kept": 2, "of": 4}, 0.98),
        ({"kept": 16, "of": 32}, 0.98),
    ],
)
@pytest.mark.parametrize("grid", [False, True])
def test_codes_and_masks_are_those_of_the_cpu(device, how, bound, grid):
    """In all rows but some that had a tie."""
    if not how and not grid:
        pytest.skip("nothing would be done")
    w, gram = gaussian(96, 320), gram_of(correlated(1500, 320))
    unit = gram.clone()
    _, _, pivots = _core.factor(unit, 0.01)
    scales, zeros = _core.search_grid(w, 64, 4, False, True)
    groups = torch.arange(320, dtype=torch.int32) // 64
    given = (w, unit, *((scales, zeros, groups, 16) if grid else (None, None, None, 0)))
    found = solver(device).solve_columns(*given, pivots=pivots, **how)
    expected = _core.solve_columns(*given, pivots=pivots, **how)
    same = (found == expected) if grid else ((found == 0) == (expected == 0))
    assert same.all(1).double().mean() >= bound


def test_scales_beyond_their_dtype(device):
    w = gaussian(4, 32) * 1e8
    with pytest.raises(TersorError, match="too large for scales"):
        solver(device).search_grid(w, 32, 4, True, False, 2)


def test_a_group_beyond_those_with_scales(device):
    w, unit = gaussian(4, 32), torch.eye(32)
    groups = torch.full((32,), 2, dtype=torch.int32)
    with pytest.raises(TersorError, match="groups from 2 to 2, and there are 2"):
        solver(device).solve_columns(w, unit, torch.ones(4, 2), None, groups, 16)


def test_products_are_of_float32_whatever_is_allowed():
    """And what the user allows is as before afterwards."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("an older torch, whose other name for it is read in the same way")
    before = matmul.allow_tf32
    try:
        for allowed in (True, False):
            matmul.allow_tf32 = allowed
            with cuda_solver.float32_products():
                assert matmul.fp32_precision == "ieee"
            assert matmul.allow_tf32 is allowed
    finally:
        matmul.allow_tf32 = before


@pytest.mark.parametrize("solve", [GPTQ(), GPTQ(act_order=True), SparseGPT(Sparsity(0.5))], ids=str)
def test_a_solver_on_the_device(device, solve, monkeypatch):
    """From statistics on: what a whole solver gives there is what it gives on the CPU."""
    w, x = gaussian(128, 512).bfloat16(), correlated(2000, 512).bfloat16()

    def made(place: str) -> QWeight:
        stats = GramStats(512, place)
        stats.update(x.to(place))
        q = solve(w.to(place), stats, QSpec(4, 128))
        assert isinstance(q, QWeight) and q.codes.device.type == place
        return q

    here = made("cpu")
    monkeypatch.setattr(column_solver, "_on", lambda tensor: cuda_solver)
    there = made(device)
    assert (here.scales == there.scales.cpu()).double().mean() >= 0.98
    assert (here.codes == there.codes.cpu()).all(1).double().mean() >= 0.95


def test_weights_on_another_kind_of_device_are_refused():
    with pytest.raises(TersorError, match=r"on the CPU or an NVIDIA GPU, not on meta"):
        RTN()(torch.empty(16, 32, device="meta"), None, QSpec(4, 32))
