"""A task to fine-tune the demo model on, made of text at hand: what is every token of this Python
source, as an editor would colour it? Some is seen at once (a number), some asks what came before
(inside a string or not), some can only be guessed (a name that is about to be called)."""

from __future__ import annotations

import io
import keyword
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaForTokenClassification

from tersor.calibrate import load_tokenizer
from tersor.demo_model import DemoModel
from tersor.errors import TersorError

KINDS = (
    *("space", "comment", "string", "number", "operator", "keyword"),
    *("defined", "attribute", "called", "argument", "name"),
)
PACKAGES = (  # in every Python that is supported
    *("asyncio", "email", "http", "importlib", "json", "logging"),
    *("multiprocessing", "unittest", "urllib", "xml"),
)
HELD_OUT = 4  # the last of every so many parts of a file is kept from training


@dataclass(frozen=True)
class Excerpts:
    """ids: int64 [count, length]. labels: the same shape, numbers of KINDS."""

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)


def kinds(source: str) -> list[str]:
    """The kind of every character. Raises SyntaxError or tokenize.TokenError for no Python."""
    lines = source.splitlines(keepends=True)
    begins = [0]
    for line in lines:
        begins.append(begins[-1] + len(line))
    found = ["space"] * len(source)
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.string.strip()
    ]
    depth = 0
    for number, token in enumerate(tokens):
        before = tokens[number - 1].string if number else ""
        after = tokens[number + 1].string if number + 1 < len(tokens) else ""
        depth += (token.string in ("(", "[", "{")) - (token.string in (")", "]", "}"))
        kind = _kind(token, before, after, depth)
        first = begins[token.start[0] - 1] + token.start[1]
        last = begins[token.end[0] - 1] + token.end[1]
        found[first:last] = [kind] * (last - first)
    return found


def _kind(token: tokenize.TokenInfo, before: str, after: str, depth: int) -> str:
    if token.type == tokenize.COMMENT:
        return "comment"
    if token.type == tokenize.NUMBER:
        return "number"
    if token.type == tokenize.OP:
        return "operator"
    if token.type != tokenize.NAME:
        return "string"  # in pieces from Python 3.12 on, where it is formatted
    if keyword.iskeyword(token.string):
        return "keyword"
    if before in ("def", "class"):
        return "defined"
    if after == "(":
        return "called"
    if before == ".":
        return "attribute"
    return "argument" if depth and after == "=" else "name"


def excerpts(source: DemoModel, length: int = 48) -> tuple[Excerpts, Excerpts]:
    """For training and held out, in an order that looks random; none overlap. Every file gives its
    first three quarters to the one and its last to the other.

    The demo model was trained to go on with most of this text, but has never seen a label.
    Raises TersorError where this Python comes without the sources.
    """
    tokenizer = load_tokenizer(source.folder)
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    if len(files) < 100:
        raise TersorError(
            f"{root} has {len(files)} Python files in {', '.join(PACKAGES)}; use a Python that "
            "comes with the sources of its standard library"
        )
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace").replace("\f", " ")
        try:
            known = kinds(text)
        except (SyntaxError, tokenize.TokenError):
            continue  # a template
        coded = tokenizer(text, return_offsets_mapping=True, verbose=False)
        labels = [
            KINDS.index(next((k for k in known[first:last] if k != "space"), "space"))
            for first, last in coded["offset_mapping"]
        ]
        both = torch.tensor([coded["input_ids"], labels], dtype=torch.int64)  # [2, tokens]
        windows = both[:, : both.shape[1] // length * length].unflatten(1, (-1, length))
        first = windows.shape[1] - windows.shape[1] // HELD_OUT
        parts[0].append(windows[:, :first])
        parts[1].append(windows[:, first:])
    train, held_out = (torch.cat(part, dim=1) for part in parts)
    return _shuffled(train), _shuffled(held_out)


def _shuffled(windows: Tensor) -> Excerpts:
    order = torch.randperm(windows.shape[1], generator=torch.Generator().manual_seed(0))
    return Excerpts(*windows[:, order])


def classifier(source: DemoModel, seed: int, layers: int | None = None) -> nn.Module:
    """The demo model, or its first layers, in float32 with a new head for the task."""
    torch.manual_seed(seed)
    model: nn.Module = LlamaForTokenClassification.from_pretrained(
        source.folder, num_labels=len(KINDS), dtype=torch.float32
    )
    if layers is not None:
        del model.model.layers[layers:]
        model.config.num_hidden_layers = layers
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
    """The share of tokens whose kind the model names."""
    training = model.training
    model.eval()
    right = 0
    for ids, labels in zip(data.ids.split(64), data.labels.split(64), strict=True):
        right += int((model(input_ids=ids).logits.argmax(-1) == labels).sum())
    model.train(training)
    return right / data.labels.numel()
