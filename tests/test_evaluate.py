"""Evaluation against plain float64 computations in numpy, on models whose logits are known."""

from __future__ import annotations

import gc
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

import tiny
from tersor import evaluate as ev
from tersor import report
from tersor.calibrate import BOS, Calibration
from tersor.errors import TersorError
from tersor.report import peak_memory, peak_resident_bytes

VOCAB, LENGTH, COUNT = 37, 12, 9


class Bigram(nn.Module):
    """Logits that depend on the last token alone: a table looked up."""

    def __init__(self, seed: int, scale: float = 2.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.table = scale * torch.randn(VOCAB, VOCAB, generator=draw)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(VOCAB, (COUNT, LENGTH), generator=torch.Generator().manual_seed(7))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_hand(p: Bigram, q: Bigram, windows: Tensor) -> dict[str, np.ndarray]:
    """Loops over windows and positions; every formula written out."""
    log_p, log_q = (log_softmax(m.table.numpy().astype(np.float64)) for m in (p, q))
    out = {name: np.empty((COUNT, LENGTH - 1)) for name in ("nll_p", "nll_q", "kl", "same", "flip")}
    for w, window in enumerate(windows.tolist()):
        for t in range(LENGTH - 1):
            a, b = log_p[window[t]], log_q[window[t]]
            out["nll_p"][w, t] = -a[window[t + 1]]
            out["nll_q"][w, t] = -b[window[t + 1]]
            out["kl"][w, t] = sum(math.exp(a[v]) * (a[v] - b[v]) for v in range(VOCAB))
            out["same"][w, t] = a.argmax() == b.argmax()
            right = [int(each.argmax() == window[t + 1]) for each in (a, b)]
            out["flip"][w, t] = sum(right) == 1
    return out


def standard_error(per_window: np.ndarray) -> float:
    return per_window.std(ddof=1) / math.sqrt(len(per_window))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("chunk", [ev.CHUNK, 3 * VOCAB])
def test_every_figure_agrees_with_loops_in_float64(
    windows: Tensor, batch: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ev, "CHUNK", chunk)
    p, q = Bigram(0), Bigram(1)
    q.table = p.table + 0.3 * q.table
    windows[:, 1::2] = p.table.argmax(-1)[windows[:, ::2]]  # some that p has right
    got = ev.evaluate({"q": q, "p": p}, windows, baseline="p", batch=batch)
    want = by_hand(p, q, windows)
    nll, nll_p, kl = want["nll_q"].mean(1), want["nll_p"].mean(1), want["kl"].mean(1)
    # Both sides are float64 from the same float32 logits: only the order of sums differs.
    near = pytest.approx
    assert list(got) == ["q", "p"]
    assert got["p"].nll.mean == near(nll_p.mean(), rel=1e-12)
    assert got["q"].nll.mean == near(nll.mean(), rel=1e-12)
    assert got["q"].nll.error == near(standard_error(nll), rel=1e-10)
    assert got["q"].perplexity.mean == near(math.exp(nll.mean()), rel=1e-12)
    assert got["q"].delta == ev.Estimate(
        near((nll - nll_p).mean(), rel=1e-10), near(standard_error(nll - nll_p), rel=1e-10)
    )
    assert got["q"].kl == ev.Estimate(
        near(kl.mean(), rel=1e-10), near(standard_error(kl), rel=1e-10)
    )
    ranked = np.sort(want["kl"].ravel())
    assert got["q"].kl_99 == near(ranked[math.ceil(0.99 * ranked.size) - 1], rel=1e-10)
    assert got["q"].top1 == near(want["same"].mean(), rel=1e-12)
    assert 0 < got["q"].top1 < 1
    assert got["q"].flips == near(want["flip"].mean(), rel=1e-12)
    assert 0 < got["q"].flips <= 1 - got["q"].top1  # who agrees has not flipped
    assert (got["q"].windows, got["q"].tokens) == (COUNT, COUNT * (LENGTH - 1))


def test_identical_models_do_not_differ_at_all(windows: Tensor) -> None:
    quality = ev.evaluate({"a": Bigram(0), "b": Bigram(0)}, windows, baseline="a")["b"]
    assert quality.kl == ev.Estimate(0.0, 0.0)
    assert quality.delta == ev.Estimate(0.0, 0.0)
    assert (quality.kl_99, quality.top1, quality.flips) == (0.0, 1.0, 0.0)


def test_flips_go_both_ways_and_leave_out_what_both_have_wrong() -> None:
    """Four tokens: lost, won, right in both, and two different wrong ones."""

    def always(*tokens: int):
        return lambda ids: 9 * torch.eye(VOCAB)[torch.tensor([tokens])]

    windows = torch.tensor([[0, 1, 2, 3, 4]])
    models = {"p": always(1, 9, 3, 9, 0), "q": always(9, 2, 3, 8, 0)}
    quality = ev.evaluate(models, windows, baseline="p")["q"]
    assert (quality.flips, quality.top1) == (0.5, 0.25)


def test_pairing_removes_what_the_windows_have_in_common(windows: Tensor) -> None:
    """A model that is worse by the same constant everywhere: the difference has no error."""
    p = Bigram(0)

    def q(ids: Tensor) -> Tensor:
        # One more token in the vocabulary takes half of the probability: log 2 worse everywhere.
        log_p = p(ids).double().log_softmax(-1)
        return torch.cat([log_p, torch.zeros_like(log_p[..., :1])], dim=-1)

    def padded(ids: Tensor) -> Tensor:
        return nn.functional.pad(p(ids).double(), (0, 1), value=-math.inf)

    quality = ev.evaluate({"p": padded, "q": q}, windows, baseline="p")["q"]
    assert quality.delta.mean == pytest.approx(math.log(2), rel=1e-12)
    assert quality.delta.error < 1e-12
    assert quality.nll.error > 0.01
    # What the baseline excludes costs nothing; the rest is 2 × less likely.
    assert quality.kl.mean == pytest.approx(math.log(2), rel=1e-12)


def test_without_a_baseline_there_is_perplexity_only(windows: Tensor) -> None:
    quality = ev.evaluate({"p": Bigram(0)}, windows)["p"]
    assert quality.delta is quality.kl is quality.kl_99 is quality.top1 is quality.flips is None
    assert math.isnan(ev.evaluate({"p": Bigram(0)}, windows[:1])["p"].nll.error)


def test_transformers_model_gives_its_own_loss() -> None:
    model = tiny.model("llama")
    ids = torch.randint(tiny.VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))
    got = ev.evaluate({"m": model}, ids, batch=2)["m"].nll.mean
    with torch.no_grad():
        want = float(model(ids, labels=ids).loss)
    assert got == pytest.approx(want, rel=1e-5)  # their loss is in float32


