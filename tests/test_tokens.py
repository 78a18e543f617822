"""Token pruning against transformers itself: a token that is dropped after a layer is one whose key
is masked in all later layers, for the tokens that stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    StaticCache,
)

import tersor
import tiny
from tersor.errors import TersorError
from tersor.models import find_arch
from tersor.tokens import TokenReport
from tersor.tokens.choice import first_of, last_of, merge

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="needs transformers 5"
)

LAYERS, TOKENS, NEW = 4, 40, 5
SHARES = {0: 0.25, 2: 0.5}  # 40 -> 30 -> 15
SETTINGS: dict[str, Any] = {"keep_first": 2, "keep_last": 6, "min_tokens": 8}
DECODERS = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "opt", "gpt2"),
    *("gpt_neox", "mixtral", "qwen2_moe", "qwen3_moe"),
]
ENCODERS = ["bert", "roberta", "distilbert"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def decoder(kind: str, implementation: str = "eager", **changes: object) -> Any:
    depth: dict[str, object] = {"num_hidden_layers": LAYERS}
    if kind == "gpt2":
        depth |= {"n_layer": LAYERS}
    if kind == "gemma2":
        depth |= {"layer_types": ["full_attention", "sliding_attention"] * 2}
        depth |= {"attn_logit_softcapping": 0.1}  # the default, 50, is far above these scores
    if kind == "gemma3_text":
        depth |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    model: Any = tiny.model(kind, **(depth | changes))
    model.set_attn_implementation(implementation)
    return model


def encoder(kind: str, auto: Any = AutoModelForMaskedLM, implementation: str = "eager") -> Any:
    torch.manual_seed(0)
    sizes: dict[str, object] = {"vocab_size": tiny.VOCAB, "max_position_embeddings": 64}
    if kind == "distilbert":
        sizes |= {"dim": 64, "hidden_dim": 96, "n_layers": LAYERS, "n_heads": 4}
    else:
        sizes |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
        sizes |= {"num_hidden_layers": LAYERS}
    model = auto.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "emb" not in name:
                parameter.mul_(5)
    model.set_attn_implementation(implementation)
    return model


def prompt(rows: int = 1, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(2, tiny.VOCAB, (rows, tokens), generator=torch.manual_seed(seed))


def blocks(model: nn.Module) -> list[nn.Module]:
    return [block for _, block in find_arch(model).blocks(model)]


@contextmanager
def masked(model: nn.Module, kept: Mapping[int, Tensor], total: int) -> Iterator[None]:
    """The model of transformers, whose later layers do not see the prompt's tokens that went."""

    def hide(layer: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            def change(value: Any) -> Any:
                if not isinstance(value, Tensor) or value.dim() != 4:
                    return value
                value = value.expand(len(value), 1, total, total).clone()
                for cut, slots in kept.items():
                    gone = torch.ones(len(slots), total, dtype=torch.bool).scatter(1, slots, False)
                    gone[:, TOKENS:] = False
                    if cut < layer:
                        value.masked_fill_(gone[:, None, None, :], torch.finfo(value.dtype).min)
                return value

            return tuple(map(change, args)), {name: change(v) for name, v in kwargs.items()}

        return hook

    handles = [
        block.register_forward_pre_hook(hide(layer), with_kwargs=True)
        for layer, block in enumerate(blocks(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def decoded(model: Any, ids: Tensor, mask: Tensor, **more: object) -> tuple[Tensor, TokenReport]:
    """Logits [batch, TOKENS + NEW, vocabulary] of a pruned prompt and of what follows it."""
    places = positions(mask)
    with tersor.prune_tokens(model, SHARES, **(SETTINGS | more)) as report:
        parts, cache = [], DynamicCache(config=model.config)
        for start, end in [(0, TOKENS), *((i, i + 1) for i in range(TOKENS, TOKENS + NEW))]:
            step = model(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=places[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
            parts.append(step.logits)
    return torch.cat(parts, dim=1), report


@torch.no_grad()
def expected(model: Any, ids: Tensor, mask: Tensor, kept: Mapping[int, Tensor]) -> Any:
    model.set_attn_implementation("eager")
    with masked(model, kept, ids.shape[1]):
        return model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=False,
            output_attentions=True,
        )


def check_choice(
    attentions: tuple[Tensor, ...], kept: Mapping[int, Tensor], real: Tensor, last: int | None
) -> None:
    """Whatever was kept got at least as much attention as all that went, in the layer's own
    attention, and the ends of every row were kept."""
    for row in range(len(real)):
        left = real[row].nonzero()[:, 0].tolist()
        padding = sorted(set(range(real.shape[1])) - set(left))
        for layer, slots in kept.items():
            weights = attentions[layer][row, :, : real.shape[1], : real.shape[1]].double()
            queries = left if last is None else left[-last:]
            score = weights[:, queries].mean((0, 1))
            now = slots[row].tolist()
            assert now == sorted(set(now))
            safe = set(left[: SETTINGS["keep_first"]]) | set(left[-(last or 0) or len(left) :])
            stay = [slot for slot in now if slot in left]
            went = [slot for slot in left if slot not in now]
            assert safe <= set(now)
            if went:
                assert not set(padding) & set(now)  # which goes first
                free = [slot for slot in stay if slot not in safe]
                assert min(score[free], default=2.0) >= max(score[went]) - 1e-6
            left = stay


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_dropped_token_is_one_that_is_masked(kind: str, implementation: str) -> None:
    if kind == "gemma2" and implementation == "sdpa":
        pytest.skip("sdpa has no softcap")
    model = decoder(kind, implementation)
    ids, mask = prompt(tokens=TOKENS + NEW), torch.ones(1, TOKENS + NEW, dtype=torch.int64)
    logits, report = decoded(model, ids, mask)
    assert report.counts == {0: (40, 30), 2: (30, 15)}
    assert [slots.shape for slots in report.kept.values()] == [(1, 30), (1, 15)]
    assert "layer 2: 30 -> 15" in str(report)
    wanted = expected(model, ids, mask, report.kept)
    here = torch.cat([report.kept[2][0], torch.arange(TOKENS, TOKENS + NEW)])
    torch.testing.assert_close(logits[:, here], wanted.logits[:, here], **CLOSE)
    gone = sorted(set(range(TOKENS)) - set(report.kept[2][0].tolist()))
    assert logits[:, gone].isnan().all()
    check_choice(wanted.attentions, report.kept, mask[:, :TOKENS].bool(), SETTINGS["keep_last"])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "opt", "gpt2"])
def test_rows_with_left_padding(kind: str, implementation: str) -> None:
    """Every row keeps as many tokens, its own; 12 of 40 places are padding in the second row, and
    all but 10 in the third, so that 5 places of padding are left there."""
    model = decoder(kind, implementation)
    ids, mask = prompt(3, TOKENS + NEW), torch.ones(3, TOKENS + NEW, dtype=torch.int64)
    mask[1, :12] = mask[2, :30] = 0
    logits, report = decoded(model, ids, mask)
    wanted = expected(model, ids, mask, report.kept)
    kept = report.kept[2]
    assert len({tuple(row) for row in kept.tolist()}) == 3
    check_choice(wanted.attentions, report.kept, mask[:, :TOKENS].bool(), SETTINGS["keep_last"])
    for row in range(3):
        here = [i for i in kept[row].tolist() if mask[row, i]] + list(range(TOKENS, TOKENS + NEW))
        assert len(here) == NEW + (15 if row < 2 else 10)
        torch.testing.assert_close(logits[row, here], wanted.logits[row, here], **CLOSE)


def test_several_tokens_after_the_prompt() -> None:
    """More than one token goes on from a pruned cache, as in a second turn of a chat."""
    for kind, implementation in [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa")]:
        model = decoder(kind, implementation)
        ids, mask = prompt(tokens=TOKENS + NEW), torch.ones(1, TOKENS + NEW, dtype=torch.int64)
        with torch.no_grad(), tersor.prune_tokens(model, SHARES, **SETTINGS) as report:
            cache = model(ids[:, :TOKENS]).past_key_values
            logits = model(ids[:, TOKENS:], past_key_values=cache).logits
        wanted = expected(model, ids, mask, report.kept).logits[:, TOKENS:]
        torch.testing.assert_close(logits, wanted, **CLOSE)


def test_the_cache_is_shorter_after_each_cut() -> None:
    model = decoder("llama", "sdpa")
    with torch.no_grad(), tersor.prune_tokens(model, SHARES, **SETTINGS):
        cache = model(prompt()).past_key_values
        assert [layer.keys.shape[2] for layer in cache.layers] == [40, 30, 30, 15]
        model(prompt(tokens=1), past_key_values=cache)
        assert [layer.keys.shape[2] for layer in cache.layers] == [41, 31, 31, 16]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders(kind: str, padded: bool, implementation: str) -> None:
    """The tokens that stay, against masking; those that went have the state in which they did, by
    the layers up to there alone."""
    model = encoder(kind, AutoModel, implementation)
    ids, mask = prompt(2), torch.ones(2, TOKENS, dtype=torch.int64)
    if padded:
        mask[1, 25:] = 0
    with torch.no_grad(), tersor.prune_tokens(model, SHARES, **SETTINGS | {"keep_last": 0}) as done:
        states = model(ids, attention_mask=mask if padded else None)[0]
    model.set_attn_implementation("eager")
    whole = mask if padded else torch.zeros(2, 1, TOKENS, TOKENS)  # so that hooks have a mask
    with torch.no_grad(), masked(model, done.kept, TOKENS):
        wanted = model(ids, attention_mask=whole, output_hidden_states=True, output_attentions=True)
    check_choice(wanted.attentions, done.kept, mask.bool(), None)
    hidden = wanted.hidden_states  # embeddings, then after each layer
    for row in range(2):
        first, second = (set(done.kept[cut][row].tolist()) for cut in SHARES)
        assert 0 in second
        for slot in mask[row].nonzero()[:, 0].tolist():
            depth = LAYERS if slot in second else 3 if slot in first else 1
            torch.testing.assert_close(states[row, slot], hidden[depth][row, slot], **CLOSE)


def test_the_classes_of_an_encoder() -> None:
    """A head that reads [CLS], through the pooler."""
    model = encoder("bert", AutoModelForSequenceClassification, "sdpa")
    with torch.no_grad(), tersor.prune_tokens(model, {1: 0.5}, min_tokens=8) as report:
        logits = model(prompt()).logits
    model.set_attn_implementation("eager")
    with torch.no_grad(), masked(model, report.kept, TOKENS):
        wanted = model(prompt(), attention_mask=torch.zeros(1, 1, TOKENS, TOKENS)).logits
    torch.testing.assert_close(logits, wanted, **CLOSE)
    assert (report.kept[1][:, :4] == torch.arange(4)).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_nothing_changes_where_nothing_is_dropped(kind: str) -> None:
    model = encoder(kind, implementation="sdpa") if kind == "bert" else decoder(kind, "sdpa")
    ids = prompt(2)
    plain = model(ids).logits
    for shares, least in (({1: 0.5}, TOKENS + 1), ({1: 0.001}, 2)):
        with tersor.prune_tokens(
            model, shares, keep_first=1, keep_last=1, min_tokens=least
        ) as done:
            assert torch.equal(model(ids).logits, plain)
        assert (done.prompts, done.passed) == ((0, 1) if least > TOKENS else (1, 0))
    assert torch.equal(model(ids).logits, plain)


def test_generate() -> None:
    """The whole of transformers' generate: greedy, against its steps; by beams, where nothing is
    dropped; and with no cache, where every step prunes anew."""
    model = decoder("llama", "sdpa")
    ids, mask = prompt(2), torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, :7] = 0
    how: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    how |= {"pad_token_id": 0, "eos_token_id": None}
    with tersor.prune_tokens(model, SHARES, **SETTINGS) as report:
        written = model.generate(ids, **how)
        assert report.prompts == 1
        model.generate(ids, **how, num_beams=2)
        assert report.prompts == 2
        model.generate(ids, **how, use_cache=False)
        assert report.prompts == 2 + NEW
    for step in range(NEW):
        so_far = written[:, : TOKENS + step]
        more = torch.cat([mask, torch.ones(2, step, dtype=torch.int64)], dim=1)
        model.set_attn_implementation("sdpa")
        with torch.no_grad(), tersor.prune_tokens(model, SHARES, **SETTINGS) as done:
            model(ids, attention_mask=mask, position_ids=positions(mask))
        logits = expected(model, so_far, more, done.kept).logits[:, -1]
        assert torch.equal(logits.argmax(-1), written[:, TOKENS + step])
    model.set_attn_implementation("sdpa")
    plain = model.generate(ids, **how, num_beams=3)
    with tersor.prune_tokens(model, {1: 0.001}, **SETTINGS):
        assert torch.equal(model.generate(ids, **how, num_beams=3), plain)


def test_quantized_linears() -> None:
    model = decoder("llama", "sdpa")
    tersor.quantize_model(model, scheme=tersor.Scheme(tersor.QSpec(8, 32)), method="rtn")
    assert isinstance(blocks(model)[0].self_attn.q_proj, tersor.QuantLinear)
    ids, mask = prompt(tokens=TOKENS + NEW), torch.ones(1, TOKENS + NEW, dtype=torch.int64)
    logits, report = decoded(model, ids, mask)
    wanted = expected(model, ids, mask, report.kept).logits
    here = torch.cat([report.kept[2][0], torch.arange(TOKENS, TOKENS + NEW)])
    torch.testing.assert_close(logits[:, here], wanted[:, here], rtol=1e-3, atol=1e-3)


def test_gradients_pass() -> None:
    """Of the last token's logits, to the embeddings of all tokens."""
    model = decoder("llama", "eager")
    embedded = model.get_input_embeddings()(prompt()).detach().requires_grad_()
    with tersor.prune_tokens(model, SHARES, **SETTINGS) as report:
        last = model(inputs_embeds=embedded).logits[0, -1]
    found = torch.autograd.grad(last.logsumexp(0), embedded)[0]
    with masked(model, report.kept, TOKENS):
        last = model(inputs_embeds=embedded, use_cache=False).logits[0, -1]
    wanted = torch.autograd.grad(last.logsumexp(0), embedded)[0]
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert found.abs().max() > 0


def test_merging_in_a_decoder() -> None:
    """The blocks of transformers, one after the other, with the states averaged in between."""
    model = decoder("llama", "eager")
    ids = prompt()
    with torch.no_grad(), tersor.prune_tokens(model, SHARES, merge=True, **SETTINGS) as report:
        logits = model(ids).logits
    hidden, slots = model.get_input_embeddings()(ids), torch.arange(TOKENS)[None]
    weight = torch.ones(1, TOKENS)
    for layer, block in enumerate(blocks(model)):
        count = slots.shape[1]
        future = torch.full((count, count), torch.finfo(torch.float32).min).triu(1)
        angles = model.model.rotary_emb(hidden, position_ids=slots)
        with torch.no_grad():
            hidden = block(hidden, attention_mask=future[None, None], position_embeddings=angles)
        if layer in report.kept:
            kept = torch.isin(slots[0], report.kept[layer][0]).nonzero()[:, 0][None]
            real = torch.ones(1, count, dtype=torch.bool)
            safe = first_of(real, 2) | last_of(real, 6)
            hidden, weight, _ = merge(hidden, weight, kept, real, safe, True)
            slots = report.kept[layer]
    wanted = model.lm_head(model.model.norm(hidden))
    torch.testing.assert_close(logits[:, slots[0]], wanted, **CLOSE)
    with torch.no_grad(), tersor.prune_tokens(model, SHARES, **SETTINGS):
        assert not torch.allclose(model(ids).logits[:, -1], logits[:, -1], **CLOSE)


def test_merging_in_an_encoder() -> None:
    """A token that was merged has the state of the one that it is in now, at last."""
    model = encoder("bert", AutoModel, "sdpa")
    with (
        torch.no_grad(),
        tersor.prune_tokens(model, SHARES, merge=True, keep_first=1, min_tokens=8) as report,
    ):
        states = model(prompt()).last_hidden_state[0]
    assert not states.isnan().any()
    kept = report.kept[2][0].tolist()
    same = (states[:, None] == states[None, kept]).all(-1)
    assert same[kept].sum() == len(kept)
    assert same.any(1).all()  # every token is in one that stayed
    assert not same[[i for i in range(TOKENS) if i], 0].any()  # but none in [CLS]


def test_models_side_by_side_and_nothing_left_behind() -> None:
    first, second = decoder("llama", "sdpa"), decoder("gpt2", "eager")
    ids = prompt()
    plain = first(ids).logits, second(ids).logits
    with tersor.prune_tokens(first, SHARES, **SETTINGS) as one:
        with tersor.prune_tokens(second, {1: 0.5}, **SETTINGS) as other:
            for model in (first, second):
                assert model(ids).logits.isnan().any()
        assert (one.counts, other.counts) == ({0: (40, 30), 2: (30, 15)}, {1: (40, 20)})
        assert torch.equal(second(ids).logits, plain[1])
        assert first(ids).logits.isnan().any()
    with pytest.raises(KeyError), tersor.prune_tokens(first, SHARES, **SETTINGS):
        raise KeyError
    for model, logits, name in zip((first, second), plain, ("sdpa", "eager"), strict=True):
        assert torch.equal(model(ids).logits, logits)
        assert model.config._attn_implementation == name
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("shares", "settings", "message"),
    [
        ({}, {}, "no layer is given"),
        ([8], {}, "no layer is given"),
        ({3: 0.5}, {}, "layer 3: the model has the layers 0 to 3, and after the last"),
        ({-1: 0.5}, {}, "after layer -1"),
        ({"1": 0.5}, {}, "after layer '1'"),
        ({1: 0.0}, {}, "is 0.0; give a number above 0 and below 1"),
        ({1: 1}, {}, "is 1; give a number"),
        ({1: float("nan")}, {}, "is nan; give"),
        ({1: "half"}, {}, "is 'half'; give"),
        ({1: 0.5}, {"keep_first": -1}, "keep_first is -1; give a whole number of at least 0"),
        ({1: 0.5}, {"keep_last": 0}, "keep_last is 0; give a whole number of at least 1"),
        ({1: 0.5}, {"min_tokens": 1.5}, "min_tokens is 1.5"),
    ],
)
def test_bad_settings(shares: Any, settings: Any, message: str) -> None:
    with (
        pytest.raises(TersorError, match=message),
        tersor.prune_tokens(decoder("llama"), shares, **settings),
    ):
        pass


def test_bad_models() -> None:
    def refused(model: Any, message: str) -> None:
        with pytest.raises(TersorError, match=message), tersor.prune_tokens(model, {0: 0.5}):
            pass

    refused(nn.Linear(3, 3), "models of transformers, not Linear")
    refused(decoder("llama").train(), "call model.eval")
    refused(tiny.model("llama", num_hidden_layers=0), "no layers to prune tokens after")
    t5 = AutoConfig.for_model("t5", d_model=16, d_kv=8, num_layers=2, num_heads=2, vocab_size=50)
    refused(transformers.T5ForConditionalGeneration(t5).eval(), "an encoder and a decoder")
    bloom = AutoConfig.for_model("bloom", hidden_size=16, n_layer=2, n_head=2, vocab_size=50)
    refused(transformers.BloomForCausalLM(bloom).eval(), "an attention of its own kind")
    model = decoder("llama")
    model.config._attn_implementation = "flex_attention"
    refused(model, "eager, not flex_attention; call model.set_attn_implementation")
    model.config._attn_implementation = "sdpa"
    model.config.layer_types = ["chunked_attention"] * LAYERS
    refused(model, "layers with chunked_attention")
    model = decoder("llama")
    with tersor.prune_tokens(model, {0: 0.5}):
        refused(model, "already being pruned; leave that")
        refused(transformers.LlamaForCausalLM(model.config).eval(), "the same configuration object")


def test_old_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.tokens.version", lambda _: "4.57.1")
    with (
        pytest.raises(TersorError, match=r"needs transformers 5 or newer.*not 4\.57\.1"),
        tersor.prune_tokens(decoder("llama"), {0: 0.5}),
    ):
        pass


def test_bad_calls() -> None:
    """Refused before the first block has run."""
    model, ids = decoder("llama", "sdpa"), prompt()

    def refused(message: str, **given: Any) -> None:
        with pytest.raises(TersorError, match=message):
            model(**({"input_ids": ids} | given))

    with torch.no_grad(), tersor.prune_tokens(model, SHARES, **SETTINGS) as report:
        refused("leave out the labels", labels=ids)
        refused("not \\[1, 1, 40, 40\\]", attention_mask=torch.zeros(1, 1, TOKENS, TOKENS))
        cache = StaticCache(config=model.config, max_cache_len=64)
        refused("a StaticCache cannot hold layers of different", past_key_values=cache)
        refused("of 10 tokens 4 would be left after layer 2, fewer", input_ids=ids[:, :10])
        model.train()
        refused("call model.eval")
        model.eval()
        assert report.prompts == 0
        assert torch.isfinite(model(ids[:, :7], labels=ids[:, :7]).loss)  # too short to be pruned
        cache = model(ids).past_key_values
        cache.crop(-5)
        refused("the cache was cropped to 35 tokens", input_ids=ids[:, :1], past_key_values=cache)
        cache = model(ids).past_key_values
        cache.layers[3].crop(-5)
        refused("layer 3 has 11 keys", input_ids=ids[:, :1], past_key_values=cache)
        cache = model(ids).past_key_values
        model(ids[:, :3], past_key_values=cache)
        cache.crop(-2)  # of what follows the prompt: as assisted generation does
        model(ids[:, 1:3], past_key_values=cache)
        assert report.counts == {0: (40, 30), 2: (30, 15)}
