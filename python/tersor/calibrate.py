"""Calibration: text to windows of tokens, and statistics of what the linears of a block read.

`watching`, which `capture` is made of, and the watchers in tersor.surgery.ranking are the only
places in the package that hook a model to observe it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor, nn

from tersor import column_solver
from tersor.corpus import Documents, check_characters, ended, open_documents
from tersor.cuda_solver import float32_products
from tersor.errors import TersorError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS = ("auto", "always", "never")
DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True)
class Calibration:
    """The text that a model is shown while its statistics are collected, and how it is cut.

    sources: files, `name.jsonl:field` taking one field of every line (`text` if none is named);
        a file of any other kind is plain text. All of it must be UTF-8.
    texts: more text, already in memory.
    samples, seq_len: the number of windows and their length in tokens; seq_len None means 2048,
        or the model's context where that is shorter.
    seed: chooses which parts of the text are used, and in which order.
    bos: "auto" frames each window as the tokenizer frames a text (a Llama tokenizer puts <s> in
        front, a BERT one [CLS] and [SEP] around), "always" puts the BOS token in front, "never"
        adds nothing. The frame counts in seq_len.
    """

    sources: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    bos: str = "auto"

    def __post_init__(self) -> None:
        if not self.sources and not self.texts:
            raise TersorError("calibration needs text; name at least one .txt or .jsonl file")
        given: Any
        for name, given in (("sources", self.sources), ("texts", self.texts)):
            if isinstance(given, str) or not all(isinstance(each, str) for each in given):
                raise TersorError(f"{name} must be a tuple of strings, as in {name}=('...',)")
        for number, text in enumerate(self.texts):
            check_characters(text, f"text {number} of the calibration texts")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise TersorError(f"seed is a whole number from 0 to 2**63 - 1, not {self.seed!r}")
        if self.samples < 1:
            raise TersorError(f"samples must be at least 1, not {self.samples}")
        if self.seq_len is not None and self.seq_len < 2:
            raise TersorError(f"seq_len must be at least 2, not {self.seq_len}")
        if self.bos not in BOS:
            raise TersorError(f"bos must be one of {', '.join(BOS)}, not {self.bos!r}")

    @property
    def names(self) -> str:
        return ", ".join(self.sources) or "the given texts"

    def windows(
        self, tokenizer: PreTrainedTokenizerBase, context: int | None = None, fewer: bool = False
    ) -> Tensor:
        """Token ids, int64 [samples, seq_len]; the same for the same text, tokenizer and seed.

        The text is taken in pieces of about two windows, in an order drawn from the seed, until
        there is enough: a large file costs no more than the part of it that is used.

        context: the most positions that the model has, where it has a limit.
        fewer: where the text is too short for all samples, as many as it has, at least one.
        Raises TersorError for text that is empty, too short, not UTF-8 or without the field.
        """
        seq_len = self.seq_len or min(DEFAULT_SEQ_LEN, context or DEFAULT_SEQ_LEN)
        if context and seq_len > context:
            raise TersorError(
                f"a sequence length of {seq_len} is beyond the model's {context} positions; "
                f"use {context} or less (--seq-len)"
            )
        front, back = frame(tokenizer, self.bos)
        body = seq_len - len(front) - len(back)
        if body < 1:
            raise TersorError(
                f"a sequence length of {seq_len} has no room for text beside the special tokens "
                f"of a window; use {len(front) + len(back) + 1} or more (--seq-len)"
            )
        need = self.samples * body
        ids: list[int] = []
        for text in self._shuffled(piece=8 * seq_len):
            ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= need:
                break
        else:
            need = len(ids) // body * body
            if not fewer or not need:
                raise TersorError(self._too_short(len(ids), seq_len, body))
        inner = torch.tensor(ids[:need]).view(-1, body)
        sides = [torch.tensor(s, dtype=torch.int64).expand(len(inner), -1) for s in (front, back)]
        return torch.cat([sides[0], inner, sides[1]], dim=1)

    def _shuffled(self, piece: int) -> Iterator[str]:
        """Every document once, in an order that depends on the seed alone."""
        parts: list[Documents] = [open_documents(source, piece) for source in self.sources]
        parts.append([ended(text) for text in self.texts])
        starts = torch.tensor([0] + [len(part) for part in parts]).cumsum(0)
        order = torch.randperm(int(starts[-1]), generator=torch.Generator().manual_seed(self.seed))
        which = torch.searchsorted(starts, order, right=True) - 1
        for part, i in zip(which.tolist(), (order - starts[which]).tolist(), strict=True):
            yield parts[part][i]

    def _too_short(self, tokens: int, seq_len: int, body: int) -> str:
        if tokens == 0:
            return f"the calibration text ({self.names}) is empty; give a file with text in it"
        fit = tokens // body
        fix = f"--samples {fit}" if fit else f"--samples 1 --seq-len {tokens + seq_len - body}"
        return (
            f"the calibration text ({self.names}) has {tokens} tokens, and {self.samples} windows "
            f"of {seq_len} need {self.samples * body}; use {fix}, or give more text"
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder; no code from the folder is run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken or missing file makes transformers raise
        cause = str(error).strip().split("\n")[0]
        raise TersorError(
            f"the tokenizer in {folder} cannot be loaded ({cause}); copy the model's tokenizer "
            f"files into that folder"
        ) from error


def digest(windows: Tensor) -> str:
    """SHA-256 of token ids: whether two runs were shown the same text."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()


