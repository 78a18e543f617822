"""Calibration text and the statistics collected from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny
from tersor.calibrate import Calibration, GramStats, capture, digest
from tersor.corpus import JsonLines, TextFile
from tersor.errors import TersorError


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(tiny.text(), encoding="utf-8")
    return path


# --- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [16, 64, 1000, 10**6])
@pytest.mark.parametrize(
    "content",
    [
        tiny.text(300),
        "no line ends here " * 40,
        "Ωβ漢字🙂" * 60,  # no place to cut but between characters
        "line\n" * 50 + "x" * 300 + "\nlast, without an end",
    ],
)
def test_pieces_of_a_file_are_the_file(tmp_path: Path, content: str, piece: int) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content, encoding="utf-8")
    file = TextFile(path, piece)
    pieces = [file[i] for i in range(len(file))]
    assert "".join(pieces) == content
    assert all(0 < len(p.encode()) <= piece for p in pieces)
    assert all(p.endswith("\n") for p in pieces[:-1] if "\n" in p)


def test_windows_are_the_same_for_the_same_seed(tokenizer, corpus: Path) -> None:
    def windows(seed: int) -> Tensor:
        return Calibration((str(corpus),), samples=9, seq_len=32, seed=seed).windows(tokenizer)

    assert windows(0).shape == (9, 32)
    assert windows(0).dtype == torch.int64
    assert torch.equal(windows(0), windows(0))
    assert digest(windows(0)) == digest(windows(0)) != digest(windows(1))


def test_windows_hold_the_text(tokenizer, tmp_path: Path) -> None:
    """With a single document there is nothing to shuffle: the windows are its tokens, in order."""
    content = tiny.text(400)
    got = Calibration(texts=(content,), samples=5, seq_len=40, bos="never").windows(tokenizer)
    want = tokenizer(content, add_special_tokens=False)["input_ids"][:200]
    assert got.flatten().tolist() == want


def test_every_document_can_be_drawn(tokenizer, tmp_path: Path) -> None:
    """All of the text in several files is used where all of it is needed."""
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_text(tiny.text(200, seed=i), encoding="utf-8")
    total = sum(len(tokenizer(f.read_text(), add_special_tokens=False)["input_ids"]) for f in files)
    names = tuple(str(f) for f in files)
    got = Calibration(names, samples=1, seq_len=total, bos="never").windows(tokenizer)
    want = sorted(
        i for f in files for i in tokenizer(f.read_text(), add_special_tokens=False)["input_ids"]
    )
    assert sorted(got.flatten().tolist()) == want


def test_bos_policies(corpus: Path) -> None:
    plain, framing = tiny.tokenizer(bos=False), tiny.tokenizer(bos=True)

    def first(tokenizer, bos: str) -> list[bool]:
        windows = Calibration((str(corpus),), samples=4, seq_len=16, bos=bos).windows(tokenizer)
        assert windows.shape == (4, 16)
        return [row[0] == tokenizer.bos_token_id for row in windows.tolist()]

    assert all(first(framing, "auto"))
    assert not any(first(plain, "auto"))
    assert all(first(plain, "always"))
    assert not any(first(framing, "never"))


def test_both_sides_of_a_frame_are_kept(corpus: Path) -> None:
    """BERT's [CLS] text [SEP]: every window looks like a text that the tokenizer made."""
    from tokenizers import processors

    tokenizer = tiny.tokenizer(bos=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    windows = Calibration((str(corpus),), samples=3, seq_len=16).windows(tokenizer)
    assert windows[:, 0].tolist() == [0] * 3
    assert windows[:, -1].tolist() == [1] * 3
    assert ((windows[:, 1:-1] > 1).all()).item()


def test_jsonl_field(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"body": tiny.text(60, seed=i), "text": "unused"} for i in range(5)]
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n\n", encoding="utf-8")
    documents = JsonLines(path, "body")
    assert [documents[i].strip() for i in range(5)] == [r["body"].strip() for r in records]
    windows = Calibration((f"{path}:body",), samples=2, seq_len=30).windows(tokenizer)
    assert windows.shape == (2, 30)


