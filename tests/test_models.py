"""Architectures on small random models of transformers' own: what files, modules and taps are
called, that taps say the truth about inputs and sources, and that skeletons become the model."""

from __future__ import annotations

import copy
import json
import resource
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tersor.checkpoint import Checkpoint
from tersor.errors import TersorError
from tersor.models import (
    ARCHS,
    Experts,
    build_skeleton,
    empty,
    fill,
    find_arch,
    plain_linears,
    same_name,
    stored,
    taps_of,
    unfuse_experts,
    untapped,
)
from tersor.models.arch import Arch, Tap, spellings
from tersor.models.linears import is_conv1d, is_fused, is_linear

SMALL = {"vocab_size": 96, "max_position_embeddings": 64, "num_hidden_layers": 2}
DECODER = SMALL | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,  # as many as queries, so that v_proj is o_proj's source
    "head_dim": 16,
    "pad_token_id": 0,
}
GEMMA = DECODER | {"num_hidden_layers": 3, "sliding_window": 8, "query_pre_attn_scalar": 16}
ENCODER = SMALL | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
DISTIL = {"vocab_size": 96, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}
GPT2 = {"vocab_size": 96, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
OPT = ENCODER | {"ffn_dim": 96, "word_embed_proj_dim": 64}
MIXTRAL = DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}

# name: (model_type, class, configuration, taps with a source in every block)
KNOWN: dict[str, tuple[str, str, dict[str, object], int]] = {
    "llama": ("llama", "LlamaForCausalLM", DECODER, 4),
    "llama-gqa": ("llama", "LlamaForCausalLM", DECODER | {"num_key_value_heads": 2}, 3),
    "llama-tied": ("llama", "LlamaForCausalLM", DECODER | {"tie_word_embeddings": True}, 4),
    "llama-base": ("llama", "LlamaModel", DECODER, 4),
    "mistral": ("mistral", "MistralForCausalLM", DECODER | {"sliding_window": 8}, 4),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", DECODER, 4),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", DECODER, 4),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", GEMMA, 4),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", GEMMA, 4),
    "phi3": ("phi3", "Phi3ForCausalLM", DECODER, 2),
    "opt": ("opt", "OPTForCausalLM", OPT, 3),
    "opt-350m": (
        "opt",
        "OPTForCausalLM",
        OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
        1,
    ),
    "gpt2": ("gpt2", "GPT2LMHeadModel", GPT2, 2),
    "neox": ("gpt_neox", "GPTNeoXForCausalLM", ENCODER, 2),
    "neox-serial": (
        "gpt_neox",
        "GPTNeoXForCausalLM",
        ENCODER | {"use_parallel_residual": False},
        2,
    ),
    "bert": ("bert", "BertForMaskedLM", ENCODER, 1),
    "bert-base": ("bert", "BertModel", ENCODER, 1),
    "bert-classes": ("bert", "BertForSequenceClassification", ENCODER, 1),
    "roberta": ("roberta", "RobertaForMaskedLM", ENCODER, 1),
    "distilbert": ("distilbert", "DistilBertForMaskedLM", DISTIL, 1),
    "mixtral": ("mixtral", "MixtralForCausalLM", MIXTRAL, 6),
}
UNKNOWN: dict[str, tuple[str, str, dict[str, object], int]] = {
    "falcon": ("falcon", "FalconForCausalLM", ENCODER, 0),
    "bloom": ("bloom", "BloomForCausalLM", {"vocab_size": 96, "hidden_size": 64, "n_head": 4}, 0),
    "stablelm": ("stablelm", "StableLmForCausalLM", DECODER, 0),
    "cohere": ("cohere", "CohereForCausalLM", DECODER, 0),
}
CASES = KNOWN | UNKNOWN
PARTS_CHANGED = ("mixtral", "gpt2")  # plain_linears changes these: equal up to rounding only

every_case = pytest.mark.parametrize("case", CASES)
known_case = pytest.mark.parametrize("case", KNOWN)


def configuration(case: str) -> dict[str, object]:
    """What config.json would hold."""
    model_type, name, settings, _ = CASES[case]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return {"model_type": model_type, "architectures": [name]} | settings


