"""The native solver: the factor, the column solver and the grid search, each against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import reference
from tersor import _core

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of enum tersor_dtype


@pytest.fixture(autouse=True)
def _default_threads() -> Iterator[None]:
    yield
    _core.set_thread_count(0)


def correlated(tokens: int, k: int, decay: float = 0.7, seed: int = 0) -> Tensor:
    """Activations [tokens, k] whose covariance has eigenvalues falling like i**(-2 decay)."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(k, k, generator=draw)).Q
    return torch.randn(tokens, k, generator=draw) * torch.arange(1, k + 1).pow(-decay) @ basis


def gram_of(x: Tensor) -> Tensor:
    """xᵀ x, the same to the last bit on both sides of the diagonal."""
    gram = x.T @ x
    return gram.triu() + gram.triu(1).T


def gaussian(n: int, k: int, seed: int = 1) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def contiguous_groups(k: int, group: int) -> Tensor:
    return torch.arange(k, dtype=torch.int32) // group


def as_zeros(zeros: Tensor | None, scales: Tensor, bits: int) -> Tensor:
    return torch.full_like(scales, 2 ** (bits - 1)) if zeros is None else zeros


# --- the factor ----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 127, 128, 129, 300])
def test_factor_is_the_unit_upper_triangle(k: int) -> None:
    gram = gram_of(correlated(2 * k + 8, k))
    h = reference.damped(gram, 0.01)
    unit, squares = reference.unit_factor(h)
    result = gram.clone()
    damp, dead, pivots = _core.factor(result, 0.01)
    assert (damp, dead) == (0.01, 0)
    torch.testing.assert_close(pivots.double(), squares.sqrt(), rtol=1e-6, atol=0)
    # Computed in float64, rounded once to float32.
    bound = reference.U32 * unit.abs() + 2 * k * float(torch.linalg.cond(h)) * reference.U64
    assert ((result.double() - unit).abs() <= bound)[torch.ones(k, k).triu(1).bool()].all()
    assert torch.equal(result.tril(), gram.tril()), "the lower triangle must stay H"


def test_factor_reads_the_upper_triangle_only() -> None:
    gram = gram_of(correlated(300, 140))
    broken = gram.triu() + torch.full_like(gram, torch.nan).tril(-1)
    _core.factor(gram, 0.01)
    _core.factor(broken, 0.01)
    assert torch.equal(gram.triu(1), broken.triu(1))


@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_factor_copes_with_few_tokens(tokens: int) -> None:
    x = correlated(tokens, 160)
    gram = gram_of(torch.cat([x, x]))  # duplicates add nothing to the rank
    h = reference.damped(gram, 0.01)
    assert _core.factor(gram, 0.01)[:2] == (0.01, 0), "damping alone is enough"
    unit, _ = reference.unit_factor(h)
    bound = reference.U32 * unit.abs() + 2 * 160 * float(torch.linalg.cond(h)) * reference.U64
    assert ((gram.double() - unit).abs() <= bound)[torch.ones(160, 160).triu(1).bool()].all()


def test_factor_needs_no_damping_where_the_rank_is_full() -> None:
    assert _core.factor(gram_of(correlated(500, 40, decay=0.1)), 0.0)[:2] == (0.0, 0)


def test_damping_grows_only_as_far_as_needed() -> None:
    """H = I minus enough of a projection that its least eigenvalue is -0.03 of its mean diagonal:
    0.01 and 0.02 are too little, 0.04 is enough."""
    k = 200
    v = gaussian(1, k)
    v /= v.norm()
    gram = torch.eye(k) - 1.03 * v.T @ v
    gram = gram.triu() + gram.triu(1).T
    damp, dead, _ = _core.factor(gram.clone(), 0.01)
    assert (damp, dead) == (0.04, 0)
    least = float(torch.linalg.eigvalsh(gram.double())[0] / gram.double().diagonal().mean())
    assert -0.04 < least < -0.02


def test_damping_grows_from_nothing() -> None:
    """A rank-deficient H without damping: the first step is the size of H's rounding errors."""
    gram = gram_of(correlated(10, 64))
    damp, *_ = _core.factor(gram.clone(), 0.0)
    steps = damp / (64 * reference.U32)
    assert steps >= 1
    assert steps <= 64, "rounding errors are no larger"
    assert float(torch.log2(torch.tensor(steps))).is_integer()


