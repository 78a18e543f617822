"""Smaller models from folder to folder: plain transformers opens them, and they compute what they
should."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig

import tiny
from folders import content, plain, tensors
from tersor import cli
from tersor.calibrate import Calibration
from tersor.errors import TersorError
from tersor.models import ARCHS
from tersor.pipeline import prune_checkpoint, quantize_checkpoint
from tersor.qweight import QSpec, Scheme
from tersor.report import Report
from tersor.solvers import RTN, Magnitude
from tersor.sparsity import Sparsity
from tersor.surgery.shrink import shrink_checkpoint
from tersor.surgery.slicing import slice_checkpoint
from tersor.surgery.smaller import PRUNED
from test_resume import in_child, killing

TEXT = Calibration(texts=(tiny.text(),), samples=20, seq_len=64)
CUT = [kind for kind in tiny.KINDS if ARCHS[kind].structure is not None]
GROUPED = [k for k in CUT if k not in ("opt", "gpt2", "gpt_neox", "bert")]  # heads too
WIDTH = {"opt": "ffn_dim", "gpt2": "n_inner"}  # else intermediate_size
IDS = torch.arange(40).view(2, 20) % tiny.VOCAB


def blocks_of(model: nn.Module) -> nn.ModuleList:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def test_zeros_that_are_filled_are_said(folder: Callable[[str], Path], tmp_path: Path) -> None:
    pruned, half = tmp_path / "pruned", Magnitude(Sparsity(0.5))
    prune_checkpoint(folder("llama"), pruned, method=half)
    shrunk = shrink_checkpoint(pruned, tmp_path / "shrunk", ffn=0.3, calibration=TEXT)
    assert set(shrunk.departures.values()) == {PRUNED}
    assert len(shrunk.departures) == len(shrunk.layers)
    cut = shrink_checkpoint(
        pruned, tmp_path / "cut", ffn=0.3, importance="magnitude", update="none"
    )
    assert cut.departures == {}
    sliced = slice_checkpoint(
        pruned, tmp_path / "sliced", hidden=0.25, multiple=16, calibration=TEXT
    )
    assert set(sliced.departures.values()) == {PRUNED}
    assert len(sliced.departures) == 7 * len(sliced.structure["blocks"][:-1])


# --- every architecture ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CUT)
def test_opens_in_plain_transformers(folder: Callable[[str], Path], kind: str, out: Path) -> None:
    """With the parameters that a model made with these sizes has, which needs no code of ours."""
    model, heads = folder(kind), 0.5 if kind in GROUPED else 0.0
    report = shrink_checkpoint(
        model, out, heads=heads, ffn=0.3, layers=1, multiple=32, calibration=TEXT
    )
    depth = len(blocks_of(plain(model))) - 1
    width = 192 if kind == "gpt2" else 64
    sizes: dict[str, Any] = {
        WIDTH.get(kind, "intermediate_size"): width,
        "num_hidden_layers": depth,
    }
    if heads:
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.from_pretrained(out)
    assert {name: getattr(config, name) for name in sizes} == sizes
    small, was = plain(out), plain(model)
    if "layer_types" in tiny.CONFIGS[kind]:
        sizes["layer_types"] = config.layer_types
    assert small.num_parameters() == tiny.model(kind, **sizes).num_parameters()
    assert report.structure is not None
    assert report.structure["parameters_after"] == small.num_parameters()
    assert report.structure["parameters_before"] == was.num_parameters()
    assert report.bytes_after == sum(t.nbytes for t in tensors(out).values()) < report.bytes_before
    assert len(report.layers) == depth * (1 + bool(heads))
    assert all(0 < layer.error < 1 and layer.tokens == 20 * 64 for layer in report.layers)
    assert len(report.structure["dropped"]) == 1
    assert Report.read(out) == report
    if kind != "bert":
        ids = small.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert ids.shape == (2, 25)


def linears(kind: str, block: nn.Module) -> tuple[nn.Module | None, nn.Module]:
    """What reads the heads, and what reads the channels."""
    paths = {
        "opt": ("self_attn.out_proj", "fc2"),
        "gpt2": ("attn.c_proj", "mlp.c_proj"),
        "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
        "bert": ("attention.output.dense", "output.dense"),
    }.get(kind, ("self_attn.o_proj", "mlp.down_proj"))
    return block.get_submodule(paths[0]), block.get_submodule(paths[1])


@pytest.mark.parametrize("kind", CUT)
def test_what_does_nothing_goes_and_nothing_changes(kind: str, tmp_path: Path, out: Path) -> None:
    """Heads and channels that nobody reads, others in every block, and a block that adds zero."""
    model = tiny.model(kind)
    draw, want = torch.Generator().manual_seed(3), []
    with torch.no_grad():
        for number, block in enumerate(blocks_of(model)):
            attention, mlp = linears(kind, block)
            width = mlp.weight.shape[0 if kind == "gpt2" else 1]
            dead = torch.randperm(width, generator=draw)[:32]
            if kind == "gpt2":
                mlp.weight[dead] = 0
            else:
                mlp.weight[:, dead] = 0
            group = number % 2
            if kind in GROUPED:
                attention.weight[:, 32 * group : 32 * group + 32] = 0
            want.append((1 - group, sorted(set(range(width)) - set(dead.tolist()))))
        if kind != "bert":  # which normalizes what it adds to
            for linear in linears(kind, blocks_of(model)[1]):
                for parameter in linear.parameters():
                    parameter.zero_()
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    report = shrink_checkpoint(
        tmp_path / "model",
        out,
        heads=0.5 if kind in GROUPED else 0.0,
        ffn=32 / width,
        layers=int(kind != "bert"),
        multiple=32,
        calibration=TEXT,
    )
    assert report.structure is not None
    if kind != "bert":
        assert [name.rpartition(".")[2] for name in report.structure["dropped"]] == ["1"]
        want.pop(1)
    for (head, channels), block in zip(want, report.structure["blocks"], strict=True):
        assert numbers(block["ffn"]) == channels
        if kind in GROUPED:
            assert numbers(block["heads"]) == [head]
    assert all(layer.error == 0 for layer in report.layers)
    # The same products, but for zeros, in sums of another order.
    torch.testing.assert_close(logits(plain(out)), logits(model), rtol=1e-5, atol=1e-5)


def numbers(ranges: str) -> list[int]:
    found: list[int] = []
    for part in ranges.split(", "):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


# --- the pass through the model -------------------------------------------------------------------


def test_every_block_is_calibrated_on_the_smaller_ones_before_it(
    folder: Callable[[str], Path], out: Path
) -> None:
    """Block 1, from the values of block 0 that were written, by plain transformers and lstsq."""
    report = shrink_checkpoint(folder("llama"), out, ffn=0.3, damp=0.02, calibration=TEXT)
    before, after = plain(folder("llama")), plain(out)
    w = before.model.layers[1].mlp.down_proj.weight.detach().double()
    before.model.layers[0] = after.model.layers[0]
    seen: list[Tensor] = []
    before.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        before(input_ids=TEXT.windows(tiny.tokenizer()))
    x = torch.cat(seen).double()
    scores = w.square().sum(0) * x.square().sum(0)
    kept = scores.argsort(descending=True)[:64].sort().values
    assert report.structure is not None
    assert numbers(report.structure["blocks"][1]["ffn"]) == kept.tolist()
    root = (0.02 * x.square().sum(0).mean()).sqrt() * torch.eye(64, dtype=torch.float64)
    left = torch.cat([x[:, kept], root])
    want = torch.linalg.lstsq(left, torch.cat([x @ w.T, root @ w[:, kept].T])).solution.T
    got = after.model.layers[1].mlp.down_proj.weight.detach()
    # Activations and their Gram matrix are sums in float32; the damping bounds what becomes of it.
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)
    gate = plain(folder("llama")).model.layers[1].mlp.gate_proj.weight
    assert torch.equal(after.model.layers[1].mlp.gate_proj.weight, gate[kept])


def test_influence_is_that_of_the_original_model(folder: Callable[[str], Path], out: Path) -> None:
    model = plain(folder("gemma2"))
    want: dict[int, list[Tensor]] = {}

    def hook(number: int, module: Any, args: Any, output: Any) -> None:
        x, y = args[0].double(), (output[0] if isinstance(output, tuple) else output).double()
        lengths = x.norm(dim=-1) * y.norm(dim=-1)  # 0 for the embedding of a padding token
        cosines = torch.where(lengths > 0, (x * y).sum(-1) / lengths, 0)
        want.setdefault(number, []).append(1 - cosines.flatten())

    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(partial(hook, number))
    with torch.no_grad():
        model(input_ids=TEXT.windows(tiny.tokenizer()))
    means = [float(torch.cat(each).mean()) for each in want.values()]
    report = shrink_checkpoint(folder("gemma2"), out, ffn=0.3, layers=2, calibration=TEXT)
    assert report.structure is not None
    assert list(report.structure["influence"].values()) == pytest.approx(means, rel=1e-4)
    best = max(range(3), key=means.__getitem__)
    assert [block["was"] for block in report.structure["blocks"]] == [f"model.layers.{best}"]


def test_blocks_named_by_number(folder: Callable[[str], Path], out: Path) -> None:
    """Nothing but blocks: no text, and every tensor keeps its bits under its new name."""
    report = shrink_checkpoint(folder("gemma3_text"), out, layers=[0])
    before, after = tensors(folder("gemma3_text")), tensors(out)
    want = {}
    for name, tensor in before.items():
        if name.startswith("model.layers."):
            number, rest = name.removeprefix("model.layers.").split(".", 1)
            if number == "0":
                continue
            name = f"model.layers.{int(number) - 1}.{rest}"
        want[name] = tensor
    assert want.keys() == after.keys()
    assert all(torch.equal(want[name], after[name]) for name in want)
    assert report.calibration is None and report.layers == []
    config = json.loads((out / "config.json").read_text())
    assert config["layer_types"] == tiny.CONFIGS["gemma3_text"]["layer_types"][1:]  # type: ignore[index]
    plain(out)


def test_tables_in_old_files_go_with_their_blocks(
    folder: Callable[[str], Path], tmp_path: Path, out: Path
) -> None:
    old = tiny.save(tmp_path / "old", "gpt2")
    state = load_file(old / "model.safetensors")
    for number in range(2):
        state[f"transformer.h.{number}.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(state, old / "model.safetensors", {"format": "pt"})
    shrink_checkpoint(old, out, layers=[0], ffn=0.5, importance="magnitude", update="none")
    after = tensors(out)
    assert not any(name.endswith(".attn.bias") or ".h.1." in name for name in after)
    assert after["transformer.h.0.mlp.c_fc.weight"].shape == (64, 128)  # [in, out], as it was
    assert after["transformer.h.0.mlp.c_proj.weight"].shape == (128, 64)


def test_values_keep_their_bits_where_nothing_is_updated(tmp_path: Path, out: Path) -> None:
    """The files are finer than what the model computes in."""
    model = tiny.save(tmp_path / "model", "qwen2")
    config = json.loads((model / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        config.pop(name, None)
    (model / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    report = shrink_checkpoint(
        model, out, heads=0.5, ffn=0.3, importance="activation", update="none", calibration=TEXT
    )
    before, after = tensors(model), tensors(out)
    assert report.structure is not None
    for block in report.structure["blocks"]:
        (head,), channels = numbers(block["heads"]), numbers(block["ffn"])
        stem, rows = block["is"], slice(32 * head, 32 * head + 32)
        want = before[f"{stem}.self_attn.q_proj.bias"][rows]
        assert torch.equal(after[f"{stem}.self_attn.q_proj.bias"], want)
        want = before[f"{stem}.self_attn.v_proj.weight"][16 * head : 16 * head + 16]
        assert torch.equal(after[f"{stem}.self_attn.v_proj.weight"], want)
        want = before[f"{stem}.self_attn.o_proj.weight"][:, rows]
        assert torch.equal(after[f"{stem}.self_attn.o_proj.weight"], want)
        want = before[f"{stem}.mlp.down_proj.weight"][:, channels]
        assert torch.equal(after[f"{stem}.mlp.down_proj.weight"], want)


def test_the_update_helps_and_so_does_the_text(folder: Callable[[str], Path], out: Path) -> None:
    def error(name: str, **settings: Any) -> float:
        report = shrink_checkpoint(
            folder("llama"), out / name, heads=0.5, ffn=0.3, calibration=TEXT, **settings
        )
        return sum(layer.error for layer in report.layers[:2])  # the next block's input differs

    updated, cut = error("updated"), error("cut", update="none")
    assert updated < 0.8 * cut
    assert cut < error("activation", importance="activation", update="none")


def test_a_smaller_model_can_be_quantized(folder: Callable[[str], Path], out: Path) -> None:
    shrink_checkpoint(folder("qwen3"), out / "small", heads=0.5, ffn=0.3, calibration=TEXT)
    scheme = Scheme(QSpec(4, 32))
    report = quantize_checkpoint(out / "small", out / "int4", scheme=scheme, method=RTN())
    assert len(report.layers) == 14


@pytest.mark.slow
def test_killed_at_every_rename_and_resumed(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Through the whole model for its blocks and for gradients, and through the smaller one."""
    settings: dict[str, Any] = {"ffn": 0.3, "layers": 1, "calibration": TEXT}
    settings |= {"importance": "taylor", "layer_importance": "contiguous"}
    model = folder("gemma2")
    shrink_checkpoint(model, tmp_path / "whole", **settings)
    whole = content(tmp_path / "whole")
    for number in count(1):
        out = tmp_path / f"{number}" / "out"
        run = partial(shrink_checkpoint, model, out, **settings)
        if not in_child(killing(run, number)):
            break
        run()
        assert content(out) == whole
        assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert number > 15


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("llama", {}, "nothing is to be cut"),
        ("llama", {"heads": 1.0}, "heads is a share from 0 to less than 1, such as 0.25, not 1.0"),
        ("llama", {"ffn": -0.1}, "ffn is a share"),
        ("llama", {"ffn": float("nan")}, "ffn is a share"),
        ("llama", {"heads": 0.1}, "heads=0.1 of 2 heads .* rounds to none; use heads=0.5"),
        ("llama", {"ffn": 0.1}, "ffn=0.1 of 96 channels by 32 rounds to none"),
        ("llama", {"ffn": 0.1, "multiple": 96}, "rounds to none; use a smaller multiple"),
        ("llama", {"ffn": 0.1, "multiple": 97}, "multiple is from 1 to the 96 channels"),
        ("llama", {"layers": 2}, "from 0 to 1 for a model of 2 blocks, not 2"),
        ("llama", {"layers": -1}, "from 0 to 1"),
        ("llama", {"layers": [0, 1]}, "not all of them"),
        ("llama", {"layers": [2]}, "names blocks from 0 to 1"),
        ("llama", {"layers": 1}, "needs text to calibrate on"),
        ("llama", {"ffn": 0.3}, "needs text to calibrate on"),
        ("llama", {"ffn": 0.3, "update": "none"}, "needs text to calibrate on"),
        ("llama", {"ffn": 0.3, "importance": "luck"}, "importance is output, fluctuation, magn"),
        ("llama", {"ffn": 0.3, "damp": 0.0}, "damp must be between 0 and 1"),
        ("opt", {"heads": 0.5}, "OPTForCausalLM has the shape .*follows from the rest of config"),
        ("bert", {"heads": 0.25}, "heads cannot be cut to 3 of 4"),
        ("gpt2", {"heads": 0.5}, "GPT2LMHeadModel has the shape .*c_attn.weight.*rest of config"),
        ("mixtral", {"ffn": 0.5}, "needs a Structure in tersor.models"),
        ("qwen2_moe", {"layers": 1}, "works for no mixture"),
    ],
)
def test_bad_input(
    folder: Callable[[str], Path], kind: str, arguments: dict[str, Any], message: str, out: Path
) -> None:
    with pytest.raises(TersorError, match=message):
        shrink_checkpoint(folder(kind), out, **arguments)
    assert not list(out.parent.iterdir())


