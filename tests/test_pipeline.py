"""The pipeline from folder to folder: what it writes, that it can be interrupted anywhere, and what
it says about input that it cannot use."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from folders import tensors, weights
from reference import check_gptq_codes, damped, spread
from tersor.blocks import batches
from tersor.calibrate import Calibration, capture, load_tokenizer
from tersor.errors import TersorError
from tersor.loading import load
from tersor.pipeline import quantize_checkpoint
from tersor.qweight import ActSpec, QSpec, Scheme
from tersor.report import Report
from tersor.solvers import RTN

W4 = Scheme(QSpec(4, 32))
TEXT = Calibration(texts=(tiny.text(),), samples=40, seq_len=64)  # two batches: of 32 and 8 windows
SCHEMES = [
    W4,
    Scheme(QSpec(4, None, symmetric=False)),
    Scheme(QSpec(3, 32, symmetric=False)),
    Scheme(QSpec(2, 16)),
    Scheme(QSpec(8, 32)),
    Scheme(QSpec(8, None), ActSpec()),
    Scheme(QSpec(4, 32, symmetric=False), ActSpec()),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme", SCHEMES, ids=lambda s: f"{s}-{s.weight.group}-{s.weight.symmetric}"
)
def test_rounding_writes_what_the_solver_gives(llama: Path, out: Path, scheme: Scheme) -> None:
    report = quantize_checkpoint(llama, out, scheme=scheme, method="rtn")
    before, after, quantized = tensors(llama), tensors(out), weights(out)
    assert len(quantized) == len(report.layers) == 14
    for name, q in quantized.items():
        want = RTN()(before[f"{name}.weight"], None, scheme.weight)
        assert torch.equal(q.codes, want.codes)
        assert torch.equal(q.scales, want.scales)
        assert (q.zeros is None) == (want.zeros is None)
        assert q.zeros is None or torch.equal(q.zeros, want.zeros)
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in quantized:
            assert torch.equal(after.pop(name), tensor)
    assert {name.rpartition(".")[0] for name in after} == set(quantized)  # and nothing else


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequential", [False, True])
def test_gptq_is_the_published_form_block_by_block(
    tmp_path: Path, out: Path, sequential: bool, dtype: torch.dtype
) -> None:
    """Each linear again, in the whole model: its inputs are those that the quantized blocks before
    it give (and, if sequential, the linears before it), its codes those of the inverse form."""
    source = tiny.save(tmp_path / "m", dtype=dtype)
    scheme = Scheme(QSpec(4, 32, symmetric=False))
    quantize_checkpoint(source, out, scheme=scheme, calibration=TEXT, sequential=sequential)
    windows = TEXT.windows(load_tokenizer(source), tiny.CONTEXT)
    model = AutoModelForCausalLM.from_pretrained(source, torch_dtype="auto").eval()
    quantized = weights(out)
    taps = [
        [f"self_attn.{name}_proj" for name in "qkv"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]

    @torch.no_grad()
    def check(names: list[str]) -> None:
        linears = {name: model.get_submodule(name) for name in names}
        stats = capture(linears, (model(ids) for ids in batches(windows)))
        for name, linear in linears.items():
            q = quantized[name]
            group_of = torch.arange(q.k) // 32
            same = check_gptq_codes(
                q.codes,
                linear.weight.float(),
                damped(stats[name].gram, 0.01),
                spread(q.scales, group_of),
                spread(q.zeros, group_of),
                16,
            )
            assert same > 0.5  # of the rows: ties are rare
        for name, linear in linears.items():
            linear.weight.copy_(quantized[name].dequantize().to(dtype))

    for i in range(2):
        parts = [[f"model.layers.{i}.{name}" for name in tap] for tap in taps]
        for part in parts if sequential else [[*itertools.chain(*parts)]]:
            check(part)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_architecture_goes_through(kind: str, tmp_path: Path, out: Path) -> None:
    """At 8 bits the result computes nearly what the original does: each weight is in its place."""
    source = tiny.save(tmp_path / "m", kind)
    report = quantize_checkpoint(source, out, scheme=Scheme(QSpec(8, 32)), calibration=TEXT)
    assert not report.departures
    assert report.architecture.startswith("the table's")
    assert all(layer.tokens > 0 and layer.error < 1e-4 for layer in report.layers)
    original, quantized = tiny.model(kind), load(out)
    ids = torch.randint(2, tiny.VOCAB, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = original(ids).logits, quantized(ids).logits
    # The median over tokens: a router may send one of them elsewhere for the least difference.
    far = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert 0 < far.median() < 0.03
    if quantized.can_generate():
        assert quantized.generate(ids[:, :4], max_new_tokens=3, min_new_tokens=3).shape == (2, 7)


@pytest.mark.parametrize(
    ("kind", "moe", "gate", "up", "down"),
    [
        ("mixtral", "block_sparse_moe", "w1", "w3", "w2"),
        ("qwen2_moe", "mlp", "gate_proj", "up_proj", "down_proj"),
    ],
)
def test_experts_that_are_fused_in_the_files(
    tmp_path: Path, kind: str, moe: str, gate: str, up: str, down: str
) -> None:
    """The same weights as three tensors for each expert or as two for all: the same result, also
    where some experts stay as they are."""
    apart = tiny.save(tmp_path / "apart", kind)
    fused = tmp_path / "fused"
    shutil.copytree(apart, fused)
    stored = load_file(apart / "model.safetensors")
    for layer in range(2):
        experts = f"model.layers.{layer}.{moe}.experts"

        def expert(i: int, name: str, experts: str = experts) -> Tensor:
            return stored.pop(f"{experts}.{i}.{name}.weight")

        both = [torch.cat([expert(i, gate), expert(i, up)]) for i in range(4)]
        stored[f"{experts}.gate_up_proj"] = torch.stack(both)
        stored[f"{experts}.down_proj"] = torch.stack([expert(i, down) for i in range(4)])
    save_file(stored, fused / "model.safetensors", {"format": "pt"})
    for source in (apart, fused):
        quantize_checkpoint(
            source, tmp_path / f"{source.name}-out", scheme=W4, calibration=TEXT,
            ignore=[f"*.experts.2.{gate}", f"*.layers.1.*.{down}"],
        )  # fmt: skip
    one, two = tensors(tmp_path / "apart-out"), tensors(tmp_path / "fused-out")
    assert one.keys() == two.keys()
    assert f"model.layers.0.{moe}.experts.2.{gate}.weight" in one
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_tied_weights_stay_tied(tmp_path: Path, out: Path) -> None:
    source = tiny.save(tmp_path / "m", tie_word_embeddings=True)
    quantize_checkpoint(source, out, scheme=W4, method="rtn")
    assert "lm_head.weight" not in tensors(out)
    assert torch.equal(load(out).lm_head.weight, tensors(source)["model.embed_tokens.weight"])


def test_ignored_modules_stay_and_config_says_so(llama: Path, out: Path) -> None:
    ignore = ["*.down_proj", "model.layers.1.self_attn.*"]
    report = quantize_checkpoint(llama, out, scheme=W4, method="rtn", ignore=ignore)
    quantized = weights(out)
    assert len(quantized) == 14 - 2 - 4
    assert not any("down_proj" in name for name in quantized)
    assert report.kept["model.layers.0.mlp.down_proj"] == "ignored, *.down_proj"
    assert report.kept["lm_head"] == "outside the blocks, kept by rule"
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.1.self_attn.q_proj" in ignored
    assert "lm_head" in ignored
    load(out)


def test_report(llama: Path, out: Path) -> None:
    report = quantize_checkpoint(llama, out, scheme=W4, calibration=TEXT)
    assert Report.read(out) == report
    assert report.calibration is not None
    assert report.calibration["tokens"] == 40 * 64
    assert report.settings["bits"] == 4
    assert report.bytes_before == sum(t.nbytes for t in tensors(llama).values())
    after = tensors(out)
    assert report.bytes_after == sum(t.nbytes for t in after.values())
    for layer in report.layers:
        stored = sum(t.nbytes for name, t in after.items() if name.startswith(layer.name + "."))
        assert layer.bytes == stored
        # 4 bits, a float32 scale for 32 weights, and the shape: two int64
        assert layer.bits_per_weight == pytest.approx(
            4 + 32 / 32 + 128 / (layer.shape[0] * layer.shape[1])
        )
        assert 0 < layer.error < 0.02
        assert layer.tokens == 40 * 64
    timings = json.loads((out / "tersor_timings.json").read_text())
    assert timings["seconds"].keys() >= {"read", "observe", "solve", "run", "write"}
    assert timings["peak_resident_bytes"] > 1e8


def test_errors_without_text_are_those_of_the_weights(llama: Path, out: Path) -> None:
    report = quantize_checkpoint(llama, out, scheme=W4, method="rtn")
    layer = report.layers[3]
    w = tensors(llama)[f"{layer.name}.weight"].double()
    q = weights(out)[layer.name].dequantize().double()
    assert layer.error == pytest.approx(float((w - q).square().sum() / w.square().sum()))
    assert layer.tokens == 0


def test_progress_is_shown_when_asked(
    llama: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quantize_checkpoint(llama, out, scheme=W4, calibration=TEXT)
    assert "block" not in capfd.readouterr().err  # not a terminal: quiet
    quantize_checkpoint(llama, out.with_name("2"), scheme=W4, calibration=TEXT, progress=True)
    shown = capfd.readouterr().err
    # Two blocks of 7 linears; two batches through both to observe, and through the first again.
    assert "block 2 of 2" in shown
    assert "20/20" in shown


# --- what is not as it should be -----------------------------------------------------------------


def test_departures_are_reported_and_strict_makes_them_errors(tmp_path: Path, out: Path) -> None:
    source = tiny.save(tmp_path / "m", "mixtral", num_local_experts=16, num_experts_per_tok=1)
    few = Calibration(texts=(tiny.text(),), samples=1, seq_len=8)
    with pytest.raises(TersorError, match=r"were not treated as asked .*no calibration token"):
        quantize_checkpoint(source, out, scheme=W4, calibration=few, strict=True)
    assert not out.exists()
    report = quantize_checkpoint(source, out, scheme=W4, calibration=few)
    unseen = {layer.name: layer for layer in report.layers if layer.tokens == 0}
    assert unseen.keys() == report.departures.keys()
    assert 0 < len(unseen) < len(report.layers)
    for name, layer in unseen.items():
        assert layer.method == "rtn"
        assert "no calibration token reached it" in report.departures[name]
    seen = [layer for layer in report.layers if layer.tokens]
    assert any("only 8 tokens for 64 inputs" in layer.notes for layer in seen)


def test_a_linear_that_no_tap_names_is_a_departure(llama: Path, out: Path) -> None:
    """As in a model that is newer than its entry in the table."""
    from tersor.models import ARCHS

    taps = ARCHS["llama"].taps[:-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHS, "llama", replace(ARCHS["llama"], taps=taps))
        with pytest.raises(TersorError, match=r"2 modules were not .*no tap of llama names"):
            quantize_checkpoint(llama, out, scheme=W4, method="rtn", strict=True)
        assert not list(out.parent.iterdir())
        report = quantize_checkpoint(llama, out, scheme=W4, method="rtn")
    names = {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert report.departures.keys() == names
    assert not names & weights(out).keys()
    load(out)


def damaged(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(folder, to)
    stored = load_file(to / "model.safetensors")
    change(stored)
    save_file(stored, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize("name", ["foo", "model.layers.7.mlp.up_proj.weight"])
def test_tensors_that_the_model_has_no_place_for(
    llama: Path, tmp_path: Path, out: Path, name: str
) -> None:
    """They are refused as tersor.load would refuse what comes out; old tables are let through."""
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    old = damaged(llama, tmp_path / "old", lambda stored: stored.update(tables))
    bad = damaged(old, tmp_path / "bad", lambda stored: stored.update({name: torch.ones(4)}))
    with pytest.raises(TersorError, match=f"holds {name}, for which LlamaForCausalLM has no place"):
        quantize_checkpoint(bad, out, scheme=W4, calibration=TEXT)
    assert not out.with_name("out.partial").exists()
    quantize_checkpoint(old, out, scheme=W4, method="rtn")
    load(out)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_not_finite(
    llama: Path, tmp_path: Path, out: Path, name: str, bad: float
) -> None:
    def change(stored: dict[str, Tensor]) -> None:
        stored[name].view(-1)[3] = bad

    with pytest.raises(TersorError, match=f"{name}.* holds"):
        quantize_checkpoint(
            damaged(llama, tmp_path / "bad", change), out, scheme=W4, calibration=TEXT
        )
    assert not out.exists()


def test_activations_that_overflow(llama: Path, tmp_path: Path, out: Path) -> None:
    def change(stored: dict[str, Tensor]) -> None:
        stored["model.layers.0.mlp.up_proj.weight"].fill_(3e38)

    bad = damaged(llama, tmp_path / "bad", change)
    with pytest.raises(TersorError, match=r"model\.layers\.0\.mlp\.down_proj reads"):
        quantize_checkpoint(bad, out, scheme=W4, calibration=TEXT)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"scheme": Scheme(QSpec(4, 128))},
            "group 128 does not divide .* --group 32 or --group row",
        ),
        (
            {"scheme": Scheme(QSpec(4, 64))},
            r"mlp.down_proj with 96, .* --ignore '\*.down_proj'",
        ),
        ({"calibration": None}, "gptq needs text to calibrate on; give --calibration FILE"),
        ({"method": "awq"}, "method must be one of rtn, gptq, not 'awq'"),
        (
            {"ignore": ["*.dawn_proj"]},
            r"\*.dawn_proj matches no module .* called like model.l",
        ),
        ({"ignore": ["*"]}, "leaves nothing to compress"),
        ({"calibration": Calibration(texts=("",))}, "is empty"),
        ({"calibration": Calibration(texts=("ter so",))}, "has 4 tokens, and 128 windows of 64"),
        ({"calibration": Calibration(texts=("x",), seq_len=65)}, "beyond the model's 64 positions"),
    ],
)
def test_bad_arguments(llama: Path, out: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TersorError, match=message) as error:
        quantize_checkpoint(llama, out, **({"scheme": W4, "calibration": TEXT} | arguments))
    assert "\n" not in str(error.value)
    assert not list(out.parent.iterdir())  # refused before anything was written


def test_output_that_exists(llama: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(TersorError, match="exists already"):
        quantize_checkpoint(llama, out, scheme=W4, method="rtn")
    assert (out / "thesis.txt").read_text() == "precious"
    with pytest.raises(TersorError, match="exists already"):  # before anything else is looked at
        quantize_checkpoint(out / "no model", out, scheme=Scheme(QSpec(4, 128)), method="awq")


def test_a_small_model_is_one_file(llama: Path, out: Path) -> None:
    quantize_checkpoint(llama, out, scheme=W4, calibration=TEXT)
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]


def test_a_quantized_folder_is_not_quantized_again(llama: Path, out: Path) -> None:
    quantize_checkpoint(llama, out, scheme=W4, method="rtn")
    with pytest.raises(TersorError, match="quantized already; give the original model"):
        quantize_checkpoint(out, out.with_name("twice"), scheme=W4, method="rtn")


def with_config(folder: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_a_null_quantization_config_is_none(llama: Path, tmp_path: Path, out: Path) -> None:
    source = with_config(llama, tmp_path / "null", quantization_config=None)
    quantize_checkpoint(source, out, scheme=W4, method="rtn")
    load(out)
    with pytest.raises(TersorError, match="is not quantized, and no linear"):
        load(source)


def test_a_model_without_blocks(llama: Path, tmp_path: Path, out: Path) -> None:
    source = with_config(llama, tmp_path / "none", num_hidden_layers=0, layer_types=None)
    outside = {n: t for n, t in tensors(llama).items() if ".layers." not in n}
    save_file(outside, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(TersorError, match=r"no block in model\.layers, .*\(num_hidden_layers\)"):
        quantize_checkpoint(source, out, scheme=W4, method="rtn")


def test_gpt2_is_for_tersor_alone_and_the_report_says_so(tmp_path: Path, out: Path) -> None:
    """When transformers can load it, the remark and those in models/gpt2.py and README can go."""
    pytest.importorskip("compressed_tensors")
    report = quantize_checkpoint(
        tiny.save(tmp_path / "m", "gpt2"), out, scheme=W4, method="rtn", strict=True
    )
    assert "leaves its Conv1D layers random" in report.architecture
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert "transformer.h.0.mlp.c_fc.weight" in info["missing_keys"]


def test_tokenizer_of_another_model(llama: Path, tmp_path: Path, out: Path) -> None:
    other = tiny.save(tmp_path / "small", vocab_size=100)
    with pytest.raises(TersorError, match="but the model has 100 embeddings"):
        quantize_checkpoint(other, out, scheme=W4, calibration=TEXT)
    (other / "tokenizer.json").unlink()
    with pytest.raises(TersorError, match=r"the tokenizer in .* cannot be loaded"):
        quantize_checkpoint(other, out, scheme=W4, calibration=TEXT)


def test_more_blocks_than_tensors_are_refused_at_once(llama: Path, out: Path) -> None:
    folder = out.parent / "deep"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(TersorError, match="num_hidden_layers is 1000000000, but the files hold"):
        quantize_checkpoint(folder, out, scheme=W4, method="rtn")