def test_dead_columns_are_left_alone_and_counted() -> None:
    x = correlated(300, 150)
    dead = [0, 7, 128, 149]
    x[:, dead] = 0
    gram = gram_of(x)
    alive = [i for i in range(150) if i not in dead]
    unit, _ = reference.unit_factor(reference.damped(gram, 0.01))
    result = gram.clone()
    assert _core.factor(result, 0.01)[:2] == (0.01, 4)
    strict = result.triu(1)
    assert not strict[dead].any()
    assert not strict[:, dead].any()
    without = gram[alive][:, alive].contiguous()
    _core.factor(without, 0.01)
    # The same problem in other block positions: sums are grouped differently, in float64.
    torch.testing.assert_close(strict[alive][:, alive], without.triu(1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(strict.double(), unit.triu(1), rtol=1e-6, atol=1e-9)


def test_an_input_that_never_fires_gives_rounding_to_nearest() -> None:
    gram = torch.zeros(130, 130)
    assert _core.factor(gram, 0.01)[:2] == (0.01, 130)
    w = gaussian(20, 130)
    scales, _ = _core.search_grid(w, 130, 4, True, False)
    codes = _core.solve_columns(w, gram, scales, None, contiguous_groups(130, 130), 16)
    assert torch.equal(codes, ((w / scales).round() + 8).clamp(0, 15).to(torch.uint8))


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e30])
def test_factor_does_not_depend_on_the_unit_of_the_activations(scale: float) -> None:
    gram = gram_of(correlated(300, 70))
    scaled = gram * scale
    assert _core.factor(gram, 0.01)[:2] == _core.factor(scaled, 0.01)[:2]
    torch.testing.assert_close(gram.triu(1), scaled.triu(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(3, 3), (3, 140)])
def test_factor_refuses_what_is_not_finite(value: float, place: tuple[int, int]) -> None:
    gram = gram_of(correlated(300, 150))
    gram[place] = value
    before = gram.clone()
    with pytest.raises(ValueError, match=r"row 3 .*NaN"):
        _core.factor(gram, 0.01)
    assert torch.equal(gram.nan_to_num(), before.nan_to_num()), "a failure changes nothing"


def test_factor_refuses_what_is_no_gram_matrix() -> None:
    with pytest.raises(ValueError, match="positive semidefinite"):
        _core.factor(2 * torch.eye(50) - torch.ones(50, 50), 0.01)  # an eigenvalue of -48
    gram = gram_of(correlated(300, 50))
    gram[20, 20] = -1
    with pytest.raises(ValueError, match="row 20"):
        _core.factor(gram, 0.01)


# --- the column solver ---------------------------------------------------------------------------

SHAPES = [  # n, k, group (None: one per row)
    (1, 16, 16),
    (5, 48, 16),
    (16, 100, None),
    (31, 128, 32),
    (33, 129, None),
    (64, 256, 128),
    (70, 320, 32),
    (100, 512, 128),
]
GRIDS = [(4, True), (4, False), (3, True), (3, False), (2, True), (2, False), (8, True), (8, False)]


def solve(
    w: Tensor, gram: Tensor, group: int, bits: int, symmetric: bool, order: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes, and w, damped H, scales and zeros [n, k] in the order of the columns they were solved
    in, for the reference."""
    scales, zeros = _core.search_grid(w, group, bits, symmetric, False)
    groups = contiguous_groups(w.shape[1], group)
    if order is not None:
        w, groups = w[:, order].contiguous(), groups[order].contiguous()
        gram = gram[order][:, order].contiguous()
    unit = gram.clone()
    damp, *_ = _core.factor(unit, 0.01)
    codes = _core.solve_columns(w, unit, scales, zeros, groups, 2**bits)
    every_zero = as_zeros(zeros, scales, bits)
    return (codes, w, reference.damped(gram, damp), reference.spread(scales, groups),
            reference.spread(every_zero, groups))  # fmt: skip


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_codes_are_those_of_the_inverse_form(
    n: int, k: int, group: int | None, bits: int, symmetric: bool
) -> None:
    w, gram = gaussian(n, k), gram_of(correlated(4 * k, k))
    result = solve(w, gram, group or k, bits, symmetric)
    # A tie within the error of float32 is a matter of less than one row in a hundred here.
    assert reference.check_gptq_codes(*result, 2**bits) >= 0.99


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False)])
@pytest.mark.parametrize(("n", "k", "group"), [(20, 96, 32), (40, 384, 128)])
def test_activation_order_is_a_permutation(
    n: int, k: int, group: int, bits: int, symmetric: bool
) -> None:
    w, x = gaussian(n, k), correlated(4 * k, k)
    x *= torch.rand(k, generator=torch.Generator().manual_seed(2)) * 3
    gram = gram_of(x)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    result = solve(w, gram, group, bits, symmetric, order)
    assert reference.check_gptq_codes(*result, 2**bits) >= 0.99


@pytest.mark.parametrize("tokens", [2, 60, 250])
def test_codes_where_the_input_lacks_rank(tokens: int) -> None:
    w, gram = gaussian(64, 256), gram_of(correlated(tokens, 256, decay=1.0))
    result = solve(w, gram, 128, 4, True)
    assert reference.check_gptq_codes(*result, 16) >= 0.98


def trained_layer() -> tuple[Tensor, Tensor]:
    """The second layer of a small network after training, and its input: rectified, so correlated,
    off centre, and with units that never fire."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(48, 192), torch.nn.ReLU(), torch.nn.Linear(192, 64))
    x = correlated(1024, 48)
    target = torch.sin(4 * x @ gaussian(48, 64))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        (net(x) - target).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        net[0].bias[:5] = -100
        return net[2].weight.detach(), net[1](net[0](x))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False)])
