"""What a timing must be read with: the machine, the versions, the load; and the file it goes to."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("tersor", "torch", "transformers", "onnxruntime", "llmcompressor", "numpy")


def describe() -> dict[str, Any]:
    """The processor, its caches and memory, the software, and how busy the machine is now."""
    return {
        "processor": _cpu_field("model name") or platform.processor(),
        "family_model_stepping": "/".join(
            _cpu_field(field) for field in ("cpu family", "model", "stepping")
        ),
        "instruction_sets": sorted(
            flag
            for flag in _cpu_field("flags").split()
            if flag.startswith(("avx", "amx", "fma", "f16c"))
        ),
        "cores": len(os.sched_getaffinity(0)),
        "last_level_cache_bytes": last_level_cache(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "load_average": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def last_level_cache() -> int:
    """Bytes of the largest cache; 32 MB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20}
    found = [text.strip() for text in (path.read_text() for path in sizes)]
    return max((int(text[:-1]) * units[text[-1]] for text in found), default=32 << 20)


def save(name: str, content: dict[str, Any]) -> Path:
    """Writes bench/results/NAME.json, with the description of the machine first."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": describe(), **content}, indent=1) + "\n")
    return path


def saved(name: str) -> dict[str, Any]:
    """What save() wrote, without the machine's description; nothing where it has not."""
    path = RESULTS / f"{name}.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    content.pop("machine", None)
    return content


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, least and most, in milliseconds."""
    taken = {"median": median(seconds), "least": min(seconds), "most": max(seconds)}
    return {f"{name}_ms": round(1e3 * value, 4) for name, value in taken.items()}


def _cpu_field(name: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in (name, {"flags": "Features"}.get(name)):
            return value.strip()
    return ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
