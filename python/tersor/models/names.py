"""From a parameter of a model to its place in a checkpoint's files.

Files and models disagree about names: the prefix of the base model may be missing or too much
(`h.0.` in GPT-2's own files is `transformer.h.0.` in a GPT2LMHeadModel), modules were renamed, tied
weights are stored once, and one of the two may keep experts fused where the other does not.
transformers has its own rules for all this, but in another place in every version; what is needed
of them fits here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.models.arch import respell, spellings
from tersor.models.find import FoundArch

# Files that were once converted from TensorFlow, whatever the architecture.
LEGACY = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
# Tables that older versions of transformers saved, and that models make for themselves now.
TABLES = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias)$")


class Reader(Protocol):
    """What is asked of a checkpoint."""

    def load(self, name: str) -> Tensor: ...
    def load_slice(self, name: str, index: int) -> Tensor: ...


@dataclass(frozen=True)
class Stored:
    """Where a parameter lies in a checkpoint, and where tersor writes it.

    name: the tensor in the files.
    saved_as: its name in a folder that tersor writes: `name`, or for an expert cut out of a fused
        tensor its own, as in "model.layers.0.block_sparse_moe.experts.3.w1.weight". What a
        quantized linear is stored as takes the place of the last word, "weight".
    expert, rows: of a fused tensor [E, rows, k], the expert and the rows [start, stop) that are
        this parameter; None for all of a tensor, and for all rows.
    transposed: the file has [in, out] where the model has [out, in] (GPT-2).
    """

    name: str
    saved_as: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def read(self, reader: Reader) -> Tensor:
        """The parameter as the model has it, contiguous, in the dtype of the file."""
        if self.expert is None:
            tensor = reader.load(self.name)
        else:
            tensor = reader.load_slice(self.name, self.expert)
        if self.rows is not None:
            tensor = tensor[slice(*self.rows)]
        return (tensor.t() if self.transposed else tensor).contiguous()


def stored(model: nn.Module, found: FoundArch, names: Collection[str]) -> dict[str, Stored]:
    """The place of every parameter and persistent buffer of a model in a checkpoint.

    model: after plain_linears; a skeleton will do.
    names: the tensors of the checkpoint. Those in no value of the result are not part of the model
        (tables that older versions of transformers saved, heads that this class lacks).

    Tied parameters are found under either name. A persistent buffer that the files lack is left
    out, as it has a value already. Raises TersorError naming the parameters that are missing.
    """
    names = frozenset(names)
    state: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    tied: dict[int, list[str]] = {}
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
    result: dict[str, Stored] = {}
    missing: list[str] = []
    for name, tensor in state.items():
        places = (place_of(model, found, twin, names) for twin in [name, *tied[id(tensor)]])
        place = next(filter(None, places), None)
        if place is not None:
            result[name] = place
        elif isinstance(tensor, nn.Parameter) or tensor.is_meta:
            missing.append(name)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise TersorError(
            f"the checkpoint has no tensor for {missing[0]}{more} of {type(model).__name__}; "
            f"its files are incomplete, or are not of the class that config.json names, or the "
            f"architecture ({found.how}) needs an entry of its own in tersor.models"
        )
    return result


def check_all_used(model: Any, left: Iterable[str]) -> None:
    """TersorError if a tensor of the files that was not used is none that may be passed over."""
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or []]
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    strange = [
        name
        for name in sorted(left)
        if not TABLES.search(name)
        and name not in tied
        and not any(pattern.search(name) for pattern in ignored)
    ]
    if strange:
        more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
        raise TersorError(
            f"the checkpoint holds {strange[0]}{more}, for which {type(model).__name__} has no "
            "place; config.json names another class than these files are of"
        )


def same_name(found: FoundArch, name: str, names: Collection[str]) -> str | None:
    """The one of `names` that means what `name` means, or None; either side may be the model's.

    Works for any tensor, such as the "weight_packed" of a linear. Fused tensors are not searched.
    """
    aliases = (*found.arch.aliases, *LEGACY)
    for spelling in spellings(name, aliases):
        if spelling in names:
            return spelling
        if not found.base:
            continue
        if spelling.startswith(found.base):
            other = spelling.removeprefix(found.base)
        else:
            other = found.base + spelling
        if other in names:
            return other
    return None


def place_of(
    model: nn.Module, found: FoundArch, name: str, names: Collection[str]
) -> Stored | None:
    """The place of one parameter, or None; see `stored`."""
    direct = same_name(found, name, names)
    if direct is not None:
        owner = model.get_submodule(name.rpartition(".")[0])
        transposed = name.endswith(".weight") and hasattr(owner, "stored_transposed")
        return Stored(direct, direct, transposed=transposed)
    return _place_in_fused(model, found, name, names)


def _place_in_fused(
    model: nn.Module, found: FoundArch, name: str, names: Collection[str]
) -> Stored | None:
    """Of a file saved with its experts fused, the slice that is one linear of one expert."""
    experts = found.arch.experts
    path = name.split(".")  # ..., "experts", "3", "w1", "weight"
    if experts is None or len(path) < 4 or path[-1] != "weight" or not path[-3].isdecimal():
        return None
    linear, parent = path[-2], ".".join(path[:-3])
    if linear not in (experts.gate, experts.up, experts.down):
        return None
    part = "down_proj" if linear == experts.down else "gate_up_proj"
    fused = same_name(found, f"{parent}.{part}", names)
    if fused is None:
        return None
    inter = model.get_parameter(name).shape[0]
    rows = {experts.gate: (0, inter), experts.up: (inter, 2 * inter), experts.down: None}[linear]
    saved_as = name
    for module, file in found.arch.aliases:
        saved_as = respell(saved_as, module, file)
    return Stored(fused, saved_as, expert=int(path[-3]), rows=rows)
