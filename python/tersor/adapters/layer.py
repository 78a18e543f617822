"""What stands in the place of a quantized linear once it can take adapters. Imports peft."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from peft.tuners.lora import Linear, LoraLayer  # type: ignore[import-not-found,unused-ignore]
from torch import nn

from tersor.errors import TersorError

INITIALIZATIONS = (True, False, "gaussian")  # of adapters, those that need no base weight
# Settings of LoraConfig under which an adapter is more than a product added to the outputs.
VARIANTS = (
    *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens"),
    *("arrow_config", "velora_config", "monteclora_config", "kasa_config"),
)


class AdaptedLinear(Linear):  # type: ignore[misc,unused-ignore]
    """A frozen quantized linear with any number of LoRA adapters beside it, or none yet:
    y = base(x) + Σ scaling · B A dropout(x) over the active ones.

    It is a layer of peft's, so that get_peft_model, add_adapter and PeftModel.from_pretrained put
    adapters on it as on one that has some already; with none it computes what its base does. What
    differs is that the base has no dense weight: a merge has to requantize (tersor.merge_lora), and
    initialisations that change the base weight are refused.
    """

    def __init__(self, base: nn.Module) -> None:
        # Not Linear.__init__, which wants the first adapter along with the base.
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base)
        self.fan_in_fan_out = self.is_target_conv_1d_layer = False
        self._active_adapter: str | list[str] = []

    def update_layer(self, adapter_name: str, *given: Any, **named: Any) -> None:
        """Adds an adapter or makes it anew."""
        config = named.get("config")  # before 0.19, peft gives the settings one by one
        if config is not None:
            check_settings(config)
        self.resolve_lora_variant(**named)
        if not self.active_adapters:
            self._active_adapter = adapter_name
        super().update_layer(adapter_name, *given, **named)

    def resolve_lora_variant(self, **settings: Any) -> None:
        config = settings.get("config")
        asked = [name for name in VARIANTS if getattr(config, name, settings.get(name))]
        if asked:
            refuse_variant(asked[0])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if not self.lora_A:
            return
        raise TersorError(
            "merging into a quantized weight rounds it again; use tersor.merge_lora(model), which "
            "does and reports what the rounding cost"
        )

    def unmerge(self) -> NoReturn:
        raise TersorError("nothing is merged: adapters on quantized weights stay beside them")

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """There, or to where the layer is; and into the dtype of the layer, which is not that of
        its packed tensors."""
        device = device or next(self.get_base_layer().buffers()).device
        for part in (self.lora_A, self.lora_B):
            adapter = part[adapter_name]
            if not adapter.weight.is_meta:
                adapter.to(device=device, dtype=self.get_base_layer().dtype)


def check_settings(config: Any) -> None:
    """TersorError for settings of a LoraConfig that need a dense base weight or bias."""
    named = {f"{name} in rank_pattern": rank for name, rank in config.rank_pattern.items()}
    ranks = {"r": config.r} | named
    for what, rank in ranks.items():
        if not isinstance(rank, int) or rank < 1:
            raise TersorError(
                f"the rank {what} of a LoraConfig is at least 1, not {rank!r}; 8 or 16 is usual"
            )
    for asked in VARIANTS:
        if getattr(config, asked, None):
            refuse_variant(asked)
    start = config.init_lora_weights
    if start == "loftq":
        raise TersorError(
            'init_lora_weights="loftq" needs the weight from before quantization; give the '
            "original model to tersor.loftq_model, which quantizes it and sets the adapters"
        )
    if start not in INITIALIZATIONS:
        raise TersorError(
            f"init_lora_weights={start!r} changes or reads the base weight, which is quantized; "
            'use True, False or "gaussian", or tersor.loftq_model on the original model'
        )
    if config.bias != "none":
        raise TersorError(
            f"bias={config.bias!r} trains the biases of quantized linears, which are frozen; use "
            'bias="none", or lora_bias=True for a bias in the adapter'
        )


def refuse_variant(setting: str) -> NoReturn:
    raise TersorError(
        f"{setting} is not supported on quantized linears, which have no dense weight to work on; "
        "leave it out for plain LoRA"
    )
