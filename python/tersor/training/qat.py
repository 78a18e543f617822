"""Training for a grid: a model's linears compute with rounded weights while they are trained, and
become quantized layers that give the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from tersor.checkpoint import check_finite
from tersor.errors import TersorError
from tersor.inmemory import check_kernel, install, quantize_model
from tersor.layerwise import Solver, find_solver
from tersor.packed_linear import keep_hooks
from tersor.pruning.masks import Mask, as_matrix, detach, masked, original
from tersor.qweight import ActSpec, QWeight, Scheme
from tersor.solvers import RTN
from tersor.training.fake import (
    LEAST,
    FakeQuantize,
    fake_quantize_activation,
    into_cells,
    ready,
)
from tersor.training.finite import is_sharded
from tersor.training.mask_targets import linear_targets, zeros

SCALES = ("learned", "fixed")
_WHOLE = (
    "no process has all of them (FSDP); save them with the Trainer's save_model(), and in one "
    "process attach(model), model.load_state_dict(...) of what was saved, and finish()"
)


@dataclass(frozen=True)
class Quantized:
    """What came of it.

    scheme: of all the layers. sparsity: share of zeros among their rounded weights.
    layers: the same of each, by path.
    """

    scheme: Scheme
    sparsity: float
    layers: dict[str, float]


class QuantizationTraining(TrainerCallback):
    """Trains a model for a grid (quantization-aware training): its linears compute with rounded
    weights, and the gradients go straight through the rounding, to the weights and to the scales.

        Trainer(model, ..., callbacks=[QuantizationTraining(Scheme(QSpec(4)))])

    or, from a GPTQ solution and in a loop of one's own:

        training = QuantizationTraining(Scheme(QSpec(2)), start=GPTQ()).attach(model, windows)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        ...
        training.finish()

    After the training the linears are QuantLinear. Save the model with tersor.save(model, folder):
    the save_model() of a Trainer writes no quantization_config, without which a folder is read with
    random weights in the place of the quantized ones.

    Attach before an optimizer is made, so that it knows the scales, which are parameters; one
    learning rate serves them and the weights. Let the weights be float32 (a Trainer may compute
    with bf16=True): bfloat16 has no steps so small.

    scheme: what the linears become. Activations are rounded too where it says so.
    scales: "learned" (LSQ, see training.fake), or "fixed", as they are at the start. Zero points
        are fixed.
    start: where the training begins. None: with the weights as they are, each group's scale by the
        least squared error. A solver, or its name in SOLVERS: with its solution on the calibration
        inputs that `attach` is given; each weight is moved as little as makes it round to its code
        there. Or weights by path, such as `qweights()` of another training, used in the same way.
    scale_dtype: in which the scales are saved, and so rounded all along; that of the weights, or of
        the scales of `start`, where it is None.
    include, ignore: shell patterns over the paths of linears. As in quantize_model, those in the
        blocks are taken, and embeddings and the output projection left alone.

    Masks go with it, those of MaskTraining and of HoldZeros: they are attached before, and given
    before it in `callbacks`; their zeros are zeros on the grid.

    Until finish() the linears are parametrized: grid and scales are in the model's state_dict under
    parametrizations.weight, so that checkpoints of a Trainer can be resumed, and a loop goes on
    after load_state_dict on a model that is attached. What `start` gave is in there, so that a
    training can be resumed without it.

    Where FSDP has the weights in parts they are not quantized at the end of the training. Save them
    with save_model(), which puts them together, and in one process load them into a model that is
    attached, and finish() there.
    """

    def __init__(
        self,
        scheme: Scheme,
        *,
        scales: str = "learned",
        start: str | Solver | Mapping[str, QWeight] | None = None,
        scale_dtype: torch.dtype | None = None,
        include: Sequence[str] = (),
        ignore: Sequence[str] = (),
    ) -> None:
        check_scheme(scheme)
        if scales not in SCALES:
            raise TersorError(f"scales are {' or '.join(SCALES)}, not {scales!r}")
        if scale_dtype not in (None, *LEAST):
            raise TersorError(f"scale_dtype is float32, bfloat16 or float16, not {scale_dtype}")
        self.start = start if start is None or isinstance(start, Mapping) else _solver(start)
        if scales == "learned" and getattr(self.start, "two_level", False):
            raise TersorError(
                "scales that learn leave the two-level grid of their start; give scales='fixed', "
                "or a solver without two_level"
            )
        self.scheme, self.scales, self.scale_dtype = scheme, scales, scale_dtype
        self.include, self.ignore = include, ignore
        self.model: nn.Module | None = None
        self.linears: dict[str, nn.Module] = {}
        self._hooks: list[RemovableHandle] = []

    def attach(
        self, model: nn.Module, calibration: Tensor | Iterable[Any] | None = None
    ) -> QuantizationTraining:
        """Makes the model's linears compute with rounded weights, in place.

        calibration: for a solver to start from, as in quantize_model, which is run on a copy of the
            model.
        Raises TersorError where that cannot be, with the model as it was.
        """
        if self.model is not None:
            raise TersorError("this training is attached already; finish() it, or make another")
        linears = self._targets(model)
        starts = {}
        for name, q in self._starts(model, linears, calibration).items():
            try:
                starts[name] = ready(q, self.scale_dtype)
            except TersorError as error:
                raise TersorError(f"{name}: {error}") from error
        for name, linear in linears.items():
            weight = as_matrix(linear, original(linear))
            if self.start is not None:
                with torch.no_grad():
                    weight.copy_(into_cells(weight.cpu(), starts[name]))
            fake = FakeQuantize(
                starts[name], self.scales == "learned", not isinstance(linear, nn.Linear)
            )
            parametrize.register_parametrization(linear, "weight", fake.to(weight.device))
            self._hooks.append(linear._register_load_state_dict_pre_hook(_refuse_plain))
            if self.scheme.activation is not None:
                rounding = partial(_round_inputs, self.scheme.activation)
                hook = linear.register_forward_pre_hook(rounding, with_kwargs=True)
                self._hooks.append(hook)
        self.model, self.linears = model, linears
        return self

    def parameters(self) -> list[nn.Parameter]:
        """The scales that learn, for a group of their own in an optimizer: they want no weight
        decay, which would pull them to where they began. (A Trainer gives them none.)"""
        scales = (self._fake(linear).log_bias for linear in self._attached().values())
        return [each for each in scales if each is not None]

    def qweights(self) -> dict[str, QWeight]:
        """The rounded weights as they are now, by path; on the CPU."""
        return {name: self._qweight(name) for name in self._attached()}

    def finish(self, quantize: bool = True) -> Quantized:
        """Ends the training: puts a QuantLinear in the place of each linear, which gives what the
        linear gave.

        quantize: False leaves ordinary linears with the weights below the rounding; the scales are
            lost (see qweights).
        Raises TersorError where masks are still on the weights, a weight is not finite, or no
        QuantLinear can be where it is; with the model as it was.
        """
        linears = self._attached()
        for name, linear in linears.items():
            if isinstance(linear.parametrizations.weight[0], Mask):
                raise TersorError(
                    f"{name} has a mask still; finish() the masks first, which write their zeros "
                    "into the weights, and then the quantization"
                )
            if is_sharded(original(linear)):
                raise TersorError(f"{name} is in parts; {_WHOLE}")
            check_finite(name, original(linear), "train from a checkpoint before, at a lower rate")
            check_finite(name, self._fake(linear).scales, "train at a lower rate")
            if quantize:
                check_kernel(name, as_matrix(linear, original(linear)), self.scheme)
        for hook in self._hooks:
            hook.remove()
        layers, sizes = {}, {}
        for name, linear in linears.items():
            q, place = self._qweight(name), original(linear).device
            layers[name], sizes[name] = zeros([q.dequantize()]), q.codes.numel()
            detach(linear)
            if quantize:
                assert self.model is not None
                install(self.model, name, q.to(place), self.scheme)
        total = sum(layers[name] * size for name, size in sizes.items()) / sum(sizes.values())
        self.model, self.linears, self._hooks = None, {}, []
        return Quantized(self.scheme, total, layers)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.model is None:
            self.attach(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.model is None:
            self.attach(kwargs["model"])
        if self.model is not kwargs["model"]:
            raise TersorError("the trainer trains another model than the one that is quantized")
        for name, linear in self.linears.items():
            if state.global_step and not self._fake(linear).resumed:
                raise TersorError(
                    f"the trainer begins at step {state.global_step} with a checkpoint that has no "
                    f"grid for {name}; resume from one that was made with QuantizationTraining"
                )
            mask = linear.parametrizations.weight[0]
            if isinstance(mask, Mask) and not mask.ends:
                raise TersorError(
                    f"the mask of {name} would still be there when the weights are quantized; give "
                    "what masks to the trainer too, before QuantizationTraining: "
                    "callbacks=[masks, quantization]"
                )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if any(is_sharded(original(linear)) for linear in self._attached().values()):
            warnings.warn(f"the weights are still to be quantized: {_WHOLE}", stacklevel=2)
            return
        try:
            for name, linear in self._attached().items():
                check_kernel(name, as_matrix(linear, original(linear)), self.scheme)
        except TersorError as error:
            warnings.warn(
                f"the weights are still to be quantized: {error}; then call finish()", stacklevel=2
            )
            return
        self.finish()

    def _targets(self, model: nn.Module) -> dict[str, nn.Module]:
        names = linear_targets(model, self.include, self.ignore, masked=True)
        linears = {name: model.get_submodule(name) for name in names}
        for name, linear in linears.items():
            steps = linear.parametrizations.weight if parametrize.is_parametrized(linear) else ()
            if not all(isinstance(step, Mask) for step in steps):
                raise TersorError(
                    f"the weight of {name} is parametrized already; finish() what does it, or "
                    "torch.nn.utils.parametrize.remove_parametrizations, and attach again"
                )
            weight = original(linear)
            if weight.is_meta:
                raise TersorError(f"{name} has no weight yet (it is on meta); load the model first")
            check_finite(name, weight, "look at how the model was made")
            try:
                self.scheme.weight.groups(as_matrix(linear, weight).shape[1])
            except TersorError as error:
                raise TersorError(f"{name}: {error}; or leave it out with ignore") from None
        return linears

    @torch.no_grad()
    def _starts(
        self, model: nn.Module, linears: Mapping[str, nn.Module], calibration: Any
    ) -> Mapping[str, QWeight]:
        """Where each linear begins, by path."""
        if isinstance(self.start, Mapping):
            _check_start(self.start, linears, self.scheme)
            return self.start
        if self.start is None:
            if calibration is not None:
                raise TersorError("calibration is for a solver to start from; give start=GPTQ()")
            rtn, spec = RTN(clip=True), self.scheme.weight
            return {
                name: rtn(as_matrix(linear, masked(linear)).cpu(), None, spec)
                for name, linear in linears.items()
            }
        return _solved(model, list(linears), self.scheme, self.start, calibration)

    def _qweight(self, name: str) -> QWeight:
        linear = self.linears[name]
        with torch.no_grad():
            return self._fake(linear).quantize(masked(linear))

    @staticmethod
    def _fake(linear: nn.Module) -> FakeQuantize:
        fake: FakeQuantize = linear.parametrizations.weight[-1]
        return fake

    def _attached(self) -> dict[str, nn.Module]:
        if self.model is None:
            raise TersorError("the training is on no model; attach(model) first")
        return self.linears


def check_scheme(scheme: Scheme) -> None:
    """TersorError for what is no scheme, or none that a training can end in."""
    if not isinstance(scheme, Scheme):
        raise TersorError(f"scheme is a Scheme(QSpec(...)), not {scheme!r}")
    scheme.refuse_static("quantization-aware training measures no inputs")


def _solver(start: str | Solver) -> Solver:
    solver = find_solver(start)
    if solver.sparsity is not None:
        raise TersorError(
            f"{solver.name} makes zeros, and nothing would keep them; prune the model first "
            "(prune_model), hold its zeros with HoldZeros, and start from GPTQ()"
        )
    return solver


def _solved(
    model: nn.Module, names: Sequence[str], scheme: Scheme, solver: Solver, calibration: Any
) -> dict[str, QWeight]:
    """The solver's weights for these linears, each block on what the quantized ones before it
    give."""
    if solver.needs is not None and calibration is None:
        raise TersorError(
            f"{solver.name} needs inputs to calibrate on; call attach(model, calibration) with "
            "token ids, before a Trainer is made (a training that is resumed can do without start)"
        )
    bare = copy.deepcopy(model)
    for path, linear in list(bare.named_modules()):
        if parametrize.is_parametrized(linear, "weight"):
            bare.set_submodule(path, _plain(linear))
    ignored = [name for name in linear_targets(bare, (), ()) if name not in names]
    quantize_model(bare, calibration, scheme=scheme, method=solver, ignore=ignored)
    return {name: bare.get_submodule(name).qweight() for name in names}


def _plain(linear: nn.Module) -> nn.Linear:
    """A linear with the same values. (To remove the parametrizations of a copy would remove them
    from the class that it shares with the original.)"""
    weight = as_matrix(linear, linear.weight.detach())
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight.contiguous()), linear.bias
    keep_hooks(plain, linear)
    return plain


def _round_inputs(
    how: ActSpec, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The one input of a linear, however it is given."""
    named = {name: fake_quantize_activation(x, how) for name, x in kwargs.items()}
    return tuple(fake_quantize_activation(x, how) for x in args), named


