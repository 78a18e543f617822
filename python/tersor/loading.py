"""Quantized folders as transformers models that run on QuantLinear, and 2:4 ones on SparseLinear.

`load` builds the model and reads every tensor itself. `TersorConfig` leaves the model to
transformers' from_pretrained and brings in the quantized layers alone. Both put off the linears
that the other tensors' loader must not touch (`_defer`), and make them afterwards (`_complete`).
"""

from __future__ import annotations

import importlib.util
import re
import textwrap
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GenerationConfig
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.utils.logging import disable_progress_bar

from tersor import cuda
from tersor.checkpoint import Checkpoint
from tersor.cuda_int8 import share
from tersor.devices import AUTO, find_device
from tersor.errors import TersorError
from tersor.formats import FORMATS, parse_config
from tersor.formats.config import FormatConfig, Group
from tersor.kernels import dtype_code
from tersor.linear import QuantLinear
from tersor.models import (
    FoundArch,
    Stored,
    build_skeleton,
    check_all_used,
    fill,
    find_arch,
    place_of,
    plain_linears,
    same_name,
    stored,
    taps_of,
)
from tersor.models.arch import Arch
from tersor.qweight import ActSpec
from tersor.sparse_linear import swap_sparse_linears
from tersor.surgery.lowrank import ENTRY, load_factorized

METHOD = "tersor"
# Of these a quantized linear has at least one of the first two; a plain one has the last.
_NAMES = ("weight_scale", "weight_packed", "weight")


def load(
    folder: str | Path, dtype: torch.dtype | None = None, outliers: float | None = None
) -> Any:
    """The transformers model of a quantized folder, with a QuantLinear for every quantized linear;
    or of one that is pruned to 2:4, with a SparseLinear where that is faster (see use_sparse); or
    of one that is factorized (see tersor.surgery.lowrank).

    folder: a compressed-tensors checkpoint, written by tersor, llm-compressor or the like, or an
        ordinary one whose linears have 2:4 zeros.
    dtype: of all that is not quantized: float32, bfloat16 or float16; by default what config.json
        says. Scales stay as they are in the file.
    outliers: LLM.int8(): where activations are int8, the columns of a linear's input that hold
        values beyond this stay in 16 bits in that call; 6.0 is usual (see ActSpec). None: all
        become int8, as the folder says.

    As from from_pretrained, the model is in evaluation mode and what is not quantized can be
    trained; quantized weights cannot. Code that comes with a folder is never run.
    TersorError names the tensor that is missing, left over or damaged, or what is not supported.
    """
    checkpoint = Checkpoint.open(folder)
    _check_outliers(checkpoint, outliers)
    model: Any
    if ENTRY in checkpoint.config:
        model = load_factorized(folder, dtype)
        _keep_outliers(model, outliers)
        return model
    if dtype is not None:
        dtype_code(dtype)
    model = build_skeleton(checkpoint.config, dtype)
    quantization = checkpoint.config.get("quantization_config")
    deferred = _defer(model, checkpoint)
    where = stored(model, deferred.found, checkpoint.names)
    fill(model, where, where, checkpoint, model.dtype)
    model.tie_weights()
    used = {place.name for place in where.values()} | _complete(model, deferred, checkpoint)
    check_all_used(model, set(checkpoint.names) - used)
    _keep_outliers(model, outliers)
    sparse = swap_sparse_linears(model)
    if quantization:
        model.config.quantization_config = quantization
    elif not sparse:
        raise TersorError(
            f"{checkpoint.folder} is not quantized, and no linear of it is in bfloat16 or float16 "
            "with 2:4 zeros (see dtype); quantize it (tersor quantize), prune it to 2:4 (tersor "
            "prune), or load it with transformers"
        )
    model.config._name_or_path = model.name_or_path = str(folder)
    if model.can_generate() and (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model.eval()


def load_any(folder: str | Path, outliers: float | None = None) -> Any:
    """The model of any folder, for evaluation: a quantized one as from load(); any other as
    transformers has it, but whole, its 2:4 linears on a kernel where that is faster.
    TersorError for what transformers cannot load, or would fill with random numbers."""
    checkpoint = Checkpoint.open(folder)
    if "quantization_config" in checkpoint.config:
        return load(folder, outliers=outliers)
    _check_outliers(checkpoint, outliers)
    disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            torch_dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # named below
            output_loading_info=True,
        )
    except Exception as error:  # whatever a config.json that it cannot use makes it raise
        raise refused(folder, error) from error
    wrong = [f"no tensor for {name}" for name in sorted(info["missing_keys"])]
    wrong += [f"{name} in another shape" for name, *_ in sorted(info["mismatched_keys"])]
    if wrong:  # transformers has put random numbers in their place
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise TersorError(
            f"{folder} has {wrong[0]}{more}; its files are incomplete, or of another model than "
            "config.json: download it again"
        )
    swap_sparse_linears(model)
    return model.eval()


