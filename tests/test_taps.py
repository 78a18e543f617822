"""Taps say the truth: which linears there are, what they read, what can be folded where."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from architectures import (
    CASES,
    ENCODER,
    KNOWN,
    ROUTERS,
    UNKNOWN,
    every_case,
    known_case,
    linears_of,
    original,
    plain,
    run,
)
from tersor.errors import TersorError
from tersor.models import (
    ARCHS,
    empty,
    find_arch,
    taps_of,
    untapped,
)
from tersor.models.arch import Arch, Tap
from tersor.models.linears import is_linear


def test_every_entry_of_the_table_is_tested() -> None:
    assert {model_type for model_type, *_ in KNOWN.values()} == set(ARCHS)


@every_case
def test_taps_name_every_linear_of_every_block_once(case: str) -> None:
    model = plain(case)
    found = find_arch(model)
    assert ("the table's" in found.how) == (case in KNOWN)
    blocks = list(found.blocks(model))
    assert len(blocks) == len({path for path, _ in blocks}) > 1
    for path, block in blocks:
        assert model.get_submodule(path) is block
        taps = taps_of(found.arch, block)
        named = [name for tap in taps for name in tap.linears]
        routers = {"mlp.gate", "block_sparse_moe.gate", "mlp.shared_expert_gate"}
        assert sorted(named) == sorted(linears_of(block) - routers)
        left = untapped(found.arch, block, taps)
        assert set(left) <= routers
        assert len(left) == ROUTERS.get(case, 0)
        assert sum(tap.source is not None for tap in taps) == CASES[case][3]


@known_case
def test_linears_of_a_tap_and_only_those_read_the_same_tensor_in_order(case: str) -> None:
    model = plain(case)
    found = find_arch(model)
    for path, block in found.blocks(model):
        read: dict[str, Tensor] = {}  # in the order of the calls; kept alive, so addresses differ
        hooks = [
            block.get_submodule(name).register_forward_hook(
                lambda _module, args, _out, n=name, r=read: r.update({n: args[0]})
            )
            for name in linears_of(block)
        ]
        run(model)
        for hook in hooks:
            hook.remove()
        taps = [t for t in taps_of(found.arch, block) if set(t.linears) & set(read)]
        where = [{read[name].data_ptr() for name in tap.linears} for tap in taps]
        assert all(len(addresses) == 1 for addresses in where), path
        assert len(set.union(*where)) == len(taps), path
        for tap in taps:
            first, *others = (read[name] for name in tap.linears)
            assert all(torch.equal(first, other) for other in others)
        order = list(read)
        firsts = [order.index(t.linears[0]) for t in taps if "experts" not in t.linears[0]]
        assert firsts == sorted(firsts)


@known_case
def test_scaling_a_source_and_unscaling_its_readers_changes_nothing(case: str) -> None:
    model, expected = plain(case), run(original(case))
    found = find_arch(model)
    generator = torch.Generator().manual_seed(2)
    for _, block in found.blocks(model):
        for tap in taps_of(found.arch, block):
            if tap.source is None:
                continue
            source = block.get_submodule(tap.source)
            readers = [block.get_submodule(name) for name in tap.linears]
            # Powers of two: exact, but for the addition of a norm_offset.
            scale = 2.0 ** torch.randint(-2, 3, (readers[0].in_features,), generator=generator)
            offset = 0.0 if is_linear(source) else found.arch.norm_offset
            with torch.no_grad():
                source.weight.add_(offset)
                source.weight.mul_(scale[:, None] if is_linear(source) else scale).sub_(offset)
                if getattr(source, "bias", None) is not None:
                    source.bias.mul_(scale)
                for reader in readers:
                    reader.weight.div_(scale)
    # Left over: float32 rounding, at 1e-7, carried through at most three blocks of sums of 96.
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_a_block_with_more_than_the_architecture_names_is_reported() -> None:
    config = transformers.BertConfig(**ENCODER, is_decoder=True, add_cross_attention=True)
    model = transformers.BertLMHeadModel(config)
    found = find_arch(model)
    _, block = next(found.blocks(model))
    left = untapped(found.arch, block, taps_of(found.arch, block))
    cross = {f"crossattention.self.{name}" for name in ("query", "key", "value")}
    assert left.keys() == cross | {"crossattention.output.dense"}
    assert set(left.values()) == {"no tap of bert names it"}


def test_weights_that_are_no_linears_are_reported() -> None:
    block = nn.ModuleDict(
        {"up": nn.Linear(4, 8), "mix": nn.Conv1d(8, 8, 3), "norm": nn.LayerNorm(8)}
    )
    block.table = nn.Parameter(torch.zeros(2, 4, 4))
    arch = Arch("x", "layers", (Tap(("up", "absent")), Tap(("absent",))))
    taps = taps_of(arch, block)
    assert taps == [Tap(("up",))]
    left = untapped(arch, block, taps)
    assert left == {
        "": "not a linear but ModuleDict with a weight (2, 4, 4)",
        "mix": "not a linear but Conv1d with a weight (8, 8, 3)",
    }


# Finding


@every_case
def test_parameters_outside_the_blocks_are_split_by_when_they_run(case: str) -> None:
    """With all else on meta, what is said to run before the blocks is enough to reach the first;
    and where the table knows, all of it is used."""
    model = plain(case)
    found = find_arch(model)
    names = list(model.state_dict())
    before, after = found.outside(names)
    inside = [n for path, _ in found.blocks(model) for n in names if n.startswith(f"{path}.")]
    assert sorted(before + after + inside) == sorted(names)
    empty(model, [*after, *inside])

    class ReachedError(Exception):
        pass

    def reached(_block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        assert not (args[0] if args else kwargs["hidden_states"]).is_meta
        raise ReachedError

    used: set[str] = set()
    owners = {name.rpartition(".")[0] for name in before}
    for owner in owners:
        model.get_submodule(owner).register_forward_hook(lambda *_, o=owner: used.add(o))
    _, block = next(found.blocks(model))
    block.register_forward_pre_hook(reached, with_kwargs=True)
    with pytest.raises(ReachedError):
        run(model)
    assert used == owners or case in UNKNOWN


@pytest.mark.parametrize(
    ("case", "head"), [("llama", "lm_head"), ("bert", None), ("bloom", "lm_head")]
)
def test_heads(case: str, head: str | None) -> None:
    assert find_arch(original(case)).head == head
    neox = find_arch(original("neox"))
    assert original("neox").get_submodule(neox.head) is original("neox").get_output_embeddings()


@every_case
def test_causality_is_known_to_table_and_finder(case: str) -> None:
    encoders = {"bert", "bert-base", "bert-classes", "roberta", "distilbert"}
    assert find_arch(original(case)).arch.causal == (case not in encoders)


class Home(nn.Module):
    """A model of nobody's library: its blocks lie deep, hold lists of their own, and differ."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.inputs = nn.ModuleList([nn.Embedding(8, 4) for _ in range(9)])
        self.body = nn.ModuleDict({"stack": nn.ModuleList(blocks)})