def test_codes_of_a_trained_layer(bits: int, symmetric: bool, act_order: bool) -> None:
    w, x = trained_layer()
    gram = gram_of(x)
    assert (gram.diagonal() == 0).sum() >= 5
    order = torch.argsort(gram.diagonal(), descending=True) if act_order else None
    result = solve(w, gram, 64, bits, symmetric, order)
    assert reference.check_gptq_codes(*result, 2**bits) >= 0.98


def test_the_check_of_codes_can_fail() -> None:
    codes, *rest = solve(gaussian(8, 64), gram_of(correlated(300, 64)), 32, 4, True)
    codes[3, 40] ^= 1
    with pytest.raises(AssertionError):
        reference.check_gptq_codes(codes, *rest, 16)


def test_a_row_depends_on_nothing_but_itself() -> None:
    """Neither on the rows that share its vectors nor on the threads."""
    w, gram = gaussian(150, 200), gram_of(correlated(900, 200))
    scales, zeros = _core.search_grid(w, 50, 4, False, True)
    groups = contiguous_groups(200, 50)
    units, codes, grids = [], [], []
    for threads in (1, 2, 3):
        _core.set_thread_count(threads)
        unit = gram.clone()
        _core.factor(unit, 0.01)
        units.append(unit)
        codes.append(_core.solve_columns(w, unit, scales, zeros, groups, 16))
        grids.append(_core.search_grid(w, 50, 4, False, True))
    for other in (1, 2):
        assert torch.equal(units[0], units[other])
        assert torch.equal(codes[0], codes[other])
        assert torch.equal(grids[0][0], grids[other][0])
        assert torch.equal(grids[0][1], grids[other][1])
    some = torch.tensor([0, 31, 32, 77, 149])
    alone = _core.solve_columns(w[some], units[0], scales[some], zeros[some], groups, 16)
    assert torch.equal(alone, codes[0][some])


def test_more_rows_than_are_worked_on_at_once() -> None:
    _core.set_thread_count(1)  # 1024 rows at once
    w, gram = gaussian(1100, 32), gram_of(correlated(200, 32))
    codes, *_ = solve(w, gram, 32, 4, True)
    tail, *_ = solve(w[1000:].contiguous(), gram, 32, 4, True)
    assert torch.equal(codes[1000:], tail)


@pytest.mark.parametrize("decay", [0.3, 0.6, 1.0])
def test_gain_over_rounding_to_nearest_is_what_theory_says(decay: float) -> None:
    """With H = U D Uᵀ, GPTQ leaves Σ D_i (v_i - q_i)² and rounding Σ_ij E_i H_ij E_j: for errors
    that are uniform within a step, tr(D) against tr(H)."""
    n, k, bits = 256, 256, 4
    w, gram = gaussian(n, k), gram_of(correlated(2048, k, decay))
    codes, _, h, scales, zeros = solve(w, gram, k, bits, False)
    gptq = reference.layer_loss((codes - zeros) * scales - w, h)
    nearest = reference.round_to_nearest(w, scales, zeros, 2**bits)
    rtn = reference.layer_loss((nearest - zeros) * scales - w, h)
    _, pivots = reference.unit_factor(h)
    theory = float(pivots.sum() / h.trace())
    assert theory < 0.9, "the inputs must be correlated"
    assert gptq / rtn == pytest.approx(theory, rel=0.2)


