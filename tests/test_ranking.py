"""What heads, channels and blocks are ranked by, and what makes up for them, against plain
transformers in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from folders import plain
from tersor.calibrate import Calibration
from tersor.errors import TersorError
from tersor.models import GROUPS, QUERIES
from tersor.progress import Progress
from tersor.runs import Run
from tersor.shards import ShardWriter
from tersor.source import Source
from tersor.surgery.cuts import settle_cuts
from tersor.surgery.ranking import DISTANCES, AttentionEntropy, taylor_scores
from tersor.surgery.shrink import shrink_checkpoint
from test_shrink import GROUPED, blocks_of, linears, logits, numbers

TEXT = Calibration(texts=(tiny.text(),), samples=12, seq_len=32)
QUERIED = [kind for kind in GROUPED if kind != "gemma3_text"]  # one with rotary bases of its own


def windows() -> Tensor:
    return TEXT.windows(tiny.tokenizer())


# --- gradients ------------------------------------------------------------------------------------


def gate_gradients(model: Any, linear: nn.Module, pieces: int) -> Tensor:
    """Michel et al.: how the loss changes with a factor before each piece, |∂L/∂ξ|, window by
    window, float64 [windows, pieces], signed."""
    gate = torch.ones(pieces, dtype=torch.float64, requires_grad=True)
    handle = linear.register_forward_pre_hook(
        lambda module, args: (args[0].unflatten(-1, (pieces, -1)) * gate[:, None]).flatten(-2)
    )
    found = []
    for ids in windows():
        loss = model(input_ids=ids[None], labels=ids[None]).loss
        found.append(torch.autograd.grad(loss, gate)[0])
    handle.remove()
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3", "gpt2", "opt"])
def test_taylor(folder: Callable[[str], Path], kind: str, out: Path) -> None:
    source = Source.open(folder(kind))
    shares = {"heads": 0.5, "query_heads": 0.5} if kind in GROUPED else {}
    cuts = settle_cuts(source, ffn=0.3, multiple=32, **shares)
    with ShardWriter(out, {}) as writer:
        run = Run(source=source, writer=writer, bar=Progress(False))
        got = taylor_scores(run, cuts.groups, windows())
        again = taylor_scores(run, cuts.groups, windows())
    assert got.keys() == again.keys()
    assert all(torch.equal(got[key], again[key]) for key in got)
    assert not any(parameter.device.type != "meta" for parameter in source.model.parameters())
    model, wanted = plain(folder(kind)).double(), set()
    for number, block in enumerate(blocks_of(model)):
        for cut in cuts.groups:
            linear = block.get_submodule(cut.groups.columns)
            signed = gate_gradients(model, linear, cut.pieces)
            path = f"{source.found.prefix}{source.found.arch.blocks}.{number}.{cut.groups.columns}"
            want = {GROUPS: signed.unflatten(1, (cut.count, -1)).sum(2).abs().mean(0)}
            if cut.each > 1:
                want[QUERIES] = signed.abs().mean(0)
            for what, scores in want.items():
                # The model computed in float32 what is here in float64.
                atol = 1e-4 * float(scores.max())
                torch.testing.assert_close(got[path, what], scores, rtol=1e-3, atol=atol)
                wanted.add((path, what))
    assert got.keys() == wanted


def test_taylor_decides(folder: Callable[[str], Path], out: Path) -> None:
    report = shrink_checkpoint(
        folder("llama"), out, heads=0.5, ffn=0.3, importance="taylor", calibration=TEXT
    )
    model = plain(folder("llama")).double()
    assert report.structure is not None
    for block, found in zip(blocks_of(model), report.structure["blocks"], strict=True):
        for what, linear, count, kept in zip(
            ("heads", "ffn"), linears("llama", block), (2, 96), (1, 64), strict=True
        ):
            assert linear is not None
            scores = gate_gradients(model, linear, count).abs().mean(0)
            best = scores.argsort(descending=True)[:kept].sort().values
            assert numbers(found[what]) == best.tolist()
    assert report.settings["importance of ffn"] == "taylor"


def test_taylor_without_a_pass_through_the_blocks(folder: Callable[[str], Path], out: Path) -> None:
    report = shrink_checkpoint(
        folder("llama"), out, ffn=0.3, importance="taylor", update="none", calibration=TEXT
    )
    assert all(layer.tokens == 0 for layer in report.layers)
    plain(out)


def test_taylor_needs_memory(
    folder: Callable[[str], Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.surgery.ranking._free_memory", lambda: 1000)
    with pytest.raises(TersorError, match="needs the whole model in memory"):
        shrink_checkpoint(folder("llama"), out, ffn=0.3, importance="taylor", calibration=TEXT)
    assert not list(out.parent.iterdir())


def test_taylor_of_a_loss_that_is_not_finite(tmp_path: Path, out: Path) -> None:
    model: Any = tiny.model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(3e38)
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(TersorError, match="loss on the calibration text is not finite"):
        shrink_checkpoint(tmp_path / "model", out, ffn=0.3, importance="taylor", calibration=TEXT)


# --- attention ------------------------------------------------------------------------------------


def visible(number: int, kind: str, length: int) -> list[int]:
    """How many positions each token sees in that block."""
    window = 8 if kind == "mistral" or (kind == "gemma2" and number % 2 == 0) else length
    return [min(i + 1, window) for i in range(length)]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "phi3"])
def test_entropy(folder: Callable[[str], Path], kind: str, out: Path) -> None:
    """Of the first block, whose input no cut has changed; the others see a smaller one."""
    report = shrink_checkpoint(
        *(folder(kind), out),
        heads=0.5,
        query_heads=0.5,
        head_importance="entropy",
        update="none",
        calibration=TEXT,
    )
    model = plain(folder(kind), attn_implementation="eager").double()
    with torch.no_grad():
        attentions = model(input_ids=windows(), output_attentions=True).attentions[0]
    scores = torch.zeros(4, dtype=torch.float64)
    for head in range(4):
        for window in attentions[:, head]:
            for row, seen in zip(window, visible(0, kind, 32), strict=True):
                if seen > 1:
                    p = row[row > 0]
                    scores[head] -= (p * p.log()).sum() / math.log(seen)
    means = scores / (len(attentions) * 31)
    assert ((means > 0) & (means < 1)).all()
    group = int(means.view(2, 2).mean(1).argmin())
    head = 2 * group + int(means.view(2, 2)[group].argmin())
    assert report.structure is not None
    assert numbers(report.structure["blocks"][0]["heads"]) == [group]
    assert numbers(report.structure["blocks"][0]["query_heads"]) == [head]

    found = AttentionEntropy(4)
    mask = torch.zeros(32, 32, dtype=torch.bool)
    for row, seen in enumerate(visible(0, kind, 32)):
        mask[row, row + 1 - seen : row + 1] = True
    found.update(attentions, mask[None, None])
    torch.testing.assert_close(found.importance, 1 - means, rtol=1e-12, atol=1e-12)


def test_entropy_of_what_sees_all() -> None:
    """Without a mask: uniform attention has all the entropy there is, a choice has none."""
    weights = torch.zeros(2, 3, 5, 5)
    weights[:, 0], weights[:, 1], weights[:, 2, :, :2] = 1 / 5, torch.eye(5), 1 / 2
    found = AttentionEntropy(3)
    found.update(weights, None)
    half = 1 - math.log(2) / math.log(5)
    want = torch.tensor([0.0, 1.0, half], dtype=torch.float64)
    torch.testing.assert_close(found.importance, want, rtol=1e-7, atol=1e-7)


def test_heads_that_look_everywhere_go_first(tmp_path: Path, out: Path) -> None:
    model: Any = tiny.model("qwen2", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    kept = []
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            for group in (number, number + 2):  # of four, with two query heads each
                for parameter in block.self_attn.q_proj.parameters():
                    parameter[16 * group : 16 * group + 16] = 0
            kept.append([g for g in range(4) if g not in (number, number + 2)])
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    report = shrink_checkpoint(
        *(tmp_path / "model", out),
        heads=0.5,
        ffn=0.3,
        head_importance="entropy",
        calibration=TEXT,
    )
    assert report.structure is not None
    assert [numbers(block["heads"]) for block in report.structure["blocks"]] == kept
    plain(out)


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISTANCES)
def test_distances_of_blocks(folder: Callable[[str], Path], kind: str, out: Path) -> None:
    report = shrink_checkpoint(
        folder("qwen3"), out, layers=1, layer_importance=kind, calibration=TEXT
    )
    model = plain(folder("qwen3")).double()
    states: list[Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda module, args, output: states.extend((args[0], output)))
    with torch.no_grad():
        model(input_ids=windows())
    want = []
    for x, y in zip(states[::2], states[1::2], strict=True):
        cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        each = 1 - cosine if kind == "influence" else cosine.arccos() / torch.pi
        want.append(float(each.mean()))
    assert report.structure is not None
    assert list(report.structure[kind].values()) == pytest.approx(want, rel=1e-3)
    assert report.structure["dropped"] == [f"model.layers.{want.index(min(want))}"]


@pytest.mark.parametrize("count", [1, 2])
def test_contiguous_blocks(folder: Callable[[str], Path], count: int, out: Path) -> None:
    """The last token of every window, from what enters the run to what leaves it."""
    report = shrink_checkpoint(
        folder("gemma2"), out, layers=count, layer_importance="contiguous", calibration=TEXT
    )
    model = plain(folder("gemma2")).double()
    states: list[Tensor] = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda module, args: states.append(args[0][:, -1]))
    model.model.norm.register_forward_pre_hook(lambda module, args: states.append(args[0][:, -1]))
    with torch.no_grad():
        model(input_ids=windows())
    assert len(states) == 4
    want = []
    for x, y in zip(states, states[count:], strict=False):
        cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        want.append(float(cosine.arccos().mean() / torch.pi))
    assert report.structure is not None
    assert list(report.structure["contiguous"].values()) == pytest.approx(want, rel=1e-3)
    first = want.index(min(want))
    dropped = [f"model.layers.{number}" for number in range(first, first + count)]
    assert report.structure["dropped"] == dropped
    plain(out)


# --- bias compensation ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["opt", "gpt2", "gpt_neox", "bert", "llama"])
def test_bias_compensation(kind: str, tmp_path: Path, out: Path) -> None:
    """Weights keep their bits; the bias is what it was and what was lost on average."""
    changes = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    heads = 0.5 if kind == "llama" else 0.0
    model = tiny.save(tmp_path / "model", kind, **changes)
    report = shrink_checkpoint(
        *(model, out),
        heads=heads,
        ffn=0.3,
        multiple=32,
        importance="activation",
        update="bias",
        calibration=TEXT,
    )
    before, small = plain(model), plain(out)
    assert report.structure is not None
    exact = copy.deepcopy(before).double()
    read: dict[nn.Module, Tensor] = {}
    watched = [(c, f"layers.0.{n}") for n, c in blocks_of(exact)[0].named_modules()]
    for module, _ in watched:
        module.register_forward_pre_hook(
            lambda module, args: read.update({module: args[0].flatten(0, -2)}) if args else None
        )
    with torch.no_grad():
        exact(input_ids=windows())
    both = zip(linears(kind, blocks_of(before)[0]), linears(kind, blocks_of(small)[0]), strict=True)
    for number, (old, new) in enumerate(both):
        what = ("heads", "ffn")[number]
        if what == "heads" and not heads:
            continue
        assert old is not None and new is not None
        weight = (lambda m: m.weight.detach().T) if kind == "gpt2" else lambda m: m.weight.detach()
        own = linears(kind, blocks_of(exact)[0])[number]
        assert own is not None
        x, w = read[own], weight(old)
        width = w.shape[1] // 2 if what == "heads" else 1
        groups = numbers(report.structure["blocks"][0][what])
        kept = [c for g in groups for c in range(g * width, (g + 1) * width)]
        gone = sorted(set(range(w.shape[1])) - set(kept))
        assert torch.equal(weight(new), w[:, kept])
        lost = w[:, gone].double() @ x[:, gone].mean(0)
        got = new.bias.detach().double()
        torch.testing.assert_close(got, old.bias.detach().double() + lost, rtol=1e-5, atol=1e-5)
        layer = report.layers[number if heads else 0]
        error = x[:, gone] @ w[:, gone].double().T - lost
        want = error.square().sum() / (x @ w.double().T).square().sum()
        assert layer.method == "bias"
        assert layer.error == pytest.approx(float(want), rel=1e-4)


def test_bias_compensation_helps(folder: Callable[[str], Path], out: Path) -> None:
    def error(update: str) -> float:
        report = shrink_checkpoint(
            folder("opt"), out / update, ffn=0.3, update=update, calibration=TEXT
        )
        return report.layers[0].error

    cut, bias, squares = error("none"), error("bias"), error("least-squares")
    assert bias < cut and squares < cut


# --- query heads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", QUERIED)
def test_query_heads_that_do_nothing_go(kind: str, tmp_path: Path, out: Path) -> None:
    """Another one in every group and block; heads of keys and values stay as they are."""
    model, want = tiny.model(kind), []
    with torch.no_grad():
        for number, block in enumerate(blocks_of(model)):
            attention, _ = linears(kind, block)
            assert attention is not None
            dead = [number % 2, 2 + (number + 1) % 2]
            for head in dead:
                attention.weight[:, 16 * head : 16 * head + 16] = 0
            want.append([head for head in range(4) if head not in dead])
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    report = shrink_checkpoint(tmp_path / "model", out, query_heads=0.5, calibration=TEXT)
    assert report.structure is not None
    assert [numbers(block["query_heads"]) for block in report.structure["blocks"]] == want
    assert all(numbers(block["heads"]) == [0, 1] for block in report.structure["blocks"])
    small = plain(out)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 2)
    assert report.settings["query_heads"] == "1 of 2 in a group"
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-5, atol=1e-5)


def test_heads_and_query_heads(tmp_path: Path, out: Path) -> None:
    """16 query heads on 4 of keys and values: 2 groups of 2 are left, chosen by their weights."""
    shape = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 8}
    model = tiny.save(tmp_path / "model", "qwen3", **shape)
    report = shrink_checkpoint(
        *(model, out),
        heads=0.5,
        query_heads=0.5,
        importance="magnitude",
        update="none",
    )
    assert report.structure is not None
    before, after = plain(model), plain(out)
    assert (after.config.num_attention_heads, after.config.num_key_value_heads) == (4, 2)
    for old, new, found in zip(
        before.model.layers, after.model.layers, report.structure["blocks"], strict=True
    ):
        a, b = old.self_attn, new.self_attn
        q = a.q_proj.weight.detach().double().square().sum(1).view(16, 8).sum(1)
        o = a.o_proj.weight.detach().double().square().sum(0).view(16, 8).sum(1)
        k, v = (
            m.weight.detach().double().square().sum(1).view(4, 8).sum(1)
            for m in (a.k_proj, a.v_proj)
        )
        groups = ((q + o).view(4, 4).sum(1) + k + v).argsort(descending=True)[:2].sort().values
        heads = [
            4 * g + h
            for g in groups.tolist()
            for h in (q + o).view(4, 4)[g].argsort(descending=True)[:2].sort().values.tolist()
        ]
        assert numbers(found["heads"]) == groups.tolist()
        assert numbers(found["query_heads"]) == heads
        assert torch.equal(b.q_proj.weight.view(4, 8, -1), a.q_proj.weight.view(16, 8, -1)[heads])
        assert torch.equal(b.v_proj.weight.view(2, 8, -1), a.v_proj.weight.view(4, 8, -1)[groups])
        kept = a.o_proj.weight.view(-1, 16, 8)[:, heads].flatten(1)
        assert torch.equal(b.o_proj.weight, kept)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (
            "llama",
            {"ffn": 0.3, "importance": "entropy"},
            "channels of an MLP have none; give it as",
        ),
        ("llama", {"heads": 0.5, "head_importance": "luck"}, "head_importance is output, fluc"),
        ("llama", {"ffn": 0.3, "head_importance": "output"}, "none are cut; leave it out"),
        ("llama", {"layers": 1, "layer_importance": "taylor"}, "layer_importance is influence, an"),
        ("llama", {"ffn": 0.3, "update": True}, "update is least-squares, bias, none, not True"),
        ("llama", {"ffn": 0.3, "update": "bias"}, "mlp.down_proj of this LlamaForCausalLM has non"),
        ("phi3", {"heads": 0.5, "update": "bias"}, "reads heads, and self_attn.o_proj"),
        ("llama", {"ffn": 0.3, "ranking": "global"}, "LlamaForCausalLM has one number of heads"),
        ("llama", {"ffn": 0.3, "ranking": "best"}, "ranking is local, global, not 'best'"),
        ("bert", {"ffn": 0.3, "importance": "taylor"}, "BertForMaskedLM does not; use output"),
        ("llama", {"ffn": 0.3, "importance": "taylor"}, "needs text to calibrate on"),
        ("llama", {"heads": 0.5, "head_importance": "entropy"}, "needs text to calibrate on"),
        ("llama", {"query_heads": 1.0}, "query_heads is a share from 0 to less than 1"),
        ("llama", {"query_heads": float("nan")}, "query_heads is a share"),
        ("llama", {"query_heads": 0.2}, "query_heads=0.2 of the 2 query .* use query_heads=0.5"),
        ("opt", {"query_heads": 0.5}, "this one has 4 of each: use heads"),
        ("gpt_neox", {"query_heads": 0.5}, "this one has 4 of each: use heads"),
        ("gpt_neox", {"heads": 0.5}, "GPTNeoXForCausalLM has the shape .*query_key_value"),
    ],
)
def test_bad_input(
    folder: Callable[[str], Path], kind: str, arguments: dict[str, Any], message: str, out: Path
) -> None:
    with pytest.raises(TersorError, match=message):
        shrink_checkpoint(folder(kind), out, **arguments)
    assert not list(out.parent.iterdir())


def test_query_heads_that_transformers_does_not_take(tmp_path: Path, out: Path) -> None:
    """A hidden size of 64 and 3 query heads: Llama's configuration wants them to divide it."""
    model = tiny.save(tmp_path / "model", num_attention_heads=4, num_key_value_heads=1)
    with pytest.raises(
        TersorError, match=r"1 of 1 with 3 of 4 .*works is query_heads=0.5, query_h"
    ):
        shrink_checkpoint(model, out, query_heads=0.25, calibration=TEXT)
    assert not out.exists()
