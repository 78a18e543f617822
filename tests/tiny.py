"""Small random models and tokenizers, made through the libraries' own classes and saved as the
folders that a user would have."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedTokenizerFast,
)

VOCAB = 160
CONTEXT = 64
HIDDEN = 64

_SMALL = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "num_hidden_layers": 2}
_LLAMA = _SMALL | {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_GEMMA = _LLAMA | {"num_hidden_layers": 3, "sliding_window": 8, "query_pre_attn_scalar": 16}
_BERT = _SMALL | {"hidden_size": HIDDEN, "intermediate_size": 96, "num_attention_heads": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]
CONFIGS: dict[str, dict[str, object]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 8},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"layer_types": _LAYERS},
    "phi3": _LLAMA | {"pad_token_id": 0},
    "opt": _BERT | {"ffn_dim": 96, "word_embed_proj_dim": HIDDEN},
    "gpt2": _SMALL | {"n_positions": CONTEXT, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4},
    "gpt_neox": _BERT,
    "bert": _BERT,
    "mixtral": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _LLAMA | _EXPERTS | {"shared_expert_intermediate_size": 64},
    "qwen3_moe": _LLAMA | _EXPERTS | {"mlp_only_layers": [0]},
}


KINDS = [kind for kind in CONFIGS if kind in CONFIG_MAPPING]  # qwen3 came with transformers 4.51


def text(words: int = 4000, seed: int = 0) -> str:
    """Nonsense with a skewed distribution of words, a line every twelve."""
    draw = random.Random(seed)
    stems = ["ter", "so", "ra", "min", "ka", "lo", "pe", "du", "ni", "va"]
    lexicon = [a + b for a in stems for b in stems]
    picked = [lexicon[int(len(lexicon) * draw.random() ** 2)] for _ in range(words)]
    return "\n".join(" ".join(picked[i : i + 12]) for i in range(0, words, 12)) + "\n"


def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; with `bos` it puts <s> before a text, as Llama's does."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [text()],
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<s>", "</s>"], show_progress=False),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def model(kind: str, dtype: torch.dtype = torch.float32, **changes: object) -> torch.nn.Module:
    """A random model in evaluation mode; norms and biases are random too, so that none is idle."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(CONFIGS[kind] | changes))
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    made = auto.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif "emb" not in name:
                parameter.mul_(3)  # the default 0.02 makes attention almost uniform
    return made.to(dtype)


def save(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: object
) -> Path:
    """A model folder with its tokenizer."""
    model(kind, dtype, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
