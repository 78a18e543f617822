"""A checkpoint in, a compressed checkpoint out, with one block of the model in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor import _core
from tersor.allocation import ALLOCATIONS, global_ratios, outliers, owl_ratios
from tersor.blocks import Flow
from tersor.calibrate import Calibration
from tersor.devices import AUTO, CPU, enough_memory, find_device, watch_memory
from tersor.errors import TersorError
from tersor.formats import FORMATS, quantization_config
from tersor.formats.config import default_format
from tersor.layerwise import (
    EVERY,
    STATIC_NEEDS,
    Solved,
    Solver,
    Treatment,
    check_arguments,
    check_shared,
    compress_block,
    find_solver,
    settings_of,
    with_ratio,
)
from tersor.models.arch import spellings
from tersor.progress import Progress
from tersor.qweight import Scheme
from tersor.report import LayerReport, Report, Timings, versions
from tersor.runs import Run, describe, identity, text_windows
from tersor.scope import BlockScope, Scope, assign, check_inputs, settle
from tersor.shards import ShardWriter, refuse_existing
from tersor.source import Source

BEGUN = "hidden states"  # commit: what enters the first block is on disk
ALLOCATED = "allocation"  # commit: how sparse each linear is to be


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    scheme: Scheme | Mapping[str, Scheme | None],
    method: str | Solver = "gptq",
    calibration: Calibration | None = None,
    ignore: Sequence[str] = (),
    sequential: bool = False,
    strict: bool = False,
    device: str | torch.device = AUTO,
    progress: bool | None = None,
) -> Report:
    """Quantizes the linears in the blocks of a Hugging Face checkpoint, and writes a checkpoint.

    model: a folder with config.json, safetensors and, where text is used, the tokenizer.
    out: the folder to make. While the run lasts its work is in `<out>.partial`: started again with
        the same arguments it goes on after the last whole block, with the same bits in the end;
        with others it begins anew, unless that would throw away a whole block.
    scheme: what every linear becomes; or what linears become by shell patterns over their paths, as
        in {"*.down_proj": Scheme(QSpec(8)), "*": Scheme(QSpec(4))}. A linear's own name counts
        wherever it stands, or else the first pattern that matches; None leaves a linear in 16 bits,
        and so does no pattern.
    method: "gptq", "rtn", or a solver with settings of its own, such as GPTQ(act_order=True).
    calibration: the text; None for methods that need none. Each block is calibrated on what the
        quantized blocks before it give.
    ignore: shell patterns of modules to leave alone, such as "*.down_proj". What is outside the
        blocks (embeddings, the head) is left alone anyway.
    sequential: within a block, collect statistics anew once the linears that came before are
        quantized: one forward pass for every distinct input instead of one for the block.
    strict: raise TersorError as soon as a module is not treated as asked. What has been done is
        kept, so that the same call without it goes on.
    device: where it is done: "cpu", "cuda", "cuda:1", or "auto", an NVIDIA GPU where there is one.
        A block of the model and its statistics must fit its memory.
    progress: show a bar; by default where stderr is a terminal.

    Returns the report, which is in the folder as well (see tersor.report).
    Raises TersorError for bad input, before any work where that can be known.
    """
    refuse_existing(out)
    solver = find_solver(method)
    schemes = scheme if isinstance(scheme, Mapping) else {EVERY: scheme}
    return compress_checkpoint(
        *(model, out),
        treatments={p: Treatment(solver, s) if s else None for p, s in schemes.items()},
        calibration=calibration,
        ignore=ignore,
        sequential=sequential,
        strict=strict,
        device=device,
        progress=progress,
    )


def compress_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    treatments: Mapping[str, Treatment | None],
    calibration: Calibration | None = None,
    ignore: Sequence[str] = (),
    sequential: bool = False,
    strict: bool = False,
    device: str | torch.device = AUTO,
    progress: bool | None = None,
) -> Report:
    """quantize_checkpoint and prune_checkpoint in one, with a solver and a scheme for each linear.

    treatments: by shell patterns over the paths of linears, as `scheme` is in quantize_checkpoint.
    The rest is as there.
    """
    refuse_existing(out)
    return _compress(
        model, out, treatments, calibration, ignore, sequential, strict, device, progress
    )


def prune_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    method: Solver,
    scheme: Scheme | None = None,
    allocation: str = "uniform",
    calibration: Calibration | None = None,
    ignore: Sequence[str] = (),
    sequential: bool = False,
    strict: bool = False,
    device: str | torch.device = AUTO,
    progress: bool | None = None,
) -> Report:
    """Makes weights of the linears in the blocks of a Hugging Face checkpoint zero, and writes a
    checkpoint: an ordinary one with zeros in it, or with a scheme a quantized one whose zeros are
    exact.

    method: a solver with its sparsity, such as SparseGPT(Sparsity(pattern=(2, 4))).
    scheme: what every linear becomes beside, in the same pass; None leaves weights in the dtype of
        the files.
    allocation: how a ratio is spread over the model. "uniform" gives it to every linear, "owl"
        less of it to blocks with outliers (needs calibration, and one more pass of the text),
        "global" to each linear its share of all the model's smallest weights.
    The rest is as in quantize_checkpoint.
    """
    refuse_existing(out)
    check_allocation(method, allocation)
    if allocation == "owl" and calibration is None:
        raise TersorError(
            "owl counts outliers with text to calibrate on; give --calibration FILE, or use "
            "--allocation uniform or global"
        )
    treatments = {EVERY: Treatment(method, scheme)}
    return _compress(
        *(model, out, treatments, calibration, ignore, sequential, strict, device, progress),
        allocation,
    )


def check_allocation(method: Solver, allocation: str) -> None:
    """TersorError where a solver has no sparsity, or none that can be spread like that."""
    sparsity = find_solver(method).sparsity
    if sparsity is None:
        raise TersorError(f"{method} prunes nothing; use quantize_checkpoint, or another method")
    if allocation not in ALLOCATIONS:
        raise TersorError(f"allocation must be one of {', '.join(ALLOCATIONS)}, not {allocation!r}")
    if allocation != "uniform" and sparsity.ratio is None:
        raise TersorError(
            f"the pattern {sparsity} is the same in every linear; allocation {allocation!r} is for "
            "a ratio"
        )


def _compress(
    model: str | Path,
    out: str | Path,
    treatments: Mapping[str, Treatment | None],
    calibration: Calibration | None,
    ignore: Sequence[str],
    sequential: bool,
    strict: bool,
    device: str | torch.device,
    progress: bool | None,
    allocation: str = "uniform",
) -> Report:
    check_arguments(treatments, ignore)
    if not isinstance(calibration, (Calibration, type(None))):
        raise TersorError(
            f"calibration is a tersor.Calibration((FILE, ...)), not {type(calibration).__name__}"
        )
    source = Source.open(model, find_device(device))
    scope = settle(source.model, source.found, ignore)
    own = assign(scope, treatments, source.found.arch.aliases)
    for each in dict.fromkeys(treatments.values()):
        if each is not None:
            linears = [name for name, treatment in own.items() if treatment == each]
            spec = each.scheme.weight if each.scheme else None
            check_inputs(source.model, linears, spec, each.solver.sparsity)
    if calibration is not None:
        check_shared(scope, own)
    windows = _windows(source, list(own.values()), calibration)
    settings = settings_of(treatments, ignore, sequential, source.device)
    if any(each.solver.sparsity for each in own.values()):
        settings["allocation"] = allocation
    report = Report(
        model=source.checkpoint.folder.resolve().name,
        fingerprint=source.checkpoint.fingerprint(),
        architecture=_architecture(source, any(each.scheme for each in own.values())),
        settings=settings,
        versions=versions(),
        calibration=describe(calibration, windows),
        kept=scope.kept,
        departures=scope.departures,
        bytes_before=source.nbytes,
    )
    if strict:
        report.require_strict()
    watch_memory(source.device)
    with (
        ShardWriter(out, identity(report)) as writer,
        Progress(progress) as bar,
        enough_memory(source.device),
    ):
        run = _Run(
            source=source,
            writer=writer,
            bar=bar,
            scope=scope,
            treatments=own,
            sequential=sequential,
        )
        run.write_outside()
        run.allocate(allocation, windows)
        config = source.checkpoint.config
        if any(each.scheme for each in own.values()):
            config = config | {"quantization_config": _stated(scope, own, source)}
        run.complete(report, (block.path for block in run.blocks(windows)), config, strict)
    return report


def _stated(scope: Scope, treatments: Mapping[str, Treatment], source: Source) -> dict[str, Any]:
    """The quantization_config: one scheme for every Linear that is not ignored, or where there are
    several, each with the names of its linears."""
    aliases = source.found.arch.aliases
    ordered = any(getattr(each.solver, "act_order", False) for each in treatments.values())
    ignored = list(scope.unquantized)
    for name, each in treatments.items():
        if each.scheme is None:
            ignored += spellings(name, aliases)
    schemes = {name: each.scheme for name, each in treatments.items() if each.scheme}
    stated: Scheme | dict[str, Scheme] = next(iter(schemes.values()))
    if len(set(schemes.values())) > 1:
        stated = {
            spelling: scheme
            for name, scheme in schemes.items()
            for spelling in spellings(name, aliases)
        }
    return quantization_config(stated, ignored, actorder="weight" if ordered else None)


def _architecture(source: Source, quantized: bool) -> str:
    """Where the architecture is from, and what a reader of the folder has to know of it."""
    if quantized and any(place.transposed for place in source.where.values()):
        return (
            f"{source.found.how}; load the result with tersor, since transformers with "
            "compressed-tensors leaves its Conv1D layers random"
        )
    return source.found.how


def _windows(
    source: Source, treatments: Sequence[Treatment], calibration: Calibration | None
) -> Tensor | None:
    """The token ids, int64 [samples, seq_len], or None where there is no text and need be none."""
    if calibration is not None:
        return text_windows(source, calibration)
    if any(each.scheme and each.scheme.static for each in treatments):
        raise TersorError(STATIC_NEEDS)
    solver = next((each.solver for each in treatments if each.solver.needs is not None), None)
    if solver is not None:
        other = f"use --method {'magnitude' if solver.sparsity else 'rtn'}, which needs none"
        if solver.name == "magnitude":
            other = "leave --refit out"
        raise TersorError(
            f"{solver.name} needs text to calibrate on; give --calibration FILE, or {other}"
        )
    return None


def _hidden(number: int) -> str:
    """The file with what enters a block."""
    return f"hidden-{number}"


@dataclass(kw_only=True)
class _Run(Run):
    scope: Scope
    treatments: dict[str, Treatment]  # of the linears of the scope, by name
    sequential: bool

    def allocate(self, allocation: str, windows: Tensor | None) -> None:
        """Settles how sparse each linear is to be, where all have one treatment."""
        sparsity = next(iter(self.treatments.values())).solver.sparsity
        if allocation == "uniform" or sparsity is None or sparsity.ratio is None:
            return
        if ALLOCATED not in self.writer.done:
            self.bar.say("how sparse each layer is to be")
            with self.timings.stage("allocate"):
                if allocation == "global":
                    ratios = global_ratios(self.scope.linears, self._weight, sparsity.ratio)
                else:
                    assert windows is not None  # checked by prune_checkpoint
                    path = lambda number: self.writer.state_path(f"surveyed-{number}")  # noqa: E731
                    blocks = self.scope.blocks
                    of_block = owl_ratios(
                        outliers(self.source, blocks, windows, path, self.bar.step), sparsity.ratio
                    )
                    ratios = {name: of_block[b.path] for b in blocks for name in b.linears}
            self.writer.commit(ALLOCATED, {"bytes": 0, "ratios": ratios}, quick=True)
        ratios = self.writer.done[ALLOCATED]["ratios"]
        self.treatments = {
            name: replace(each, solver=with_ratio(each.solver, ratios[name]))
            for name, each in self.treatments.items()
        }

    def _weight(self, name: str) -> Tensor:
        return self.source.where[f"{name}.weight"].read(self.source.checkpoint)

    def blocks(self, windows: Tensor | None) -> Iterator[BlockScope]:
        """Yields each block once it is done, in this run or in one that was interrupted."""
        blocks = self.scope.blocks
        todo = [block for block in blocks if block.path not in self.writer.done]
        flow = self.begin(windows, BEGUN, _hidden) if todo and windows is not None else None
        passes = len(flow.batches) if flow else 0
        for block in todo:  # the text goes through to observe, and again for what enters the next
            rounds = len(block.rounds(self.sequential)) + (block is not blocks[-1])
            self.bar.expect(len(block.linears) + passes * rounds)
        for number, block in enumerate(blocks):
            if block in todo:
                self.bar.say(f"block {number + 1} of {len(blocks)}")
                self._expect(blocks[number + 1 : number + 2])
                self._block(number, block, flow)
            self.timings.add(self.writer.done[block.path]["seconds"])
            yield block

    def _expect(self, following: Sequence[BlockScope]) -> None:
        """On a GPU the memory of the host has room for the block after the one at work, and its
        processor the time to read it."""
        if self.source.device.type != "cpu":
            for block in following:
                self.source.expect(self.source.names(block.path))

    def _block(self, number: int, block: BlockScope, flow: Flow | None) -> None:
        model, timings = self.source.model, Timings()
        module = model.get_submodule(block.path)
        names = self.source.names(block.path)
        layers: list[LayerReport] = []
        departures: dict[str, str] = {}
        state: dict[str, str] = {}
        passes = partial(flow.through, number, module) if flow else None

        with ExitStack() as memory:
            with timings.stage("read"):
                memory.enter_context(self.source.loaded(names))
            for solved in compress_block(
                model, block, self.treatments, passes, self.sequential, timings
            ):
                solved.report.bytes = self._add(solved)
                layers.append(solved.report)
                if solved.departure:
                    departures[solved.name] = solved.departure
                self.bar.step()
            if flow and number + 1 < len(self.scope.blocks):
                with timings.stage("run"):
                    state[_hidden(number + 1)] = flow.advance(number, module)
        with self.timings.stage("write"):
            nbytes = sum(layer.bytes for layer in layers)
            done = {f"{name}.weight" for name in block.linears}
            for name, tensor in self.source.unchanged(n for n in names if n not in done):
                self.writer.add(name, tensor)
                nbytes += tensor.nbytes
            info = {
                "layers": [asdict(layer) for layer in layers],
                "departures": departures,
                "bytes": nbytes,
                "seconds": timings.seconds,
            }
            self.writer.commit(block.path, info, state)
        if flow:
            flow.forget(number)
        _core.trim_memory()

    def _add(self, solved: Solved) -> int:
        """Puts the tensors of a compressed linear into the block's file; returns their bytes."""
        name, weight = solved.name, solved.weight.to(CPU)
        place = self.source.where[f"{name}.weight"]
        if isinstance(weight, Tensor):
            stored = self.source.as_stored(f"{name}.weight", weight)
            self.writer.add(place.saved_as, stored)
            return stored.nbytes
        scheme = self.treatments[name].scheme
        assert scheme is not None  # or there would be no codes
        stem = place.saved_as.removesuffix("weight")
        packed = FORMATS[default_format(scheme)].pack(weight)
        if solved.input_scale is not None:
            packed["input_scale"] = solved.input_scale.to(CPU)
        for local, tensor in packed.items():
            self.writer.add(stem + local, tensor)
        return sum(tensor.nbytes for tensor in packed.values())
