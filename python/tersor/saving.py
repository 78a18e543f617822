"""A model with quantized linears in memory as the folder that tersor.load reads."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tersor.durable import disk_errors
from tersor.errors import TersorError
from tersor.formats import quantization_config
from tersor.linear import QuantLinear
from tersor.shards import refuse_existing


def save(model: Any, folder: str | Path) -> None:
    """Writes a model whose linears are QuantLinear as a compressed-tensors folder.

    model: of transformers, after quantize_model, merge_lora or the like; or with adapters on it
        (a peft.PeftModel), of which the quantized base is written and save_pretrained of the
        PeftModel writes the adapters.
    folder: one that does not exist yet; it appears whole or not at all. The tokenizer is saved by
        its own save_pretrained. No folder holds outliers (see ActSpec): a warning says so.
    Raises TersorError for a model without QuantLinear layers, or with NF4Linear ones, for which
    there is no folder.
    """
    model = model.get_base_model() if hasattr(model, "peft_type") else model
    layers = {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
    }
    if not hasattr(model, "save_pretrained") or not layers:
        raise TersorError(
            f"{type(model).__name__} is no model of transformers with QuantLinear layers; quantize "
            "one (tersor.quantize_model), or keep its state_dict()"
        )
    odd = next((n for n, m in model.named_modules() if type(m).__name__ in _NO_FOLDER), None)
    if odd:
        raise TersorError(
            f"{odd} is in a form that no folder holds beside QuantLinear; keep the state_dict()"
        )
    formats = {layer.format for layer in layers.values()}
    ordered = any(layer.order is not None for layer in layers.values())
    config = quantization_config(
        {name: layer.scheme for name, layer in layers.items()},
        format=formats.pop() if len(formats) == 1 else None,
        actorder="group" if ordered else None,
    )
    refuse_existing(folder)
    made = Path(os.path.abspath(folder))
    before = getattr(model.config, "quantization_config", None)
    model.config.quantization_config = config
    try:
        with disk_errors(made.parent):
            made.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{made.name}-", dir=made.parent) as scratch:
                whole = Path(scratch, made.name)
                model.save_pretrained(str(whole), state_dict=_tensors(model))
                os.rename(whole, made)
    finally:
        if before is None:
            del model.config.quantization_config
        else:
            model.config.quantization_config = before


_NO_FOLDER = ("NF4Linear", "LowRankLinear")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """By the names that files have: without adapters, and what files keep transposed as such."""
    turned = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and getattr(module, "stored_transposed", False)
    }
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): (
            tensor.t().contiguous() if name in turned else tensor
        )
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
