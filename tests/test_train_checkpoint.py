"""Training from folder to folder: what a Trainer does by hand, resumed, and for every kind of
checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback

import tiny
from folders import content

pytest.importorskip("accelerate")
from tersor import TersorError, cli
from tersor.calibrate import Calibration, load_tokenizer
from tersor.linear import QuantLinear
from tersor.loading import load_any
from tersor.pipeline import prune_checkpoint, quantize_checkpoint
from tersor.qweight import QSpec, Scheme
from tersor.report import Report
from tersor.solvers import RTN, Magnitude
from tersor.sparsity import Sparsity
from tersor.training import Distillation
from tersor.training import checkpoints as module
from tersor.training.checkpoints import QAT, train_checkpoint
from tersor.training.losses import SkewedKL, SkewedReverseKL
from tersor.training.plan import Plan
from tersor.training.trainer import DistillTrainer

TEXT = Calibration(texts=(tiny.text(),), samples=12, seq_len=24)
PLAN = Plan(steps=4, batch=2, accumulate=2, learning_rate=2e-3, checkpoint_every=2)
INT4 = Scheme(QSpec(4, 32))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("student") / "model", "llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("teacher") / "model", "llama")


def test_it_is_what_a_trainer_does(model: Path, teacher: Path, out: Path) -> None:
    report = train_checkpoint(
        model, out, plan=PLAN, teacher=teacher, calibration=TEXT,
        distillation=Distillation("reverse_kl", temperature=2.0, alpha=0.7),
    )  # fmt: skip
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    text = Calibration(texts=TEXT.texts, samples=PLAN.windows, seq_len=24)
    rows = [{"input_ids": ids, "labels": ids} for ids in text.windows(load_tokenizer(model), 64)]
    assert len(rows) == 16
    trainer = DistillTrainer(
        student,
        AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
        Distillation("reverse_kl", temperature=2.0, alpha=0.7),
        args=PLAN.arguments(out.parent / "by hand"),
        train_dataset=rows,
    )
    trainer.train()
    written, state = load_file(out / "model.safetensors"), student.state_dict()
    before = load_file(model / "model.safetensors")
    assert written.keys() == before.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, state[name]), name
    assert not torch.equal(
        written["model.embed_tokens.weight"], before["model.embed_tokens.weight"]
    )
    training = report.training or {}
    assert (training["steps"], training["tokens"]) == (4, 16 * 24)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert [values["loss"] for _, values in training["log"]] == losses
    assert report == Report.read(out)
    assert (out / "tokenizer.json").exists()


class Stop(BaseException):
    pass


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Stop


class Fill(TrainerCallback):
    """Whatever else writes on the disk."""

    def __init__(self, free: dict[str, int]) -> None:
        self.free = free

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.free["bytes"] = 0


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_run_that_is_stopped_goes_on(
    model: Path, teacher: Path, out: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """With masks and a grid that are learned, whose state is in the checkpoints too."""
    settings: dict[str, Any] = {
        "plan": PLAN,
        "teacher": teacher,
        "distillation": Distillation(alpha=1.0),
        "qat": QAT(scheme=INT4),
        "sparsity": Sparsity(pattern=(2, 4)),
        "calibration": TEXT,
    }
    train_checkpoint(model, out.with_name("whole"), **settings)
    steps = module._Steps
    monkeypatch.setattr(module, "_Steps", lambda bar: StopAfter(step))
    with pytest.raises(Stop):
        train_checkpoint(model, out, **settings)
    monkeypatch.setattr(module, "_Steps", steps)
    report = train_checkpoint(model, out, **settings)
    assert content(out) == content(out.with_name("whole"))
    assert all(layer.sparsity >= 0.5 for layer in report.layers)
    assert not out.with_name("out.partial").exists()


def test_a_run_that_is_stopped_at_its_end_goes_on(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer windows than the steps read, where a Trainer would go on with one more step."""
    text = Calibration(texts=(tiny.text()[:700],), samples=5, seq_len=24)
    plan = Plan(steps=5, batch=2, learning_rate=1e-3, schedule="constant_with_warmup",
                checkpoint_every=1)  # fmt: skip
    train_checkpoint(model, out.with_name("whole"), plan=plan, calibration=text)
    write = module._Run._write
    monkeypatch.setattr(module._Run, "_write", lambda *given: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        train_checkpoint(model, out, plan=plan, calibration=text)
    monkeypatch.setattr(module._Run, "_write", write)
    train_checkpoint(model, out, plan=plan, calibration=text)
    assert content(out) == content(out.with_name("whole"))


def test_other_settings_do_not_throw_a_training_away(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = module._Steps
    monkeypatch.setattr(module, "_Steps", lambda bar: StopAfter(3))
    with pytest.raises(Stop):
        train_checkpoint(model, out, plan=PLAN, calibration=TEXT)
    monkeypatch.setattr(module, "_Steps", steps)
    other = replace(PLAN, learning_rate=1e-3)
    with pytest.raises(TersorError, match=r"learning_rate was 0\.002 and is 0\.001"):
        train_checkpoint(model, out, plan=other, calibration=TEXT)
    damaged = out.with_name("out.partial") / "state" / "training" / "checkpoint-2"
    (damaged / "trainer_state.json").write_text("")  # as a machine that goes down leaves it
    train_checkpoint(model, out, plan=PLAN, calibration=TEXT)
    train_checkpoint(model, out.with_name("whole"), plan=PLAN, calibration=TEXT)
    assert content(out) == content(out.with_name("whole"))


def test_logs_are_of_the_same_steps_after_a_resume(tmp_path: Path) -> None:
    args = Plan(steps=350, checkpoint_every=100).arguments(tmp_path)
    assert args.logging_steps == 3 and args.save_steps == 102


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "qwen3", "gemma2", "opt"])
def test_every_kind_of_checkpoint(kind: str, tmp_path: Path) -> None:
    """Fused, transposed and tied weights come back in the form that they had."""
    folder = tiny.save(tmp_path / "model", kind)
    plan = Plan(steps=1, batch=2, learning_rate=1e-3, warmup=0.0)
    train_checkpoint(folder, tmp_path / "out", plan=plan, calibration=TEXT)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    ids = TEXT.windows(load_tokenizer(folder))[:1]
    assert {n: (t.shape, t.dtype) for n, t in before.items()}.items() <= {
        n: (t.shape, t.dtype) for n, t in after.items()
    }.items() or kind == "mixtral"
    changed = [name for name in before if name in after and not after[name].equal(before[name])]
    assert len(changed) > len(before) / 2
    assert load_any(tmp_path / "out")(ids).logits.isfinite().all()


