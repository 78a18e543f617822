"""Mixtures with fewer experts: plain transformers opens them, and those that mattered stayed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import AutoConfig

import tiny
from folders import content, plain, tensors
from tersor import cli
from tersor.calibrate import Calibration
from tersor.errors import TersorError
from tersor.pipeline import quantize_checkpoint
from tersor.pruning.experts import ExpertStats, expert_importance
from tersor.qweight import QSpec, Scheme
from tersor.report import Report
from tersor.solvers import RTN
from tersor.surgery.experts import drop_experts
from test_resume import in_child, killing
from test_shrink import numbers

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="experts do not say how they are chosen"
)
MIXTURES = [kind for kind in ("mixtral", "qwen2_moe", "qwen3_moe") if kind in tiny.KINDS]
TEXT = Calibration(texts=(tiny.text(),), samples=20, seq_len=64)
IDS = torch.arange(40).view(2, 20) % tiny.VOCAB
PARTS = {"mixtral": ("w1", "w3", "w2")}  # gate, up and down of an expert in files
MODULE = {"mixtral": "block_sparse_moe"}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=IDS).logits
    return result


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def mixed(model: Any) -> dict[int, nn.Module]:
    """The mixtures of a model, by the number of the block."""
    blocks = enumerate(model.model.layers)
    return {number: block.mlp for number, block in blocks if hasattr(block.mlp, "experts")}


def tokens_of(block: dict[str, Any]) -> list[int]:
    """From the report: how many tokens chose each expert."""
    return [int(part) for part in block["tokens"].split(", ")]


def count_of(config: Any) -> int:
    number = getattr(config, "num_local_experts", None) or config.num_experts
    assert isinstance(number, int)
    return number


# --- every mixture --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MIXTURES)
def test_opens_in_plain_transformers(folder: Callable[[str], Path], kind: str, out: Path) -> None:
    """With the parameters that a model made with so many experts has, which needs no code of
    ours; and what stays keeps its bits and the names that files have."""
    report = drop_experts(folder(kind), out, experts=0.25, calibration=TEXT)
    small = plain(out)
    assert count_of(AutoConfig.from_pretrained(out)) == 3
    option = "num_local_experts" if kind == "mixtral" else "num_experts"
    made = tiny.model(kind, **{option: 3})
    assert small.num_parameters() == made.num_parameters()
    assert report.structure is not None
    assert report.structure["parameters_after"] == small.num_parameters()
    assert report.structure["parameters_before"] == plain(folder(kind)).num_parameters()
    before, after = tensors(folder(kind)), tensors(out)
    assert report.bytes_after == sum(t.nbytes for t in after.values()) < report.bytes_before
    module, parts = MODULE.get(kind, "mlp"), PARTS.get(kind, ("gate_proj", "up_proj", "down_proj"))
    want = {name: tensor for name, tensor in before.items() if ".experts." not in name}
    for block in report.structure["blocks"]:
        if "experts" not in block:  # Qwen3's first one is dense here
            assert kind == "qwen3_moe"
            continue
        stem, kept = f"{block['was']}.{module}", numbers(block["experts"])
        assert len(kept) == 3
        assert sum(tokens_of(block)) == 2 * 20 * 64  # each token chooses two
        assert 0 < block["lost"] < 0.25
        want[f"{stem}.gate.weight"] = before[f"{stem}.gate.weight"][kept]
        for new, old in enumerate(kept):
            for part in parts:
                name = f"{stem}.experts.{{}}.{part}.weight"
                want[name.format(new)] = before[name.format(old)]
    assert want.keys() == after.keys()
    assert all(torch.equal(want[name], after[name]) for name in want)
    assert Report.read(out) == report
    ids = small.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert ids.shape == (2, 25)


@pytest.mark.parametrize("importance", ["output", "activation", "frequency"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_that_no_token_chooses_are_not_missed(
    kind: str, importance: str, tmp_path: Path, out: Path
) -> None:
    """Another one in every block. Their weights are the largest, so only the text can tell."""
    model: Any = tiny.model(kind)
    unwanted = {}
    with torch.no_grad():
        model.model.embed_tokens.weight *= 50  # so that tokens differ in what they choose
        model.model.embed_tokens.weight[:, 0] = 1  # a channel that only one router row reads
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[0] = 0
            elif name.endswith("experts.down_proj"):
                parameter[:, 0] = 0
        for number, mlp in mixed(model).items():
            one = unwanted[number] = (number + 1) % 4
            mlp.gate.weight[:, 0] = 0
            mlp.gate.weight[one, 0] = -100
            mlp.experts.down_proj[one] *= 50
    folder = save(model, tmp_path / "model")
    report = drop_experts(folder, out, experts=0.25, importance=importance, calibration=TEXT)
    assert report.structure is not None
    for number, one in unwanted.items():
        block = report.structure["blocks"][number]
        assert numbers(block["experts"]) == [expert for expert in range(4) if expert != one]
        assert (tokens_of(block)[one], block["lost"]) == (0, 0)
    torch.testing.assert_close(logits(plain(out)), logits(plain(folder)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def oracle(model: Any, number: int) -> dict[str, list[float]]:
    """Each importance of the experts of a block, token by token in float64."""
    seen: list[Tensor] = []
    mlp = mixed(model)[number]
    hook = mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    model(input_ids=TEXT.windows(tiny.tokenizer()))
    hook.remove()
    gate_up, down = mlp.experts.gate_up_proj, mlp.experts.down_proj
    found: dict[str, list[float]] = {name: [0.0] * len(down) for name in ("output", "frequency")}
    lengths = [0.0] * len(down)
    for x in torch.cat(seen):
        shares = (mlp.gate.weight @ x).softmax(0)
        chosen = shares.argsort(descending=True)[:2].tolist()
        whole = float(shares[chosen].sum()) if mlp.gate_normalizes else 1.0
        for expert in chosen:
            gate, up = (gate_up[expert] @ x).chunk(2)
            y = float((down[expert] @ (silu(gate) * up)).norm()) * float(shares[expert]) / whole
            found["output"][expert] += y**2
            lengths[expert] += y
            found["frequency"][expert] += 1
    found["activation"] = [
        length / max(1, times) for length, times in zip(lengths, found["frequency"], strict=True)
    ]
    found["magnitude"] = [
        float(a.square().sum() + b.square().sum()) for a, b in zip(gate_up, down, strict=True)
    ]
    return found


@pytest.mark.parametrize("importance", ["output", "activation", "frequency", "magnitude"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_importance_is_what_the_formula_says(
    folder: Callable[[str], Path], kind: str, importance: str, out: Path
) -> None:
    """In the last block, after the first one has lost experts; Mixtral's router gives shares of the
    chosen, Qwen2's of all."""
    text = None if importance == "magnitude" else TEXT
    report = drop_experts(folder(kind), out, experts=0.5, importance=importance, calibration=text)
    model: Any = plain(folder(kind), dtype=torch.float64, experts_implementation="eager")
    small: Any = plain(out, dtype=torch.float64, experts_implementation="eager")
    model.model.layers[0].mlp = small.model.layers[0].mlp
    mixed(model)[1].gate_normalizes = kind == "mixtral"
    scores = oracle(model, 1)
    assert report.structure is not None
    block = report.structure["blocks"][1]
    ranked = sorted(range(4), key=scores[importance].__getitem__, reverse=True)
    assert numbers(block["experts"]) == sorted(ranked[:2])
    if text:
        total = sum(scores["output"])
        lost = sum(scores["output"][expert] for expert in ranked[2:]) / total
        assert block["lost"] == pytest.approx(lost, rel=1e-3)
        assert tokens_of(block) == pytest.approx(scores["frequency"], abs=3)  # near ties
    else:
        assert report.calibration is None


