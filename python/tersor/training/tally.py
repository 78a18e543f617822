"""What a trainer's own loss is made of, as means over the tokens since the last log."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Tally:
    """Sums and numbers of tokens by name, those of training and of evaluation apart."""

    def __init__(self) -> None:
        self._sums: dict[bool, dict[str, Tensor]] = {}

    def add(self, training: bool, **parts: tuple[Tensor, Tensor | int]) -> None:
        """parts: name -> (sum over tokens, number of tokens); in every batch the same names."""
        sums = self._sums.setdefault(training, {})
        for name, (total, count) in parts.items():
            total = total.detach().float()
            row = torch.stack([total, torch.as_tensor(count, device=total.device).to(total)])
            sums[name] = row if name not in sums else sums[name] + row

    def forget_evaluation(self) -> None:
        self._sums.pop(False, None)

    def into(self, logs: dict[str, float], accelerator: Any) -> None:
        """Adds the means of all processes to what a Trainer is about to log, and begins anew.
        Names of which no token was counted are left out."""
        prefix = next((key[:-4] for key in logs if key == "loss" or key.endswith("_loss")), None)
        if prefix is None or "train_loss" in logs:
            return
        sums = self._sums.pop(prefix == "", None)
        if not sums:
            return
        rows = accelerator.reduce(torch.stack(list(sums.values())), "sum").tolist()
        for name, (total, count) in zip(sums, rows, strict=True):
            if count:
                logs[prefix + name] = total / count
