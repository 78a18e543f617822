"""QuantLinear: a linear layer over a quantized weight, in place of torch.nn.Linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tersor import _core, sparse
from tersor.errors import TersorError
from tersor.formats import FORMATS
from tersor.formats.config import default_format
from tersor.kernels import DTYPES, dtype_code, pack_weight, packed_spec, rows_of, unpack_weight
from tersor.qweight import ActSpec, QWeight, Scheme

_DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_OPTIONAL = ("weight_zero_point", "weight_g_idx")  # tensors that not every weight has


class QuantLinear(nn.Module):
    """y = x @ dequantize(W).T + bias on a native kernel; W and bias are frozen.

    qweight: the weight, [n, k]. On the meta device only its shapes are kept, to be loaded later;
        until then state_dict() holds meta tensors, as that of any layer on meta does.
    bias: floating point [n], or None.
    activation: quantize the inputs in the call (ActSpec()), or use them as they are (None).
    dtype: the floating-point dtype of the layer, in which the bias is rounded and saved; by
        default that of the bias, or of the scales. Inputs may have any of the three dtypes, and
        outputs have the dtype of the input.
    format: the key of FORMATS that state_dict() writes; by default what compressed-tensors uses
        for such a layer.

    The weight lives in the order of the kernel that serves it and is never saved that way:
    state_dict() holds the portable tensors of the format under their usual names (weight_packed,
    weight_scale, ...), exactly as they were, and load_state_dict() takes them. Activation order
    (qweight.order) becomes a permutation of the inputs.
    """

    packed: Tensor  # uint8, kernel order; empty until a weight is loaded
    bias: Tensor | None  # float32, holding values of self.dtype
    columns: Tensor | None  # int64 [k]: the column of x for each column of the packed weight
    order: Tensor | None  # int32 [k]: qweight.order, where there is one
    _awaited: QWeight | None  # on meta, until a weight is loaded

    def __init__(
        self,
        qweight: QWeight,
        bias: Tensor | None = None,
        activation: ActSpec | None = None,
        dtype: torch.dtype | None = None,
        format: str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = qweight.k
        self.out_features = qweight.n
        self.spec = qweight.spec
        self.activation = activation
        self.dtype = dtype or (qweight.scales if bias is None else bias).dtype
        dtype_code(self.dtype)
        self.format = format or default_format(self.scheme)
        if self.format not in FORMATS:
            raise TersorError(f"format must be one of {', '.join(FORMATS)}, not {self.format}")
        for name in ("packed", "bias", "columns", "order"):
            self.register_buffer(name, None, persistent=False)
        self._set_weight(qweight)
        if bias is not None:
            self._set_bias(bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme) -> QuantLinear:
        """The layer with its weight rounded to the nearest codes of the scheme's grid."""
        from tersor.solvers.rtn import RTN

        if not isinstance(linear, nn.Linear):
            raise TersorError(f"from_linear takes an nn.Linear, not {type(linear).__name__}")
        with torch.no_grad():
            qweight = RTN()(linear.weight, None, scheme.weight)
            return cls(qweight, linear.bias, scheme.activation, linear.weight.dtype)

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.spec, self.activation)

    def qweight(self) -> QWeight:
        """The weight in portable order, exactly as it was given."""
        if not self.packed.numel():
            self._refuse()
        q = unpack_weight(self.packed, self.spec)
        if self.columns is not None:
            q.codes = q.codes[:, torch.argsort(self.columns)]
        q.order = self.order
        return q

    def forward(self, x: Tensor) -> Tensor:
        """x: float32, bfloat16 or float16 [..., k] -> [..., n] of the same dtype."""
        if self._buffers["columns"] is not None:
            x = self._permuted(x)
        eager = not torch.compiler.is_compiling() and type(x) is Tensor
        if not eager or x.requires_grad or not x.is_cpu:
            return torch.ops.tersor.linear(x, self.packed, self.bias, self.out_features)
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
        _core.linear(
            x.data_ptr(), x.numel() // k, k, stride, code, packed.data_ptr(), size,
            0 if bias is None else bias.data_ptr(), y.data_ptr(), n, n,
        )  # fmt: skip
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

    def extra_repr(self) -> str:
        group = "per row" if self.spec.group is None else f"g{self.spec.group}"
        grid = "symmetric" if self.spec.symmetric else "asymmetric"
        order = ", activation order" if self.order is not None else ""
        layout = packed_spec(self.packed)["layout"] if self.packed.numel() else "no weight yet"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.scheme} {group} {grid}{order}, {layout}"
        )

    # --- where the weight lives -------------------------------------------------------------

    def _set_weight(self, q: QWeight) -> None:
        if q.codes.device.type not in ("cpu", "meta"):
            raise TersorError(f"the weight is on {q.codes.device}; kernels run on the CPU, move it")
        self.columns = self.order = None
        self._awaited = q if q.codes.is_meta else None
        if q.codes.is_meta:
            self.packed = torch.empty(0, dtype=torch.uint8, device="meta")
            return
        codes, self.order = q.codes, q.order
        if q.order is not None:
            columns = _columns_by_group(q.order.long(), q.scales.shape[1])
            if not torch.equal(columns, torch.arange(q.k)):
                codes, self.columns = codes[:, columns], columns
        ordered = QWeight(q.spec, codes, q.scales, q.zeros)
        pattern = sparse.pattern_of(ordered, self.activation)
        self.packed = pack_weight(ordered, self.activation, pattern)

    def _set_bias(self, bias: Tensor) -> None:
        """Kernels add a float32 bias; rounding it first gives the values that will be saved."""
        if bias.shape != (self.out_features,):
            raise TersorError(f"bias must be [{self.out_features}], not {list(bias.shape)}")
        self.bias = bias.detach().to(self.dtype).to(torch.float32, copy=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """What .to(), .share_memory() and the like do. A dtype applies to the bias; there are
        kernels for the CPU alone."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device))
        if probe.device != self.packed.device:
            raise TersorError(
                f"cannot move a QuantLinear from {self.packed.device} to {probe.device}: it runs "
                "on the CPU; keep the model there"
            )
        dtype_code(probe.dtype)
        bias = self.bias
        super()._apply(fn, recurse)
        self.dtype = probe.dtype
        if bias is not None and self.bias is not None and self.bias.dtype != torch.float32:
            self._set_bias(bias)
        return self

    # --- saving and loading -----------------------------------------------------------------

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        q = self.qweight() if self._awaited is None else self._awaited
        tensors = FORMATS[self.format].pack(q)
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
        """A weight is taken whole or not at all; its scales keep the dtype that they come in. The
        bias is rounded to the dtype of the layer, which with assign=True becomes that of the bias.
        """
        rest = (missing_keys, unexpected_keys, error_msgs)
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, *rest)
        given = {
            name.removeprefix(prefix): tensor.detach().cpu()
            for name, tensor in state_dict.items()
            if name.startswith(prefix)
        }
        bias = given.pop("bias", None) if self.bias is not None else None
        format = FORMATS[self.format]
        tensors = {name: given.pop(name) for name in format.tensors if name in given}
        missing = [
            name
            for name in format.tensors
            if name not in tensors
            and (name not in _OPTIONAL or (name == "weight_zero_point" and not self.spec.symmetric))
        ]
        if self.bias is not None and bias is None:
            missing.append("bias")
        missing_keys.extend(prefix + name for name in missing)
        if strict:
            unexpected_keys.extend(prefix + name for name in given)
        try:
            if missing in ([], ["bias"]):
                self._set_weight(self._checked(format.unpack(tensors, self.spec)))
            if bias is not None:
                if local_metadata.get("assign_to_params_buffers", False):
                    self.dtype = bias.dtype
                self._set_bias(bias)
        except TersorError as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")

    def _checked(self, q: QWeight) -> QWeight:
        if (q.n, q.k) != (self.out_features, self.in_features):
            raise TersorError(
                f"the weight is {q.n} x {q.k}, the layer {self.out_features} x {self.in_features}; "
                "load it into a layer of its own size"
            )
        return q


def _columns_by_group(order: Tensor, groups: int) -> Tensor:
    """Columns sorted by group [k], those of a group in the order that they had."""
    if bool((order < 0).any()) or int(order.max()) >= groups:
        raise TersorError(f"the order names groups beyond the {groups} that have scales")
    if bool((torch.bincount(order, minlength=groups) * groups != order.numel()).any()):
        raise TersorError("the order must give every group the same number of columns")
    return torch.argsort(order, stable=True)
