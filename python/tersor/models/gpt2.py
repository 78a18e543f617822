"""GPT-2: its linears are Conv1D, stored [in, out]; plain_linears makes them nn.Linear.

compressed-tensors knows no Conv1D: transformers opens a quantized GPT-2 with random weights in
their place and no more than a warning. tersor.load and tersor.TersorConfig read it.
"""

from tersor.models.arch import GROUPS, Arch, Groups, Structure, Tap

GPT2 = Arch(
    name="gpt2",
    blocks="h",
    taps=(
        Tap(("attn.c_attn",), "ln_1"),
        Tap(("attn.c_proj",)),  # made by a third of c_attn
        Tap(("mlp.c_fc",), "ln_2"),
        Tap(("mlp.c_proj",)),
    ),
    after=("ln_f",),
    head="lm_head",
    structure=Structure(
        heads=Groups(
            rows={"attn.c_attn": (GROUPS, GROUPS, GROUPS)},  # q, k and v
            columns="attn.c_proj",
            count="n_head",
            width="head_dim",
        ),
        ffn=Groups({"mlp.c_fc": (GROUPS,)}, "mlp.c_proj", "n_inner"),
        depth="n_layer",
        by_number=("scale_attn_by_inverse_layer_idx",),
    ),
)