def test_stats_and_scores() -> None:
    draw = torch.Generator().manual_seed(0)
    stats = ExpertStats(3)
    y, g = torch.randn(5, 4, generator=draw), torch.rand(5, generator=draw)
    stats.update(0, y[:2].bfloat16(), g[:2].bfloat16())
    stats.update(2, y[2:], g[2:])
    exact = g.double()[2:] * y.double()[2:].norm(dim=1)
    assert stats.tokens.tolist() == [2, 0, 3]
    assert float(stats.energy[2]) == pytest.approx(float(exact.square().sum()), rel=1e-6)
    assert float(expert_importance("activation", [], stats)[2]) == pytest.approx(
        float(exact.mean()), rel=1e-6
    )
    assert expert_importance("activation", [], stats)[1] == 0
    with pytest.raises(TersorError, match="needs statistics of the experts"):
        expert_importance("output", [], ExpertStats(3))
    stats.update(1, torch.full((1, 4), float("inf")), torch.ones(1))
    with pytest.raises(TersorError, match=r"an expert in model.layers.7 puts out NaN or Inf"):
        stats.check("model.layers.7")


# --- files ----------------------------------------------------------------------------------------


def test_files_with_fused_experts(folder: Callable[[str], Path], tmp_path: Path, out: Path) -> None:
    """gate_up_proj [E, 2 i, h] and down_proj [E, h, i], as the model has them."""
    fused = tmp_path / "fused"
    state = {}
    for name, tensor in tensors(folder("qwen2_moe")).items():
        if ".experts." not in name:
            state[name] = tensor
    for number, mlp in mixed(plain(folder("qwen2_moe"))).items():
        for part, parameter in mlp.experts.named_parameters():
            state[f"model.layers.{number}.mlp.experts.{part}"] = parameter.detach().clone()
    fused.mkdir()
    for file in folder("qwen2_moe").iterdir():
        if file.suffix != ".safetensors":
            (fused / file.name).write_bytes(file.read_bytes())
    save_file(state, fused / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(plain(fused)), logits(plain(folder("qwen2_moe"))))
    drop_experts(fused, out / "fused", experts=0.5, calibration=TEXT)
    drop_experts(folder("qwen2_moe"), out / "plain", experts=0.5, calibration=TEXT)
    one, other = tensors(out / "fused"), tensors(out / "plain")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_dtypes_stay_and_the_rest_can_be_quantized(tmp_path: Path, out: Path) -> None:
    model = tiny.save(tmp_path / "model", "mixtral", dtype=torch.bfloat16)
    drop_experts(model, out / "small", experts=0.5, importance="magnitude")
    assert {tensor.dtype for tensor in tensors(out / "small").values()} == {torch.bfloat16}
    scheme = Scheme(QSpec(4, 32))
    report = quantize_checkpoint(out / "small", out / "int4", scheme=scheme, method=RTN())
    assert len(report.layers) == 2 * (4 + 2 * 3)


