"""Rules about files that no other linter knows: length, and paths of somebody's machine.

A Python file past 500 lines or a C++ or CUDA file past 800 has a seam that wants to be found.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".ci", ".github", "bench", "csrc", "python", "tests", "third_party")
MOST_LINES = {".py": 500, ".cpp": 800, ".h": 800, ".cu": 800, ".cuh": 800}
# Absolute paths into somebody's home.
PRIVATE = re.compile(r"(?<![\w./-])/(?:home|root|Users|mnt)/\w")


def files() -> list[Path]:
    inside = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*")]
    found = [p for p in (*ROOT.iterdir(), *inside) if p.is_file()]
    return sorted(p for p in found if "__pycache__" not in p.parts)


def faults(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return []  # binary
    name = path.relative_to(ROOT)
    found = []
    most = MOST_LINES.get(path.suffix)
    if most is not None and len(lines) > most:
        found.append(f"{name}: {len(lines)} lines, more than {most}: split it where it has a seam")
    for number, line in enumerate(lines, 1):
        if PRIVATE.search(line):
            found.append(f"{name}:{number}: a path that exists on one machine only")
    return found


if __name__ == "__main__":
    found = [fault for path in files() for fault in faults(path)]
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))