def _refuse_plain(state: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
    """Before a state is loaded into a linear that is attached."""
    if f"{prefix}weight" in state:
        raise TersorError(
            f"the state to load has a weight for {prefix.removesuffix('.')} and no grid; load it "
            "before the quantization is attached, or resume from a checkpoint that was made with "
            "QuantizationTraining"
        )


def _check_start(
    start: Mapping[str, QWeight], linears: Mapping[str, nn.Module], scheme: Scheme
) -> None:
    """TersorError unless there is a weight for each linear, of its shape and of the grid."""
    if missing := [name for name in linears if name not in start]:
        raise TersorError(
            f"start has no weight for {missing[0]} ({len(missing)} of {len(linears)} missing); "
            "give one, or leave it out with ignore"
        )
    if strange := [name for name in start if name not in linears]:
        raise TersorError(f"start has a weight for {strange[0]}, which is none of the linears")
    for name, linear in linears.items():
        q, shape = start[name], tuple(as_matrix(linear, original(linear)).shape)
        if not isinstance(q, QWeight):
            raise TersorError(f"start has no QWeight for {name} but {type(q).__name__}")
        if q.spec != scheme.weight or (q.n, q.k) != shape:
            raise TersorError(
                f"start has {q.spec} {q.n} x {q.k} for {name}, which is {shape[0]} x {shape[1]} "
                f"and to become {scheme.weight}"
            )
