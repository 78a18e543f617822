"""Compress language models and run the result with native kernels.

Importing tersor loads neither torch nor transformers; each name does when it is first used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tersor.adapters.codebook import FP4, NF4
    from tersor.adapters.loftq import LoftQ, loftq_model
    from tersor.adapters.lora import add_lora, prepare_lora
    from tersor.adapters.merge import merge_lora
    from tersor.adapters.nf4_linear import NF4Linear, nf4_model
    from tersor.calibrate import Calibration
    from tersor.errors import TersorError
    from tersor.inmemory import prune_model, quantize_model, swap_linears
    from tersor.layerwise import Treatment
    from tersor.linear import QuantLinear
    from tersor.loading import TersorConfig, load
    from tersor.pipeline import compress_checkpoint, prune_checkpoint, quantize_checkpoint
    from tersor.pruning.schedule import Schedule
    from tersor.qweight import ActSpec, QSpec, QWeight, Scheme
    from tersor.recipes.page import write_page
    from tersor.recipes.recipe import Recipe
    from tersor.recipes.run import compress
    from tersor.saving import save
    from tersor.search import Differentiable, Effort, Front, Space, search_checkpoint
    from tersor.solvers import GPTQ, RTN, Magnitude, SparseGPT, Wanda
    from tersor.sparse import use_sparse
    from tersor.sparse_linear import SparseLinear, swap_sparse_linears
    from tersor.sparsity import Sparsity
    from tersor.surgery.experts import drop_experts
    from tersor.surgery.lowrank import factorize_model, load_factorized, save_factorized
    from tersor.surgery.shrink import shrink_checkpoint
    from tersor.surgery.slicing import slice_checkpoint
    from tersor.tokens import prune_tokens
    from tersor.training import Distillation, Features, cache_teacher, distill
    from tersor.training.checkpoints import QAT, train_checkpoint
    from tersor.training.early_exit import EarlyExit
    from tersor.training.exits import ExitHeads, ExitTrainer
    from tersor.training.mask_targets import Structured
    from tersor.training.masking import HoldZeros, MaskTraining, prune_by_gradient
    from tersor.training.mixture import FollowGap, Mixture
    from tersor.training.mutual import MutualTrainer
    from tersor.training.on_policy import OnPolicy
    from tersor.training.progressive import by_distillation, progressive
    from tersor.training.qat import QuantizationTraining
    from tersor.training.sequences import CorpusRows, generate_corpus
    from tersor.training.students import student_of
    from tersor.training.trainer import DistillTrainer
    from tersor.training.vocabulary import align_vocabularies

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
    "Features": "training",
    "OnPolicy": "training.on_policy",
    "generate_corpus": "training.sequences",
    "CorpusRows": "training.sequences",
    "Mixture": "training.mixture",
    "FollowGap": "training.mixture",
    "ExitHeads": "training.exits",
    "ExitTrainer": "training.exits",
    "EarlyExit": "training.early_exit",
    "MutualTrainer": "training.mutual",
    "progressive": "training.progressive",
    "by_distillation": "training.progressive",
    "align_vocabularies": "training.vocabulary",
    "Space": "search",
    "Effort": "search",
    "Differentiable": "search",
    "Front": "search",
    "compress_checkpoint": "pipeline",
    "Treatment": "layerwise",
    "add_lora": "adapters.lora",
    "prepare_lora": "adapters.lora",
    "NF4": "adapters.codebook",
    "FP4": "adapters.codebook",
    "NF4Linear": "adapters.nf4_linear",
    "nf4_model": "adapters.nf4_linear",
    "LoftQ": "adapters.loftq",
    "loftq_model": "adapters.loftq",
    "merge_lora": "adapters.merge",
    "save": "saving",
    "factorize_model": "surgery.lowrank",
    "save_factorized": "surgery.lowrank",
    "load_factorized": "surgery.lowrank",
    "QAT": "training.checkpoints",
    "train_checkpoint": "training.checkpoints",
    "QuantizationTraining": "training.qat",
    "Recipe": "recipes.recipe",
    "compress": "recipes.run",
    "search_checkpoint": "search",
    "write_page": "recipes.page",
}

__all__ = [
    "FP4",
    "GPTQ",
    "NF4",
    "QAT",
    "RTN",
    "ActSpec",
    "Calibration",
    "CorpusRows",
    "Differentiable",
    "DistillTrainer",
    "Distillation",
    "EarlyExit",
    "Effort",
    "ExitHeads",
    "ExitTrainer",
    "Features",
    "FollowGap",
    "Front",
    "HoldZeros",
    "LoftQ",
    "Magnitude",
    "MaskTraining",
    "Mixture",
    "MutualTrainer",
    "NF4Linear",
    "OnPolicy",
    "QSpec",
    "QWeight",
    "QuantLinear",
    "QuantizationTraining",
    "Recipe",
    "Schedule",
    "Scheme",
    "Space",
    "SparseGPT",
    "SparseLinear",
    "Sparsity",
    "Structured",
    "TersorConfig",
    "TersorError",
    "Treatment",
    "Wanda",
    "add_lora",
    "align_vocabularies",
    "by_distillation",
    "cache_teacher",
    "compress",
    "compress_checkpoint",
    "distill",
    "drop_experts",
    "factorize_model",
    "generate_corpus",
    "get_include",
    "load",
    "load_factorized",
    "loftq_model",
    "merge_lora",
    "nf4_model",
    "prepare_lora",
    "progressive",
    "prune_by_gradient",
    "prune_checkpoint",
    "prune_model",
    "prune_tokens",
    "quantize_checkpoint",
    "quantize_model",
    "save",
    "save_factorized",
    "search_checkpoint",
    "shrink_checkpoint",
    "slice_checkpoint",
    "student_of",
    "swap_linears",
    "swap_sparse_linears",
    "train_checkpoint",
    "use_sparse",
    "write_page",
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
