"""Small random models of every architecture that the table knows, and of some that it does not."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from tersor.checkpoint import Checkpoint
from tersor.models import (
    build_skeleton,
    fill,
    find_arch,
    plain_linears,
    stored,
)

SMALL = {"vocab_size": 96, "max_position_embeddings": 64, "num_hidden_layers": 2}
DECODER = SMALL | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,  # as many as queries, so that v_proj is o_proj's source
    "head_dim": 16,
    "pad_token_id": 0,
}
GEMMA = DECODER | {"num_hidden_layers": 3, "sliding_window": 8, "query_pre_attn_scalar": 16}
ENCODER = SMALL | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
DISTIL = {"vocab_size": 96, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}
GPT2 = {"vocab_size": 96, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
OPT = ENCODER | {"ffn_dim": 96, "word_embed_proj_dim": 64}
MIXTRAL = DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = DECODER | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}

# name: (model_type, class, configuration, taps with a source in every block)
KNOWN: dict[str, tuple[str, str, dict[str, object], int]] = {
    "llama": ("llama", "LlamaForCausalLM", DECODER, 4),
    "llama-gqa": ("llama", "LlamaForCausalLM", DECODER | {"num_key_value_heads": 2}, 3),
    "llama-tied": ("llama", "LlamaForCausalLM", DECODER | {"tie_word_embeddings": True}, 4),
    "llama-base": ("llama", "LlamaModel", DECODER, 4),
    "mistral": ("mistral", "MistralForCausalLM", DECODER | {"sliding_window": 8}, 4),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", DECODER, 4),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", DECODER, 4),
    "gemma": ("gemma", "GemmaForCausalLM", DECODER, 4),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", GEMMA, 4),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", GEMMA, 4),
    "phi3": ("phi3", "Phi3ForCausalLM", DECODER, 2),
    "opt": ("opt", "OPTForCausalLM", OPT, 3),
    "opt-350m": (
        "opt",
        "OPTForCausalLM",
        OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
        1,
    ),
    "gpt2": ("gpt2", "GPT2LMHeadModel", GPT2, 2),
    "neox": ("gpt_neox", "GPTNeoXForCausalLM", ENCODER, 2),
    "neox-serial": (
        "gpt_neox",
        "GPTNeoXForCausalLM",
        ENCODER | {"use_parallel_residual": False},
        2,
    ),
    "bert": ("bert", "BertForMaskedLM", ENCODER, 1),
    "bert-base": ("bert", "BertModel", ENCODER, 1),
    "bert-classes": ("bert", "BertForSequenceClassification", ENCODER, 1),
    "roberta": ("roberta", "RobertaForMaskedLM", ENCODER, 1),
    "distilbert": ("distilbert", "DistilBertForMaskedLM", DISTIL, 1),
    "mixtral": ("mixtral", "MixtralForCausalLM", MIXTRAL, 6),
    "qwen2-moe": ("qwen2_moe", "Qwen2MoeForCausalLM", QWEN_MOE, 7),
    "qwen3-moe": ("qwen3_moe", "Qwen3MoeForCausalLM", QWEN_MOE, 6),
    "qwen3-moe-dense": (
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        QWEN_MOE | {"mlp_only_layers": [0, 1]},
        4,
    ),
}
UNKNOWN: dict[str, tuple[str, str, dict[str, object], int]] = {
    "falcon": ("falcon", "FalconForCausalLM", ENCODER, 0),
    "bloom": ("bloom", "BloomForCausalLM", {"vocab_size": 96, "hidden_size": 64, "n_head": 4}, 0),
    "stablelm": ("stablelm", "StableLmForCausalLM", DECODER, 0),
    "cohere": ("cohere", "CohereForCausalLM", DECODER, 0),
}
CASES = KNOWN | UNKNOWN
ROUTERS = {"mixtral": 1, "qwen2-moe": 2, "qwen3-moe": 1}  # in a block, and never quantized
PARTS_CHANGED = (*ROUTERS, "gpt2")  # plain_linears changes these: equal up to rounding only

every_case = pytest.mark.parametrize("case", CASES)
known_case = pytest.mark.parametrize("case", KNOWN)


def configuration(case: str) -> dict[str, object]:
    """What config.json would hold."""
    model_type, name, settings, _ = CASES[case]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return {"model_type": model_type, "architectures": [name]} | settings


def construct(case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The ordinary way: everything in memory."""
    settings = configuration(case)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return getattr(transformers, CASES[case][1])(config).eval()
    finally:
        torch.set_default_dtype(previous)


@cache
def original(case: str) -> nn.Module:
    """A model in which no weight is idle: norms and biases are random too. Not to be changed."""
    model = construct(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.05))
    return model


def plain(case: str) -> nn.Module:
    """A copy of original(case) with nn.Linear only."""
    model = copy.deepcopy(original(case))
    plain_linears(model, find_arch(model).arch)
    return model


def run(model: nn.Module) -> Tensor:
    """Logits, or hidden states of a base model."""
    ids = torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids)[0]


def reopen(folder: Path) -> nn.Module:
    """The model of a folder by our means: skeleton, names, tensors."""
    checkpoint = Checkpoint.open(folder)
    model = build_skeleton(folder)
    found = find_arch(model)
    plain_linears(model, found.arch)
    where = stored(model, found, checkpoint.names)
    fill(model, where, where, checkpoint)
    return model


def rewrite(source: Path, target: Path, tensors: dict[str, Tensor]) -> Path:
    """The folder `source` with other weights."""
    target.mkdir(exist_ok=True)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(
        {name: t.contiguous().clone() for name, t in tensors.items()}, target / "model.safetensors"
    )
    return target


def linears_of(block: nn.Module) -> set[str]:
    return {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
