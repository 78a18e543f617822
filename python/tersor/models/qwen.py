"""Qwen2 (biases on q, k and v) and Qwen3 (norms on q and k): to a tap, both are Llama.

Their mixtures have experts in some blocks, of Qwen2 beside one that sees every token, and Llama's
MLP in the others. The norm before experts is read by the routers too, so it is no source of theirs.
"""

from dataclasses import replace

from tersor.models.arch import Experts, Stream, Tap
from tersor.models.llama import ATTENTION_READS, LLAMA, STRUCTURE

_WINDOWED = replace(STRUCTURE, by_number=("use_sliding_window",))
QWEN2 = replace(LLAMA, name="qwen2", structure=_WINDOWED)
QWEN3 = replace(LLAMA, name="qwen3", structure=_WINDOWED)

_EXPERTS = (
    Tap(("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")),
    Tap(("mlp.experts.*.down_proj",), "mlp.experts.*.up_proj"),
)
_SHARED = (
    Tap(("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")),
    Tap(("mlp.shared_expert.down_proj",), "mlp.shared_expert.up_proj"),
)

_MLPS = (
    "mlp",
    "mlp.shared_expert",
    "mlp.experts.*",
)  # of which a block has the first or the others
_STREAM = Stream(
    reads=(
        ATTENTION_READS,
        (
            "post_attention_layernorm",
            (
                *("mlp.gate", "mlp.shared_expert_gate"),
                *(f"{mlp}.{linear}" for mlp in _MLPS for linear in ("gate_proj", "up_proj")),
            ),
        ),
    ),
    writes=("self_attn.o_proj", *(f"{mlp}.down_proj" for mlp in _MLPS)),
)

QWEN2_MOE = replace(
    LLAMA,
    name="qwen2_moe",
    structure=None,
    stream=_STREAM,
    taps=(*LLAMA.taps, *_SHARED, *_EXPERTS),
    experts=Experts(
        module="mlp.experts",
        routers=("mlp.gate", "mlp.shared_expert_gate"),
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
    ),
)
QWEN3_MOE = replace(QWEN2_MOE, name="qwen3_moe", taps=(*LLAMA.taps, *_EXPERTS))
