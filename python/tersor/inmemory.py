"""Compressing a model that is in memory: any nn.Module, changed in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from tersor import cuda
from tersor.cuda_int8 import share
from tersor.devices import CPU
from tersor.errors import TersorError
from tersor.formats import FORMATS
from tersor.layerwise import (
    EVERY,
    Solver,
    Treatment,
    check_arguments,
    compress_block,
    find_solver,
    settings_of,
)
from tersor.linear import QuantLinear
from tersor.models.linears import is_conv1d, is_fused
from tersor.qweight import QWeight, Scheme
from tersor.report import Report, Timings, versions
from tersor.scope import check_inputs
from tersor.walk import check_model, device_of, read_inputs, replace_linear, walking


def quantize_model(
    model: nn.Module,
    calibration: Tensor | Iterable[Any] | None = None,
    *,
    scheme: Scheme,
    method: str | Solver = "gptq",
    ignore: Sequence[str] = (),
    sequential: bool = False,
) -> Report:
    """Puts a QuantLinear in the place of the model's linears; returns what came of each.

    model: of transformers or not, on the CPU or all of it on one NVIDIA GPU, where the work is done
        then and its linears run. Where its blocks can be found (see tersor.models),
        the linears in them are quantized, each block on what the quantized ones before it give; of
        another module every nn.Linear is, on what the original module computes.
    calibration: token ids, int64 [samples, seq_len] on the CPU (Calibration(...).windows(tokenizer)
        makes them), or a list of inputs on the model's device: for each a tensor, or a tuple or
        dict of the model's arguments.
        None for methods that need none.
    scheme: what every linear becomes; a mapping by patterns is refused here.
    method, ignore, sequential: as in quantize_checkpoint.

    A QuantLinear keeps the hooks of the linear in whose place it is.
    Raises TersorError for bad input; one that is found in the course of the work (activations that
    are not finite) leaves the blocks before it quantized.
    """
    return _compress(model, calibration, scheme, find_solver(method), ignore, sequential)


def prune_model(
    model: nn.Module,
    calibration: Tensor | Iterable[Any] | None = None,
    *,
    method: Solver,
    scheme: Scheme | None = None,
    ignore: Sequence[str] = (),
    sequential: bool = False,
) -> Report:
    """Makes weights of the model's linears zero, in place; returns what came of each.

    method: a solver with its sparsity, such as SparseGPT(Sparsity(pattern=(2, 4))).
    scheme: quantize what is left in the same pass and put QuantLinears in place; None keeps the
        linears as they are, with zeros in their weights.
    The rest is as in quantize_model.
    """
    if find_solver(method).sparsity is None:
        raise TersorError(f"{method} prunes nothing; use quantize_model, or another method")
    return _compress(model, calibration, scheme, method, ignore, sequential)


def _compress(
    model: nn.Module,
    calibration: Tensor | Iterable[Any] | None,
    scheme: Scheme | None,
    solver: Solver,
    ignore: Sequence[str],
    sequential: bool,
) -> Report:
    treatment = Treatment(solver, scheme)
    check_arguments({EVERY: treatment}, ignore)
    check_model(model, on_gpu=True)
    if scheme is None and (odd := _not_plain(model)):
        raise TersorError(
            f"{odd} would have to become nn.Linear to be pruned in memory, and the model could no "
            "longer be saved as it was; prune its folder (tersor.prune_checkpoint)"
        )
    inputs = read_inputs(model, calibration)
    if solver.needs is not None and not inputs:
        other = "method=Magnitude(...)" if solver.sparsity else 'method="rtn"'
        raise TersorError(
            f"{solver.name} needs inputs to calibrate on; pass token ids as `calibration`, or use "
            f"{other}, which needs none"
        )
    if scheme is not None and scheme.static and not inputs:
        raise TersorError(
            "static scales of activations come of inputs; pass token ids as `calibration`, or use "
            "ActSpec(), which needs none"
        )
    with walking(model, inputs, ignore) as walk:
        scope = walk.scope
        check_inputs(model, scope.linears, scheme.weight if scheme else None, solver.sparsity)
        if scheme is not None:
            for name in scope.linears:
                check_kernel(name, model.get_submodule(name).weight, scheme)
        report = Report(
            model=type(model).__name__,
            fingerprint="in memory",
            architecture=walk.how,
            settings=settings_of({EVERY: treatment}, ignore, sequential, device_of(model)),
            versions=versions(),
            calibration={"inputs": len(inputs)} if inputs else None,
            kept=scope.kept,
            departures=scope.departures,
        )
        treatments = dict.fromkeys(scope.linears, treatment)
        for block in scope.blocks:
            passes = partial(walk.passes, block) if walk.texts else None
            solved = list(compress_block(model, block, treatments, passes, sequential, Timings()))
            walk.advance(block)
            for each in solved:
                if scheme is not None and isinstance(each.weight, QWeight):
                    layer = install(model, each.name, each.weight, scheme, each.input_scale)
                    packed = FORMATS[layer.format].pack(each.weight.to(CPU))
                    each.report.bytes = sum(tensor.nbytes for tensor in packed.values())
                    if each.input_scale is not None:
                        each.report.bytes += each.input_scale.nbytes
                report.layers.append(each.report)
                if each.departure:
                    report.departures[each.name] = each.departure
            for tap in block.taps:
                share([model.get_submodule(name) for name in tap])
    return report


def swap_linears(model: nn.Module, scheme: Scheme, ignore: Sequence[str] = ()) -> Report:
    """quantize_model by rounding to nearest, which needs no calibration."""
    return quantize_model(model, scheme=scheme, method="rtn", ignore=ignore)


def check_kernel(name: str, weight: Tensor, scheme: Scheme) -> None:
    """TersorError where a weight, once quantized, could not stay on the device that it is on."""
    if weight.is_cpu:
        return
    if not weight.is_cuda:
        raise TersorError(
            f"{name} is on {weight.device}, which has no kernels; bring the model to the CPU, with "
            "model.cpu()"
        )
    n, k = weight.shape
    grid = cuda.Grid.of_spec(n, k, scheme.weight, scheme.activation, weight.dtype)
    reason = cuda.unavailable(weight.device) or cuda.refusal(grid)
    if reason is not None:
        raise TersorError(
            f"{name}, {n} x {k}, cannot be {scheme} on {weight.device}: {reason}; bring the "
            "model to the CPU, with model.cpu(), or quantize it another way"
        )


def _not_plain(model: nn.Module) -> str | None:
    """The first module whose weights are linears in another form, or None."""
    for name, module in model.named_modules():
        if is_conv1d(module) or is_fused(module):
            return name
    return None


def install(
    model: nn.Module,
    name: str,
    weight: QWeight,
    scheme: Scheme,
    input_scale: Tensor | None = None,
) -> QuantLinear:
    """Puts a QuantLinear with that weight in the place of a linear, with its bias and hooks."""
    linear = model.get_submodule(name)
    dtype = linear.weight.dtype
    layer = QuantLinear(weight, linear.bias, scheme.activation, dtype, input_scale=input_scale)
    replace_linear(model, linear, layer)
    return layer
