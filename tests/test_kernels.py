"""The native linear kernels: each against the float64 oracle, then the way that calls reach them.

With TERSOR_ISA set, the kernels of that instruction set alone are tested.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tersor import _core, testing
from tersor.qweight import ActSpec, QSpec, QWeight
from tersor.testing import DTYPES, Case

FORCED = os.environ.get("TERSOR_ISA", "")
TABLE = {entry["name"]: entry for entry in _core.kernels()}


@pytest.fixture(autouse=True)
def _default_threads():
    yield
    _core.set_thread_count(0)
    if _core.threads_backend() == "pool":
        _core.set_threads_backend("openmp")


def usable(name: str) -> testing.Kernel:
    entry = TABLE[name]
    if entry["unavailable"]:
        pytest.skip(f"this machine cannot run {name}: it {entry['unavailable']}")
    if FORCED and entry["isa"] != FORCED:
        pytest.skip(f"TERSOR_ISA={FORCED} forces other kernels")
    return testing.Kernel.from_address(entry["address"])


def needs(dtype: torch.dtype, bits: int = 4, activation: ActSpec | None = None) -> None:
    """Skips where TERSOR_ISA forces kernels that are for other requests."""
    reasons = explain(1, DTYPES.index(dtype), bits, int(activation is not None)).values()
    if FORCED and None not in reasons:
        pytest.skip(f"TERSOR_ISA={FORCED} has no kernel for this")


def pack(q: QWeight, activation: ActSpec | None) -> torch.Tensor:
    """The packed weight as the library makes it."""
    arguments = (q.codes, q.scales, q.zeros, q.spec.bits, int(activation is not None))
    packed = torch.empty(_core.packed_bytes(*arguments), dtype=torch.uint8)
    _core.pack(*arguments, packed)
    return packed


def linear(x: torch.Tensor, packed: torch.Tensor, n: int, bias: torch.Tensor | None = None):
    y = torch.full((x.shape[0], n), float("nan"), dtype=x.dtype)
    _core.linear(
        x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), DTYPES.index(x.dtype),
        packed.data_ptr(), packed.numel(), 0 if bias is None else bias.data_ptr(),
        y.data_ptr(), n, n, 0,
    )  # fmt: skip
    return y


# --- every kernel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_contract(name):
    testing.check_kernel(usable(name))


@pytest.mark.parametrize("name", TABLE)
def test_sums_are_split_where_they_would_overflow(name):
    # One scale for more columns than are summed in an integer, at the largest values there are;
    # 4096 is where a row is cut, 9001 leaves a ragged end.
    shapes = [(1, 17, k, k) for k in (4095, 4096, 4097, 9001)] + [(5, 40, 16384, 8192)]
    requests = (
        [
            Case(m, n, k, g, bits, symmetric, activation, dtype, torch.float32, False)
            for m, n, k, g in shapes
            for bits in (4, 8)
            for symmetric in (True, False)
            for activation in (None, ActSpec())
            for dtype in DTYPES[:2]
        ]
        + [
            Case(m, 17, k, k, bits, True, activation, dtype, torch.float32, False, (2, 4))
            for m, k in ((1, 4096), (1, 8192), (9, 8192), (2, 4224))
            for bits in (4, 8)
            for activation in (None, ActSpec())
            for dtype in DTYPES[:2]
        ]
        + [  # 1024 is where a row of values is cut
            Case(m, 17, k, k, 16, True, None, dtype, values, False, (2, 4))
            for m, k in ((1, 1024), (9, 1152), (2, 4224))
            for values in DTYPES[1:]
            for dtype in DTYPES[:2]
        ]
    )
    testing.check_kernel(usable(name), requests=requests)


def test_the_check_notices_a_wrong_kernel():
    # A kernel that is right but for one code of one weight must not pass.
    class Wrong(testing._Run):
        def packed(self, fill, bounds):
            codes = self.q.codes.clone()
            self.q.codes[-1, -1] ^= 1
            try:
                return super().packed(fill, bounds)
            finally:
                self.q.codes = codes

    entry = testing.Kernel.from_address(TABLE["w8a16_scalar"]["address"])
    case = Case(3, 17, 64, 32, 8, True, None, torch.float32, torch.float32, False)
    testing._Run(entry, case, 0).check_results(0.0)
    with pytest.raises(AssertionError, match="results are off"):
        Wrong(entry, case, 0).check_results(0.0)


# --- from the call to the kernel ------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, ActSpec()], ids=["a16", "a8"])
@pytest.mark.parametrize("bits", [4, 8])
def test_any_m_equals_the_oracle(bits, activation):
    needs(torch.bfloat16, bits, activation)
    # 513 and 4096 tokens are prepared in more than one slab.
    q = testing.random_qweight(80, 128, QSpec(bits, 32, symmetric=False), torch.bfloat16)
    packed = pack(q, activation)
    for m in (1, 2, 5, 12, 13, 100, 512, 513, 4096):
        x = torch.randn(m, 128, generator=torch.Generator().manual_seed(m)).bfloat16()
        expected, tolerance = testing.oracle(x, q, None, activation)
        testing.assert_close(linear(x, packed, 80), expected, tolerance, f"m={m}")


@pytest.mark.parametrize("activation", [None, ActSpec()], ids=["a16", "a8"])
def test_a_token_does_not_depend_on_its_batch_or_on_threads(activation):
    needs(torch.bfloat16, 4, activation)
    q = testing.random_qweight(528, 512, QSpec(4, 128), torch.float16)
    packed = pack(q, activation)
    x = torch.randn(40, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    _core.set_thread_count(1)
    alone = torch.cat([linear(x[i : i + 1], packed, 528) for i in range(40)])
    for backend in ("openmp", "pool"):
        _core.set_threads_backend(backend)
        for count in (1, 2, 3, 8):
            _core.set_thread_count(count)
            assert torch.equal(linear(x, packed, 528), alone), (backend, count)


def test_calls_from_many_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    needs(torch.float32)
    q = testing.random_qweight(256, 256, QSpec(4, 64), torch.float16)
    packed = pack(q, None)
    xs = [torch.randn(m, 256, generator=torch.Generator().manual_seed(m)) for m in range(1, 33)]
    expected = [linear(x, packed, 256) for x in xs]
    for backend in ("openmp", "pool"):
        _core.set_threads_backend(backend)
        with ThreadPoolExecutor(8) as pool:
            for got, want in zip(
                pool.map(lambda x: linear(x, packed, 256), xs * 8), expected * 8, strict=True
            ):
                assert torch.equal(got, want)


def test_a_forked_child_computes():
    needs(torch.float32)
    script = (
        "import os, torch, tests.test_kernels as t\n"
        "from tersor import _core, testing\n"
        "_core.set_threads_backend('pool'); _core.set_thread_count(3)\n"
        "q = testing.random_qweight(512, 512, testing.QSpec(4, 64), torch.float16)\n"
        "packed = t.pack(q, None); x = torch.randn(64, 512); y = t.linear(x, packed, 512)\n"
        "pid = os.fork()\n"
        "if pid == 0: os._exit(0 if torch.equal(t.linear(x, packed, 512), y) else 1)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    root = os.path.dirname(os.path.dirname(__file__))
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, timeout=60)


def test_packing_is_exact_through_the_library():
    for spec in (QSpec(4, 48), QSpec(8, None, symmetric=False)):
        for dtype in DTYPES:
            q = testing.random_qweight(37, 144, spec, dtype)
            packed = pack(q, None)
            codes, scales = torch.empty_like(q.codes), torch.empty_like(q.scales)
            zeros = None if q.zeros is None else torch.empty_like(q.zeros)
            _core.unpack(packed, codes, scales, zeros)
            assert torch.equal(codes, q.codes) and torch.equal(scales, q.scales)
            assert zeros is None or torch.equal(zeros, q.zeros)


# --- which kernel, and why ------------------------------------------------------------------------


def explain(m=1, dtype=1, bits=4, activation=0):
    return dict(_core.explain(4096, 4096, 128, bits, False, 1, activation, m, dtype))


def test_explain_gives_each_kernel_a_reason_or_none():
    reasons = explain()
    assert set(reasons) == set(TABLE)
    assert reasons["w8a16_scalar"] == "is for 4-bit codes" or "8-bit" in reasons["w8a16_scalar"]
    assert "int8 activations" in reasons["w4a8_scalar"]
    serving = next(name for name, reason in reasons.items() if reason is None)
    assert serving.startswith("w4a16")
    if FORCED:
        assert TABLE[serving]["isa"] == FORCED


def test_bfloat16_kernels_leave_other_dtypes_to_others():
    for name, entry in TABLE.items():
        if entry["isa"] == "avx512bf16" and name.startswith("w4"):
            assert explain(dtype=0)[name] == "takes bfloat16 activations only"


@pytest.mark.parametrize(
    ("value", "message"),
    [("avx9", "no such instruction set"), ("Scalar", "no such instruction set")],
)
def test_an_unknown_isa_is_an_error(value, message):
    code = "import torch\nfrom tersor import _core\n_core.forced_isa()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TERSOR_ISA": value}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0 and message in done.stderr and "scalar" in done.stderr


def test_a_wrong_number_of_threads_is_an_error():
    code = "from tersor import kernels\nkernels.thread_count()"
    for value in ("0", "two", "-1", "99999"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "TERSOR_THREADS": value}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode != 0
        assert "Error: TERSOR_THREADS must be a number from 1 to 1024" in done.stderr


# --- what the binding refuses ---------------------------------------------------------------------


def small(bits=4):
    return testing.random_qweight(32, 64, QSpec(bits, 32), torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.full((32, 64), 16, dtype=torch.uint8)}, "below 16"),
        ({"scales": torch.ones(32, 3)}, "scales must be"),
        ({"scales": torch.ones(31, 2)}, "scales must be"),
        ({"scales": torch.ones(32, 64)}, "multiple of 16"),
        ({"scales": torch.ones(32, 2, dtype=torch.float64)}, "float32, bfloat16 or float16"),
        ({"zeros": torch.zeros(32, 1, dtype=torch.uint8)}, "shape of the scales"),
        ({"zeros": torch.full((32, 2), 16, dtype=torch.uint8)}, "below 16"),
        ({"bits": 5}, "4 or 8 bits"),
        ({"activation": 2}, "int8"),
        ({"packed": torch.empty(128, dtype=torch.uint8)}, "destination"),
    ],
)
def test_pack_refuses(change, message):
    q = small()
    arguments = {"codes": q.codes, "scales": q.scales, "zeros": None, "bits": 4, "activation": 0}
    zeros = torch.zeros(32, 2, dtype=torch.uint8) if "zeros" in change else None
    size = _core.packed_bytes(**{**arguments, "zeros": zeros})
    arguments = {**arguments, "packed": torch.empty(size, dtype=torch.uint8), **change}
    with pytest.raises(ValueError, match=message):
        _core.pack(**arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"codes": torch.zeros(32, 64)},
        {"codes": torch.zeros(64, 32, dtype=torch.uint8).T},
        {"codes": torch.zeros(32 * 64, dtype=torch.uint8)},
        {"scales": torch.ones(2, 32).T},
    ],
)
def test_pack_refuses_arrays_of_another_kind(change):
    q = small()
    arguments = {"codes": q.codes, "scales": q.scales, "zeros": None, "bits": 4, "activation": 0}
    with pytest.raises(TypeError):
        _core.packed_bytes(**{**arguments, **change})


def test_linear_refuses():
    needs(torch.float32)
    q, x = small(), torch.ones(2, 64)
    packed, y = pack(q, None), torch.empty(2, 32)
    good = [
        x.data_ptr(), 2, 64, 64, 0, packed.data_ptr(), packed.numel(), 0, y.data_ptr(), 32, 32, 0,
    ]  # fmt: skip
    _core.linear(*good)
    scale = torch.tensor([0.5])
    bad = {
        0: (0, x.data_ptr() + 1), 1: (-1, 2**40), 2: (63, 65, 0), 3: (63, -1, 2**40), 4: (3, -1),
        5: (packed.data_ptr() + 1, x.data_ptr() // 64 * 64), 6: (0, 127, packed.numel() - 1),
        7: (2,), 8: (0, y.data_ptr() + 2), 9: (31, 33), 10: (31, -5, 2**33),
        11: (scale.data_ptr(),),
    }  # fmt: skip
    for position, values in bad.items():
        for value in values:
            arguments = list(good)
            arguments[position] = value
            with pytest.raises(ValueError):
                _core.linear(*arguments)


def test_a_damaged_header_never_reaches_a_kernel_of_another_size():
    q, x = small(), torch.ones(2, 64)
    packed = pack(q, None)
    r = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(3000):
        damaged = packed.clone()
        at = int(torch.randint(0, 88, (1,), generator=r))
        damaged[at] = int(torch.randint(0, 256, (1,), generator=r))
        try:
            linear(x, damaged, 32)
        except ValueError:
            refused += 1
    assert refused > 2000


def test_a_damaged_layout_name_is_no_packed_weight():
    packed = pack(small(), None)
    for name in (b"\xff\xfe", b"a b", b"\0" * 31 + b"x", b"x" * 32):
        damaged = packed.clone()
        damaged[8:40] = torch.frombuffer(bytearray(name.ljust(32, b"\0")), dtype=torch.uint8)
        for call in (_core.packed_spec, lambda packed: linear(torch.ones(2, 64), packed, 32)):
            with pytest.raises(ValueError, match="packed"):
                call(damaged)