def frame(tokenizer: PreTrainedTokenizerBase, bos: str) -> tuple[list[int], list[int]]:
    """The special tokens before and after the text of a window."""
    if bos == "never":
        return [], []
    if bos == "always":
        if tokenizer.bos_token_id is None:
            raise TersorError("the tokenizer has no BOS token; use --bos auto or --bos never")
        return [tokenizer.bos_token_id], []
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for i in range(len(framed) - len(plain) + 1):
        if framed[i : i + len(plain)] == plain:
            return framed[:i], framed[i + len(plain) :]
    return [], []


@dataclass(frozen=True)
class Factor:
    """What the column solver needs of a Gram matrix H: H + damp * mean(diag H) * I = R Rᵀ.

    unit: float32 [k, k]; strictly above the diagonal R[j, i] / R[i, i]. The rest is not read.
    pivots: float32 [k], the diagonal of R, with next to nothing for inputs that were always zero.
    order: int64 [k], the columns of H in the order in which they were factored, or None.
    damp: the damping that was needed, at least what was asked.
    dead: the number of inputs that were zero for every token.
    """

    unit: Tensor
    pivots: Tensor
    order: Tensor | None
    damp: float
    dead: int


class NormStats:
    """The squared norm of each of a linear's inputs over the tokens seen: the diagonal of a Gram
    matrix, where the rest would be for nothing."""

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        self.k = k
        self.tokens = 0
        self.diagonal = torch.zeros(k, device=device)

    def update(self, x: Tensor) -> None:
        """Adds the tokens of x, [..., k] in any floating-point dtype."""
        rows = x.reshape(-1, self.k).float()
        self.diagonal += rows.square().sum(0)
        self.tokens += rows.shape[0]

    def check(self, layer: str) -> None:
        """TersorError where an input was NaN or infinite."""
        _check_finite(self.diagonal, layer)


def _check_finite(diagonal: Tensor, layer: str) -> None:
    bad = int((~diagonal.isfinite()).sum())
    if bad:
        raise TersorError(
            f"the activations that {layer} reads hold NaN or Inf ({bad} of its "
            f"{diagonal.numel()} inputs); the model overflows in its own dtype, so convert it to "
            "bfloat16 or float32, or check its weights"
        )


