"""Llama and Mistral; the halves of their block serve most of the younger families."""

from tersor.models.arch import GROUPS, QUERIES, Arch, Groups, Stream, Structure, Tap

ATTENTION = (
    Tap(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    Tap(("self_attn.o_proj",), "self_attn.v_proj"),
)

STRUCTURE = Structure(
    heads=Groups(
        rows={
            "self_attn.q_proj": (QUERIES,),
            "self_attn.k_proj": (GROUPS,),
            "self_attn.v_proj": (GROUPS,),
        },
        columns="self_attn.o_proj",
        count="num_key_value_heads",
        queries="num_attention_heads",
        width="head_dim",
    ),
    ffn=Groups(
        rows={"mlp.gate_proj": (GROUPS,), "mlp.up_proj": (GROUPS,)},
        columns="mlp.down_proj",
        count="intermediate_size",
    ),
)

ATTENTION_READS = ("input_layernorm", ATTENTION[0].linears)

STREAM = Stream(
    reads=(ATTENTION_READS, ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))),
    writes=("self_attn.o_proj", "mlp.down_proj"),
)

LLAMA = Arch(
    name="llama",
    blocks="layers",
    taps=(
        *ATTENTION,
        Tap(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
        Tap(("mlp.down_proj",), "mlp.up_proj"),  # down(act(gate) * up): linear in up
    ),
    after=("norm",),
    head="lm_head",
    structure=STRUCTURE,
    stream=STREAM,
)