def test_solve_refuses_bad_values() -> None:
    w, unit = gaussian(4, 32), torch.eye(32)
    scales, groups = torch.ones(4, 2), contiguous_groups(32, 16)
    _core.solve_columns(w, unit, scales, None, groups, 16)
    bad = w.clone()
    bad[2, 31] = torch.inf
    with pytest.raises(ValueError, match="weights hold NaN"):
        _core.solve_columns(bad, unit, scales, None, groups, 16)
    for value in (0.0, -1.0, torch.nan, torch.inf):
        wrong = scales.clone()
        wrong[3, 1] = value
        with pytest.raises(ValueError, match="scales must be positive"):
            _core.solve_columns(w, unit, wrong, None, groups, 16)
    for group in (-1, 2):
        outside = groups.clone()
        outside[5] = group
        with pytest.raises(ValueError, match=f"column 5 is in group {group} of 2"):
            _core.solve_columns(w, unit, scales, None, outside, 16)


def test_bindings_refuse_bad_arrays() -> None:
    w, unit = gaussian(4, 32), torch.eye(32)
    scales, groups = torch.ones(4, 2), contiguous_groups(32, 16)
    zeros = torch.zeros(4, 2, dtype=torch.uint8)
    refused = [
        lambda: _core.solve_columns(w, unit[:31], scales, None, groups, 16),
        lambda: _core.solve_columns(w, unit, scales[:3], None, groups, 16),
        lambda: _core.solve_columns(w, unit, scales, zeros[:, :1].contiguous(), groups, 16),
        lambda: _core.solve_columns(w, unit, scales, zeros, groups[:31], 16),
        lambda: _core.solve_columns(w, unit, scales, zeros, groups, 257),
        lambda: _core.solve_columns(w[:0], unit, scales[:0], None, groups, 16),
        lambda: _core.factor(torch.ones(4, 5), 0.01),
        lambda: _core.factor(torch.eye(4), -0.01),
        lambda: _core.factor(torch.eye(4), torch.nan),
        lambda: _core.search_grid(w, 10, 4, True, False),
        lambda: _core.search_grid(w, 0, 4, True, False),
        lambda: _core.search_grid(w, 16, 9, True, False),
        lambda: _core.search_grid(w, 16, 4, True, False, 3),
    ]
    for call in refused:
        with pytest.raises(ValueError):
            call()
    # Never converted or copied: a wrong dtype or stride is an error of the caller.
    for call in [
        lambda: _core.solve_columns(w.double(), unit, scales, None, groups, 16),
        lambda: _core.solve_columns(w, unit, scales, None, groups.long(), 16),
        lambda: _core.solve_columns(gaussian(32, 4).T, unit, scales, None, groups, 16),
        lambda: _core.factor(torch.eye(4).double(), 0.01),
        lambda: _core.factor(torch.eye(4)[0], 0.01),
        lambda: _core.search_grid(w.half(), 16, 4, True, False),
    ]:
        with pytest.raises(TypeError):
            call()


# --- the grid ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_range_grid(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    w = gaussian(30, 96) * 0.02 + torch.linspace(-0.1, 0.1, 30)[:, None]
    for group in (96, 32, 12, 1):
        scales, zeros = _core.search_grid(w, group, bits, symmetric, False, DTYPES.index(dtype))
        expected = reference.range_grid(w, group, bits, symmetric, dtype)
        assert torch.equal(scales.double(), expected.scales)
        assert (zeros is None) == symmetric
        assert torch.equal(as_zeros(zeros, scales, bits).double(), expected.zeros)


