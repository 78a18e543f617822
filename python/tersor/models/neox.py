"""GPT-NeoX and Pythia: fused q, k and v, and both halves may read the same residual."""

from tersor.models.arch import GROUPS, Arch, Groups, Structure, Tap

NEOX = Arch(
    name="gpt_neox",
    blocks="layers",
    taps=(
        Tap(("attention.query_key_value",), "input_layernorm"),
        Tap(("attention.dense",)),
        Tap(("mlp.dense_h_to_4h",), "post_attention_layernorm"),
        Tap(("mlp.dense_4h_to_h",)),
    ),
    after=("final_layer_norm",),
    head="lm_head",
    aliases=(("lm_head", "embed_out"),),
    structure=Structure(
        heads=Groups(
            rows={"attention.query_key_value": (GROUPS,)},  # head by head, each with its q, k and v
            columns="attention.dense",
            count="num_attention_heads",
            width="head_dim",
        ),
        ffn=Groups({"mlp.dense_h_to_4h": (GROUPS,)}, "mlp.dense_4h_to_h", "intermediate_size"),
    ),
)
