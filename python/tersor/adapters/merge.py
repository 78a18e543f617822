"""Adapters merged into the weights that they are on: rounded again to the same grid, with what the
rounding cost measured; or into a dense model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tersor.adapters.codebook import quantize_codebook
from tersor.adapters.lora import import_peft
from tersor.adapters.nf4_linear import NF4Linear
from tersor.calibrate import GramStats, capture
from tersor.errors import TersorError
from tersor.layerwise import Solver, find_solver
from tersor.linear import QuantLinear
from tersor.qweight import QWeight
from tersor.sparse_linear import SparseLinear
from tersor.two_level import split_scales
from tersor.walk import Text, evaluating, read_inputs, replace_linear, start

_PATTERNS = (4, 8, 16)  # with more columns, few bits would have such zeros by rounding alone


@dataclass(frozen=True)
class MergedLayer:
    """What merging did to one linear: M = W + B A, and Q is M as it is stored now.

    method: "rtn", "gptq", "nf4", "fp4", "dense", or "unchanged" where B A was zero.
    adapter: ‖B A‖² / ‖M‖², the size of what was merged.
    weight_error: ‖M - Q‖² / ‖M‖². More than `adapter` means that rounding moved the weight further
        than training did.
    output_error: the same of the layer's outputs on the calibration inputs; None without.
    changed: share of the codes that are others than before; None where there are none.
    held: share of the weights that were held at zero, where the zeros of W have a pattern; what B A
        has there is part of weight_error.
    """

    name: str
    method: str
    adapter: float
    weight_error: float
    output_error: float | None
    changed: float | None
    held: float = 0.0


@dataclass(frozen=True)
class MergeReport:
    """layers: those that had an adapter of ours, in order."""

    layers: list[MergedLayer] = field(default_factory=list)

    @property
    def weight_error(self) -> float:
        """The mean over layers."""
        return sum(x.weight_error for x in self.layers) / len(self.layers) if self.layers else 0.0


def merge_lora(
    model: Any,
    calibration: Tensor | Iterable[Any] | None = None,
    *,
    method: str | Solver = "rtn",
    dense: bool = False,
) -> tuple[nn.Module, MergeReport]:
    """The model without adapters, the active ones merged into its weights, and what that cost.

    model: a peft.PeftModel of add_lora or loftq_model, changed in place.
    method: how W + B A is rounded to the spec that W has, "rtn" or "gptq"; NF4 and FP4
        are rounded to the nearest of their values.
        A layer that is quantized is quantized afterwards, in the same layer, format and dtype, but
        groups follow the order of the columns again. One whose B A is zero stays as it is. Zeros
        in a pattern stay zeros: at least half of every 4, 8 or 16 columns, such as 2:4. Others
        cannot be told from what rounding made zero, and are merged into like any weight: keep the
        adapters beside a weight that was pruned without a pattern.
    calibration: as in quantize_model, for gptq, and to measure the errors of outputs. Each block
        sees what the merged ones before it give. Only on the CPU.
    dense: put an nn.Linear with W + B A, in the layer's dtype, in the place of each instead.

    What peft put on other modules is merged by peft's own merge_and_unload().
    Raises TersorError, before the model is changed, where it has no adapters or they cannot be
    merged; adapters on SparseLinear only with dense=True, since a merged weight has no 2:4 zeros.
    """
    peft = import_peft()
    if not isinstance(model, peft.PeftModel):
        raise TersorError(
            f"{type(model).__name__} is no PeftModel; give what tersor.add_lora returned"
        )
    solver = find_solver(method)
    if solver.sparsity is not None:
        raise TersorError(f"{solver.name} prunes; merge by rtn or gptq and prune afterwards")
    inner = model.get_base_model()
    layers = _adapted(inner)
    _check(layers, dense)
    inputs = read_inputs(inner, calibration)
    if solver.needs is not None and not inputs and not dense:
        raise TersorError(
            f"{solver.name} needs inputs to calibrate on; pass token ids as `calibration`, or use "
            'method="rtn"'
        )
    if inputs:
        _check_on_cpu(inner)
    report = MergeReport()
    with torch.no_grad(), evaluating(inner):
        found, texts = start(inner, inputs)
        blocks = [path for path, _ in found.blocks(inner)] if found else []
        for path, names in _by_block(layers, blocks):
            reached = path is not None and bool(texts)
            stats: dict[str, GramStats] = {}
            if reached and names:
                block = inner.get_submodule(path or "")
                stats = capture({n: layers[n] for n in names}, _passes(texts, block))
            for name in names:
                layer, merged = _merged(name, layers[name], stats.get(name), solver, dense)
                replace_linear(inner, layers[name], layer)
                report.layers.append(merged)
            if reached and blocks and path != blocks[-1]:
                for text in texts:
                    text.advance(inner.get_submodule(path or ""))
    return model.merge_and_unload(), report


def _adapted(model: nn.Module) -> dict[str, Any]:
    from tersor.adapters.layer import AdaptedLinear

    found = ((name, m) for name, m in model.named_modules() if isinstance(m, AdaptedLinear))
    return {name: module for name, module in found if module.lora_A}


def _check(layers: dict[str, Any], dense: bool) -> None:
    if not layers:
        raise TersorError(
            "no quantized linear has an adapter; merge adapters on dense linears by peft's "
            "merge_and_unload()"
        )
    if not any(set(layer.lora_A) & set(layer.active_adapters) for layer in layers.values()):
        raise TersorError("no adapter is active; choose one with model.set_adapter(name)")
    for name, layer in layers.items():
        if any(not p.weight.isfinite().all() for p in (*layer.lora_A.values(),
                                                       *layer.lora_B.values())):  # fmt: skip
            raise TersorError(f"the adapter of {name} holds NaN or infinite values; train it anew")
        if isinstance(layer.get_base_layer(), SparseLinear) and not dense:
            raise TersorError(
                f"{name} is 2:4 sparse and W + B A is not; use dense=True and prune again, or keep "
                "the adapter beside it"
            )


def _check_on_cpu(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise TersorError(
                f"{name} is on {tensor.device}, and calibration runs on the CPU; bring the model "
                "there, with model.cpu(), or leave calibration out"
            )


def _by_block(layers: dict[str, Any], blocks: list[str]) -> Iterator[tuple[str | None, list[str]]]:
    """The layers of each block in turn, and in the end those in none with None for a block. Without
    blocks, all of them under the path of the whole model."""
    if not blocks:
        yield "", list(layers)
        return
    rest = dict.fromkeys(layers)
    for path in blocks:
        inside = [name for name in layers if name.startswith(f"{path}.")]
        for name in inside:
            del rest[name]
        yield path, inside
    if rest:
        yield None, list(rest)


def _passes(texts: list[Text], block: nn.Module) -> Iterator[Any]:
    return (text.through(block) for text in texts)


def _merged(
    name: str, layer: Any, stats: GramStats | None, solver: Solver, dense: bool
) -> tuple[nn.Module, MergedLayer]:
    base = layer.get_base_layer()
    before = _dense_weight(base)
    delta, shift = torch.zeros_like(before), before.new_zeros(base.out_features)
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            b, a = layer.lora_B[adapter], layer.lora_A[adapter]
            delta += layer.scaling[adapter] * (b.weight.float() @ a.weight.float())
            if b.bias is not None:
                shift += layer.scaling[adapter] * b.bias.float()
    bias = base.bias
    if bool(shift.any()):
        bias = shift if bias is None else bias.float() + shift
        bias = bias.to(base.dtype)
    wanted, held = before + delta, 0.0
    if not dense and not delta.any():
        made, how = base, "unchanged"
        if bias is not base.bias:
            made = _rebuilt(base, bias)
    elif dense:
        made, how = nn.Linear(base.in_features, base.out_features, bias is not None), "dense"
        made.weight = nn.Parameter(wanted.to(base.dtype))
        if bias is not None:
            made.bias = nn.Parameter(bias.detach().to(base.dtype).clone())
        made.requires_grad_(False)  # as everything in a model with adapters
    else:
        zeros = _pattern(before)
        sparse = wanted if zeros is None else wanted.masked_fill(zeros, 0.0)
        held = 0.0 if zeros is None else float(zeros.double().mean())
        try:
            made, how = _requantized(base, sparse, bias, stats, solver)
        except TersorError as error:
            raise TersorError(f"{name}: {error}") from error
    made.train(layer.training)
    off = _dense_weight(made) - wanted
    total = _squares(wanted) or 1.0
    output = None
    if stats is not None and stats.tokens:
        output = stats.loss(off) / (stats.loss(wanted) or 1.0)
    changed = None if dense else _changed(base, made)
    sizes = _squares(delta) / total, _squares(off) / total
    return made, MergedLayer(name, how, *sizes, output, changed, held)


def _pattern(w: Tensor) -> Tensor | None:
    """The zeros of w [n, k] where at least half of every so many columns are, bool; else None."""
    zeros = w == 0
    for of in _PATTERNS:
        if w.shape[1] % of == 0 and bool((2 * zeros.unflatten(1, (-1, of)).sum(-1) >= of).all()):
            return zeros
    return None


def _requantized(
    base: nn.Module, wanted: Tensor, bias: Tensor | None, stats: GramStats | None, solver: Solver
) -> tuple[nn.Module, str]:
    if isinstance(base, NF4Linear):
        made = quantize_codebook(wanted, base.spec)
        return NF4Linear(made, bias, base.dtype), base.spec.values
    assert isinstance(base, QuantLinear)  # SparseLinear is refused before
    seen = stats if stats is not None and stats.tokens else None
    if solver.needs is not None and seen is None:
        solver = solver.without_input()
    before = base.qweight()
    if hasattr(solver, "two_level") and _two_level(before):
        solver = replace(solver, two_level=True)
    # In the dtype of the scales, which a solver gives the scales that it finds.
    q: Any = solver(wanted.to(before.scales.dtype), seen, base.spec)
    scale = base.portable_scale()
    layer = QuantLinear(q, bias, base.activation, base.dtype, base.format, scale)
    layer.shared = base.shared
    return layer, solver.name


def _two_level(q: QWeight) -> bool:
    known = q.spec.bits == 4 and q.spec.symmetric and q.spec.group is not None
    return known and split_scales(q.scales) is not None


def _rebuilt(base: nn.Module, bias: Tensor) -> nn.Module:
    """The same layer with another bias."""
    if isinstance(base, NF4Linear):
        return NF4Linear(base.nf4_weight(), bias, base.dtype)
    assert isinstance(base, QuantLinear)
    scale = base.portable_scale()
    layer = QuantLinear(base.qweight(), bias, base.activation, base.dtype, base.format, scale)
    layer.shared = base.shared
    return layer


def _dense_weight(layer: nn.Module) -> Tensor:
    """float32 [n, k]"""
    if isinstance(layer, QuantLinear):
        return layer.qweight().dequantize()
    if isinstance(layer, NF4Linear):
        return layer.dequantize()
    weight: Tensor = layer.weight.detach().float()  # SparseLinear, nn.Linear
    return weight


def _changed(before: nn.Module, after: nn.Module) -> float:
    one, two = _codes(before), _codes(after)
    return float((one != two).double().mean())


def _codes(layer: nn.Module) -> Tensor:
    if isinstance(layer, QuantLinear):
        return layer.qweight().codes
    assert isinstance(layer, NF4Linear)
    packed, count = layer.nf4_weight().packed, layer.out_features * layer.in_features
    return torch.stack([packed & 15, packed >> 4], 1).flatten()[:count]


def _squares(tensor: Tensor) -> float:
    return float(tensor.square().sum(dtype=torch.float64))
