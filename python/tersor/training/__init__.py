"""What happens while a model is trained: distillation, where a student learns from a teacher's
predictions and from what its layers hold; pruning by masks (masking); and training for the grid of
a quantized model (qat)."""

from tersor.training.features import FeatureLoss, Features
from tersor.training.fused import Head, Parts, distill
from tersor.training.losses import LOSSES, Distillation, token_losses
from tersor.training.offline import TeacherCache, cache_teacher
from tersor.training.sparse_targets import (
    Keep,
    SparseTargets,
    distill_sparse,
    sparse_losses,
    sparse_targets,
)

__all__ = [
    "LOSSES",
    "Distillation",
    "FeatureLoss",
    "Features",
    "Head",
    "Keep",
    "Parts",
    "SparseTargets",
    "TeacherCache",
    "cache_teacher",
    "distill",
    "distill_sparse",
    "sparse_losses",
    "sparse_targets",
    "token_losses",
]