@pytest.mark.parametrize("entry", ["num_experts", "num_local_experts"])
def test_either_entry_of_the_configuration(
    folder: Callable[[str], Path], tmp_path: Path, out: Path, entry: str
) -> None:
    """Versions of transformers write Qwen3's number of experts under different names."""
    model = tmp_path / "model"
    model.mkdir()
    for file in folder("qwen3_moe").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    number = config.pop("num_experts", None) or config.pop("num_local_experts")
    (model / "config.json").write_text(json.dumps(config | {entry: number}))
    drop_experts(model, out, experts=0.5, importance="magnitude")
    after = json.loads((out / "config.json").read_text())
    assert after == config | {entry: 2}
    assert len(load_file(out / "model.safetensors")["model.layers.1.mlp.gate.weight"]) == 2
    plain(out)


@pytest.mark.slow
def test_killed_at_every_rename_and_resumed(folder: Callable[[str], Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"experts": 0.25, "calibration": TEXT}
    drop_experts(folder("qwen3_moe"), tmp_path / "whole", **settings)
    whole = content(tmp_path / "whole")
    for number in count(1):
        out = tmp_path / f"{number}" / "out"
        run = partial(drop_experts, folder("qwen3_moe"), out, **settings)
        if not in_child(killing(run, number)):
            break
        run()
        assert content(out) == whole
        assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert number > 12


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("mixtral", {"experts": 0.0}, "experts is a share between 0 and 1, such as 0.25, not 0.0"),
        ("mixtral", {"experts": 1.0}, "experts is a share"),
        ("mixtral", {"experts": float("nan")}, "experts is a share"),
        ("mixtral", {"experts": 0.1}, "experts=0.1 of 4 rounds to none; use experts=0.25"),
        (
            "mixtral",
            {"experts": 0.75},
            r"leaves 1, and a token chooses 2 .*use experts=0.5 or less",
        ),
        ("mixtral", {"experts": 0.25}, "experts are ranked on text; give --calibration FILE"),
        (
            "qwen3_moe",
            {"experts": 0.25, "importance": "luck"},
            "output, activation, frequency, mag",
        ),
        ("llama", {"experts": 0.25}, "no expert can be cut: this model has none"),
        ("opt", {"experts": 0.25}, "no expert can be cut"),
    ],
)
def test_bad_input(
    folder: Callable[[str], Path], kind: str, arguments: dict[str, Any], message: str, out: Path
) -> None:
    with pytest.raises(TersorError, match=message):
        drop_experts(folder(kind), out, **arguments)
    assert not list(out.parent.iterdir())


def test_other_models_are_refused(tmp_path: Path, out: Path) -> None:
    dense = tiny.save(tmp_path / "dense", "qwen3_moe", mlp_only_layers=[0, 1])
    with pytest.raises(TersorError, match="no expert can be cut"):
        drop_experts(dense, out, experts=0.25, calibration=TEXT)
    greedy = tiny.save(tmp_path / "greedy", "mixtral", num_experts_per_tok=4)
    with pytest.raises(TersorError, match=r"leaves 3, and a token chooses 4 .*cut none"):
        drop_experts(greedy, out, experts=0.25, calibration=TEXT)
    with pytest.raises(TersorError, match="exists already"):
        drop_experts(greedy, dense, experts=0.25, calibration=TEXT)


# --- the command ----------------------------------------------------------------------------------


def test_the_command(
    folder: Callable[[str], Path], tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny.text())
    command = f"prune {folder('mixtral')} --out {out} --calibration {text} --samples 9 --seq-len 64"
    options = ["--structured", "experts=0.5", "--importance", "frequency"]
    assert cli.main([*command.split(), *options]) == 0
    assert "0.2 -> 0.1 million parameters" in " ".join(capsys.readouterr().out.split())
    assert plain(out).config.num_local_experts == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--structured experts=0.25,ffn=0.3", "experts is cut in a run of its own"),
        ("--structured experts=0.25 --multiple 32", "--multiple changes nothing for experts"),
        ("--structured experts=0.25 --update none", "--update changes nothing for experts"),
        ("--structured experts=0.25 --damp 0.1", "--damp changes nothing for experts"),
        ("--structured ffn=0.25 --importance frequency", "importance is output, fluctuation, mag"),
    ],
)
def test_bad_options(
    folder: Callable[[str], Path],
    out: Path,
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    assert cli.main(["prune", str(folder("mixtral")), "--out", str(out), *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
