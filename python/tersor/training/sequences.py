"""Sequence-level distillation: the teacher writes the text that the student is trained on (Kim and
Rush, arXiv:1606.07947).

    corpus.jsonl             a line for each text: prompt, text, ids, prompt_tokens, ended
    corpus.jsonl.partial/    until it is whole: text.jsonl, and the settings it is written with

Batches are added one after the other, each synced to disk. A run that was killed goes on after the
last whole batch, and since the draws of a batch depend on the seed and its number alone, the file
is the same in the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from torch import nn
from torch.utils.data import Dataset

from tersor.durable import disk_errors, durable, sync_folder
from tersor.errors import TersorError
from tersor.progress import Progress
from tersor.tensorfile import loose_json
from tersor.training.fused import IGNORED
from tersor.training.generation import (
    check_can_write,
    check_drawing,
    check_room,
    complete,
    ends_of,
    seed_of,
)
from tersor.training.offline import digest_of_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT, _SETTINGS = "text.jsonl", "settings.json"


def generate_corpus(
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    out: str | Path,
    *,
    new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    samples: int = 1,
    batch: int = 8,
    seed: int = 0,
    resume: bool = True,
    progress: bool | None = None,
) -> Path:
    """Lets a teacher go on from every prompt and writes its texts to out, a .jsonl file.

    The file is a source of Calibration as it is, and CorpusRows reads it for a Trainer.

    tokenizer: encodes a prompt as it does any text, with its special tokens.
    temperature: 0 takes the most likely token. samples: texts for each prompt, which differ only
        where they are drawn. batch: prompts at a time, padded on the left. The rest as in complete.
    resume: go on with a run that was stopped; else begin again.
    Raises TersorError if out exists, for other settings than those of an unfinished run, for a
    prompt without tokens or too long, and for a full disk.
    """
    out = Path(out)
    partial = out.with_name(f"{out.name}.partial")
    check_can_write(teacher)
    check_drawing(new_tokens, temperature, top_p)
    for name, value in (("samples", samples), ("batch", batch)):
        if value < 1:
            raise TersorError(f"{name} is {value}; give at least 1")
    if samples > 1 and temperature == 0:
        raise TersorError("at temperature 0 all samples are the same; give samples=1, or draw")
    if out.suffix != ".jsonl":
        raise TersorError(f"{out} is written as JSON Lines; give a name that ends in .jsonl")
    if isinstance(prompts, str) or not len(prompts):
        raise TersorError("give a list of prompts, at least one")
    ids = [_encode(tokenizer, prompt, number) for number, prompt in enumerate(prompts)]
    longest = max(range(len(ids)), key=lambda number: len(ids[number]))
    check_room(teacher, len(ids[longest]), new_tokens, f"prompt {longest}")
    settings = {
        "teacher": digest_of_weights(teacher),
        "prompts": hashlib.blake2b(json.dumps(ids).encode(), digest_size=16).hexdigest(),
        "ends": ends_of(teacher),
        "new_tokens": new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "samples": samples,
        "batch": batch,
        "seed": seed,
    }
    if out.exists():
        if _settings(partial) == settings and not (partial / _TEXT).exists():
            return _finish(out, partial)  # stopped just after it had its name
        raise TersorError(f"{out} exists already; remove it or choose another output")
    order = [number for number in range(len(ids)) for _ in range(samples)]
    parts = [order[start : start + batch] for start in range(0, len(order), batch)]
    with disk_errors(out.parent):
        partial.mkdir(parents=True, exist_ok=True)
    with (partial / _TEXT).open("ab") as file, Progress(progress) as bar:
        _lock(file, out)
        with disk_errors(partial):
            done = _begin(partial, settings, batch, len(order), resume)
        bar.expect(len(parts) - done)
        for number in range(done, len(parts)):
            texts = complete(
                teacher,
                [ids[i] for i in parts[number]],
                new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed_of("corpus", seed, number),
            )
            pairs = zip(parts[number], texts, strict=True)
            lines = [_line(tokenizer, prompts[i], ids[i], new, settings) for i, new in pairs]
            with disk_errors(partial):
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
            bar.step()
    return _finish(out, partial)


class CorpusRows(Dataset):
    """The texts of generate_corpus as rows for a Trainer: input_ids, attention_mask and labels, in
    which the prompt does not count. Rows have their own lengths, so the collator must pad them:
    DataCollatorForSeq2Seq(tokenizer) does.

    length: rows are cut to so many tokens. whole: leaves out texts that did not come to an end.
    Raises TersorError for a file that generate_corpus did not write.
    """

    def __init__(self, path: str | Path, length: int | None = None, whole: bool = False) -> None:
        if length is not None and length < 2:
            raise TersorError(f"length is {length}; a row needs at least 2 tokens")
        self.path, self.length = Path(path), length
        self.places: list[tuple[int, int]] = []
        start, number = 0, 0
        try:
            with self.path.open("rb") as file:
                for line in file:
                    number += 1
                    record = json.loads(line)
                    count, total = record["prompt_tokens"], len(record["ids"])
                    if not 0 < count <= total:
                        raise ValueError(f"a prompt of {count} of {total} tokens")
                    room = length is None or count < length
                    if room and count < total and (record["ended"] or not whole):
                        self.places.append((start, len(line)))
                    start += len(line)
        except (ValueError, KeyError, TypeError) as error:
            raise TersorError(
                f"{path}, line {number} is none of generate_corpus ({error}); write it again"
            ) from error
        except OSError as error:
            raise TersorError(f"cannot read {path}: {error.strerror or error}") from error

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        start, size = self.places[i]
        with self.path.open("rb") as file:
            file.seek(start)
            record = json.loads(file.read(size))
        ids, prompt = record["ids"][: self.length], record["prompt_tokens"]
        labels = [IGNORED] * prompt + ids[prompt:]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, number: int) -> list[int]:
    if not isinstance(prompt, str):
        raise TersorError(f"prompt {number} is a {type(prompt).__name__}; give texts")
    ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        raise TersorError(f"prompt {number} has no tokens; give it some text")
    return ids


def _line(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    ids: list[int],
    new: list[int],
    settings: dict[str, Any],
) -> str:
    record = {
        "prompt": prompt,
        "text": tokenizer.decode(ids + new, skip_special_tokens=True),
        "ids": ids + new,
        "prompt_tokens": len(ids),
        "ended": bool(new) and new[-1] in settings["ends"],
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def _lock(file: BinaryIO, out: Path) -> None:
    """Until the file is closed, or the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TersorError(
            f"another run is writing {out}; wait for it, or choose another output"
        ) from None


