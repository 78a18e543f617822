"""BERT, RoBERTa and DistilBERT: encoders that normalize after each residual sum.

What a norm puts out is read by the next linears and by the next sum: no norm is a source.
"""

from tersor.models.arch import GROUPS, Arch, Groups, Structure, Tap

BERT = Arch(
    name="bert",
    blocks="encoder.layer",
    taps=(
        Tap(("attention.self.query", "attention.self.key", "attention.self.value")),
        Tap(("attention.output.dense",), "attention.self.value"),
        Tap(("intermediate.dense",)),
        Tap(("output.dense",)),
    ),
    after=("pooler",),
    causal=False,
    structure=Structure(
        heads=Groups(
            rows={f"attention.self.{name}": (GROUPS,) for name in ("query", "key", "value")},
            columns="attention.output.dense",
            count="num_attention_heads",
            width="head_dim",
        ),
        ffn=Groups({"intermediate.dense": (GROUPS,)}, "output.dense", "intermediate_size"),
    ),
)

DISTILBERT = Arch(
    name="distilbert",
    blocks="transformer.layer",
    taps=(
        Tap(("attention.q_lin", "attention.k_lin", "attention.v_lin")),
        Tap(("attention.out_lin",), "attention.v_lin"),
        Tap(("ffn.lin1",)),
        Tap(("ffn.lin2",)),
    ),
    causal=False,
    structure=Structure(
        heads=Groups(
            rows={f"attention.{name}_lin": (GROUPS,) for name in "qkv"},
            columns="attention.out_lin",
            count="n_heads",
            width="head_dim",
        ),
        ffn=Groups({"ffn.lin1": (GROUPS,)}, "ffn.lin2", "hidden_dim"),
        depth="n_layers",
    ),
)
