"""Prints the instruction sets whose kernels this machine can run, plainest first."""

from tersor import _core

print(*dict.fromkeys(k["isa"] for k in _core.kernels() if k["unavailable"] is None))
