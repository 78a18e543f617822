"""A small real language model made on the spot, for machines that cannot download one.

A Llama of a few million parameters with its own tokenizer, trained for about two minutes on the
text of Python's standard library, and kept in the user's cache folder. Its held-out texts are
library files that it never saw, and prose: the topics of Python's `help()`.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import itertools
import json
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from tersor.demo_training import Training, save_model, train, train_tokenizer
from tersor.errors import TersorError

# Tables of characters, tests and generated or vendored files: no text like the rest.
_EXCLUDED = {
    *("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"),
    *("encodings", "pydoc_data", "lib2to3", "idlelib", "turtledemo", "distutils", "ensurepip"),
}
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Recipe:
    """All that the model depends on, apart from the Python and the libraries that make it.

    held_out: characters of each text that is kept from training.
    calibration: characters of the training text that are offered for calibration.
    """

    vocabulary: int = 2048
    held_out: int = 330_000
    calibration: int = 600_000
    training: Training = field(default_factory=Training)


@dataclass(frozen=True)
class DemoModel:
    """Where the model is. `folder` is an ordinary Hugging Face checkpoint in bfloat16.

    calibration: library text that the model was trained on.
    held_out: texts that it was not trained on: "code" of the same kind, "prose" of another.
    record: how the training went (steps, tokens, seconds, loss, whether time ran out).
    """

    folder: Path
    calibration: Path
    held_out: dict[str, Path]
    record: dict[str, object]


def demo_model(recipe: Recipe | None = None, say: Callable[[str], None] = print) -> DemoModel:
    """The demo model from the cache folder, made first where it is not there.

    The cache is $XDG_CACHE_HOME/tersor, by default ~/.cache/tersor. What is found there is
    checked against its SHA-256 sums, and made again if it differs. An entry appears under its
    name only when it is whole.

    Raises TersorError where this Python comes without the sources of its standard library.
    """
    recipe = recipe or Recipe()
    home = _cache() / f"demo-{_key(recipe)}"
    if (manifest := _verified(home, say)) is None:
        home.parent.mkdir(parents=True, exist_ok=True)
        with _alone(home), tempfile.TemporaryDirectory(prefix=".demo-", dir=home.parent) as scratch:
            if (manifest := _verified(home, say)) is None:  # nobody has made it meanwhile
                work = Path(scratch) / "entry"
                manifest = _make(work, recipe, say)
                _tell_if_weak(manifest, home, say)
                try:
                    work.rename(home)
                except OSError:  # without locks another process has been faster: take its model
                    if (manifest := _verified(home, say)) is None:
                        raise
    return DemoModel(
        folder=home / "model",
        calibration=home / "text" / "calibration.txt",
        held_out={kind: home / "text" / f"{kind}.txt" for kind in ("code", "prose")},
        record=manifest["record"],
    )


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One process makes an entry, and others that want it wait."""
    handle = os.open(home.with_name(f".{home.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tersor"


def _key(recipe: Recipe) -> str:
    made_by = [platform.python_version(), metadata.version("transformers")]
    return hashlib.sha256(json.dumps([asdict(recipe), made_by]).encode()).hexdigest()[:16]


def _verified(home: Path, say: Callable[[str], None]) -> dict[str, dict[str, object]] | None:
    """The manifest of a cache entry whose files are all as they were written, else None.
    What is damaged is removed."""
    if not home.exists():
        return None
    try:
        manifest: dict[str, dict[str, object]] = json.loads((home / _MANIFEST).read_text())
        if manifest["files"] == _sums(home):
            _tell_if_weak(manifest, home, say)
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    say(f"The demo model in {home} is damaged; making it again.")
    shutil.rmtree(home)
    return None


def _tell_if_weak(manifest: dict[str, Any], home: Path, say: Callable[[str], None]) -> None:
    """A model that was not trained to the end is one all the same, but not in silence."""
    steps, planned = manifest["record"]["steps"], manifest["recipe"]["training"]["steps"]
    if steps != planned:
        say(
            f"Time ran out when the demo model was trained, after {steps} of {planned} steps: it "
            f"is weaker. Remove {home} to train it again."
        )


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _MANIFEST)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _make(work: Path, recipe: Recipe, say: Callable[[str], None]) -> dict[str, dict[str, object]]:
    held_out, training = split_documents(recipe)
    (work / "text").mkdir(parents=True)
    for name, texts, characters in (
        ("calibration", training, recipe.calibration),
        ("code", held_out, recipe.held_out),
        ("prose", help_topics(), recipe.held_out),
    ):
        text = "\n\n".join(texts)[:characters]
        (work / "text" / f"{name}.txt").write_text(text, encoding="utf-8")

    say(f"Training the demo model on {len(training)} files of Python's standard library, once.")
    tokenizer = train_tokenizer(training, recipe.vocabulary)
    model, record = train(tokenizer, training, recipe.training)
    save_model(model, tokenizer, work / "model")
    manifest = {"recipe": asdict(recipe), "record": record, "files": _sums(work)}
    (work / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def split_documents(recipe: Recipe) -> tuple[list[str], list[str]]:
    """The library's modules that are held out, and those that the model is trained on."""
    documents = library_documents()
    count = _covering(documents, recipe.held_out)
    if count == len(documents):
        raise TersorError("the standard library of this Python is too small to train on")
    return documents[:count], documents[count:]


def _covering(documents: list[str], characters: int) -> int:
    """How many of the first documents together have so many characters."""
    totals = list(itertools.accumulate(map(len, documents)))
    return min(bisect.bisect_left(totals, characters) + 1, len(documents))


def library_documents() -> list[str]:
    """The modules of the standard library, in an order that looks random and never changes."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*.py")
        if not _EXCLUDED.intersection(path.relative_to(root).parts)
    }
    if len(found) < 100:
        raise TersorError(
            f"{root} has {len(found)} Python files, too few to train the demo model; use a Python "
            f"that comes with the sources of its standard library"
        )
    ordered = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
    return [found[name].read_text(encoding="utf-8", errors="replace") for name in ordered]


def help_topics() -> list[str]:
    """The prose of Python's `help()`: topics of its language reference."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise TersorError(
            "this Python comes without pydoc_data, the text of help(); install the whole of its "
            "standard library"
        ) from None
    return [topics[name] for name in sorted(topics)]