def construct(case: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The ordinary way: everything in memory."""
    settings = configuration(case)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return getattr(transformers, CASES[case][1])(config).eval()
    finally:
        torch.set_default_dtype(previous)


@cache
def original(case: str) -> nn.Module:
    """A model in which no weight is idle: norms and biases are random too. Not to be changed."""
    model = construct(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.05))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """case -> the folder that save_pretrained made of original(case)."""

    @cache
    def save(case: str) -> Path:
        folder = tmp_path_factory.mktemp(case)
        original(case).save_pretrained(folder)
        return folder

    return save


def plain(case: str) -> nn.Module:
    """A copy of original(case) with nn.Linear only."""
    model = copy.deepcopy(original(case))
    plain_linears(model, find_arch(model).arch)
    return model


def run(model: nn.Module) -> Tensor:
    """Logits, or hidden states of a base model."""
    ids = torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids)[0]


def reopen(folder: Path) -> nn.Module:
    """The model of a folder by our means: skeleton, names, tensors."""
    checkpoint = Checkpoint.open(folder)
    model = build_skeleton(folder)
    found = find_arch(model)
    plain_linears(model, found.arch)
    where = stored(model, found, checkpoint.names)
    fill(model, where, where, checkpoint)
    return model


def rewrite(source: Path, target: Path, tensors: dict[str, Tensor]) -> Path:
    """The folder `source` with other weights."""
    target.mkdir(exist_ok=True)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(
        {name: t.contiguous().clone() for name, t in tensors.items()}, target / "model.safetensors"
    )
    return target


def linears_of(block: nn.Module) -> set[str]:
    return {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def test_every_entry_of_the_table_is_tested() -> None:
    assert {model_type for model_type, *_ in KNOWN.values()} == set(ARCHS)


# Skeletons


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skeleton_has_real_buffers_and_no_weights(case: str, dtype: torch.dtype) -> None:
    skeleton, model = build_skeleton(configuration(case), dtype), construct(case, dtype)
    ours, theirs = dict(skeleton.named_buffers()), dict(model.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, buffer in theirs.items():
        assert ours[name].dtype == buffer.dtype, name
        assert torch.equal(ours[name], buffer), name  # fails on meta too
    ours, theirs = (m.state_dict(keep_vars=True) for m in (skeleton, model))
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert ours[name].is_meta == isinstance(parameter, nn.Parameter), name
        assert (ours[name].shape, ours[name].dtype) == (parameter.shape, parameter.dtype), name
    tied = [(a, b) for a in theirs for b in theirs if a < b and theirs[a] is theirs[b]]
    assert tied == [(a, b) for a in ours for b in ours if a < b and ours[a] is ours[b]]
    assert not skeleton.training


@every_case
def test_skeleton_from_files_is_the_model(case: str, saved) -> None:
    model, reference = reopen(saved(case)), original(case)
    theirs = reference.state_dict()
    compared = 0
    for name, tensor in model.state_dict().items():
        if name in theirs:
            owner = reference.get_submodule(name.rpartition(".")[0])
            turned = is_conv1d(owner) and name.endswith("weight")
            assert torch.equal(tensor.t() if turned else tensor, theirs[name]), name
            compared += 1
    assert compared == len(theirs) or case == "mixtral"
    if case != "roberta":  # transformers 4.50 forgets the bias of this head when it loads
        reference = getattr(transformers, CASES[case][1]).from_pretrained(saved(case))
    ours, expected = run(model), run(reference)
    if case in PARTS_CHANGED:
        # Sums of at most 96 products in another order, in float32, over two blocks.
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(ours, expected)


def test_skeleton_of_8_billion_parameters_takes_no_memory() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    config = configuration("llama") | sizes | heads | {"head_dim": 128, "torch_dtype": "bfloat16"}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build_skeleton(config)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert sum(p.numel() for p in model.parameters()) > 8e9
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert grown < 300  # MiB; the weights would be 16 GiB


def test_skeleton_ignores_an_earlier_quantization_and_keeps_the_config() -> None:
    config = configuration("llama") | {
        "quantization_config": {"quant_method": "compressed-tensors"}
    }
    given = copy.deepcopy(config)
    assert not hasattr(build_skeleton(config).config, "quantization_config")
    assert config == given


BAD_CONFIGS = {
    "unknown type": ({"model_type": "nope"}, "has no model 'LlamaForCausalLM' of type 'nope'"),
    "no type": ({"model_type": None}, "of type None"),
    "odd type": ({"model_type": ["llama"]}, "install a version that has it"),
    "unknown class": ({"architectures": ["Nope"]}, "has no model 'Nope'"),
    "not a model": ({"architectures": ["AutoTokenizer"]}, "has no model 'AutoTokenizer'"),
    "no class": ({"architectures": None}, "has no model None"),
    "odd class": ({"architectures": [3]}, "correct `model_type` and `architectures`"),
    "own code": ({"architectures": ["Nope"], "auto_map": {"AutoModel": "x.Y"}}, "does not run"),
    "zero heads": ({"num_attention_heads": 0, "head_dim": None}, "transformers"),
    "odd width": ({"hidden_size": "wide"}, "transformers"),
}


@pytest.mark.parametrize("change", BAD_CONFIGS)
def test_bad_configurations_are_refused_on_one_line(change: str) -> None:
    settings, message = BAD_CONFIGS[change]
    with pytest.raises(TersorError) as caught:
        build_skeleton(configuration("llama") | settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert torch.get_default_dtype() == torch.float32


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match=r"has no config.json"):
        build_skeleton(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TersorError, match="not valid JSON"):
        build_skeleton(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(TersorError, match="not a JSON object"):
        build_skeleton(tmp_path)


def test_a_buffer_that_cannot_be_made_apart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class OddForCausalLM(transformers.LlamaForCausalLM):
        def __init__(self, config: object) -> None:
            super().__init__(config)
            self.register_buffer("table", torch.empty(3).fill_(1), persistent=False)

    # transformers puts another module object in its place while it is imported.
    monkeypatch.setattr(
        sys.modules["transformers"], "OddForCausalLM", OddForCausalLM, raising=False
    )
    with pytest.raises(TersorError, match="buffer table of OddForCausalLM"):
        build_skeleton(configuration("llama") | {"architectures": ["OddForCausalLM"]})


# Taps


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
        routers = {"mlp.gate", "block_sparse_moe.gate"}
        assert sorted(named) == sorted(linears_of(block) - routers)
        left = untapped(found.arch, block, taps)
        assert set(left) <= routers
        assert len(left) == (case == "mixtral")
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


# Names in files


def test_spellings() -> None:
    aliases = (("mlp", "moe"), ("head", "out"))
    assert spellings("a.mlp.head", aliases) == [
        "a.mlp.head",
        "a.moe.head",
        "a.mlp.out",
        "a.moe.out",
    ]
    assert spellings("moe.out", aliases)[-1] == "mlp.head"
    assert spellings("mlps.ahead", aliases) == ["mlps.ahead"]


@pytest.mark.parametrize(
    ("case", "prefix"),
    [("gpt2", "transformer."), ("opt", "model."), ("bert", "bert."), ("llama", "model.")],
)
def test_files_without_the_prefix_of_the_base_model(
    case: str, prefix: str, saved, tmp_path
) -> None:
    tensors = load_file(saved(case) / "model.safetensors")
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    folder = rewrite(saved(case), tmp_path / "bare", bare)
    assert torch.equal(run(reopen(folder)), run(reopen(saved(case))))


@pytest.mark.parametrize(("case", "whole"), [("llama-base", "llama"), ("bert-base", "bert")])
def test_files_with_the_prefix_of_a_larger_model(case: str, whole: str, saved, tmp_path) -> None:
    """A base model in the files of a model with a head, whose tensors are left over."""
    prefix = original(whole).base_model_prefix
    tensors = {f"{prefix}.{n}": t for n, t in load_file(saved(case) / "model.safetensors").items()}
    folder = rewrite(
        saved(case), tmp_path / "whole", tensors | {"lm_head.weight": torch.ones(2, 2)}
    )
    assert torch.equal(run(reopen(folder)), run(reopen(saved(case))))


def test_old_names_of_norms(saved, tmp_path: Path) -> None:
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for name, t in load_file(saved("bert") / "model.safetensors").items()
    }
    assert any("gamma" in name for name in old)
    assert torch.equal(
        run(reopen(rewrite(saved("bert"), tmp_path / "old", old))), run(original("bert"))
    )


def test_the_head_of_neox_under_both_its_names(saved, tmp_path: Path) -> None:
    tensors = load_file(saved("neox") / "model.safetensors")
    (head,) = {"lm_head.weight", "embed_out.weight"} & tensors.keys()
    other = "lm_head.weight" if head == "embed_out.weight" else "embed_out.weight"
    tensors[other] = tensors.pop(head)
    folder = rewrite(saved("neox"), tmp_path / "other", tensors)
    assert torch.equal(run(reopen(folder)), run(original("neox")))


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_under_either_name(kept: str, saved, tmp_path: Path) -> None:
    tensors = load_file(saved("llama-tied") / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors[kept] = tensors.pop("model.embed_tokens.weight")
    model = reopen(rewrite(saved("llama-tied"), tmp_path / "tied", tensors))
    assert torch.equal(run(model), run(original("llama-tied")))
    assert model.lm_head.weight is model.model.embed_tokens.weight  # one tensor in memory too


def test_missing_tensors_are_named(saved, tmp_path: Path) -> None:
    tensors = load_file(saved("llama") / "model.safetensors")
    lacking = {n: t for n, t in tensors.items() if "layers.1.mlp" not in n}
    folder = rewrite(saved("llama"), tmp_path / "lacking", lacking)
    message = (
        r"no tensor for model.layers.1.mlp.gate_proj.weight \(and 2 more\) of LlamaForCausalLM"
    )
    with pytest.raises(TersorError, match=message):
        reopen(folder)


def test_tensors_of_another_shape_are_refused(saved, tmp_path: Path) -> None:
    tensors = load_file(saved("llama") / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].t()
    folder = rewrite(saved("llama"), tmp_path / "turned", tensors)
    with pytest.raises(
        TersorError, match=r"up_proj.weight the shape \(64, 96\), but .* \(96, 64\)"
    ):
        reopen(folder)


def test_same_name_leads_from_files_to_modules_too() -> None:
    found = find_arch(original("mixtral"))
    quantized = "layers.0.{}.experts.2.w1.weight_packed"
    ours, theirs = "model." + quantized.format("mlp"), quantized.format("block_sparse_moe")
    assert same_name(found, theirs, {ours}) == ours
    assert same_name(found, ours, {theirs}) == theirs
    assert same_name(found, "layers.0.mlp", {ours}) is None


def test_fill_converts_and_empty_lets_go(saved) -> None:
    checkpoint = Checkpoint.open(saved("llama"))
    model = build_skeleton(saved("llama"))
    where = stored(model, find_arch(model), checkpoint.names)
    names = [name for name in where if name.startswith("model.layers.0.")]
    fill(model, names, where, checkpoint, torch.bfloat16)
    state = model.state_dict(keep_vars=True)
    assert {name for name, tensor in state.items() if not tensor.is_meta} == set(names)
    for name in names:
        assert torch.equal(state[name], original("llama").state_dict()[name].bfloat16())
        assert not state[name].requires_grad
    empty(model, names)
    assert all(tensor.is_meta for tensor in model.state_dict().values())


# Experts and Conv1D


class FusedExperts(nn.Module):
    """Experts as transformers 5 keeps them, computed densely: every expert on every token."""

    def __init__(self, experts: int, hidden: int, inter: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inter, hidden))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inter))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        shares = torch.zeros(len(hidden_states), len(self.down_proj), dtype=hidden_states.dtype)
        shares.scatter_(1, top_k_index, top_k_weights)
        gate, up = torch.einsum("th,eih->tei", hidden_states, self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("tei,ehi,te->th", self.act_fn(gate) * up, self.down_proj, shares)


NAMES = Experts(module="experts", router="gate", gate="w1", up="w3", down="w2")


def test_unfused_experts_compute_the_same() -> None:
    torch.manual_seed(0)
    fused = FusedExperts(experts=5, hidden=16, inter=24).double()
    x = torch.randn(40, 16, dtype=torch.float64)
    index = torch.rand(40, 4).topk(2, dim=-1).indices  # the fifth expert gets no token
    weights = torch.rand(40, 2, dtype=torch.float64)
    unfused = unfuse_experts(fused, NAMES)
    assert [name for name, _ in unfused[3].named_parameters()] == [
        "w1.weight",
        "w3.weight",
        "w2.weight",
    ]
    # float64: sums of at most 24 products of numbers around 1 to 100.
    torch.testing.assert_close(
        unfused(x, index, weights), fused(x, index, weights), rtol=1e-10, atol=1e-9
    )
    storages = {p.untyped_storage().data_ptr() for p in unfused.parameters()}
    assert len(storages) == 15  # nothing keeps the fused parameters alive
    assert fused.down_proj.untyped_storage().data_ptr() not in storages


def test_experts_of_another_kind_are_refused() -> None:
    fused = FusedExperts(2, 16, 24)
    fused.gate_up_proj_bias = nn.Parameter(torch.zeros(2, 48))
    with pytest.raises(TersorError, match="cannot take the experts of FusedExperts apart"):
        unfuse_experts(fused, NAMES)
    turned = FusedExperts(2, 16, 24)
    turned.down_proj = nn.Parameter(torch.zeros(2, 24, 16))
    with pytest.raises(TersorError, match=r"down_proj \(2, 24, 16\)"):
        unfuse_experts(turned, NAMES)


def test_mixtral_without_fused_experts_gives_the_same_logits() -> None:
    if not any(is_fused(module) for module in original("mixtral").modules()):
        pytest.skip("this version of transformers does not fuse the experts of Mixtral")
    # float32 sums of at most 96 products, in another order.
    torch.testing.assert_close(
        run(plain("mixtral")), run(original("mixtral")), rtol=1e-4, atol=1e-5
    )


def test_every_expert_has_a_tap_and_a_name_of_its_own(saved) -> None:
    checkpoint = Checkpoint.open(saved("mixtral"))
    model = build_skeleton(saved("mixtral"))
    found = find_arch(model)
    plain_linears(model, found.arch)
    path, block = next(found.blocks(model))
    taps = [t.linears for t in taps_of(found.arch, block) if "experts" in t.linears[0]]
    assert len(taps) == 8  # two for each of four experts
    assert {name.rpartition(".")[2] for linears in taps for name in linears} == {"w1", "w2", "w3"}
    where = stored(model, found, checkpoint.names)
    for number, part in [(0, "w1"), (3, "w2")]:
        (linear,) = (n for t in taps for n in t if n.endswith(f"experts.{number}.{part}"))
        place = where[f"{path}.{linear}.weight"]
        expected = f"model.layers.0.block_sparse_moe.experts.{number}.{part}.weight"
        assert (place.name, place.saved_as, place.expert) == (expected, expected, None)


def test_files_with_fused_experts(saved, tmp_path: Path) -> None:
    """As a plain state dict of transformers 5 has them."""
    tensors = load_file(saved("mixtral") / "model.safetensors")
    per_expert = {name for name in tensors if ".experts." in name}
    fused = {
        n.replace("block_sparse_moe", "mlp"): t for n, t in tensors.items() if n not in per_expert
    }
    for layer in range(2):
        w1, w2, w3 = (
            torch.stack(
                [
                    tensors[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{w}.weight"]
                    for e in range(4)
                ]
            )
            for w in ("w1", "w2", "w3")
        )
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    folder = rewrite(saved("mixtral"), tmp_path / "fused", fused)
    assert torch.equal(run(reopen(folder)), run(reopen(saved("mixtral"))))
    model = build_skeleton(folder)
    found = find_arch(model)
    plain_linears(model, found.arch)
    where = stored(model, found, Checkpoint.open(folder).names)
    written = {place.saved_as for place in where.values() if ".experts." in place.saved_as}
    assert written == per_expert


def test_conv1d_becomes_an_equal_linear(saved) -> None:
    before, after = original("gpt2"), plain("gpt2")
    assert any(map(is_conv1d, before.modules()))
    assert not any(map(is_conv1d, after.modules()))
    assert after.transformer.h[0].attn.c_attn.weight.shape == (192, 64)
    # float32 sums of at most 256 products, in another order.
    torch.testing.assert_close(run(after), run(before), rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(after)
    plain_linears(again, find_arch(again).arch)
    assert torch.equal(run(again), run(after))


def test_config_files_are_read_as_dicts_or_folders(saved) -> None:
    config = json.loads((saved("qwen2") / "config.json").read_text())
    ours, theirs = build_skeleton(config), build_skeleton(str(saved("qwen2")))
    assert list(ours.state_dict()) == list(theirs.state_dict())
