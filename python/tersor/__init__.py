"""Compress language models and run the result with native kernels.

Importing tersor loads neither torch nor transformers; each name does when it is first used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tersor.calibrate import Calibration
    from tersor.errors import TersorError
    from tersor.inmemory import prune_model, quantize_model, swap_linears
    from tersor.linear import QuantLinear
    from tersor.loading import TersorConfig, load
    from tersor.pipeline import prune_checkpoint, quantize_checkpoint
    from tersor.pruning.schedule import Schedule
    from tersor.qweight import ActSpec, QSpec, QWeight, Scheme
    from tersor.solvers import GPTQ, RTN, Magnitude, SparseGPT, Wanda
    from tersor.sparse import use_sparse
    from tersor.sparse_linear import SparseLinear, swap_sparse_linears
    from tersor.sparsity import Sparsity
    from tersor.surgery.experts import drop_experts
    from tersor.surgery.shrink import shrink_checkpoint
    from tersor.surgery.slicing import slice_checkpoint
    from tersor.tokens import prune_tokens
    from tersor.training import Distillation, cache_teacher, distill
    from tersor.training.mask_targets import Structured
    from tersor.training.masking import HoldZeros, MaskTraining, prune_by_gradient
    from tersor.training.students import student_of
    from tersor.training.trainer import DistillTrainer

_HOME = {  # module of each public name
    "TersorError": "errors",
    "QSpec": "qweight",
    "ActSpec": "qweight",
    "Scheme": "qweight",
    "QWeight": "qweight",
    "QuantLinear": "linear",
    "load": "loading",
    "TersorConfig": "loading",
    "Calibration": "calibrate",
    "GPTQ": "solvers",
    "RTN": "solvers",
    "Magnitude": "solvers",
    "Wanda": "solvers",
    "SparseGPT": "solvers",
    "Sparsity": "sparsity",
    "SparseLinear": "sparse_linear",
    "swap_sparse_linears": "sparse_linear",
    "use_sparse": "sparse",
    "quantize_checkpoint": "pipeline",
    "prune_checkpoint": "pipeline",
    "drop_experts": "surgery.experts",
    "shrink_checkpoint": "surgery.shrink",
    "slice_checkpoint": "surgery.slicing",
    "quantize_model": "inmemory",
    "prune_model": "inmemory",
    "swap_linears": "inmemory",
    "prune_tokens": "tokens",
    "MaskTraining": "training.masking",
    "HoldZeros": "training.masking",
    "prune_by_gradient": "training.masking",
    "Structured": "training.mask_targets",
    "Schedule": "pruning.schedule",
    "Distillation": "training",
    "distill": "training",
    "cache_teacher": "training",
    "DistillTrainer": "training.trainer",
    "student_of": "training.students",
}

__all__ = [
    "GPTQ",
    "RTN",
    "ActSpec",
    "Calibration",
    "DistillTrainer",
    "Distillation",
    "HoldZeros",
    "Magnitude",
    "MaskTraining",
    "QSpec",
    "QWeight",
    "QuantLinear",
    "Schedule",
    "Scheme",
    "SparseGPT",
    "SparseLinear",
    "Sparsity",
    "Structured",
    "TersorConfig",
    "TersorError",
    "Wanda",
    "cache_teacher",
    "distill",
    "drop_experts",
    "get_include",
    "load",
    "prune_by_gradient",
    "prune_checkpoint",
    "prune_model",
    "prune_tokens",
    "quantize_checkpoint",
    "quantize_model",
    "shrink_checkpoint",
    "slice_checkpoint",
    "student_of",
    "swap_linears",
    "swap_sparse_linears",
    "use_sparse",
]


def get_include() -> str:
    """The folder to give a compiler so that it finds <tersor/kernel.h>, for kernels out of tree."""
    from tersor import _core

    return str(Path(_core.__file__).parent / "include")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tersor")
    if name not in _HOME:
        raise AttributeError(f"module 'tersor' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tersor.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
