"""What each linear of a model is to become, found by search: bits, zeros and method by layer, under
bounds on bytes, measured latency and zeros.

Sensitivities come first and give good choices by themselves (`additive`); from these a search goes
on that measures every model it tries (`evolve`), or logits that are trained (`differentiable`).
"""

from __future__ import annotations

from tersor.search.constraints import Constraint, parse_constraints
from tersor.search.differentiable import Differentiable
from tersor.search.evolve import Effort
from tersor.search.front import Front, Point
from tersor.search.run import search_checkpoint
from tersor.search.space import Candidate, Space

__all__ = [
    "Candidate",
    "Constraint",
    "Differentiable",
    "Effort",
    "Front",
    "Point",
    "Space",
    "parse_constraints",
    "search_checkpoint",
]
