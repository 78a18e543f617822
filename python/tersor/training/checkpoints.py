"""A checkpoint in, a trained one out: distillation, quantization-aware training, masks that are
learned, and all of them together in one run.

The whole model is in memory, in float32, with its gradients and the state of the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from tersor.calibrate import Calibration, digest, load_tokenizer
from tersor.checkpoint import Checkpoint, check_finite
from tersor.errors import TersorError
from tersor.formats import quantization_config
from tersor.layerwise import machine
from tersor.linear import QuantLinear
from tersor.loading import load_any
from tersor.progress import Progress
from tersor.qweight import Scheme
from tersor.report import REPORT, TIMINGS, LayerReport, Report, Timings, versions
from tersor.runs import describe, identity, text_windows
from tersor.scope import Scope, check_inputs, settle
from tersor.shards import ShardWriter, refuse_existing
from tersor.source import Source
from tersor.sparsity import Sparsity
from tersor.surgery.smaller import is_pruned
from tersor.training.losses import Distillation
from tersor.training.plan import Plan, plan_settings
from tersor.training.qat import QuantizationTraining, check_scheme
from tersor.training.resuming import NoneAtTheEnd, discard_unfinished, last_checkpoint

# In what torch's archives and safetensors say where a file cannot be written.
_WRITING = ("inline_container", "StreamWriter", "os error")
_TOKENIZER = "tokenizer.json"
BEGUN, SAVED, TRAINED = "begun", "saved", "trained"  # commits


@dataclass(frozen=True, kw_only=True)
class QAT:
    """Quantization-aware training of a checkpoint, beside its scheme.

    scales: "learned" with the weights, or "fixed". start: "gptq" takes scales (and what it rounds
        to) from GPTQ on the calibration text, "rtn" from the weights alone.
    output: "codes" writes a quantized checkpoint; "weights" the trained weights in the dtype of the
        files, for a solver to quantize afterwards.
    """

    scheme: Scheme
    scales: str = "learned"
    start: str = "gptq"
    output: str = "codes"
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, known in (
            ("scales", ("learned", "fixed")),
            ("start", ("gptq", "rtn")),
            ("output", ("codes", "weights")),
        ):
            if getattr(self, name) not in known:
                raise TersorError(f"{name} is {' or '.join(known)}, not {getattr(self, name)!r}")
        check_scheme(self.scheme)


def train_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    plan: Plan | None = None,
    teacher: str | Path | None = None,
    distillation: Distillation | None = None,
    qat: QAT | None = None,
    sparsity: Sparsity | None = None,
    text: Sequence[str] = (),
    calibration: Calibration | None = None,
    strict: bool = False,
    progress: bool | None = None,
) -> Report:
    """Trains a Hugging Face checkpoint of a causal language model, and writes a checkpoint.

    model: a folder with config.json, safetensors and the tokenizer. Where 5 % or more of a linear's
        weights are zero, those zeros stay.
    out: the folder to make. While the run lasts its work is in `<out>.partial`: the same call goes
        on from the last checkpoint of the training, to the same bits.
    plan: how long and how fast.
    teacher: the folder of a model with the same vocabulary, quantized or not; None trains on the
        text alone. distillation: how it is learned from.
    qat: train with weights as they will be once quantized.
    sparsity: weights are masked little by little in the course of the training, by magnitude, and
        are zero in the end.
    text: files to train on, as in Calibration.sources; by default those of the calibration.
    calibration: beside text to train on, what GPTQ starts from. So much is trained on as the steps
        read, whatever its `samples`, which are what GPTQ sees.
    The rest is as in quantize_checkpoint.

    Raises TersorError for bad input, before any work where that can be known, and where the loss is
    no longer a number; what was trained until then is kept.
    """
    refuse_existing(out)
    plan = plan or Plan()
    if teacher is None and distillation is not None:
        raise TersorError("distillation needs a teacher; name the folder of a model")
    if not isinstance(calibration, Calibration):
        raise TersorError("training needs text; give a tersor.Calibration((FILE, ...))")
    source = Source.open(model)
    scope = settle(source.model, source.found, qat.ignore if qat else ())
    windows = _training_windows(source, calibration, text, plan)
    distillation = distillation or Distillation()
    first = text_windows(source, calibration) if qat and qat.start == "gptq" else None
    job = _Job(source, scope, windows, first, plan, teacher, distillation, qat, sparsity)
    _check(job)
    report = Report(
        model=source.checkpoint.folder.resolve().name,
        fingerprint=source.checkpoint.fingerprint(),
        architecture=source.found.how,
        settings=_settings(job),
        versions=versions(),
        calibration=describe(calibration, job.windows),
        kept=scope.kept if qat else {},
        departures=scope.departures if qat else {},
        bytes_before=source.nbytes,
    )
    if strict:
        report.require_strict()
    with ShardWriter(out, identity(report)) as writer, Progress(progress) as bar:
        if BEGUN not in writer.done:
            writer.commit(BEGUN, {"bytes": 0}, quick=True)
        run = _Run(job, writer, bar)
        config = source.checkpoint.config
        if TRAINED not in writer.done:
            run.train()
        done = writer.done[TRAINED]
        report.layers = [LayerReport.from_dict(layer) for layer in done["layers"]]
        report.training = done["training"]
        if (worse := _worse(report.training["log"])) is not None:
            report.departures["the training"] = worse
        if strict:
            report.require_strict()
        report.bytes_after = done["bytes"]
        if qat is not None and qat.output == "codes":
            stated = quantization_config(qat.scheme, scope.unquantized)
            config = config | {"quantization_config": stated}
        files = {REPORT: report.to_json(), TIMINGS: run.timings.to_json()}
        writer.finish(config, source.checkpoint.folder, files)
    return report


@dataclass(frozen=True)
class _Job:
    """What is asked for, settled. windows: int64 [count, seq_len], to train on; calibration: the
    same of the text that GPTQ starts from."""

    source: Source
    scope: Scope
    windows: Tensor
    calibration: Tensor | None
    plan: Plan
    teacher: str | Path | None
    distillation: Distillation
    qat: QAT | None
    sparsity: Sparsity | None


class _Run:
    """The training, and the writing of what came of it."""

    def __init__(self, job: _Job, writer: ShardWriter, bar: Progress) -> None:
        self.job, self.writer, self.bar = job, writer, bar
        self.timings = Timings()
        self.folder = writer.state_path("training")

    def train(self) -> None:
        job = self.job
        args = job.plan.arguments(self.folder)
        discard_unfinished(self.folder)
        self._require_space(args)
        teacher = None if job.teacher is None else _load_teacher(job.teacher)
        model = job.source.whole().float().requires_grad_(True)
        masks, fake = self._masks(model), self._fake(model)
        callbacks = [each for each in (masks, fake, _Steps(self.bar)) if each is not None]
        callbacks += [NoneAtTheEnd(), _Saves(self.writer, self._checkpoint)]
        trainer = self._trainer(model, teacher, args, callbacks)
        self.bar.expect(job.plan.steps)
        self.bar.say("training")
        with self.timings.stage("train"), self._checkpoints_written():
            trainer.train(resume_from_checkpoint=last_checkpoint(self.folder))
        with self.timings.stage("write"):
            self._write(model, _log(trainer.state.log_history))

    def _masks(self, model: nn.Module) -> Any:
        """Where zeros are kept, or made; None elsewhere."""
        from tersor.pruning.schedule import Schedule
        from tersor.training.masking import HoldZeros, MaskTraining

        steps, sparsity = self.job.plan.steps, self.job.sparsity
        if sparsity is not None:
            warmup, ramp = steps // 10, steps // 2
            schedule = Schedule(warmup, ramp, cooldown=steps - warmup - ramp)
            linears = self.job.scope.linears  # without those that qat is to ignore
            return MaskTraining(sparsity, schedule, "magnitude", include=linears).attach(model)
        linears = settle(model, self.job.source.found, ()).linears
        pruned = [name for name in linears if is_pruned(model.get_submodule(name).weight)]
        return HoldZeros(include=pruned).attach(model) if pruned else None

    def _fake(self, model: nn.Module) -> Any:
        """What rounds the weights; None elsewhere. A training that goes on has its start in its
        checkpoint."""
        job, qat = self.job, self.job.qat
        if qat is None:
            return None
        begins = last_checkpoint(self.folder) is None and qat.start == "gptq"
        if begins:
            self.bar.say("GPTQ, to start from")
        make = QuantizationTraining if qat.output == "codes" else _Weights
        training = make(
            qat.scheme,
            scales=qat.scales,
            start="gptq" if begins else None,
            scale_dtype=job.source.dtype,
            include=job.scope.linears,
        )
        return training.attach(model, job.calibration if begins else None)

    def _trainer(self, model: nn.Module, teacher: Any, args: Any, callbacks: list[Any]) -> Any:
        """A Trainer; where there is a teacher, one that distils."""
        from transformers import Trainer

        from tersor.training.finite import StopAtNaN
        from tersor.training.trainer import DistillTrainer

        job = self.job
        rows = [{"input_ids": ids, "labels": ids} for ids in job.windows]
        given: dict[str, Any] = {"args": args, "train_dataset": rows, "callbacks": callbacks}
        disable_progress_bar()  # of shards, which Trainer writes with every checkpoint
        if teacher is None:
            given["callbacks"] = [*callbacks, StopAtNaN()]
            trainer = Trainer(model, **given)
        else:
            trainer = DistillTrainer(model, teacher, job.distillation, **given)
        trainer.remove_callback(PrinterCallback)
        return trainer

    @property
    def _checkpoint(self) -> int:
        """Bytes on disk: the weights in float32 and beside each two numbers, as Adam has them; of a
        grid that is trained the same and a zero point, and a byte for each weight that a mask has.
        """
        model, qat = self.job.source.model, self.job.qat
        weights = sum(p.numel() for p in model.parameters())
        linears = [model.get_submodule(name).weight for name in self.job.scope.linears]
        group = None if qat is None else qat.scheme.weight.group
        grid = 0 if qat is None else sum(w.numel() // (group or w.shape[1]) for w in linears)
        masks = 0 if self.job.sparsity is None else sum(w.numel() for w in linears)
        return 12 * weights + 16 * grid + masks

    @contextmanager
    def _checkpoints_written(self) -> Iterator[None]:
        """What torch and safetensors raise where a file cannot be written, as an error that says
        so."""
        try:
            yield
        except (RuntimeError, SafetensorError) as error:
            if not any(word in str(error) for word in _WRITING):
                raise
            cause = str(error).splitlines()[0]
            raise TersorError(
                f"a checkpoint could not be written in {self.folder} ({cause}); make room on the "
                "disk, and run the same command again: it goes on after the last whole checkpoint"
            ) from error

    def _require_space(self, args: Any) -> None:
        """TersorError unless the disk has room for the result, and for the checkpoints that are
        there at a time, of which the Trainer writes one before it removes one."""
        written = (self.job.plan.steps - 1) // args.save_steps
        kept = min(written, args.save_total_limit)
        most = min(written, kept + 1) * self._checkpoint
        nbytes = max(most, kept * self._checkpoint + self.job.source.nbytes)
        there = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        self.writer.require_space(max(0, nbytes - there))

    def _write(self, model: nn.Module, log: list[Any]) -> None:
        source = self.job.source
        layers: list[LayerReport] = []
        used = {place.name for place in source.where.values()}
        for name in source.checkpoint.names:
            if name not in used:  # a table that no parameter is made of
                self.writer.add(name, source.checkpoint.load(name))
        nbytes = 0
        written: set[str] = set()
        for name, place in source.where.items():
            if place.saved_as in written:  # tied: the same parameter under another name
                continue
            written.add(place.saved_as)
            path, _, last = name.rpartition(".")
            module = model.get_submodule(path)
            if isinstance(module, QuantLinear) and last == "weight":
                stem = place.saved_as.removesuffix("weight")
                tensors = {
                    stem + local: tensor
                    for local, tensor in module.state_dict().items()
                    if local != "bias"
                }
                before = place.read(source.checkpoint).float()
                layers.append(_layer(name.removesuffix(".weight"), module, before, tensors))
            else:
                value = getattr(module, last).detach()
                check_finite(name, value, "train with a lower learning_rate")
                tensors = {place.saved_as: source.as_stored(name, value)}
            for key, tensor in tensors.items():
                self.writer.add(key, tensor)
                nbytes += tensor.nbytes
        training = {
            "steps": self.job.plan.steps,
            "tokens": self.job.plan.windows * self.job.windows.shape[1],
            "windows": len(self.job.windows),
            "log": log,
        }
        info = {"layers": [asdict(layer) for layer in layers], "bytes": nbytes}
        self.writer.commit(TRAINED, info | {"training": training})


class _Weights(QuantizationTraining):
    """Leaves the weights below the rounding."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish(quantize=False)


