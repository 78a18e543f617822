"""The native kernels seen from Python: which there are, which serves, and the operator that calls
them.

A weight in kernel order is a uint8 tensor that begins with a header; only the native code looks
inside. `torch.ops.tersor.linear` is the operator: it can be compiled, exported and differentiated
with respect to its input. Kernels of other packages (entry point `tersor.kernels`) are registered
before the first one is chosen.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from tersor import _core
from tersor.errors import TersorError
from tersor.qweight import ActSpec, QSpec, QWeight

ENTRY_POINT = "tersor.kernels"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of enum tersor_dtype
PATTERN = (2, 4)  # kept, of: the zeros that kernels of this package know how to leave out
_ROWS = 1024  # of a weight that are dequantized at once in the backward pass


# --- the tables ----------------------------------------------------------------------------------


@functools.cache
def _load_outside_kernels() -> None:
    """Registers what other packages offer; one that is broken is named and left out."""
    for entry in entry_points(group=ENTRY_POINT):
        try:
            _core.register_kernels(entry.load()())
        except Exception as error:
            package = entry.dist.name if entry.dist else entry.value
            warnings.warn(
                f"the kernels of package {package} ({entry.value}) cannot be used: "
                f"{type(error).__name__}: {error}; update or uninstall it",
                RuntimeWarning,
                stacklevel=2,
            )


@dataclass(frozen=True)
class KernelInfo:
    """A row of the kernel table. unavailable: why this machine cannot run it, or None if it can.
    address: of its struct tersor_kernel, for as long as the process lives."""

    name: str
    isa: str
    layout: str
    priority: int
    unavailable: str | None
    address: int


def table() -> list[KernelInfo]:
    """Every kernel that tersor knows, best priority first."""
    _load_outside_kernels()
    return [KernelInfo(**row) for row in _core.kernels()]


def explain(
    m: int,
    n: int,
    k: int,
    spec: QSpec,
    activation: ActSpec | None = None,
    dtype: torch.dtype = torch.bfloat16,
    scale_dtype: torch.dtype = torch.bfloat16,
    pattern: tuple[int, int] = (0, 0),
) -> list[tuple[str, str | None]]:
    """(name, reason why it does not serve, or None) for every kernel, best priority first; the
    first without a reason serves. pattern: (kept, of) where so few of the codes are not zero."""
    _load_outside_kernels()
    group = spec.group or k
    spec.groups(k)
    rows: list[tuple[str, str | None]] = _core.explain(
        n, k, group, stored_bits(spec), not spec.symmetric, dtype_code(scale_dtype),
        int(activation is not None), m, dtype_code(dtype), *pattern,
    )  # fmt: skip
    return rows


def explain_values(
    m: int, n: int, k: int, values: torch.dtype, dtype: torch.dtype, pattern: tuple[int, int]
) -> list[tuple[str, str | None]]:
    """The same for a weight of 16-bit values with zeros. values: bfloat16 or float16."""
    _load_outside_kernels()
    rows: list[tuple[str, str | None]] = _core.explain(
        n, k, k, 16, False, dtype_code(values), 0, m, dtype_code(dtype), *pattern
    )
    return rows


def thread_count() -> int:
    """How many threads a kernel runs on. TersorError where TERSOR_THREADS is no number of threads,
    or TERSOR_ISA no instruction set of this machine."""
    _core.forced_isa()
    count: int = _core.thread_count()
    return count


def dtype_code(dtype: torch.dtype) -> int:
    """The dtype in enum tersor_dtype; TersorError for one that the kernels do not read."""
    if dtype not in DTYPES:
        raise TersorError(f"kernels read float32, bfloat16 and float16, not {dtype}; convert it")
    return DTYPES.index(dtype)


# --- kernel order and back -----------------------------------------------------------------------


def stored_bits(spec: QSpec) -> int:
    """In which kernels hold the codes: 4 or 8."""
    return 8 if spec.bits == 8 else 4


def recentre(spec: QSpec) -> int:
    """What is added to codes when they are stored: 2- and 3-bit codes are stored in 4 bits. A
    symmetric grid has its zero point in the middle, so its codes move up with it."""
    return 8 - spec.midpoint if spec.symmetric and spec.bits < 4 else 0


def pack_weight(
    q: QWeight, activation: ActSpec | None = None, pattern: tuple[int, int] = (0, 0)
) -> Tensor:
    """The weight in the order of the kernel that will run it: uint8, aligned to 64 bytes.

    q.order must be None: a kernel's groups are contiguous (QuantLinear permutes its input).
    activation is part of the choice of kernel: with it inputs are quantized in the call.
    pattern: (kept, of) for a kernel that leaves zeros out; TersorError where q has fewer of them.
    """
    if q.order is not None:
        raise TersorError("pack_weight needs contiguous groups; sort the columns by q.order first")
    _load_outside_kernels()
    weight, code = _stored(q), int(activation is not None)
    packed = torch.empty(_core.packed_bytes(*weight, code, *pattern), dtype=torch.uint8)
    _core.pack(*weight, code, packed, *pattern)
    return packed


def pack_values(w: Tensor, pattern: tuple[int, int]) -> Tensor:
    """A weight of bfloat16 or float16 values [n, k] with zeros, for a kernel that leaves them out;
    TersorError where it has fewer than the pattern says. The sign of a zero is not kept."""
    _load_outside_kernels()
    weight = _values(w)
    packed = torch.empty(_core.packed_bytes(*weight, 0, *pattern), dtype=torch.uint8)
    _core.pack(*weight, 0, packed, *pattern)
    return packed


def unpack_values(packed: Tensor) -> Tensor:
    """The inverse of pack_values: [n, k]."""
    head = packed_spec(packed)
    if head["bits"] != 16:
        raise TersorError("unpack_values takes 16-bit weights; use unpack_weight")
    w = torch.empty(head["n"], head["k"], dtype=DTYPES[head["scale_dtype"]])
    _core.unpack(packed, w, None, None)
    return w


def _values(w: Tensor) -> tuple[Tensor, None, None, int]:
    """A weight of values as a kernel takes it."""
    if w.dtype not in DTYPES[1:] or w.dim() != 2:
        raise TersorError(f"values are bfloat16 or float16 [n, k], not {w.dtype} {list(w.shape)}")
    return w.detach().contiguous(), None, None, 16


def _stored(q: QWeight) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Codes, scales, zeros and bits as a kernel takes them."""
    shift = recentre(q.spec)
    codes = (q.codes + shift if shift else q.codes).contiguous()
    zeros = None if q.zeros is None else q.zeros.contiguous()
    return codes, q.scales.contiguous(), zeros, stored_bits(q.spec)


