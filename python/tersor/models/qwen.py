"""Qwen2 (biases on q, k and v) and Qwen3 (norms on q and k): to a tap, both are Llama.

Their mixtures have experts in some blocks, of Qwen2 beside one that sees every token, and Llama's
MLP in the others. The norm before experts is read by the routers too, so it is no source of theirs.
"""

from dataclasses import replace

from tersor.models.arch import Experts, Tap
from tersor.models.llama import LLAMA, STRUCTURE

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

QWEN2_MOE = replace(
    LLAMA,
    name="qwen2_moe",
    structure=None,
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
