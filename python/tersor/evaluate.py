"""What a compressed model costs and gains: perplexity, distance from the original, speed, memory.

Models are compared window by window on the same text, in one pass, so that every difference is
paired; times are taken in turns, so that a busy machine disturbs all models alike.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tersor.calibrate import frame
from tersor.errors import TersorError
from tersor.progress import Progress
from tersor.report import peak_memory

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

# A causal language model: token ids int64 [batch, length] to logits [batch, length, vocabulary],
# as a tensor or as the `logits` of what is returned (every transformers model).
Model = Callable[..., Any]

CHUNK = 1 << 22  # logits turned to float64 at a time: 32 MB


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error (NaN where there is only one observation)."""

    mean: float
    error: float

    @classmethod
    def of(cls, observations: Tensor) -> Estimate:
        """From independent observations [count]: here, one for each window."""
        count = observations.numel()
        error = float(observations.std()) / math.sqrt(count) if count > 1 else math.nan
        return cls(float(observations.mean()), error)


@dataclass(frozen=True)
class Quality:
    """How well a model predicts a text and, beside a baseline, how far it is from it.

    nll: log-perplexity, nats per predicted token; the error is over windows.
    delta: nll minus the baseline's, paired by window.
    kl: KL(baseline ‖ model) per token in nats; kl_99: its 99th percentile over tokens.
    top1: share of tokens where both models put the same token first.
    flips: share of tokens that exactly one of the two puts first and has right (Dutta et al.,
        arXiv:2407.09141): what changed, though as many may have changed for the better.
    """

    windows: int
    tokens: int
    nll: Estimate
    delta: Estimate | None = None
    kl: Estimate | None = None
    kl_99: float | None = None
    top1: float | None = None
    flips: float | None = None

    @property
    def perplexity(self) -> Estimate:
        """exp(nll), the error to first order."""
        value = math.exp(self.nll.mean)
        return Estimate(value, value * self.nll.error)

    def to_dict(self) -> dict[str, Any]:
        return {"perplexity": asdict(self.perplexity), **asdict(self)}


@dataclass(frozen=True)
class Speed:
    """What running a model on one sequence takes.

    prefill: tokens per second of reading a prompt of `prompt` tokens; decode: of writing
        `generated` tokens after it, one at a time, greedily, with the key-value cache. Both are
        medians over runs.
    weights: bytes of the model's tensors. resident: bytes that the process held after the runs,
        with all the models in it. peak: the most that it held in any of this model's runs.
    """

    prefill: float
    decode: float
    prompt: int
    generated: int
    runs: int
    weights: int
    resident: int
    peak: int = 0


def text_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, length: int, bos: str = "auto"
) -> Tensor:
    """A text as token ids in windows, int64 [count, length].

    As in the protocol of GPTQ (Frantar et al., arXiv:2210.17323) the whole text is tokenized once
    and cut into windows that do not overlap; the tail that fills no window is left out.

    bos: as in Calibration: "auto" begins each window as the tokenizer begins a text, "always" with
        the BOS token, "never" with text. What is put in front counts in the length but is not
        predicted; what a tokenizer puts behind a text is left out, since it would be. The protocol,
        and so most published perplexities, is "never" but for the very first window, which makes
        no difference that can be seen; models such as Gemma are lost without the token.
    Raises TersorError where the text does not fill one window.
    """
    front, _ = frame(tokenizer, bos)
    body = length - len(front)
    if length < 2 or body < 1:
        least = max(2, len(front) + 1)
        raise TersorError(f"a window must have at least {least} tokens, not {length}")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // body
    if count == 0:
        raise TersorError(
            f"the text has {len(ids)} tokens and does not fill one window of {length}; "
            f"give more text, or use shorter windows (--seq-len)"
        )
    cut = torch.tensor(ids[: count * body], dtype=torch.int64).view(count, body)
    return torch.cat([torch.tensor(front, dtype=torch.int64).expand(count, -1), cut], dim=1)


