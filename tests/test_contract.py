"""tersor.testing, the contract tests that others import, must notice a kernel that breaks the
contract: a right one is made wrong in one way at a time."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tersor import testing
from tersor.qweight import ActSpec, QSpec, QWeight
from tersor.testing import Case, Kernel

SIZE = {0: ctypes.c_float, 1: ctypes.c_uint16, 2: ctypes.c_uint16}  # by enum tersor_dtype


def requests(activation=None):
    shapes = [(1, 17, 33, 33), (3, 33, 64, 32), (5, 40, 48, 16)]
    return [case for case in testing.cases(shapes) if case.activation == activation]


def change(name, field, after):
    """A copy of a kernel that calls `after` with the same arguments once `field` is done."""
    right = testing.kernel(name)
    wrong = Kernel.from_buffer_copy(right)
    function = dict(Kernel._fields_)[field]
    original = getattr(right, field)

    def call(*arguments):
        result = original(*arguments)
        return after(result, *(getattr(a, "contents", a) for a in arguments))

    wrong.keep = function(call)
    setattr(wrong, field, wrong.keep)
    return wrong


def output(args, row, column):
    size = SIZE[args.dtype]
    return size.from_address(args.y + ctypes.sizeof(size) * (row * args.ldy + column))


def nudge(_, args, begin, end):
    value = output(args, 0, begin)
    value.value = value.value * 1.001 if args.dtype == 0 else value.value + 4


def beyond(_, args, begin, end):
    output(args, args.m - 1, args.spec.n).value = 0


def before(_, args, begin, end):
    output(args, 0, -1).value = 0


def hide(_, args, begin, end):
    for row in range(args.m):
        for column in range(begin, end):
            value = output(args, row, column)
            infinite = {0: 0x7F800000, 1: 0x7F80, 2: 0x7C00}[args.dtype]
            bits = ctypes.c_uint32 if args.dtype == 0 else ctypes.c_uint16
            if bits.from_buffer(value).value & infinite == infinite:
                value.value = 0


def spill(_, args, begin, end):
    """A token that is not finite, in the last row, gets into the first."""
    last = output(args, args.m - 1, begin)
    if args.m > 1 and args.dtype == 0 and not abs(last.value) < 1e30:
        output(args, 0, begin).value += 1


def split(_, args, begin, end):
    """Within the bound, but other bits where a range of columns begins."""
    if args.dtype == 0:
        bits = ctypes.c_uint32.from_buffer(output(args, args.m - 1, begin))
        bits.value ^= begin > 0


def wrong_code(_, spec, packed, view, begin, end):
    ctypes.c_uint8.from_address(view.codes + begin * spec.k).value ^= 1


def wrong_scale(_, spec, packed, view, begin, end):
    size = 4 if spec.scale_dtype == 0 else 2
    place = view.scales + size * (end * (spec.k // spec.g) - 1)
    ctypes.c_uint8.from_address(place).value ^= 1


FAULTS = {
    "value": ("gemm", nudge, "results are off"),
    "beyond y": ("gemm", beyond, "beyond its columns"),
    "before y": ("gemm", before, "memory outside the buffer"),
    "hidden NaN": ("gemm", hide, "gives finite results"),
    "spilled NaN": ("gemm", spill, "changes other rows"),
    "columns": ("gemm", split, "depend on how the work was divided"),
    "code": ("unpack", wrong_code, "does not give back the codes"),
    "scale": ("unpack", wrong_scale, "does not give back the scales"),
    "workspace": ("workspace_bytes", lambda size, *_: max(0, size - 64), "memory outside"),
    "packed": ("packed_bytes", lambda size, *_: size - 1, "memory outside"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault):
    field, after, message = FAULTS[fault]
    name, activation = "w4a16_scalar", None
    if fault == "workspace":  # this one has none for 16-bit activations
        name, activation = "w4a8_scalar", ActSpec()
    wrong = change(name, field, after)
    with pytest.raises(AssertionError, match=message):
        testing.check_kernel(wrong, requests=requests(activation))


def test_a_right_kernel_passes():
    same = change("w4a16_scalar", "gemm", lambda *_: None)
    assert testing.check_kernel(same, requests=requests()) == 18


def test_a_kernel_that_serves_nothing_does_not_pass():
    with pytest.raises(AssertionError, match="refused every request"):
        testing.check_kernel("w4a16_scalar", requests=requests(ActSpec()))


def test_names_and_capsules():
    with pytest.raises(AssertionError, match=r"no kernel is called 'w5a5'; there are .*scalar"):
        testing.check_kernel("w5a5")
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    table = testing._Table(2, ctypes.sizeof(Kernel), 0, None)
    address = ctypes.addressof(table)
    with pytest.raises(ValueError, match="incorrect name"):
        testing.check_capsule(new(address, b"other", None))
    capsule = new(address, testing.CAPSULE, None)
    with pytest.raises(AssertionError, match="of ABI 2"):
        testing.check_capsule(capsule)
    table.abi, table.kernel_size = testing.ABI, 8
    with pytest.raises(AssertionError, match=r"another kernel\.h"):
        testing.check_capsule(capsule)
    table.kernel_size = ctypes.sizeof(Kernel)
    with pytest.raises(AssertionError, match="empty"):
        testing.check_capsule(capsule)


def test_oracle_on_numbers_worked_out_by_hand():
    # Two rows, two groups of 16 columns; the codes of a row are all alike.
    codes = torch.tensor([[9], [5]], dtype=torch.uint8).expand(2, 32).contiguous()
    scales = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    q = QWeight(QSpec(4, 16), codes, scales)
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 31] = 3.0, -1.0
    # row 0: (9 - 8) * (3 * 0.5 - 1 * 2); row 1: (5 - 8) * (3 * 1 - 1 * 0.25)
    y, tolerance = testing.oracle(x, q, torch.tensor([1.0, 0.0]))
    assert y.tolist() == [[0.5, -8.25]]
    assert float(tolerance.max()) < 1e-3
    # As int8: the scale is 3 / 127.5; 3 becomes 127 of its steps (not 127.5), -1 becomes -42.
    y, _ = testing.oracle(x, q, None, ActSpec())
    three, one = 127 * 3 / 127.5, 42 * 3 / 127.5
    torch.testing.assert_close(
        y, torch.tensor([[0.5 * three - 2 * one, -3 * (three - 0.25 * one)]], dtype=torch.float64)
    )
    # Half a step goes to the even neighbour: the scale is 1, 0.5 becomes 0 and 1.5 becomes 2.
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([-127.5, 0.5, 1.5])
    y, tolerance = testing.oracle(x, q, None, ActSpec())
    assert y.tolist() == [[0.5 * (2 - 128), -3.0 * (2 - 128)]]
    assert float(tolerance.max()) < 0.1  # no allowance for the tie


def test_tolerance_grows_with_the_dtype_and_the_weight():
    q = testing.random_qweight(8, 64, QSpec(4, 32))
    x = torch.randn(2, 64)
    bounds = [testing.oracle(x.to(dtype), q)[1].mean() for dtype in testing.DTYPES]
    assert bounds[0] < bounds[2] < bounds[1]
    assert testing.oracle(x, q, weight_eps=2.0**-8)[1].mean() > 100 * bounds[0]


def test_cases_cover_every_combination():
    seen = {(c.bits, c.symmetric, c.activation, c.dtype, c.scale_dtype) for c in testing.cases()}
    assert len(seen) == 2 * 2 * 3 * 3 * 3
    assert isinstance(next(testing.cases()), Case)
