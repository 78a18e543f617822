"""Every candidate of every linear, solved once on the same statistics of its input, and kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tersor.blocks import Flow
from tersor.calibrate import GramStats, capture
from tersor.durable import durable
from tersor.formats import FORMATS
from tersor.layerwise import compress_linear
from tersor.progress import Progress
from tersor.qweight import QWeight
from tersor.scope import BlockScope, Scope
from tersor.search.space import Candidate
from tersor.source import Source


@dataclass(frozen=True)
class Solutions:
    """Of one linear. weights: by candidate, its codes or, in 16 bits, its values; None for the
    candidate that leaves it as it is.

    errors: of its outputs, relative and squared, by candidate (see LayerReport.error).
    calls: the share of tokens that reached it.
    departures: what was not done as asked, such as for an expert that no token reached.
    """

    weights: tuple[QWeight | Tensor | None, ...]
    errors: tuple[float, ...]
    calls: float = 1.0
    departures: tuple[str, ...] = ()

    def weight(self, number: int, dtype: torch.dtype) -> Tensor | None:
        """The values of a candidate, [n, k]; None where the linear stays as it is."""
        weight = self.weights[number]
        return weight.dequantize(dtype) if isinstance(weight, QWeight) else weight

    def save(self, path: Path) -> None:
        """The tensors of the candidates' formats and the figures, in a file that is whole or not
        there."""
        tensors: dict[str, Tensor] = {}
        for number, weight in enumerate(self.weights):
            if isinstance(weight, QWeight):
                packed = FORMATS["pack-quantized"].pack(weight)
                tensors |= {f"{number}.{local}": tensor for local, tensor in packed.items()}
            elif weight is not None:
                tensors[f"{number}.weight"] = weight.contiguous()
        figures = {
            "errors": self.errors,
            "calls": self.calls,
            "departures": self.departures,
        }
        metadata = {"figures": json.dumps(figures)}
        with durable(path) as file:
            file.write(safetensors.torch.save(tensors, metadata))

    @classmethod
    def read(cls, path: Path, candidates: Sequence[Candidate]) -> Solutions:
        with safetensors.safe_open(path, framework="pt") as file:
            figures = json.loads(file.metadata()["figures"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        weights = [_weight(tensors, number, each) for number, each in enumerate(candidates)]
        return cls(
            tuple(weights),
            tuple(figures["errors"]),
            figures["calls"],
            tuple(figures["departures"]),
        )


def _weight(
    tensors: Mapping[str, Tensor], number: int, candidate: Candidate
) -> QWeight | Tensor | None:
    if candidate.untouched:
        return None
    if candidate.scheme is None:
        return tensors[f"{number}.weight"]
    prefix = f"{number}."
    local = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return FORMATS["pack-quantized"].unpack(local, candidate.scheme.weight)


def solve_all(
    source: Source,
    scope: Scope,
    windows: Tensor,
    candidates: Sequence[Candidate],
    folder: Path,
    bar: Progress,
) -> dict[str, Solutions]:
    """The solutions of every linear of the scope, by path.

    source: its model in memory, whole; it is not changed. windows: the calibration text, int64
    [samples, seq_len], of which every linear sees what the original model gives. folder: for a file
    of each linear; what is there already is not solved again.
    """
    found: dict[str, Solutions] = {}
    paths = {name: folder / f"linear-{i:05d}.safetensors" for i, name in enumerate(scope.linears)}
    todo = [block for block in scope.blocks if not all(paths[n].exists() for n in block.linears)]
    if todo:
        bar.expect(sum(len(block.linears) for block in todo))
        flow = Flow(
            source.model, source.blocks, windows, lambda number: folder / f"hidden-{number}"
        )
        flow.enter()
        for number, block in enumerate(scope.blocks[: scope.blocks.index(todo[-1]) + 1]):
            bar.say(f"solving block {number + 1} of {len(scope.blocks)} for every candidate")
            taps = {}
            if block in todo:
                taps = {tap[0]: source.model.get_submodule(tap[0]) for tap in block.taps}
            module = source.model.get_submodule(block.path)
            # What comes out of the block is what enters the next one.
            passes = (flow.advance(number, module) for _ in range(1))
            stats = capture(taps, passes)
            flow.forget(number)
            if block in todo:
                _solve_block(source, block, stats, candidates, paths, windows.numel(), bar)
        flow.forget(number + 1)
    for name, path in paths.items():
        found[name] = Solutions.read(path, candidates)
    return found


def _solve_block(
    source: Source,
    block: BlockScope,
    stats: dict[str, GramStats],
    candidates: Sequence[Candidate],
    paths: Mapping[str, Path],
    tokens: int,
    bar: Progress,
) -> None:
    for tap in block.taps:
        seen = stats.pop(tap[0])  # freed before the next one is factored
        for name in tap:
            solutions = _solve(source, name, seen, candidates, min(1.0, seen.tokens / tokens))
            solutions.save(paths[name])
            bar.step()


def _solve(
    source: Source,
    name: str,
    seen: GramStats,
    candidates: Sequence[Candidate],
    calls: float,
) -> Solutions:
    linear = source.model.get_submodule(name)
    weights: list[QWeight | Tensor | None] = []
    errors: list[float] = []
    departures: list[str] = []
    for candidate in candidates:
        treatment = candidate.treatment
        if treatment is None:
            weights.append(None)
            errors.append(0.0)
            continue
        solved = compress_linear(name, linear, seen, treatment, in_place=False)
        weights.append(solved.weight)
        errors.append(solved.report.error)
        if solved.departure:
            departures.append(f"{candidate}: {solved.departure}")
    return Solutions(tuple(weights), tuple(errors), calls, tuple(departures))
