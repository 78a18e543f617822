"""A checkpoint in, a compressed checkpoint out, with one block of the model in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from tersor import _core
from tersor.allocation import ALLOCATIONS, global_ratios, outliers, owl_ratios
from tersor.blocks import Flow
from tersor.calibrate import Calibration
from tersor.errors import TersorError
from tersor.formats import FORMATS, quantization_config
from tersor.formats.config import default_format
from tersor.layerwise import Solver, check_arguments, compress_block, find_solver, settings_of
from tersor.progress import Progress
from tersor.qweight import QWeight, Scheme
from tersor.report import REPORT, TIMINGS, LayerReport, Report, Timings, versions
from tersor.runs import Run, describe, identity, text_windows
from tersor.scope import BlockScope, Scope, check_inputs, settle
from tersor.shards import ShardWriter, refuse_existing
from tersor.source import Source

BEGUN = "hidden states"  # commit: what enters the first block is on disk
ALLOCATED = "allocation"  # commit: how sparse each linear is to be


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    scheme: Scheme,
    method: str | Solver = "gptq",
    calibration: Calibration | None = None,
    ignore: Sequence[str] = (),
    sequential: bool = False,
    strict: bool = False,
    progress: bool | None = None,
) -> Report:
    """Quantizes the linears in the blocks of a Hugging Face checkpoint, and writes a checkpoint.

    model: a folder with config.json, safetensors and, where text is used, the tokenizer.
    out: the folder to make. While the run lasts its work is in `<out>.partial`: started again with
        the same arguments it goes on after the last whole block, with the same bits in the end;
        with others it begins anew, unless that would throw away a whole block.
    scheme: what every linear becomes.
    method: "gptq", "rtn", or a solver with settings of its own, such as GPTQ(act_order=True).
    calibration: the text; None for methods that need none. Each block is calibrated on what the
        quantized blocks before it give.
    ignore: shell patterns of modules to leave alone, such as "*.down_proj". What is outside the
        blocks (embeddings, the head) is left alone anyway.
    sequential: within a block, collect statistics anew once the linears that came before are
        quantized: one forward pass for every distinct input instead of one for the block.
    strict: raise TersorError as soon as a module is not treated as asked. What has been done is
        kept, so that the same call without it goes on.
    progress: show a bar; by default where stderr is a terminal.

    Returns the report, which is in the folder as well (see tersor.report).
    Raises TersorError for bad input, before any work where that can be known.
    """
    refuse_existing(out)
    return _compress(
        model, out, scheme, find_solver(method), calibration, ignore, sequential, strict, progress
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
    if allocation == "owl" and calibration is None:
        raise TersorError(
            "owl counts outliers with text to calibrate on; give --calibration FILE, or use "
            "--allocation uniform or global"
        )
    return _compress(
        *(model, out, scheme, method, calibration, ignore, sequential, strict, progress),
        allocation,
    )


def _compress(
    model: str | Path,
    out: str | Path,
    scheme: Scheme | None,
    solver: Solver,
    calibration: Calibration | None,
    ignore: Sequence[str],
    sequential: bool,
    strict: bool,
    progress: bool | None,
    allocation: str = "uniform",
) -> Report:
    check_arguments(scheme, ignore)
    if not isinstance(calibration, (Calibration, type(None))):
        raise TersorError(
            f"calibration is a tersor.Calibration((FILE, ...)), not {type(calibration).__name__}"
        )
    source = Source.open(model)
    scope = settle(source.model, source.found, ignore)
    check_inputs(source.model, scope.linears, scheme.weight if scheme else None, solver.sparsity)
    windows = _windows(source, solver, calibration)
    settings = settings_of(scheme, solver, ignore, sequential)
    if solver.sparsity is not None:
        settings["allocation"] = allocation
    report = Report(
        model=source.checkpoint.folder.resolve().name,
        fingerprint=source.checkpoint.fingerprint(),
        architecture=_architecture(source, scheme),
        settings=settings,
        versions=versions(),
        calibration=describe(calibration, windows),
        kept=scope.kept,
        departures=scope.departures,
        bytes_before=source.nbytes,
    )
    if strict:
        report.require_strict()
    with ShardWriter(out, identity(report)) as writer, Progress(progress) as bar:
        run = _Run(
            source=source,
            writer=writer,
            bar=bar,
            scope=scope,
            scheme=scheme,
            solver=solver,
            sequential=sequential,
        )
        run.write_outside()
        run.allocate(allocation, windows)
        for block in run.blocks(windows):
            report.add(writer.done[block.path])
            if strict:
                report.require_strict()
        report.bytes_after = run.nbytes
        files = {REPORT: report.to_json(), TIMINGS: run.timings.to_json()}
        config = source.checkpoint.config
        if scheme is not None:
            order = "weight" if report.settings.get("act_order") else None
            stated = quantization_config(scheme, scope.unquantized, actorder=order)
            config = config | {"quantization_config": stated}
        writer.finish(config, source.checkpoint.folder, files)
    return report


def _architecture(source: Source, scheme: Scheme | None) -> str:
    """Where the architecture is from, and what a reader of the folder has to know of it."""
    if scheme and any(place.transposed for place in source.where.values()):
        return (
            f"{source.found.how}; load the result with tersor, since transformers with "
            "compressed-tensors leaves its Conv1D layers random"
        )
    return source.found.how


def _windows(source: Source, solver: Solver, calibration: Calibration | None) -> Tensor | None:
    """The token ids, int64 [samples, seq_len], or None where there is no text and need be none."""
    if calibration is not None:
        return text_windows(source, calibration)
    if solver.needs is not None:
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
    scheme: Scheme | None
    solver: Solver
    sequential: bool
    ratios: dict[str, float] | None = None  # of linears by name; None: as the solver has it

    def allocate(self, allocation: str, windows: Tensor | None) -> None:
        """Settles how sparse each linear is to be."""
        sparsity = self.solver.sparsity
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
        self.ratios = self.writer.done[ALLOCATED]["ratios"]

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
                self._block(number, block, flow)
            self.timings.add(self.writer.done[block.path]["seconds"])
            yield block

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
                *(model, block, self.solver, self.scheme, passes, self.sequential, timings),
                self.ratios,
            ):
                solved.report.bytes = self._add(solved.name, solved.weight)
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

    def _add(self, name: str, weight: QWeight | Tensor) -> int:
        """Puts the tensors of a compressed linear into the block's file; returns their bytes."""
        place = self.source.where[f"{name}.weight"]
        if isinstance(weight, Tensor):
            stored = self.source.as_stored(f"{name}.weight", weight)
            self.writer.add(place.saved_as, stored)
            return stored.nbytes
        assert self.scheme is not None  # or there would be no codes
        stem = place.saved_as.removesuffix("weight")
        packed = FORMATS[default_format(self.scheme)].pack(weight)
        for local, tensor in packed.items():
            self.writer.add(stem + local, tensor)
        return sum(tensor.nbytes for tensor in packed.values())
