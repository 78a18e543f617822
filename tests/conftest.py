"""What every test shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch or tokenizers are loaded: tests run on small tensors, where more threads only cost,
# and a fork after tokenizers has started threads would print a warning.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if TYPE_CHECKING:
    from tersor.demo_model import DemoModel

# A worker's share of the cores: threads of several workers that spin on one core stop each other.
CORES = max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
torch.set_num_threads(1)


@contextmanager
def all_cores() -> Iterator[None]:
    """For the few tests with work enough for all of them, or for the worker's share."""
    torch.set_num_threads(CORES)
    try:
        yield
    finally:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_model() -> DemoModel:
    """The trained model of `tersor demo`, from the user's cache: made once on each machine, in
    about two minutes."""
    from tersor.demo_model import demo_model as make

    with all_cores():
        return make()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """case -> the folder that save_pretrained made of architectures.original(case)."""
    from architectures import original

    @cache
    def save(case: str) -> Path:
        folder = tmp_path_factory.mktemp(case)
        original(case).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> the folder of a tiny model of that kind."""
    import tiny

    @cache
    def make(kind: str) -> Path:
        return tiny.save(tmp_path_factory.mktemp("models") / kind, kind)

    return make


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