def refused(folder: str | Path, error: Exception) -> TersorError:
    """What to say where transformers raises while it opens a folder."""
    cause = textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")
    return TersorError(
        f"transformers cannot load {folder} ({cause}); correct its config.json, or download the "
        "model again"
    )


class TersorConfig(CompressedTensorsConfig):
    """Asks transformers to load a compressed-tensors folder on tersor's kernels:

        AutoModelForCausalLM.from_pretrained(folder, quantization_config=tersor.TersorConfig())

    transformers reads the folder's own quantization_config with the compressed-tensors package,
    which must be installed for this; `tersor.load` does without. The first instance registers a
    quantizer under the name "tersor", as transformers provides for; nothing else is changed.
    outliers: as in `tersor.load`.
    """

    def __init__(self, outliers: float | None = None) -> None:
        if importlib.util.find_spec("compressed_tensors") is None:
            raise TersorError(
                "from_pretrained reads the folder's config with compressed-tensors, which is not "
                "installed; run pip install compressed-tensors, or use tersor.load(folder)"
            )
        if METHOD not in AUTO_QUANTIZER_MAPPING:
            register_quantizer(METHOD)(TersorQuantizer)
        self.quant_method = METHOD
        self.outliers = ActSpec(outliers=outliers).outliers

    def get_loading_attributes(self) -> dict[str, Any]:
        """What transformers takes over into the config that it has read from the folder."""
        return {"quant_method": self.quant_method, "outliers": self.outliers}

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


# from_pretrained takes loading attributes from a config of the same class as the folder's own,
# and compares the names of the classes. This is a CompressedTensorsConfig, and says so.
TersorConfig.__name__ = CompressedTensorsConfig.__name__


