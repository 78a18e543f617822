"""What a model on the way is: its size, and its quality and speed beside the original's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.checkpoint import Checkpoint
from tersor.evaluate import evaluate, measure_speed
from tersor.loading import load_any
from tersor.recipes.stages import Stage, linear_sizes
from tersor.report import LayerReport, Report
from tersor.scope import settle
from tersor.source import Source
from tersor.surgery.smaller import parameters

BASELINE, MODEL = "baseline", "model"
_PROMPT = 256  # tokens, where no text is read
_LOGITS = 1 << 26  # of a forward pass, all windows together


def measure_size(
    stage: Stage, folder: Path, report: Report | None = None, before: Path | None = None
) -> None:
    """Fills in bytes, parameters, bits, zeros and what each linear takes. Weights are read one at a
    time.

    report: of the step that made the folder. before: the model that it was made of, which says
    what a quantized one is: which linears there are, and how many parameters."""
    checkpoint = Checkpoint.open(folder)
    stage.bytes = sum(checkpoint.metadata(name).nbytes for name in checkpoint.names)
    stage.linears = linear_sizes(folder)
    quantized: dict[str, LayerReport] = {}
    if "quantization_config" in checkpoint.config and report is not None:
        quantized = {layer.name: layer for layer in report.layers}
    source = Source.open(before if quantized and before is not None else folder)
    stage.parameters = parameters(source.model)
    weights = bits = zeros = 0.0
    for name in settle(source.model, source.found, ()).linears:
        if name in quantized:
            layer = quantized[name]
            count = math.prod(layer.shape)
            nbytes, share = layer.bytes, layer.sparsity
        else:
            place = source.where[f"{name}.weight"]
            if quantized:  # by its name in what tersor writes, where experts are no longer fused
                place = replace(place, name=place.saved_as, expert=None, rows=None)
            w = place.read(checkpoint)
            count, nbytes = w.numel(), w.nbytes
            share = 1 - int(w.count_nonzero()) / count
        weights, bits, zeros = weights + count, bits + 8 * nbytes, zeros + share * count
    stage.bits_per_weight, stage.sparsity = bits / weights, zeros / weights


def measure_quality(
    stage: Stage, folder: Path, original: Path, windows: Mapping[str, Tensor], speed: bool
) -> None:
    """Adds what the stage still lacks of quality, text by text, and of speed, in the same run as
    the original's: pairs of the same windows, and times in turns."""
    todo = {text: ids for text, ids in windows.items() if text not in stage.quality}
    speed = speed and stage.speed is None
    if not (todo or speed):
        return
    models = {BASELINE: load_any(original)}
    if folder != original:
        models[MODEL] = load_any(folder)
    mine = MODEL if MODEL in models else BASELINE
    for text, ids in todo.items():
        vocabulary = models[BASELINE].config.get_text_config().vocab_size
        batch = max(1, min(8, _LOGITS // (ids.shape[1] * vocabulary)))
        stage.quality[text] = evaluate(models, ids, BASELINE, batch=batch)[mine].to_dict()
    if speed:
        prompt = next(iter(windows.values()))[:1] if windows else _random_prompt(models[BASELINE])
        speeds = {name: asdict(each) for name, each in measure_speed(models, prompt).items()}
        kinds = ("prefill", "decode")
        ratios = {f"{kind}_ratio": speeds[mine][kind] / speeds[BASELINE][kind] for kind in kinds}
        stage.speed = speeds[mine] | ratios


def _random_prompt(model: Any) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (1, _PROMPT), generator=torch.Generator().manual_seed(0))
