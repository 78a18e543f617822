"""A transformers.Trainer whose student learns from a teacher.

Everything that is not the loss is the Trainer's: data, optimizer, schedule, precision, processes,
checkpoints, logs, evaluation.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.training import beside
from tersor.training.crossing import distill_across, narrowed
from tersor.training.features import FeatureLoss, Features
from tersor.training.fused import IGNORED, Logits, distill
from tersor.training.losses import Distillation, find_loss
from tersor.training.offline import TeacherCache
from tersor.training.on_policy import OWN_TEXT, OnPolicy, check_on_policy
from tersor.training.own_loss import OwnLossTrainer
from tersor.training.reading import Reader, vocabulary_of
from tersor.training.sparse_targets import check_kept, distill_sparse
from tersor.training.vocabulary import VocabularyMap

_logger = logging.getLogger(__name__)
_PROJECTIONS = "feature_projections.safetensors"


class DistillTrainer(OwnLossTrainer):
    """Trains `model` on alpha · distillation + (1 - alpha) · cross-entropy + features.

        trainer = DistillTrainer(student, teacher, Distillation("reverse_kl"), args=args,
                                 train_dataset=data)
        trainer.train(resume_from_checkpoint=True)

    model: a causal or masked language model of transformers, or one with adapters of peft on it
        (tersor.add_lora), which alone are then trained.
    teacher: another one with the same vocabulary, quantized or not, which is put on the student's
        device (whole, also where the student is sharded by FSDP) and into evaluation mode; or a
        TeacherCache of the very windows in the batches, those of evaluation included.
    features: what layers are compared; needs a teacher that runs.
    on_policy: which batches the student writes itself; needs a teacher that runs.
    vocabulary: of a teacher with another tokenizer; see align_vocabularies. It reads the text as
        its own tokens, and learnt are the positions at which both predict the same token. Logs
        have `outside`, its mean probability of tokens that the student lacks. Where vocabularies
        differ by padding alone, the tokenizer as processing_class is enough.
    given: as for transformers.Trainer. Batches hold `labels`, with -100 where a token does not
        count. compute_loss_func and label smoothing are refused: the loss is this class's own.

    Logs have, beside the loss, what it is made of: distillation, cross_entropy and features, means
    over the tokens since the last log (the cross-entropy over those that the student has not
    written itself); eval_... in evaluation. Losses are divided by the tokens of all accumulated
    batches, so neither accumulation nor the number of processes changes anything; but features are
    a mean over each batch, which then counts by its tokens. What a mixture of experts adds to its
    own loss to balance its routers is left out.

    Projections of features are trained with the student at its learning rate, kept in checkpoints
    beside it, and not part of the model that is saved.

    Raises TersorError, before training, where vocabularies differ, the cache does not fit the
    settings, the data set is empty, or the engine cannot do it; and in training for a loss or a
    gradient that is not finite, before it reaches the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | TeacherCache,
        distillation: Distillation | None = None,
        features: Features | None = None,
        on_policy: OnPolicy | None = None,
        vocabulary: VocabularyMap | None = None,
        **given: Any,
    ) -> None:
        self.distillation = distillation or Distillation()
        tokenizer = given.get("processing_class")
        self._size = _check_models(model, teacher, self.distillation, tokenizer, vocabulary)
        _check_features(teacher, features, vocabulary)
        student = _without_adapters(model)
        super().__init__(model, student, given)
        if self.args.n_gpu > 1:
            raise TersorError(
                "one process cannot distil on several GPUs; start one for each with torchrun, or "
                "show one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        self.teacher = teacher
        engine = str(getattr(self.accelerator.distributed_type, "value", ""))
        loaded_so = getattr(self, "is_distributed_loading_by_transformers", False)
        sharded = loaded_so or engine not in ("NO", "MULTI_GPU", "MULTI_CPU")
        self._student = Reader(student, sharded)
        self._on_policy, self._vocabulary = on_policy, vocabulary
        if on_policy is not None:
            check_on_policy(model, teacher, sharded, on_policy, vocabulary is None)
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
            assert self._features is not None
            beside.check_trained(self.optimizer, self._features, "the projections of features")
            self.add_callback(beside.Forget(self._features))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, *given: Any
    ) -> Any:
        """The batches of a step, those that the student writes written."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if self._on_policy is not None:
            student, when = self._student.model, (self.args.seed, self.state.global_step)
            others = self.args.process_index, None if self._vocabulary else self.teacher
            with self.accelerator.autocast():
                batches = [
                    self._on_policy.written(student, batch, (*when, place), *others)
                    for place, batch in enumerate(batches)
                ]
        return super().get_batch_samples(iter(batches), num_batches, *given)

    def _loss(
        self, model: nn.Module, inputs: Mapping[str, Any], count: Any
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        fed, labels = self._read(inputs, OWN_TEXT)
        own = OWN_TEXT in inputs
        settings = replace(self.distillation, alpha=1.0) if own else self.distillation
        tokens = (labels != IGNORED).sum()
        divisor = tokens if count is None else count
        recorded = self._features.recorded if self._features is not None else _nothing
        with recorded(self._student.model, 0) as ours:
            student, outputs = self._student.read(model, fed, self._whole_outputs)
        if self._vocabulary is not None:
            loss, told = self._across(student, fed, settings, labels, divisor)
        else:
            if isinstance(self.teacher, TeacherCache):
                targets = self.teacher.targets(fed["input_ids"])
                parts = distill_sparse(student, targets, settings, labels, divisor)
            else:
                with recorded(self.teacher, 1) as theirs, torch.no_grad():
                    teacher, _ = self._teacher.read(self.teacher, fed)
                if self._size is not None:
                    student, teacher = (narrowed(x, self._size) for x in (student, teacher))
                parts = distill(student, teacher, settings, labels, divisor)
            loss, told = parts.loss, {"distillation": (parts.distillation * divisor, tokens)}
            told["cross_entropy"] = parts.cross_entropy * divisor, tokens
        if own:
            told["cross_entropy"] = torch.zeros_like(loss), 0
        if self._features is not None:
            mask = fed.get("attention_mask")
            real = torch.ones_like(fed["input_ids"]) if mask is None else mask
            extra = self._features(ours, theirs, real.bool()) * (tokens / divisor)
            loss = loss + extra
            told["features"] = (extra * divisor, tokens)
        return loss, outputs, told

    def _across(
        self, student: Logits, fed: dict[str, Any], settings: Distillation, labels: Tensor, of: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of a batch whose text the teacher reads as its own tokens, and what to log."""
        assert self._vocabulary is not None and isinstance(self.teacher, nn.Module)
        teacher = self.teacher

        def read(inputs: dict[str, Tensor]) -> Logits:
            return self._teacher.read(teacher, inputs)[0]

        found = distill_across(student, read, self._vocabulary, fed, settings, labels, of)
        return found.loss, {
            "distillation": (found.distillation * found.used, found.used),
            "cross_entropy": (found.cross_entropy * of, (labels != IGNORED).sum()),
            "outside": (found.outside * found.used, found.used),
        }

    def create_optimizer(self, *given: Any, **named: Any) -> Any:
        made = self.optimizer is None
        optimizer = super().create_optimizer(*given, **named)
        if made and self._features is not None:
            beside.add_to(optimizer, self._features)
        return optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any, *given: Any, **named: Any) -> None:
        if self._projections() and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            beside.save(folder / _PROJECTIONS, self._projections())
        super()._save_checkpoint(model, trial, *given, **named)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._projections():
            path = Path(resume_from_checkpoint, _PROJECTIONS)
            beside.load(path, self._projections(), "features")

    def _projections(self) -> dict[str, Tensor]:
        return {} if self._features is None else dict(self._features.named_parameters())


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
    tokenizer: Any,
    vocabulary: VocabularyMap | None,
) -> slice | None:
    """What part of both vocabularies is used, where one is padded beyond the tokenizer."""
    if getattr(getattr(student, "config", None), "is_encoder_decoder", False):
        raise TersorError(
            f"{type(student).__name__} has an encoder and a decoder; DistillTrainer is for causal "
            "and masked language models"
        )
    if teacher is student:
        raise TersorError("teacher and student are one object; give a copy, copy.deepcopy(model)")
    ours = vocabulary_of(student)
    if isinstance(teacher, TeacherCache):
        check_kept(find_loss(settings.loss), settings.temperature, teacher.keep)
        theirs: int = teacher.vocabulary
    else:
        theirs = vocabulary_of(teacher)
        if vocabulary is not None:
            vocabulary.check(ours, theirs)
            _logger.warning("the teacher has another tokenizer: %s", vocabulary.describe())
            return None
        if ours != theirs and tokenizer is not None and len(tokenizer) <= min(ours, theirs):
            size = min(ours, theirs)
            _logger.warning(
                "the student's vocabulary has %d tokens and the teacher's %d, and the tokenizer "
                "%d: the first %d are compared, the padding behind them is left out",
                *(ours, theirs, len(tokenizer), size),
            )
            return slice(size)
    if ours != theirs:
        raise TersorError(
            f"the student's vocabulary has {ours} tokens and the teacher's {theirs}; choose a "
            "teacher with the student's tokenizer; give that as processing_class where one "
            "vocabulary is padded; or give a vocabulary, made by align_vocabularies"
        )
    return None


def _check_features(
    teacher: nn.Module | TeacherCache, features: Features | None, vocabulary: VocabularyMap | None
) -> None:
    if isinstance(teacher, TeacherCache):
        if features is not None:
            raise TersorError("a cache holds no features; give the teacher itself, or no features")
        if vocabulary is not None:
            raise TersorError("a cache is of the student's own tokens; give the teacher itself")
    if features is not None and vocabulary is not None:
        raise TersorError(
            "features are compared token by token, and the tokenizers cut the text differently; "
            "leave features out"
        )
