"""SparseLinear: a linear layer over a 2:4 weight in 16 bits, in place of torch.nn.Linear."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from tersor import cuda, sparse
from tersor.errors import TersorError
from tersor.kernels import PATTERN, keeps_pattern, pack_values, packed_spec, unpack_values
from tersor.packed_linear import PackedLinear, keep_hooks


class SparseLinear(PackedLinear):
    """y = x @ W.T + bias on a native kernel that leaves zeros out: 8.75 bits a weight on a CPU, 9
    on a GPU.

    weight: bfloat16 or float16 [n, k], of every four columns at most two not zero; on a CPU k is
        divisible by 128, on a GPU n and k by 16. On the meta device only its shape is kept, to be
        loaded later.
    bias: floating point [n], or None.

    W and bias are frozen. state_dict() holds the dense `weight` and `bias` of an nn.Linear, exactly
    as they were but for the sign of zeros, and load_state_dict() takes them.
    """

    _awaited: Tensor | None  # on meta, until a weight is loaded

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        if weight.dim() != 2:
            raise TersorError(f"a weight is [n, k], not {list(weight.shape)}")
        n, k = weight.shape
        super().__init__(n, k, weight.dtype)
        self._set_weight(weight)
        if bias is not None:
            self._set_bias(bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> SparseLinear:
        """TersorError where the weight has no 2:4 zeros, or is in a dtype without a kernel."""
        if not isinstance(linear, nn.Linear):
            raise TersorError(f"from_linear takes an nn.Linear, not {type(linear).__name__}")
        return cls(linear.weight.detach(), linear.bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight, [n, k]; unpacked for every use, and frozen."""
        if self._awaited is not None:
            return self._awaited
        if not self.packed.numel():
            self._refuse()
        if self.grid is not None:
            return cuda.unpack_values(self.packed, self.grid)
        return unpack_values(self.packed)

    def extra_repr(self) -> str:
        layout = "no weight yet"
        if self.packed.numel():
            layout = packed_spec(self.packed)["layout"] if self.grid is None else self.grid.layout
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, 2:4, {layout}"
        )

    def _set_weight(self, weight: Tensor) -> None:
        if weight.is_meta:
            self.packed, self.grid = torch.empty(0, dtype=torch.uint8, device="meta"), None
        else:
            self._pack(weight, weight.device)
        self._awaited = weight if weight.is_meta else None

    def _pack(self, weight: Tensor, device: torch.device) -> None:
        """In the order of the kernel of a device. weight: on any device."""
        if device.type == "cpu":
            self.packed, self.grid = pack_values(weight.to(device), PATTERN), None
            return
        grid, reason = None, f"there are no kernels for {device.type}"
        if device.type == "cuda":
            grid = cuda.Grid.of_values(weight)
            reason = cuda.unavailable(device) or cuda.refusal(grid, device) or ""
        if grid is None or reason:
            raise TersorError(
                f"a {self.out_features} x {self.in_features} layer with 2:4 zeros cannot be on "
                f"{device}: {reason}; keep it on the CPU, or use nn.Linear"
            )
        self.packed, self.grid = cuda.pack_values(weight, device), grid

    def _move(self, device: torch.device) -> None:
        if "meta" in (device.type, self.packed.device.type):
            super()._move(device)
        self._pack(self.weight, device)

    def _names(self) -> tuple[str, ...]:
        return ("weight",)

    def _portable(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def _take(self, tensors: dict[str, Tensor]) -> None:
        weight = tensors["weight"]
        if weight.shape != (self.out_features, self.in_features):
            raise TersorError(
                f"the weight is {list(weight.shape)}, the layer {self.out_features} x "
                f"{self.in_features}; load it into a layer of its own size"
            )
        self._set_weight(weight if self.packed.is_meta else weight.to(self.packed.device))


def swap_sparse_linears(model: nn.Module) -> dict[str, str]:
    """Puts a SparseLinear in the place of each nn.Linear with a 2:4 weight in bfloat16 or float16
    for which the kernel is faster here (see tersor.use_sparse). For inference: what is swapped is
    frozen. Weights that several modules share stay.

    Returns the path of every linear with a 2:4 weight, and what became of it: "swapped", or the
    reason why not.
    """
    if isinstance(model, nn.Linear):
        raise TersorError(
            "a bare nn.Linear cannot be replaced within itself; use SparseLinear.from_linear"
        )
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found: dict[str, str] = {}
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or not is_sparse(module.weight):
            continue
        if owners[id(module.weight)] > 1:
            found[path] = "shares its weight with another module"
            continue
        reason = sparse.refusal(module.weight)
        if reason is None:
            layer = SparseLinear.from_linear(module).train(module.training)
            keep_hooks(layer, module)
            model.set_submodule(path, layer)
        found[path] = reason or "swapped"
    return found


def is_sparse(weight: Tensor) -> bool:
    """Whether a weight has 2:4 zeros and is where, and in a dtype, that has a kernel for them."""
    device = weight.device.type
    here = device in ("cpu", "cuda") and weight.dtype in sparse.VALUES and weight.numel() > 0
    return here and keeps_pattern(weight, *PATTERN)
