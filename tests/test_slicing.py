"""Models with a narrower residual stream: plain transformers opens them, and they compute what the
published formula says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

import tiny
from folders import content, plain, tensors
from tersor import cli
from tersor.calibrate import Calibration
from tersor.errors import TersorError
from tersor.models import ARCHS
from tersor.pipeline import quantize_checkpoint
from tersor.qweight import QSpec, Scheme
from tersor.report import Report
from tersor.solvers import RTN
from tersor.surgery.shrink import shrink_checkpoint
from tersor.surgery.slicing import slice_checkpoint
from test_resume import in_child, killing
from test_rotation import IDS, QUARTER, TEXT, WIDTH, WRITERS, logits, orthogonal

ROTATED = [
    kind
    for kind in tiny.KINDS
    if (stream := ARCHS[kind].stream) is not None and not stream.branch_norms
]
BIASED = {"attention_bias": True, "mlp_bias": True}


# --- every architecture ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROTATED)
def test_opens_in_plain_transformers(folder: Callable[[str], Path], kind: str, out: Path) -> None:
    """With the parameters that a model made with this width has, which needs no code of ours."""
    report = slice_checkpoint(folder(kind), out, **QUARTER)
    config = AutoConfig.from_pretrained(out)
    assert (config.hidden_size, config.head_dim) == (WIDTH, 16)
    small, was = plain(out), plain(folder(kind))
    made = tiny.model(kind, hidden_size=WIDTH, head_dim=16, tie_word_embeddings=False)
    assert small.num_parameters() == made.num_parameters()
    assert report.structure is not None
    assert report.structure["parameters_after"] == small.num_parameters()
    assert report.structure["parameters_before"] == was.num_parameters()
    assert report.bytes_after == sum(t.nbytes for t in tensors(out).values()) < report.bytes_before
    blocks = report.structure["blocks"]
    assert [block["was"] for block in blocks] == [
        *(f"model.layers.{i}" for i in range(len(was.model.layers))),
        "lm_head.weight",
    ]
    assert all(0 < lost < 1 for block in blocks for lost in block["lost"].values())
    assert 0.75 < report.structure["energy"] < 1  # more than that share of random directions
    assert Report.read(out) == report
    ids = small.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert ids.shape == (2, 25)


@pytest.mark.parametrize("update", ["least-squares", "none"])
@pytest.mark.parametrize("kind", [*ROTATED, "biased"])
def test_a_stream_in_a_subspace_loses_nothing(
    kind: str, update: str, tmp_path: Path, out: Path
) -> None:
    """Embeddings and all that is added to the stream lie in 48 dimensions of 64, at random."""
    model = tiny.model("llama", **BIASED) if kind == "biased" else tiny.model(kind)
    inside = orthogonal(64)[:, :WIDTH]
    onto = inside @ inside.T
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.copy_(parameter.double() @ onto)
            elif name.endswith(WRITERS):
                parameter.copy_(onto @ parameter.double())
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    report = slice_checkpoint(tmp_path / "model", out, update=update, **QUARTER)
    assert report.structure is not None
    assert report.structure["energy"] == pytest.approx(1, abs=1e-6)
    want = logits(plain(tmp_path / "model"))
    # Every product is a sum in float32 in another basis, through two blocks.
    torch.testing.assert_close(logits(plain(out)), want, rtol=1e-4, atol=1e-4 * float(want.std()))


# --- the pass through the model -------------------------------------------------------------------


def test_dtypes_stay(tmp_path: Path, out: Path) -> None:
    model = tiny.save(tmp_path / "model", dtype=torch.bfloat16)
    slice_checkpoint(model, out, **QUARTER)
    assert {tensor.dtype for tensor in tensors(out).values()} == {torch.bfloat16}
    wide, narrow = logits(plain(model)).float(), logits(plain(out)).float()
    assert torch.corrcoef(torch.stack([wide.flatten(), narrow.flatten()]))[0, 1] > 0.8


def test_a_tied_head_is_tied_no_longer(tmp_path: Path, out: Path) -> None:
    model = tiny.save(tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors(model)
    slice_checkpoint(model, out, **QUARTER)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    small = plain(out)
    assert not torch.equal(small.lm_head.weight, small.model.embed_tokens.weight)


def test_what_is_left_can_be_cut_and_quantized(folder: Callable[[str], Path], out: Path) -> None:
    slice_checkpoint(folder("qwen3"), out / "narrow", **QUARTER)
    shrink_checkpoint(out / "narrow", out / "both", heads=0.5, ffn=0.3, calibration=TEXT)
    config = AutoConfig.from_pretrained(out / "both")
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (48, 64, 2)
    plain(out / "both")
    slice_checkpoint(out / "narrow", out / "again", hidden=1 / 3, multiple=16, calibration=TEXT)
    assert AutoConfig.from_pretrained(out / "again").hidden_size == 32
    scheme = Scheme(QSpec(4, 16))
    report = quantize_checkpoint(out / "both", out / "int4", scheme=scheme, method=RTN())
    assert len(report.layers) == 14


@pytest.mark.slow
@pytest.mark.parametrize(("update", "step"), [("least-squares", 1), ("none", 4)])
def test_killed_at_renames_and_resumed(
    folder: Callable[[str], Path], tmp_path: Path, update: str, step: int
) -> None:
    """Whatever is durable appears by a rename, so these are all the states that can be left."""
    settings: dict[str, Any] = QUARTER | {"update": update}
    slice_checkpoint(folder("gemma"), tmp_path / "whole", **settings)
    whole = content(tmp_path / "whole")
    for number in count(1, step):
        out = tmp_path / f"{number}" / "out"
        run = partial(slice_checkpoint, folder("gemma"), out, **settings)
        if not in_child(killing(run, number)):
            break
        run()
        assert content(out) == whole
        assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert number > 20


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    """Each in a process of its own: the most that was ever resident does not go down again. (And
    getrusage would begin with that of the process that started it.)"""
    script = """
