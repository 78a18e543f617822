"""A transformers.Trainer whose student learns from a teacher.

Everything that is not the loss is the Trainer's: data, optimizer, schedule, precision, processes,
checkpoints, logs, evaluation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tersor.durable import durable
from tersor.errors import TersorError
from tersor.tensorfile import TensorFile, write_tensors
from tersor.training.features import FeatureLoss, Features
from tersor.training.fused import IGNORED, Parts, distill
from tersor.training.losses import Distillation, find_loss
from tersor.training.offline import TeacherCache
from tersor.training.reading import Reader
from tersor.training.sparse_targets import check_kept, distill_sparse

_PROJECTIONS = "feature_projections.safetensors"
_LOGGED = ("distillation", "cross_entropy", "features")


class DistillTrainer(Trainer):
    """Trains `model` on alpha · distillation + (1 - alpha) · cross-entropy + features.

        trainer = DistillTrainer(student, teacher, Distillation("reverse_kl"), args=args,
                                 train_dataset=data)
        trainer.train(resume_from_checkpoint=True)

    model: a causal or masked language model of transformers, or one with adapters of peft on it
        (tersor.add_lora), which alone are then trained.
    teacher: another one with the same vocabulary, quantized or not, which is put on the student's
        device and into evaluation mode; or a TeacherCache of the very windows in the batches, those
        of evaluation included.
    features: what layers are compared; needs a teacher that runs.
    given: as for transformers.Trainer. Batches hold `labels`, with -100 where a token does not
        count. compute_loss_func and label smoothing are refused: the loss is this class's own.

    Logs have, beside the loss, what it is made of: distillation, cross_entropy and features, means
    over the tokens since the last log; eval_... in evaluation. Losses are divided by the tokens of
    all accumulated batches, so accumulation changes nothing. What a mixture of experts adds to its
    own loss to balance its routers is left out.

    Projections of features are trained with the student at its learning rate, kept in checkpoints
    beside it, and not part of the model that is saved.

    Raises TersorError, before training, where vocabularies differ, the cache does not fit the
    settings, or the engine cannot do it.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | TeacherCache,
        distillation: Distillation | None = None,
        features: Features | None = None,
        **given: Any,
    ) -> None:
        self.distillation = distillation or Distillation()
        _check_models(model, teacher, self.distillation, features)
        super().__init__(model, **given)
        if self.compute_loss_func is not None or self.label_smoother is not None:
            raise TersorError(
                "compute_loss_func and label_smoothing_factor would replace the distillation loss; "
                "leave them out"
            )
        if self.args.n_gpu > 1:
            raise TersorError(
                "one process cannot distil on several GPUs; start one for each with torchrun, or "
                "show one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        self.teacher = teacher
        engine = str(getattr(self.accelerator.distributed_type, "value", ""))
        sharded = engine not in ("NO", "MULTI_GPU", "MULTI_CPU")
        student = _without_adapters(model)
        self._student = Reader(student, sharded)
        self._causal = type(student).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        self._whole_outputs = False
        self._features: FeatureLoss | None = None
        if isinstance(teacher, nn.Module):
            teacher.to(self.args.device)
            teacher.eval()
            self._teacher = Reader(teacher)
            if features is not None:
                self._features = FeatureLoss(student, teacher, features).to(self.args.device)
        if self._projections():
            if self.args.world_size > 1:
                raise TersorError(
                    "features of different widths need projections, which one process trains; use "
                    "one, or compare values alone, whose relations need none"
                )
            self.add_callback(_Forget(self._features))
        self._sums: dict[bool, Tensor] = {}  # in training or not -> totals of _LOGGED, and tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        count = num_items_in_batch if self.model_accepts_loss_kwargs else None
        with self.accelerator.autocast():  # the heads and the teacher too, not the model alone
            loss, outputs = self._loss(model, inputs, count)
        if count is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # whose gradients will be averaged
        return (loss, outputs) if return_outputs else loss

    def _loss(self, model: nn.Module, inputs: Mapping[str, Any], count: Any) -> tuple[Tensor, Any]:
        """The loss of a batch, and the student's outputs. count: as in fused.distill."""
        labels = self._labels(inputs)
        fed = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels")}
        tokens = (labels != IGNORED).sum()
        divisor = tokens if count is None else count
        recorded = self._features.recorded if self._features is not None else _nothing
        with recorded(self._student.model, 0) as ours:
            student, outputs = self._student.read(model, fed, self._whole_outputs)
        if isinstance(self.teacher, TeacherCache):
            targets = self.teacher.targets(fed["input_ids"])
            parts = distill_sparse(student, targets, self.distillation, labels, divisor)
        else:
            with recorded(self.teacher, 1) as theirs, torch.no_grad():
                teacher, _ = self._teacher.read(self.teacher, fed)
            parts = distill(student, teacher, self.distillation, labels, divisor)
        loss, extra = parts.loss, torch.zeros_like(parts.distillation)
        if self._features is not None:
            mask = fed.get("attention_mask")
            real = torch.ones_like(fed["input_ids"]) if mask is None else mask
            extra = self._features(ours, theirs, real.bool()) * (tokens / divisor)
            loss = loss + extra
        self._add(model.training, parts, extra.detach(), tokens, divisor)
        return loss, outputs

    def _labels(self, inputs: Mapping[str, Any]) -> Tensor:
        """What each position predicts; int64 [tokens of the batch]."""
        if "shift_labels" in inputs:
            return inputs["shift_labels"].flatten()
        if "labels" not in inputs:
            raise TersorError(
                "the batches have no labels, which say what tokens count; let the data collator "
                "make them, such as DataCollatorForLanguageModeling(tokenizer, mlm=False)"
            )
        labels = inputs["labels"]
        if self._causal:
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return labels.flatten()

    def _add(
        self, training: bool, parts: Parts, features: Tensor, tokens: Tensor, divisor: Any
    ) -> None:
        means = torch.stack([parts.distillation, parts.cross_entropy, features])
        row = torch.cat([means.float() * divisor, tokens.float().unsqueeze(0)]).detach()
        before = self._sums.get(training)
        self._sums[training] = row if before is None else before + row

    def log(self, logs: dict[str, float], *given: Any, **named: Any) -> None:
        prefix = next((key[:-4] for key in logs if key == "loss" or key.endswith("_loss")), None)
        if prefix is not None and "train_loss" not in logs:
            sums = self._sums.pop(prefix == "", None)
            if sums is not None:
                *totals, tokens = self.accelerator.reduce(sums, "sum").tolist()
                for name, total in zip(_LOGGED, totals, strict=True):
                    if name != "features" or self._features is not None:
                        logs[prefix + name] = total / tokens
        super().log(logs, *given, **named)

    def evaluation_loop(self, *given: Any, **named: Any) -> Any:
        self._sums.pop(False, None)  # of a prediction, which logs nothing
        return super().evaluation_loop(*given, **named)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        self._whole_outputs = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._whole_outputs = False

    def create_optimizer(self, *given: Any, **named: Any) -> Any:
        made = self.optimizer is None
        optimizer = super().create_optimizer(*given, **named)
        if made and self._projections():
            parameters = list(self._projections().values())
            optimizer.add_param_group({"params": parameters, "weight_decay": 0.0})
        return optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any, *given: Any, **named: Any) -> None:
        if self._projections() and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            with durable(folder / _PROJECTIONS) as file:
                write_tensors(file, self._projections())
        super()._save_checkpoint(model, trial, *given, **named)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        ours = self._projections()
        if not ours:
            return
        path = Path(resume_from_checkpoint, _PROJECTIONS)
        if not os.path.isfile(path):
            raise TersorError(f"{path} is missing; go on from a checkpoint with these features")
        file = TensorFile.open(path)
        if {n: m.shape for n, m in file.tensors.items()} != {n: p.shape for n, p in ours.items()}:
            raise TersorError(f"{path} is of other features; use those that it was begun with")
        with torch.no_grad():
            for name, parameter in ours.items():
                parameter.copy_(file.read(file.tensors[name]))

    def _projections(self) -> dict[str, Tensor]:
        return {} if self._features is None else dict(self._features.named_parameters())


