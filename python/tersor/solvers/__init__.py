"""Solvers: a weight and statistics of its input in, a QWeight out, or with pruning alone a weight
with zeros. They see no model."""

from __future__ import annotations

from tersor.solvers.gptq import GPTQ
from tersor.solvers.masked import Magnitude, Wanda
from tersor.solvers.rtn import RTN
from tersor.solvers.sparsegpt import SparseGPT

SOLVERS = {"rtn": RTN, "gptq": GPTQ}
PRUNERS = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT}

__all__ = ["GPTQ", "PRUNERS", "RTN", "SOLVERS", "Magnitude", "SparseGPT", "Wanda"]