def test_zeros_stay(model: Path, teacher: Path, tmp_path: Path) -> None:
    prune_checkpoint(model, tmp_path / "pruned", method=Magnitude(Sparsity(pattern=(2, 4))))
    train_checkpoint(tmp_path / "pruned", tmp_path / "out", plan=PLAN, calibration=TEXT)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("pruned", "out"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(before[name] == 0, after[name] == 0)
    assert not torch.equal(before[name], after[name])


def test_ignored_linears_keep_what_they_have(model: Path, out: Path, tmp_path: Path) -> None:
    """Their zeros too; and none are made in them."""
    name = "model.layers.0.mlp.down_proj.weight"
    qat = QAT(scheme=INT4, start="rtn", ignore=("*.down_proj",))
    train_checkpoint(model, out, plan=PLAN, qat=qat, sparsity=Sparsity(0.5), calibration=TEXT)
    assert load_file(out / "model.safetensors")[name].count_nonzero() > 0.9 * 64 * 96
    prune_checkpoint(model, tmp_path / "pruned", method=Magnitude(Sparsity(pattern=(2, 4))))
    train_checkpoint(tmp_path / "pruned", tmp_path / "q", plan=PLAN, qat=qat, calibration=TEXT)
    before, after = (load_file(tmp_path / f / "model.safetensors")[name] for f in ("pruned", "q"))
    assert torch.equal(before == 0, after == 0) and not torch.equal(before, after)


def test_zeros_are_made(model: Path, out: Path) -> None:
    train_checkpoint(model, out, plan=PLAN, sparsity=Sparsity(0.5), calibration=TEXT)
    w = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert int((w == 0).sum()) == w.numel() // 2


@pytest.mark.parametrize("start", ["gptq", "rtn"])
def test_codes(model: Path, teacher: Path, out: Path, start: str) -> None:
    qat = QAT(scheme=INT4, start=start, ignore=("*.down_proj",))
    report = train_checkpoint(model, out, plan=PLAN, teacher=teacher, qat=qat, calibration=TEXT)
    trained = load_any(out)
    layer = trained.model.layers[0]
    assert isinstance(layer.mlp.up_proj, QuantLinear)
    assert layer.mlp.up_proj.spec == QSpec(4, 32)
    assert type(layer.mlp.down_proj) is torch.nn.Linear
    assert len(report.layers) == 6 and {each.method for each in report.layers} == {"qat"}
    assert report.bits_per_weight == pytest.approx(4 + 32 / 32, abs=0.2)
    stored = sum(t.nbytes for t in load_file(out / "model.safetensors").values())
    assert stored == report.bytes_after < report.bytes_before
    w = load_file(model / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].double()
    error = (layer.mlp.up_proj.qweight().dequantize().double() - w).square().sum()
    found = next(each for each in report.layers if each.name.endswith("up_proj"))
    assert found.error == pytest.approx(float(error / w.square().sum()), rel=1e-6)


def test_weights_for_a_solver(model: Path, out: Path) -> None:
    qat = QAT(scheme=INT4, output="weights")
    report = train_checkpoint(model, out, plan=PLAN, qat=qat, calibration=TEXT)
    assert not report.layers
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    quantized = out.with_name("int4")
    assert quantize_checkpoint(out, quantized, scheme=INT4, method=RTN()).layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": None}, "training needs text"),
        ({"calibration": Calibration(texts=("",))}, "is empty"),
        ({"calibration": Calibration(texts=("ter so ra",), seq_len=24)}, "use --samples 1|tokens"),
        ({"plan": Plan(batch=4000)}, "fewer than the 4000 of a batch"),
        ({"plan": Plan(seq_len=65)}, "beyond the model's 64 positions"),
        ({"plan": Plan(optimizer="magic")}, "transformers has no optimizer 'magic'"),
        ({"text": "text.txt"}, r"text is a list of files; write \['text.txt'\]"),
        ({"text": ["gone.txt"]}, "gone.txt"),
        ({"teacher": None, "distillation": Distillation()}, "distillation needs a teacher"),
        ({"teacher": "nowhere"}, "nowhere"),
        ({"qat": QAT(scheme=Scheme(QSpec(4, 128)))}, "group 128 does not divide"),
        ({"qat": QAT(scheme=INT4, ignore=("*.nothing",))}, "matches no module"),
        ({"sparsity": Sparsity(pattern=(2, 128))}, "the pattern 2:128 does not divide"),
    ],
)
def test_bad_input(
    model: Path, teacher: Path, out: Path, change: dict[str, Any], message: str
) -> None:
    settings = {"plan": PLAN, "teacher": teacher, "calibration": TEXT} | change
    with pytest.raises(TersorError, match=message):
        train_checkpoint(model, out, **settings)
    assert not out.exists()