import sys, tiny, torch
from pathlib import Path
from tersor.calibrate import Calibration
from tersor.surgery.slicing import slice_checkpoint
torch.set_num_threads(1)
text = Calibration(texts=(tiny.text(),), samples=20, seq_len=64)
slice_checkpoint(sys.argv[1], sys.argv[2], hidden=0.25, calibration=text)
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])  # KiB
"""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    peaks, weights = {}, {}
    for depth in (4, 14):
        model = tiny.save(tmp_path / f"{depth}", num_hidden_layers=depth, **sizes)
        command = [sys.executable, "-c", script, str(model), str(tmp_path / f"{depth}-out")]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent
        )
        peaks[depth] = int(done.stdout) << 10
        weights[depth] = sum(tensor.nbytes for tensor in tensors(model).values())
    # The weights of either model would make it three quarters of that or more.
    assert peaks[14] - peaks[4] < 0.5 * (weights[14] - weights[4])


def test_another_run_is_not_gone_on_with(folder: Callable[[str], Path], out: Path) -> None:
    run = partial(slice_checkpoint, folder("llama"), out, **QUARTER)
    assert in_child(killing(run, 14))
    with pytest.raises(TersorError, match=r'hidden was "48 of 64" and is "32 of 64"'):
        slice_checkpoint(folder("llama"), out, hidden=0.5, multiple=16, calibration=TEXT)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("llama", {"hidden": 0.0}, "hidden is a share between 0 and 1, such as 0.25, not 0.0"),
        ("llama", {"hidden": 1.0}, "hidden is a share"),
        ("llama", {"hidden": -0.1}, "hidden is a share"),
        ("llama", {"hidden": float("nan")}, "hidden is a share"),
        ("llama", {"hidden": 0.25}, "hidden=0.25 of 64 channels by 64 rounds to none; use a small"),
        ("llama", {"hidden": 0.1, "multiple": 16}, "rounds to none; use hidden=0.25 or a smaller"),
        ("llama", {"hidden": 0.5, "multiple": 65}, "multiple is from 1 to the 64 channels"),
        ("llama", {"hidden": 0.5, "multiple": 0}, "multiple is from 1"),
        ("llama", {"hidden": 0.5, "multiple": 16, "damp": 1.0}, "damp must be between 0 and 1"),
        ("llama", {"hidden": 0.5, "multiple": 16}, "found on text; give --calibration FILE"),
        (
            "llama",
            {
                "hidden": 0.25,
                "multiple": 16,
                "calibration": Calibration(texts=("a",) * 99, samples=1, seq_len=20),
            },
            "20 tokens cannot tell which 48 directions matter; give more text",
        ),
        (
            "gemma2",
            {"hidden": 0.5},
            "post_attention_layernorm multiplies what is added .*channel by",
        ),
        ("gemma3_text", {"hidden": 0.5}, "post_attention_layernorm multiplies"),
        ("opt", {"hidden": 0.5}, "of opt cannot be cut: its blocks have LayerNorms"),
        ("gpt2", {"hidden": 0.5}, "its blocks have LayerNorms"),
        ("gpt_neox", {"hidden": 0.5}, "its blocks have LayerNorms"),
        ("bert", {"hidden": 0.5}, "its blocks have LayerNorms"),
    ],
)
def test_bad_input(
    folder: Callable[[str], Path], kind: str, arguments: dict[str, Any], message: str, out: Path
) -> None:
    with pytest.raises(TersorError, match=message):
        slice_checkpoint(folder(kind), out, **arguments)
    assert not list(out.parent.iterdir())


def test_other_models_are_refused(folder: Callable[[str], Path], tmp_path: Path, out: Path) -> None:
    base = tmp_path / "base"
    plain(folder("llama")).model.save_pretrained(base)
    with pytest.raises(TersorError, match="LlamaModel has no language model's head"):
        slice_checkpoint(base, out, **QUARTER)
    tied = tiny.save(tmp_path / "tied", tie_word_embeddings=True, vocab_size=2000)
    with pytest.raises(TersorError, match=r"with 48 .* would have \d+ parameters, not less than"):
        slice_checkpoint(tied, out, **QUARTER)
    with pytest.raises(TersorError, match="exists already"):
        slice_checkpoint(folder("llama"), base, **QUARTER)


def test_what_overflows_is_said(tmp_path: Path, out: Path) -> None:
    model: Any = tiny.model("llama", torch.float16)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(6e4)
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(TersorError, match=r"stream in model.layers.\d holds NaN or Inf"):
        slice_checkpoint(tmp_path / "model", out, **QUARTER)


@pytest.mark.parametrize("update", ["least-squares", "none"])
def test_what_only_the_narrower_stream_overflows_is_said(
    update: str, tmp_path: Path, out: Path
) -> None:
    """Rotation gathers what was in many channels in one."""
    model: Any = tiny.model("llama", torch.float16)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :16] = 3e4
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(TersorError, match="convert the model to bfloat16 or float32"):
        slice_checkpoint(tmp_path / "model", out, update=update, **QUARTER)


@pytest.mark.skipif(not hasattr(LlamaConfig, "validate_architecture"), reason="takes any width")
def test_widths_that_transformers_takes(folder: Callable[[str], Path], out: Path) -> None:
    with pytest.raises(
        TersorError,
        match=r"cut to 50 of 64 .*what works is hidden=0.25 by a multiple of 4 or hidden=0.1875 by",
    ):
        slice_checkpoint(folder("llama"), out, hidden=0.22, multiple=2, calibration=TEXT)
    slice_checkpoint(folder("llama"), out, hidden=0.1875, multiple=4, calibration=TEXT)
    assert plain(out).config.hidden_size == 52


# --- the command ----------------------------------------------------------------------------------


def test_the_command(
    folder: Callable[[str], Path], tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny.text())
    command = f"prune {folder('llama')} --out {out} --calibration {text} --samples 9 --seq-len 64"
    assert cli.main([*command.split(), "--structured", "hidden=0.25", "--multiple", "16"]) == 0
    assert "0.1 -> 0.1 million parameters" in " ".join(capsys.readouterr().out.split())
    assert plain(out).config.hidden_size == WIDTH


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--structured hidden=0.25,ffn=0.3", "hidden is cut in a run of its own"),
        (
            "--structured hidden=a",
            "'hidden=a' is none of heads=SHARE, query_heads=SHARE, ffn",
        ),
        ("--structured hidden=0.25 --importance output", "--importance changes nothing for hidden"),
        ("--structured hidden=0.25 --group 32", "--group changes nothing for --structured"),
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