def _settings(partial: Path) -> dict[str, Any] | None:
    try:
        return loose_json((partial / _SETTINGS).read_bytes())
    except (OSError, ValueError):
        return None


def _begin(partial: Path, settings: dict[str, Any], batch: int, count: int, resume: bool) -> int:
    """Brings the partial folder to the end of its last whole batch; how many there are."""
    before, text = _settings(partial), partial / _TEXT
    if before is not None and resume:
        changed = sorted(key for key in settings if before.get(key) != settings[key])
        if changed:
            raise TersorError(
                f"{partial} holds an unfinished run with other settings ({', '.join(changed)}); "
                "use those again, or remove it to begin anew"
            )
        ends = [0]
        with text.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    ends.append(ends[-1] + len(line))
        lines = len(ends) - 1
        done = -(-lines // batch) if lines == count else lines // batch
        os.truncate(text, ends[min(done * batch, lines)])
        return done
    os.truncate(text, 0)
    with durable(partial / _SETTINGS) as file:
        file.write(json.dumps(settings).encode())
    return 0


def _finish(out: Path, partial: Path) -> Path:
    with disk_errors(out.parent):
        if (partial / _TEXT).exists():
            os.replace(partial / _TEXT, out)
            sync_folder(out.parent)
        (partial / _SETTINGS).unlink(missing_ok=True)
        partial.rmdir()
    return out
