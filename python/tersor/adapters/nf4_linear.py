"""NF4Linear: a linear layer over a weight in NF4 or FP4, the frozen base of QLoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor import cuda_codebook
from tersor.adapters.codebook import NF4, Codebook, CodebookWeight, quantize_codebook, scale_shapes
from tersor.errors import TersorError
from tersor.report import LayerReport, Report, versions
from tersor.walk import check_model, replace_linear, walking

_PARTS = ("packed", "scales", "steps", "mean")


class NF4Linear(nn.Module):
    """y = x @ dequantize(W).T + bias; W and bias are frozen.

    weight: in NF4 or FP4. bias: floating point [n], or None.
    dtype: of the bias, and of adapters before peft makes them float32; by default the bias's, or
        float32. Inputs may have any floating-point dtype: W is dequantized to it for the product,
        in the forward pass and again in the backward pass, and is never kept.

    state_dict() holds the packed tensors (packed, scales, steps, mean) and the bias, and
    load_state_dict() takes them as they are. `.to(dtype)` changes none of them but the bias.

    On a GPU the weight is in the order of the CUDA kernels, for which it is dequantized no more
    where tokens are few (tersor.cuda_codebook), as long as blocks lie within rows: of 32, of a
    multiple of 64, or the whole row. Others stay in portable order and are dequantized there.
    """

    # Portable order; None while the weight is in CUDA order.
    packed: Tensor | None
    scales: Tensor | None
    steps: Tensor | None
    mean: Tensor | None
    ordered: Tensor | None  # uint8, CUDA order
    bias: Tensor | None

    def __init__(
        self, weight: CodebookWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.spec = weight.spec
        self._blocks = cuda_codebook.Blocks.of(weight.shape, weight.spec)
        self.dtype = dtype or (torch.float32 if bias is None else bias.dtype)
        if bias is not None and bias.shape != (self.out_features,):
            raise TersorError(f"bias must be [{self.out_features}], not {list(bias.shape)}")
        for name, (length, kind) in scale_shapes(weight.spec, weight.shape).items():
            tensor = getattr(weight, name)
            if tensor is None or tensor.shape != (length,) or tensor.dtype != kind:
                found = None if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise TersorError(f"{name} of {weight.spec} must be {kind} [{length}], not {found}")
        for name in _PARTS:
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("bias", None if bias is None else bias.detach().to(self.dtype).clone())
        self.register_buffer("ordered", None, persistent=False)
        self._settle()

    @classmethod
    def from_linear(cls, linear: nn.Linear, spec: Codebook | None = None) -> NF4Linear:
        """The layer with its weight rounded to the spec, by default NF4()."""
        if not isinstance(linear, nn.Linear):
            raise TersorError(f"from_linear takes an nn.Linear, not {type(linear).__name__}")
        weight = quantize_codebook(linear.weight, spec or NF4())
        return cls(weight, linear.bias, linear.weight.dtype)

    def nf4_weight(self) -> CodebookWeight:
        """The weight in portable order; its tensors are the layer's own, but for a weight that is
        in CUDA order."""
        shape = (self.out_features, self.in_features)
        if self.ordered is not None:
            return cuda_codebook.unpack_weight(self.ordered, self.spec, shape)
        assert self.packed is not None and self.scales is not None
        return CodebookWeight(self.spec, shape, self.packed, self.scales, self.steps, self.mean)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[n, k]"""
        if self.ordered is not None:
            blocks = self._blocks
            return cuda_codebook.dequantize(self.ordered, blocks, 0, blocks.n, dtype)
        return self.nf4_weight().dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: floating point [..., k] -> [..., n]"""
        if not x.is_floating_point() or not x.dim() or x.shape[-1] != self.in_features:
            raise TersorError(
                f"the layer takes floating-point inputs [..., {self.in_features}], not {x.dtype} "
                f"{list(x.shape)}"
            )
        if self.ordered is not None:
            if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
                x = x.to(torch.get_autocast_dtype(x.device.type))
            return cuda_codebook.linear(x, self.ordered, self.bias, self._blocks)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = _Product.apply(x, self.nf4_weight(), *self._tensors())
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.spec}" + ", CUDA" * (self.ordered is not None)
        )

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.packed, self.scales, self.steps, self.mean

    # --- where the weight lives -------------------------------------------------------------

    def _settle(self) -> None:
        """Puts a weight on a GPU into CUDA order, where it has one."""
        if self.packed is not None and cuda_codebook.takes(self._blocks, self.packed.device):
            self.ordered = cuda_codebook.pack_weight(self.nf4_weight())
            for name in _PARTS:
                self._buffers[name] = None

    def _unsettle(self) -> None:
        """Puts the weight into portable order, on the device that it is on."""
        if self.ordered is not None:
            weight = self.nf4_weight()
            for name in _PARTS:
                self._buffers[name] = getattr(weight, name)
            self.ordered = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """A dtype applies to the bias: the scales are part of what the codes mean."""
        there = self.packed if self.ordered is None else self.ordered
        assert there is not None
        probe = fn(torch.empty(0, dtype=self.dtype, device=there.device))
        if probe.device.type != there.device.type:
            self._unsettle()
        before = {name: self._buffers[name] for name in (*_PARTS, "ordered")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if old is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self.dtype = probe.dtype
        self._settle()
        return self

    # --- saving and loading -----------------------------------------------------------------

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.ordered is not None:
            weight = self.nf4_weight()
            for name in scale_shapes(weight.spec, weight.shape):
                destination[prefix + name] = getattr(weight, name)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self._unsettle()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._settle()


class _Product(torch.autograd.Function):
    """x @ dequantize(W).T, which keeps the packed weight for the backward pass, not the dense."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: CodebookWeight, *tensors: Tensor | None) -> Tensor:
        ctx.spec, ctx.shape, ctx.dtype = weight.spec, weight.shape, x.dtype
        ctx.save_for_backward(*tensors)
        return F.linear(x, weight.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight = CodebookWeight(ctx.spec, ctx.shape, *ctx.saved_tensors)
        return (grad @ weight.dequantize(grad.dtype)).to(ctx.dtype), *[None] * 5


def nf4_model(model: nn.Module, spec: Codebook | None = None, ignore: Sequence[str] = ()) -> Report:
    """Puts an NF4Linear in the place of the model's linears; returns what came of each.

    model: of transformers or not, changed in place. The linears are those that quantize_model
        takes: in the blocks where they can be found, and otherwise every nn.Linear.
    spec: NF4(...) or FP4(...); by default NF4 in blocks of 64 with double quantization.
    ignore: as in quantize_model.

    There is no kernel for NF4 on a CPU, nor a folder: it is the base of QLoRA (tersor.add_lora),
    whose weights are dequantized in every pass, but on a GPU, where kernels serve few tokens.
    Rounding is deterministic, so that the same model gives the same base; state_dict() and
    load_state_dict() keep one that was made in another way.
    Raises TersorError, before the model is changed, for what cannot be quantized.
    """
    spec = spec or NF4()
    if not isinstance(spec, Codebook):
        raise TersorError(f"spec is NF4(...) or FP4(...), not {spec!r}")
    check_model(model)
    with walking(model, [], ignore) as walk:
        scope = walk.scope
        report = Report(
            model=type(model).__name__,
            fingerprint="in memory",
            architecture=walk.how,
            settings={"method": spec.values, **asdict(spec), "ignore": sorted(set(ignore))},
            versions=versions(),
            calibration=None,
            kept=scope.kept,
            departures=scope.departures,
        )
        made = {}
        for name in scope.linears:
            made[name], layer = _rounded(name, model.get_submodule(name), spec)
            report.layers.append(layer)
    for name, made_layer in made.items():
        replace_linear(model, model.get_submodule(name), made_layer)
    return report


def _rounded(name: str, linear: nn.Linear, spec: Codebook) -> tuple[NF4Linear, LayerReport]:
    try:
        layer = NF4Linear.from_linear(linear, spec)
    except TersorError as error:
        raise TersorError(f"{name}: {error}") from error
    w, q = linear.weight.detach().float(), layer.dequantize()
    lost, total = ((w - q).square().sum(dtype=torch.float64), w.square().sum(dtype=torch.float64))
    weight = layer.nf4_weight()
    return layer, LayerReport(
        name=name,
        shape=weight.shape,
        scheme=str(spec),
        method=spec.values,
        error=float(lost / total) if total > 0 else 0.0,
        sparsity=1 - int(q.count_nonzero()) / q.numel(),
        tokens=0,
        bytes=weight.nbytes,
    )
