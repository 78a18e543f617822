"""What token pruning can serve: settled before a model runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from tersor.errors import TersorError
from tersor.models import find_arch
from tersor.tokens.attention import SEAMS


@dataclass(frozen=True)
class TokenSettings:
    """shares: layer, counted from 0 -> the share of the tokens that leave after it.
    The rest is as in prune_tokens."""

    shares: Mapping[int, float]
    merge: bool = False
    keep_first: int = 4
    keep_last: int | None = None
    min_tokens: int = 256


def parts(model: PreTrainedModel) -> tuple[list[nn.Module], list[PreTrainedModel]]:
    """The blocks, and the models around them from the outside in."""
    if not isinstance(model, PreTrainedModel):
        raise TersorError(
            f"token pruning is for models of transformers, not {type(model).__name__}"
        )
    if model.config.is_encoder_decoder or getattr(model.config, "add_cross_attention", False):
        raise TersorError(
            f"{type(model).__name__} has an encoder and a decoder; token pruning needs a model "
            "with one stack of blocks"
        )
    blocks = dict(find_arch(model).blocks(model))
    if not blocks:
        raise TersorError(f"{type(model).__name__} has no layers to prune tokens after")
    names = next(iter(blocks)).split(".")
    around = (model.get_submodule(".".join(names[:end])) for end in range(len(names)))
    models = [module for module in around if isinstance(module, PreTrainedModel)]
    return list(blocks.values()), models


def is_causal(model: PreTrainedModel, block: nn.Module) -> bool:
    known = [
        m.is_causal for m in block.modules() if isinstance(getattr(m, "is_causal", None), bool)
    ]
    return any(known) and getattr(model.config, "is_causal", True) is not False


def check_settings(settings: TokenSettings, keep_last: int, causal: bool, layers: int) -> None:
    if not isinstance(settings.shares, Mapping) or not settings.shares:
        raise TersorError(
            "no layer is given to prune after; give the shares as a dictionary such as {8: 0.5}"
        )
    for layer, share in settings.shares.items():
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < layers - 1:
            raise TersorError(
                f"tokens cannot leave after layer {layer!r}: the model has the layers 0 to "
                f"{layers - 1}, and after the last one nothing is left to save"
            )
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
            raise TersorError(
                f"the share of tokens that leave after layer {layer} is {share!r}; give a number "
                "above 0 and below 1"
            )
    least = {"keep_first": 0, "keep_last": int(causal), "min_tokens": 2}
    for name, bound in least.items():
        value = keep_last if name == "keep_last" else getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < bound:
            raise TersorError(f"{name} is {value!r}; give a whole number of at least {bound}")


def check_attention(model: PreTrainedModel, block: nn.Module) -> None:
    name = type(model).__name__
    if model.training:
        raise TersorError("token pruning is for a model in evaluation mode; call model.eval()")
    implementation = model.config._attn_implementation
    if implementation in SEAMS.values():
        raise TersorError(
            "the tokens of this model, or of one with the same configuration object, are already "
            "being pruned; leave that `with` block first, or give each model its own configuration"
        )
    if implementation not in SEAMS:
        raise TersorError(
            f"token pruning serves the attention implementations {' and '.join(SEAMS)}, not "
            f'{implementation}; call model.set_attn_implementation("sdpa")'
        )
    kinds = set(getattr(model.config, "layer_types", None) or ())
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    eager = hasattr(sys.modules[type(block).__module__], "eager_attention_forward")
    if others or not getattr(model, "_supports_attention_backend", False) or not eager:
        reason = f"layers with {', '.join(others)}" if others else "an attention of its own kind"
        raise TersorError(
            f"{name} has {reason}, whose tokens cannot be pruned; use a model whose layers all go "
            "through transformers' attention interface"
        )
