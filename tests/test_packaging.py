"""What a wheel promises, checked on the installed package and on the objects it was built from."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tersor
from tersor import _core

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
# Object files of a build in this tree, whichever Python it was for; a wheel carries none.
OBJECTS = sorted(ROOT.glob("build/cp*/CMakeFiles/*.dir/csrc/**/*.o"))

needs_source = pytest.mark.skipif(not CSRC.is_dir(), reason="needs the source tree")
needs_objects = pytest.mark.skipif(
    not OBJECTS or platform.machine() != "x86_64" or not shutil.which("objdump"),
    reason="needs objects of an x86-64 build in build/, and objdump",
)


def for_one_isa(path: Path) -> bool:
    return "/tersor_avx" in path.as_posix()


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_one_version() -> None:
    version = importlib.metadata.version("tersor")
    assert tersor.__version__ == version
    assert _core.__version__ == version


def test_typed_and_console_script() -> None:
    assert (Path(tersor.__file__).parent / "py.typed").is_file()
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="tersor")
    assert script.value == "tersor.cli:main"
    assert callable(script.load())


@needs_source
def test_header_for_other_packages_is_installed() -> None:
    installed = Path(tersor.get_include()) / "tersor" / "kernel.h"
    assert installed.read_text() == (CSRC / "kernel.h").read_text()


SOURCES = (".h", ".cpp", ".cuh", ".cu")


@needs_source
def test_native_code_knows_python_in_its_bindings_and_torch_nowhere() -> None:
    python = re.compile(r"#\s*include\s*[<\"](nanobind/|pybind11/|Python\.h)")
    torch = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10)/")
    files = {p: p.read_text() for p in CSRC.rglob("*") if p.suffix in SOURCES}
    knowing = {p.name for p, text in files.items() if python.search(text)}
    bindings = {"bindings.cpp", "bindings_cuda.cpp", "bindings_cuda_solve.cpp", "bindings_cuda.h"}
    assert knowing == bindings
    assert not [p for p, text in files.items() if torch.search(text)]


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_module_needs_only_the_system() -> None:
    needed = set(re.findall(r"NEEDED.*\[(.+?)\.so", run("readelf", "-d", _core.__file__)))
    system = {"libstdc++", "libm", "libgcc_s", "libc", "libpthread", "libdl", "librt"}
    assert {n for n in needed if not n.startswith("ld-linux")} <= system


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_module_exports_only_its_entry_point() -> None:
    symbols = run("nm", "--dynamic", "--defined-only", "--format=posix", _core.__file__)
    assert [line.split()[0] for line in symbols.splitlines()] == ["PyInit__core"]


@needs_objects
def test_only_isa_objects_contain_vex_instructions() -> None:
    """A machine without AVX must get through every path that dispatch did not choose."""
    vex = re.compile(r"\tv\w+ .*%[xyz]mm")
    found = {
        path: vex.search(run("objdump", "-d", "--no-show-raw-insn", str(path))) for path in OBJECTS
    }
    for path, match in found.items():
        assert bool(match) == for_one_isa(path), f"{path}: {match and match.group()}"


@needs_objects
def test_isa_objects_leave_the_linker_nothing_to_merge() -> None:
    """A weak symbol of an AVX-512 object could become the copy that baseline code calls."""
    for path in filter(for_one_isa, OBJECTS):
        symbols = run("nm", "--defined-only", "--format=posix", str(path)).splitlines()
        kinds = {line.split()[1] for line in symbols}
        assert kinds, path
        assert not kinds & set("WVuwv"), path


@needs_source
def test_versions_are_the_same_everywhere() -> None:
    pins = {}
    for line in (ROOT / "constraints-dev.txt").read_text().splitlines():
        if line and not line.startswith("#") and not line.endswith('python_version < "3.11"'):
            name, version = line.split(";")[0].strip().split("==")
            pins[name.lower()] = version
    rows = re.findall(
        r"^\| ([\w-]+) \| ([\d.]+) \|", (ROOT / "third_party" / "README.md").read_text(), re.M
    )
    assert {name: pins[name] for name, _ in rows} == dict(rows)

    wanted = importlib.metadata.requires("tersor") or []
    direct = {re.match(r"[\w-]+", line).group() for line in wanted} - {"tersor"}
    assert direct <= dict(rows).keys()


@needs_source
def test_stub_is_what_the_generator_writes(tmp_path: Path) -> None:
    stub = ROOT / "python" / "tersor" / "_core.pyi"
    if importlib.util.find_spec("nanobind") is None:
        pytest.skip("needs nanobind, of the extra [dev]")
    pins = (ROOT / "constraints-dev.txt").read_text()
    if f"nanobind=={importlib.metadata.version('nanobind')}\n" not in pins:
        pytest.skip("another version of nanobind may write it differently")
    fresh = tmp_path / "_core.pyi"
    run(sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "tersor._core", "-o", str(fresh))
    assert fresh.read_text() == stub.read_text(), "the native interface changed: run make stubs"
