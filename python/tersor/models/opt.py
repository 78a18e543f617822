"""OPT. opt-350m normalizes after each half, so there the norms are not what the linears read."""

from tersor.models.arch import Arch, Tap

OPT = Arch(
    name="opt",
    blocks="decoder.layers",
    taps=(
        Tap(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn_layer_norm",
            source_if="do_layer_norm_before",
        ),
        Tap(("self_attn.out_proj",), "self_attn.v_proj"),
        Tap(("fc1",), "final_layer_norm", source_if="do_layer_norm_before"),
        Tap(("fc2",)),
    ),
    after=("decoder.final_layer_norm", "decoder.project_out"),
    head="lm_head",
)
