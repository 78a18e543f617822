"""Compressing a model that is in memory: any nn.Module, changed in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tersor.blocks import Call, batches, catch
from tersor.errors import TersorError
from tersor.formats import FORMATS
from tersor.layerwise import (
    EVERY,
    Solved,
    Solver,
    Treatment,
    check_arguments,
    compress_block,
    find_solver,
    settings_of,
)
from tersor.linear import QuantLinear
from tersor.models import FoundArch, find_arch, plain_linears
from tersor.models.linears import is_conv1d, is_fused
from tersor.packed_linear import PackedLinear, keep_hooks
from tersor.qweight import Scheme
from tersor.report import Report, Timings, versions
from tersor.scope import check_inputs, settle, settle_all


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

    model: of transformers or not, on the CPU. Where its blocks can be found (see tersor.models),
        the linears in them are quantized, each block on what the quantized ones before it give; of
        another module every nn.Linear is, on what the original module computes.
    calibration: token ids, int64 [samples, seq_len] (Calibration(...).windows(tokenizer) makes
        them), or a list of inputs: for each a tensor, or a tuple or dict of the model's arguments.
        None for methods that need none.
    scheme, method, ignore, sequential: as in quantize_checkpoint.

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
    if isinstance(model, nn.Linear):
        raise TersorError(
            "a bare nn.Linear cannot be replaced within itself; use QuantLinear.from_linear"
        )
    for each in model.modules():
        if isinstance(each, PackedLinear):
            raise TersorError(
                f"the model holds a {type(each).__name__} already, whose weight is frozen; begin "
                "with the original, as transformers loads it"
            )
    for name, tensor in model.named_parameters():
        if not tensor.is_cpu:
            raise TersorError(
                f"{name} is on {tensor.device}; load the model's weights and move it to the CPU, "
                "or use quantize_checkpoint, which reads a folder block by block"
            )
    if scheme is None and (odd := _not_plain(model)):
        raise TersorError(
            f"{odd} would have to become nn.Linear to be pruned in memory, and the model could no "
            "longer be saved as it was; prune its folder (tersor.prune_checkpoint)"
        )
    inputs = _inputs(model, calibration)
    if solver.needs is not None and not inputs:
        other = "method=Magnitude(...)" if solver.sparsity else 'method="rtn"'
        raise TersorError(
            f"{solver.name} needs inputs to calibrate on; pass token ids as `calibration`, or use "
            f"{other}, which needs none"
        )
    with _evaluating(model):
        found, texts = _start(model, inputs)
        scope = settle(model, found, ignore) if found else settle_all(model, ignore)
        spec = scheme.weight if scheme else None
        check_inputs(model, scope.linears, spec, solver.sparsity)
        for name in scope.linears:
            _check_plain(name, model.get_submodule(name))
        report = Report(
            model=type(model).__name__,
            fingerprint="in memory",
            architecture=found.how if found else "every nn.Linear of the module",
            settings=settings_of({EVERY: treatment}, ignore, sequential),
            versions=versions(),
            calibration={"inputs": len(inputs)} if inputs else None,
            kept=scope.kept,
            departures=scope.departures,
        )
        treatments = dict.fromkeys(scope.linears, treatment)
        for block in scope.blocks:
            module = model.get_submodule(block.path)
            passes = partial(_passes, texts, module) if texts else None
            solved = list(compress_block(model, block, treatments, passes, sequential, Timings()))
            if block is not scope.blocks[-1]:
                for text in texts:
                    text.advance(module)
            for each in solved:
                if scheme is not None:
                    _install(model, each, scheme)
                report.layers.append(each.report)
                if each.departure:
                    report.departures[each.name] = each.departure
    return report


def swap_linears(model: nn.Module, scheme: Scheme, ignore: Sequence[str] = ()) -> Report:
    """quantize_model by rounding to nearest, which needs no calibration."""
    return quantize_model(model, scheme=scheme, method="rtn", ignore=ignore)


class _Text:
    """One input on its way through the model's blocks, or at the door of a model without blocks."""

    def __init__(self, model: nn.Module, found: FoundArch | None, call: Call) -> None:
        self.hidden: Tensor | None = None
        self.calls = [call]
        blocks = [block for _, block in found.blocks(model)] if found is not None else []
        if blocks:
            self.hidden, self.calls = catch(model, blocks, *call.args, **call.kwargs)

    def through(self, block: nn.Module) -> Any:
        """What comes out of the block that the text has come to."""
        call = self.calls[0]
        try:
            with torch.no_grad():
                if self.hidden is None:
                    return block(*call.args, **call.kwargs)
                return call(block, self.hidden)
        except TersorError:
            raise
        except Exception as error:  # whatever a model does with input that it was not made for
            given = ", ".join([*map(_brief, call.args), *(f"{k}=..." for k in call.kwargs)])
            cause = " ".join(str(error).split())
            raise TersorError(
                f"{type(block).__name__} cannot be run on the calibration input ({given}): "
                f"{type(error).__name__}: {cause}; pass what its forward takes"
            ) from error

    def advance(self, block: nn.Module) -> None:
        self.hidden = self.through(block)
        self.calls = self.calls[1:]


