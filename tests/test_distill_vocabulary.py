"""Distillation between models whose tokenizers differ, or are padded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import tiny

pytest.importorskip("accelerate")

from tersor import TersorError
from tersor.training import Distillation, Features, Keep, cache_teacher
from tersor.training.on_policy import OnPolicy
from tersor.training.trainer import DistillTrainer
from tersor.training.vocabulary import align_vocabularies, token_bytes
from test_distill_trainer import args, examples, plain_loss, weights, windows

TEXTS = [
    "terso kalo min\nra pedu va",
    "niva tersora, Kalo min: so so",
    "véra – mintersodu kalo\n\nra",
    "so",
]


def made(kind: str, size: int = 300, end: str = "<end>", bos: bool = False) -> Any:
    """A tokenizer of another family or other training text than tiny's."""
    corpus = [tiny.text(3000, seed=7).replace("ter", "mint"), *TEXTS]
    special = [end, "[UNK]"]
    if kind == "bytes":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        train: Any = trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "metaspace":
        core = Tokenizer(models.BPE(unk_token="[UNK]"))
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Metaspace()
        train = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    else:
        core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        core.normalizer = normalizers.BertNormalizer(lowercase=True)
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        core.decoder = decoders.WordPiece()
        train = trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=special, show_progress=False
        )
    core.train_from_iterator(corpus, train)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, unk_token="[UNK]")


