"""The reader against the safetensors library, and against what can be wrong with a folder."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from stored import bits
from tersor.checkpoint import Checkpoint, check_finite
from tersor.errors import TersorError
from tersor.folder import MAX_COMPANION
from tersor.tensorfile import DTYPES, MAX_HEADER

CONFIG = {"model_type": "llama", "tie_word_embeddings": True}
TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.arange(6).to(torch.bfloat16).reshape(2, 3),
    "b.bias": torch.tensor([1.5, float("nan"), float("inf")], dtype=torch.float16),
    "c": torch.tensor(7, dtype=torch.int64),
    "d": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
}


def make(folder: Path, weights: bytes | None = None, config: object = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
    return folder


def make_sharded(folder: Path, index: dict[str, Any] | None = None) -> Path:
    """Two shards; index replaces the weight_map."""
    make(folder)
    names = list(TENSORS)
    shards = {"x1.safetensors": names[:3], "x2.safetensors": names[3:]}
    for shard, held in shards.items():
        save_file({name: TENSORS[name] for name in held}, folder / shard)
    if index is None:
        index = {name: shard for shard, held in shards.items() for name in held}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, Any]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(folder: Path | str, match: str) -> None:
    with pytest.raises(TersorError, match=match) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    make(tmp_path, save(TENSORS, {"format": "pt"}))
    checkpoint = Checkpoint.open(tmp_path)
    assert sorted(checkpoint.names) == sorted(TENSORS)
    assert checkpoint.config == CONFIG
    assert "a.weight" in checkpoint
    assert "lm_head.weight" not in checkpoint
    for name, tensor in TENSORS.items():
        assert bits(checkpoint.load(name)) == bits(tensor)
        meta = checkpoint.metadata(name)
        assert meta.torch_dtype == tensor.dtype
        assert (meta.shape, meta.nbytes) == (tuple(tensor.shape), tensor.nbytes)
        assert meta.file == tmp_path / "model.safetensors"
    for i in range(3):
        assert bits(checkpoint.load_slice("a.weight", i)) == bits(TENSORS["a.weight"][i])
    for name, index in (("a.weight", 3), ("a.weight", -1), ("c", 0), ("empty", 0)):
        with pytest.raises(IndexError, match=re.escape(name)):
            checkpoint.load_slice(name, index)
    with pytest.raises(TersorError, match=r"no tensor 'lm_head\.weight'"):
        checkpoint.load("lm_head.weight")


@pytest.mark.parametrize("stored", DTYPES)
def test_every_dtype_is_listed_and_loads_or_says_why(tmp_path: Path, stored: str) -> None:
    width, name = DTYPES[stored]
    data = bytes(range(width))  # 8 elements; for BOOL the bytes beyond 0 and 1 are just kept
    make(tmp_path, raw({"w": entry(0, width, [2, 4], stored)}, data))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.metadata("w").dtype == stored
    assert checkpoint.metadata("w").nbytes == width
    if name is None or not hasattr(torch, name):
        with pytest.raises(TersorError, match=f"stored as {stored}"):
            checkpoint.load("w")
    else:
        with safe_open(tmp_path / "model.safetensors", "pt") as oracle:
            assert bits(checkpoint.load("w")) == bits(oracle.get_tensor("w"))


def test_loaded_tensors_have_memory_of_their_own(tmp_path: Path) -> None:
    make(tmp_path, save(TENSORS))
    checkpoint = Checkpoint.open(tmp_path)
    tensor = checkpoint.load("a.weight")
    tensor.zero_()
    assert bits(checkpoint.load("a.weight")) == bits(TENSORS["a.weight"])
    os.truncate(tmp_path / "model.safetensors", 0)  # a memory map would die here with SIGBUS
    assert tensor.sum() == 0
    with pytest.raises(TersorError, match="changed while it was in use"):
        checkpoint.load("a.weight")


def test_reads_shards(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_sharded(tmp_path))
    assert sorted(checkpoint.names) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert bits(checkpoint.load(name)) == bits(tensor)
    assert checkpoint.metadata("d").file.name == "x2.safetensors"


def test_a_tensor_beyond_the_index_is_read_as_transformers_does(tmp_path: Path) -> None:
    index = {"a.weight": "x1.safetensors", "d": "x2.safetensors"}
    assert sorted(Checkpoint.open(make_sharded(tmp_path, index)).names) == sorted(TENSORS)


def test_one_file_goes_before_the_index_as_in_transformers(tmp_path: Path) -> None:
    make(make_sharded(tmp_path), save({"only": torch.ones(1)}))
    assert Checkpoint.open(tmp_path).names == ["only"]


def test_fingerprint_follows_content_and_not_time(tmp_path: Path) -> None:
    big = {"w": torch.zeros(64, 1024)}
    first = Checkpoint.open(make(tmp_path, save(big))).fingerprint()
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert Checkpoint.open(tmp_path).fingerprint() == first
    others = {first}
    big["w"] += 1e-3  # trained further: same header
    for tensors, config in (
        (big, CONFIG),
        ({"w": torch.zeros(1024, 64)}, CONFIG),
        ({"w": torch.zeros(64, 1024)}, {"model_type": "opt"}),
    ):
        others.add(Checkpoint.open(make(tmp_path, save(tensors), config)).fingerprint())
    assert len(others) == 4


def test_check_finite() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8):
        check_finite("w", torch.zeros(3, 5, dtype=dtype))
    check_finite("w", torch.tensor([1e300], dtype=torch.float64))
    check_finite("w", torch.empty(0))
    bad = torch.zeros((1 << 22) + 9, dtype=torch.bfloat16)  # more than one chunk
    bad[3], bad[-1], bad[-2] = float("nan"), float("inf"), float("-inf")
    with pytest.raises(
        TersorError, match=r"'m\.w' holds 1 NaN and 2 infinite values among 4194313"
    ):
        check_finite("m.w", bad)
    with pytest.raises(TersorError, match="; use other text"):
        check_finite("x", bad[-2:].reshape(2, 1).T, "use other text")


ONE = {"w": entry(0, 8)}
BAD_FILES = {
    "empty": (b"", "only 0 bytes"),
    "no header": (b"\x08\0\0\0", "only 4 bytes"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "huge header length": (raw(ONE, bytes(8), 2**63), "more than the limit"),
    "header just over the limit": (raw(ONE, bytes(8), MAX_HEADER + 1), "more than the limit"),
    "header beyond the file": (raw(ONE, b"", 1000), "truncated"),
    "data truncated": (raw(ONE, bytes(7)), "truncated"),
    "data too long": (raw(ONE, bytes(9)), "belong to no tensor"),
    "not JSON": (raw(b"{'w': 1}"), "bad header"),
    "not an object": (raw(b"[1]     "), "no '{'"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "utf-8"),
    "deep nesting": (raw(b'{"w":' + b"[" * 200_000), "nested too deeply"),
    "trailing text": (raw(json.dumps(ONE).encode() + b"{}", bytes(8)), "Extra data"),
    "duplicate name": (
        raw(b'{"w":%b,"w":%b}' % ((json.dumps(ONE["w"]).encode(),) * 2)),
        "'w' twice",
    ),
    "duplicate field": (
        raw(b'{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "'dtype' twice",
    ),
    "entry is a list": (raw({"w": [1]}), "without exactly"),
    "field missing": (raw({"w": {"dtype": "F32", "shape": [2]}}), "without exactly"),
    "field too many": (raw({"w": {**entry(0, 8), "x": 1}}, bytes(8)), "without exactly"),
    "unknown dtype": (raw({"w": entry(0, 8, [2], "F32X")}, bytes(8)), "unknown dtype"),
    "dtype not a string": (raw({"w": entry(0, 8, [2], 5)}, bytes(8)), "unknown dtype"),
    "negative size": (raw({"w": entry(0, 8, [-2])}, bytes(8)), "-2"),
    "fraction": (raw({"w": entry(0, 8, [2.0])}, bytes(8)), r"2\.0"),
    "NaN": (raw(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}'), "NaN"),
    "true as a size": (raw({"w": entry(0, 4, [True])}, bytes(4)), "list of at most"),
    "shape not a list": (raw({"w": entry(0, 8, "2")}, bytes(8)), "list of at most"),
    "too many dimensions": (raw({"w": entry(0, 4, [1] * 65)}, bytes(4)), "at most 64"),
    "product overflows": (raw({"w": entry(0, 0, [2**32, 2**32])}), "impossible shape"),
    "zero hides overflow": (raw({"w": entry(0, 0, [0, 2**62, 2**62])}), "impossible shape"),
    "number of 400 digits": (raw({"w": entry(0, 8, [10**400])}, bytes(8)), "number 1000"),
    "shape against bytes": (raw({"w": entry(0, 8, [3])}, bytes(8)), "of 8 bytes where"),
    "half a byte": (raw({"w": entry(0, 1, [3], "F4")}, bytes(1)), r"takes 1\.5"),
    "offsets reversed": (raw({"w": entry(8, 0, [2])}, bytes(8)), "begin and an end"),
    "three offsets": (
        raw({"w": {**entry(0, 8), "data_offsets": [0, 4, 8]}}, bytes(8)),
        "begin and",
    ),
    "offsets beyond the file": (raw({"w": entry(8, 16)}, bytes(8)), "hole"),
    "overlap": (raw({"v": entry(0, 8), "w": entry(4, 12)}, bytes(12)), "overlaps"),
    "same place": (raw({"v": entry(0, 8), "w": entry(0, 8)}, bytes(8)), "overlaps"),
    "hole": (raw({"v": entry(0, 4), "w": entry(8, 12)}, bytes(12)), "hole"),
    "metadata not strings": (raw({"__metadata__": {"a": 1}, **ONE}, bytes(8)), "__metadata__"),
    "lone surrogate": (raw(b'{"\\ud800":{}}'), "not Unicode"),
    "newline in a name": (raw({"a\nb": 1}), r"a\\nb"),
    "no tensors": (raw({}), "no tensor at all"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_refuses_a_bad_file(tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    refused(make(tmp_path, content), message)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a.weight": "../x1.safetensors"}, "only plain file names"),
        ({"a.weight": "sub/x1.safetensors"}, "only plain file names"),
        ({"a.weight": "/etc/x1.safetensors"}, "only plain file names"),
        ({"a.weight": "..\\x1.safetensors"}, "only plain file names"),
        ({"a.weight": "a\0b.safetensors"}, "only plain file names"),
        ({"a.weight": "a\nb.safetensors"}, "only plain file names"),
        ({"a.weight": "\ud800.safetensors"}, "only plain file names"),
        ({"a.weight": "n" * 300 + ".safetensors"}, "has no"),
        ({"a.weight": ".."}, "not safetensors"),
        ({"a.weight": ""}, "not safetensors"),
        ({"a.weight": "x1.bin"}, "not safetensors"),
        ({"a.weight": "gone.safetensors"}, "has no 'gone.safetensors'"),
        ({"a.weight": "x2.safetensors"}, "which does not hold it"),
        ({"other": "x1.safetensors"}, "'other' in x1.safetensors, which does not hold it"),
        ({"a.weight": 1}, "no weight_map"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_refuses_a_bad_index(tmp_path: Path, index: Any, message: str) -> None:
    refused(make_sharded(tmp_path, index), message)


def test_refuses_a_tensor_in_two_shards(tmp_path: Path) -> None:
    make_sharded(tmp_path)
    save_file({"d": TENSORS["d"], "a.weight": TENSORS["a.weight"]}, tmp_path / "x2.safetensors")
    index = {"a.weight": "x1.safetensors", "d": "x2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    refused(tmp_path, "'a.weight' is in both x1.safetensors and x2.safetensors")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"weight_map": {"a": "x", "a": "y"}}', "[" * 200_000]
)
def test_refuses_index_text(tmp_path: Path, text: str) -> None:
    (make(tmp_path) / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, r"index\.json is not valid JSON")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "[" * 200_000, "\xff"])
def test_refuses_config_text(tmp_path: Path, text: str) -> None:
    make(tmp_path, save(TENSORS))
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, r"config\.json is not valid JSON")


def test_config_may_hold_infinity(tmp_path: Path) -> None:
    make(tmp_path, save(TENSORS), {"time_step_limit": [0.0, float("inf")]})
    assert Checkpoint.open(tmp_path).config["time_step_limit"][1] == float("inf")


def test_refuses_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    refused("somebody/some-model", "hf download somebody/some-model")
    refused(tmp_path / "gone", "there is no folder")
    refused(tmp_path, r"has no 'config\.json'")
    refused(make(tmp_path), "neither model.safetensors nor")
    refused(tmp_path / "config.json", "is not a folder")
    (tmp_path / "adapter_model.safetensors").write_bytes(save(TENSORS))
    refused(tmp_path, "found 'adapter_model.safetensors', which is not one")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, r"pickle \('pytorch_model.bin'\).*convert to safetensors")


def test_refuses_links_and_what_is_not_a_file(tmp_path: Path) -> None:
    outside = make(tmp_path / "outside", save(TENSORS))
    folder = make(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.symlink_to(outside / "model.safetensors")
    refused(folder, "link out of its folder")
    weights.unlink()
    weights.symlink_to("nowhere")
    refused(folder, "not a regular file")
    weights.unlink()
    weights.symlink_to("model.safetensors")  # to itself
    refused(folder, "not a regular file")
    weights.unlink()
    os.mkfifo(weights)  # opening it would wait for ever
    refused(folder, "not a regular file")
    weights.unlink()
    weights.mkdir()
    refused(folder, "not a regular file")
    weights.rmdir()
    weights.symlink_to("real")  # inside the folder
    (folder / "real").write_bytes(save(TENSORS))
    assert len(Checkpoint.open(folder).names) == len(TENSORS)
    (folder / "tokenizer.json").symlink_to("/etc/hostname")
    refused(folder, "link out of its folder")


@pytest.mark.parametrize("shared", [False, True])
def test_reads_the_cache_of_the_hub_client(tmp_path: Path, shared: bool) -> None:
    """models--x/snapshots/rev/file -> ../../blobs/hash, which may be -> ../../blobs/ha/hash."""
    repo = tmp_path / "hub" / "models--org--name"
    folder = repo / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for name, content in (("config.json", b"{}"), ("model.safetensors", save(TENSORS))):
        blob = repo / "blobs" / f"hash-{name}"
        if shared:
            store = tmp_path / "hub" / "blobs" / "ha" / blob.name
            store.parent.mkdir(parents=True, exist_ok=True)
            store.write_bytes(content)
            blob.symlink_to(f"../../blobs/ha/{blob.name}")
        else:
            blob.write_bytes(content)
        (folder / name).symlink_to(f"../../blobs/{blob.name}")
    assert len(Checkpoint.open(folder).names) == len(TENSORS)
    (folder / "vocab.json").symlink_to("/etc/hostname")  # a cache may not lead elsewhere either
    refused(folder, "link out of its folder")
    (folder / "vocab.json").unlink()
    (repo / "blobs" / "hash-vocab").symlink_to("/etc/hostname")
    (folder / "vocab.json").symlink_to("../../blobs/hash-vocab")
    refused(folder, "link out of its folder")


def test_companions_are_small_and_neither_code_nor_weights(tmp_path: Path) -> None:
    make(tmp_path, save(TENSORS))
    wanted = [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
        "generation_config.json",
        "chat_template.jinja",
        "spiece.model",
        "added_tokens.json",
        "preprocessor_config.json",
        "LICENSE",
        "LICENSE.txt",
        "vocab.txt",
    ]
    unwanted = [
        "README.md",
        "tokenization_x.py",
        "tokenizer.py",
        "tokenizer.bin",
        "vocab.pkl",
        "vocab.PT",
        "optimizer.pt",
        "LICENSE.safetensors",
        "model.gguf",
        "notes.txt",
        "trainer_state.json",
    ]
    for name in wanted + unwanted:
        (tmp_path / name).write_text("x")
    (tmp_path / "tokenizer").mkdir()
    assert [path.name for path in Checkpoint.open(tmp_path).companions] == sorted(wanted)
    os.truncate(tmp_path / "vocab.txt", MAX_COMPANION + 1)  # sparse
    refused(tmp_path, "too much for a tokenizer")