class TersorQuantizer(HfQuantizer):
    """What from_pretrained calls before and after it has loaded what is not quantized."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._places: dict[str, torch.device] = {}  # of device_map
        if not self.pre_quantized:
            raise TersorError(
                "the folder is not quantized; quantize it first (tersor quantize), or load it and "
                "use tersor.swap_linears"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """device_map: a device, or one for each part of the model, by its path; "auto" is a GPU
        where there is one."""
        if device_map == AUTO:
            device_map = {"": str(find_device(AUTO))}
        places = device_map if isinstance(device_map, dict) else {"": device_map}
        self._places = {path: _device(place) for path, place in places.items()}
        return device_map

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        files = kwargs.get("checkpoint_files")
        self._checkpoint = Checkpoint.open(Path(files[0]).parent if files else model.name_or_path)
        self._outliers = getattr(self.quantization_config, "outliers", None)
        _check_outliers(self._checkpoint, self._outliers)
        self._deferred = _defer(model, self._checkpoint)
        # The files hold tensors for deferred layers, which are not unexpected, though transformers
        # finds no place for them.
        known = model._keys_to_ignore_on_load_unexpected
        known = [] if known is None else known  # a list, or in later versions a set
        patterns = [rf"(^|\.){re.escape(name)}\." for name in self._deferred.owners()]
        model._keys_to_ignore_on_load_unexpected = type(known)([*known, *patterns])
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _complete(model, self._deferred, self._checkpoint)
        _keep_outliers(model, self._outliers)
        for path in self._deferred.linears:
            parts = [part for part in self._places if not part or f"{path}.".startswith(f"{part}.")]
            if parts:
                model.get_submodule(path).to(self._places[max(parts, key=len)])
        model.config.quantization_config = self._checkpoint.config["quantization_config"]
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True  # the state dict of a QuantLinear holds the tensors of the folder's format

    @property
    def is_trainable(self) -> bool:
        return True  # what is not quantized, and adapters on what is

    @property
    def is_compileable(self) -> bool:
        return True


def _device(place: Any) -> torch.device:
    """A place of a device_map; TersorError where there are no kernels for it."""
    try:
        named = f"cuda:{place}" if type(place) is int else place  # torch may know no GPU
        device = torch.device("cpu" if place is None else named)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    reason = cuda.unavailable(device) if device.type == "cuda" else None
    if device.type not in ("cpu", "cuda") or reason:
        raise TersorError(
            f"device_map with {place!r}: {reason or 'kernels run on the CPU and on CUDA devices'}; "
            "name devices that are here, or leave it out"
        )
    return device


def _check_outliers(checkpoint: Checkpoint, outliers: float | None) -> None:
    """TersorError where there are no int8 activations beside which columns could be kept."""
    ActSpec(outliers=outliers)
    quantized = "quantization_config" in checkpoint.config
    groups = parse_config(checkpoint.config).groups if quantized else ()
    if outliers is not None and any(group.scheme.static for group in groups):
        raise TersorError(
            f"{checkpoint.folder} has static scales of activations, which outliers do not go with; "
            "leave outliers out"
        )
    if outliers is not None and not any(group.scheme.activation for group in groups):
        raise TersorError(
            f"{checkpoint.folder} has no int8 activations beside which outliers could stay in 16 "
            "bits; quantize the model with them (--activations int8), or leave outliers out"
        )


def _keep_outliers(model: nn.Module, outliers: float | None) -> None:
    for layer in model.modules() if outliers is not None else ():
        if isinstance(layer, QuantLinear) and layer.activation is not None:
            layer.activation = replace(layer.activation, outliers=outliers)


# --- linears that wait ---------------------------------------------------------------------------


@dataclass
class _Linear:
    """A linear that is loaded after the rest of the model.

    linear: as it was in the model, on the meta device. name: what the files call it.
    group: how it is quantized, or None if it is not.
    """

    linear: nn.Linear
    name: str
    group: Group | None


class _Absent(nn.Module):
    """In the place of a linear that is loaded later: it has nothing that a loader could fill, but
    a weight that models may want to initialise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = torch.empty(0), None


@dataclass
class _Deferred:
    found: FoundArch
    linears: dict[str, _Linear]  # by path in the model
    taps: list[list[str]]  # those among them that read one input

    def owners(self) -> set[str]:
        """Paths, in the model and in the files, that all tensors of deferred linears are under.
        transformers may have renamed tensors of experts to names of the fused module."""
        names = {*self.linears, *(each.name for each in self.linears.values())}
        return names | {name.partition(".experts.")[0] + ".experts" for name in names
                        if ".experts." in name}  # fmt: skip


def _defer(model: nn.Module, checkpoint: Checkpoint) -> _Deferred:
    """Takes out of the model the linears that the checkpoint holds quantized, and those that have
    to be made nn.Linear first (fused experts, Conv1D). The model is on the meta device."""
    quantized_folder = "quantization_config" in checkpoint.config
    config = parse_config(checkpoint.config) if quantized_folder else FormatConfig((), ())
    found = _find_arch(model)
    names = frozenset(checkpoint.names)
    native = {id(module) for module in model.modules() if isinstance(module, nn.Linear)}
    plain_linears(model, found.arch, conv1d=quantized_folder)
    linears = {}
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        known = (same_name(found, f"{path}.{local}", names) for local in _NAMES)
        stored_name = next(filter(None, known), f"{path}.weight")
        name, _, local = stored_name.rpartition(".")
        quantized = local != "weight"
        # Configs name modules as files do, or as the version of transformers did that wrote them.
        groups = [config.group_for(name), config.group_for(path)]
        group = next((g for g in groups if (g is not None) == quantized), groups[0])
        if quantized and group is None:
            raise TersorError(
                f"the files hold {name} quantized, but config.json does not say how; its "
                "quantization_config is not the one of these files"
            )
        if group is not None and not quantized:
            if stored_name in names:  # and otherwise tied, or missed by who loads the rest
                _report_plain(checkpoint, stored_name)
            group = None
        if group is not None or id(module) not in native:
            linears[path] = _Linear(module, name, group)
    taps = [
        [f"{path}.{local}" for local in tap.linears if f"{path}.{local}" in linears]
        for path, block in (found.blocks(model) if found.arch.blocks else ())
        for tap in taps_of(found.arch, block)
    ]
    for path in linears:
        _replace(model, path, _Absent())
    _check_no_orphans(names, linears.values())
    return _Deferred(found, linears, taps)


