"""LoftQ (Li et al., arXiv:2310.08659): a quantized base and adapters that begin by cancelling what
the quantization lost, so that fine-tuning starts near the original model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tersor.adapters.codebook import Codebook, CodebookWeight, quantize_codebook
from tersor.adapters.lora import (
    add_lora,
    check_free,
    import_peft,
    in_experts,
    refuse_experts,
)
from tersor.adapters.nf4_linear import NF4Linear
from tersor.calibrate import GramStats, capture
from tersor.errors import TersorError
from tersor.layerwise import Solver, find_solver
from tersor.linear import QuantLinear
from tersor.qweight import QWeight, Scheme
from tersor.scope import check_inputs
from tersor.svd import decompose, root_of
from tersor.walk import check_model, read_inputs, replace_linear, walking

WEIGHTINGS = ("none", "activation")


@dataclass(frozen=True)
class LoftQ:
    """iterations: of quantizing W - B A and fitting B A to what is left; the best of them is kept.
    weighting: "none" makes the error of the weight small, as published; "activation" that of the
        outputs on the calibration inputs, by an SVD weighted with their second moments.
    damp: of those, as a share of their mean.
    """

    iterations: int = 1
    weighting: str = "none"
    damp: float = 0.01

    def __post_init__(self) -> None:
        if type(self.iterations) is not int or self.iterations < 1:
            raise TersorError(f"iterations is at least 1, not {self.iterations!r}; 1 to 5 is usual")
        if self.weighting not in WEIGHTINGS:
            raise TersorError(f"weighting is {' or '.join(WEIGHTINGS)}, not {self.weighting!r}")
        if not 0 < self.damp < 1:
            raise TersorError(f"damp must be between 0 and 1, not {self.damp}; 0.01 is usual")


@dataclass(frozen=True)
class LoftQLayer:
    """A linear. rank: of its adapter, 0 without one. plain, error: ‖E‖² / ‖W‖² of plain
    quantization and of what came out, in the norm that was asked for: of the weight, or of its
    outputs."""

    name: str
    rank: int
    plain: float
    error: float


class Quantized(Protocol):
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor: ...


def cancel(
    w: Tensor,
    quantize: Callable[[Tensor], Quantized],
    rank: int,
    iterations: int = 1,
    root: Tensor | None = None,
) -> tuple[Quantized, Tensor, Tensor, tuple[float, float]]:
    """Q, b [n, rank] and a [rank, k] with Q + b a close to w [n, k]; and the relative squared
    errors of plain quantization and of the result.

    quantize: of a weight like w. root: of the norm (see tersor.svd.root_of), None: of the weight's.
    rank: 0 only quantizes.
    """
    work = w.detach() if w.dtype == torch.float64 else w.detach().float()
    weighed = work if root is None else (work.to(root.dtype) @ root)
    total = float(weighed.double().square().sum()) or 1.0
    b, a = work.new_zeros(w.shape[0], rank), work.new_zeros(rank, w.shape[1])
    best: tuple[Quantized, Tensor, Tensor] | None = None
    plain = least = 0.0
    for step in range(iterations if rank else 1):
        q = quantize((work - b @ a).to(w.dtype))
        found = decompose(work - q.dequantize(work.dtype), root)
        b, a = found.factors(rank)
        error = found.tail(rank) / total
        if step == 0:
            plain = found.tail(0) / total
        if best is None or error < least:
            best, least = (q, b, a), error
    assert best is not None  # of at least one iteration
    return *best, (plain, least)


def loftq_model(
    model: nn.Module,
    config: Any = None,
    *,
    to: Scheme | Codebook,
    method: str | Solver = "rtn",
    calibration: Tensor | Iterable[Any] | None = None,
    settings: LoftQ | None = None,
    ignore: Sequence[str] = (),
) -> tuple[Any, list[LoftQLayer]]:
    """Quantizes a model and puts LoRA adapters on it that cancel the error; returns the
    peft.PeftModel, and what came of each linear.

    model: the original, on the CPU; changed in place.
    config: a peft.LoraConfig; ranks, alphas and targets as in tersor.add_lora, which are among the
        linears that quantize_model takes. Those that it does not target are only quantized.
    to: a Scheme, by `method`, a solver that quantizes ("rtn", "gptq"); or NF4(...) or FP4(...), for
        QLoRA.
    calibration, ignore: as in quantize_model; for methods and weightings that need it. Each block
        sees what the ones before it give, their adapters included.

    The quantized base is not the one that quantize_model makes: keep it, by tersor.save (or by
    state_dict() for NF4 and FP4), along with the adapters, which peft saves.
    Raises TersorError, before the model is changed, for bad input.
    """
    peft = import_peft()
    from tersor.adapters.layer import check_settings

    settings = settings or LoftQ()
    config = peft.LoraConfig() if config is None else copy.deepcopy(config)
    if not isinstance(config, peft.LoraConfig):
        raise TersorError(f"config is a peft.LoraConfig, not a {type(config).__name__}")
    config.init_lora_weights = True  # replaced below
    config.loftq_config = {}
    check_settings(config)
    check_free(model)
    check_model(model)
    if isinstance(to, Scheme):
        to.refuse_static("loftq_model sets no scales of inputs")
    solver = _solver(to, method)
    inputs = read_inputs(model, calibration)
    needs = "gptq" if solver is not None and solver.needs is not None else None
    needs = 'weighting="activation"' if settings.weighting == "activation" else needs
    if needs and not inputs:
        raise TersorError(f"{needs} needs inputs to calibrate on; pass token ids as `calibration`")
    with walking(model, inputs, ignore) as walk:
        names = walk.scope.linears
        check_inputs(model, names, to.weight if isinstance(to, Scheme) else None, None)
        ranks = _ranks(model, names, config)
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        done = []
        for block in walk.scope.blocks:
            stats: dict[str, GramStats] = {}
            if inputs:
                firsts = {tap[0]: model.get_submodule(tap[0]) for tap in block.taps}
                stats = capture(firsts, walk.passes(block))
            made = {}
            for tap in block.taps:
                seen = stats.pop(tap[0], None)
                weighted = settings.weighting == "activation"
                root = root_of(seen, settings.damp) if weighted else None
                for name in tap:
                    linear = model.get_submodule(name)
                    quantize = _quantizer(to, solver, seen)
                    try:
                        q, b, a, errors = cancel(
                            linear.weight, quantize, ranks[name], settings.iterations, root
                        )
                    except TersorError as error:
                        raise TersorError(f"{name}: {error}") from error
                    done.append(LoftQLayer(name, ranks[name], *errors))
                    factors[name] = (b, a)
                    made[name] = _layer(q, linear, to)
                    with torch.no_grad():  # what the blocks after this one see
                        linear.weight.copy_(q.dequantize() + b @ a)
            walk.advance(block)
            for name, layer in made.items():
                replace_linear(model, model.get_submodule(name), layer)
    if config.target_modules is None:
        config.target_modules = {name for name in names if ranks[name]}
    adapted = add_lora(model, config)
    _set_factors(adapted, factors)
    return adapted, done


def _solver(to: Scheme | Codebook, method: str | Solver) -> Solver | None:
    if isinstance(to, Codebook):
        if method != "rtn":
            raise TersorError(f"{to} rounds to nearest; leave out method={method!r}")
        return None
    if not isinstance(to, Scheme):
        raise TersorError(f"`to` is a Scheme(QSpec(...)), NF4(...) or FP4(...), not {to!r}")
    solver = find_solver(method)
    if solver.sparsity is not None:
        raise TersorError(f"{solver.name} prunes, and adapters would fill its zeros; use rtn, gptq")
    return solver


def _quantizer(
    to: Scheme | Codebook, solver: Solver | None, stats: GramStats | None
) -> Callable[[Tensor], Any]:
    if isinstance(to, Codebook):
        return lambda w: quantize_codebook(w, to)
    assert solver is not None  # of any scheme
    reached = stats is not None and stats.tokens > 0
    able = solver if reached or solver.needs is None else solver.without_input()
    return lambda w: able(w, stats if reached else None, to.weight)


def _layer(q: Any, linear: nn.Linear, to: Scheme | Codebook) -> nn.Module:
    dtype = linear.weight.dtype
    if isinstance(q, CodebookWeight):
        return NF4Linear(q, linear.bias, dtype)
    assert isinstance(q, QWeight) and isinstance(to, Scheme)
    return QuantLinear(q, linear.bias, to.activation, dtype)


def _ranks(model: nn.Module, names: Sequence[str], config: Any) -> dict[str, int]:
    """The rank of each linear's adapter, 0 without one."""
    from peft.tuners.tuners_utils import (  # type: ignore[import-not-found,unused-ignore]
        check_target_module_exists,
    )
    from peft.utils.other import (  # type: ignore[import-not-found,unused-ignore]
        get_pattern_key,
    )

    everything, experts = config.target_modules in (None, "all-linear"), in_experts(model)
    if everything:
        config.target_modules = None
    else:
        refuse_experts(config, experts)
    aims = copy.copy(config)
    if everything:
        aims.target_modules = set(names) - experts
    ranks = {}
    for name in names:
        aimed = check_target_module_exists(aims, name)
        key = get_pattern_key(config.rank_pattern.keys(), name)
        ranks[name] = config.rank_pattern.get(key, config.r) if aimed else 0
        linear = model.get_submodule(name)
        most = min(linear.in_features, linear.out_features)
        if ranks[name] > most:
            raise TersorError(
                f"rank {ranks[name]} is more than {name} has, {most}; use a smaller r"
            )
    if not any(ranks.values()):
        raise TersorError(
            f"target_modules={config.target_modules!r} matches none of the linears that are "
            f"quantized, which are called like {names[0]}, or exclude_modules leaves none of them"
        )
    return ranks


@torch.no_grad()
def _set_factors(adapted: Any, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    inner = adapted.get_base_model()
    for name, (b, a) in factors.items():
        if b.shape[1]:
            layer = inner.get_submodule(name)
            (adapter,) = layer.lora_A.keys()
            layer.lora_A[adapter].weight.copy_(a)
            layer.lora_B[adapter].weight.copy_(b / layer.scaling[adapter])
