"""Linears as products of two smaller ones: W [n, k] ≈ B [n, r] A [r, k], by a singular value
decomposition of the weight, or of the weight in the norm of its outputs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.calibrate import GramStats, capture
from tersor.checkpoint import Checkpoint, check_finite
from tersor.durable import durable
from tersor.errors import TersorError
from tersor.models import build_skeleton, check_all_used, fill, find_arch, stored
from tersor.models.linears import is_conv1d, is_fused
from tersor.shards import refuse_existing
from tersor.surgery.smaller import is_number, parameters
from tersor.svd import decompose, root_of
from tersor.walk import check_model, read_inputs, replace_linear, walking

# In config.json the model type, so that programs which do not know it refuse the folder instead of
# making up the weights that they miss; and the entry with the original type, and the rank of each
# linear by its path.
ENTRY = "tersor_factorized"


class LowRankLinear(nn.Module):
    """y = up(down(x)): two nn.Linear, k -> r without a bias and r -> n with that of the linear.

    Both are ordinary and can be trained.
    """

    def __init__(self, k: int, n: int, rank: int, bias: bool, **place: Any) -> None:
        """place: device and dtype, as nn.Linear takes them."""
        super().__init__()
        self.in_features, self.out_features, self.rank = k, n, rank
        self.down = nn.Linear(k, rank, bias=False, **place)
        self.up = nn.Linear(rank, n, bias=bias, **place)

    def forward(self, x: Tensor) -> Tensor:
        """[..., k] -> [..., n]"""
        y: Tensor = self.up(self.down(x))
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


@dataclass(frozen=True)
class FactorizedLayer:
    """A linear. rank: of the product, or None where it stayed as it was.

    weight_error: ‖W - B A‖² / ‖W‖². output_error: the same of its outputs on the calibration
    inputs; None without. before, after: numbers of weights.
    """

    name: str
    rank: int | None
    weight_error: float
    output_error: float | None
    before: int
    after: int


@dataclass(frozen=True)
class FactorReport:
    """parameters_before, parameters_after: of the whole model, what is tied once. kept: linears
    that stayed as they were, each with the reason."""

    parameters_before: int
    parameters_after: int
    layers: list[FactorizedLayer] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


def factorize_model(
    model: nn.Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    calibration: Tensor | Iterable[Any] | None = None,
    damp: float = 0.01,
    ignore: Sequence[str] = (),
) -> FactorReport:
    """Puts a LowRankLinear in the place of the model's linears where that saves weights.

    model: of transformers or not, on the CPU, changed in place. The linears are those that
        quantize_model takes.
    rank, energy: one of them: the rank of every product; or the share of the sum of squared
        singular values that each is to keep, from above 0 to 1, which gives every linear a rank of
        its own. A linear that would not become smaller stays as it is: see `kept` of the report.
    calibration: as in quantize_model. With it the outputs' error is made least, by whitening with
        the Cholesky factor of the inputs' second moments (SVD-LLM, Wang et al., arXiv:2403.07378);
        each block is observed on what the ones before it give now. Without it, the weight's.
    damp: of the second moments, as a share of their mean.
    ignore: as in quantize_model.

    save_factorized writes the model, and tersor.load and load_factorized read it.
    Raises TersorError, before the model is changed, for bad input or where nothing would be saved.
    """
    _check_settings(rank, energy, damp)
    check_model(model)
    _check_plain(model)
    inputs = read_inputs(model, calibration)
    before = parameters(model)
    layers: list[FactorizedLayer] = []
    with torch.no_grad(), walking(model, inputs, ignore) as walk:
        names, kept = walk.scope.linears, walk.scope.kept | walk.scope.departures
        for name in names:
            check_finite(f"{name}.weight", model.get_submodule(name).weight)
        if rank is not None and not any(_saves(model.get_submodule(n), rank) for n in names):
            least = max(_break_even(model.get_submodule(n)) for n in names)
            raise TersorError(
                f"rank {rank} makes no linear smaller; the largest that would is {least}"
            )
        for block in walk.scope.blocks:
            stats: dict[str, GramStats] = {}
            if inputs:
                firsts = {tap[0]: model.get_submodule(tap[0]) for tap in block.taps}
                stats = capture(firsts, walk.passes(block))
            for tap in block.taps:
                seen = stats.pop(tap[0], None)
                root = root_of(seen, damp)
                for name in tap:
                    linear = model.get_submodule(name)
                    if rank is not None and not _saves(linear, rank):
                        layers.append(_unchanged(name, linear))
                        continue
                    made, done = _factorized(name, linear, rank, energy, seen, root)
                    if made is not None:
                        replace_linear(model, linear, made)
                    layers.append(done)
            walk.advance(block)
    if all(layer.rank is None for layer in layers):  # and nothing was replaced
        raise TersorError(
            f"energy {energy} makes no linear smaller: its factors would have as many weights; "
            "ask for less energy, or give a rank"
        )
    for layer in layers:
        if layer.rank is None:
            kept[layer.name] = "two factors would be no smaller"
    return FactorReport(before, parameters(model), layers, kept)


def save_factorized(model: Any, folder: str | Path) -> None:
    """Writes a model of transformers with LowRankLinear layers; tersor.load reads it.

    An ordinary folder, in which those linears have `down` and `up`. config.json gives their ranks,
    and "tersor_factorized" for the model's type: plain transformers refuses such a folder.
    """
    ranks = {n: m.rank for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    if not ranks or not hasattr(model, "save_pretrained"):
        raise TersorError(
            f"{type(model).__name__} is no model of transformers with LowRankLinear layers; "
            "make them by factorize_model"
        )
    refuse_existing(folder)
    model.save_pretrained(str(folder))
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    entry = {"model_type": config["model_type"], "ranks": ranks}
    text = json.dumps(config | {"model_type": ENTRY, ENTRY: entry}, indent=2) + "\n"
    with durable(path) as file:
        file.write(text.encode())


def load_factorized(folder: str | Path, dtype: torch.dtype | None = None) -> Any:
    """The model that save_factorized wrote, in evaluation mode.

    dtype: of the weights; by default what config.json says. Code that comes with a folder is never
    run. TersorError where ranks and tensors do not fit the model.
    """
    checkpoint = Checkpoint.open(folder)
    config = dict(checkpoint.config)
    entry = config.pop(ENTRY, None)
    ranks = entry.get("ranks") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(ranks, dict) or not ranks:
        raise TersorError(
            f"config.json of {checkpoint.folder} has no ranks under {ENTRY}, so it is no "
            "factorized model; load it with transformers, or by tersor.load where it is quantized"
        )
    model: Any = build_skeleton(config | {"model_type": entry.get("model_type")}, dtype)
    for name, rank in ranks.items():
        linear = _place(model, name, rank, checkpoint.folder)
        made = LowRankLinear(
            linear.in_features,
            linear.out_features,
            rank,
            linear.bias is not None,
            device="meta",
            dtype=linear.weight.dtype,
        )
        model.set_submodule(name, made.requires_grad_(False))
    where = stored(model, find_arch(model), checkpoint.names)
    fill(model, where, where, checkpoint, model.dtype)
    model.tie_weights()
    used = {place.name for place in where.values()}
    check_all_used(model, set(checkpoint.names) - used)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    model.config._name_or_path = model.name_or_path = str(folder)
    return model.eval()


def _place(model: nn.Module, name: str, rank: object, folder: Path) -> nn.Linear:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if type(linear) is not nn.Linear:
        raise TersorError(
            f"config.json of {folder} factorizes {name[:200]}, which is no linear of "
            f"{type(model).__name__}; the two are of different models"
        )
    if type(rank) is not int or not 1 <= rank <= min(linear.in_features, linear.out_features):
        raise TersorError(
            f"config.json of {folder} gives {name} the rank {rank!r}, and it has from 1 to "
            f"{min(linear.in_features, linear.out_features)}"
        )
    return linear


def _factorized(
    name: str,
    linear: nn.Linear,
    rank: int | None,
    energy: float | None,
    stats: GramStats | None,
    root: Tensor | None,
) -> tuple[LowRankLinear | None, FactorizedLayer]:
    found = decompose(linear.weight, root)
    if rank is None:
        assert energy is not None  # as _check_settings says
        rank = found.rank_for(energy)
        if not _saves(linear, rank):
            return None, _unchanged(name, linear)
    b, a = found.factors(rank)
    n, k = linear.weight.shape
    weight = linear.weight
    made = LowRankLinear(k, n, rank, linear.bias is not None, dtype=weight.dtype)
    made.down.weight.copy_(a)
    made.up.weight.copy_(b)
    if linear.bias is not None:
        made.up.bias.copy_(linear.bias)
    # Of the factors as they are stored.
    error = weight.float() - made.up.weight.float() @ made.down.weight.float()
    reached = stats is not None and stats.tokens > 0
    return made.train(linear.training), FactorizedLayer(
        name=name,
        rank=rank,
        weight_error=_squares(error) / (_squares(weight.float()) or 1.0),
        output_error=stats.loss(error) / (stats.loss(weight.float()) or 1.0)
        if stats is not None and reached
        else None,
        before=n * k,
        after=rank * (n + k),
    )


def _unchanged(name: str, linear: nn.Linear) -> FactorizedLayer:
    count = linear.weight.numel()
    return FactorizedLayer(name, None, 0.0, None, count, count)


def _saves(linear: nn.Linear, rank: int) -> bool:
    n, k = linear.weight.shape
    return rank * (n + k) < n * k


def _break_even(linear: nn.Linear) -> int:
    """The largest rank that saves weights."""
    n, k = linear.weight.shape
    return (n * k - 1) // (n + k)


def _squares(tensor: Tensor) -> float:
    return float(tensor.square().sum(dtype=torch.float64))


def _check_settings(rank: object, energy: object, damp: object) -> None:
    if (rank is None) == (energy is None):
        raise TersorError("give rank or energy, one of them: rank=64, or energy=0.9")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise TersorError(f"rank is a number from 1, not {rank!r}")
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):  # type: ignore[operator]
        raise TersorError(f"energy is above 0 and at most 1, not {energy!r}; 0.9 keeps 90 %")
    if not is_number(damp) or not 0 < damp < 1:  # type: ignore[operator]
        raise TersorError(f"damp must be between 0 and 1, not {damp!r}; 0.01 is usual")


def _check_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if is_conv1d(module) or is_fused(module):
            raise TersorError(
                f"{name} would have to become nn.Linear to be factorized, and the model could no "
                f"longer be saved as it was; models with {type(module).__name__} are not factorized"
            )
