"""Training stops at the first loss or gradient that is no number, before a step makes the weights
the same. The checkpoints that were written before are left as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from tersor.errors import TersorError


class StopAtNaN(TrainerCallback):
    """Looks at the gradients before every step of the optimizer. With fp16 it leaves that to the
    scaler, which skips steps with infinite gradients and goes on with a smaller scale."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16:
            return
        grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if not grads:
            return
        sharded = any(map(is_sharded, grads))
        if sharded:  # each process looks at its own parts, and all stop where one has to
            grads = [grad.to_local() if is_sharded(grad) else grad for grad in grads]
        norms = torch._foreach_norm(grads)
        total = torch.stack([norm.float().to(norms[0].device) for norm in norms]).sum()
        if sharded:
            torch.distributed.all_reduce(total)
        if not bool(total.isfinite()):
            raise TersorError(_message("gradient", total, state.global_step + 1, args.output_dir))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process has a part of it alone, as FSDP leaves it (a DTensor)."""
    return hasattr(tensor, "to_local")


def check_loss(loss: Tensor, done: int, folder: str) -> None:
    """TersorError for a loss that is not finite. done: steps before this one."""
    if not bool(loss.detach().isfinite()):
        raise TersorError(_message("loss", loss, done + 1, folder))


def check_rows(dataset: Any) -> None:
    """TersorError for a data set that is known to be empty."""
    if dataset is not None and hasattr(dataset, "__len__") and not len(dataset):
        raise TersorError(
            "the training data set is empty; look at how it was read and filtered, or whether the "
            "text is shorter than one row"
        )


def _message(what: str, value: Tensor, step: int, folder: str) -> str:
    number = float(value.detach())
    steps = [path.name.rpartition("-")[2] for path in Path(folder).glob("checkpoint-*")]
    last = max((int(each) for each in steps if each.isdigit()), default=None)
    kept = "no checkpoint was written before it"
    if last is not None:
        kept = f"checkpoint-{last} in {folder} is from before"
    return (
        f"the {what} is {number} in step {step}, and going on would make the weights so; {kept}; "
        "lower the learning rate, warm up longer, clip gradients (max_grad_norm), or look for a "
        "damaged row"
    )