def test_other_kinds_of_models(model: Path, out: Path, tmp_path: Path) -> None:
    encoder = tiny.save(tmp_path / "bert", "bert")
    with pytest.raises(TersorError, match="does not predict the next token"):
        train_checkpoint(encoder, out, plan=PLAN, calibration=TEXT)
    other = tiny.save(tmp_path / "other", "llama", vocab_size=320)
    with pytest.raises(TersorError, match="has a vocabulary of 320 tokens and the model"):
        train_checkpoint(model, out, plan=PLAN, teacher=other, calibration=TEXT)
    quantize_checkpoint(model, tmp_path / "int4", scheme=INT4, method="rtn")
    with pytest.raises(TersorError, match="quantized already"):
        train_checkpoint(tmp_path / "int4", out, plan=PLAN, calibration=TEXT)
    train_checkpoint(model, out, plan=PLAN, teacher=tmp_path / "int4", calibration=TEXT)


@pytest.mark.parametrize("taught", [True, False])
def test_no_number_stops(
    model: Path, teacher: Path, out: Path, monkeypatch: pytest.MonkeyPatch, taught: bool
) -> None:
    """And what was trained until then is kept."""

    class Break(TrainerCallback):
        def __init__(self, bar: object) -> None:
            pass

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                next(kwargs["model"].parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(module, "_Steps", Break)
    whose = {"teacher": teacher} if taught else {}
    with pytest.raises(TersorError, match=r"is nan in step 4.*checkpoint-2 in"):
        train_checkpoint(model, out, plan=PLAN, calibration=TEXT, **whose)
    kept = out.with_name("out.partial") / "state" / "training" / "checkpoint-2"
    assert (kept / "model.safetensors").exists() and not out.exists()


def test_commands(
    model: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(tiny.text())
    common = ["--calibration", str(tmp_path / "text.txt"), "--seq-len", "24"]
    common += ["--steps", "3", "--batch", "2", "--teacher", str(teacher)]
    options = ["--loss", "skewed_kl", "--temperature", "2", "--alpha", "0.5", "--pattern", "2:4"]
    code = cli.main(["distill", str(model), "--out", str(tmp_path / "d"), *common, *options])
    assert code == 0
    assert "3 steps on 144 tokens, loss" in " ".join(capsys.readouterr().out.split())
    settings = json.loads((tmp_path / "d" / "tersor_report.json").read_text())["settings"]
    assert settings["distillation"]["loss"] == "skewed_kl"
    assert (settings["steps"], settings["sparsity"]) == (3, "2:4")
    grid = ["--bits", "3", "--group", "32", "--scales", "fixed", "--start", "rtn"]
    code = cli.main(["qat", str(tmp_path / "d"), "--out", str(tmp_path / "q"), *common, *grid])
    assert code == 0
    assert "bits per quantized weight, 3 steps" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["distill", str(model), "--out", str(tmp_path / "x"), *common[-6:]]) == 2
    assert "training needs text; give --calibration FILE" in capsys.readouterr().err
    assert cli.main(["qat", str(model), "--out", str(tmp_path / "x"), "--alpha", "1"]) == 2
    assert "--alpha is of what a teacher predicts; add --teacher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("distill --samples 8", "--samples changes nothing for distill: training reads as many"),
        ("qat --start rtn --samples 8", "--samples changes nothing for --start rtn"),
        ("distill --loss cosine --temperature 2", "changes nothing in Cosine"),
        ("distill --loss logit_mse --temperature 0.5", "changes nothing in LogitMSE"),
    ],
)
def test_options_without_effect(
    model: Path, teacher: Path, out: Path, capsys: pytest.CaptureFixture[str], options: str,
    message: str,
) -> None:  # fmt: skip
    (out.parent / "text.txt").write_text(tiny.text())
    name, *rest = options.split()
    files = ["--out", str(out), "--teacher", str(teacher)]
    files += ["--calibration", str(out.parent / "text.txt"), "--steps", "1"]
    assert cli.main([name, str(model), *files, *rest]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_samples_are_what_gptq_starts_from(model: Path, tmp_path: Path) -> None:
    """And not what is trained on."""
    written = []
    for samples in (2, 12):
        text = replace(TEXT, samples=samples)
        out = tmp_path / str(samples)
        train_checkpoint(model, out, plan=PLAN, qat=QAT(scheme=INT4), calibration=text)
        train_checkpoint(model, tmp_path / f"plain{samples}", plan=PLAN, calibration=text)
        written.append(load_file(out / "model.safetensors"))
    name = "model.layers.0.mlp.up_proj.weight_scale"
    assert not torch.equal(written[0][name], written[1][name])
    assert content(tmp_path / "plain2") == content(tmp_path / "plain12")


def test_losses_of_ones_own_are_told_apart(
    model: Path, teacher: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those whose settings are the same, in the report and by a run that goes on."""
    steps = module._Steps
    monkeypatch.setattr(module, "_Steps", lambda bar: StopAfter(3))
    given: dict[str, Any] = {"plan": PLAN, "teacher": teacher, "calibration": TEXT}
    with pytest.raises(Stop):
        train_checkpoint(model, out, distillation=Distillation(SkewedKL(0.2)), **given)
    monkeypatch.setattr(module, "_Steps", steps)
    with pytest.raises(TersorError, match="distillation was"):
        train_checkpoint(model, out, distillation=Distillation(SkewedReverseKL(0.2)), **given)
    report = train_checkpoint(model, out, distillation=Distillation(SkewedKL(0.2)), **given)
    assert report.settings["distillation"]["loss"] == "SkewedKL(skew=0.2)"


def test_no_room_on_the_disk(
    model: Path, teacher: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before the first step: three checkpoints at a time, each with Adam's two numbers beside
    every weight. What an interrupted run has there is not asked for again."""
    weights = sum(t.numel() for t in load_file(model / "model.safetensors").values())
    need = 3 * 12 * weights
    free = {"bytes": need - 1}

    def usage(folder: Any) -> Any:
        return SimpleNamespace(free=free["bytes"])

    monkeypatch.setattr(shutil, "disk_usage", usage)
    plan = replace(PLAN, steps=12)
    given: dict[str, Any] = {"teacher": teacher, "calibration": TEXT}
    told = rf"needs {need / 1e6:,.1f} MB and .* MB are free; free some space"
    with pytest.raises(TersorError, match=told):
        train_checkpoint(model, out, plan=plan, **given)
    assert not list(out.with_name("out.partial").rglob("checkpoint-*"))
    free["bytes"] += 1
    monkeypatch.setattr(module, "_Steps", lambda bar: StopAfter(9))
    with pytest.raises(Stop):
        train_checkpoint(model, out, plan=plan, **given)
    monkeypatch.setattr(module, "_Steps", lambda bar: StopAfter(10))
    free["bytes"] = need // 2  # beside two checkpoints
    with pytest.raises(Stop):
        train_checkpoint(model, out, plan=plan, **given)
    monkeypatch.setattr(module, "_Steps", lambda bar: Fill(free))
    with pytest.raises(TersorError, match=rf"needs {need / 3e6:,.1f} MB and 0.0 MB are free"):
        train_checkpoint(model, out, plan=plan, **given)
    assert not list(out.with_name("out.partial").rglob("checkpoint-10"))
    monkeypatch.setattr(module, "_Steps", lambda bar: StopAfter(99))
    free["bytes"] = 5 * weights  # for the result alone
    few = replace(PLAN, checkpoint_every=4)
    train_checkpoint(model, out.with_name("few"), plan=few, **given)


def test_a_training_that_makes_the_model_worse_is_no_success(
    model: Path, out: Path, tmp_path: Path
) -> None:
    fast = replace(PLAN, steps=12, learning_rate=3.0, warmup=0.0)
    report = train_checkpoint(model, out, plan=fast, calibration=TEXT)
    assert "it has made the model worse" in report.departures["the training"]
    with pytest.raises(TersorError, match="it has made the model worse"):
        train_checkpoint(model, tmp_path / "strict", plan=fast, calibration=TEXT, strict=True)


def test_teachers_that_teach_nothing(model: Path, out: Path, tmp_path: Path) -> None:
    tiny.save(tmp_path / "broken", "llama")
    state = load_file(tmp_path / "broken" / "model.safetensors")
    state["model.norm.weight"][3] = float("nan")
    save_file(state, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    with pytest.raises(TersorError, match=r"of the teacher.*take another"):
        train_checkpoint(model, out, plan=PLAN, teacher=tmp_path / "broken", calibration=TEXT)
    tiny.save(tmp_path / "other", "llama")
    path = tmp_path / "other" / "tokenizer.json"
    held = json.loads(path.read_text())
    words = held["model"]["vocab"]
    first, second = list(words)[10], list(words)[11]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(held))
    with pytest.raises(TersorError, match="its tokenizer numbers them otherwise"):
        train_checkpoint(model, out, plan=PLAN, teacher=tmp_path / "other", calibration=TEXT)


def test_a_checkpoint_that_cannot_be_written(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is half written is removed by the next run, which goes on."""
    whole = torch.save

    def full(given: Any, where: Any, *more: Any, **named: Any) -> None:
        if "checkpoint-4" not in str(where):
            return whole(given, where, *more, **named)
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 0 vs 1")

    plan = replace(PLAN, steps=6)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TersorError, match=r"could not be written .*the same command again"):
        train_checkpoint(model, out, plan=plan, calibration=TEXT)
    monkeypatch.undo()
    training = next(out.with_name("out.partial").rglob("checkpoint-4")).parent
    assert not (training / "checkpoint-4" / "trainer_state.json").exists()
    (training / "checkpoint-9").mkdir()
    train_checkpoint(model, out, plan=plan, calibration=TEXT)
    train_checkpoint(model, out.with_name("again"), plan=plan, calibration=TEXT)
    assert content(out) == content(out.with_name("again"))
