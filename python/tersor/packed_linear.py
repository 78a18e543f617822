"""PackedLinear: what the linear layers over native kernels have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tersor import _core, cuda, cuda_int8
from tersor.errors import TersorError
from tersor.kernels import DTYPES, dtype_code, is_eager, rows_of

_DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


class PackedLinear(nn.Module, ABC):
    """y = x @ W.T + bias on a native kernel, W in the order of that kernel; W and bias are frozen.

    A subclass says what W is in a state dict: the tensors that it has, and how they are packed.
    Kernel order is never saved.

    dtype: the floating-point dtype of the layer, in which the bias is rounded and saved. Inputs may
    be float32, bfloat16 or float16, and outputs have the dtype of the input.
    """

    packed: Tensor  # uint8, kernel order; empty until a weight is loaded
    bias: Tensor | None  # float32, holding values of self.dtype
    columns: Tensor | None  # int64 [k]: the column of x for each column of the packed weight
    input_scale: Tensor | None  # float32 [1]: of int8 activations, where it is static
    static_scale: float = 0.0  # the same, here
    grid: cuda.Grid | None = None  # of the packed weight, where it is on a GPU
    shared: cuda_int8.Shared | None = None  # with linears that read the same input

    def __init__(self, n: int, k: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = k, n
        self.dtype = dtype
        dtype_code(dtype)
        for name in ("packed", "bias", "columns", "input_scale"):
            self.register_buffer(name, None, persistent=False)

    @property
    def outliers(self) -> float | None:
        """Beyond which columns of the input stay in 16 bits beside int8 ones (see ActSpec)."""
        return None

    @abstractmethod
    def _names(self) -> tuple[str, ...]:
        """Of the tensors that the weight may have in a state dict."""

    def _needs(self, name: str) -> bool:
        """Whether there is no weight without that tensor."""
        return True

    @abstractmethod
    def _portable(self) -> dict[str, Tensor]:
        """The tensors of the weight, as they are saved."""

    @abstractmethod
    def _take(self, tensors: dict[str, Tensor]) -> None:
        """Packs the weight. tensors: by name, on the CPU, those that are needed among them."""

    def forward(self, x: Tensor) -> Tensor:
        """x: float32, bfloat16 or float16 [..., k] -> [..., n] of the same dtype."""
        if self._buffers["columns"] is not None:
            x = self._permuted(x)
        scale = self._buffers["input_scale"]
        if self.grid is not None:
            static = None if scale is None else (scale, self.static_scale)
            shared = None if self.shared is None else (self, self.shared)
            return cuda.linear(x, self.packed, self.bias, self.grid, self.outliers, static, shared)
        if not is_eager(x) or not x.is_cpu:
            if not self.packed.numel() and not x.is_meta:
                self._refuse()
            n, outliers = self.out_features, self.outliers
            return torch.ops.tersor.linear(x, self.packed, self.bias, n, outliers, scale)
        # Eager inference calls the kernel itself: the operator would cost some microseconds more,
        # and so would nn.Module's lookup of its buffers, or an array object for each argument.
        packed, bias = self._buffers["packed"], self._buffers["bias"]
        n, k = self.out_features, self.in_features
        shape, code, size = x.shape, _DTYPE_CODES.get(x.dtype), packed.numel()
        if code is None or not shape or shape[-1] != k or not size:
            self._refuse(x)
        stride = k
        if not x.is_contiguous() or x.is_neg():
            x = rows_of(x, k)
            stride = x.stride(0) if x.shape[0] > 1 else k
        y = x.new_empty((*shape[:-1], n))
        call = (
            x.data_ptr(), x.numel() // k, k, stride, code, packed.data_ptr(), size,
            0 if bias is None else bias.data_ptr(), y.data_ptr(), n, n,
        )  # fmt: skip
        if (outliers := self.outliers) is None:
            _core.linear(*call, 0 if scale is None else scale.data_ptr())
        else:
            _core.linear_outliers(*call, outliers)
        return y

    def _permuted(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            self._refuse(x)
        return x.index_select(-1, self.columns)

    def _refuse(self, x: Tensor | None = None) -> NoReturn:
        if x is None or not self.packed.numel():
            raise TersorError("the layer has no weight yet; call load_state_dict first")
        dtype_code(x.dtype)
        raise TersorError(f"the layer takes inputs [..., {self.in_features}], not {list(x.shape)}")

    def _move(self, device: torch.device) -> None:
        """Repacks the weight for another device."""
        raise TersorError(
            f"cannot move a {type(self).__name__} from {self.packed.device} to {device}: it runs "
            "on the CPU; keep the model there"
        )

    def _set_bias(self, bias: Tensor) -> None:
        """Kernels add a float32 bias; rounding it first gives the values that will be saved."""
        if bias.shape != (self.out_features,):
            raise TersorError(f"bias must be [{self.out_features}], not {list(bias.shape)}")
        device = bias.device if self.packed is None or self.packed.is_meta else self.packed.device
        self.bias = bias.detach().to(self.dtype).to(device, torch.float32, copy=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """What .to(), .share_memory() and the like do. A dtype applies to the bias."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device))
        dtype_code(probe.dtype)
        if probe.device != self.packed.device:
            self._move(probe.device)
        bias, scale = self.bias, self.input_scale
        super()._apply(fn, recurse)
        self.dtype = probe.dtype
        if scale is not None and self._buffers["input_scale"].dtype != scale.dtype:
            self.input_scale = scale.to(probe.device)  # no dtype applies to it
        if bias is not None and self.bias is not None and self.bias.dtype != torch.float32:
            self._set_bias(bias)
        return self

    # --- saving and loading -----------------------------------------------------------------

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        tensors = self._portable()
        if self.bias is not None:
            tensors["bias"] = self.bias.to(self.dtype)
        for name, tensor in tensors.items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """A weight is taken whole or not at all, in the dtypes that it comes in. The bias is
        rounded to the dtype of the layer, which with assign=True becomes that of the bias."""
        rest = (missing_keys, unexpected_keys, error_msgs)
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, *rest)
        given = {
            name.removeprefix(prefix): tensor.detach().cpu()
            for name, tensor in state_dict.items()
            if name.startswith(prefix)
        }
        bias = given.pop("bias", None) if self.bias is not None else None
        tensors = {name: given.pop(name) for name in self._names() if name in given}
        missing = [name for name in self._names() if name not in tensors and self._needs(name)]
        missing_keys.extend(prefix + name for name in missing)
        if self.bias is not None and bias is None:
            missing_keys.append(f"{prefix}bias")
        if strict:
            unexpected_keys.extend(prefix + name for name in given)
        try:
            if not missing:
                self._take(tensors)
            if bias is not None:
                if local_metadata.get("assign_to_params_buffers", False):
                    self.dtype = bias.dtype
                self._set_bias(bias)
        except TersorError as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")


# Attributes of nn.Module that hold what users have hooked to it, and how it is to be called.
_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"),
)


def keep_hooks(layer: nn.Module, before: nn.Module) -> None:
    """Gives a layer the hooks of the one in whose place it is: the same dictionaries, so that a
    handle can still remove its hook."""
    for hooks in _HOOKS:
        setattr(layer, hooks, getattr(before, hooks))
