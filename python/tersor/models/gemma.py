"""Gemma 2 and the text model of Gemma 3: norms around both halves, which multiply by 1 + weight."""

from dataclasses import replace

from tersor.models.arch import Arch, Tap
from tersor.models.llama import ATTENTION, STRUCTURE

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
)
