"""What token pruning tells of its work."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class TokenReport:
    """What has been pruned so far.

    prompts: inputs (batches) that were pruned. passed: those that were not, being shorter than
        min_tokens.
    counts: of the last pruned input, layer -> tokens of a row before and after it.
    kept: of the last pruned input, layer -> slots that were left after it, int64 [batch, tokens],
        ascending; slots count every place of the input, padding too, from 0.
    """

    prompts: int = 0
    passed: int = 0
    counts: dict[int, tuple[int, int]] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        cuts = (f"layer {layer}: {a} -> {b} tokens" for layer, (a, b) in self.counts.items())
        return "; ".join(cuts) or "no tokens pruned"
