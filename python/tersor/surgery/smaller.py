"""The smaller model that structured pruning leaves, before any work is done on it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tersor.calibrate import Calibration
from tersor.errors import TersorError
from tersor.layerwise import machine
from tersor.models import Stored, build_skeleton, find_arch, plain_linears
from tersor.report import Report, versions
from tersor.runs import describe
from tersor.source import Source

PRUNED_SHARE = 0.05  # as GPTQ has it, which keeps the zeros of such weights
PRUNED = "its zeros are filled with other values; cut first, and prune what is left"
MULTIPLE = 128  # channels: the usual group of a quantized weight, and what matrix units take whole


def smaller_skeleton(
    source: Source, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> nn.Module:
    """The model that plain transformers makes of this config.json, on the meta device.

    shapes: of every parameter that will be written, by its name in the model.
    TersorError unless the model has a place of exactly that shape for each of them, and no other.
    """
    model = build_skeleton(config, source.dtype)
    model.config.use_cache = False
    plain_linears(model, find_arch(model).arch)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in (name for name, _ in model.named_parameters() if name not in shapes):
        raise TersorError(f"{type(model).__name__} wants {name}, which nothing is left for")
    for name, shape in shapes.items():
        if wanted.get(name) != shape:
            asked = f"the shape {wanted[name]}" if name in wanted else "no place"
            raise TersorError(
                f"{type(model).__name__} has {asked} for {name}, which would be {shape}: its code "
                "takes no other number than the one that follows from the rest of config.json"
            )
    return model


def foreseen(source: Source, config: Mapping[str, Any], model: nn.Module) -> Source:
    """The source that a step will leave, as far as its configuration and shapes tell: what can be
    asked of it before its files are there.

    config, model: config.json and the skeleton of what the step leaves."""
    checkpoint = copy.copy(source.checkpoint)
    checkpoint.config = dict(config)
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    where = {name: Stored(name, name) for name in names}
    return Source(checkpoint, model, find_arch(model), where, source.dtype)


def begin_report(
    source: Source,
    settings: Mapping[str, Any],
    calibration: Calibration | None,
    windows: Tensor | None,
) -> Report:
    """The report of a cut, before any work. windows: the ids of the text, where it is used."""
    return Report(
        model=source.checkpoint.folder.resolve().name,
        fingerprint=source.checkpoint.fingerprint(),
        architecture=source.found.how,
        settings={**settings, **machine()},
        versions=versions(),
        calibration=describe(calibration, windows),
        bytes_before=source.nbytes,
    )


def channels_left(what: str, count: int, share: float, multiple: int | None) -> int:
    """How many of `count` channels stay where this share goes, as a multiple of `multiple`; None:
    of what `count` is a multiple of, up to MULTIPLE. TersorError where that takes none away."""
    multiple = math.gcd(count, MULTIPLE) if multiple is None else multiple
    if type(multiple) is not int or not 1 <= multiple <= count:
        raise TersorError(f"multiple is from 1 to the {count} channels there are, not {multiple}")
    kept = max(1, round(count * (1 - share) / multiple)) * multiple
    if kept >= count:
        fix = f"use {what}={multiple / count:.2g} or" if multiple < count else "use"
        raise TersorError(
            f"{what}={share:g} of {count} channels by {multiple} rounds to none; {fix} a smaller "
            "multiple"
        )
    return kept


def is_number(value: object) -> bool:
    """Whether it can be compared with a bound, and is no flag."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_pruned(w: Tensor) -> bool:
    """Whether a weight has zeros that somebody put there."""
    return w.numel() - int(w.count_nonzero()) >= PRUNED_SHARE * w.numel()


def parameters(model: nn.Module) -> int:
    """As transformers counts them, what is tied once."""
    return sum(parameter.numel() for parameter in model.parameters())
