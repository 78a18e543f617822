"""Models without their weights, and the weights put in and taken out a few at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tersor.errors import TersorError
from tersor.models.names import Reader, Stored


def build_skeleton(
    config: Mapping[str, Any] | str | Path, dtype: torch.dtype | None = None
) -> nn.Module:
    """A transformers model with its parameters on the meta device, in evaluation mode.

    config: the contents of config.json, or the folder that holds it. Its `architectures` chooses
        the class, among those of the installed transformers: code that comes with a checkpoint is
        never run. A `quantization_config` is passed over.
    dtype: of the parameters, and what buffers made with them see; by default what the config says,
        or else float32.

    No weight is allocated, but buffers that no file holds (rotary frequencies, masks, the scale of
    Gemma's embeddings) are real and as from_pretrained makes them; tied parameters are one object.
    Raises TersorError for a config that names no class that transformers has, or that it refuses.
    """
    if isinstance(config, str | Path):
        config = _read_config(Path(config))
    settings = copy.deepcopy(dict(config))
    settings.pop("quantization_config", None)
    cls, hf_config = _model_class(settings)
    _set_dtype(hf_config, dtype)
    default = torch.get_default_dtype()
    try:
        with _AllocateOnMeta():
            # Not cls(hf_config): this also sets the dtype, and what else a version wants set.
            model = cls._from_config(hf_config)
    except Exception as error:
        raise TersorError(f"transformers cannot build {cls.__name__}: {_line(error)}") from error
    finally:
        torch.set_default_dtype(default)  # older versions leave it changed after an error
    _drop_weights(model)
    return model.eval()


def fill(
    model: nn.Module,
    names: Iterable[str],
    where: Mapping[str, Stored],
    reader: Reader,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Load parameters (and persistent buffers) of a skeleton from a checkpoint.

    names: of the model; where: from stored(). Those that are one tensor in the files, such as a
    head tied to the embeddings, are one tensor in memory if they are filled in one call.
    dtype: what floating-point weights are converted to; None keeps the dtype of the files.
    device: where they are then.
    Raises TersorError for a tensor whose shape is not what the configuration asks for.
    """
    loaded: dict[Stored, Tensor] = {}
    for name in names:
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        old = getattr(owner, last)
        place = where[name]
        if place not in loaded:
            tensor = place.read(reader)
            if tensor.shape != old.shape:
                raise TersorError(
                    f"tensor {place.name!r} gives {name} the shape {tuple(tensor.shape)}, but "
                    f"config.json asks for {tuple(old.shape)}; the two are of different models"
                )
            converted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            tensor = tensor.to(device, converted)
            is_parameter = isinstance(old, nn.Parameter)
            loaded[place] = nn.Parameter(tensor, False) if is_parameter else tensor
        setattr(owner, last, loaded[place])


def empty(model: nn.Module, names: Iterable[str]) -> None:
    """Take parameters out again: back to the meta device, their memory free."""
    for name in names:
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        old = getattr(owner, last)
        if isinstance(old, nn.Parameter):
            setattr(owner, last, nn.Parameter(old.detach().to("meta"), False))


class _AllocateOnMeta(TorchFunctionMode):
    """Sends what a module allocates to hold weights to the meta device. What it computes (arange,
    ones, tensor, ...) stays real, since that is how buffers are made."""

    ALLOCATORS = frozenset({torch.empty, torch.empty_like, torch.rand, torch.randn})

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.ALLOCATORS:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _drop_weights(model: nn.Module) -> None:
    """Small weights made of ones or zeros are still real: to meta, one object staying one."""
    dropped: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                meta = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
                module._parameters[name] = dropped.setdefault(id(parameter), meta)
    persistent = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in persistent:
            raise TersorError(
                f"buffer {name} of {type(model).__name__} is made in a way that needs the whole "
                "model in memory; load the model with transformers and use tersor.quantize_model"
            )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise TersorError(
            f"{folder} has no config.json; give a folder that holds a model"
        ) from None
    except ValueError as error:
        raise TersorError(f"{path} is not valid JSON: {_line(error)}; download it again") from error
    if not isinstance(config, dict):
        raise TersorError(f"{path} is not a JSON object; download it again")
    return config


def _model_class(settings: dict[str, Any]) -> tuple[Any, Any]:
    """The class of the model and its configuration object."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, names = settings.get("model_type"), settings.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if not known or not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        fix = (
            "the checkpoint brings code of its own, which tersor does not run: load the model "
            "yourself and use tersor.quantize_model"
            if "auto_map" in settings
            else "install a version that has it, or correct `model_type` and `architectures` in "
            "config.json"
        )
        raise TersorError(
            f"transformers {transformers.__version__} has no model {name!r} of type "
            f"{model_type!r}; {fix}"
        )
    try:
        return cls, CONFIG_MAPPING[model_type].from_dict(settings)
    except Exception as error:
        raise TersorError(f"transformers refuses this config.json: {_line(error)}") from error


def _set_dtype(config: Any, dtype: torch.dtype | None) -> None:
    # Before 4.56 the attribute is torch_dtype, and the "dtype" of newer files is an unread string.
    attribute = "torch_dtype" if "torch_dtype" in vars(config) else "dtype"
    written = getattr(config, attribute) or getattr(config, "dtype", None)
    if isinstance(written, str):
        written = getattr(torch, written, None)
    setattr(config, attribute, dtype or written or torch.float32)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