def _complete(model: Any, deferred: _Deferred, checkpoint: Checkpoint) -> set[str]:
    """Puts the deferred linears into the model, and returns the names of the tensors read."""
    names = frozenset(checkpoint.names)
    local: dict[str, list[str]] = {}  # the tensors directly under a name
    for name in sorted(names):
        local.setdefault(name.rpartition(".")[0], []).append(name)
    used: set[str] = set()
    dtype = model.dtype
    for path, each in deferred.linears.items():
        if each.group is not None:
            layer = _quant_linear(each, each.group, checkpoint, local[each.name], dtype)
            _replace(model, path, layer)
            used.update(local[each.name])
            continue
        _replace(model, path, each.linear)
        where: dict[str, Stored] = {}
        for name in (f"{path}.{parameter}" for parameter, _ in each.linear.named_parameters()):
            found = place_of(model, deferred.found, name, names)
            if found is None:
                raise TersorError(f"the checkpoint has no tensor for {name}; download it again")
            where[name] = found
            used.add(found.name)
        fill(model, where, where, checkpoint, dtype)
    for tap in deferred.taps:
        share([model.get_submodule(path) for path in tap])
    for parameter in model.parameters():  # fill leaves them frozen, from_pretrained does not
        parameter.requires_grad_(parameter.is_floating_point())
    return used


def _quant_linear(
    each: _Linear, group: Group, checkpoint: Checkpoint, names: Iterable[str], dtype: torch.dtype
) -> QuantLinear:
    format = FORMATS[group.format]
    tensors = {name.rpartition(".")[2]: checkpoint.load(name) for name in names}
    bias, scale = tensors.pop("bias", None), tensors.pop("input_scale", None)
    zero = tensors.pop("input_zero_point", None)
    strange = sorted(set(tensors) - set(format.tensors))
    n, k = each.linear.out_features, each.linear.in_features
    try:
        if strange:
            raise TersorError(f"{strange[0]} is no tensor of {format.name}")
        if zero is not None and bool((zero != 0).any()):
            raise TersorError("input_zero_point is not zero; kernels take symmetric activations")
        if (bias is None) != (each.linear.bias is None):
            raise TersorError(f"the bias is {'missing' if bias is None else 'one too many'}")
        q = format.unpack(tensors, group.scheme.weight)
        if (q.n, q.k) != (n, k):
            raise TersorError(f"the weight is {q.n} x {q.k}, config.json asks for {n} x {k}")
        return QuantLinear(q, bias, group.scheme.activation, dtype, format.name, scale)
    except TersorError as error:
        raise TersorError(f"{each.name}: {error}") from error


def _find_arch(model: nn.Module) -> FoundArch:
    """Any model will do whose linears have in the files the names that they have here."""
    try:
        return find_arch(model)
    except TersorError as error:
        base = getattr(model, "base_model_prefix", "")
        arch = Arch("unknown", blocks="", taps=())
        return FoundArch(arch, how=str(error), base=f"{base}." if base else "")


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


# --- what must not pass in silence ---------------------------------------------------------------


def _report_plain(checkpoint: Checkpoint, weight: str) -> None:
    """config.json says that a linear is quantized, and the files hold one tensor of it."""
    name = weight.rpartition(".")[0]
    if not checkpoint.metadata(weight).torch_dtype.is_floating_point:
        raise TersorError(
            f"the checkpoint has no tensor {name}.weight_scale; its files are incomplete, download "
            "or quantize it again"
        )
    warnings.warn(
        f"{name} is quantized according to config.json but not in the files; it is loaded as it "
        "is stored",
        stacklevel=2,
    )


def _check_no_orphans(names: Iterable[str], linears: Iterable[_Linear]) -> None:
    known = {each.name for each in linears}
    for name in sorted(names):
        owner, _, last = name.rpartition(".")
        if last in ("weight_scale", "weight_packed") and owner not in known:
            raise TersorError(
                f"the checkpoint holds {owner} quantized, but the model has no such linear; "
                "config.json is of another model, or transformers has renamed it: describe the "
                "architecture in tersor/models"
            )
