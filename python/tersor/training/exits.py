"""A model as its own teacher: heads after earlier blocks learn to predict what the last one does
(be your own teacher, Zhang et al., arXiv:1905.08094; LayerSkip, Elhoushi et al., arXiv:2404.16710).

    folder/
      config.json, model.safetensors ...   the model, an ordinary checkpoint
      exit_heads.safetensors               what the heads have beyond it

tersor.training.early_exit writes text with them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.models import find_arch
from tersor.tensorfile import TensorFile
from tersor.training import beside
from tersor.training.features import recording
from tersor.training.fused import IGNORED, Head, distill
from tersor.training.losses import Distillation
from tersor.training.own_loss import OwnLossTrainer
from tersor.training.reading import Reader

FILE = "exit_heads.safetensors"


class ExitHeads(nn.Module):
    """Heads after some blocks of a causal language model, which stays as it is.

    Each has a copy of what the model does to its last hidden states (the final norm) and the
    model's own output projection; or, with `own`, a copy of that too, which is then trained apart.

    blocks: after which, from 0; all before the last.
    Raises TersorError for blocks that there are not, and for a model of which it is not known what
    comes after its blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[int], own: bool = False) -> None:
        super().__init__()
        found = find_arch(model)
        paths = [path for path, _ in found.blocks(model)]
        numbers = list(blocks)
        last = len(paths) - 1
        if (
            not numbers
            or sorted(set(numbers)) != numbers
            or not 0 <= numbers[0] <= numbers[-1] < last
        ):
            raise TersorError(
                f"exits after the blocks {numbers}; name some from 0 to {last - 1} in ascending "
                "order, each once (after the last one the model's own head comes)"
            )
        head = getattr(model, "get_output_embeddings", lambda: None)()
        after = [path for path in found.arch.after if _at(model, found.prefix + path) is not None]
        if type(head) is not nn.Linear or not after or not found.arch.causal:
            raise TersorError(
                f"no heads can be made after the blocks of {type(model).__name__}: it must be a "
                "causal model of the architecture table whose output head is a plain linear"
            )
        self.model = [model]  # in a list, since it is no part of this module
        self.numbers, self.own = numbers, own
        self.paths = {number: paths[number] for number in numbers}
        self.norms, self.projections = nn.ModuleDict(), nn.ModuleDict()
        for number in numbers:
            parts = [copy.deepcopy(_at(model, found.prefix + path)) for path in after]
            self.norms[str(number)] = nn.Sequential(*parts)
            if own:
                self.projections[str(number)] = copy.deepcopy(head)
        self.requires_grad_()

    def head(self, number: int, hidden: Tensor) -> Head:
        """The predictions after block `number` of hidden states [tokens, features]."""
        (model,) = self.model
        projection: Any = model.get_output_embeddings()
        if self.own:
            projection = self.projections[str(number)]
        softcap = getattr(model.config, "final_logit_softcapping", None)
        normed = self.norms[str(number)](hidden)
        return Head(normed.to(projection.weight.dtype), projection.weight, projection.bias, softcap)

    def save(self, folder: str | Path) -> None:
        """Writes FILE into the folder, beside the model."""
        beside.save(Path(folder) / FILE, self.state_dict())

    def restore(self, folder: str | Path) -> None:
        """Reads FILE into these heads. TersorError where it is absent, or of other heads."""
        beside.load(Path(folder) / FILE, self.state_dict(), "exit heads")

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> ExitHeads:
        """The heads that were saved beside this model. TersorError where they do not fit it."""
        path = Path(folder) / FILE
        names = [name.split(".") for name in TensorFile.open(path).tensors]
        if not all(name[0] in ("norms", "projections") and name[1].isdigit() for name in names):
            raise TersorError(f"{path} holds no exit heads; write it with ExitHeads.save")
        own = any(name[0] == "projections" for name in names)
        heads = cls(model, sorted({int(name[1]) for name in names}), own)
        weight: Tensor = model.get_output_embeddings().weight
        heads.to(device=weight.device, dtype=weight.dtype).restore(folder)
        return heads


class ExitTrainer(OwnLossTrainer):
    """Trains a causal model and its exit heads, which learn from its last layer:

        full · cross-entropy of the model
        + Σ weight · (alpha · distillation from the last layer + (1 - alpha) · cross-entropy)

    over the exits. The last layer's predictions are a teacher without a gradient.

    weights: block -> weight of its exit; None: equal, adding up to 1.
    full: 0 trains the exits alone; with model.requires_grad_(False) the model then stays as it is,
        apart from dropout.
    given: as for transformers.Trainer, with labels in the batches. save_model and checkpoints write
        the heads beside the model. One process.

    Logs have, beside the loss, cross_entropy of the model and exit_N, the distillation of each.
    """

    def __init__(
        self,
        model: nn.Module,
        exits: ExitHeads,
        distillation: Distillation | None = None,
        weights: Mapping[int, float] | None = None,
        full: float = 1.0,
        **given: Any,
    ) -> None:
        if exits.model[0] is not model:
            raise TersorError("the exit heads are of another model; make them of this one")
        self.distillation = distillation or Distillation()
        self.weights = dict(weights or dict.fromkeys(exits.numbers, 1 / len(exits.numbers)))
        if self.weights.keys() != set(exits.numbers) or not all(
            weight >= 0 for weight in self.weights.values()
        ):
            raise TersorError(
                f"weights are {self.weights}; give one of at least 0 for each of the exits after "
                f"the blocks {exits.numbers}"
            )
        if not full >= 0:
            raise TersorError(f"full is {full!r}; give a weight of at least 0")
        self.full = full
        super().__init__(model, model, given)
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise TersorError("exit heads are trained by one process on one device; use one")
        self.exits = exits.to(self.args.device)
        beside.check_trained(self.optimizer, self.exits, "the exit heads")
        self._reader = Reader(model)
        self.add_callback(beside.Forget(exits))

    def _loss(
        self, model: nn.Module, inputs: Mapping[str, Any], count: Any
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        fed, labels = self._read(inputs)
        tokens = (labels != IGNORED).sum()
        divisor = tokens if count is None else count
        with recording(self._reader.model, self.exits.paths.values()) as hidden:
            last, outputs = self._reader.read(model, fed)
        if not isinstance(last, Head):
            raise TersorError(
                f"{type(model).__name__} does more to its logits than its head does, and exits "
                "would predict something else"
            )
        if self._whole_outputs:  # which have the logits of each row's last token alone
            rows = torch.arange(len(last.hidden), device=last.hidden.device)
            outputs["logits"] = last.logits(rows).unflatten(0, inputs["input_ids"].shape)
        teacher = last.detach()
        # The cheapest loss beside a cross-entropy that is wanted alone.
        own = distill(last, teacher, Distillation("logit_mse", alpha=0.0), labels, divisor)
        loss = self.full * own.loss
        told = {"cross_entropy": (own.cross_entropy * divisor, tokens)}
        for number, path in self.exits.paths.items():
            head = self.exits.head(number, hidden[path].flatten(0, 1))
            parts = distill(head, teacher, self.distillation, labels, divisor)
            loss = loss + self.weights[number] * parts.loss
            told[f"exit_{number}"] = (parts.distillation * divisor, tokens)
        return loss, outputs, told

    def create_optimizer(self, *given: Any, **named: Any) -> Any:
        made = self.optimizer is None
        optimizer = super().create_optimizer(*given, **named)
        if made:
            beside.add_to(optimizer, self.exits)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        self.exits.save(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.exits.restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        assert self.state.best_model_checkpoint is not None  # as the Trainer looked at
        self.exits.restore(self.state.best_model_checkpoint)


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
