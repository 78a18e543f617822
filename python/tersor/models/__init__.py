"""Architectures: data about families of models, and the code that ends their quirks.

How a pipeline streams a checkpoint, without ever holding more of it than one block:

    model = build_skeleton(checkpoint.config, dtype)        # parameters on the meta device
    found = find_arch(model)
    plain_linears(model, found.arch)                        # from here on, nn.Linear only
    where = stored(model, found, checkpoint.names)          # parameter -> tensor of the files
    before, after = found.outside(where)
    fill(model, before, where, checkpoint, dtype)           # enough to reach the first block
    for path, block in found.blocks(model):
        names = [name for name in where if name.startswith(f"{path}.")]
        fill(model, names, where, checkpoint, dtype)
        taps = taps_of(found.arch, block)                   # linears that share an input
        ...                                                 # untapped(...) goes to the report
        empty(model, names)
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tersor.models.arch import GROUPS, QUERIES, Arch, Experts, Groups, Stream, Structure, Tap
from tersor.models.bert import BERT, DISTILBERT
from tersor.models.find import (
    FoundArch,
    config_value,
    from_table,
    generic,
    parts_of,
    routers_of,
    taps_of,
    untapped,
)
from tersor.models.gemma import GEMMA, GEMMA1
from tersor.models.gpt2 import GPT2
from tersor.models.linears import ExpertList, plain_linears, unfuse_experts
from tersor.models.llama import LLAMA
from tersor.models.mixtral import MIXTRAL
from tersor.models.names import Reader, Stored, check_all_used, place_of, same_name, stored
from tersor.models.neox import NEOX
from tersor.models.opt import OPT
from tersor.models.phi import PHI3
from tersor.models.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from tersor.models.skeleton import build_skeleton, empty, fill

__all__ = [
    "ARCHS",
    "GROUPS",
    "QUERIES",
    "Arch",
    "ExpertList",
    "Experts",
    "FoundArch",
    "Groups",
    "Reader",
    "Stored",
    "Stream",
    "Structure",
    "Tap",
    "build_skeleton",
    "check_all_used",
    "config_value",
    "empty",
    "fill",
    "find_arch",
    "parts_of",
    "place_of",
    "plain_linears",
    "routers_of",
    "same_name",
    "stored",
    "taps_of",
    "unfuse_experts",
    "untapped",
]

ARCHS: dict[str, Arch] = {  # by `model_type` of config.json
    "bert": BERT,
    "distilbert": DISTILBERT,
    "gemma": GEMMA1,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": MIXTRAL,
    "opt": OPT,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "roberta": BERT,
}


def find_arch(model: nn.Module, config: Any = None) -> FoundArch:
    """The architecture of a model: from ARCHS, or made by looking at the model.

    model: real or a skeleton, of transformers or not.
    config: its configuration, an object or the contents of config.json; by default model.config.
    Raises TersorError for a model that does not keep its blocks in one nn.ModuleList.
    """
    config = getattr(model, "config", None) if config is None else config
    arch = ARCHS.get(config_value(config, "model_type"))
    found = from_table(model, config, arch) if arch is not None else None
    return found or generic(model, config)
