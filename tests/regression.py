"""Two small linears with a loss: what masks are tried on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tersor.training.masking import MaskTraining

K, N = 16, 12


class Regression(nn.Module):
    """Two linears; its output has a loss, as that of a model of transformers has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(K, N), nn.Linear(N, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Regression:
        self.loss = (self.second(torch.tanh(self.first(x))) - labels).square().mean()
        return self


def batch(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(32, K, generator=draw)
    return {"x": x, "labels": x[:, :8].sin() * 2}


def train(
    model: nn.Module,
    masks: MaskTraining,
    steps: int,
    each: Callable[[int], None] = lambda step: None,
    lr: float = 1e-2,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.1)
    for step in range(steps):
        each(step)
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.step()


def top(scores: Tensor, zeros: int) -> Tensor:
    """A mask without the lowest scores, by sorting."""
    keep = torch.ones(scores.numel(), dtype=torch.bool)
    keep[scores.flatten().double().argsort()[:zeros]] = False
    return keep.view(scores.shape)
