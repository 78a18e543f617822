"""A model whose linears can become any of their candidates, and how far from the original it then
is: measured, on text that nothing was calibrated on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.activations import rounded
from tersor.errors import TersorError
from tersor.evaluate import CHUNK
from tersor.qweight import ActSpec
from tersor.search.costs import ORIGINAL
from tersor.search.solutions import Solutions
from tersor.search.space import Candidate, Choice, Unit

BATCH_TOKENS = 2048  # windows are run together up to this many tokens


class Evaluations:
    """The KL of every choice that was measured, in memory and, a line for each, in a file: a run
    that was killed goes on with them. Without a path in memory alone."""

    def __init__(self, path: Path | None = None) -> None:
        self.known: dict[Choice, float] = {}
        self._path = path
        if path is None or not path.exists():
            return
        whole, _, _ = path.read_bytes().rpartition(b"\n")  # a last line may be torn
        for line in whole.splitlines():
            content = json.loads(line)
            kl = math.inf if content["kl"] is None else content["kl"]
            self.known[tuple(content["choice"])] = kl
        if whole != path.read_bytes()[:-1]:
            path.write_bytes(whole + b"\n" if whole else b"")

    def add(self, choice: Choice, kl: float) -> None:
        self.known[choice] = kl
        if self._path is not None:
            line = {"choice": list(choice), "kl": kl if math.isfinite(kl) else None}
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())


class Problem:
    """The model is in memory, causal, with the original weights in it; `restored` gives them back.

    units, candidates: what a choice numbers. solutions: by path of a linear. windows: of held-out
    text, int64 [count, length].
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        candidates: Sequence[Candidate],
        solutions: Mapping[str, Solutions],
        windows: Tensor,
        evaluations: Evaluations,
    ) -> None:
        self.model, self.units, self.candidates = model, units, candidates
        self.solutions, self.evaluations = solutions, evaluations
        self._batches = windows.split(max(1, BATCH_TOKENS // windows.shape[1]))
        self._linears = {name: model.get_submodule(name) for unit in units for name in unit.linears}
        self._before = {name: linear.weight.data for name, linear in self._linears.items()}
        self._now: Choice = (ORIGINAL,) * len(units)
        self._hooks: dict[str, Any] = {}
        self._reference: list[Tensor] = []

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Whatever happens, the model has its original weights afterwards."""
        try:
            yield
        finally:
            self.assemble((ORIGINAL,) * len(self.units))

    def kl(self, choice: Sequence[int]) -> float:
        """KL(original ‖ model), nats per predicted token; measured once for each choice."""
        choice = tuple(
            ORIGINAL if each == ORIGINAL or self.candidates[each].untouched else int(each)
            for each in choice
        )
        if choice not in self.evaluations.known:
            self.evaluations.add(choice, self._measure(choice))
        return self.evaluations.known[choice]

    def assemble(self, choice: Sequence[int]) -> None:
        """Puts the values of the chosen candidates into the linears that differ."""
        for unit, number, now in zip(self.units, choice, self._now, strict=True):
            if number != now:
                for name in unit.linears:
                    self._set(name, number)
        self._now = tuple(choice)

    def _set(self, name: str, number: int) -> None:
        linear, before = self._linears[name], self._before[name]
        weight = None
        if number != ORIGINAL:
            weight = self.solutions[name].weight(number, before.dtype)
        linear.weight.data = before if weight is None else weight
        if name in self._hooks:
            self._hooks.pop(name).remove()
        scheme = None if number == ORIGINAL else self.candidates[number].scheme
        if scheme is not None and scheme.activation is not None:
            self._hooks[name] = linear.register_forward_pre_hook(_rounding(scheme.activation))

    def _measure(self, choice: Choice) -> float:
        self.remember()
        self.assemble(choice)
        return self.compare(self.model)

    @torch.no_grad()
    def remember(self) -> None:
        """Runs the original, to compare with. Called by whatever needs it, and by who wants to
        compare when the model is gone."""
        if not self._reference:
            self.assemble((ORIGINAL,) * len(self.units))
            self._reference = [_logits(self.model, ids) for ids in self._batches]

    @torch.no_grad()
    def compare(self, model: nn.Module) -> float:
        """KL(original ‖ model) of any model of the same vocabulary, once the original was run."""
        total, tokens = 0.0, 0
        for ids, reference in zip(self._batches, self._reference, strict=True):
            total += divergence(reference, _logits(model, ids))
            tokens += reference.shape[0]
        return total / tokens if math.isfinite(total) else math.inf


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Of every token that is predicted: [tokens, vocabulary]."""
    logits: Tensor = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return logits


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Σ KL(reference ‖ logits) over tokens, in float64. Both [tokens, vocabulary]."""
    if reference.shape != logits.shape:
        raise TersorError(
            f"the model gives logits {tuple(logits.shape)} where the original gave "
            f"{tuple(reference.shape)}; run the search again"
        )
    rows, total = max(1, CHUNK // reference.shape[1]), 0.0
    for old, new in zip(reference.split(rows), logits.split(rows), strict=True):
        log_p, log_q = old.double().log_softmax(-1), new.double().log_softmax(-1)
        # 0 · (−∞ − −∞) is not a number, and where the original says never, nothing is lost.
        total += float(torch.where(log_p.isneginf(), 0, log_p.exp() * (log_p - log_q)).sum())
    return total


def _rounding(activation: ActSpec) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return rounded(args[0], activation).to(args[0].dtype), *args[1:]

    return hook
