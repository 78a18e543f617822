"""The folder that a search works in, `<out>.search`: so that one that was killed goes on, and no
other gets in its way.

    lock                      held with flock by the run that works there
    settings.json             what two runs must have in common for one to go on from the other
    linear-00000.safetensors  of each linear, all candidates (see solutions.py)
    latency.json              seconds by shape, measured once
    kl.jsonl                  every choice that was measured
    chosen-0123456789abcdef/  a checkpoint by its settings, whole, before it becomes the output
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tersor.durable import durable
from tersor.errors import TersorError
from tersor.shards import LOCK, lock_folder

SETTINGS, LATENCY = "settings.json", "latency.json"


def claim(work: Path, settings: dict[str, Any]) -> int:
    """Makes the folder of a search, or finds there that it is of the same one, or of another that
    has only timed. Returns its lock."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / SETTINGS
    if not path.exists() and (strangers := set(os.listdir(work)) - {LOCK, SETTINGS + ".tmp"}):
        raise TersorError(
            f"{work} is not the work of a search (it holds {min(strangers)}); move it away, or "
            "choose another --out"
        )
    lock = lock_folder(work)
    try:
        _settle(work, json.loads(json.dumps(settings)))
    except BaseException:
        os.close(lock)
        raise
    return lock


def _settle(work: Path, settings: dict[str, Any]) -> None:
    path = work / SETTINGS
    if path.exists():
        before = json.loads(path.read_text())
        if before == settings:
            return
        # Seconds are soon measured again, and need not stand in the way of other settings.
        if set(os.listdir(work)) - {LOCK, SETTINGS, LATENCY, SETTINGS + ".tmp", LATENCY + ".tmp"}:
            key = next(k for k in before | settings if before.get(k) != settings.get(k))
            raise TersorError(
                f"{work} is of an unfinished search that differs in its {key}; remove it to begin "
                "anew, repeat the search as it was, or choose another --out"
            )
        (work / LATENCY).unlink(missing_ok=True)
    with durable(path) as file:
        file.write(json.dumps(settings, indent=1).encode())


def remove(work: Path) -> None:
    """What tells whose the folder is goes last."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (SETTINGS, LOCK):
            path.unlink()
    shutil.rmtree(work)