class GramStats:
    """The Gram matrix of a linear's input, H = Σ x xᵀ over the tokens seen, and its mean.

    Inputs in bfloat16 and float16 are exact in float32, and every update adds the sum over its
    tokens, so that the rounding error grows with the number of updates and not of tokens. On a GPU
    the tensor cores take them as they are, and sum in float32. Once
    `factor` has been called, the lower triangle of `gram` with the diagonal is still H (in the
    order of the factor) and the rest holds the factor, which saves a second k x k matrix where it
    would decide the peak of memory.

    tokens: how many were seen. notes, departure: what a reader of the report should know of the
    factor, and in what it is not what was asked.
    """

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        self.k = k
        self.tokens = 0
        self.notes: list[str] = []
        self.departure: str | None = None
        self._total = torch.zeros(k, dtype=torch.float64, device=device)
        self._gram = torch.zeros(k, k, device=device)
        self._half = False  # whether only blocks on and above the diagonal are up to date
        self._factor: Factor | None = None
        self._asked: tuple[float, bool] | None = None

    @property
    def gram(self) -> Tensor:
        """H, float32 [k, k], as long as it is not factored."""
        if self._half:
            for i in range(0, self.k, BLOCK):
                j = i + BLOCK
                self._gram[j:, i:j] = self._gram[i:j, j:].T
            self._half = False
        return self._gram

    @property
    def mean(self) -> Tensor:
        """Σ x / tokens, float64 [k], whatever was done to H; zeros where there was no token."""
        return self._total / max(1, self.tokens)

    @property
    def diagonal(self) -> Tensor:
        """The diagonal of H, float32 [k] (not of one that was factored in another order)."""
        self._in_order()
        return self._gram.diagonal().clone()

    @float32_products()
    def times(self, rows: Tensor) -> Tensor:
        """rows @ H, for rows float32 [n, k] (not of one that was factored in another order)."""
        self._in_order()
        gram = self.gram
        out = torch.empty_like(rows)
        for i in range(0, self.k, BLOCK):
            j = i + BLOCK
            square = gram[i:j, i:j].tril()
            here = rows[:, i:j] @ (square + square.tril(-1).T)
            here.addmm_(rows[:, j:], gram[j:, i:j]).addmm_(rows[:, :i], gram[i:j, :i].T)
            out[:, i:j] = here
        return out

    def _in_order(self) -> None:
        if self._factor is not None and self._factor.order is not None:
            raise ValueError("the Gram matrix is in another order of columns")

    @float32_products()
    def update(self, x: Tensor) -> None:
        """Adds the tokens of x, [..., k] in any floating-point dtype."""
        rows = x.reshape(-1, self.k)
        if not (rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16) and _MIXED):
            rows = rows.float()
        for i in range(0, self.k, BLOCK):
            j = i + BLOCK
            _add_product(self._gram[i:j, i:], rows[:, i:j].T, rows[:, i:])
        self._half = True
        self._total += rows.sum(0, dtype=torch.float32)
        self.tokens += rows.shape[0]

    def merge(self, other: GramStats) -> None:
        """Adds what another has seen, before either is factored."""
        self._gram += other._gram
        self._total += other._total
        self._half = self._half or other._half
        self.tokens += other.tokens

    def check(self, layer: str) -> None:
        """TersorError where an input was NaN or infinite: its square is on the diagonal."""
        _check_finite(self._gram.diagonal(), layer)

    def factor(self, damp: float, act_order: bool) -> Factor:
        """The factor of H for the solver, made once for all the linears that share the input.

        damp: fraction of the mean diagonal added to it, doubled until H can be factored.
        act_order: the most active columns first.
        """
        if self._factor is None:
            order = None
            if act_order:
                order = torch.argsort(self.gram.diagonal(), descending=True, stable=True)
                _permute_symmetric(self.gram, order)
            used, dead, pivots = column_solver.factor(self.gram, damp)
            self._factor = Factor(self.gram, pivots, order, used, dead)
            self._asked = (damp, act_order)
            if dead:
                self.notes.append(f"{dead} of its {self.k} inputs were always zero")
            if self.tokens < self.k:
                self.notes.append(f"only {self.tokens} tokens for {self.k} inputs")
            if used > damp:
                self.departure = f"damping raised from {damp:g} to {used:g} to factor its inputs"
        if self._asked != (damp, act_order):
            raise ValueError(f"already factored with damp and act_order {self._asked}")
        return self._factor

    @float32_products()
    def loss(self, error: Tensor) -> float:
        """tr(E H Eᵀ) for E float32 [n, k]: the squared error of the outputs, summed over tokens."""
        gram, order = self.gram, self._factor.order if self._factor else None
        if order is not None:
            error = error[:, order]
        total = torch.zeros((), dtype=torch.float64, device=gram.device)
        for j in range(0, self.k, BLOCK):
            here = error[:, j : j + BLOCK]
            lower = gram[j:, j : j + BLOCK].tril()
            total += 2 * ((error[:, j:] @ lower) * here).sum(dtype=torch.float64)
            total -= (here.square() @ gram.diagonal()[j : j + BLOCK]).sum(dtype=torch.float64)
        return float(total)


BLOCK = 512  # columns of a Gram matrix handled at a time
_MIXED = hasattr(torch.ops.aten.addmm, "dtype_out")  # from torch 2.8 on


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total, float32, += a @ b, of float32 or on a GPU of 16 bits."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _permute_symmetric(gram: Tensor, order: Tensor) -> None:
    """gram[order][:, order] in place, for a symmetric matrix, with a few rows of extra memory."""
    for _ in range(2):  # (H P)ᵀ = Pᵀ H, so the second round makes Pᵀ H P
        for i in range(0, gram.shape[0], BLOCK):
            gram[i : i + BLOCK] = gram[i : i + BLOCK, order]
        _transpose(gram)


def _transpose(square: Tensor) -> None:
    for i in range(0, square.shape[0], BLOCK):
        a = slice(i, i + BLOCK)
        for j in range(0, i + 1, BLOCK):
            b = slice(j, j + BLOCK)
            mirrored = square[b, a].T.clone()
            square[b, a] = square[a, b].T.clone() if i != j else mirrored
            square[a, b] = mirrored


AnyStats = TypeVar("AnyStats", GramStats, NormStats)


@overload
def capture(linears: Mapping[str, nn.Linear], passes: Iterable[object]) -> dict[str, GramStats]: ...
@overload
def capture(
    linears: Mapping[str, nn.Linear], passes: Iterable[object], kind: type[AnyStats]
) -> dict[str, AnyStats]: ...
def capture(
    linears: Mapping[str, nn.Linear], passes: Iterable[object], kind: type[Any] = GramStats
) -> dict[str, Any]:
    """The statistics, by name, of what each linear reads while `passes` is gone through.

    linears: one for each distinct input. passes: does a forward pass whenever it is advanced.
    kind: of statistics.
    A linear that was never called, such as an expert that no token chose, has tokens == 0.
    Raises TersorError naming the linear where an input was NaN or infinite.
    """
    stats = {name: kind(linear.in_features, _device(linear)) for name, linear in linears.items()}

    with watching(linears, lambda name, x: stats[name].update(x)):
        deque(passes, maxlen=0)
    for name, gram in stats.items():
        gram.check(name)
    return stats


def _device(module: nn.Module) -> torch.device:
    """Where a linear is, of whatever class: a packed one has buffers alone."""
    return next(chain(module.parameters(), module.buffers())).device


@contextmanager
def watching(
    modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While it lasts, `see` is given what each of the modules reads, by name, when it is called."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: see(name, args[0])

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
