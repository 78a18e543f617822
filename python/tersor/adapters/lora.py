"""LoRA (Hu et al., arXiv:2106.09685) on quantized linears, by peft.

peft knows what to do with a layer of its own class that has no adapter yet. So a model is prepared
by putting such a layer around each quantized linear; all that follows is peft's own.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import nn

from tersor.errors import TersorError
from tersor.models import ExpertList
from tersor.packed_linear import PackedLinear


def add_lora(model: nn.Module, config: Any = None, adapter_name: str = "default") -> Any:
    """The model with LoRA adapters on its quantized linears, as a peft.PeftModel.

        model = tersor.add_lora(tersor.load(folder), LoraConfig(r=16, lora_alpha=32))
        Trainer(model, ...).train()
        model.save_pretrained(adapter_folder)

    model: with QuantLinear, SparseLinear or NF4Linear layers; changed in place. Its own parameters
        are frozen.
    config: a peft.LoraConfig, which is not changed; None: its defaults. Where it has no
        target_modules, or "all-linear", adapters go on every quantized linear outside the experts
        of a mixture, and with "all-linear" on every other nn.Linear but the head as well.
    The adapters are float32, whatever the dtype of the model. With none active
    (model.disable_adapter()) outputs are those of the model before, to the bit.

    Adapters are loaded by peft: PeftModel.from_pretrained(tersor.prepare_lora(model), folder), and
    more are added by its add_adapter. DoRA and initialisations that need a dense weight are
    refused; bias must be "none".
    Raises TersorError, before the model is changed, for what does not fit it.
    """
    peft = import_peft()
    from tersor.adapters.layer import check_settings

    config = peft.LoraConfig() if config is None else copy.deepcopy(config)
    if not isinstance(config, peft.LoraConfig):
        raise TersorError(f"config is a peft.LoraConfig, not a {type(config).__name__}")
    check_settings(config)
    check_free(model)
    _settle_targets(model, config)
    prepare_lora(model)
    with warnings.catch_warnings():
        # That the model has layers of peft's is what prepare_lora did.
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT")
        return peft.get_peft_model(model, config, adapter_name)


def prepare_lora(model: nn.Module) -> nn.Module:
    """The model, changed in place, its quantized linears ready for adapters by any function of
    peft's: get_peft_model, inject_adapter_in_model, PeftModel.from_pretrained.

    It computes what it did before. All its parameters are frozen, as peft's own preparation of
    quantized models does. Its state dict has `base_layer` in the names of quantized linears until
    peft's unload() puts them back.
    Raises TersorError where it has no quantized linear, one without a weight, or adapters already.
    """
    import_peft()
    from tersor.adapters.layer import AdaptedLinear

    check_free(model)
    adapted = {id(m) for m in model.modules() if isinstance(m, AdaptedLinear)}
    found = quantized_linears(model)
    if not found and not adapted:
        raise TersorError(
            "the model has no quantized linear; quantize it first (tersor.quantize_model, "
            "tersor.nf4_model, tersor.load), or use peft as it is"
        )
    for path, linear in found.items():
        if any(tensor.is_meta for tensor in linear.buffers()):
            raise TersorError(f"{path} has no weight yet; load the model's weights first")
    made: dict[int, AdaptedLinear] = {}  # a linear in several places stays one layer
    for path, linear in found.items():
        if id(linear) not in made:
            made[id(linear)] = AdaptedLinear(linear).train(linear.training)
        model.set_submodule(path, made[id(linear)])
    model.requires_grad_(False)
    return model


def quantized_linears(model: nn.Module) -> dict[str, nn.Module]:
    """By path, in every place, the quantized linears of a model that can be adapted and are not
    yet."""
    from tersor.adapters.nf4_linear import NF4Linear

    kinds, experts = (PackedLinear, NF4Linear), in_experts(model)
    return {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, kinds) and not path.endswith(".base_layer") and path not in experts
    }


def in_experts(model: nn.Module) -> set[str]:
    """Paths of modules in the experts of a mixture. transformers has fused them since, and peft
    looks for adapters on them, and loads them, under the names that they have there."""
    lists = (name for name, module in model.named_modules() if isinstance(module, ExpertList))
    return {
        f"{name}.{path}"
        for name in lists
        for path, _ in model.get_submodule(name).named_modules()
        if path
    }


def import_peft() -> Any:
    """The package; TersorError that says how to install it where it is missing."""
    try:
        import peft  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise TersorError(
            f"adapters need peft, which cannot be imported ({error}); run "
            "pip install tersor[adapters]"
        ) from error
    return peft


def check_free(model: nn.Module) -> None:
    """TersorError where the model is wrapped by peft, or holds adapters."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer  # type: ignore[import-not-found,unused-ignore]

    if isinstance(model, PeftModel):
        raise TersorError(
            "the model has adapters already; add another with model.add_adapter(name, config), or "
            "take them off with model.unload()"
        )
    from tersor.adapters.layer import AdaptedLinear

    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not (
            isinstance(module, AdaptedLinear) and not module.lora_A
        ):
            raise TersorError(
                f"{path} has an adapter already; take it off with unload() of the PeftModel"
            )


def _settle_targets(model: nn.Module, config: Any) -> None:
    """Fills in target_modules where they are left open, and checks those that are given."""
    from peft.tuners.tuners_utils import check_target_module_exists

    from tersor.adapters.layer import AdaptedLinear

    quantized = [
        *quantized_linears(model),
        *(name for name, m in model.named_modules() if isinstance(m, AdaptedLinear)),
    ]
    experts, given = in_experts(model), config.target_modules
    everything = isinstance(given, str) and given.lower() == "all-linear"
    if given is None or everything:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        plain = [
            name
            for name, module in model.named_modules()
            if everything and isinstance(module, nn.Linear) and module is not head
        ]
        config.target_modules = {*quantized, *plain} - experts
        _check_left(config, quantized)
        return
    names = [name for name, _ in model.named_modules() if name]
    for target in [given] if isinstance(given, str) else sorted(given):
        one = copy.copy(config)
        one.target_modules = target if isinstance(given, str) else {target}
        one.exclude_modules = None
        if not any(check_target_module_exists(one, name) for name in names):
            example = f"; modules are called like {quantized[0]}" if quantized else ""
            raise TersorError(f"target_modules: {target!r} matches no module of the model{example}")
    refuse_experts(config, experts)
    _check_left(config, names)


def _check_left(config: Any, names: list[str]) -> None:
    """TersorError where exclude_modules, or layers_to_transform, leave nothing of the targets."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if names and not any(check_target_module_exists(config, name) for name in names):
        raise TersorError(
            "nothing is left to put adapters on: exclude_modules and layers_to_transform leave out "
            "every module that target_modules match; leave out fewer"
        )


def refuse_experts(config: Any, experts: set[str]) -> None:
    """TersorError where target_modules name something in an expert."""
    from peft.tuners.tuners_utils import check_target_module_exists

    inside = next((n for n in sorted(experts) if check_target_module_exists(config, n)), None)
    if inside:
        raise TersorError(
            f"target_modules match {inside} in an expert, and peft cannot load adapters on those "
            "again; leave them out (exclude_modules), or target_modules for all but experts"
        )
