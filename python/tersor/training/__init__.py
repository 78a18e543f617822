"""Distillation: a student learns from a teacher's predictions, and from what its layers hold."""

from tersor.training.fused import Head, Parts, distill
from tersor.training.losses import LOSSES, Distillation, token_losses

__all__ = ["LOSSES", "Distillation", "Head", "Parts", "distill", "token_losses"]
