"""Pruning: groups of channels that are cut out of a block, and what the linear that read them makes
of those that stay; masks on single weights or groups, learned while a model is trained.
`rotation` is the former for the residual stream, `experts` for a mixture. Tensors and linears in,
tensors out; tersor.surgery and tersor.training know the model.
"""

from tersor.pruning.criteria import (
    CRITERIA,
    Criterion,
    Gradient,
    Magnitude,
    Movement,
    SoftMovement,
    Taylor,
    find_criterion,
)
from tersor.pruning.schedule import Schedule
from tersor.pruning.structured import (
    BY_STATISTICS,
    best,
    bias_for,
    importance,
    output_error,
    reconstruct,
    select,
)

__all__ = [
    "BY_STATISTICS",
    "CRITERIA",
    "Criterion",
    "Gradient",
    "Magnitude",
    "Movement",
    "Schedule",
    "SoftMovement",
    "Taylor",
    "best",
    "bias_for",
    "find_criterion",
    "importance",
    "output_error",
    "reconstruct",
    "select",
]
