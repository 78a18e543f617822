"""OPT. opt-350m normalizes after each half, so there the norms are not what the linears read."""

from tersor.models.arch import GROUPS, Arch, Groups, Structure, Tap

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
    structure=Structure(
        heads=Groups(
            rows={f"self_attn.{name}_proj": (GROUPS,) for name in "qkv"},
            columns="self_attn.out_proj",
            count="num_attention_heads",
            width="head_dim",
        ),
        ffn=Groups({"fc1": (GROUPS,)}, "fc2", "ffn_dim"),
    ),
)