class _Forget(TrainerCallback):
    """After a step the Trainer forgets the gradients of the student alone."""

    def __init__(self, features: nn.Module | None) -> None:
        self.features = features

    def on_step_end(self, *given: Any, **named: Any) -> None:
        if self.features is not None:
            self.features.zero_grad()


def _without_adapters(model: nn.Module) -> nn.Module:
    """The model of transformers in a PeftModel, whose class says how its outputs are read; or the
    model itself. Modules are the same, so that hooks on one see what the other computes."""
    inner: nn.Module = model.get_base_model() if hasattr(model, "peft_type") else model
    return inner


def _nothing(model: nn.Module, side: int) -> Any:
    return nullcontext({})


def _check_models(
    student: nn.Module,
    teacher: nn.Module | TeacherCache,
    settings: Distillation,
    features: Features | None,
) -> None:
    if getattr(getattr(student, "config", None), "is_encoder_decoder", False):
        raise TersorError(
            f"{type(student).__name__} has an encoder and a decoder; DistillTrainer is for causal "
            "and masked language models"
        )
    if teacher is student:
        raise TersorError("teacher and student are one object; give a copy, copy.deepcopy(model)")
    ours = _vocabulary(student)
    if isinstance(teacher, TeacherCache):
        if features is not None:
            raise TersorError("a cache holds no features; give the teacher itself, or no features")
        check_kept(find_loss(settings.loss), settings.temperature, teacher.keep)
        theirs: int = teacher.vocabulary
    else:
        theirs = _vocabulary(teacher)
    if ours != theirs:
        raise TersorError(
            f"the student's vocabulary has {ours} tokens and the teacher's {theirs}; choose a "
            "teacher with the student's tokenizer, or resize_token_embeddings where one is padded"
        )


def _vocabulary(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    found = getattr(config, "vocab_size", None)
    if found is None:
        raise TersorError(f"{type(model).__name__} is no language model with one vocabulary")
    return int(found)