def full(size: int = 290) -> Any:
    """Byte-level with all 256 bytes, as students here need for any text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator([tiny.text()], train)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_bytes_of_tokens(kind: str) -> None:
    """Together they are the text that was tokenized."""
    tokenizer = made(kind)
    pieces = token_bytes(tokenizer)
    assert not set(tokenizer.all_special_ids) & pieces.keys()
    for text in TEXTS:
        if kind == "metaspace" and not text.isascii():
            continue
        ids = tokenizer(text)["input_ids"]
        joined = b"".join(pieces[token] for token in ids).decode()
        assert joined.removeprefix(" " if kind == "metaspace" else "") == text


def test_shared_tokens() -> None:
    """Those whose strings, decoded, are the same; and the end of a text."""
    student, teacher = full(), made("bytes")
    found = align_vocabularies(student, teacher, TEXTS)
    names = [{i: text for text, i in t.get_vocab().items()} for t in (student, teacher)]
    pairs = dict(zip(found.student.tolist(), found.teacher.tolist(), strict=True))
    for a in range(len(student)):
        same = [b for b in range(len(teacher)) if names[1][b] == names[0][a]]
        if a == student.eos_token_id:
            same = [teacher.eos_token_id]
        assert [pairs[a]] == same if same else a not in pairs
    assert found.share == len(pairs) / len(student)
    ids = [token for text in TEXTS for token in student(text)["input_ids"]]
    assert found.corpus_share == sum(token in pairs for token in ids) / len(ids)
    assert f"{len(pairs)} tokens are shared" in found.describe()
    spaces = align_vocabularies(student, made("metaspace"), least=0)
    words = {names[0][a].replace("\u0120", "\u2581") for a in spaces.student.tolist()}
    assert any(word.startswith("\u2581") for word in words)


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "self"])
def test_pairs_of_positions(kind: str) -> None:
    """By the character offsets that the tokenizers report."""
    student = full()
    teacher = student if kind == "self" else made(kind)
    mapped = align_vocabularies(student, teacher, least=0)
    for text in TEXTS:
        if kind == "metaspace" and not text.isascii():
            continue
        ours = student(text, return_offsets_mapping=True)
        theirs = teacher(text, return_offsets_mapping=True)
        ids = ours["input_ids"]
        other, pairs = mapped.translate(ids)
        assert other == theirs["input_ids"]
        ends = [[end for _, end in each["offset_mapping"]] for each in (ours, theirs)]
        if not text.isascii():
            # A character of several bytes may be in several tokens, whose offsets are all the
            # same: only the last of them ends it.
            assert all(ends[0][i] == ends[1][j] for i, j in pairs) and pairs
            continue
        wanted = [
            (i, j)
            for i in range(len(ids) - 1)
            for j in range(len(other) - 1)
            if ends[0][i] == ends[1][j] and ends[0][i + 1] == ends[1][j + 1]
        ]
        assert pairs == wanted
        for i, j in pairs:
            place = mapped.student.tolist().index(ids[i + 1])
            assert int(mapped.teacher[place]) == other[j + 1]
        if kind == "self":
            assert pairs == [(i, i) for i in range(len(ids) - 1)]


def test_special_tokens_around_a_text() -> None:
    student, teacher = full(), made("bytes")
    mapped = align_vocabularies(student, teacher, least=0)
    ids = student("kalo min so")["input_ids"]
    other, plain = mapped.translate(ids)
    _, framed = mapped.translate([student.bos_token_id, *ids, student.eos_token_id, 7, 8])
    last = (len(ids), len(other) - 1)  # from which both may predict the end
    assert framed == [(i + 1, j) for i, j in plain] + [last]
    assert mapped.translate([student.bos_token_id]) == ([], [])
    whole = student("véra so kalo")["input_ids"]
    cut = len(student("v")["input_ids"]) + 1  # the row begins inside of é
    assert student.decode(whole[cut:]).startswith("\ufffd")
    rest, pairs = mapped.translate(whole[cut:])
    assert teacher.decode(rest) == "ra so kalo" and pairs


def rows(tokenizer: Any, length: int = 16) -> list[dict[str, Tensor]]:
    found = []
    for number, text in enumerate([*TEXTS[:3], "ra mintersora va kalo so"]):
        ids = torch.tensor(tokenizer(text)["input_ids"][:length])
        padded = torch.zeros(length, dtype=torch.int64)
        mask, labels = torch.zeros_like(padded), torch.full((length,), -100)
        padded[: len(ids)], mask[: len(ids)] = ids, 1
        labels[: len(ids)] = ids
        labels[: 1 + number % 3] = -100
        found.append({"input_ids": padded, "attention_mask": mask, "labels": labels})
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss(tmp_path: Path, kind: str) -> None:
    """Renormalised distributions at the pairs, cross-entropy everywhere; float64, row by row."""
    student_tokens, teacher_tokens = full(), made("bytes", 320)
    mapped = align_vocabularies(student_tokens, teacher_tokens, least=0)
    student = tiny.model(kind, vocab_size=len(student_tokens), num_hidden_layers=1)
    teacher = tiny.model("qwen2", vocab_size=len(teacher_tokens) + 3)
    trainer = DistillTrainer(
        student,
        teacher,
        Distillation("reverse_kl", alpha=0.7, temperature=1.5),
        vocabulary=mapped,
        args=args(tmp_path),
        eval_dataset=rows(student_tokens),
        train_dataset=rows(student_tokens),
    )
    logs = trainer.evaluate()
    kls, crosses, outside = [], [], []
    for row in rows(student_tokens):
        ids = row["input_ids"][row["attention_mask"].bool()]
        other, pairs = mapped.translate(ids.tolist())
        with torch.no_grad():
            q = student.double()(ids[None]).logits[0]
            p = teacher.double()(torch.tensor([other])).logits[0]
        student.float(), teacher.float()
        for i, label in enumerate(row["labels"][1 : len(ids)].tolist()):
            if label == -100:
                continue
            crosses.append(-q[i].log_softmax(-1)[label])
            for j in [b for a, b in pairs if a == i]:
                ours = (q[i][mapped.student] / 1.5).softmax(-1)
                theirs = (p[j][mapped.teacher] / 1.5).softmax(-1)
                kls.append(1.5**2 * (ours * (ours / theirs).log()).sum())
                outside.append(1 - p[j].softmax(-1)[mapped.teacher].sum())
    assert 5 < len(kls) < len(crosses)
    kl, cross, mass = (float(torch.stack(each).mean()) for each in (kls, crosses, outside))
    assert logs["eval_distillation"] == pytest.approx(kl, rel=1e-4)
    assert logs["eval_cross_entropy"] == pytest.approx(cross, rel=1e-4)
    assert logs["eval_outside"] == pytest.approx(mass, rel=1e-4)
    assert logs["eval_loss"] == pytest.approx(0.7 * kl + 0.3 * cross, rel=1e-4)


def test_the_same_tokenizer_is_plain_distillation(tmp_path: Path) -> None:
    tokenizer = full()
    found = []
    for mapped in (None, align_vocabularies(tokenizer, tokenizer)):
        student = tiny.model("llama", vocab_size=len(tokenizer), num_hidden_layers=1)
        teacher = tiny.model("llama", vocab_size=len(tokenizer))
        data = [row for row in rows(tokenizer) if row["labels"][2] != -100]
        how = args(tmp_path, optim="sgd")
        given: dict[str, Any] = {"args": how, "train_dataset": data}
        DistillTrainer(student, teacher, vocabulary=mapped, **given).train()
        found.append(weights(student))
    # All tokens are shared, and sums are rounded in another order.
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_learning_and_own_text(tmp_path: Path) -> None:
    student_tokens, teacher_tokens = full(), made("bytes")
    trainer = DistillTrainer(
        tiny.model("llama", vocab_size=len(student_tokens), num_hidden_layers=1),
        tiny.model("llama", vocab_size=len(teacher_tokens)),
        Distillation(alpha=1.0),
        vocabulary=align_vocabularies(student_tokens, teacher_tokens),
        on_policy=OnPolicy(share=0.3, new_tokens=8, prompt_tokens=4),
        args=args(tmp_path, max_steps=40),
        train_dataset=rows(student_tokens),
        eval_dataset=rows(student_tokens),
    )
    before = trainer.evaluate()["eval_distillation"]
    trainer.train()
    assert trainer.evaluate()["eval_distillation"] < before / 2


def test_padded_vocabulary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The rows behind the tokenizer's are as if they were not there."""
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert len(tokenizer) <= tiny.VOCAB
    student = tiny.model("llama", num_hidden_layers=1)
    teacher = tiny.model("llama")
    wanted = [float(each) for each in plain_loss(student, teacher, examples())]
    with torch.random.fork_rng():
        teacher.resize_token_embeddings(tiny.VOCAB + 32, mean_resizing=False)
    given: dict[str, Any] = {"args": args(tmp_path), "eval_dataset": examples()}
    given["train_dataset"] = examples()
    with caplog.at_level(logging.WARNING):
        trainer = DistillTrainer(
            student, teacher, Distillation(temperature=2.0), processing_class=tokenizer, **given
        )
    said = f"has {tiny.VOCAB} tokens and the teacher's {tiny.VOCAB + 32}"
    assert said in caplog.text and f"the first {tiny.VOCAB} are compared" in caplog.text
    logs = trainer.evaluate()
    found = [logs["eval_distillation"], logs["eval_cross_entropy"]]
    assert found == pytest.approx(wanted, rel=1e-5)
    trainer.train()
    with pytest.raises(TersorError, match="give that as processing_class"):
        DistillTrainer(student, teacher, **given)


def test_refusals(tmp_path: Path) -> None:
    student, teacher = full(), made("bytes")
    with pytest.raises(TersorError, match=r"too little in common \(\d+ tokens are shared"):
        align_vocabularies(student, made("wordpiece"), TEXTS, least=0.9)
    with pytest.raises(TersorError, match="least is 2"):
        align_vocabularies(student, teacher, least=2)
    mapped = align_vocabularies(student, teacher)
    small, large = tiny.model("llama"), tiny.model("llama", vocab_size=len(teacher))
    given: dict[str, Any] = {
        "args": args(tmp_path),
        "train_dataset": examples(),
        "vocabulary": mapped,
    }
    with pytest.raises(TersorError, match="the student's tokenizer has token"):
        DistillTrainer(small, large, **given)
    fits = tiny.model("llama", vocab_size=len(student))
    with pytest.raises(TersorError, match="features are compared token by token"):
        DistillTrainer(fits, large, features=Features(hidden=1.0), **given)
    cache = cache_teacher(fits, windows(2), tmp_path / "cache", Keep(top=4))
    with pytest.raises(TersorError, match="a cache is of the student's own tokens"):
        DistillTrainer(tiny.model("llama", vocab_size=len(student)), cache, **given)
