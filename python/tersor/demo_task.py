"""A task to fine-tune the demo model on, made of text at hand: which package of Python's standard
library is this excerpt from?"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

from tersor.calibrate import load_tokenizer
from tersor.demo_model import DemoModel
from tersor.errors import TersorError

PACKAGES = (  # in every Python that is supported, each with enough text
    *("asyncio", "email", "http", "importlib", "logging"),
    *("multiprocessing", "unittest", "urllib", "xml"),
)
HELD_OUT = 4  # the last of every so many parts of a file is kept from training


@dataclass(frozen=True)
class Excerpts:
    """ids: int64 [count, length]. labels: int64 [count], numbers of PACKAGES."""

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)


def excerpts(source: DemoModel, length: int = 64) -> tuple[Excerpts, Excerpts]:
    """For training and held out: as many of each package, none of which overlap. Every file of a
    package gives its first three quarters to the one and its last to the other.

    The demo model was trained to go on with most of this text, but has never seen a label.
    Raises TersorError where this Python comes without the sources.
    """
    tokenizer = load_tokenizer(source.folder)
    root = Path(sysconfig.get_path("stdlib"))
    kept: list[list[Tensor]] = [[], []]
    for package in PACKAGES:
        files = sorted((root / package).rglob("*.py"))
        if not files:
            raise TersorError(
                f"{root / package} has no Python files; use a Python that comes with the sources "
                "of its standard library"
            )
        parts: list[list[Tensor]] = [[], []]
        for path in files:
            text = path.read_text(encoding="utf-8", errors="replace")
            ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
            windows = ids[: len(ids) // length * length].view(-1, length)
            first = len(windows) - len(windows) // HELD_OUT
            parts[0].append(windows[:first])
            parts[1].append(windows[first:])
        for part, windows_of in zip(kept, parts, strict=True):
            part.append(torch.cat(windows_of))
    return _balanced(kept[0]), _balanced(kept[1])


def _balanced(windows: list[Tensor]) -> Excerpts:
    """As many of each class, spread evenly over what it has."""
    count = min(map(len, windows))
    ids = [w[torch.arange(count) * len(w) // count] for w in windows]
    return Excerpts(torch.cat(ids), torch.arange(len(windows)).repeat_interleave(count))


def classifier(source: DemoModel, seed: int) -> nn.Module:
    """The demo model in float32 with a new head for the task."""
    torch.manual_seed(seed)
    model: nn.Module = LlamaForSequenceClassification.from_pretrained(
        source.folder, num_labels=len(PACKAGES), dtype=torch.float32
    )
    return model


def batches(data: Excerpts, count: int, size: int, seed: int) -> list[dict[str, Tensor]]:
    """Arguments of the model for so many steps; every excerpt once before any comes again."""
    draw = torch.Generator().manual_seed(seed)
    rounds = -(-count * size // len(data))
    order = torch.cat([torch.randperm(len(data), generator=draw) for _ in range(rounds)])
    return [
        {"input_ids": data.ids[at], "labels": data.labels[at]}
        for at in order[: count * size].view(count, size)
    ]


@torch.no_grad()
def accuracy(model: nn.Module, data: Excerpts) -> float:
    """The share of excerpts that the model names the package of."""
    training = model.training
    model.eval()
    right = 0
    for ids, labels in zip(data.ids.split(64), data.labels.split(64), strict=True):
        right += int((model(input_ids=ids).logits.argmax(-1) == labels).sum())
    model.train(training)
    return right / len(data)
