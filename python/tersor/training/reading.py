"""Reads a model's predictions as hidden states and a head, where it has that form, so that the
logits of a whole batch need not be made."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from tersor.errors import TersorError
from tersor.evaluate import position_limit
from tersor.training.features import recording
from tersor.training.fused import Head, Logits

_TABLES = {"wpe", "embed_positions", "position_embeddings"}  # what tables of positions are called


class Reader:
    """One model, a student or a teacher.

    A causal model of transformers is asked for the logits of each row's last token alone, and its
    base model's output is recorded. In the first batch those logits are compared with what the head
    makes of that output; a model that does more in between is read as logits from then on.

    whole: always read logits: where a head's weight is not all here (sharded), or not wanted.
    """

    def __init__(self, model: nn.Module, whole: bool = False) -> None:
        self.model = model
        self.takes = set(inspect.signature(model.forward).parameters)
        self.positions = _positions(model)
        self.checked = False
        self.whole = whole or not self._has_head()
        self.paths: list[str] = []  # of modules that make the last hidden states, if they are run
        if not self.whole:
            decoder = getattr(model, "get_decoder", lambda: None)()
            inner = (model.base_model, decoder)
            self.paths = [path for path, m in model.named_modules() if any(m is x for x in inner)]

    def read(
        self, call: nn.Module, inputs: Mapping[str, Any], whole: bool = False
    ) -> tuple[Logits, Any]:
        """The predictions of all tokens in one dimension, and the model's outputs.

        call: the model, or what an engine wrapped it in. whole: the outputs must have all logits.
        """
        given = dict(inputs)
        ids = given.get("input_ids")
        if ids is not None and self.positions is not None and ids.shape[1] > self.positions:
            raise TersorError(
                f"rows of {ids.shape[1]} tokens are beyond the {self.positions} positions of a "
                f"{type(self.model).__name__}, student or teacher; cut them shorter"
            )
        if "use_cache" in self.takes:
            given["use_cache"] = False
        if self.whole or whole:
            outputs = call(**given)
            return outputs.logits.flatten(0, -2), outputs
        with recording(self.model, self.paths) as found:
            outputs = call(**given, logits_to_keep=1)
        hidden = next((found[path] for path in self.paths if path in found), None)
        if hidden is not None:
            head = self._head(hidden.flatten(0, -2))
            self.whole = not self.checked and not self._agrees(head, hidden, outputs.logits)
            self.checked = True
        if hidden is None or self.whole:
            self.whole = True
            return self.read(call, inputs)
        return head, outputs

    def _has_head(self) -> bool:
        model = self.model
        if not isinstance(model, PreTrainedModel) or model.base_model is model:
            return False
        head = model.get_output_embeddings()
        # A quantized head has no weight to multiply by, and a subclass may do more than a product.
        return type(head) is nn.Linear and "logits_to_keep" in self.takes

    def _head(self, hidden: Tensor) -> Head:
        head = self.model.get_output_embeddings()
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
        return Head(hidden, head.weight, head.bias, softcap)

    @torch.no_grad()
    def _agrees(self, head: Head, hidden: Tensor, logits: Tensor) -> bool:
        last = torch.arange(1, len(hidden) + 1, device=hidden.device) * hidden.shape[1] - 1
        made, given = head.logits(last), logits[:, -1].to(last.device)
        half = hidden.dtype not in (torch.float32, torch.float64)
        bound = 2e-2 if half or torch.is_autocast_enabled(hidden.device.type) else 1e-4
        return bool((made - given).abs().max() <= bound * given.abs().max())


def _positions(model: nn.Module) -> int | None:
    """The most tokens of a row, where there is a table of positions."""
    named = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    return position_limit(model) if named & _TABLES else None


def predicts_next(model: nn.Module) -> bool:
    """Whether a position predicts the token after it, or (a masked language model) its own; by the
    name of the model's class or of one that it is made from. TersorError where neither is known."""
    for kind in type(model).__mro__:
        name = kind.__name__
        if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith("ForCausalLM"):
            return True
        if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() or name.endswith("ForMaskedLM"):
            return False
    raise TersorError(
        f"{type(model).__name__} is not known to be a causal or a masked language model; give it "
        "a name that ends in ForCausalLM or ForMaskedLM"
    )


def vocabulary_of(model: nn.Module) -> int:
    """The rows of the model's output; TersorError where it is no language model."""
    config = getattr(model, "config", None)
    found = getattr(config, "vocab_size", None)
    if found is None:
        raise TersorError(f"{type(model).__name__} is no language model with one vocabulary")
    return int(found)
