"""A model in memory, gone through block by block with the calibration inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.blocks import Call, batches, catch
from tersor.devices import CPU
from tersor.errors import TersorError
from tersor.models import FoundArch, find_arch, plain_linears
from tersor.packed_linear import PackedLinear, keep_hooks
from tersor.scope import BlockScope, Scope, settle, settle_all


@dataclass
class Walk:
    """scope: what is to be compressed. how: where the architecture was found. texts: the inputs,
    each as it enters the block that is next; none without calibration."""

    model: nn.Module
    scope: Scope
    how: str
    texts: list[Text]

    def passes(self, block: BlockScope) -> Iterator[Any]:
        """Forward passes of the inputs through the block, as it is when they are made."""
        module = self.model.get_submodule(block.path)
        return (text.through(module) for text in self.texts)

    def advance(self, block: BlockScope) -> None:
        """Takes the inputs to the next block, by what this one gives now."""
        if block is not self.scope.blocks[-1]:
            module = self.model.get_submodule(block.path)
            for text in self.texts:
                text.advance(module)


@contextmanager
def walking(model: nn.Module, inputs: list[Call], ignore: Sequence[str]) -> Iterator[Walk]:
    """The linears that quantize_model takes: in the model's blocks where they can be found, and
    otherwise every nn.Linear. While it lasts the model is in evaluation mode.

    model: after check_model. inputs: from read_inputs.
    TersorError for a model with something else in the place of a linear.
    """
    with evaluating(model):
        found, texts = start(model, inputs)
        scope = settle(model, found, ignore) if found else settle_all(model, ignore)
        for name in scope.linears:
            _check_plain(name, model.get_submodule(name))
        how = found.how if found else "every nn.Linear of the module"
        yield Walk(model, scope, how, texts)


def check_model(model: nn.Module, on_gpu: bool = False) -> None:
    """TersorError unless the linears of a model can be replaced by others. on_gpu: whether all of
    it may be on an NVIDIA GPU."""
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
    first = device_of(model)
    for name, tensor in model.named_parameters():
        if tensor.is_cpu and first == CPU:
            continue
        if not on_gpu or not tensor.is_cuda or tensor.device != first:
            where = "the CPU, or all of it to one GPU" if on_gpu else "the CPU"
            raise TersorError(
                f"{name} is on {tensor.device}; load the model's weights and move it to {where}, "
                "or use quantize_checkpoint, which reads a folder block by block"
            )


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of a model are, after check_model."""
    return next((tensor.device for tensor in model.parameters()), CPU)


def replace_linear(model: nn.Module, linear: nn.Module, layer: nn.Module) -> None:
    """Puts a layer where a linear is, in all places where the model uses it, with its hooks."""
    keep_hooks(layer, linear)
    places = [name for name, each in model.named_modules(remove_duplicate=False) if each is linear]
    for name in places:
        model.set_submodule(name, layer)


class Text:
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


def _check_plain(name: str, linear: nn.Module) -> None:
    if not isinstance(linear, nn.Linear):
        raise TersorError(
            f"{name} is a {type(linear).__name__} already; begin with the original model, as "
            "transformers loads it"
        )
    more = [each for each, _ in linear.named_parameters() if each not in ("weight", "bias")]
    if more:
        raise TersorError(
            f"the weight of {name} is made of {', '.join(more)} in every call; make it an ordinary "
            "one first (torch.nn.utils.remove_weight_norm, prune.remove and the like)"
        )


def read_inputs(model: nn.Module, calibration: Tensor | Iterable[Any] | None) -> list[Call]:
    """Calibration as quantize_model takes it, as calls of the model; none of None."""
    if calibration is None:
        return []
    if isinstance(calibration, Tensor):
        _check_ids(model, calibration)
        device = device_of(model)
        return [Call((ids.to(device),), {}) for ids in batches(calibration)]
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


def start(model: nn.Module, inputs: list[Call]) -> tuple[FoundArch | None, list[Text]]:
    """The model's architecture and the inputs at its first block; or None and the inputs as they
    are, where it has no blocks or does not call them one after the other."""
    try:
        found = find_arch(model)
        plain_linears(model, found.arch)
        return found, [Text(model, found, each) for each in inputs]
    except TersorError:
        return None, [Text(model, None, each) for each in inputs]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
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
