"""The front that a search found: the models that no other one beats in bytes, seconds and KL."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.durable import durable
from tersor.errors import TersorError
from tersor.search.constraints import Constraint, parse_constraints, show
from tersor.search.space import Candidate, Unit

if TYPE_CHECKING:
    from rich.table import Table

FRONT = "front.json"


@dataclass(frozen=True)
class Point:
    """A model that was measured.

    choice: the number of a candidate for each unit.
    bytes: of all tensors of its checkpoint. latency: seconds of the linears in its blocks.
    kl: KL(original ‖ it), nats per token. zeros: share of its linears' weights.
    origin: how it was found: "uniform", "additive", the sampler, or "differentiable".
    feasible: it keeps all constraints.
    """

    choice: tuple[int, ...]
    bytes: int
    latency: float
    kl: float
    zeros: float
    origin: str
    feasible: bool = True

    def cost(self, name: str) -> float:
        """What a constraint of that name bounds from above (of sparsity: the share of weights that
        are not zero)."""
        costs = {"size": self.bytes, "latency": self.latency, "sparsity": 1 - self.zeros}
        return float(costs[name])

    def keeps(self, constraints: Iterable[Constraint], original: Mapping[str, float]) -> bool:
        """original: what the original takes; of sparsity 1."""
        return all(
            self.cost(each.name) <= each.limit(original[each.name]) * (1 + 1e-9)
            for each in constraints
        )


def non_dominated(points: Iterable[Point], zeros: bool = False) -> list[Point]:
    """The points that no other one beats: at most as many bytes, seconds and KL, and less of one.

    zeros: more of them count as well, as where a share of zeros is searched for. Of equal points
    the first stays. In the order of bytes, from few to many.
    """

    def goals(point: Point) -> tuple[float, ...]:
        more = (-point.zeros,) if zeros else ()
        return (point.bytes, point.latency, point.kl, *more)

    front: list[tuple[tuple[float, ...], Point]] = []
    # Whoever beats a point comes before it in this order, so that one pass is enough.
    for point in sorted(points, key=goals):
        mine = goals(point)
        if not any(all(a <= b for a, b in zip(other, mine, strict=True)) for other, _ in front):
            front.append((mine, point))
    return [point for _, point in front]


@dataclass
class Front:
    """What a search found.

    units, candidates: what a point's choice numbers. original: bytes ("size"), seconds
        ("latency") of the original. points: that no other one beats. uniform: the models with one
        candidate everywhere, beaten or not, to compare with. evaluated: how many models were
        measured. constraints: that were asked for. settings: of the search. chosen: the number of
        the point that was written, or None.
    written: bytes and KL of the checkpoint, measured once it was: its linears are solved again, on
        what the compressed ones before them give. KL is that on the text by which the point was
        chosen; `tersor eval` tells it on another one.
    notes: what was not done as asked, such as for an expert that no token reached.
    """

    model: str
    units: list[Unit]
    candidates: list[Candidate]
    original: dict[str, float]
    points: list[Point]
    uniform: list[Point] = field(default_factory=list)
    evaluated: int = 0
    constraints: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    chosen: int | None = None
    written: dict[str, float] | None = None
    notes: list[str] = field(default_factory=list)

    def best(self, constraints: str | Sequence[Constraint] | None = None) -> Point:
        """The point with the least KL that keeps the constraints, by default those of the search;
        of equal ones the smallest. TersorError where none does."""
        if constraints is None:
            constraints = ",".join(self.constraints)
        if isinstance(constraints, str):
            constraints = parse_constraints(constraints)
        original = self.original | {"sparsity": 1.0}
        kept = [point for point in self.points if point.keeps(constraints, original)]
        if not kept:
            least = ", ".join(
                f"{name} {show(name, min(point.cost(name) for point in self.points))}"
                for name in ("size", "latency")
            )
            raise TersorError(
                f"no point of the front keeps {', '.join(map(str, constraints))}; the least there "
                f"is: {least}; search with that constraint, or relax it"
            )
        return min(kept, key=lambda point: (point.kl, point.bytes, point.latency))

    def assignment(self, point: Point) -> dict[str, Candidate]:
        """What each linear becomes, by path."""
        return {
            linear: self.candidates[number]
            for unit, number in zip(self.units, point.choice, strict=True)
            for linear in unit.linears
        }

    def to_json(self) -> str:
        content = asdict(self)
        content["candidates"] = [candidate.to_dict() for candidate in self.candidates]
        # JSON has no infinity: a KL that is not finite is null.
        for each in (*content["points"], *content["uniform"], content["written"] or {}):
            if not math.isfinite(each.get("kl", 0.0)):
                each["kl"] = None
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, folder: Path) -> Path:
        """Writes front.json into a folder, whole or not at all."""
        path = folder / FRONT
        with durable(path) as file:
            file.write(self.to_json().encode())
        return path

    @classmethod
    def read(cls, path: str | Path) -> Front:
        """From a file, or the folder that it is in; TersorError where there is none."""
        path = Path(path) / FRONT if Path(path).is_dir() else Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for each in (*content["points"], *content["uniform"], content["written"] or {}):
                if each and each["kl"] is None:
                    each["kl"] = math.inf
            for name in ("points", "uniform"):
                content[name] = [
                    Point(**(each | {"choice": tuple(each["choice"])})) for each in content[name]
                ]
            content["units"] = [
                Unit(each["name"], tuple(each["linears"])) for each in content["units"]
            ]
            content["candidates"] = [Candidate.from_dict(each) for each in content["candidates"]]
            return cls(**content)
        except FileNotFoundError:
            raise TersorError(f"{path} is not there; give a folder of tersor search") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TersorError(f"{path} is no front of a search ({error}); search again") from None

    def choose(self, point: Point) -> Front:
        """The same with a point marked as the one that is written."""
        return replace(self, chosen=self.points.index(point))

    def draw(self, path: str | Path) -> Path:
        """KL over bytes, and over seconds beside it, into a .svg or .png file: the front, the
        models with one candidate everywhere, and the constraints. Needs matplotlib."""
        path = Path(path)
        if path.suffix not in (".svg", ".png"):
            raise TersorError(f"{path} must end in .svg or .png")
        try:
            figures = importlib.import_module("matplotlib.figure")
            matplotlib = importlib.import_module("matplotlib")
        except ImportError as error:
            raise TersorError(
                "a front is drawn with matplotlib, which is not installed; run "
                "pip install 'tersor[report]'"
            ) from error
        bounds = {each.name: each for each in parse_constraints(",".join(self.constraints))}
        with matplotlib.rc_context({"svg.hashsalt": "tersor", "svg.fonttype": "none"}):
            figure = figures.Figure(figsize=(11, 4.5), layout="constrained")
            axes = figure.subplots(1, 2, sharey=True)
            for axis, name, unit in zip(axes, ("size", "latency"), (1e6, 1e-3), strict=True):
                self._draw(axis, name, unit, bounds.get(name))
            axes[0].set(xlabel="checkpoint (MB)", ylabel="KL from the original (nats per token)")
            axes[1].set(xlabel=f"linears, {self.settings.get('tokens', 1)} token(s) (ms)")
            axes[0].legend()
            # Without a date the same front is the same file.
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, metadata=metadata)
        return path

    def _draw(self, axis: Any, name: str, unit: float, bound: Constraint | None) -> None:
        for points, mark, label in (
            (self.points, "o", "front"),
            (self.uniform, "s", "one candidate everywhere"),
        ):
            shown = [point for point in points if point.kl > 0]  # the axis is logarithmic
            axis.plot(
                [point.cost(name) / unit for point in shown],
                [point.kl for point in shown],
                mark,
                label=label,
                markersize=4 if mark == "o" else 7,
                fillstyle="full" if mark == "o" else "none",
            )
        for point in self.uniform:
            if point.kl > 0:
                label = str(self.candidates[point.choice[0]])
                at = (point.cost(name) / unit, point.kl)
                axis.annotate(label, at, (6, 3), textcoords="offset points", fontsize=7)
        if self.chosen is not None:
            point = self.points[self.chosen]
            axis.plot([point.cost(name) / unit], [point.kl], "k*", markersize=12, label="chosen")
        if bound is not None:
            axis.axvline(bound.limit(self.original[name]) / unit, color="grey", linestyle=":")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)


def table(front: Front, rows: int = 16) -> Table:
    """The front for people: at most so many of its points, spread evenly, the chosen one among
    them, with how many linears became what."""
    from rich.table import Table

    count = len(front.points)
    rows = min(rows, count)
    numbers = sorted({round(i * (count - 1) / max(1, rows - 1)) for i in range(rows)})
    if front.chosen is not None:
        numbers = sorted({*numbers, front.chosen})
    pruned = any(point.zeros > 0 for point in front.points)
    shown = Table(title=f"{len(numbers)} of {count} points of the front")
    for head in ("", "MB", "of original", "ms", "of original", "KL", *["zeros"] * pruned):
        shown.add_column(head, justify="right")
    for head in ("linears", "found by"):
        shown.add_column(head)
    for number in numbers:
        point = front.points[number]
        counts: dict[str, int] = {}
        for candidate in front.assignment(point).values():
            counts[str(candidate)] = counts.get(str(candidate), 0) + 1
        mark = "chosen" if number == front.chosen else "" if point.feasible else "too much"
        cells = [
            mark,
            f"{point.bytes / 1e6:.2f}",
            f"{point.bytes / front.original['size']:.3f}",
            f"{1e3 * point.latency:.3f}",
            f"{point.latency / front.original['latency']:.3f}",
            f"{point.kl:.4f}",
            *[f"{100 * point.zeros:.1f} %"] * pruned,
            ", ".join(f"{count} {name}" for name, count in counts.items()),
            point.origin,
        ]
        shown.add_row(*cells, style="bold" if mark == "chosen" else None)
    return shown
