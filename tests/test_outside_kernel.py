"""A kernel from a package of its own: built, installed and found as a stranger's would be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "outside_kernel"

CHOSEN = """
import torch
from tersor import QuantLinear, kernels, testing
from tersor.qweight import ActSpec, QSpec

first = kernels.table()[0]
assert (first.name, first.layout, first.priority) == ("outside_w4a16", "outside_rows", 100), first
assert first.unavailable is None

def serving(spec, activation=None):
    return next(name for name, reason in kernels.explain(3, 48, 64, spec, activation)
                if reason is None)

assert serving(QSpec(4, 32)) == serving(QSpec(3, 32)) == "outside_w4a16"
assert serving(QSpec(8, 32)) != "outside_w4a16"
assert serving(QSpec(4, 32), ActSpec()) != "outside_w4a16"
reasons = dict(kernels.explain(3, 48, 64, QSpec(8, 32)))
assert reasons["outside_w4a16"] == "stores 4-bit codes only", reasons

for spec, layout in ((QSpec(4, 32, symmetric=False), "outside_rows"), (QSpec(8, 32), "tile16")):
    q = testing.random_qweight(48, 64, spec, torch.float16)
    bias = torch.randn(48)
    layer = QuantLinear(q, bias)
    assert kernels.packed_spec(layer.packed)["layout"] == layout
    back = layer.qweight()
    assert torch.equal(back.codes, q.codes) and torch.equal(back.scales, q.scales)
    for dtype in testing.DTYPES:
        x = torch.randn(300, 64).to(dtype)
        expected, tolerance = testing.oracle(x, q, bias)
        testing.assert_close(layer(x), expected, tolerance, layout)
print("chosen")
"""

CONTRACT = """
import outside_kernel
from tersor import testing

assert testing.check_capsule(outside_kernel.kernels()) == 1
assert testing.check_kernel("outside_w4a16") > 100
print("passed")
"""

BROKEN = {
    "raises": "def kernels(): raise OSError('no such library')",
    "returns": "def kernels(): return 7",
    "missing": "",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the example package in it, made by pip."""
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    source = tmp_path_factory.mktemp("source") / "outside_kernel"
    shutil.copytree(PACKAGE, source)
    target = tmp_path_factory.mktemp("site")
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--no-build-isolation", "--no-deps", "--no-index", "--target", target, source,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def run(code: str, *paths: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if k != "TERSOR_ISA"}
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def test_dispatch_chooses_it(installed):
    done = run(CHOSEN, installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "chosen\n"


def test_passes_the_contract_tests(installed):
    done = run(CONTRACT, installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "passed\n"


def test_a_forced_isa_goes_for_it_too(installed):
    code = """
from tersor import kernels
from tersor.qweight import QSpec
print(next(n for n, reason in kernels.explain(1, 16, 32, QSpec(4, 32)) if reason is None))
"""
    done = run(code, installed, TERSOR_ISA="scalar")
    assert done.stdout == "outside_w4a16\n", done.stderr  # it calls itself scalar


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_package_is_named_and_left_out(kind, tmp_path):
    (tmp_path / "broken_kernels.py").write_text(BROKEN[kind])
    info = tmp_path / "broken_kernels-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-kernels\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[tersor.kernels]\nbroken = broken_kernels:kernels\n")
    code = """
import warnings
import torch
from tersor import QuantLinear, testing
from tersor.qweight import QSpec
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for seed in range(2):
        layer = QuantLinear(testing.random_qweight(16, 32, QSpec(4, 32), seed=seed))
assert layer(torch.zeros(1, 32)).shape == (1, 16)
for warning in caught:
    if issubclass(warning.category, RuntimeWarning):
        print(warning.message)
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the kernels of package broken-kernels") == 1
    assert "update or uninstall it" in done.stdout


def test_an_import_loads_no_kernels(tmp_path):
    (tmp_path / "broken_kernels.py").write_text("raise SystemExit('imported')")
    info = tmp_path / "broken_kernels-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-kernels\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[tersor.kernels]\nbroken = broken_kernels:kernels\n")
    done = run("import tersor.linear, tersor.loading; print('fine')", tmp_path)
    assert done.stdout == "fine\n", done.stderr
