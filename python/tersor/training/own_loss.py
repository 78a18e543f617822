"""What the trainers with a loss of their own have in common: which tokens count, what is logged
beside the loss, and that a loss that is no number ends the training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from tersor.errors import TersorError
from tersor.training.finite import StopAtNaN, check_loss, check_rows
from tersor.training.fused import IGNORED
from tersor.training.reading import predicts_next
from tersor.training.tally import Tally


class OwnLossTrainer(Trainer, ABC):
    """A Trainer of language models whose loss is what `_loss` of a subclass gives.

    model: that is trained. reads: a language model whose class says what a position predicts.
    given: as for transformers.Trainer. compute_loss_func and label smoothing are refused.
    """

    def __init__(self, model: nn.Module, reads: nn.Module, given: Mapping[str, Any]) -> None:
        smoothing = getattr(given.get("args"), "label_smoothing_factor", 0)
        if given.get("compute_loss_func") is not None or smoothing:
            raise TersorError(
                "compute_loss_func and label_smoothing_factor would replace the distillation loss; "
                "leave them out"
            )
        check_rows(given.get("train_dataset"))
        self._shifts = predicts_next(reads)
        super().__init__(model, **given)
        self.add_callback(StopAtNaN())
        self._whole_outputs = False  # whether outputs must have the logits of all tokens
        self._tally = Tally()

    @abstractmethod
    def _loss(
        self, model: nn.Module, inputs: Mapping[str, Any], count: Any
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        """The loss of a batch, the model's outputs, and what to log: see Tally.add.
        count: as in fused.distill."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        count = num_items_in_batch if self.model_accepts_loss_kwargs else None
        with self.accelerator.autocast():  # the heads and teachers too, not the model alone
            loss, outputs, told = self._loss(model, inputs, count)
        self._tally.add(model.training, **told)
        if model.training:
            check_loss(loss, self.state.global_step, self.args.output_dir)
        if count is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # whose gradients will be averaged
        return (loss, outputs) if return_outputs else loss

    def _read(self, inputs: Mapping[str, Any], *others: str) -> tuple[dict[str, Any], Tensor]:
        """What models are given of a batch, and what each position predicts; int64 [tokens].
        others: names in the batch that no model takes."""
        hidden = ("labels", "shift_labels", *others)
        fed = {name: value for name, value in inputs.items() if name not in hidden}
        if "shift_labels" in inputs:
            return fed, inputs["shift_labels"].flatten()
        if "labels" not in inputs:
            raise TersorError(
                "the batches have no labels, which say what tokens count; let the data collator "
                "make them, such as DataCollatorForLanguageModeling(tokenizer, mlm=False)"
            )
        labels: Tensor = inputs["labels"]
        if self._shifts:
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return fed, labels.flatten()

    def log(self, logs: dict[str, float], *given: Any, **named: Any) -> None:
        self._tally.into(logs, self.accelerator)
        super().log(logs, *given, **named)

    def evaluation_loop(self, *given: Any, **named: Any) -> Any:
        self._tally.forget_evaluation()  # of a prediction, which logs nothing
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
