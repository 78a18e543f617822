"""What a linear layer should give: a float64 product, and how far from it arithmetic may lead.

Random weights to try it on are here too. `tersor.testing` uses both for kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.qweight import ActSpec, QSpec, QWeight


def oracle(
    x: Tensor,
    q: QWeight | Tensor,
    bias: Tensor | None = None,
    activation: ActSpec | None = None,
    weight_eps: float = 0.0,
    input_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """x @ dequantize(q).T + bias in float64, and the error that a right implementation may have.

    q may be a weight of bfloat16 or float16 values as well, [n, k]. x [m, k] is float32, bfloat16
    or float16; returns y and tolerance, both float64 [m, n], for a result that is rounded to the
    dtype of x.

    The bound (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1): a sum of
    products in float32, in any order, with at most r roundings on the way of each product, is off
    by at most r u / (1 - r u) times the sum of the absolute products, u = 2**-24. Each product
    meets k sums, one scale per group and a few single roundings (two scales, the zero point, the
    bias). A kernel may subtract the zero point after the sum, so a code counts as code + zero.
    Then one rounding to the dtype of the result. `weight_eps` is for a kernel that rounds the
    dequantized weight to 16 bits before it multiplies; `input_scale` is that of static activations.
    """
    if isinstance(q, Tensor):
        weight, groups, largest = q.double(), 1, 1.0
        offset = weight.abs()
    else:
        weight, offset = _grid_values(q)
        groups, largest = q.scales.shape[1], q.scales.abs().amax().item()
    slack: Tensor | float = 0.0
    values = x.double()
    if activation is not None:
        kept = activation.kept(x)
        rest = values if kept is None else values.masked_fill(kept, 0)
        rest, uncertain = _quantize_tokens(rest, input_scale)
        values = rest if kept is None else torch.where(kept, values, rest)
        slack = uncertain @ weight.abs().T
    product = values @ weight.T
    absolute = values.abs() @ offset.T
    if bias is not None:
        product = product + bias.double()
        absolute = absolute + bias.double().abs()

    u = torch.finfo(torch.float32).eps / 2
    roundings = x.shape[1] + groups + 8
    # Instructions such as vdpbf16ps flush subnormal products to zero.
    flush = x.shape[1] * torch.finfo(torch.float32).tiny * (1.0 + largest)
    error = roundings * u / (1 - roundings * u) * absolute + slack + flush
    if weight_eps:
        error = error + weight_eps * (values.abs() @ weight.abs().T)
    out = torch.finfo(x.dtype)
    return product, error + out.eps / 2 * (product.abs() + error) + out.smallest_normal * out.eps


def _grid_values(q: QWeight) -> tuple[Tensor, Tensor]:
    """(code - zero) * scale and (code + zero) * |scale|, float64 [n, k]."""
    k, groups = q.k, q.scales.shape[1]
    index = torch.arange(k) // (k // groups) if q.order is None else q.order.long()
    scales = q.scales.double()[:, index]
    midpoint = torch.full((q.n, groups), q.spec.midpoint)
    zeros = (midpoint if q.zeros is None else q.zeros).double()[:, index]
    return (q.codes.double() - zeros) * scales, (q.codes.double() + zeros) * scales.abs()


def _quantize_tokens(x: Tensor, given: float | None) -> tuple[Tensor, Tensor]:
    """What int8 activations stand for, [m, k], and by how much float32 arithmetic may move each.

    A token's scale is absmax / 127.5, or the one given; codes are rounded half to even, from -128
    to 127. In float32 the quotient is off by up to four roundings, so that a value this close to
    half a step may go either way. Where the scale is a power of two nothing is rounded: ties must
    go to even.
    """
    absmax = x.abs().amax(dim=1, keepdim=True)
    scale = torch.where(absmax > 0, absmax / 127.5, torch.ones_like(absmax))
    if given is not None:
        scale = torch.full_like(scale, given)
    steps = x / scale
    codes = torch.round(steps).clamp(-128, 127)  # half to even
    exact = torch.frexp(scale).mantissa == 0.5
    distance = (steps - torch.floor(steps) - 0.5).abs()
    close = (distance <= 128 * 4 * torch.finfo(torch.float32).eps / 2) & ~exact
    return codes * scale, close * scale


def random_qweight(
    n: int,
    k: int,
    spec: QSpec,
    scale_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    pattern: tuple[int, int] = (0, 0),
) -> QWeight:
    """A random weight with every code, scales around 2**-6 and, in every seventh row, a zero
    scale; [n, k].

    pattern: (kept, of): at most `kept` of every `of` codes do not stand for zero.
    """
    r = torch.Generator().manual_seed(seed)
    grid = (n, spec.groups(k))
    scales = (0.5 + torch.rand(grid, generator=r)) / 64
    scales[6::7, 0] = 0
    codes = torch.randint(0, spec.levels, (n, k), generator=r, dtype=torch.uint8)
    kept, of = pattern
    pruned = _zeros(n, k, kept, of, r) if of else None
    zeros = torch.full(grid, spec.midpoint, dtype=torch.uint8)
    if not spec.symmetric:
        zeros = torch.randint(0, spec.levels, grid, generator=r, dtype=torch.uint8)
    if pruned is not None:
        codes = torch.where(pruned, zeros.repeat_interleave(k // grid[1], dim=1), codes)
    return QWeight(spec, codes, scales.to(scale_dtype), None if spec.symmetric else zeros)


def random_values(
    n: int, k: int, dtype: torch.dtype, seed: int = 0, pattern: tuple[int, int] = (2, 4)
) -> Tensor:
    """A random weight of 16-bit values, [n, k], at most `kept` of every `of` not zero; with every
    fifth of the zeros there are, and more, in every third row."""
    r = torch.Generator().manual_seed(seed)
    values = torch.randn(n, k, generator=r) / 8
    values.masked_fill_(_zeros(n, k, *pattern, r), 0.0)
    values[::3].masked_fill_(torch.rand(values[::3].shape, generator=r) < 0.2, 0.0)
    return values.to(dtype)


def _zeros(n: int, k: int, kept: int, of: int, r: torch.Generator) -> Tensor:
    """All but `kept` of every `of`, bool [n, k]."""
    order = torch.rand(n, k // of, of, generator=r).argsort(dim=-1)
    return (order >= kept).view(n, k)


def assert_close(y: Tensor, expected: Tensor, tolerance: Tensor, what: str) -> None:
    """AssertionError that names the worst element, unless |y - expected| <= tolerance."""
    error = (y.double() - expected).abs()
    bad = ~(error <= tolerance)  # also true of NaN
    if bool(bad.any()):
        i, j = (int(v) for v in bad.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {y.numel()} results are off, first [{i}, {j}] = "
            f"{float(y[i, j])!r}, expected {float(expected[i, j])!r} "
            f"+- {float(tolerance[i, j]):.3g}"
        )
