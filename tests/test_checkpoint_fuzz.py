"""Thousands of damaged files: each gives a TersorError, or tensors that are bit for bit what the
safetensors library reads from it; never another error, a crash or a hang."""

from __future__ import annotations

import random
import re
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from stored import bits, memory_folder
from tersor.checkpoint import Checkpoint
from tersor.errors import TersorError
from tersor.tensorfile import DTYPES
from test_checkpoint import TENSORS, make, make_sharded, raw


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        yield path


@pytest.fixture
def time_limit() -> Iterator[None]:
    """Turns a hang into a failure."""

    def expired(*_: object) -> None:
        raise AssertionError("a damaged file made the reader hang")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read_all(folder: Path) -> dict[str, Any] | None:
    """Every tensor's bits, or None where the reader refuses. Any other error is the test's."""
    try:
        checkpoint = Checkpoint.open(folder)
        return {name: bits(checkpoint.load(name)) for name in checkpoint.names}
    except TersorError as error:
        message = str(error)
    assert "\n" not in message
    return None


NUMBERS = [
    "-1",
    "-0",
    "0",
    "1",
    "2",
    "3",
    "4",
    "7",
    "8",
    "12",
    "1.0",
    "1e3",
    "1e999",
    "NaN",
    "Infinity",
    "true",
    "null",
    "[]",
    "{}",
    "00",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
]
WORDS = [*DTYPES, "f32", "", "__metadata__", "shape", "dtype", "a.weight", "\\ud800", "\\u0000"]


def edit_header(rng: random.Random, text: str) -> str:
    """One plausible edit of the JSON: a number, a word, a field or an entry."""
    pattern = rng.choice((r"\d+", r"\d+", r'"[^"]*"', r'"[^"]*":\{[^{}]*\},?'))
    spots = list(re.finditer(pattern, text))
    if not spots:
        return text
    spot, other = rng.choice(spots), rng.choice(spots).group()
    if pattern == r"\d+":
        new = rng.choice((other, *NUMBERS))
    elif pattern == r'"[^"]*"':
        new = rng.choice((other, f'"{rng.choice(WORDS)}"'))
    else:
        new = rng.choice((other, "", f"{spot.group()},{other}"))
    return text[: spot.start()] + new + text[spot.end() :]


def mutate(rng: random.Random, blob: bytes) -> bytes:
    """Damage a file: bytes flipped, cut, inserted, repeated; or a header edited and made to fit."""
    kind = rng.randrange(8)
    if kind < 4:
        (length,) = struct.unpack("<Q", blob[:8])
        text = blob[8 : 8 + length].decode()
        for _ in range(rng.choice((1, 1, 2))):
            text = edit_header(rng, text)
        return raw(text.encode(), blob[8 + length :])
    spot = rng.randrange(len(blob))
    if kind == 4:
        return blob[:spot]
    if kind == 5:
        return blob[:spot] + rng.randbytes(rng.choice((1, 2, 8))) + blob[spot:]
    if kind == 6:
        return blob[:spot] + blob[rng.randrange(len(blob)) :]
    flipped = bytearray(blob)
    for _ in range(rng.choice((1, 2, 5))):
        flipped[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def test_fuzzed_files(folder: Path, time_limit: None) -> None:
    rng = random.Random(2)
    make(folder)
    path = folder / "model.safetensors"
    blobs = [save(TENSORS, {"format": "pt"}), save({"w": torch.ones(2, 2)}), save(TENSORS)]
    accepted = refusals = 0
    for turn in range(5000):
        path.write_bytes(mutate(rng, blobs[turn % len(blobs)]))
        found = read_all(folder)
        if found is None:
            refusals += 1
            continue
        accepted += 1
        with safe_open(path, "pt") as oracle:  # raises if the library would not take the file
            assert found == {name: bits(oracle.get_tensor(name)) for name in oracle.keys()}  # noqa: SIM118
    assert accepted > 200  # both outcomes are exercised: flips in data are not damage to us
    assert refusals > 3000


def test_fuzzed_indexes(folder: Path, time_limit: None) -> None:
    rng = random.Random(3)
    make_sharded(folder)
    path = folder / "model.safetensors.index.json"
    text = path.read_bytes()
    expected = {name: bits(tensor) for name, tensor in TENSORS.items()}
    accepted = 0
    for _ in range(800):
        damaged = bytearray(text)
        for _ in range(rng.choice((1, 1, 3))):
            spot = rng.randrange(len(damaged))
            match rng.randrange(4):
                case 0:
                    damaged[spot] ^= 1 << rng.randrange(8)
                case 1:
                    del damaged[spot : spot + rng.choice((1, 9, 60))]
                case 2:
                    damaged[spot:spot] = rng.choice(
                        (b"../", b"/", b'"', b"{", b"\0", b"\xff", b",")
                    )
                case _:
                    damaged[spot:] = text[rng.randrange(len(text)) :]
        path.write_bytes(damaged)
        found = read_all(folder)
        if found is not None:
            accepted += 1
            assert expected.items() >= found.items()
    assert 0 < accepted < 800
