"""The arithmetic of a rotated residual stream against plain float64, and what it costs a trained
model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from conftest import all_cores
from folders import plain, tensors
from tersor import demo
from tersor.calibrate import Calibration
from tersor.demo_model import DemoModel
from tersor.evaluate import evaluate
from tersor.models import ARCHS
from tersor.pruning.rotation import (
    Transfer,
    embedding,
    keeping,
    normed,
    principal,
    reading,
    writing,
)
from tersor.surgery import slicing
from tersor.surgery.slicing import slice_checkpoint

TEXT = Calibration(texts=(tiny.text(),), samples=20, seq_len=64)
IDS = torch.arange(40).view(2, 20) % tiny.VOCAB
WIDTH = 48  # of 64
QUARTER: dict[str, Any] = {"hidden": 0.25, "multiple": 16, "calibration": TEXT}
WRITERS = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias", "down_proj")
WRITERS += ("w2.weight",)  # of an expert, before transformers 5


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=IDS).logits
    return result


def orthogonal(size: int) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=draw)).Q


def norms_of(model: Any) -> dict[str, nn.Module]:
    """What reads the residual stream, in order."""
    found = {}
    for number, block in enumerate(model.model.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{number}.{name}"] = block.get_submodule(name)
    return found | {"model.norm": model.model.norm}


def signals(model: Any, eps: float) -> dict[str, Tensor]:
    """What each norm of a float64 model makes of the text before its weight, [tokens, d]."""
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str, module: nn.Module, args: Any) -> None:
        x = args[0].flatten(0, 1)
        seen.setdefault(name, []).append(x / (x.square().mean(1, keepdim=True) + eps).sqrt())

    for name, norm in norms_of(model).items():
        norm.register_forward_pre_hook(partial(hook, name))
    with torch.no_grad():
        model(input_ids=TEXT.windows(tiny.tokenizer()))
    return {name: torch.cat(each) for name, each in seen.items()}


@pytest.fixture
def directions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, float]]:
    """What `principal` gives in a run."""
    found: list[tuple[Tensor, float]] = []

    def spy(moment: Tensor, kept: int) -> tuple[Tensor, float]:
        found.append(principal(moment, kept))
        return found[-1]

    monkeypatch.setattr(slicing, "principal", spy)
    return found


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_all_directions_change_nothing(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model: Any = tiny.model(kind, dtype, tie_word_embeddings=False)
    offset, eps = ARCHS[kind].norm_offset, model.config.rms_norm_eps

    def exact(norm: nn.Module, x: Tensor) -> Tensor:
        """transformers' norms go through float32."""
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (offset + norm.weight)

    for norm in norms_of(model).values():
        norm.forward = partial(exact, norm)
    want, turn = logits(model), orthogonal(64)
    transfer = keeping(turn, 1.0)
    behind = {"input_layernorm": "qkv", "post_attention_layernorm": ("gate", "up")}
    with torch.no_grad():
        state = model.state_dict()
        for name, tensor in state.items():
            block, _, last = name.removesuffix(".weight").rpartition(".")
            if name == "model.embed_tokens.weight":
                tensor.copy_(embedding(tensor, turn))
            elif name.endswith(WRITERS):
                tensor.copy_(writing(tensor, turn))
            elif last.endswith("_proj"):
                before = next(n for n, starts in behind.items() if last.startswith(tuple(starts)))
                gain = offset + state[f"{block.rpartition('.')[0]}.{before}.weight"]
                tensor.copy_(reading(tensor, gain, transfer))
        head, last_norm = state["lm_head.weight"], state["model.norm.weight"]
        head.copy_(reading(head, offset + last_norm, transfer))
        for name in norms_of(model):
            state[f"{name}.weight"].fill_(1 - offset)
    torch.testing.assert_close(logits(model), want, rtol=tolerance, atol=tolerance)


def test_directions_are_principal_components(
    folder: Callable[[str], Path], out: Path, directions: list[tuple[Tensor, float]]
) -> None:
    report = slice_checkpoint(folder("llama"), out, **QUARTER)
    original = plain(folder("llama"), dtype=torch.float64)
    seen = torch.cat(list(signals(original, original.config.rms_norm_eps).values()))
    values, vectors = torch.linalg.eigh(seen.T @ seen)
    want = vectors[:, -WIDTH:]
    ((got, share),) = directions
    torch.testing.assert_close(got.T @ got, torch.eye(WIDTH, dtype=torch.float64))
    torch.testing.assert_close(got @ got.T, want @ want.T, rtol=0, atol=1e-3)  # of float32 sums
    assert share == pytest.approx(float(values[-WIDTH:].sum() / values.sum()), rel=1e-5)
    assert report.structure is not None
    assert report.structure["energy"] == share


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_weights_without_an_update(
    folder: Callable[[str], Path], out: Path, kind: str, directions: list[tuple[Tensor, float]]
) -> None:
    slice_checkpoint(folder(kind), out, update="none", **QUARTER)
    before = {name: tensor.double() for name, tensor in tensors(folder(kind)).items()}
    after = tensors(out)
    ((p, energy),) = directions
    offset = ARCHS[kind].norm_offset
    shrunk = (WIDTH / 64) ** 0.5
    stem = "model.layers.1."
    embedded = before["model.embed_tokens.weight"]
    want = {"model.embed_tokens.weight": shrunk * embedded @ p}
    if kind == "gemma":  # multiplied by the root of the width when it runs
        want = {"model.embed_tokens.weight": embedded @ p}
    for norm, readers in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        gain = offset + before[f"{stem}{norm}.weight"]
        want[f"{stem}{norm}.weight"] = torch.full((WIDTH,), 1 - offset)
        for name in readers:
            weight = before[f"{stem}{name}.weight"]
            want[f"{stem}{name}.weight"] = weight * gain @ p * energy**0.5 / shrunk
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        want[f"{stem}{name}.weight"] = shrunk * p.T @ before[f"{stem}{name}.weight"]
    gain = offset + before["model.norm.weight"]
    head = before.get("lm_head.weight", embedded)  # Gemma's is the embeddings
    want["lm_head.weight"] = head * gain @ p * energy**0.5 / shrunk
    want["model.norm.weight"] = torch.full((WIDTH,), 1 - offset)
    for name, tensor in want.items():
        torch.testing.assert_close(after[name], tensor.float())
    assert len(after) == len(before) + (kind == "gemma")


