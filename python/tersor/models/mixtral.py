"""Mixtral: Llama's attention and a mixture of experts, which files call block_sparse_moe.

The norm before the experts is read by the router too, so it is no source of theirs.
"""

from tersor.models.arch import Arch, Experts, Stream, Tap
from tersor.models.llama import ATTENTION, ATTENTION_READS

MIXTRAL = Arch(
    name="mixtral",
    blocks="layers",
    taps=(
        *ATTENTION,
        Tap(("mlp.experts.*.w1", "mlp.experts.*.w3")),
        Tap(("mlp.experts.*.w2",), "mlp.experts.*.w3"),
    ),
    after=("norm",),
    head="lm_head",
    aliases=(("mlp", "block_sparse_moe"),),
    experts=Experts(module="mlp.experts", routers=("mlp.gate",), gate="w1", up="w3", down="w2"),
    stream=Stream(
        reads=(
            ATTENTION_READS,
            ("post_attention_layernorm", ("mlp.gate", "mlp.experts.*.w1", "mlp.experts.*.w3")),
        ),
        writes=("self_attn.o_proj", "mlp.experts.*.w2"),
    ),
)