def test_windows_follow_one_another_and_drop_the_tail() -> None:
    tokenizer, text = tiny.tokenizer(bos=False), tiny.text(300)
    ids = tokenizer(text)["input_ids"]
    cut = ev.text_windows(text, tokenizer, 16)
    assert cut.shape == (len(ids) // 16, 16)
    assert cut.flatten().tolist() == ids[: cut.numel()]


@pytest.mark.parametrize("tokenizer_adds_bos", [False, True])
@pytest.mark.parametrize("bos", BOS)
def test_windows_begin_as_in_calibration(tokenizer_adds_bos: bool, bos: str) -> None:
    tokenizer, text = tiny.tokenizer(tokenizer_adds_bos), tiny.text(300)
    framed = bos == "always" or (bos == "auto" and tokenizer_adds_bos)
    got = ev.text_windows(text, tokenizer, 16 + framed, bos)
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert got[:, framed:].flatten().tolist() == plain[: 16 * len(got)]
    calibrated = Calibration(texts=(text,), samples=1, seq_len=16 + framed, bos=bos)
    assert got[0].tolist() == calibrated.windows(tokenizer)[0].tolist()


def test_what_a_tokenizer_puts_behind_a_text_is_not_predicted() -> None:
    tokenizer = tiny.tokenizer()
    ends = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    windows = ev.text_windows(tiny.text(300), tokenizer, 16)
    assert windows[:, 0].eq(0).all()
    assert not windows[:, 1:].eq(1).any()


def test_errors_name_the_cause(windows: Tensor) -> None:
    broken = Bigram(0)
    broken.table[int(windows[4, 3])] = math.nan
    with pytest.raises(TersorError, match=r"not finite in \d of 9 windows"):
        ev.evaluate({"m": broken}, windows)
    with pytest.raises(TersorError, match="the baseline 'x' is none of p"):
        ev.evaluate({"p": Bigram(0)}, windows, baseline="x")
    with pytest.raises(TersorError, match="needs a causal language model"):
        ev.evaluate({"m": lambda ids: torch.zeros(len(ids), VOCAB)}, windows)
    small, large = tiny.model("llama"), tiny.model("llama", vocab_size=2 * tiny.VOCAB)
    with pytest.raises(TersorError, match="small has a vocabulary of 160 tokens and the baseline"):
        ev.evaluate({"small": small, "large": large}, windows, baseline="large")
    with pytest.raises(TersorError, match="gives token 160, and small has a vocabulary of 160"):
        ev.evaluate({"small": small}, windows.clamp(min=tiny.VOCAB))
    with pytest.raises(TersorError, match="does not fill one window of 512"):
        ev.text_windows("short", tiny.tokenizer(), 512)
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(TersorError, match="no BOS token; use --bos auto or --bos never"):
        ev.text_windows("a" * 99, tokenizer, 4, bos="always")
    with pytest.raises(TersorError, match="at least 2 tokens, not 1"):
        ev.text_windows("a" * 99, tiny.tokenizer(), 1)


class Clocked(nn.Module):
    """Takes `cost` seconds per token by a clock of the test's own, and notes how it was called."""

    now = 0.0
    calls: ClassVar[list[tuple[str, int, object]]] = []

    def __init__(self, name: str, cost: float) -> None:
        super().__init__()
        self.name, self.cost = name, cost
        self.register_buffer("weight", torch.zeros(10))

    def forward(self, ids: Tensor, past_key_values: object = None, use_cache: bool = False):
        Clocked.now += self.cost * ids.shape[1]
        Clocked.calls.append((self.name, ids.shape[1], past_key_values))
        logits = torch.zeros(*ids.shape, VOCAB)
        return SimpleNamespace(logits=logits, past_key_values=(self.name, past_key_values))


def test_speed_reads_the_prompt_once_and_then_one_token_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Clocked, "calls", [])
    monkeypatch.setattr(ev.time, "perf_counter", lambda: Clocked.now)
    models = {"slow": Clocked("slow", 0.5), "fast": Clocked("fast", 0.25)}
    speeds = ev.measure_speed(models, torch.zeros(1, 8, dtype=torch.int64), generated=3, runs=2)
    shared = {"prompt": 8, "generated": 3, "runs": 2, "weights": 40}
    resident = speeds["slow"].resident
    peaks = {name: speed.peak for name, speed in speeds.items()}
    slow = ev.Speed(prefill=2.0, decode=2.0, resident=resident, peak=peaks["slow"], **shared)
    fast = ev.Speed(prefill=4.0, decode=4.0, resident=resident, peak=peaks["fast"], **shared)
    assert speeds == {"slow": slow, "fast": fast}
    assert resident > 10 << 20
    assert min(peaks.values()) > 10 << 20
    # The models take turns, and each call is given the cache of the one before it.
    assert [name for name, _, _ in Clocked.calls] == (["slow"] * 4 + ["fast"] * 4) * 3
    assert [length for _, length, _ in Clocked.calls[:4]] == [8, 1, 1, 1]
    caches = [cache for _, _, cache in Clocked.calls[:4]]
    assert caches[0] is None
    assert caches[3] == ("slow", ("slow", ("slow", None)))