def test_the_update_is_least_squares_after_what_comes_before(
    folder: Callable[[str], Path], out: Path, directions: list[tuple[Tensor, float]]
) -> None:
    """Every norm, from what the written model makes of its input, by plain transformers and
    lstsq."""
    report = slice_checkpoint(folder("llama"), out, damp=0.02, **QUARTER)
    original = plain(folder("llama"), dtype=torch.float64)
    small = plain(out, dtype=torch.float64)
    eps = original.config.rms_norm_eps
    wide, narrow = signals(original, eps), signals(small, eps)
    ((p, energy),) = directions
    prior = p * (energy * 64 / WIDTH) ** 0.5
    assert report.structure is not None
    lost = {}
    for block in report.structure["blocks"]:
        for name, share in block["lost"].items():
            lost[name if name in wide else f"{block['is']}.{name}"] = share
    assert lost.keys() == wide.keys()
    readers = {"input_layernorm": "self_attn.v_proj", "post_attention_layernorm": "mlp.up_proj"}
    for name, u in wide.items():
        v = narrow[name]
        root = (0.02 * v.square().sum(0).mean()).sqrt()
        left = torch.cat([v, root * torch.eye(WIDTH, dtype=torch.float64)])
        transfer = torch.linalg.lstsq(left, torch.cat([u, root * prior.T])).solution
        stem, _, norm = name.rpartition(".")
        reader = f"{stem}.{readers[norm]}" if norm in readers else "lm_head"
        weight = original.get_submodule(reader).weight * original.get_submodule(name).weight
        want = (weight @ transfer.T).detach()
        # Activations are in float32 in a run, and the damping bounds what becomes of that.
        torch.testing.assert_close(
            small.get_submodule(reader).weight.detach(),
            want,
            rtol=1e-3,
            atol=1e-4 * float(want.abs().max()),
        )
        error = float((u - v @ transfer).square().sum() / u.square().sum())
        assert lost[name] == pytest.approx(error, rel=1e-3)


def test_arithmetic_of_odd_inputs() -> None:
    """Nothing to go by, and sums that cannot be factored."""
    nothing = torch.zeros(4, 4, dtype=torch.float64)
    found, share = principal(nothing, 2)
    torch.testing.assert_close(found.T @ found, torch.eye(2, dtype=torch.float64))
    assert share == 1
    empty, prior = Transfer(4, 2), keeping(found, share)
    transfer, used = empty.solve(prior, 0.01)
    torch.testing.assert_close(transfer, prior)
    assert (used, empty.error(transfer)) == (0.01, 0)
    broken = Transfer(4, 2)
    broken.gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)  # as no sum is
    transfer, used = broken.solve(prior, 0.01)
    assert used > 1
    assert transfer.isfinite().all()
    assert torch.equal(normed(torch.zeros(3, 4), 1e-6), torch.zeros(3, 4))


# --- a trained model ------------------------------------------------------------------------------


def at_random(moment: Tensor, kept: int) -> tuple[Tensor, float]:
    found = orthogonal(len(moment))[:, :kept]
    return found, float((found.T @ moment @ found).trace() / moment.trace())


def channels(moment: Tensor, kept: int) -> tuple[Tensor, float]:
    """The channels with the most energy, as they are."""
    best = moment.diagonal().argsort(descending=True)[:kept]
    found = torch.eye(len(moment), dtype=torch.float64)[:, best]
    return found, float(moment.diagonal()[best].sum() / moment.trace())


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [0.125, 0.25])
def test_principal_components_cost_least_on_a_trained_model(
    demo_model: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: float
) -> None:
    text = Calibration((str(demo_model.calibration),), samples=16, seq_len=demo.WINDOW)

    def cost(ways: Callable[..., Any], update: str) -> tuple[float, float]:
        monkeypatch.setattr(slicing, "principal", ways)
        out = tmp_path / f"{ways.__name__}-{update}"
        slice_checkpoint(
            demo_model.folder, out, hidden=hidden, multiple=32, update=update, calibration=text
        )
        small = demo.original(DemoModel(out, demo_model.calibration, demo_model.held_out, {}))
        both = {"original": original, "small": small}
        found = evaluate(both, windows, baseline="original", batch=8)["small"]
        assert found.kl is not None
        assert found.delta is not None
        return found.kl.mean, found.delta.mean

    with all_cores():
        original = demo.original(demo_model)
        windows = demo.held_out_windows(demo_model)["code"][:20]
        ours = {update: cost(principal, update) for update in ("least-squares", "none")}
        for other, update in ((at_random, "none"), (channels, "least-squares")):
            theirs = cost(other, update)
            assert ours[update][0] < 0.5 * theirs[0]
            assert ours[update][1] < theirs[1]
        assert ours["least-squares"][0] < 0.8 * ours["none"][0]
