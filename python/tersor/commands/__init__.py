"""What the commands of `tersor` do; cli.py reads their arguments.

Every command imports what it needs when it runs, and checks before that what needs no import.
"""

from tersor.commands.folders import prune, quantize
from tersor.commands.measure import bench, demo, evaluate, inspect, kernels
from tersor.commands.recipe import compress
from tersor.commands.train import distill, qat
from tersor.commands.write import generate

__all__ = (
    "bench",
    "compress",
    "demo",
    "distill",
    "evaluate",
    "generate",
    "inspect",
    "kernels",
    "prune",
    "qat",
    "quantize",
)
