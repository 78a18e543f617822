"""What tersor has to know about an architecture: a few lines of data, and how names are spelled.

Every quirk of a model (fused or transposed weights, renamed modules, tied heads) is described or
undone in this package, so that the rest of tersor sees blocks of nn.Linear and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Tap:
    """One activation inside a block and every linear that reads it.

    linears: paths of the linears, relative to the block; those that a block lacks are skipped.
        `*` is the number of an expert, and stands for one tap per expert: each sees its own tokens.
    source: path of the module whose output channel j becomes input channel j of these linears and
        is read by nothing else: a norm, or a linear. Scaling its channels by s > 0 and the columns
        of the linears by 1 / s leaves the block's function as it was. None: there is no such
        module. It counts only where the widths agree: v_proj is not the source of o_proj in a
        model whose query heads share keys and values.
    source_if: attribute of the model's configuration that must be true for `source` to hold.
    """

    linears: tuple[str, ...]
    source: str | None = None
    source_if: str | None = None


@dataclass(frozen=True)
class Experts:
    """Gated experts inside a block, y = down(act(gate(x)) * up(x)), mixed by a router.

    module: path of the experts in the block. transformers 5 makes it one module with two
        parameters, gate_up_proj [E, 2 * inter, hidden] (gate above up) and down_proj
        [E, hidden, inter]; before, it was an nn.ModuleList of E modules, as unfuse_experts
        makes it again.
    routers: paths of the modules that choose the experts or weigh one that is always used; their
        weights are small, decide much and are never quantized. The first one has a row for each
        expert.
    gate, up, down: names of an expert's linears, in that list and in checkpoint files.
    counts: entries of config.json with the number of experts, by which version wrote it. chosen:
        the one with how many see a token.
    """

    module: str
    routers: tuple[str, ...]
    gate: str
    up: str
    down: str
    counts: tuple[str, ...] = ("num_experts", "num_local_experts")
    chosen: str = "num_experts_per_tok"


GROUPS, QUERIES = "groups", "queries"  # what a part of a linear's output holds


@dataclass(frozen=True)
class Groups:
    """Channels inside half of a block, in equal groups that can be cut out whole: attention heads,
    or one by one the channels of an MLP.

    rows: linears, paths in the block, whose output features are the groups, each with its parts,
        one after the other: GROUPS has one piece for each group, QUERIES one for each query head,
        of which a group may have several. All pieces of a linear are equally wide. So a linear that
        is q above k above v has (QUERIES, GROUPS, GROUPS), and one with gate above up twice GROUPS.
    columns: the linear whose input features are, in the same order, those of the query heads where
        there are any. A group of attention is one head of keys and values with all the query heads
        that read it, which lie together.
    count: entry of config.json with the number of groups; where it has none, every column is one.
    queries: entry with the number of query heads in all groups, or None: as many as groups.
    width: entry with the columns of one query head, which has to be written once it no longer
        follows from the others: "head_dim".
    """

    rows: dict[str, tuple[str, ...]]
    columns: str
    count: str
    queries: str | None = None
    width: str | None = None


@dataclass(frozen=True)
class Structure:
    """What can be cut out of a model so that a smaller one of the same class is left.

    heads, ffn: whether transformers makes the smaller model is seen when it is built.
    depth: entry of config.json that counts the blocks. per_block: those with a list, an item for
        each block.
    by_number: entries that, where they are true and there is no list in per_block, make what a
        block does depend on its number, so that no block can be taken out.
    """

    heads: Groups
    ffn: Groups
    depth: str = "num_hidden_layers"
    per_block: tuple[str, ...] = ("layer_types",)
    by_number: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stream:
    """The residual stream of a model whose blocks read it through norms and add to it.

    reads: norms, paths in the block, each with the linears that read what it puts out; nothing else
        reads that. In the order of the forward pass: the first one is given what enters the block.
        `*` is the number of an expert. Linears that a block lacks are skipped.
    writes: linears whose output is added to the stream, `*` as above.
    embeddings, norm: paths, relative to the base model, of what begins the stream, and of the norm
        at its end, which the head reads.
    branch_norms: norms, paths in the block, of what is added to the stream. Their weights are tied
        to the directions that the stream has, so no rotation passes them.
    width: entry of config.json with its channels. head_width: the one with the columns of an
        attention head, which no longer follow from the width once that is another. eps: the one
        with what the norms add to the mean square.
    scaled: the model multiplies its embeddings by the root of the width.
    """

    reads: tuple[tuple[str, tuple[str, ...]], ...]
    writes: tuple[str, ...]
    embeddings: str = "embed_tokens"
    norm: str = "norm"
    branch_norms: tuple[str, ...] = ()
    width: str = "hidden_size"
    head_width: str = "head_dim"
    eps: str = "rms_norm_eps"
    scaled: bool = False


@dataclass(frozen=True)
class Arch:
    """One family of models.

    blocks: path of the nn.ModuleList of blocks, relative to the base model: "layers" stands for
        "layers" in a LlamaModel and for "model.layers" in a LlamaForCausalLM.
    taps: activations of a block in the order of the forward pass, so that every tap can see the
        error of those before it.
    after: paths, relative to the base model, of what runs after the last block. All else outside
        the blocks and inside the base model (embeddings, rotary tables) runs before the first.
    head: path of the output projection, relative to the whole model; it may be tied or absent.
    aliases: pairs of dotted names for one thing: as modules are called now, and as it is called in
        files or by another version of transformers. The second is what tersor writes.
    experts: how the experts of a mixture are kept, or None for a dense model.
    norm_offset: the norms multiply by norm_offset + weight; a fold into a source has to know.
    causal: tokens see only what came before, so that perplexity means something.
    structure: what can be cut out of it, or None where no one has looked.
    stream: its residual stream, or None where that cannot be rotated or no one has looked.
    """

    name: str
    blocks: str
    taps: tuple[Tap, ...]
    after: tuple[str, ...] = ()
    head: str | None = None
    aliases: tuple[tuple[str, str], ...] = ()
    experts: Experts | None = None
    norm_offset: float = 0.0
    causal: bool = True
    structure: Structure | None = None
    stream: Stream | None = None


def spellings(path: str, aliases: Iterable[tuple[str, str]]) -> list[str]:
    """Every way to write a dotted path, as it is given first.

    >>> spellings("mlp.gate", [("mlp", "block_sparse_moe")])
    ['mlp.gate', 'block_sparse_moe.gate']
    """
    result = [path]
    for pair in aliases:
        for known in tuple(result):
            for old, new in (pair, pair[::-1]):
                other = respell(known, old, new)
                if other not in result:
                    result.append(other)
    return result


def respell(path: str, old: str, new: str) -> str:
    """path with the dotted part `old`, where it stands between dots or at an end, made `new`."""
    return f".{path}.".replace(f".{old}.", f".{new}.")[1:-1]