def test_other_models_are_refused(folder: Callable[[str], Path], tmp_path: Path, out: Path) -> None:
    scheme = Scheme(QSpec(4, 32))
    quantize_checkpoint(folder("llama"), tmp_path / "int4", scheme=scheme, method=RTN())
    with pytest.raises(TersorError, match="quantized already"):
        shrink_checkpoint(tmp_path / "int4", out, layers=[0])
    scaled = tiny.save(tmp_path / "scaled", "gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(TersorError, match=r"scale_attn_by_inverse_layer_idx .* depend on its num"):
        shrink_checkpoint(scaled, out, layers=[0])
    out.mkdir()
    with pytest.raises(TersorError, match="exists already"):
        shrink_checkpoint(folder("llama"), out, layers=[0])


@pytest.mark.skipif(not hasattr(LlamaConfig, "validate_architecture"), reason="takes any number")
def test_numbers_of_heads_that_transformers_takes(tmp_path: Path, out: Path) -> None:
    model = tiny.save(tmp_path / "model", num_key_value_heads=4)
    with pytest.raises(TersorError, match=r"cannot be cut to 3 of 4 .*works is heads=0.5, heads="):
        shrink_checkpoint(model, out, heads=0.25, calibration=TEXT)
    shrink_checkpoint(model, out, heads=0.5, calibration=TEXT)
    plain(out)


# --- the command ----------------------------------------------------------------------------------


def test_the_command(
    folder: Callable[[str], Path], tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny.text())
    command = f"prune {folder('llama')} --out {out} --calibration {text} --samples 9 --seq-len 64"
    assert cli.main([*command.split(), "--structured", "heads=0.5,ffn=0.3,layers=1"]) == 0
    assert "0.1 -> 0.0 million parameters" in " ".join(capsys.readouterr().out.split())
    assert len(blocks_of(plain(out))) == 1


def test_the_command_with_every_option(
    folder: Callable[[str], Path], tmp_path: Path, out: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny.text())
    command = f"prune {folder('llama')} --out {out} --calibration {text} --samples 9 --seq-len 64"
    command += " --structured query_heads=0.5,ffn=0.3,layers=1 --importance taylor"
    command += " --head-importance entropy --layer-importance angular --ranking local"
    command += " --multiple 8 --update none"
    assert cli.main(command.split()) == 0
    report = Report.read(out)
    assert report is not None
    want = {"query_heads": "1 of 2 in a group", "ffn": "64 of 96", "layers": 1, "update": "none"}
    want |= {"importance of heads": "entropy", "importance of ffn": "taylor"}
    want |= {"importance of layers": "angular"}
    assert {name: report.settings[name] for name in want} == want
    assert plain(out).config.num_attention_heads == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--structured ffn=0.3 --sparsity 0.5", "not allowed with argument"),
        (
            "--structured depth=2",
            "'depth=2' is none of heads=SHARE, query_heads=SHARE, ffn=SHARE, hidden=SHARE, ",
        ),
        ("--structured layers=0.5", "'layers=0.5' is none of"),
        ("--structured ffn=0.3 --method wanda", "--method changes nothing for --structured"),
        ("--structured ffn=0.3 --act-order", "--act-order changes nothing for --structured"),
        ("--structured ffn=0.3 --group 32", "--group changes nothing for --structured"),
        ("--structured ffn=0.3 --ignore x", "--ignore changes nothing for --structured"),
        ("--structured ffn=0.3", "needs text to calibrate on; give --calibration FILE"),
        ("--pattern 2:4 --update none", "--update is of --structured; leave it out"),
        ("--pattern 2:4 --head-importance entropy", "--head-importance is of --structured"),
        ("--structured ffn=0.3 --update all", "invalid choice: 'all'"),
        ("--structured ffn=0.3 --importance entropy", "give it as head_importance (--head-imp"),
        ("--structured ffn=0.3 --ranking global", "has one number of heads and one of channels"),
        ("--structured query_heads=half", "'query_heads=half' is none of"),
    ],
)
def test_bad_options(
    folder: Callable[[str], Path],
    out: Path,
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    command = ["prune", str(folder("llama")), "--out", str(out), *options.split()]
    try:
        code = cli.main(command)
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    assert code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_whole_heads_that_make_another_share_are_said(
    folder: Callable[[str], Path], out: Path
) -> None:
    report = shrink_checkpoint(
        folder("llama"), out, heads=0.3, importance="magnitude", update="none"
    )
    assert report.departures == {"heads": "0.3 became 0.5: 1 of 2 stay in every block"}
    with pytest.raises(TersorError, match=r"0\.3 became 0\.5"):
        shrink_checkpoint(
            folder("llama"), out.with_name("strict"), heads=0.3, importance="magnitude",
            update="none", strict=True,
        )  # fmt: skip
    assert not out.with_name("strict.partial").exists()
