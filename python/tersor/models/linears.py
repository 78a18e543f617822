"""The quirks of linears, undone in place: afterwards every linear of a model is an nn.Linear."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.models.arch import Arch, Experts, spellings

Activation = Callable[[Tensor], Tensor]


def plain_linears(root: nn.Module, arch: Arch, conv1d: bool = True) -> None:
    """Replace, in place, every Conv1D and every fused experts module under root by nn.Linear.

    conv1d: False leaves Conv1D as it is, so that what is saved of it stays [in, out].
    root: a model or a block, with real weights or on the meta device. Its outputs stay the same
    (up to the order of summation), the paths of Conv1D modules too. Doing it twice is harmless.
    Tensors of the checkpoint are matched to the new parameters by models.names.stored.
    """
    fused = spellings(arch.experts.module, arch.aliases) if arch.experts else []
    for path, module in list(root.named_modules()):
        if is_conv1d(module) and conv1d:
            _replace(root, path, linear_from_conv1d(module))
        elif any(f".{path}".endswith(f".{name}") for name in fused) and is_fused(module):
            assert arch.experts is not None  # or `fused` is empty
            _replace(root, path, unfuse_experts(module, arch.experts))


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear that keeps its weight as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def widths(linear: nn.Module) -> tuple[int, int]:
    """(k, n): input and output features of an nn.Linear, a Conv1D or what is in its place."""
    if is_conv1d(linear):
        k, n = linear.weight.shape
        return k, n
    return linear.in_features, linear.out_features


def linear_from_conv1d(conv: nn.Module) -> nn.Linear:
    """An equal nn.Linear, marked `stored_transposed`: its weight lies in files as [in, out]."""
    linear = _linear(conv.weight.detach().t(), conv.bias.detach())
    linear.stored_transposed = True
    return linear


def is_fused(module: nn.Module) -> bool:
    """Whether this is an experts module that keeps all its experts in two 3-D parameters."""
    parameters = dict(module.named_parameters(recurse=False))
    return "gate_up_proj" in parameters and parameters["gate_up_proj"].dim() == 3


def unfuse_experts(fused: nn.Module, names: Experts) -> ExpertList:
    """A module that computes what the fused experts module does, with three nn.Linear an expert.

    fused: gate_up_proj [E, 2 * inter, hidden], down_proj [E, hidden, inter], act_fn, and nothing
        else; real or meta. The result owns its weights: fused can be freed.
    Raises TersorError where the module is of another kind than Mixtral's.
    """
    parameters = dict(fused.named_parameters(recurse=False))
    plain = set(parameters) == {"gate_up_proj", "down_proj"} and hasattr(fused, "act_fn")
    up_shape = parameters["gate_up_proj"].shape if plain else torch.Size()
    if not plain or parameters["down_proj"].shape != (up_shape[0], up_shape[2], up_shape[1] // 2):
        shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in parameters.items())
        raise TersorError(
            f"cannot take the experts of {type(fused).__name__} apart ({shapes}); expected "
            "gate_up_proj [E, 2 * inter, hidden] and down_proj [E, hidden, inter] alone: keep this "
            "model out of quantization, or load it with another version of transformers"
        )
    experts = []
    for gate_up, down in zip(parameters["gate_up_proj"], parameters["down_proj"], strict=True):
        gate, up = gate_up.detach().chunk(2)
        experts.append(Expert(names, gate, up, down.detach(), fused.act_fn))
    return ExpertList(experts)


class Expert(nn.Module):
    """One gated expert: down(act(gate(x)) * up(x)), its linears called as the architecture does."""

    def __init__(
        self, names: Experts, gate: Tensor, up: Tensor, down: Tensor, act: Activation
    ) -> None:
        super().__init__()
        self.names = names
        self.act = act
        self.add_module(names.gate, _linear(gate))
        self.add_module(names.up, _linear(up))
        self.add_module(names.down, _linear(down))

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]"""
        gate, up, down = (
            self.get_submodule(name) for name in (self.names.gate, self.names.up, self.names.down)
        )
        y: Tensor = down(self.act(gate(x)) * up(x))
        return y


class ExpertList(nn.ModuleList):
    """Experts behind transformers' signature of a fused experts module. Each runs on its tokens
    alone, and one that the router gave no token does not run at all.

    seen: where it is set, called with the number of each expert that ran, what it put out
        [its tokens, hidden] and how much of that the router takes [its tokens].
    """

    seen: Callable[[int, Tensor, Tensor], None] | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden]; top_k_index and top_k_weights [tokens, top_k]."""
        out = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, choice = torch.where(top_k_index == number)
            if token.numel():
                y, weights = expert(hidden_states[token]), top_k_weights[token, choice]
                if self.seen is not None:
                    self.seen(number, y, weights)
                out.index_add_(0, token, (y * weights[:, None]).to(out.dtype))
        return out


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """An nn.Linear that owns a copy of weight [n, k]; on meta if the weight is."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), False)
    linear.bias = None if bias is None else nn.Parameter(bias.clone(), False)
    return linear
