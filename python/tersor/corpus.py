"""Text files as documents that are read when they are asked for, so that size does not matter."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Protocol

from tersor.errors import TersorError


class Documents(Protocol):
    """Texts by number; a list of strings is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> str: ...


def open_documents(source: str, piece: int) -> Documents:
    """The documents of `name.jsonl:field` (`text` if no field is named) or of a plain text file.

    piece: about how many bytes of plain text make a document.
    Raises TersorError where the file is absent.
    """
    name, colon, field = source.rpartition(":")
    if not (colon and name.endswith(".jsonl")):
        name, field = source, "text"
    path = Path(name)
    if not path.is_file():
        raise TersorError(f"there is no text file {name}; check the path")
    return JsonLines(path, field) if name.endswith(".jsonl") else TextFile(path, piece)


class TextFile:
    """A text file in pieces of about `piece` bytes, divided after a line or, failing that, a word.

    Only the places of the pieces are kept in memory.
    """

    def __init__(self, path: Path, piece: int) -> None:
        self.path = path
        self.starts = [0]
        with path.open("rb") as file:
            while chunk := file.read(piece):
                size = _cut(chunk) if len(chunk) == piece else len(chunk)
                self.starts.append(self.starts[-1] + size)
                file.seek(self.starts[-1])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> str:
        return _read(self.path, self.starts[i], self.starts[i + 1])


class JsonLines:
    """One field of every line of a JSON Lines file; blank lines are passed over."""

    def __init__(self, path: Path, field: str) -> None:
        self.path, self.field = path, field
        self.places: list[tuple[int, int, int]] = []  # first byte, end, line number
        start = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self.places.append((start, start + len(line), number))
                start += len(line)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> str:
        start, end, number = self.places[i]
        line = _read(self.path, start, end)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            cause = getattr(error, "msg", error)
            raise TersorError(
                f"{self.path}, line {number} is not JSON ({cause}); mend or remove the line"
            ) from None
        if not isinstance(record, dict) or not isinstance(record.get(self.field), str):
            have = ", ".join(sorted(record)) if isinstance(record, dict) else "no fields"
            raise TersorError(
                f"{self.path}, line {number} has no text in a field {self.field!r} (it has "
                f"{have}); name the field as {self.path.name}:FIELD"
            )
        text: str = record[self.field]
        check_characters(text, f"{self.path}, line {number}")
        return ended(text)


def check_characters(text: str, where: str) -> None:
    """TersorError if half of a surrogate pair is in the text, on which tokenizers choke."""
    if half := re.search(r"[\ud800-\udfff]", text):
        raise TersorError(
            f"{where} has half of a surrogate pair at character {half.start()}, which is no "
            "character; mend or remove it"
        )


def ended(document: str) -> str:
    """A document before the next one: a blank line is between them, as where GPTQ's authors join
    the lines of a corpus. A blank document is no document."""
    return document + "\n\n" if document.strip() else ""


def _cut(chunk: bytes) -> int:
    """Where to end a piece of a longer text: after a line, a word or at least a character."""
    if at := chunk.rfind(b"\n") + 1 or chunk.rfind(b" ") + 1:
        return at
    # The last character of the chunk may be incomplete: end before it. In UTF-8 only the first
    # byte of a character is not 10xxxxxx.
    at = len(chunk) - 1
    while at > 1 and chunk[at] & 0xC0 == 0x80:
        at -= 1
    return max(at, 1)


def read_text(source: str) -> str:
    """All documents of a source, one after the other. TersorError where it cannot be read."""
    documents = open_documents(source, piece=1 << 20)
    return "".join(documents[i] for i in range(len(documents)))


def digest_text(source: str) -> str:
    """The SHA-256 of what read_text gives, a piece at a time."""
    documents, sha = open_documents(source, piece=1 << 20), hashlib.sha256()
    for i in range(len(documents)):
        sha.update(documents[i].encode())
    return sha.hexdigest()


def _read(path: Path, start: int, end: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        raw = file.read(end - start)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TersorError(
            f"{path} is not UTF-8 (byte {start + error.start}); convert it, for instance with iconv"
        ) from None
