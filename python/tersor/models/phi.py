"""Phi-3 and 4: q, k and v are one linear, so are gate and up.

The producers of o_proj's and down_proj's inputs are parts of a linear, so neither has a source.
"""

from tersor.models.arch import GROUPS, QUERIES, Arch, Groups, Stream, Structure, Tap

PHI3 = Arch(
    name="phi3",
    blocks="layers",
    taps=(
        Tap(("self_attn.qkv_proj",), "input_layernorm"),
        Tap(("self_attn.o_proj",)),
        Tap(("mlp.gate_up_proj",), "post_attention_layernorm"),
        Tap(("mlp.down_proj",)),
    ),
    after=("norm",),
    head="lm_head",
    structure=Structure(
        heads=Groups(
            rows={"self_attn.qkv_proj": (QUERIES, GROUPS, GROUPS)},
            columns="self_attn.o_proj",
            count="num_key_value_heads",
            queries="num_attention_heads",
            width="head_dim",
        ),
        ffn=Groups(
            rows={"mlp.gate_up_proj": (GROUPS, GROUPS)},
            columns="mlp.down_proj",
            count="intermediate_size",
        ),
    ),
    stream=Stream(
        reads=(
            ("input_layernorm", ("self_attn.qkv_proj",)),
            ("post_attention_layernorm", ("mlp.gate_up_proj",)),
        ),
        writes=("self_attn.o_proj", "mlp.down_proj"),
    ),
)
