"""QuantLinear: a linear layer over a quantized weight, in place of torch.nn.Linear."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersor import cuda, sparse
from tersor.errors import TersorError
from tersor.formats import FORMATS
from tersor.formats.config import default_format
from tersor.kernels import PATTERN, pack_weight, packed_spec, unpack_weight
from tersor.packed_linear import PackedLinear
from tersor.qweight import ActSpec, QWeight, Scheme

_OPTIONAL = ("weight_zero_point", "weight_g_idx")  # tensors that not every weight has


class QuantLinear(PackedLinear):
    """y = x @ dequantize(W).T + bias on a native kernel; W and bias are frozen.

    qweight: the weight, [n, k]. On the meta device only its shapes are kept, to be loaded later;
        until then state_dict() holds meta tensors, as that of any layer on meta does.
    bias: floating point [n], or None.
    activation: quantize the inputs in the call (ActSpec()), or use them as they are (None). With
        ActSpec(outliers=6.0) columns of the input with larger values stay in 16 bits (LLM.int8());
        this is a setting of the layer, which its state dict does not hold.
    input_scale: of static activations (ActSpec(dynamic=False)), one positive number in a
        floating-point tensor, which is saved in its dtype.
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

    order: Tensor | None  # int32 [k]: qweight.order, where there is one
    _awaited: QWeight | None  # on meta, until a weight is loaded

    def __init__(
        self,
        qweight: QWeight,
        bias: Tensor | None = None,
        activation: ActSpec | None = None,
        dtype: torch.dtype | None = None,
        format: str | None = None,
        input_scale: Tensor | None = None,
    ) -> None:
        dtype = dtype or (qweight.scales if bias is None else bias).dtype
        super().__init__(qweight.n, qweight.k, dtype)
        self.spec = qweight.spec
        self.activation = activation
        self.format = format or default_format(self.scheme)
        if self.format not in FORMATS:
            raise TersorError(f"format must be one of {', '.join(FORMATS)}, not {self.format}")
        self.register_buffer("order", None, persistent=False)
        self._set_weight(qweight)
        self._saved_scale = torch.float32
        if self.scheme.static or input_scale is not None:
            self._set_scale(input_scale)
        if bias is not None:
            self._set_bias(bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme) -> QuantLinear:
        """The layer with its weight rounded to the nearest codes of the scheme's grid."""
        from tersor.solvers.rtn import RTN

        if not isinstance(linear, nn.Linear):
            raise TersorError(f"from_linear takes an nn.Linear, not {type(linear).__name__}")
        scheme.refuse_static("from_linear sees no inputs")
        with torch.no_grad():
            qweight = RTN()(linear.weight, None, scheme.weight)
            return cls(qweight, linear.bias, scheme.activation, linear.weight.dtype)

    @property
    def outliers(self) -> float | None:
        return self.activation.outliers if self.activation else None

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.spec, self.activation)

    def qweight(self) -> QWeight:
        """The weight in portable order, exactly as it was given, on the device of the layer."""
        q = self._ordered()
        if self.columns is not None:
            q.codes = q.codes[:, torch.argsort(self.columns)]
        q.order = self.order
        return q

    def extra_repr(self) -> str:
        group = "per row" if self.spec.group is None else f"g{self.spec.group}"
        grid = "symmetric" if self.spec.symmetric else "asymmetric"
        order = ", activation order" if self.order is not None else ""
        layout = "no weight yet"
        if self.packed.numel():
            layout = packed_spec(self.packed)["layout"] if self.grid is None else self.grid.layout
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.scheme} {group} {grid}{order}, {layout}"
        )

    # --- where the weight lives -------------------------------------------------------------

    def _set_weight(self, q: QWeight) -> None:
        self.columns = self.order = self.grid = None
        self._awaited = q if q.codes.is_meta else None
        if q.codes.is_meta:
            self.packed = torch.empty(0, dtype=torch.uint8, device="meta")
            return
        codes, self.order = q.codes, q.order
        if q.order is not None:
            columns = _columns_by_group(q.order.long(), q.scales.shape[1])
            if not torch.equal(columns, torch.arange(q.k, device=columns.device)):
                codes, self.columns = codes[:, columns], columns
        self._pack(QWeight(q.spec, codes, q.scales, q.zeros), codes.device)

    def _pack(self, ordered: QWeight, device: torch.device) -> None:
        """In the order of the kernels of a device; ordered: without an order, on any device."""
        if device.type == "cpu":
            ordered = ordered.to(device)
            pattern = sparse.pattern_of(ordered, self.activation)
            self.packed, self.grid = pack_weight(ordered, self.activation, pattern), None
            return
        reason: str | None = f"there are no kernels for {device.type}"
        if device.type == "cuda":
            reason = cuda.unavailable(device) or cuda.refusal(
                cuda.Grid.of(ordered, self.activation)
            )
        if reason is not None:
            raise TersorError(
                f"a {self.out_features} x {self.in_features} layer with {self.scheme} cannot be on "
                f"{device}: {reason}; keep it on the CPU"
            )
        left_out = sparse.pattern_of(ordered, self.activation, device) == PATTERN
        self.packed = cuda.pack_weight(ordered, device, self.activation, left_out)
        self.grid = cuda.Grid.of(ordered, self.activation, left_out)

    def _ordered(self) -> QWeight:
        """The weight with its columns in the order of their groups, on the device of the layer."""
        if not self.packed.numel():
            self._refuse()
        if self.grid is not None:
            return cuda.unpack_weight(self.packed, self.grid, self.spec)
        return unpack_weight(self.packed, self.spec)

    def _set_scale(self, scale: Tensor | None) -> None:
        """None: on meta, until one is loaded."""
        if not self.scheme.static:
            raise TersorError(
                "input_scale is of static activations; give ActSpec(dynamic=False), or in a "
                "folder's config.json input_activations with strategy tensor and dynamic false"
            )
        if scale is None and self.packed.is_meta:
            scale = torch.empty(1, device="meta")
        number = _number(scale)
        assert scale is not None
        self._saved_scale = scale.dtype
        if not scale.is_meta:
            self.static_scale = number
        scale = scale.detach().reshape(1).to(self.packed.device, torch.float32, copy=True)
        self.input_scale = scale

    def portable_scale(self) -> Tensor | None:
        """input_scale in the dtype that it is saved in."""
        return None if self.input_scale is None else self.input_scale.to(self._saved_scale)

    def _move(self, device: torch.device) -> None:
        if "meta" in (device.type, self.packed.device.type):
            super()._move(device)
        self._pack(self._ordered(), device)

    # --- saving and loading -----------------------------------------------------------------

    def _names(self) -> tuple[str, ...]:
        static = ("input_scale",) if self.scheme.static else ()
        return FORMATS[self.format].tensors + static

    def _needs(self, name: str) -> bool:
        return name not in _OPTIONAL or (name == "weight_zero_point" and not self.spec.symmetric)

    def _portable(self) -> dict[str, Tensor]:
        weight = self.qweight() if self._awaited is None else self._awaited
        tensors = FORMATS[self.format].pack(weight)
        if (scale := self.portable_scale()) is not None:
            tensors["input_scale"] = scale
        return tensors

    def _take(self, tensors: dict[str, Tensor]) -> None:
        """Scales keep the dtype that they come in."""
        q = self._checked(FORMATS[self.format].unpack(tensors, self.spec))
        if self.scheme.static:
            _number(tensors["input_scale"])  # before the weight is another one
        self._set_weight(q if self.packed.is_meta else q.to(self.packed.device))
        if self.scheme.static:
            self._set_scale(tensors["input_scale"])

    def _checked(self, q: QWeight) -> QWeight:
        if (q.n, q.k) != (self.out_features, self.in_features):
            raise TersorError(
                f"the weight is {q.n} x {q.k}, the layer {self.out_features} x {self.in_features}; "
                "load it into a layer of its own size"
            )
        return q


def _number(scale: object) -> float:
    """An input_scale as kernels read it, in float32; NaN on meta. TersorError for what is none."""
    one = isinstance(scale, Tensor) and scale.numel() == 1 and scale.is_floating_point()
    if not isinstance(scale, Tensor) or not one:
        given = f"{scale.dtype} {list(scale.shape)}" if isinstance(scale, Tensor) else scale
        raise TersorError(
            f"input_scale must be one floating-point number in a tensor, not {given}; take it from "
            "the original file, or calibrate again (tersor quantize --activations int8-static)"
        )
    if scale.is_meta:
        return float("nan")
    number = float(scale.float())
    if not 0 < number <= torch.finfo(torch.float32).max:
        raise TersorError(
            f"input_scale must be positive and finite in float32, not {float(scale):g}"
        )
    return number


def _columns_by_group(order: Tensor, groups: int) -> Tensor:
    """Columns sorted by group [k], those of a group in the order that they had."""
    if bool((order < 0).any()) or int(order.max()) >= groups:
        raise TersorError(f"the order names groups beyond the {groups} that have scales")
    if bool((torch.bincount(order, minlength=groups) * groups != order.numel()).any()):
        raise TersorError("the order must give every group the same number of columns")
    return torch.argsort(order, stable=True)
