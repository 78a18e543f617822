"""Gemma: norms that multiply by 1 + weight; in Gemma 2 and the text model of Gemma 3, around both
halves."""

from dataclasses import replace

from tersor.models.arch import Arch, Stream, Tap
from tersor.models.llama import ATTENTION, ATTENTION_READS, LLAMA, STREAM, STRUCTURE

GEMMA1 = replace(
    LLAMA, name="gemma1", norm_offset=1.0, stream=replace(STREAM, scaled=True)
)  # otherwise Llama

GEMMA = Arch(
    name="gemma",
    blocks="layers",
    taps=(
        *ATTENTION,
        Tap(("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm"),
        Tap(("mlp.down_proj",), "mlp.up_proj"),
    ),
    after=("norm",),
    head="lm_head",
    norm_offset=1.0,
    structure=replace(STRUCTURE, by_number=("sliding_window",)),
    stream=Stream(
        reads=(
            ATTENTION_READS,
            ("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ),
        writes=STREAM.writes,
        branch_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        scaled=True,
    ),
)
