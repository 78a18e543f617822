"""Fake quantization: the values that weights and activations will have once they are rounded, in
floating point, with gradients that pass through the rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tersor.activations import rounded
from tersor.errors import TersorError
from tersor.qweight import ActSpec, QSpec, QWeight
from tersor.solvers.rtn import round_to_grid

# The least scale of each dtype that it may be stored in: that of the solvers' grids, which are no
# denormals but in float16.
LEAST = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}
CELL = 0.45  # of a step, to either side of a level: what rounds to it, with a margin


def stored_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as a checkpoint in that dtype holds them: positive, finite, rounded; float32."""
    return scales.clamp(LEAST[dtype], torch.finfo(dtype).max).to(dtype).float()


def fake_quantize(
    w: Tensor, scales: Tensor, zeros: Tensor | None, spec: QSpec, dtype: torch.dtype
) -> Tensor:
    """w rounded to its grid: to the bit what QWeight.dequantize gives for its nearest codes.

    w: [n, k] floating point; the result has its dtype. scales: float32 [n, groups], of any value;
    they are used as stored_scales(scales, dtype). zeros: uint8 [n, groups] for an asymmetric spec.

    ŵ = clamp(round(v), -Q_n, Q_p) scale, with v = w / scale, Q_n = zero, Q_p = levels - 1 - zero.
    The gradient of w is that of ŵ where round(v) is not clamped, and 0 elsewhere; that of a scale
    is that of learned step size quantization (Esser et al., arXiv:1902.08153, equation 3),

        Σ ∂L/∂ŵ (round(v) - v, or where it is clamped -Q_n or Q_p).

    The paper counts as clamped what is beyond Q_p itself, and not beyond half a step more, which
    would freeze a weight that starts on the last level as soon as its scale shrinks.
    """
    quantized: Tensor = _Rounding.apply(w, scales, zeros, spec, dtype)
    return quantized


def ready(q: QWeight, dtype: torch.dtype | None = None) -> QWeight:
    """A weight to start training from: scales in the dtype that they will be saved in, by default
    their own, and positive. A group of zeros may have any scale, and gets the mean of the others.
    Raises TersorError where scales are negative or not finite, or of another dtype."""
    dtype = dtype or q.scales.dtype
    if dtype not in LEAST:
        raise TersorError(f"scales are float32, bfloat16 or float16, not {dtype}; convert them")
    scales = q.scales.float()
    if not bool((scales >= 0).all()) or not bool(scales.isfinite().all()):
        raise TersorError("the scales to start from are negative or not finite; make them again")
    groups = _groups(q)
    values = q.dequantize()
    alive = torch.zeros_like(scales).index_add_(1, groups, values.abs()) > 0
    usual = scales[alive].mean() if bool(alive.any()) else torch.ones(())
    scales = stored_scales(torch.where(alive, scales, usual), dtype)
    zeros = torch.full_like(q.codes, q.spec.midpoint) if q.zeros is None else q.zeros[:, groups]
    codes = torch.where(alive[:, groups], q.codes, zeros)
    return QWeight(q.spec, codes, scales.to(dtype), q.zeros, q.order)


