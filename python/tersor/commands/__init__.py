"""What the commands of `tersor` do; cli.py reads their arguments.

Every command imports what it needs when it runs, and checks before that what needs no import.
"""

from tersor.commands.compress import prune, quantize
from tersor.commands.measure import bench, demo, evaluate, inspect, kernels
from tersor.commands.search import add_search_options, search
from tersor.commands.write import generate

__all__ = (
    "add_search_options",
    "bench",
    "demo",
    "evaluate",
    "generate",
    "inspect",
    "kernels",
    "prune",
    "quantize",
    "search",
)
