"""What may be read from a model's folder, and which of its small files a derived model needs."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path

from tersor.errors import TersorError
from tersor.tensorfile import show

# Small files that a derived model needs beside its config and weights.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# Never copied, whatever the name before it: code, weights, and what unpickles.
FORBIDDEN = (
    *(".py", ".pyc", ".so", ".pkl", ".pickle", ".npy", ".npz"),
    *(".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".safetensors"),
)
MAX_COMPANION = 256 << 20  # bytes; the largest tokenizers have about 40 MB


def member(folder: Path, name: str) -> Path:
    """The regular file `name` of a folder; TersorError if it is missing, or not inside it.

    Names come from files that others wrote, so a name must be plain: no separators, no "..". A
    link is followed only inside the folder, or where the hub's client put it: in its cache,
    `models--x/snapshots/<revision>/file` is a link to `models--x/blobs/<hash>`, in newer versions
    and from there to `blobs/<ha>/<hash>` beside all models. Any other link is refused, because a
    downloaded folder could name a private file that would be copied into the output and published.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise TersorError(f"{folder} refers to {show(name)}; only plain file names are accepted")
    path = folder / name
    if not os.path.lexists(path):
        raise TersorError(f"{folder} has no {show(name)}; download the model again, all of it")
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    homes = [home]
    cache = home.parent.parent
    if home.parent.name == "snapshots" and cache.name.startswith("models--"):
        homes += [cache / "blobs", cache.parent / "blobs"]
    if not any(real.is_relative_to(allowed) for allowed in homes):
        raise TersorError(
            f"{path} is a link out of its folder, to {real}; put the file itself there"
        )
    if not os.path.isfile(real):
        raise TersorError(f"{path} is not a regular file; download it again")
    return path


def companions(folder: Path) -> list[Path]:
    """The small files to copy into a derived model, by name: tokenizer, chat template, generation
    and processor configuration, licence. Never weights, code, or what lies in a subfolder.

    TersorError if one is a link that member() refuses, or is larger than MAX_COMPANION.
    """
    found = []
    for name in sorted(os.listdir(folder)):
        wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANIONS)
        if not wanted or os.path.splitext(name)[1].lower() in FORBIDDEN:
            continue
        if os.path.isdir(folder / name) and not os.path.islink(folder / name):
            continue
        path = member(folder, name)
        if path.stat().st_size > MAX_COMPANION:
            raise TersorError(
                f"{path} is larger than {MAX_COMPANION >> 20} MB, too much for a tokenizer or "
                "licence; move it out of the folder"
            )
        found.append(path)
    return found