def home_block(wide: bool) -> nn.Module:
    parts = [nn.Linear(4, 4, bias=wide) for _ in range(5 if wide else 2)]
    return nn.ModuleDict({"parts": nn.ModuleList(parts), "out": nn.Linear(4, 4)})


def test_the_finder_finds_the_blocks_of_a_home_made_model() -> None:
    model = Home([home_block(False), home_block(True), home_block(False)])
    found = find_arch(model)
    assert [path for path, _ in found.blocks(model)] == [f"body.stack.{i}" for i in range(3)]
    assert "3 ModuleDict in body.stack" in found.how
    taps = [taps_of(found.arch, block) for _, block in found.blocks(model)]
    assert [len(t) for t in taps] == [3, 6, 3]
    assert all(len(tap.linears) == 1 and tap.source is None for block in taps for tap in block)
    assert (found.prefix, found.head, found.arch.causal) == ("", None, False)


def test_models_without_one_list_of_blocks_are_refused() -> None:
    config = {"model_type": "mine"}
    with pytest.raises(TersorError, match=r"blocks of mine: no nn.ModuleList .* add it to ARCHS"):
        find_arch(nn.Sequential(nn.Linear(4, 4)), config)
    with pytest.raises(TersorError, match=r"Home: blocks of more than one class in body.stack"):
        find_arch(Home([home_block(True), nn.Linear(4, 4)]))
    t5 = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=32
    )
    with pytest.raises(TersorError, match="t5 has an encoder and a decoder"):
        find_arch(transformers.T5ForConditionalGeneration(t5))


def test_a_known_type_with_its_blocks_elsewhere_goes_to_the_finder() -> None:
    model = Home([home_block(True), home_block(True)])
    assert "generic" in find_arch(model, {"model_type": "llama"}).how