class _Steps(TrainerCallback):
    """Moves the bar."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.step()


class _Saves(TrainerCallback):
    """Commits that there is a checkpoint, so that other settings do not throw it away unasked; and
    begins none that the disk has no room for, of so many bytes."""

    def __init__(self, writer: ShardWriter, nbytes: int) -> None:
        self.writer, self.nbytes = writer, nbytes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self.writer.require_space(self.nbytes)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if SAVED not in self.writer.done:
            self.writer.commit(SAVED, {"bytes": 0})


def _layer(name: str, linear: QuantLinear, w: Tensor, tensors: Mapping[str, Tensor]) -> LayerReport:
    """error: of the weights, against w, those before the training."""
    q = linear.qweight().dequantize()
    return LayerReport(
        name=name,
        shape=(w.shape[0], w.shape[1]),
        scheme=str(linear.scheme),
        method="qat",
        error=float((q - w).double().square().sum() / w.double().square().sum()),
        sparsity=1 - int(q.count_nonzero()) / q.numel(),
        tokens=0,
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def _log(history: Iterable[Mapping[str, float]]) -> list[Any]:
    """What a Trainer logged, as [step, name -> value], without what depends on the clock."""
    told = ("loss", "grad_norm", "learning_rate", "distillation", "cross_entropy", "features")
    rows = []
    for entry in history:
        values = {name: float(entry[name]) for name in told if name in entry}
        if "loss" in values:
            rows.append([int(entry["step"]), values])
    return rows


def _worse(log: Sequence[Any]) -> str | None:
    """Whether the loss ended far above where it began, by the ends of the log."""
    losses = [values["loss"] for _, values in log]
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    if last <= 2 * first:
        return None
    return (
        f"its loss began at {first:.4g} and ended at {last:.4g}: it has made the model worse; "
        "lower the learning rate"
    )


def _settings(job: _Job) -> dict[str, Any]:
    settings: dict[str, Any] = plan_settings(job.plan)
    if job.teacher is not None:
        settings["teacher"] = Checkpoint.open(job.teacher).fingerprint()
        settings["distillation"] = job.distillation.settings()
    if job.qat is not None:
        settings["qat"] = asdict(job.qat)
        if job.calibration is not None:
            settings["start"] = digest(job.calibration)
    if job.sparsity is not None:
        settings["sparsity"] = str(job.sparsity)
    return settings | machine()


def _training_windows(
    source: Source, calibration: Calibration, text: Sequence[str], plan: Plan
) -> Tensor:
    """As many as the steps read, or as the text has, then every one more than once."""
    if isinstance(text, str):
        raise TersorError(f"text is a list of files; write [{text!r}]")
    given = replace(calibration, samples=plan.windows, seq_len=plan.seq_len or calibration.seq_len)
    if text:
        given = replace(given, sources=tuple(text), texts=())
    windows = text_windows(source, given, fewer=True)
    check_batch(windows, plan.batch)
    return windows


def check_batch(windows: Tensor, batch: int) -> None:
    """TersorError where a text gives too few windows [count, seq_len]."""
    if len(windows) < batch:
        raise TersorError(
            f"the text has {len(windows)} windows of {windows.shape[1]} tokens, fewer than the "
            f"{batch} of a batch; give more text, or a smaller batch or seq_len"
        )


def _check(job: _Job) -> None:
    model = job.source.model
    if type(model).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise TersorError(
            f"{type(model).__name__} does not predict the next token; training from folder to "
            "folder is for causal language models: use DistillTrainer for others"
        )
    scheme = job.qat.scheme if job.qat else None
    check_inputs(model, job.scope.linears, scheme.weight if scheme else None, job.sparsity)
    if job.teacher is not None:
        check_teacher(job.teacher, job.source)


def _load_teacher(folder: str | Path) -> nn.Module:
    teacher: nn.Module = load_any(folder)
    for name, parameter in teacher.named_parameters():
        check_finite(f"{name} of the teacher", parameter, f"repair {folder}, or take another")
    return teacher


def check_teacher(folder: str | Path, source: Source) -> None:
    """TersorError where a model to learn from, or to compare with, has another vocabulary."""
    config: dict[str, Any] = Checkpoint.open(folder).config
    theirs = (config.get("text_config") or config).get("vocab_size")
    ours = source.model.config.get_text_config().vocab_size
    if theirs != ours:
        raise TersorError(
            f"{folder} has a vocabulary of {theirs} tokens and the model one of {ours}; choose one "
            "with the model's tokenizer"
        )
    both = (Path(folder), source.checkpoint.folder)
    tokenizers = [load_tokenizer(each) for each in both if (each / _TOKENIZER).is_file()]
    if len(tokenizers) == 2 and tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise TersorError(
            f"{folder} has as many tokens as the model, but its tokenizer numbers them otherwise; "
            "choose a teacher with the model's tokenizer"
        )
