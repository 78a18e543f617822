"""The search itself, with optuna: choices are bred (NSGA-II) or proposed by a model of those seen
before (TPE), and every one of them is measured."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tersor.errors import TersorError
from tersor.search.space import Choice

SAMPLERS = {"nsga2": "NSGAIISampler", "tpe": "TPESampler"}
WORST = 1e9  # in place of a KL that is not finite, which optuna cannot rank


@dataclass(frozen=True)
class Effort:
    """How hard to look.

    trials: choices that are tried, those that the search begins with among them; 0 for none beyond
        what the sensitivities propose. seconds: that trials may take before no new one is begun, or
        None; solving, timing and sensitivities come before and are not counted.
    sampler: "nsga2", evolution (Deb et al., 2002), or "tpe", Bayesian (Bergstra et al., 2011).
    population: of the evolution; also how many choices it begins with, each the best by
        sensitivity for another bound.
    sensitivity: of a linear to a candidate, by which it begins. "kl": the KL of the model with that
        candidate there alone, measured; "error": the relative error of its outputs, for nothing.
    windows: of text, on which KL is measured, beyond those of the calibration.
    tokens: in a call, for latencies; 1 is what writing a text is made of.
    seed: of the sampler. With the same one, the same trials and no limit of time, the result is the
        same, whether or not the run was interrupted.
    """

    trials: int = 200
    seconds: float | None = None
    sampler: str = "nsga2"
    population: int = 24
    sensitivity: str = "kl"
    windows: int = 8
    tokens: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise TersorError(f"sampler must be one of {', '.join(SAMPLERS)}, not {self.sampler!r}")
        if self.sensitivity not in ("kl", "error"):
            raise TersorError(f'sensitivity is "kl" or "error", not {self.sensitivity!r}')
        for name, least in (
            *(("trials", 0), ("population", 2), ("windows", 1), ("tokens", 1), ("seed", 0)),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise TersorError(f"{name} must be a whole number from {least} on, not {value!r}")
        if self.seconds is not None and not self.seconds > 0:
            raise TersorError(f"seconds must be more than 0, not {self.seconds}; None is no limit")
        if self.seconds is not None and not self.trials:
            raise TersorError("seconds bound trials, and there are none; leave seconds out")


@dataclass(frozen=True)
class Measured:
    """What a trial came to. goals: each to be small. excess: of every constraint, the share by
    which it is broken, at most 0 where it is kept."""

    goals: tuple[float, ...]
    excess: Mapping[str, float]


def require_optuna() -> Any:
    """The package; TersorError where it is not installed."""
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise TersorError(
            "the search needs optuna, which is not installed; run pip install 'tersor[search]', or "
            "do without it (--trials 0, --differentiable)"
        ) from error


def evolve(
    units: int,
    candidates: int,
    first: Sequence[Choice],
    measure: Callable[[Choice], Measured],
    effort: Effort,
) -> None:
    """Tries effort.trials choices, of which `first` are the first ones.

    measure: is called for each, and ought to remember: choices come again. What is feasible is
    preferred to what is not (constrained domination).
    """
    optuna = require_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Optuna 5 is told of constraints by the trial, older releases by a function of the sampler.
    told = hasattr(optuna.trial.Trial, "set_constraint")
    settings: dict[str, Any] = {"seed": effort.seed}
    if effort.sampler == "nsga2":
        settings["population_size"] = max(2, len(first))
    if not told:
        settings["constraints_func"] = lambda trial: trial.user_attrs["excess"]

    def objective(trial: Any) -> tuple[float, ...]:
        choice = tuple(trial.suggest_int(f"u{unit}", 0, candidates - 1) for unit in range(units))
        measured = measure(choice)
        for name, excess in measured.excess.items():
            if told:
                trial.set_constraint(name, excess)
        trial.set_user_attr("excess", list(measured.excess.values()))
        return tuple(goal if math.isfinite(goal) else WORST for goal in measured.goals)

    with warnings.catch_warnings():
        for category in (optuna.exceptions.ExperimentalWarning, FutureWarning):
            warnings.simplefilter("ignore", category)  # of what optuna will change
        kind = getattr(optuna.samplers, SAMPLERS[effort.sampler])
        sampler = _beginning_with(first, kind)(**settings)
        goals = len(measure(first[0]).goals)
        study = optuna.create_study(directions=["minimize"] * goals, sampler=sampler)
        study.optimize(objective, n_trials=effort.trials, timeout=effort.seconds)


def _beginning_with(first: Sequence[Choice], sampler: Any) -> Any:
    """The class of a sampler whose first trials are these. (Trials that are put into the queue of a
    study are in no generation of the evolution.)"""

    def sample_independent(self: Any, study: Any, trial: Any, name: str, values: Any) -> Any:
        if trial.number < len(first):
            return first[trial.number][int(name.removeprefix("u"))]
        return sampler.sample_independent(self, study, trial, name, values)

    return type(sampler.__name__, (sampler,), {"sample_independent": sample_independent})