def into_cells(w: Tensor, q: QWeight) -> Tensor:
    """w [n, k], with the weights that round to another code than that of q moved to the nearest
    value that rounds to it, with a margin; float32.

    So they begin with what q computes and still have what w knew about them: which are the first to
    go to another code, and to which.
    """
    values, reach = q.dequantize(), CELL * q.scales.float()[:, _groups(q)]
    moved = torch.maximum(torch.minimum(w.float(), values + reach), values - reach)
    return torch.where(_codes(w, q.spec, q.scales, q.zeros, q.order) == q.codes, w.float(), moved)


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, w: Tensor, scales: Tensor, zeros: Tensor | None, spec: QSpec, dtype: torch.dtype
    ) -> Tensor:
        scale = stored_scales(scales, dtype).unsqueeze(-1)
        zero = float(spec.midpoint) if zeros is None else zeros.float().unsqueeze(-1)
        steps = w.float().reshape(*scales.shape, -1) / scale
        levels = steps.round_().add_(zero).clamp_(0, spec.levels - 1).sub_(zero)
        ctx.save_for_backward(w, scale, zeros)
        ctx.spec = spec
        return levels.mul_(scale).view(w.shape).to(w.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        w, scale, zeros = ctx.saved_tensors
        spec = ctx.spec
        zero = float(spec.midpoint) if zeros is None else zeros.float().unsqueeze(-1)
        steps = w.float().reshape(*scale.shape[:2], -1) / scale
        codes = steps.round().add_(zero)
        inside = (codes >= 0) & (codes <= spec.levels - 1)
        g = gradient.reshape(steps.shape)
        of_w = of_scales = None
        if ctx.needs_input_grad[0]:
            of_w = torch.where(inside, g, 0).view(w.shape)
        if ctx.needs_input_grad[1]:
            slope = codes.clamp_(0, spec.levels - 1).sub_(zero).sub_(torch.where(inside, steps, 0))
            of_scales = slope.mul_(g).sum(-1)
        return of_w, of_scales, None, None, None


def fake_quantize_activation(x: Tensor, activation: ActSpec | None = None) -> Tensor:
    """x [..., k] rounded as the kernels of 8-bit activations round it (see ActSpec), with a scale
    for each token, in float32. The gradient passes as it is.
    activation: says which columns stay as they are; by default none."""
    quantized: Tensor = _InputRounding.apply(x, activation or ActSpec())
    return quantized


class _InputRounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: ActSpec) -> Tensor:
        return rounded(x, activation).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class FakeQuantize(nn.Module):
    """The parametrization W -> fake_quantize(W, scales): what a linear computes with while it is
    trained for the grid of `start`.

    start: where the grid begins, as `ready` gives it: its spec, scales, zero points and order of
        columns. Zero points stay as they are.
    learned: scales learn. transposed: W is stored as [k, n].

    A scale is its start * exp(pace * log_bias / unit), unit the mean of all starts, so that it
    stays positive and moves in proportion to its size. pace is the gradient scale of LSQ,
    1 / √(N Q_p), N weights under a scale and Q_p the largest level: the gradient of log_bias is
    that of the paper, and the steps of optimizers that do not see how large a gradient is, such as
    Adam, are smaller for a scale, which moves N weights at once, than for a weight. (With the full
    step of a weight, scales cost more than they gain in short trainings.)

    Trainers of transformers give no weight decay to a parameter with "bias" in its name.
    """

    start: Tensor  # float32 [n, groups]
    zeros: Tensor | None  # uint8 [n, groups]
    order: Tensor | None  # int32 [k]
    settings: Tensor  # int64 [5], what the rest of the state is for
    log_bias: nn.Parameter | None  # float32 [n, groups]

    def __init__(self, start: QWeight, learned: bool = True, transposed: bool = False) -> None:
        super().__init__()
        self.spec, self.dtype, self.transposed = start.spec, start.scales.dtype, transposed
        self.k = start.k
        self.resumed = False  # whether a state was loaded
        self.register_buffer("start", start.scales.float())
        self.register_buffer("zeros", None if start.zeros is None else start.zeros.clone())
        self.register_buffer("order", None if start.order is None else start.order.int())
        settings = [self.spec.bits, self.spec.group or 0, self.spec.symmetric]
        settings += [list(LEAST).index(self.dtype), learned]
        self.register_buffer("settings", torch.tensor(settings))
        self.log_bias = nn.Parameter(torch.zeros_like(self.start)) if learned else None

    @property
    def scales(self) -> Tensor:
        """As they are learned, before they are rounded to their dtype: float32 [n, groups]."""
        if self.log_bias is None:
            return self.start
        return self.start * (self.pace / self.start.mean() * self.log_bias).exp()

    @property
    def pace(self) -> float:
        largest = self.spec.levels - 1 - (self.spec.midpoint if self.spec.symmetric else 0)
        return float((self.k // self.start.shape[1] * largest) ** -0.5)

    def forward(self, weight: Tensor) -> Tensor:
        w = weight.t() if self.transposed else weight
        if self.order is None:
            w = fake_quantize(w, self.scales, self.zeros, self.spec, self.dtype)
        else:
            columns = _columns(self.order)
            sorted_ = fake_quantize(w[:, columns], self.scales, self.zeros, self.spec, self.dtype)
            w = sorted_[:, torch.argsort(columns)]
        return w.t() if self.transposed else w

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> QWeight:
        """The nearest codes of a weight [n, k] (or [k, n] where it is stored so), on the CPU."""
        w = weight.t() if self.transposed else weight
        scales = stored_scales(self.scales, self.dtype)
        codes = _codes(w, self.spec, scales, self.zeros, self.order)
        zeros, order = (None if t is None else t.cpu() for t in (self.zeros, self.order))
        return QWeight(self.spec, codes.cpu(), scales.to(self.dtype).cpu(), zeros, order)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        mine = self.settings.tolist()
        theirs = state_dict.get(f"{prefix}settings")
        if theirs is not None and theirs.tolist() != mine:
            raise TersorError(
                f"{prefix.removesuffix('.')} was saved with other settings {theirs.tolist()} than "
                f"{mine} (bits, group, symmetric, dtype of scales, learned); go on with the scheme "
                "that the training was begun with"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.resumed = self.resumed or theirs is not None

    def _apply(self, fn: Any, recurse: bool = True) -> FakeQuantize:
        """Follows the model to other devices, but keeps its dtypes, whatever the model's become."""
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
        return self


def _codes(
    w: Tensor, spec: QSpec, scales: Tensor, zeros: Tensor | None, order: Tensor | None
) -> Tensor:
    """The nearest codes, uint8 [n, k]."""
    if order is None:
        return round_to_grid(w.contiguous(), spec, scales, zeros)
    columns = _columns(order)
    codes = round_to_grid(w[:, columns], spec, scales, zeros)
    return codes[:, torch.argsort(columns)].contiguous()


def _groups(q: QWeight) -> Tensor:
    """The group of each column, int64 [k]."""
    width = q.k // q.scales.shape[1]
    return torch.arange(q.k) // width if q.order is None else q.order.long()


def _columns(order: Tensor) -> Tensor:
    """Columns sorted by group, int64 [k]."""
    return torch.argsort(order, stable=True)
