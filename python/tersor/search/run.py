"""The whole search: candidates solved and timed, sensitivities, trials, the front, and the chosen
point as a checkpoint.

Its work is in a folder beside the output until that is whole (see tersor.search.folder).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from tersor.calibrate import Calibration, digest
from tersor.durable import durable, sync_folder
from tersor.errors import TersorError
from tersor.layerwise import check_arguments, machine, settings_of
from tersor.loading import load
from tersor.pipeline import compress_checkpoint
from tersor.progress import Progress
from tersor.report import Report, versions
from tersor.runs import text_windows
from tersor.scope import Scope, check_inputs, settle
from tersor.search.additive import Array
from tersor.search.constraints import Constraint, parse_constraints
from tersor.search.costs import ORIGINAL, Costs, LinearCosts, Shape, add_up, measure
from tersor.search.differentiable import Differentiable, descend
from tersor.search.evolve import Effort, Measured, evolve, require_optuna
from tersor.search.folder import LATENCY, SETTINGS, claim, remove
from tersor.search.front import Front, Point, non_dominated
from tersor.search.problem import Evaluations, Problem
from tersor.search.proposals import perturbed, spread, within
from tersor.search.solutions import Solutions, solve_all
from tersor.search.space import Choice, Space, Unit
from tersor.shards import refuse_existing
from tersor.source import Source

HUGE = 1e6  # in place of a KL that is not finite


def search_checkpoint(
    model: str | Path,
    out: str | Path,
    constraints: str | Sequence[Constraint],
    *,
    calibration: Calibration,
    space: Space | None = None,
    effort: Effort | None = None,
    differentiable: Differentiable | None = None,
    ignore: Sequence[str] = (),
    sequential: bool = False,
    progress: bool | None = None,
) -> Front:
    """Searches what each linear of a Hugging Face checkpoint is to become, and writes the best
    model that keeps the constraints.

    model: a folder with a causal language model and its tokenizer. It is loaded whole, and beside
        it a byte and a little for every weight and candidate.
    out: the folder to make; with front.json in it, and front.svg where matplotlib is installed.
        While the run lasts its work is in `<out>.search`: started again it goes on, and measures
        nothing twice; further trials may be asked for.
    constraints: such as "size<=0.3x,latency<=0.8x" (see Constraint).
    calibration: the text. KL is measured on `effort.windows` more windows of it.
    space: what a linear may become. effort: how hard to look.
    differentiable: train logits (see that class) in place of `effort.trials`; for small models.
    ignore, sequential: as in quantize_checkpoint.

    Every candidate of every linear is solved once, on what the original model gives, and put into
    the model as it is tried. The chosen ones are solved again when the checkpoint is written, each
    block on what the compressed blocks before it give; its KL is measured then (`Front.written`).
    Raises TersorError for bad input, and for constraints that no choice keeps, before any work
    where that can be known.
    """
    text = constraints if isinstance(constraints, str) else ",".join(map(str, constraints))
    wanted = parse_constraints(text)
    if not wanted:
        raise TersorError(
            "a search needs a constraint to choose by, such as size<=0.3x; give --constraint"
        )
    out = Path(os.path.abspath(out))
    work = out.with_name(out.name + ".search")
    if not (work / SETTINGS).exists():
        refuse_existing(out)
    opened = Search.open(model, work, calibration, space, effort, differentiable, ignore)
    with opened as search:
        with Progress(progress) as bar:
            front = search.find(wanted, bar)
        front = front.choose(front.best())
        _write(search, front, out, calibration, ignore, sequential, progress)
        remove(work)
    return front


def _write(
    search: Search,
    front: Front,
    out: Path,
    calibration: Calibration,
    ignore: Sequence[str],
    sequential: bool,
    progress: bool | None,
) -> None:
    """The chosen point as a checkpoint with the front in it, which appears whole. Beside it, in the
    folder of the search, one of another choice may have been begun."""
    assert front.chosen is not None
    assignment = front.assignment(front.points[front.chosen])
    treatments = {name: each.treatment for name, each in assignment.items()}
    settings = json.loads(json.dumps(settings_of(treatments, ignore, sequential)))
    made, fingerprint = out, search.source.checkpoint.fingerprint()
    if not _is_written(out, settings, fingerprint):  # or an earlier run was stopped just after that
        refuse_existing(out)
        name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        made = search.work / f"chosen-{name}"
        if not _is_written(made, settings, fingerprint):
            compress_checkpoint(
                *(search.source.checkpoint.folder, made),
                treatments=treatments,
                calibration=calibration,
                ignore=ignore,
                sequential=sequential,
                device="cpu",  # where the candidates were solved
                progress=progress,
            )
    report = Report.read(made)
    assert report is not None  # it was just written
    quantized = any(each.scheme for each in treatments.values() if each)
    kl = search.problem.compare(load(made) if quantized else _plain(made))
    front.written = {"bytes": report.bytes_after, "kl": kl}
    front.notes += [f"as written, {name}: {why}" for name, why in report.departures.items()]
    if importlib.util.find_spec("matplotlib") is not None:
        try:
            front.draw(made / "front.svg")
        except Exception as error:  # whatever a broken installation makes the drawing raise
            front.notes.append(f"front.svg could not be drawn ({error}); Front.draw draws it again")
    front.save(made)
    if made != out:
        refuse_existing(out)
        os.rename(made, out)
        sync_folder(out.parent)


def _is_written(folder: Path, settings: Mapping[str, Any], fingerprint: str) -> bool:
    """Whether an earlier run of the same search was interrupted after it had written the folder.
    fingerprint: of the checkpoint that is searched."""
    report = Report.read(folder) if folder.is_dir() else None
    if report is None or report.fingerprint != fingerprint:
        return False
    return all(report.settings.get(key) == value for key, value in settings.items())


def _plain(folder: str | Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype="auto", local_files_only=True, trust_remote_code=False
    )
    return model.eval()


@dataclass
class Search:
    """A search in its folder. `open` checks what can be checked before any work; `find` does it.
    Use it in a with statement, or call close(): the folder stays locked until then.

    windows: for calibration, and held: to measure on; int64 [count, length].
    points: all that were measured, by choice, in the order in which they were.
    """

    source: Source
    scope: Scope
    space: Space
    effort: Effort
    work: Path
    units: tuple[Unit, ...]
    windows: Tensor
    held: Tensor
    differentiable: Differentiable | None = None
    lock: int | None = None
    problem: Problem = field(init=False)
    costs: Costs = field(init=False)
    points: dict[Choice, Point] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        model: str | Path,
        work: Path,
        calibration: Calibration,
        space: Space | None = None,
        effort: Effort | None = None,
        differentiable: Differentiable | None = None,
        ignore: Sequence[str] = (),
    ) -> Search:
        """work: the folder of the search, made where it is not there."""
        check_arguments({}, ignore)
        if not isinstance(calibration, Calibration):
            raise TersorError(
                f'calibration is a Calibration, such as Calibration(("text.txt",)), not a '
                f"{type(calibration).__name__}"
            )
        space, effort = space or Space(), effort or Effort()
        if differentiable is not None and effort.seconds is not None:
            raise TersorError(
                "seconds bound trials, in whose place logits are trained; leave seconds out"
            )
        if effort.trials and differentiable is None:
            require_optuna()
        source = Source.open(model)
        if not source.found.arch.causal:
            raise TersorError(
                f"{model} does not predict the next token, by which a search measures what it "
                "finds; give a causal language model"
            )
        scope = settle(source.model, source.found, ignore)
        candidates = space.candidates
        for each in candidates:
            spec = each.scheme.weight if each.scheme else None
            check_inputs(source.model, scope.linears, spec, each.sparsity)
        count = calibration.samples + effort.windows
        windows = text_windows(source, replace(calibration, samples=count), fewer=True)
        if len(windows) < count:
            raise TersorError(
                f"the text has {len(windows)} windows of {windows.shape[1]} tokens, and a search "
                f"needs {count}: {calibration.samples} to calibrate on and {effort.windows} to "
                "measure on; give more text, or fewer --samples, --held-out or --seq-len"
            )
        settings = {
            "model": source.checkpoint.fingerprint(),
            "candidates": [each.to_dict() for each in candidates],
            "granularity": space.granularity,
            "ignore": sorted(set(ignore)),
            "windows": [calibration.samples, effort.windows, windows.shape[1]],
            "text": digest(windows),
            "tokens": effort.tokens,
            **machine(),
            **versions(),
        }
        lock = claim(work, settings)
        held = windows[calibration.samples :]
        return cls(
            source,
            scope,
            space,
            effort,
            work,
            space.units(scope),
            windows[: calibration.samples],
            held,
            differentiable,
            lock,
        )

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder; what was measured stays for the next run."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def find(self, constraints: tuple[Constraint, ...], bar: Progress) -> Front:
        """The front. TersorError where no choice keeps the constraints, or the original does."""
        candidates, effort, source = self.space.candidates, self.effort, self.source
        self._require_change(constraints)
        seconds = self._latency(bar)
        sure = [c for c in constraints if c.name != "latency" or not source.found.arch.experts]
        costs = self._costs(seconds, {})
        within(self._nothing(), costs, tuple(sure))
        if len(sure) == len(constraints):
            self._require_change(constraints, costs.original["latency"])
        with source.loaded(source.where):
            solutions = solve_all(source, self.scope, self.windows, candidates, self.work, bar)
            self.costs = self._costs(seconds, solutions)
            within(self._nothing(), self.costs, constraints)
            self._require_change(constraints, self.costs.original["latency"])
            evaluations = Evaluations(self.work / "kl.jsonl")
            self.problem = Problem(
                source.model, self.units, candidates, solutions, self.held, evaluations
            )
            with self.problem.restored():
                self.problem.remember()
                self._try(constraints, solutions, bar)
        measured = list(self.points.values())
        uniform = [point for point in measured if point.origin == "uniform"]
        return Front(
            model=source.checkpoint.folder.resolve().name,
            units=list(self.units),
            candidates=list(candidates),
            original={name: self.costs.original[name] for name in ("size", "latency")},
            points=non_dominated(measured, self._zeros),
            uniform=uniform,
            evaluated=len(measured),
            constraints=[str(each) for each in constraints],
            settings={
                "granularity": self.space.granularity,
                **asdict(effort),
                "differentiable": self.differentiable and asdict(self.differentiable),
                **machine(),
            },
            notes=[f"{name}: {why}" for name, each in solutions.items() for why in each.departures],
        )

    def _require_change(
        self, constraints: tuple[Constraint, ...], latency: float | None = None
    ) -> None:
        """TersorError where the original, which may be chosen, keeps the constraints. latency: of
        its linears in seconds, where that is known already."""
        if not constraints or not any(each.untouched for each in self.space.candidates):
            return
        for each in constraints:
            # It has none of the zeros that sparsity is about.
            own = {"size": self.source.nbytes, "latency": latency, "sparsity": None}[each.name]
            takes = 1.0 if each.relative else own
            if takes is None or takes > each.limit(takes) * (1 + 1e-9):
                return
        bounds = ", ".join(map(str, constraints))
        raise TersorError(f"the original keeps {bounds} as it is; give a tighter --constraint")

    @property
    def _zeros(self) -> bool:
        """Whether zeros are a goal: they cost nothing less than other weights but where a kernel
        leaves them out."""
        return any(each.sparsity for each in self.space.candidates)

    def _try(
        self,
        constraints: tuple[Constraint, ...],
        solutions: Mapping[str, Solutions],
        bar: Progress,
    ) -> None:
        effort, candidates = self.effort, self.space.candidates
        bar.expect(len(candidates))
        for number in range(len(candidates)):
            bar.say("measuring one candidate everywhere")
            self._measure((number,) * len(self.units), "uniform", constraints)
            bar.step()
        losses = self._losses(solutions, bar)
        count = max(2, min(effort.population, effort.trials or effort.population))
        first = spread(losses, self.costs, constraints, count, self._zeros)
        if constraints:
            uniform = [choice for choice, point in self.points.items() if point.feasible]
            half = first[: count - count // 2]
            noisy = perturbed(losses, self.costs, constraints, count // 2, effort.seed)
            first = list(dict.fromkeys([*half, *noisy, *uniform]))
        bar.expect(max(len(first), effort.trials))
        bar.say("measuring what the sensitivities propose")
        for choice in first:
            self._measure(choice, "additive", constraints)
            bar.step()
        if self.differentiable is not None:
            self._descend(self.differentiable, solutions, constraints, bar)
        elif effort.trials > len(first):
            bar.say("searching")
            self._evolve(first, constraints, bar)

    def _descend(
        self,
        settings: Differentiable,
        solutions: Mapping[str, Solutions],
        constraints: tuple[Constraint, ...],
        bar: Progress,
    ) -> None:
        self.problem.assemble((ORIGINAL,) * len(self.units))
        bar.expect(settings.steps * len(settings.strengths))
        bar.say("training the shares of the candidates")
        for choice in descend(
            *(self.source.model, self.units, self.space.candidates, solutions, self.windows),
            *(self.costs, settings, bar.step),
        ):
            self._measure(choice, "differentiable", constraints)

    def _evolve(
        self, first: Sequence[Choice], constraints: tuple[Constraint, ...], bar: Progress
    ) -> None:
        original = self.costs.original | {"sparsity": 1.0}

        def measure_trial(choice: Choice) -> Measured:
            new = choice not in self.points
            point = self._measure(choice, self.effort.sampler, constraints)
            if new:
                bar.step()
            excess = {}
            for each in constraints:
                excess[each.name] = point.cost(each.name) / each.limit(original[each.name]) - 1
            zeros = (-point.zeros,) if self._zeros else ()
            return Measured((point.bytes, point.latency, point.kl, *zeros), excess)

        evolve(len(self.units), len(self.space.candidates), first, measure_trial, self.effort)

    def _measure(self, choice: Choice, origin: str, constraints: tuple[Constraint, ...]) -> Point:
        if choice not in self.points:
            nbytes, seconds, zeros = self.costs.of(choice)
            point = Point(choice, nbytes, seconds, self.problem.kl(choice), zeros, origin)
            original = self.costs.original | {"sparsity": 1.0}
            feasible = point.keeps(constraints, original)
            self.points[choice] = replace(point, feasible=feasible)
        return self.points[choice]

    def _losses(self, solutions: Mapping[str, Solutions], bar: Progress) -> Array:
        """The sensitivity of every unit to every candidate, float64 [units, candidates]."""
        candidates = self.space.candidates
        if self.effort.sensitivity == "error":
            errors = [
                np.sum([solutions[name].errors for name in unit.linears], axis=0)
                for unit in self.units
            ]
            return np.array(errors, dtype=np.float64)
        losses = self._nothing()
        bar.expect(losses.size)
        bar.say("measuring the sensitivity of each layer")
        for unit, number in np.ndindex(losses.shape):
            alone = [ORIGINAL] * len(self.units)
            alone[unit] = number
            loss = 0.0 if candidates[number].untouched else self.problem.kl(alone)
            losses[unit, number] = min(loss, HUGE)
            bar.step()
        return losses

    def _nothing(self) -> Array:
        return np.zeros((len(self.units), len(self.space.candidates)))

    def _costs(
        self, seconds: Mapping[Shape, Sequence[float]], solutions: Mapping[str, Solutions]
    ) -> Costs:
        """With the share of tokens that each linear sees, where that is known already."""
        source, linears = self.source, {}
        for name, shape in self._shapes().items():
            stored = source.checkpoint.metadata(source.where[f"{name}.weight"].name).torch_dtype
            calls = solutions[name].calls if name in solutions else 1.0
            linears[name] = LinearCosts.of(
                shape, self.space.candidates, stored, source.dtype, calls
            )
        return add_up(self.units, linears, seconds, source.nbytes, self.effort.tokens)

    def _shapes(self) -> dict[str, Shape]:
        modules = {name: self.source.model.get_submodule(name) for name in self.scope.linears}
        return {name: (each.out_features, each.in_features) for name, each in modules.items()}

    def _latency(self, bar: Progress) -> dict[Shape, list[float]]:
        """Seconds by shape, of the original and each candidate: measured once, then read."""
        path, shapes = self.work / LATENCY, set(self._shapes().values())
        known: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}
        found: dict[Shape, list[float]] = {}
        bar.expect(len(shapes))
        for n, k in sorted(shapes):
            bar.say(f"timing linears of {n} x {k}")
            key = f"{n} x {k}"
            if key not in known:
                args = (self.space.candidates, self.effort.tokens, self.source.dtype)
                known[key] = measure((n, k), *args)
                with durable(path) as file:
                    file.write(json.dumps(known).encode())
            found[n, k] = known[key]
            bar.step()
        return found
