"""Structured pruning of one block: which groups of channels go, and what the linear that read them
makes of those that stay. Tensors in, tensors out; cuts.py and shrink.py know the model.
`rotation` is this for the residual stream (slicing.py), `experts` for a mixture (experts.py)."""

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
    "best",
    "bias_for",
    "importance",
    "output_error",
    "reconstruct",
    "select",
]