def keeps_pattern(q: QWeight | Tensor, kept: int, of: int) -> bool:
    """Whether at most `kept` of every `of` codes of a row stand for something else than zero; or of
    the 16-bit values [n, k]."""
    codes, scales, zeros, bits = _values(q) if isinstance(q, Tensor) else _stored(q)
    if codes.shape[1] % of:
        return False
    if codes.device.type != "cpu":
        return _keeps_pattern(codes, zeros, bits, kept, of)
    found: bool = _core.keeps_pattern(codes, scales, zeros, bits, kept, of)
    return found


def _keeps_pattern(codes: Tensor, zeros: Tensor | None, bits: int, kept: int, of: int) -> bool:
    """The same on a GPU, by torch."""
    zero: Tensor | int = 0 if bits == 16 else 1 << (bits - 1)
    if zeros is not None:
        zero = zeros.repeat_interleave(codes.shape[1] // zeros.shape[1], dim=1)
    counts = (codes != zero).view(codes.shape[0], -1, of).sum(-1, dtype=torch.uint8)
    return not bool((counts > kept).any())


def unpack_weight(packed: Tensor, spec: QSpec | None = None) -> QWeight:
    """The inverse of pack_weight, exactly. Without a spec, 2- and 3-bit weights come back as the
    4-bit weights that they are stored as."""
    head = packed_spec(packed)
    if head["bits"] == 16:
        raise TersorError("unpack_weight takes codes; use unpack_values for 16-bit weights")
    n, k, groups = head["n"], head["k"], head["k"] // head["g"]
    if spec is None:
        group = None if groups == 1 else head["g"]
        spec = QSpec(head["bits"], group, symmetric=not head["asymmetric"])
    codes = torch.empty(n, k, dtype=torch.uint8)
    scales = torch.empty(n, groups, dtype=DTYPES[head["scale_dtype"]])
    zeros = torch.empty(n, groups, dtype=torch.uint8) if head["asymmetric"] else None
    _core.unpack(packed, codes, scales, zeros)
    return QWeight(spec, codes.sub_(recentre(spec)), scales, zeros)


def packed_spec(packed: Tensor) -> dict[str, Any]:
    """What the header of a packed weight says: layout, n, k, g, bits, asymmetric, scale_dtype and
    activation (these two as numbers of kernel.h), kept and of."""
    if packed.device.type != "cpu" or packed.dtype != torch.uint8:
        raise TersorError("a packed weight is a uint8 tensor on the CPU")
    spec: dict[str, Any] = _core.packed_spec(packed)
    return spec


# --- the operator --------------------------------------------------------------------------------

_library = torch.library.Library("tersor", "DEF")  # the registrations live as long as it does


def define_operator(
    schema: str, device: str, function: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> None:
    """torch.ops.tersor.<name of the schema>, for tensors on "CPU" or "CUDA"."""
    name = "tersor::" + schema.partition("(")[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, function, device)
    torch.library.register_fake(name, fake, lib=_library)


def define_backward(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """How torch.ops.tersor.<name> is differentiated with respect to its first argument."""
    torch.library.register_autograd(
        f"tersor::{name}", backward, setup_context=setup_context, lib=_library
    )


def is_eager(x: Tensor) -> bool:
    """Whether a product of x may be computed at once, without the operator, which costs some ten
    microseconds: no gradient is asked for, nothing is compiled or traced, no mode sees what is
    dispatched (make_fx), and x is not of vmap, whose tensors have no memory."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.requires_grad:
        return False
    if torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    transform = torch._C._functorch.peek_interpreter_stack()
    # The operator would drop the derivatives of jvp in silence; an address is refused.
    return transform is None or transform.key() != torch._C._functorch.TransformType.Vmap


def rows_of(x: Tensor, k: int) -> Tensor:
    """x [..., k] as a matrix [m, k] whose rows are contiguous and do not overlap; a view where
    possible. TersorError where x is not that wide."""
    if x.dim() == 0 or x.shape[-1] != k:
        raise TersorError(f"the layer takes inputs [..., {k}], not {list(x.shape)}")
    matrix = x.resolve_neg().reshape(-1, k)
    scattered = k > 1 and matrix.stride(1) != 1
    overlapping = matrix.shape[0] > 1 and matrix.stride(0) < k
    return matrix.contiguous() if scattered or overlapping else matrix


def scale_address(scale: Tensor | None, device: torch.device) -> int:
    """Of the scale of static activations, float32 [1] on the device; 0 for None."""
    if scale is None:
        return 0
    if scale.dtype != torch.float32 or scale.numel() != 1 or scale.device != device:
        raise TersorError(
            f"input_scale must be float32 [1] on {device}, not {scale.dtype} {list(scale.shape)} "
            f"on {scale.device}"
        )
    return scale.data_ptr()


def _linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    n: int,
    outliers: float | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    k = packed_spec(packed)["k"]
    matrix = rows_of(x, k)
    m = matrix.shape[0]
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (n,)):
        raise TersorError(f"bias must be float32 [{n}], not {bias.dtype} {list(bias.shape)}")
    bias = None if bias is None else bias.contiguous()
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
    call = (
        matrix.data_ptr(), m, k, matrix.stride(0) if m > 1 else k, dtype_code(x.dtype),
        packed.data_ptr(), packed.numel(), 0 if bias is None else bias.data_ptr(),
        y.data_ptr(), n, n,
    )  # fmt: skip
    if outliers is None:
        _core.linear(*call, scale_address(input_scale, x.device))
    else:
        _core.linear_outliers(*call, outliers)
    return y


def _linear_fake(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    n: int,
    outliers: float | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _linear_backward(grad: Tensor, packed: Tensor, k: int) -> Tensor:
    """grad [..., n] @ dequantize(W) [n, k], in float32, a part of the rows of W at a time."""
    head = packed_spec(packed)
    q = unpack_values(packed) if head["bits"] == 16 else unpack_weight(packed)
    matrix = rows_of(grad, head["n"]).float()
    result = torch.zeros(matrix.shape[0], k)
    for begin in range(0, head["n"], _ROWS):
        part = slice(begin, begin + _ROWS)
        weight = q[part].float() if isinstance(q, Tensor) else q.rows(part).dequantize()
        result.addmm_(matrix[:, part], weight)
    return result.to(grad.dtype).view(*grad.shape[:-1], k)


def _linear_backward_fake(grad: Tensor, packed: Tensor, k: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], k))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed = inputs[:2]
    ctx.save_for_backward(packed)
    ctx.k = x.shape[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Weights and bias are frozen. Where activations are quantized in the call, their rounding
    # counts as the identity (the straight-through estimator of Bengio et al., 2013).
    (packed,) = ctx.saved_tensors
    return torch.ops.tersor.linear_backward(grad, packed, ctx.k), *(None,) * 5


define_operator(
    "linear_backward(Tensor grad, Tensor packed, int k) -> Tensor",
    "CPU",
    _linear_backward,
    _linear_backward_fake,
)
define_operator(
    "linear(Tensor x, Tensor packed, Tensor? bias, int n, float? outliers=None, "
    "Tensor? input_scale=None) -> Tensor",
    "CPU",
    _linear,
    _linear_fake,
)
define_backward("linear", _save_for_backward, _backward)
