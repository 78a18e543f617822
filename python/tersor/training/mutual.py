"""Models that learn from each other while all of them learn (deep mutual learning, Zhang et al.,
arXiv:1706.00384): none has to be trained first."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.training.fused import IGNORED, distill
from tersor.training.losses import Distillation
from tersor.training.own_loss import OwnLossTrainer
from tersor.training.reading import Reader, vocabulary_of

_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # by version


class MutualTrainer(OwnLossTrainer):
    """Trains several language models in the same steps, each on

        alpha · mean of its distillations from the others + (1 - alpha) · cross-entropy

        MutualTrainer({"small": a, "large": b}, Distillation(alpha=0.5), args=args, ...)

    models: name -> a causal or masked language model; all of one vocabulary, of any sizes. The
        loss is the sum of theirs, and no gradient of one's loss reaches another. One optimizer
        trains all at one learning rate.
    given: as for transformers.Trainer, with labels in the batches. One process.

    save_model writes each model to a folder of its name, an ordinary checkpoint. Logs have, by
    name, what each loss is made of: small_distillation, small_cross_entropy and so on.

    Raises TersorError for fewer than two models, one that is there twice, vocabularies that differ,
    and as DistillTrainer does.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        distillation: Distillation | None = None,
        **given: Any,
    ) -> None:
        _check(models)
        self.distillation = distillation or Distillation()
        super().__init__(_Peers(models), next(iter(models.values())), given)
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise TersorError("models that learn from each other need one process; use one")
        if any(getattr(self.args, name, False) for name in _CHECKPOINTING):
            raise TersorError(
                "gradient_checkpointing is of one model; leave it out and enable it on each model, "
                "with gradient_checkpointing_enable()"
            )
        self.models = dict(models)
        self._readers = {name: Reader(model) for name, model in models.items()}

    def _loss(
        self, model: nn.Module, inputs: Mapping[str, Any], count: Any
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        fed, labels = self._read(inputs)
        tokens = (labels != IGNORED).sum()
        made = {
            name: reader.read(self.models[name], fed, self._whole_outputs)
            for name, reader in self._readers.items()
        }
        told: dict[str, Any] = {}
        losses = []
        for name, (ours, _) in made.items():
            others = [logits for other, (logits, _) in made.items() if other != name]
            parts = [distill(ours, other.detach(), self.distillation, labels) for other in others]
            losses.append(torch.stack([part.loss for part in parts]).mean())
            distillation = torch.stack([part.distillation for part in parts]).mean()
            told[f"{name}_distillation"] = (distillation * tokens, tokens)
            told[f"{name}_cross_entropy"] = (parts[0].cross_entropy * tokens, tokens)
        loss = torch.stack(losses).sum()
        if count is not None:
            loss = loss * (tokens / count)
        outputs = {"loss": loss} | {name: each.logits for name, (_, each) in made.items()}
        return loss, outputs, told

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        for name, model in self.models.items():
            model.save_pretrained(folder / name)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder / name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        for name, model in self.models.items():
            folder = Path(resume_from_checkpoint, name)
            if not folder.is_dir():
                raise TersorError(
                    f"{resume_from_checkpoint} has no model {name!r}; go on with the models, and "
                    "the names, that it was begun with"
                )
            saved = type(model).from_pretrained(folder)
            theirs, ours = saved.state_dict(), model.state_dict()
            if {n: t.shape for n, t in theirs.items()} != {n: t.shape for n, t in ours.items()}:
                raise TersorError(f"{folder} is of another model; use that which it was begun with")
            model.load_state_dict(theirs)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None  # as the Trainer looked at
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class _Peers(nn.Module):
    """What the Trainer sees as one model: its weights are optimized, its mode is set."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models.values())
        # By which a Trainer counts the tokens of a batch.
        self.loss_type = getattr(self.models[0], "loss_type", None)
        # And by which it chooses the columns of a data set: those that all models take.
        takes = [inspect.signature(model.forward) for model in models.values()]
        common = set.intersection(*(set(each.parameters) for each in takes))
        kept = [value for name, value in takes[0].parameters.items() if name in common]

        def forward(**given: Any) -> Any:
            return [model(**given) for model in self.models]

        forward.__signature__ = takes[0].replace(parameters=kept)  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **given: Any) -> Any:
        raise AssertionError("each instance has its own")


def _check(models: Mapping[str, nn.Module]) -> None:
    if not isinstance(models, Mapping) or len(models) < 2:
        raise TersorError("give at least two models by name, such as {'small': a, 'large': b}")
    if len({id(model) for model in models.values()}) < len(models):
        raise TersorError("two of the models are one object; give a copy, copy.deepcopy(model)")
    bad = [name for name in models if not name.isidentifier()]
    if bad:
        raise TersorError(f"{bad[0]!r} cannot name a folder and its logs; use letters and digits")
    sizes = {name: vocabulary_of(model) for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise TersorError(f"the vocabularies differ ({told}); choose models of one tokenizer")
