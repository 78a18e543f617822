"""Teacher and student with tokenizers of their own: which tokens are the same in both, and where
they cut a text the same way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tersor.errors import TersorError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("eos_token_id", "bos_token_id", "pad_token_id", "unk_token_id")


@dataclass(frozen=True)
class VocabularyMap:
    """The tokens that two tokenizers share: those that stand for the same bytes, and special ones
    of the same role (the end of a text, its beginning).

    student, teacher: int64 [shared], one token's number in each.
    pieces: number -> bytes, of each tokenizer; special tokens have none.
    share: the part of the student's vocabulary that is shared.
    corpus_share: the part of the tokens of a text that is shared; None where no text was given.
    """

    student: Tensor
    teacher: Tensor
    pieces: tuple[dict[int, bytes], dict[int, bytes]]
    tokenizers: tuple[Any, Any]
    share: float
    corpus_share: float | None

    def describe(self) -> str:
        """One line for people."""
        told = f"{len(self.student)} tokens are shared, {100 * self.share:.1f} % of the student's"
        if self.corpus_share is None:
            return told
        return f"{told} and {100 * self.corpus_share:.1f} % of those in the text"

    def check(self, student: int, teacher: int) -> None:
        """TersorError where the models' vocabularies, of so many tokens, are too small for it."""
        for whose, ids, size in (
            ("student", self.student, student),
            ("teacher", self.teacher, teacher),
        ):
            if int(ids.max()) >= size:
                raise TersorError(
                    f"the {whose}'s tokenizer has token {int(ids.max())} and its model a "
                    f"vocabulary of {size}; give the tokenizers of these models"
                )

    def translate(self, ids: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """A row of the student's tokens as the teacher would be given its text, and the pairs
        (position in the row, position in the teacher's) from which both predict the same token.

        A pair has the same bytes before it and, in both, a next token that ends at the same byte.
        A row is read up to the first special token after its text, which may be predicted too. A
        text that the teacher's tokenizer changes (upper case, say) has no pairs.
        """
        ours, theirs = self.pieces
        begin = 0
        while begin < len(ids) and ids[begin] not in ours:
            begin += 1
        end = begin
        while end < len(ids) and ids[end] in ours:
            end += 1
        data = b"".join(ours[token] for token in ids[begin:end])
        lost = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
        text = data[lost:].decode("utf-8", errors="ignore")  # a character may be cut at either end
        if not text or not data[lost:].startswith(text.encode()):
            return [], []
        tokenizer = self.tokenizers[1]
        other = list(tokenizer(text, verbose=False)["input_ids"])
        made = b"".join(theirs.get(token, b"") for token in other)
        raw = text.encode()
        if made not in (raw, b" " + raw):
            return [], []
        places = _ends(other, theirs, lost - (len(made) - len(raw)))
        at = {place: j for j, place in enumerate(places)}  # the last token that ends there
        stops = end < len(ids) and bool((self.student == ids[end]).any())
        pairs = []
        positions = _ends(list(ids[:end]), ours, 0)
        for i, place in enumerate(positions):
            j = at.get(place)
            if j is None:
                continue
            if i + 1 < end:
                same = positions[i + 1] > place and positions[i + 1] in at
                if same and j + 1 < len(other) and places[j + 1] == positions[i + 1]:
                    pairs.append((i, j))
            elif stops and place == lost + len(raw):
                pairs.append((i, _last_of_text(other, theirs)))
        return other, pairs


def align_vocabularies(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    texts: Sequence[str] = (),
    least: float = 0.5,
) -> VocabularyMap:
    """What the tokenizers share. texts: to count how much of them is in shared tokens.

    Raises TersorError where less than `least` of the texts' tokens is shared, or without texts
    less than `least` of the student's vocabulary.
    """
    if not 0 <= least <= 1:
        raise TersorError(f"least is {least!r}; give a part from 0 to 1")
    pieces = token_bytes(student), token_bytes(teacher)
    numbers = {piece: token for token, piece in reversed(pieces[1].items())}
    pairs = {token: numbers[piece] for token, piece in pieces[0].items() if piece in numbers}
    for role in _ROLES:
        a, b = getattr(student, role, None), getattr(teacher, role, None)
        free = a not in pairs and b not in pairs.values()
        if a is not None and b is not None and free:
            pairs[a] = b
    share = len(pairs) / max(1, len(student))
    corpus_share = None
    if texts:
        ids = [token for text in texts for token in student(text, verbose=False)["input_ids"]]
        corpus_share = sum(token in pairs for token in ids) / max(1, len(ids))
    ordered = sorted(pairs)
    found = VocabularyMap(
        torch.tensor(ordered, dtype=torch.int64),
        torch.tensor([pairs[token] for token in ordered], dtype=torch.int64),
        pieces,
        (student, teacher),
        share,
        corpus_share,
    )
    if not pairs or (share if corpus_share is None else corpus_share) < least:
        raise TersorError(
            f"the tokenizers have too little in common ({found.describe()}); choose a teacher with "
            "a tokenizer nearer to the student's, let the teacher write a corpus instead "
            "(generate_corpus), or set least lower"
        )
    return found


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """The bytes that each token stands for; special tokens are left out.

    Known are byte-level tokenizers (GPT-2), those that write a space as ▁ (SentencePiece, Llama 2)
    and WordPiece, whose tokens that begin a word stand for a space and the rest.
    """
    kinds = _decoders(tokenizer)
    special = set(tokenizer.all_special_ids)
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    found: dict[int, bytes] = {}
    for text, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if number in special:
            continue
        if number in added:
            found[number] = added[number].encode()
        elif "ByteLevel" in kinds:
            known = all(letter in _BYTES for letter in text)
            found[number] = bytes(_BYTES[c] for c in text) if known else text.encode()
        elif "WordPiece" in kinds:
            found[number] = (text[2:] if text.startswith("##") else f" {text}").encode()
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            found[number] = bytes([int(text[3:5], 16)])
        else:
            found[number] = text.replace("\u2581", " ").encode()
    return found


def _decoders(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        return set()
    decoder = json.loads(core.to_str()).get("decoder") or {}
    return {each["type"] for each in (decoder, *decoder.get("decoders", ())) if each}


def _ends(ids: list[int], pieces: dict[int, bytes], start: int) -> list[int]:
    """The byte at which each token ends."""
    ends, place = [], start
    for token in ids:
        place += len(pieces.get(token, b""))
        ends.append(place)
    return ends


def _last_of_text(ids: list[int], pieces: dict[int, bytes]) -> int:
    """The position of the last token that is not special, after which the text ends."""
    return max(i for i, token in enumerate(ids) if token in pieces)


def _byte_letters() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte: the printable ones of Latin-1
    stand for themselves, the others are counted up from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()