def _passes(texts: list[_Text], block: nn.Module) -> Iterator[Any]:
    return (text.through(block) for text in texts)


def _not_plain(model: nn.Module) -> str | None:
    """The first module whose weights are linears in another form, or None."""
    for name, module in model.named_modules():
        if is_conv1d(module) or is_fused(module):
            return name
    return None


def _check_plain(name: str, linear: nn.Module) -> None:
    more = [each for each, _ in linear.named_parameters() if each not in ("weight", "bias")]
    if more:
        raise TersorError(
            f"the weight of {name} is made of {', '.join(more)} in every call; make it an ordinary "
            "one first (torch.nn.utils.remove_weight_norm, prune.remove and the like)"
        )


def _install(model: nn.Module, solved: Solved, scheme: Scheme) -> None:
    linear = model.get_submodule(solved.name)
    layer = QuantLinear(solved.weight, linear.bias, scheme.activation, linear.weight.dtype)
    keep_hooks(layer, linear)
    solved.report.bytes = sum(t.nbytes for t in FORMATS[layer.format].pack(solved.weight).values())
    # A linear that the model uses in several places stays one layer in all of them.
    places = [name for name, each in model.named_modules(remove_duplicate=False) if each is linear]
    for name in places:
        model.set_submodule(name, layer)


def _inputs(model: nn.Module, calibration: Tensor | Iterable[Any] | None) -> list[Call]:
    if calibration is None:
        return []
    if isinstance(calibration, Tensor):
        _check_ids(model, calibration)
        return [Call((ids,), {}) for ids in batches(calibration)]
    if isinstance(calibration, (str, Mapping)) or not isinstance(calibration, Iterable):
        raise TersorError(
            f"calibration inputs are a tensor of token ids or a list with an element for each call "
            f"of the model, not a {type(calibration).__name__}; put a single input in a list, and "
            "make ids of text with Calibration(...).windows(tokenizer)"
        )
    calls = []
    for each in calibration:
        if isinstance(each, Mapping):
            calls.append(Call((), dict(each)))
        else:
            calls.append(Call(tuple(each) if isinstance(each, (tuple, list)) else (each,), {}))
    if not calls:
        raise TersorError("the calibration inputs are empty; pass at least one")
    return calls


def _check_ids(model: nn.Module, ids: Tensor) -> None:
    if ids.dim() != 2 or ids.dtype != torch.int64 or not ids.is_cpu:
        raise TersorError(
            f"a calibration tensor holds token ids, int64 [samples, seq_len] on the CPU, not "
            f"{_brief(ids)} on {ids.device}; pass other inputs as a list"
        )
    if not ids.numel():
        raise TersorError(f"the calibration inputs are empty, {tuple(ids.shape)}; pass some tokens")
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no model of transformers, or one of images
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    known = getattr(embeddings, "num_embeddings", None)
    if known is not None and not 0 <= low <= high < known:
        raise TersorError(
            f"the calibration tokens are from {low} to {high}, but the model has {known} "
            "embeddings; make them with the model's own tokenizer"
        )


def _brief(value: Any) -> str:
    """An argument in a message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def _start(model: nn.Module, inputs: list[Call]) -> tuple[FoundArch | None, list[_Text]]:
    """The model's architecture and the inputs at its first block; or None and the inputs as they
    are, where it has no blocks or does not call them one after the other."""
    try:
        found = find_arch(model)
        plain_linears(model, found.arch)
        return found, [_Text(model, found, each) for each in inputs]
    except TersorError:
        return None, [_Text(model, None, each) for each in inputs]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and without a cache of keys that would be kept for every text."""
    config, training = getattr(model, "config", None), model.training
    cache = getattr(config, "use_cache", None)
    model.eval()
    if config is not None and cache is not None:
        config.use_cache = False
    try:
        yield
    finally:
        model.train(training)
        if config is not None and cache is not None:
            config.use_cache = cache