def test_default_length_is_the_context(tokenizer, corpus: Path) -> None:
    assert Calibration((str(corpus),), samples=2).windows(tokenizer, 48).shape == (2, 48)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"ter so ra", r"has \d+ tokens, and 4 windows of 32 need 124; use --samples 1 --seq-len"),
        (b"ter so ra " * 20, r"use --samples [1-3], or give more text"),
        (b"abc \xff\xfe def", "not UTF-8 .byte 4."),
    ],
)
def test_bad_text(tokenizer, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(TersorError, match=message):
        Calibration((str(path),), samples=4, seq_len=32).windows(tokenizer)


def test_the_fix_for_short_text_works(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(tiny.text(80))
    with pytest.raises(TersorError) as error:
        Calibration((str(path),), samples=50, seq_len=32).windows(tokenizer)
    samples = int(str(error.value).split("--samples ")[1].split(",")[0])
    assert Calibration((str(path),), samples=samples, seq_len=32).windows(tokenizer).shape[0]
    with pytest.raises(TersorError):
        Calibration((str(path),), samples=samples + 1, seq_len=32).windows(tokenizer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": 1}', "line 1 has no text in a field 'text' .it has body."),
        ("[1, 2]", "it has no fields"),
        ("{", "line 1 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON .*recursion"),
        ("[" + "1" * 5000 + "]", "line 1 is not JSON .*digits"),
        (r'{"text": "a\ud800b"}', "line 1 has half of a surrogate pair"),
    ],
)
def test_bad_jsonl(tokenizer, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(TersorError, match=message):
        Calibration((str(path),), samples=1, seq_len=8).windows(tokenizer)


def test_bad_settings(tokenizer, corpus: Path) -> None:
    source = (str(corpus),)
    with pytest.raises(TersorError, match=r"text 1 of .* half of a surrogate pair at character 2"):
        Calibration(texts=("fine", "so\ud800"))
    for field in ("sources", "texts"):
        for value in ("a string", (b"bytes",)):
            with pytest.raises(TersorError, match=f"{field} must be a tuple of strings"):
                Calibration(**{field: value})
    with pytest.raises(TersorError, match="needs text"):
        Calibration()
    with pytest.raises(TersorError, match="samples"):
        Calibration(source, samples=0)
    with pytest.raises(TersorError, match="bos must be one of auto, always, never"):
        Calibration(source, bos="sometimes")
    with pytest.raises(TersorError, match="no text file"):
        Calibration((str(corpus) + "x",)).windows(tokenizer)
    with pytest.raises(TersorError, match="beyond the model's 64 positions; use 64 or less"):
        Calibration(source, seq_len=65).windows(tokenizer, 64)


# --- statistics ----------------------------------------------------------------------------------


def gram_of(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).double()
    return rows.T @ rows


@pytest.mark.parametrize("k", [24, 700])  # below and above the block that is handled at a time
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_is_the_sum_over_tokens(dtype: torch.dtype, k: int) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(2, 50, k).to(dtype) for _ in range(3)]
    stats = GramStats(k)
    for x in batches:
        stats.update(x)
        assert stats.gram.shape == (k, k)  # looking at it in between is harmless
    want = gram_of(torch.cat(batches))
    assert stats.tokens == 300
    # Products and sums of 300 terms in float32: relative to |x|ᵀ|x| no more than (300 + 1) eps.
    bound = 301 * 2.0**-24 * gram_of(torch.cat(batches).abs())
    assert ((stats.gram.double() - want).abs() <= bound).all()
    x = torch.cat(batches).double().flatten(0, 1)
    bound = 101 * 2.0**-24 * x.abs().mean(0)  # sums of 100 terms at a time
    assert ((stats.mean - x.mean(0)).abs() <= bound).all()


def test_merge_is_the_sum() -> None:
    torch.manual_seed(0)
    x = torch.randint(-3, 4, (40, 8)).float()  # integers: every sum is exact
    one, two, whole = GramStats(8), GramStats(8), GramStats(8)
    one.update(x[:13])
    two.update(x[13:])
    whole.update(x)
    one.merge(two)
    assert torch.equal(one.gram, whole.gram)
    assert torch.equal(one.mean, whole.mean)
    assert one.tokens == whole.tokens == 40


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("k", [48, 700])  # below and above the block that is handled at a time
def test_loss_before_and_after_the_factor(k: int, act_order: bool) -> None:
    torch.manual_seed(0)
    stats = GramStats(k)
    stats.update(torch.randn(2 * k, k) * torch.rand(k))
    gram = stats.gram.double().clone()
    error = torch.randn(5, k)
    want = float(((error.double() @ gram) * error.double()).sum())
    assert stats.loss(error) == pytest.approx(want, rel=1e-5)  # float32 products, positive sum
    factor = stats.factor(0.01, act_order)
    assert stats.loss(error) == pytest.approx(want, rel=1e-5)
    assert (factor.order is not None) == act_order
    if act_order:
        assert torch.equal(
            factor.order, torch.argsort(gram.diagonal().float(), descending=True, stable=True)
        )


@pytest.mark.parametrize("act_order", [False, True])
def test_factor_gives_back_the_damped_gram(act_order: bool) -> None:
    torch.manual_seed(0)
    k = 520
    stats = GramStats(k)
    stats.update(torch.randn(3 * k, k) * torch.rand(k))
    gram = stats.gram.double().clone()
    factor = stats.factor(0.01, act_order)
    if factor.order is not None:
        gram = gram[factor.order][:, factor.order]
    assert factor.damp == pytest.approx(0.01)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(k)
    unit = factor.unit.double().triu(1) + torch.eye(k)
    # H = U D Uᵀ: what U leaves must be diagonal and positive.
    inverse = torch.linalg.inv(unit)
    diagonal = inverse @ damped @ inverse.T
    off = diagonal - diagonal.diagonal().diag()
    assert off.abs().max() < 1e-4 * diagonal.diagonal().max()  # float32 entries of U
    assert (diagonal.diagonal() > 0).all()


def test_capture_reads_every_input_once() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), nn.Linear(8, 4))
    x = torch.randn(5, 7, 16)
    linears = {"first": block[0], "second": block[2], "unused": nn.Linear(4, 4)}
    with torch.no_grad():
        stats = capture(linears, (block(x) for _ in range(1)))
        hidden = torch.relu(block[0](x))
    assert torch.allclose(stats["first"].gram.double(), gram_of(x), rtol=1e-4, atol=1e-4)
    assert torch.allclose(stats["second"].gram.double(), gram_of(hidden), rtol=1e-4, atol=1e-4)
    assert (stats["first"].tokens, stats["unused"].tokens) == (35, 0)
    assert not block[0]._forward_pre_hooks  # nothing stays behind


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_capture_names_the_layer_with_bad_activations(bad: float) -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        block[0].bias[1] = bad
        with pytest.raises(TersorError, match=r"that block\.1 reads hold NaN or Inf \(1 of"):
            capture({"block.1": block[1]}, map(block, [torch.zeros(1, 4)]))
