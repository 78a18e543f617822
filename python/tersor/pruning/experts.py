"""How much each expert of a mixture matters.

A mixture puts out y = Σ g_e(x) E_e(x) for a token x: the sum is over the experts e that the router
chooses, and g_e(x) is how much it takes of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.errors import TersorError

EXPERT_IMPORTANCES = ("output", "activation", "frequency", "magnitude")


class ExpertStats:
    """Sums over the tokens that chose an expert, of each expert.

    tokens: how many, int64. energy: Σ g² |E(x)|², float64. length: Σ g |E(x)|, float64.
    """

    def __init__(self, count: int) -> None:
        self.tokens = torch.zeros(count, dtype=torch.int64)
        self.energy = torch.zeros(count, dtype=torch.float64)
        self.length = torch.zeros(count, dtype=torch.float64)

    def update(self, number: int, y: Tensor, weights: Tensor) -> None:
        """y: E(x) of that expert, [tokens, hidden]; weights: g, [tokens]; in any dtype."""
        lengths = weights.double().abs() * y.float().square().sum(1, dtype=torch.float64).sqrt()
        self.tokens[number] += len(y)
        self.energy[number] += lengths.square().sum()
        self.length[number] += lengths.sum()

    def check(self, block: str) -> None:
        """TersorError where an expert put out NaN or infinity."""
        if not bool(self.energy.isfinite().all()):
            raise TersorError(
                f"an expert in {block} puts out NaN or Inf; the model overflows in its own dtype, "
                "so convert it to bfloat16 or float32, or check its weights"
            )


def expert_importance(
    kind: str, experts: Sequence[Sequence[Tensor]], stats: ExpertStats | None
) -> Tensor:
    """How much each expert matters, float64 [experts]; more is more.

    kind: "output", Σ g² |E(x)|²: the squared error of the block's output where the expert is left
            out and nothing takes its place (what arXiv:2402.14800 measures for a set of experts);
        "activation", the mean of g |E(x)| over the tokens that chose it (REAP, arXiv:2510.13999),
            which spares experts that few tokens choose but that do much for those;
        "frequency", how many tokens chose it;
        "magnitude", the squared norm of its weights. Needs no statistics.
    experts: the weights of each.
    """
    if kind == "magnitude":
        norms = [
            sum(float(w.float().square().sum(dtype=torch.float64)) for w in e) for e in experts
        ]
        return torch.tensor(norms, dtype=torch.float64)
    if stats is None or not int(stats.tokens.sum()):
        raise TersorError(f'importance "{kind}" needs statistics of the experts; calibrate')
    if kind == "output":
        return stats.energy
    if kind == "activation":
        return stats.length / stats.tokens.clamp(min=1)
    return stats.tokens.double()
