"""What happens while a model is trained: distillation, where a student learns from a teacher's
predictions and from what its layers hold; pruning by masks (masking); training for the grid of a
quantized model (qat); and all of them from folder to folder (checkpoints).

The forms of distillation, each in a module of its own:

    trainer       a teacher in memory or a cache of it (offline); features, attention maps
    on_policy     the student's own text, scored by the teacher; a setting of the trainer
    sequences     a corpus that the teacher writes
    mixture       data in shares, which can follow the gap to the teacher
    exits         a model as its own teacher; early_exit writes text with its exit heads
    mutual        models that learn from each other
    progressive   chains of students, each the teacher of the next
    vocabulary    teachers with another tokenizer; crossing has the loss
"""

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
