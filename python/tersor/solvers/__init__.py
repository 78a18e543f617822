"""Solvers: a weight and statistics of its input in, a QWeight out. They see no model."""

from __future__ import annotations

from tersor.solvers.gptq import GPTQ
from tersor.solvers.rtn import RTN

SOLVERS = {"rtn": RTN, "gptq": GPTQ}

__all__ = ["GPTQ", "RTN", "SOLVERS"]
