"""Models on tasks, by the rule of lm-eval's multiple choice: what a model holds likeliest is its
answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tersor.calibrate import frame
from tersor.errors import TersorError
from tersor.evaluate import Estimate, Model, check_vocabulary, context_of
from tersor.progress import Progress
from tersor.tasks.items import Item, Task

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Score:
    """A model on a task.

    acc: share of items where the answer has the largest log-likelihood given the context.
    acc_norm: where it has the largest per character, which is fairer to long choices.
    chance: what guessing gives. flips: share of items that exactly one of baseline and model has
        right by acc (Dutta et al., arXiv:2407.09141).
    """

    items: int
    chance: float
    acc: Estimate
    acc_norm: Estimate
    flips: float | None = None


@dataclass(frozen=True)
class _Request:
    """ids: of the context and a choice; the last `scored` are the choice's."""

    ids: list[int]
    scored: int


@torch.inference_mode()
def run_tasks(
    models: Mapping[str, Model],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    baseline: str | None = None,
    batch: int = 16,
    progress: bool | None = None,
) -> dict[str, dict[str, Score]]:
    """The score of each model on each task, by name.

    White space at the end of a context is read as the beginning of the choice, since tokenizers
    join it to the word behind it; and so is the end of a context that they join to the choice. A
    context that is too long for a model loses its beginning. Errors are standard errors over items.

    baseline: the name of the model that flips are counted against.
    batch: sequences per forward pass. progress: show a bar; by default where stderr is a terminal.
    Raises TersorError for a choice that the tokenizer leaves nothing of or that does not fit into a
    model, and where log-likelihoods are not finite.
    """
    if baseline is not None and baseline not in models:
        raise TersorError(f"the baseline {baseline!r} is none of {', '.join(models)}")
    requests = {task.name: [_requests(item, tokenizer, task.name) for item in task.items]
                for task in tasks}  # fmt: skip
    if len(requests) < len(tasks):
        raise TersorError("two tasks have the same name; rename one")
    flat = [each for items in requests.values() for item in items for each in item]
    largest = torch.tensor([max(max(each.ids) for each in flat)])
    for name, model in models.items():
        check_vocabulary(name, model, largest)
        _check_length(name, model, flat)
    right: dict[str, dict[str, Tensor]] = {}
    with Progress(progress) as bar:
        bar.expect(len(models) * -(-len(flat) // batch))
        for name, model in models.items():
            bar.say(f"{name}: tasks")
            sums = iter(_log_likelihoods(name, model, flat, batch, bar))
            right[name] = {
                task.name: torch.stack([_right(item, sums) for item in task.items], dim=1)
                for task in tasks
            }
    return {
        name: {
            task.name: _score(
                task, right[name][task.name], right[baseline][task.name] if baseline else None
            )
            for task in tasks
        }
        for name in models
    }


def _requests(item: Item, tokenizer: PreTrainedTokenizerBase, task: str) -> list[_Request]:
    front, _ = frame(tokenizer, "auto")
    context = item.context.rstrip()
    space = item.context[len(context) :]
    before = _encode(tokenizer, context)
    front = front or ([] if before else _first(tokenizer))
    out = []
    for choice in item.choices:
        ids = _encode(tokenizer, context + space + choice)
        # Where the tokenizer joins the two, the choice begins with the token that has both.
        pairs = enumerate(zip(before, ids, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(before), len(ids)))
        if shared == len(ids):
            raise TersorError(
                f"task {task}: nothing is left of the choice {choice[:40]!r} in tokens; give "
                "choices that the model's tokenizer keeps"
            )
        out.append(_Request(front + ids, len(ids) - shared))
    return out


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _first(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a choice without a context is predicted from."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise TersorError("an item has no context and the tokenizer no BOS token; give it a context")


def _check_length(name: str, model: Model, requests: Sequence[_Request]) -> None:
    limit = context_of(model)
    longest = max(each.scored for each in requests)
    if limit is not None and longest > limit:
        raise TersorError(
            f"a choice has {longest} tokens, and {name} has {limit} positions; shorten the choices"
        )


def _log_likelihoods(
    name: str, model: Model, requests: Sequence[_Request], batch: int, bar: Progress
) -> list[float]:
    """Of each request's choice, in nats. Sequences of like length go together, padded on the right,
    where a causal model does not look."""
    limit = context_of(model)
    kept = [each.ids[-(limit + 1) :] if limit else each.ids for each in requests]
    order = sorted(range(len(kept)), key=lambda i: -len(kept[i]))
    sums = [0.0] * len(kept)
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        width = len(kept[numbers[0]]) - 1
        ids = torch.zeros(len(numbers), width, dtype=torch.int64)
        for row, i in enumerate(numbers):
            ids[row, : len(kept[i]) - 1] = torch.tensor(kept[i][:-1])
        out = model(ids, use_cache=False) if hasattr(model, "config") else model(ids)
        logits = out if isinstance(out, Tensor) else out.logits
        for row, i in enumerate(numbers):
            end, scored = len(kept[i]) - 1, requests[i].scored
            log_p = logits[row, end - scored : end].double().log_softmax(-1)
            target = torch.tensor(kept[i][-scored:]).unsqueeze(1)
            sums[i] = float(log_p.gather(1, target).sum())
            if not math.isfinite(sums[i]):
                raise TersorError(
                    f"{name} gives a log-likelihood that is not finite; check its weights or use a "
                    "wider dtype"
                )
        bar.step()
    return sums


def _right(item: Item, sums: Any) -> Tensor:
    """float64 [2]: whether the answer is right by log-likelihood, and by it per character. The next
    of sums are the item's; of equals the first counts."""
    found = [next(sums) for _ in item.choices]
    per_character = [s / len(choice) for s, choice in zip(found, item.choices, strict=True)]
    best = (max(range(len(found)), key=each.__getitem__) for each in (found, per_character))
    return torch.tensor([float(each == item.answer) for each in best], dtype=torch.float64)


def _score(task: Task, right: Tensor, reference: Tensor | None) -> Score:
    return Score(
        items=len(task.items),
        chance=sum(1 / len(item.choices) for item in task.items) / len(task.items),
        acc=Estimate.of(right[0]),
        acc_norm=Estimate.of(right[1]),
        flips=None if reference is None else float((right[0] != reference[0]).double().mean()),
    )


def to_dict(scores: Mapping[str, Mapping[str, Score]]) -> dict[str, dict[str, Any]]:
    """For JSON: model -> task -> score."""
    return {
        name: {task: asdict(score) for task, score in by_task.items()}
        for name, by_task in scores.items()
    }


def table(scores: Mapping[str, Mapping[str, Score]], title: str | None = None) -> Table:
    """For people: a row for each model and task, ± one standard error."""
    from rich.table import Table

    flips = any(s.flips is not None for by_task in scores.values() for s in by_task.values())
    shown = Table("model", "task", title=title)
    for head in ("items", "chance", "acc", "acc_norm", *["flips"] * flips):
        shown.add_column(head, justify="right")
    for name, by_task in scores.items():
        for task, score in by_task.items():
            cells = [str(score.items), f"{100 * score.chance:.0f} %"]
            cells += [_percent(score.acc), _percent(score.acc_norm)]
            cells += [f"{100 * score.flips:.1f} %" if score.flips is not None else ""] * flips
            shown.add_row(name, task, *cells)
    return shown


def _percent(estimate: Estimate) -> str:
    error = "" if math.isnan(estimate.error) else f" ± {100 * estimate.error:.1f}"
    return f"{100 * estimate.mean:.1f}{error} %"
