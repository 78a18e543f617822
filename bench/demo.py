"""`tersor demo` with its figures kept: quality and speed of the demo model by method.

    python bench/demo.py

Writes bench/results/demo.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import machine
from tersor import demo

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "demo.json"
        demo.run(figures)
        print(machine.save("demo", json.loads(figures.read_text())))
