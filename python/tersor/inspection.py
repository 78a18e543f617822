"""What is in a model's folder, and which kernels would serve it: `tersor inspect`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.checkpoint import Checkpoint
from tersor.errors import TersorError
from tersor.formats import FORMATS, parse_config
from tersor.formats.config import Group
from tersor.kernels import explain
from tersor.models import build_skeleton, find_arch
from tersor.report import Report

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Kind:
    """Linears that are alike."""

    n: int
    k: int
    group: Group


def inspect(folder: str | Path) -> Iterator[str | Table]:
    """Lines and a table for people. Reads headers and a few bytes. TersorError for a folder that
    is damaged."""
    checkpoint = Checkpoint.open(folder)
    yield f"{folder}: {_architecture(checkpoint)}"
    if "quantization_config" not in checkpoint.config:
        yield f"not quantized: {_dtypes(checkpoint)}"
        if report := Report.read(checkpoint.folder):
            yield _summary(report)
        return
    kinds, quantized = _kinds(checkpoint)
    weights = sum(kind.n * kind.k * count for kind, (count, _) in kinds.items())
    inside = sum(nbytes for _, nbytes in kinds.values())
    yield (
        f"quantized: {sum(count for count, _ in kinds.values())} linears, {_mb(inside)}, "
        f"{8 * inside / weights:.2f} bits per weight, scales and zero points included"
    )
    yield f"not quantized: {_dtypes(checkpoint, quantized)}"
    if report := Report.read(checkpoint.folder):
        yield _summary(report)
    yield (
        "the quantized linears (n output, k input features) and the kernels that run them on this "
        "machine:"
    )
    yield _table(kinds)


def _architecture(checkpoint: Checkpoint) -> str:
    model = build_skeleton(checkpoint.config)
    try:
        found = find_arch(model)
    except TersorError as error:
        return f"{type(model).__name__}; {error}"
    blocks = f"{type(model).__name__}, {len(list(found.blocks(model)))} blocks"
    if found.arch.name != "generic":
        return blocks
    return f"{blocks} (tersor does not know this architecture, and has found them by looking)"


def _kinds(checkpoint: Checkpoint) -> tuple[dict[Kind, tuple[int, int]], set[str]]:
    """Kind -> (how many linears, their bytes); and the names of all their tensors."""
    config = parse_config(checkpoint.config)
    kinds: dict[Kind, tuple[int, int]] = defaultdict(lambda: (0, 0))
    quantized: set[str] = set()
    for scale in checkpoint.names:
        stem, _, last = scale.rpartition(".")
        group = config.group_for(stem) if last == "weight_scale" else None
        if group is None:
            continue
        tensors = (*FORMATS[group.format].tensors, "input_scale", "input_zero_point")
        local = [f"{stem}.{name}" for name in tensors]
        names = [name for name in local if name in checkpoint]
        if local[0] not in checkpoint:
            raise TersorError(
                f"{checkpoint.folder} has {scale} and no {local[0]}; its files are incomplete, "
                "download or quantize it again"
            )
        n, k = checkpoint.metadata(names[0]).shape
        if f"{stem}.weight_shape" in checkpoint:
            n, k = checkpoint.load(f"{stem}.weight_shape").tolist()
        kind = Kind(n, k, group)
        count, nbytes = kinds[kind]
        kinds[kind] = count + 1, nbytes + sum(checkpoint.metadata(name).nbytes for name in names)
        quantized.update(names)
    if not kinds:
        raise TersorError(
            f"config.json of {checkpoint.folder} says that it is quantized, but no tensor is; "
            f"download or quantize it again"
        )
    return dict(kinds), quantized


def _table(kinds: dict[Kind, tuple[int, int]]) -> Table:
    from rich.table import Table

    shown = Table()
    for head in ("n x k", "linears", "scheme", "group", "zero points", "format", "bits", "size"):
        shown.add_column(head)
    for tokens in ("1 token", "512 tokens"):
        shown.add_column(f"kernel for {tokens}")
    for kind, (count, nbytes) in kinds.items():
        spec = kind.group.scheme.weight
        shown.add_row(
            f"{kind.n} x {kind.k}",
            str(count),
            str(kind.group.scheme),
            str(spec.group or "row"),
            "no" if spec.symmetric else "yes",
            kind.group.format,
            f"{8 * nbytes / (count * kind.n * kind.k):.2f}",
            _mb(nbytes),
            *(_serving(kind, m) for m in (1, 512)),
        )
    return shown


def _serving(kind: Kind, m: int) -> str:
    scheme = kind.group.scheme
    rows = explain(m, kind.n, kind.k, scheme.weight, scheme.activation)
    return next((name for name, reason in rows if reason is None), "none on this machine")


def _dtypes(checkpoint: Checkpoint, without: Collection[str] = ()) -> str:
    """How much of which dtype, of the tensors that are not in `without`."""
    sizes: dict[str, int] = defaultdict(int)
    for name in checkpoint.names:
        if name not in without:
            dtype = str(checkpoint.metadata(name).torch_dtype).removeprefix("torch.")
            sizes[dtype] += checkpoint.metadata(name).nbytes
    return ", ".join(f"{_mb(size)} of {dtype}" for dtype, size in sizes.items()) or "nothing"


def _summary(report: Report) -> str:
    text, errors = report.calibration, [layer.error for layer in report.layers]
    parts = [f"made by tersor {report.versions.get('tersor', '?')}"]
    parts.append(f"method {report.settings.get('method', '?')}")
    parts.append(f"calibrated on {text.get('tokens', '?')} tokens" if text else "not calibrated")
    if report.sparsity > 0.05:
        parts.append(f"{100 * report.sparsity:.1f} % of these weights are zero")
    if any(layer.sparsity >= 0.49 for layer in report.layers):
        parts.append(
            "those with 2:4 zeros are loaded into a kernel that leaves them out, if that "
            "measures faster"
        )
    if errors:
        what = "outputs" if text else "weights"
        parts.append(f"relative squared error of {what} {min(errors):.1e} to {max(errors):.1e}")
    if count := len(report.departures):
        treated = "1 module was" if count == 1 else f"{count} modules were"
        parts.append(f"{treated} not treated as asked, see tersor_report.json")
    return ", ".join(parts)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.2f} MB"
