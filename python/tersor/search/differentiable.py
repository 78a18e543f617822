"""The differentiable search: logits over what each unit becomes are trained with a cost term.

As in DNAS for mixed precision (Wu et al., arXiv:1812.00090), the weight of a linear is a mixture of
its candidates, the shares a Gumbel softmax of logits whose temperature falls, so that a mixture
becomes a choice. What is trained is the logits alone, of bits, of masks and of methods, on

    KL(original ‖ mixture) + λ Σ_cost E[cost] / cost of the original,

the expectation over the shares. One training for each λ; the likeliest candidates are its choice.
For models of which a float32 copy of the weights fits in memory once for each candidate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.activations import rounded
from tersor.errors import TersorError
from tersor.qweight import ActSpec
from tersor.search.costs import Costs
from tersor.search.solutions import Solutions
from tersor.search.space import Candidate, Choice, Unit

COSTS = ("size", "latency")


@dataclass(frozen=True)
class Differentiable:
    """strengths: the λ, a training for each. costs: that are summed, "size", "latency" or both.
    steps: of each training. windows: of text in a step. rate: of Adam. temperatures: of the softmax
    at the first and the last step, falling geometrically. seed: of noise and of the windows'
    order."""

    strengths: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    costs: tuple[str, ...] = ("size",)
    steps: int = 60
    windows: int = 1
    rate: float = 0.2
    temperatures: tuple[float, float] = (3.0, 0.3)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.strengths or not all(0 <= each < float("inf") for each in self.strengths):
            raise TersorError(f"strengths are numbers from 0 on, not {self.strengths}")
        if not self.costs or not set(self.costs) <= set(COSTS):
            raise TersorError(f"costs are some of {', '.join(COSTS)}, not {self.costs}")
        if self.steps < 1 or self.windows < 1:
            raise TersorError("a training has at least one step, and a step one window")
        if not self.rate > 0 or not all(each > 0 for each in self.temperatures):
            raise TersorError("the rate and both temperatures must be more than 0")


class Shares(nn.Module):
    """The logits of every unit: of a grid, of zeros and of a method, which a candidate adds up.

    Only what differs among the candidates has logits: with one method there are none of methods.
    """

    def __init__(self, units: int, candidates: Sequence[Candidate]) -> None:
        super().__init__()
        self.logits = nn.ParameterList()
        self._levels: list[Tensor] = []  # of each candidate: int64 [candidates]
        for values in (
            [each.scheme for each in candidates],
            [each.sparsity for each in candidates],
            [each.method for each in candidates],
        ):
            known = list(dict.fromkeys(values))
            if len(known) > 1:
                self.logits.append(nn.Parameter(torch.zeros(units, len(known))))
                self._levels.append(torch.tensor([known.index(value) for value in values]))

    def scores(self) -> Tensor:
        """float32 [units, candidates]."""
        columns = zip(self.logits, self._levels, strict=True)
        return torch.stack([logits[:, level] for logits, level in columns]).sum(0)

    def draw(self, temperature: float, random: torch.Generator) -> Tensor:
        """Shares that add up to 1 in each unit, [units, candidates]: a Gumbel softmax (Jang et al.,
        arXiv:1611.01144)."""
        scores = self.scores()
        uniform = torch.rand(scores.shape, generator=random).clamp(1e-9, 1 - 1e-6)
        return torch.softmax((scores - (-uniform.log()).log()) / temperature, dim=-1)

    def choice(self) -> Choice:
        """The likeliest candidate of each unit; of equal ones the first."""
        return tuple(int(number) for number in self.scores().argmax(-1))


class Mixture(nn.Module):
    """A linear whose weight is a mixture of candidates. shares: set before it is called,
    [candidates].

    weights: float32 [candidates, n, k], frozen. rounded: bool [candidates], where inputs are
    rounded too.
    """

    shares: Tensor | None = None

    def __init__(
        self, weights: Tensor, bias: Tensor | None, rounded: Tensor, activation: ActSpec | None
    ) -> None:
        super().__init__()
        self.register_buffer("weights", weights.flatten(1))
        self.register_buffer("bias", bias)
        self.register_buffer("rounded", rounded)
        self.activation, self.shape = activation, weights.shape[1:]

    def forward(self, x: Tensor) -> Tensor:
        assert self.shares is not None  # set by who calls the model
        weight = (self.shares @ self.get_buffer("weights")).view(self.shape)
        if self.activation is not None:
            share = (self.shares * self.rounded).sum()
            # As if rounding were the identity, for gradients (Bengio et al., 2013).
            x = x + share * (rounded(x.detach(), self.activation).to(x.dtype) - x.detach())
        bias = self._buffers["bias"]
        return F.linear(x, weight, bias)


def descend(
    model: nn.Module,
    units: Sequence[Unit],
    candidates: Sequence[Candidate],
    solutions: Mapping[str, Solutions],
    windows: Tensor,
    costs: Costs,
    settings: Differentiable,
    tick: Callable[[], None] = lambda: None,
) -> list[Choice]:
    """One choice for each strength. The same for the same arguments and number of threads.

    model: causal, with its original weights; it is not changed. windows: int64 [count, length].
    tick: called after every step.
    """
    teacher = copy.deepcopy(model).float().eval().requires_grad_(False)
    student = copy.deepcopy(teacher)
    mixtures = [
        [_mix(student, name, solutions[name], candidates) for name in unit.linears]
        for unit in units
    ]
    taken = torch.zeros(len(units), len(candidates))
    for name in settings.costs:
        table = torch.from_numpy(costs.table(name)).float()
        taken += table / costs.original[name]
    found = []
    for strength in settings.strengths:
        random = torch.Generator().manual_seed(settings.seed)
        shares = Shares(len(units), candidates)
        optimizer = torch.optim.Adam(shares.parameters(), lr=settings.rate)
        for step in range(settings.steps):
            chosen = torch.randint(len(windows), (settings.windows,), generator=random)
            first, last = settings.temperatures
            temperature = first * (last / first) ** (step / max(1, settings.steps - 1))
            drawn = shares.draw(temperature, random)
            for unit, row in zip(mixtures, drawn, strict=True):
                for mixture in unit:
                    mixture.shares = row
            ids = windows[chosen]
            with torch.no_grad():
                wanted = teacher(ids, use_cache=False).logits.log_softmax(-1)
            given = student(ids, use_cache=False).logits.log_softmax(-1)
            kl = F.kl_div(given, wanted, log_target=True, reduction="sum") / ids.numel()
            loss = kl + strength * (drawn * taken).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tick()
        found.append(shares.choice())
    return found


def _mix(
    model: nn.Module, name: str, solutions: Solutions, candidates: Sequence[Candidate]
) -> Mixture:
    """Puts a mixture in the place of a linear."""
    linear = model.get_submodule(name)
    before = linear.weight.detach()
    weights = [solutions.weight(number, torch.float32) for number in range(len(candidates))]
    schemes = [candidate.scheme for candidate in candidates]
    activations = [scheme.activation if scheme else None for scheme in schemes]
    mixture = Mixture(
        torch.stack([before if weight is None else weight.float() for weight in weights]),
        None if linear.bias is None else linear.bias.detach(),
        torch.tensor([each is not None for each in activations]),
        next(filter(None, activations), None),
    )
    model.set_submodule(name, mixture)
    return mixture
