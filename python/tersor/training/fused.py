"""The distillation loss and its gradient in pieces, so that no tensor of all logits is made.

Logits are made from hidden states, a tile of some tokens and some columns of the vocabulary at a
time, and each tile's gradient goes at once into those of the hidden states and of the head. So the
forward pass does all the work, and keeps what the backward pass returns. Where the whole
vocabulary fits into a tile its logits are made once; where it does not, three times: for the
normalisers, for the sums of the loss, and for the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tersor.errors import TersorError
from tersor.training.losses import Distillation, Loss, find_loss, working

IGNORED = -100  # the label of a token that does not count, as everywhere in transformers
_LEAST_ROWS = 16  # fewer tokens than this in a tile would read the head too often


@dataclass(frozen=True)
class Head:
    """Hidden states and the projection that makes logits of them.

    hidden: [tokens, features]. weight: [vocabulary, features], of the same dtype and device.
    bias: [vocabulary] or None. softcap: c of c · tanh(logits / c), as in Gemma 2, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if (
            self.hidden.dim() != 2
            or self.weight.dim() != 2
            or self.hidden.shape[1] != self.weight.shape[1]
            or (self.bias is not None and self.bias.shape != self.weight.shape[:1])
        ):
            bias = "" if self.bias is None else f" with a bias {list(self.bias.shape)}"
            raise TersorError(
                f"hidden states {list(self.hidden.shape)} do not fit a head "
                f"{list(self.weight.shape)}{bias}; give [tokens, features] and "
                "[vocabulary, features]"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.hidden.shape[0], self.weight.shape[0]

    def detach(self) -> Head:
        """Without a gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return Head(self.hidden.detach(), self.weight.detach(), bias, self.softcap)

    def logits(self, rows: Tensor, columns: slice = slice(None)) -> Tensor:
        """Of these tokens and this part of the vocabulary, in float32 (float64 for float64)."""
        logits = self.hidden[rows.to(self.hidden.device)] @ self.weight[columns].T
        if self.bias is not None:
            logits = logits + self.bias[columns]
        logits = working(logits)
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


# Where logits come from: a Head, or the logits themselves, [tokens, vocabulary].
Logits: TypeAlias = "Head | Tensor"


class Parts(NamedTuple):
    """What the loss of a batch is made of, each a mean over the tokens that count.

    loss: alpha · distillation + (1 - alpha) · cross_entropy; it alone has a gradient.
    cross_entropy: NaN where alpha is 1 and no labels say what to predict.
    """

    loss: Tensor
    distillation: Tensor
    cross_entropy: Tensor


def distill(
    student: Logits,
    teacher: Logits,
    settings: Distillation,
    labels: Tensor | None = None,
    count: Tensor | float | None = None,
) -> Parts:
    """The loss of a batch, whose gradient reaches the student's tensors and nothing of the teacher.

    student, teacher: a Head, or logits [tokens, vocabulary]. Each row predicts one token: where
        labels are those of a causal model, the caller has shifted them.
    labels: int64 [tokens], the token that each row is to predict, -100 where it does not count
        (padding, prompt); None: all rows count, which needs alpha = 1.
    count: what sums are divided by instead of the number of tokens that count: those of all the
        batches whose gradients are added up.

    Sums are in float32, or float64 where the student is. The largest tensors besides the inputs and
    their gradients have settings.chunk entries.

    Raises TersorError where vocabularies or numbers of tokens differ, a label is not in the
    vocabulary, or no token counts.
    """
    _check(student, teacher)
    rows, divisor = counted(student, settings, labels, count)
    inputs = (student,) if isinstance(student, Tensor) else _tensors(student)
    loss, distillation, cross = _Distill.apply(
        _Work(student, teacher, settings, labels, rows, divisor, torch.is_grad_enabled()), *inputs
    )
    return Parts(loss, distillation, cross)


class _Work(NamedTuple):
    """rows: int64, the tokens that count. learn: whether gradients will be asked for; autograd
    says of a parameter that they are even where it is off. The rest is as in distill."""

    student: Logits
    teacher: Logits
    settings: Distillation
    labels: Tensor | None
    rows: Tensor
    divisor: Tensor
    learn: bool


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, *inputs: Tensor | None) -> Any:
        wanted = tuple(work.learn and want for want in ctx.needs_input_grad[1:])
        parts, gradients = _Pass(work, wanted).run()
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.mark_non_differentiable(parts.distillation, parts.cross_entropy)
        return tuple(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss: Tensor, *_: Tensor) -> Any:
        # Rounded to the inputs' dtype only here, when a scale against underflow is in `loss`.
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, *(None if g is None else (g * loss).to(dtype) for g, dtype in pairs)


class _Pass:
    """One computation of the loss, and of the gradients that are wanted."""

    def __init__(self, work: _Work, wanted: tuple[bool, ...]) -> None:
        self.student, self.teacher, settings, self.labels, rows, self.divisor, _ = work
        self.settings, self.wanted = settings, wanted
        student = self.student
        self.loss: Loss = find_loss(settings.loss)
        self.vocabulary = student.shape[1]
        count = max(settings.chunk // self.vocabulary, min(len(rows), _LEAST_ROWS))
        width = max(1, min(self.vocabulary, settings.chunk // count))
        self.blocks = rows.split(count)
        self.columns = [
            slice(start, min(start + width, self.vocabulary))
            for start in range(0, self.vocabulary, width)
        ]
        self.inputs = (student,) if isinstance(student, Tensor) else _tensors(student)
        self.gradients = [
            # Sums over tokens are kept in float32 until all have been added up.
            torch.zeros_like(x, dtype=working(x[:0]).dtype) if want and x is not None else None
            for x, want in zip(self.inputs, wanted, strict=True)
        ]

    def run(self) -> tuple[Parts, list[Tensor | None]]:
        settings = self.settings
        values, cross = [], []
        for rows in self.blocks:
            value, entropy = self._block(rows)
            values.append(value.sum())
            cross.append(entropy)
        distillation = torch.stack(values).sum() / self.divisor
        entropy = torch.stack(cross).sum() / self.divisor
        loss = settings.alpha * distillation
        if settings.alpha < 1:
            loss = loss + (1 - settings.alpha) * entropy
        for gradient in self.gradients:
            if gradient is not None:
                gradient /= self.divisor  # last: in float16 the quotients might be zero
        return Parts(loss, distillation, entropy), self.gradients

    def _block(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The losses [tokens] of these rows, and the sum of their cross-entropies."""
        settings, loss = self.settings, self.loss
        t = settings.temperature
        labels = None if self.labels is None else self.labels[rows]
        tiles = _Tiles(self.student, self.teacher, rows, self.columns)
        of_student = of_teacher = at_one = None
        picked: Tensor | None = None
        for columns, s, q in tiles:
            if loss.of_distributions:
                of_student = _log_sum(of_student, s / t)
                of_teacher = _log_sum(of_teacher, q / t)
            if labels is not None:
                at_one = _log_sum(at_one, s)
                inside = (labels >= columns.start) & (labels < columns.stop)
                place = (labels - columns.start).clamp(0, s.shape[1] - 1)
                found = s.gather(1, place.unsqueeze(1)).squeeze(1)
                picked = torch.where(inside, found, 0 if picked is None else picked)

        def shaped(s: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
            if of_student is None or of_teacher is None:
                return s, q
            return (s / t) - of_student.unsqueeze(-1), (q / t) - of_teacher.unsqueeze(-1)

        sums: Tensor | None = None
        for _, s, q in tiles:
            piece = loss.sums(*shaped(s, q))
            sums = piece if sums is None else sums + piece
        assert sums is not None
        value = loss.value(sums, self.vocabulary) * t**2
        if any(self.wanted):
            for columns, s, q in tiles:
                # By the logits: one T of T² goes for the derivative of logits / T.
                slope = loss.gradient(*shaped(s, q), sums, self.vocabulary)
                slope = slope * (settings.alpha * t)
                if settings.alpha < 1 and at_one is not None and labels is not None:
                    self._add_cross_entropy(slope, s, at_one, labels, columns)
                self._push(slope, s, rows, columns)
        if at_one is None or picked is None:
            return value, value.new_tensor(float("nan"))
        return value, (at_one - picked).sum()

    def _add_cross_entropy(
        self, slope: Tensor, s: Tensor, normaliser: Tensor, labels: Tensor, columns: slice
    ) -> None:
        weight = 1 - self.settings.alpha
        slope.add_((s - normaliser.unsqueeze(-1)).exp_(), alpha=weight)
        inside = ((labels >= columns.start) & (labels < columns.stop)).nonzero()[:, 0]
        slope[inside, labels[inside] - columns.start] -= weight

    def _push(self, slope: Tensor, s: Tensor, rows: Tensor, columns: slice) -> None:
        """A tile's gradient, on to the gradients of what its logits were made from."""
        student = self.student
        if isinstance(student, Tensor):
            (gradient,) = self.gradients
            if gradient is not None:
                gradient[rows, columns] = slope
            return
        if student.softcap is not None:
            slope = slope * (1 - (s / student.softcap).square())
        of_hidden, of_weight, of_bias = self.gradients
        cast = slope.to(student.weight.dtype)
        if of_hidden is not None:
            of_hidden[rows] += cast @ student.weight[columns]
        if of_weight is not None:
            of_weight[columns] += cast.T @ student.hidden[rows]
        if of_bias is not None:
            of_bias[columns] += slope.sum(0)


class _Tiles:
    """The logits of some rows, a part of the vocabulary at a time: (columns, student, teacher).
    If there is only one part, it is made once."""

    def __init__(
        self, student: Logits, teacher: Logits, rows: Tensor, columns: list[slice]
    ) -> None:
        self.sources, self.rows, self.columns = (student, teacher), rows, columns
        self.only = self._make(columns[0]) if len(columns) == 1 else None

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for columns in self.columns:
            yield self._make(columns) if self.only is None else self.only

    def _make(self, columns: slice) -> tuple[slice, Tensor, Tensor]:
        student, teacher = (_tile(source, self.rows, columns) for source in self.sources)
        return columns, student, teacher.to(student)


def _tile(source: Logits, rows: Tensor, columns: slice) -> Tensor:
    if isinstance(source, Tensor):
        return working(source[:, columns][rows.to(source.device)])
    return source.logits(rows, columns)


def _log_sum(so_far: Tensor | None, logits: Tensor) -> Tensor:
    here = logits.logsumexp(-1)
    return here if so_far is None else torch.logaddexp(so_far, here)


def _tensors(head: Head) -> tuple[Tensor, Tensor, Tensor | None]:
    return head.hidden, head.weight, head.bias


def _device(source: Logits) -> torch.device:
    return source.device if isinstance(source, Tensor) else source.hidden.device


def _check(student: Logits, teacher: Logits) -> None:
    for whose, source in (("student", student), ("teacher", teacher)):
        if len(source.shape) != 2:
            raise TersorError(
                f"the {whose}'s logits are {list(source.shape)}; give [tokens, vocabulary], "
                "a batch flattened"
            )
    if student.shape[1] != teacher.shape[1]:
        raise TersorError(
            f"the student's vocabulary has {student.shape[1]} tokens and the teacher's "
            f"{teacher.shape[1]}; distillation compares them token by token, so choose a teacher "
            "with the student's tokenizer, or give the teacher's logits of the student's tokens"
        )
    if student.shape[0] != teacher.shape[0]:
        raise TersorError(
            f"the student predicts {student.shape[0]} tokens and the teacher {teacher.shape[0]}; "
            "both must read the same batch"
        )


def counted(
    student: Logits,
    settings: Distillation,
    labels: Tensor | None,
    count: Tensor | float | None,
) -> tuple[Tensor, Tensor]:
    """The rows that count, int64, and what sums over them are divided by; see distill for the
    arguments and errors."""
    tokens, vocabulary = student.shape
    if labels is None:
        if settings.alpha < 1:
            raise TersorError(
                f"alpha is {settings.alpha}, and cross-entropy needs labels; give them, or alpha=1"
            )
        rows = torch.arange(tokens, device=_device(student))
    else:
        if labels.shape != (tokens,):
            raise TersorError(
                f"the labels are {list(labels.shape)} for {tokens} tokens; give one for each"
            )
        wrong = (labels != IGNORED) & ((labels < 0) | (labels >= vocabulary))
        if wrong.any():
            raise TersorError(
                f"the label {int(labels[wrong][0])} is not in the vocabulary of {vocabulary}; "
                "use -100 where a token does not count"
            )
        rows = (labels != IGNORED).nonzero()[:, 0]
    if not len(rows):
        raise TersorError(
            "no token counts: every label is -100; leave such batches out, or check that prompts "
            "are shorter than the length they are cut to"
        )
    return rows, torch.as_tensor(len(rows) if count is None else count, device=rows.device)
