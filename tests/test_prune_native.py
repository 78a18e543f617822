"""The native column solver where weights become zero, against SparseGPT as published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from tersor import _core
from test_solve_native import contiguous_groups, correlated, gaussian, gram_of

SHAPES = [(1, 16), (5, 48), (33, 144), (70, 320), (100, 512)]
RATIOS = [0.5, 0.7, 0.05, 0.95]
PATTERNS = [(2, 4), (4, 8), (1, 4), (1, 2), (5, 8), (8, 16), (3, 16)]
WIDE = [(16, 32), (40, 64), (100, 128)]


def prune(w: Tensor, gram: Tensor, **sparsity: Any) -> Tensor:
    unit = gram.clone()
    _, _, pivots = _core.factor(unit, 0.01)
    return _core.solve_columns(w, unit, None, None, None, 0, pivots=pivots, **sparsity)


def check(w: Tensor, gram: Tensor, expected: dict[str, Any], **sparsity: Any) -> None:
    h = reference.damped(gram, 0.01)
    found = prune(w, gram, **sparsity)
    same = reference.check_pruned(found, w, h, reference.sparsegpt_inverse_form(w, h, **expected))
    assert same >= 0.99


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_ratio_is_that_of_the_published_form(n: int, k: int, ratio: float) -> None:
    w, gram = gaussian(n, k), gram_of(correlated(4 * k, k))
    check(w, gram, {"ratio": ratio}, share=ratio)
    zeros = (prune(w, gram, share=ratio) == 0).sum()
    blocks = [min(128, k - i) for i in range(0, k, 128)]
    assert zeros == sum(int(ratio * n * width) for width in blocks)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_pattern_is_that_of_the_published_form(n: int, k: int, pattern: tuple[int, int]) -> None:
    w, gram = gaussian(n, k), gram_of(correlated(4 * k, k))
    check(w, gram, {"pattern": pattern}, kept=pattern[0], of=pattern[1])


@pytest.mark.parametrize("pattern", WIDE, ids=str)
@pytest.mark.parametrize("n", [3, 64])
def test_a_pattern_wider_than_a_panel(n: int, pattern: tuple[int, int]) -> None:
    w, gram = gaussian(n, 384), gram_of(correlated(1600, 384))
    check(w, gram, {"pattern": pattern}, kept=pattern[0], of=pattern[1])


@pytest.mark.parametrize("pattern", [*PATTERNS, *WIDE], ids=str)
def test_no_pattern_is_violated(pattern: tuple[int, int]) -> None:
    kept, of = pattern
    w = prune(gaussian(50, 512), gram_of(correlated(600, 512)), kept=kept, of=of)
    assert ((w.view(50, -1, of) != 0).sum(-1) == kept).all()


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_mask_is_kept(n: int, k: int) -> None:
    w, gram = gaussian(n, k), gram_of(correlated(4 * k, k))
    mask = torch.rand(n, k, generator=torch.Generator().manual_seed(3)) < 0.4
    check(w, gram, {"mask": mask}, mask=mask.to(torch.uint8))


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (3, False), (8, True)])
@pytest.mark.parametrize("sparsity", [(0.5, None), (0.7, None), (0, (2, 4)), (0, (16, 32))])
@pytest.mark.parametrize(("n", "k", "group"), [(5, 64, 32), (70, 384, 128)])
def test_the_joint_pass(
    n: int, k: int, group: int, sparsity: tuple[float, Any], bits: int, symmetric: bool
) -> None:
    """Zeros and codes in one pass, equal to the reference but for rows with a tie."""
    ratio, pattern = sparsity
    w, gram = gaussian(n, k), gram_of(correlated(4 * k, k))
    scales, zeros = _core.search_grid(w, group, bits, symmetric, False)
    groups = contiguous_groups(k, group)
    unit = gram.clone()
    _, _, pivots = _core.factor(unit, 0.01)
    kept, of = pattern or (0, 0)
    codes = _core.solve_columns(
        w, unit, scales, zeros, groups, 2**bits, pivots=pivots, share=ratio, kept=kept, of=of
    )
    every = torch.full_like(scales, 2 ** (bits - 1)) if zeros is None else zeros
    grid = (reference.spread(scales, groups), reference.spread(every, groups))
    h = reference.damped(gram, 0.01)
    expected = reference.sparsegpt_inverse_form(w, h, ratio, pattern, None, (*grid, 2**bits))
    same = (codes.double() - grid[1]) * grid[0] == expected.values
    # One tie in a row may change all that follows in it, and by the threshold of a ratio a little
    # in others.
    assert same.all(1).double().mean() >= 0.98
    assert ((codes.double() == grid[1]) | expected.kept)[same.all(1)].all(), "zeros are zero codes"


def test_the_zeros_do_not_depend_on_threads() -> None:
    w, gram = gaussian(150, 300), gram_of(correlated(900, 300))
    results = []
    for threads in (1, 2, 3):
        _core.set_thread_count(threads)
        results.append([prune(w, gram, share=0.6), prune(w, gram, kept=2, of=4)])
    _core.set_thread_count(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_inputs_that_never_fire_go_first() -> None:
    x = correlated(600, 128)
    x[:, 40:80] = 0
    w = prune(gaussian(20, 128), gram_of(x), share=0.25)
    assert (w[:, 40:80] == 0).sum() == 20 * 32, "a quarter of 128 columns"
    largest = gaussian(20, 128)[:, 40:80].abs()
    assert largest[w[:, 40:80] == 0].max() <= largest[w[:, 40:80] != 0].min()
    assert (w[:, :40] != 0).all() and (w[:, 80:] != 0).all()


def test_bad_input() -> None:
    w, unit, pivots = gaussian(4, 32), torch.eye(32), torch.ones(32)
    mask = torch.ones(4, 32, dtype=torch.uint8)

    def call(**given: Any) -> None:
        _core.solve_columns(w, unit, None, None, None, 0, **given)

    for given, message in (
        ({"share": 0.5}, "needs 32 pivots"),
        ({"share": 0.5, "pivots": pivots[:31]}, "needs 32 pivots"),
        ({"share": 1.0, "pivots": pivots}, "less than 1"),
        ({"share": torch.nan, "pivots": pivots}, "less than 1"),
        ({"kept": 2, "of": 3, "pivots": pivots}, "pattern"),
        ({"kept": 4, "of": 4, "pivots": pivots}, "pattern"),
        ({"kept": 32, "of": 64, "pivots": pivots}, "divides 32"),
        ({"kept": 2, "of": -4, "pivots": pivots}, "pattern"),
        ({"share": 0.5, "kept": 2, "of": 4, "pivots": pivots}, "not two"),
        ({"share": 0.5, "mask": mask, "pivots": pivots}, "not two"),
        ({"mask": mask[:3]}, r"\[4, 32\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**given)
    with pytest.raises(ValueError, match="a grid is"):
        _core.solve_columns(w, unit, torch.ones(4, 1), None, None, 16)
    with pytest.raises(ValueError, match="a grid is"):
        _core.solve_columns(w, unit, None, mask, None, 16)