def shrinks(bits: int) -> list[float]:
    return [1 - 0.02 * i for i in range(41 if bits <= 3 else 26)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_clip_search_finds_the_least_error(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    w = gaussian(40, 192)
    for group in (192, 32, 24):
        found = _core.search_grid(w, group, bits, symmetric, True, DTYPES.index(dtype))
        assert torch.equal(found[0].to(dtype).float(), found[0]), "scales that the dtype can hold"
        grid = reference.Grid(found[0].double(), as_zeros(found[1], found[0], bits).double())
        candidates = [
            reference.range_grid(w, group, bits, symmetric, dtype, p) for p in shrinks(bits)
        ]
        errors = [reference.group_errors(w, candidate, 2**bits) for candidate in candidates]
        least = torch.stack(errors).amin(0)
        # Two candidates are told apart as far as float32 sums of `group` squares can.
        slack = 1 + 4 * (group + 16) * reference.U32
        assert (reference.group_errors(w, grid, 2**bits) <= least * slack).all()


GAUSSIAN = {  # bits, symmetric, clip: mean squared error at g64, g128
    (4, True, False): (0.01160, 0.01378),
    (4, False, False): (0.00830, 0.01012),
    (4, False, True): (0.00764, 0.00907),
    (3, True, False): (0.0632, 0.0750),
    (3, False, False): (0.0381, 0.0464),
    (2, True, False): (0.515, 0.588),
    (2, False, False): (0.209, 0.253),
    (8, True, False): (3.5e-5, 4.2e-5),
}


@pytest.mark.parametrize(("bits", "symmetric", "clip"), GAUSSIAN)
def test_error_on_gaussian_weights(bits: int, symmetric: bool, clip: bool) -> None:
    """Known values to 2 %; 8192 groups and more leave a standard error of 0.3 %."""
    w = gaussian(1024, 1024)
    for group, expected in zip((64, 128), GAUSSIAN[bits, symmetric, clip], strict=True):
        scales, zeros = _core.search_grid(w, group, bits, symmetric, clip)
        grid = reference.Grid(scales.double(), as_zeros(zeros, scales, bits).double())
        error = float(reference.group_errors(w, grid, 2**bits).mean())
        assert error == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_degenerate_groups(bits: int, clip: bool, symmetric: bool, dtype: torch.dtype) -> None:
    """Every scale can be divided by, zeros stay zeros, and errors are those of rounding."""
    largest = 2.0**-9 * torch.finfo(dtype).max
    rows = [
        torch.zeros(16),
        torch.full((16,), 0.3),
        torch.full((16,), -0.3),
        torch.tensor([0.0] * 15 + [1.0]),
        torch.tensor([-1.0] + [0.0] * 15),
        torch.linspace(-largest, largest, 16),
        torch.linspace(-1e-6, 2e-6, 16),
        torch.linspace(-1e-38, 1e-38, 16),
        torch.full((16,), 2.0**-149),
    ]
    w = torch.stack(rows)
    scales, zeros = _core.search_grid(w, 16, bits, symmetric, clip, DTYPES.index(dtype))
    assert (scales.to(dtype) == scales).all()
    assert (scales >= torch.finfo(torch.float32).tiny).all()
    assert scales[0] == 1
    codes = _core.solve_columns(
        w, torch.eye(16), scales, zeros, torch.zeros(16, dtype=torch.int32), 2**bits
    )
    result = (codes.double() - as_zeros(zeros, scales, bits)) * scales
    assert (result[w == 0] == 0).all()
    if clip:
        return  # a clipped grid may give up range
    # Half a step, another half where the zero point was rounded, and the rounding of the scale (of
    # float16's smallest ones by half of 2**-24) times as many steps as there are.
    steps = scales.double() * (0.5 if symmetric else 1.0)
    precision = scales.double() * torch.finfo(dtype).eps / 2
    if dtype == torch.float16:
        precision = precision.clamp(min=2.0**-25)
    assert ((result - w.double()).abs() <= steps + 2**bits * precision).all()


def test_scales_beyond_the_dtype_are_refused() -> None:
    w = gaussian(4, 32)
    w[2, 5] = 1e6
    _core.search_grid(w, 16, 4, True, False, DTYPES.index(torch.bfloat16))
    with pytest.raises(ValueError, match=r"too large for scales in this dtype.*bfloat16"):
        _core.search_grid(w, 16, 4, True, False, DTYPES.index(torch.float16))
    largest = torch.full((1, 16), torch.finfo(torch.float32).max)
    _core.search_grid(largest, 16, 2, True, False, DTYPES.index(torch.float32))
    with pytest.raises(ValueError, match="too large"):
        _core.search_grid(largest, 16, 2, True, False, DTYPES.index(torch.bfloat16))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 36])
def test_search_refuses_what_is_not_finite(value: float, place: int) -> None:
    w = gaussian(3, 37)
    w[1, place] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        _core.search_grid(w, 37, 4, True, True)
