"""Follows the recipes of CONTRIBUTING.md to the letter, in a copy of the tree."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from tersor import _core, testing

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "CONTRIBUTING.md"

pytestmark = pytest.mark.skipif(not GUIDE.is_file(), reason="needs the source tree")


@dataclass
class Recipe:
    blocks: list[tuple[str, str]]  # kind and text of each fenced block
    check: list[str]  # arguments of the pytest command at its end


def recipe(title: str) -> Recipe:
    text = GUIDE.read_text(encoding="utf-8")
    (section,) = re.findall(rf"^### {title}\n(.*?)(?=^##)", text, re.M | re.S)
    (check,) = re.findall(r"^Check: `pytest (.+)`$", section, re.M)
    return Recipe(re.findall(r"^```(\w+)\n(.*?)^```$", section, re.M | re.S), check.split())


def apply_diff(tree: Path, diff: str) -> None:
    """Lines without a sign, and those with a minus, are searched for one after the other."""
    head, *steps = diff.splitlines()
    path = tree / head.removeprefix("--- ")
    lines, at = path.read_text(encoding="utf-8").splitlines(), 0
    for step in steps:
        sign, line = step[:1], step[1:]
        if sign == "+":
            lines.insert(at, line)
            at += 1
            continue
        assert line in lines[at:], f"{path.name} has no line {line!r} after line {at}"
        at = lines.index(line, at)
        if sign == "-":
            del lines[at]
        else:
            at += 1
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def follow(steps: Recipe, tree: Path) -> None:
    for kind, text in steps.blocks:
        if kind == "python":
            path = tree / text.splitlines()[0].removeprefix("# ")
            assert not path.exists()
            path.write_text(text, encoding="utf-8")
        elif kind == "diff":
            apply_diff(tree, text)
        elif kind == "sh":
            subprocess.run(["sh", "-ec", text], cwd=tree, check=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Sources, and the native module beside the Python files."""
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("python", "csrc", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)
    for name in ("CMakeLists.txt", "pyproject.toml", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(_core.__file__, tmp_path / "python" / "tersor")
    return tmp_path


def python(tree: Path, *arguments: str) -> None:
    """Runs in the copy. -S: without site's path files, and so without an editable tersor."""
    packages = sysconfig.get_path("purelib"), sysconfig.get_path("platlib")
    path = os.pathsep.join(dict.fromkeys([str(tree / "python"), *packages]))
    done = subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("title", ["A weight format", "A solver", "A model"])
def test_recipe_for(title: str, tree: Path) -> None:
    steps = recipe(title)
    follow(steps, tree)
    # Exits with 5, and fails here, if nothing was selected.
    python(tree, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *steps.check)


def test_recipe_for_a_kernel(tree: Path, tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if platform.machine() != "x86_64" or compiler is None:
        pytest.skip("the example is for x86-64, and needs a C++ compiler")
    follow(recipe("A kernel in this tree"), tree)
    table = tree / "table.cpp"
    table.write_text(
        '#include "cpu/kernels.h"\n'
        'extern "C" const tersor_kernel_table table = {\n'
        "    TERSOR_KERNEL_ABI, sizeof(tersor_kernel), 4, tersor::kSse41Kernels};\n"
    )
    flags = ["-std=c++17", "-I", str(tree / "csrc"), "-Wall", "-Wextra", "-Werror"]
    sources = [tree / "csrc/cpu" / f"{name}.cpp" for name in ("sse41", "features", "tile16")]
    built = tree / "kernels.so"
    make = [compiler, *flags, "-O2", "-msse4.1", "-fPIC", "-shared", "-o", str(built)]
    subprocess.run([*make, str(table), *map(str, sources)], check=True)
    listed = ["-fsyntax-only", "-DTERSOR_HAVE_SSE41=1", str(tree / "csrc/dispatch.cpp")]
    subprocess.run([compiler, *flags, *listed], check=True)

    address = ctypes.addressof(ctypes.c_char.in_dll(ctypes.CDLL(str(built)), "table"))
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    assert testing.check_capsule(new_capsule(address, testing.CAPSULE, None)) == 4


def test_every_recipe_ends_with_a_check_that_exists() -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    recipes = re.findall(r"^### (.+)$", guide.split("\n## Recipes\n")[1].split("\n## ")[0], re.M)
    assert len(recipes) == 5
    for title in recipes:
        files = [name for name in recipe(title).check if name.endswith(".py")]
        assert files
        assert all((ROOT / name).is_file() for name in files)