@torch.inference_mode()
def evaluate(
    models: Mapping[str, Model],
    windows: Tensor,
    baseline: str | None = None,
    batch: int = 1,
    progress: bool | None = None,
) -> dict[str, Quality]:
    """The quality of each model on windows int64 [count, length], all models seeing the same ones.

    Within a window each token but the first is predicted from those before it. Logarithms and
    sums are in float64, whatever the models compute in.

    baseline: the name of the model that the others are compared with.
    batch: windows per forward pass. The logits of one batch of every model are in memory at once.
    progress: show a bar; by default where stderr is a terminal.
    Raises TersorError where a model's logits are not finite, or its vocabulary is another than the
    baseline's or lacks tokens of the windows.
    """
    if baseline is not None and baseline not in models:
        raise TersorError(f"the baseline {baseline!r} is none of {', '.join(models)}")
    if baseline is not None:
        _check_same_vocabulary(models, baseline)
    for name, model in models.items():
        check_vocabulary(name, model, windows)
    # The baseline first: the others are compared with it, a chunk of tokens at a time.
    names = sorted(models, key=lambda name: name != baseline)
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    batches = windows.split(batch)
    with Progress(progress) as bar:
        bar.expect(len(batches) * len(names))
        for ids in batches:
            logits = {}
            for name in names:
                bar.say(f"{name}: reading the text")
                logits[name] = _logits(models[name], ids)[:, :-1].flatten(0, 1)
                bar.step()
            rows = max(1, CHUNK // next(iter(logits.values())).shape[1])
            for i, target in enumerate(ids[:, 1:].flatten().split(rows)):
                reference = None
                for name in names:
                    log_p = logits[name][i * rows : (i + 1) * rows].double().log_softmax(-1)
                    if baseline is not None and reference is None:
                        reference = log_p
                    parts[name].append(_per_token(log_p, target, reference))
    count, length = windows.shape
    # float64 [4, tokens]: negative log-likelihood, divergence, agreement, flip
    tokens = {name: torch.cat(parts[name], dim=1) for name in names}
    return {
        name: _quality(tokens[name], tokens[baseline] if baseline else None, count, length - 1)
        for name in models
    }


def check_vocabulary(name: str, model: Model, ids: Tensor) -> None:
    """TersorError where a transformers model lacks one of the tokens. (A function does not say
    which it knows.)"""
    size, largest = _vocabulary(model), int(ids.max())
    if size is not None and largest >= size:
        raise TersorError(
            f"the tokenizer gives token {largest}, and {name} has a vocabulary of {size}; "
            "copy the model's own tokenizer files into its folder"
        )


def _check_same_vocabulary(models: Mapping[str, Model], baseline: str) -> None:
    wanted = _vocabulary(models[baseline])
    for name, model in models.items():
        size = _vocabulary(model)
        if size and wanted and size != wanted:
            raise TersorError(
                f"{name} has a vocabulary of {size} tokens and the baseline {baseline} one of "
                f"{wanted}; compare a model with the original that it was made from"
            )


def _vocabulary(model: Model) -> int | None:
    if not hasattr(model, "config"):
        return None
    return int(model.config.get_text_config().vocab_size)


def context_of(model: Model) -> int | None:
    """The most positions that a transformers model says it has."""
    config = model.config.get_text_config() if hasattr(model, "config") else None
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def position_limit(model: nn.Module) -> int | None:
    """The positions beyond which a transformers model cannot go at all. Rotary positions have no
    end, though a model may be worse where it was not trained; those kept in a table have."""
    rotary = any(name.endswith("inv_freq") for name, _ in model.named_buffers())
    return None if rotary else context_of(model)


def _per_token(log_p: Tensor, target: Tensor, reference: Tensor | None) -> Tensor:
    nll = -log_p.gather(1, target.unsqueeze(1)).squeeze(1)
    if reference is None:
        return torch.stack([nll] * 4)  # the others are not read
    # 0 · (−∞ − −∞) is not a number, and where the baseline says never, nothing is lost.
    kl = torch.where(reference.isneginf(), 0, reference.exp() * (reference - log_p)).sum(1)
    was, now = reference.argmax(1), log_p.argmax(1)
    flip = (was == target) != (now == target)
    return torch.stack([nll, kl, (was == now).double(), flip.double()])


def _quality(tokens: Tensor, baseline: Tensor | None, count: int, length: int) -> Quality:
    nll = tokens[0].view(count, length).mean(1)
    if not nll.isfinite().all():
        bad = int((~nll.isfinite()).sum())
        raise TersorError(
            f"the model's log-likelihood is not finite in {bad} of {count} windows; its logits "
            f"hold NaN or Inf, so check its weights or use a wider dtype"
        )
    if baseline is None:
        return Quality(count, nll.numel() * length, Estimate.of(nll))
    kl = tokens[1]
    return Quality(
        windows=count,
        tokens=count * length,
        nll=Estimate.of(nll),
        delta=Estimate.of(nll - baseline[0].view(count, length).mean(1)),
        kl=Estimate.of(kl.view(count, length).mean(1)),
        kl_99=float(kl.kthvalue(math.ceil(0.99 * kl.numel())).values),
        top1=float(tokens[2].mean()),
        flips=float(tokens[3].mean()),
    )


def _logits(model: Model, ids: Tensor) -> Tensor:
    # A model of transformers would otherwise keep the keys and values of windows it never goes on.
    out = model(ids, use_cache=False) if hasattr(model, "config") else model(ids)
    logits = out if isinstance(out, Tensor) else out.logits
    if logits.shape[:2] != ids.shape:
        raise TersorError(
            f"the model gives logits {tuple(logits.shape)} for tokens {tuple(ids.shape)}; "
            f"evaluation needs a causal language model, [batch, length, vocabulary]"
        )
    return logits


@torch.inference_mode()
def measure_speed(
    models: Mapping[str, nn.Module],
    prompt: Tensor,
    generated: int = 32,
    runs: int = 5,
    progress: bool | None = None,
) -> dict[str, Speed]:
    """The speed of each transformers model, the models taking turns in every run.

    prompt: int64 [1, tokens]. The first run of each model warms it up and is not counted.
    generated: tokens written after it. Where both do not fit into the shortest context, the prompt
        is cut, to half of the context at the least.
    progress: show a bar; by default where stderr is a terminal. It is drawn between runs alone.
    """
    if limit := min(filter(None, map(context_of, models.values())), default=None):
        generated = min(generated, limit // 2)
        prompt = prompt[:, : limit - generated]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    peaks = dict.fromkeys(models, 0)
    with Progress(progress, still=True) as bar:
        bar.expect((runs + 1) * len(models))
        for run in range(runs + 1):
            for name, model in models.items():
                bar.say(f"{name}: measuring its speed")
                with peak_memory() as peak:
                    times = _time(model, prompt, generated)
                peaks[name] = max(peaks[name], peak.bytes)
                if run:
                    seconds[name].append(times)
                bar.step()
    resident = resident_bytes()
    return {
        name: Speed(
            prefill=prompt.numel() / median(read for read, _ in taken),
            decode=generated / median(write for _, write in taken),
            prompt=prompt.numel(),
            generated=generated,
            runs=runs,
            weights=weight_bytes(models[name]),
            resident=resident,
            peak=peaks[name],
        )
        for name, taken in seconds.items()
    }


def _time(model: nn.Module, prompt: Tensor, generated: int) -> tuple[float, float]:
    start = time.perf_counter()
    out = model(prompt, use_cache=True)
    middle = time.perf_counter()
    for _ in range(generated):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    return middle - start, time.perf_counter() - middle


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers in memory; shared storage counts once."""
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def resident_bytes() -> int:
    """Memory that this process holds now, as Linux counts it."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def to_json(
    qualities: Mapping[str, Quality],
    speeds: Mapping[str, Speed] | None = None,
    tasks: Mapping[str, Mapping[str, Any]] | None = None,
    failed: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """The results by model, for a file. failed: what could not be measured of a model, and why; its
    entry is there where there is any. An unknown error is null: JSON has no NaN."""
    content = {name: {"quality": quality.to_dict()} for name, quality in qualities.items()}
    for name, speed in (speeds or {}).items():
        content[name]["speed"] = asdict(speed)
    for name, scores in (tasks or {}).items():
        content[name]["tasks"] = dict(scores)
    for name, reasons in (failed or {}).items():
        if reasons:
            content[name]["failed"] = dict(reasons)
    known = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return json.dumps(known, indent=2) + "\n"


def table(qualities: Mapping[str, Quality], title: str | None = None) -> Table:
    """The results as a table for people: one row for each model, ± one standard error."""
    from rich.table import Table

    heads = ["perplexity"]
    if any(quality.delta is not None for quality in qualities.values()):
        heads += ["Δ log-perplexity", "KL", "KL 99 %", "top-1", "flips"]
    out = Table(title=title)
    out.add_column("model")
    for head in heads:
        out.add_column(head, justify="right")
    for name, quality in qualities.items():
        out.add_row(name, *quality_cells(quality)[: len(heads)])
    return out


def quality_cells(quality: Quality) -> list[str]:
    """perplexity, Δ log-perplexity, KL, 99 % KL, top-1 agreement and flips, ± one standard
    error."""
    cells = [_plus_minus(quality.perplexity, ".3f")]
    if quality.delta is None or quality.kl is None:
        return cells + [""] * 5
    return [
        *cells,
        _plus_minus(quality.delta, "+.4f"),
        _plus_minus(quality.kl, ".4f"),
        f"{quality.kl_99:.3f}",
        f"{100 * (quality.top1 or 0):.1f} %",
        f"{100 * (quality.flips or 0):.1f} %",
    ]


def _plus_minus(estimate: Estimate, style: str) -> str:
    """Without an error where it is not known, since there was one window."""
    mean = format(estimate.mean, style)
    if math.isnan(estimate.error):
        return mean
    return f"{mean} ± {format(estimate.error, style.lstrip('+'))}"