def test_decoding_with_a_real_model_and_cache() -> None:
    speeds = ev.measure_speed(
        {"m": tiny.model("llama")}, torch.arange(8).view(1, 8), generated=2, runs=1
    )
    assert speeds["m"].prefill > 0
    assert speeds["m"].decode > 0


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_speed_stays_within_the_context(kind: str) -> None:
    """Where positions are kept in a table, the model cannot go beyond it."""
    models = {"m": tiny.model(kind), "short": tiny.model(kind, max_position_embeddings=40)}
    whole = torch.arange(tiny.CONTEXT).view(1, -1)
    speed = ev.measure_speed({"m": models["m"]}, whole, generated=20, runs=1)["m"]
    assert (speed.prompt, speed.generated) == (tiny.CONTEXT - 20, 20)
    speed = ev.measure_speed(models, whole, generated=32, runs=1)["m"]
    assert (speed.prompt, speed.generated) == (20, 20)


def test_only_positions_in_a_table_end() -> None:
    limits = {kind: ev.position_limit(tiny.model(kind)) for kind in tiny.KINDS}
    tables = {"gpt2", "opt", "bert"}
    assert limits == {kind: tiny.CONTEXT if kind in tables else None for kind in tiny.KINDS}


def test_progress_is_drawn_where_it_is_asked_for(
    windows: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    ev.evaluate({"p": Bigram(0), "q": Bigram(1)}, windows, batch=2)
    assert capsys.readouterr() == ("", "")
    ev.evaluate({"p": Bigram(0), "q": Bigram(1)}, windows, batch=2, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "10/10" in err  # five batches through two models
    models = {"m": tiny.model("llama")}
    ev.measure_speed(models, torch.arange(8).view(1, 8), generated=2, runs=1, progress=True)
    assert "2/2" in capsys.readouterr().err


def test_weight_bytes_count_shared_storage_once() -> None:
    one = nn.Linear(6, 5, bias=False)
    pair = nn.ModuleList([one, nn.Linear(6, 5)])
    pair[1].weight = one.weight
    assert ev.weight_bytes(pair) == 4 * (30 + 5)


def test_resident_bytes_follow_an_allocation() -> None:
    gc.collect()  # what earlier tests left, so that none of it goes in between
    before = ev.resident_bytes()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert ev.resident_bytes() - before > 0.9 * block.numel()


class Wasteful(Clocked):
    """Holds 256 MB for a moment in every call."""

    def forward(self, ids: Tensor, **given: object):
        torch.ones(256 << 20, dtype=torch.uint8)
        return super().forward(ids, **given)


def test_peak_is_of_the_model_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not set the mark of a process's memory back")
    monkeypatch.setattr(Clocked, "calls", [])
    monkeypatch.setattr(ev.time, "perf_counter", lambda: Clocked.now)
    models = {"w": Wasteful("w", 0.5), "plain": Clocked("plain", 0.5)}
    speeds = ev.measure_speed(models, torch.zeros(1, 8, dtype=torch.int64), generated=1, runs=1)
    assert speeds["w"].peak - speeds["plain"].peak > 0.9 * (256 << 20)
    assert speeds["w"].peak <= peak_resident_bytes()


def test_peaks_may_be_nested() -> None:
    with peak_memory() as outer:
        torch.ones(128 << 20, dtype=torch.uint8)
        with peak_memory() as inner:
            pass
    assert 0 < inner.bytes <= outer.bytes <= peak_resident_bytes()
    if os.access("/proc/self/clear_refs", os.W_OK):
        assert outer.bytes - inner.bytes > 0.9 * (128 << 20)


def test_what_another_program_held_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """ru_maxrss goes on from what the process held before it became this program."""
    if not os.access("/proc/self/status", os.R_OK):
        pytest.skip("this system tells ru_maxrss alone")
    before = peak_resident_bytes()
    usage = SimpleNamespace(ru_maxrss=1 << 40)
    monkeypatch.setattr(report.resource, "getrusage", lambda who: usage)
    assert before <= peak_resident_bytes() < 1 << 40
    monkeypatch.setattr(report, "Path", lambda name: Path("/absent"))
    assert report._high_water() == 1 << 50


def test_results_as_json_and_as_a_table(windows: Tensor) -> None:
    got = ev.evaluate({"p": Bigram(0), "q": Bigram(1)}, windows, baseline="p")
    speed = {"q": ev.Speed(100.0, 10.0, 8, 4, 3, 40, 80)}
    content = json.loads(ev.to_json(got, speed))
    assert content["q"]["quality"]["kl"]["mean"] == got["q"].kl.mean
    assert content["q"]["quality"]["perplexity"]["error"] == got["q"].perplexity.error
    assert content["q"]["speed"]["decode"] == 10.0
    assert "speed" not in content["p"]
    assert ev.table(got).row_count == 2
    assert content["q"]["quality"]["flips"] == got["q"].flips
    assert content["q"]["speed"]["peak"] == 0  # not measured
    assert len(ev.table(got).columns) == 7


def test_one_window_has_no_error_to_show(windows: Tensor) -> None:
    got = ev.evaluate({"p": Bigram(0)}, windows[:1])
    content = json.loads(ev.to_json(got), parse_constant=pytest.fail)
    assert content["p"]["quality"]["nll"]["error"] is None
    assert "±" not in ev.quality_cells(got["p"])[0]
    assert len(ev.table(got).columns) == 2  # nothing to compare with
