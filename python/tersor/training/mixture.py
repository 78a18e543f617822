"""Several data sets as one, each with its share, which can follow what the student still lacks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info
from transformers import TrainerCallback

from tersor.errors import TersorError
from tersor.training.fused import distill
from tersor.training.generation import seed_of
from tersor.training.losses import Distillation
from tersor.training.reading import vocabulary_of


class Mixture(IterableDataset):
    """Rows of several data sets in turns, without end; a Trainer needs max_steps.

        Mixture({"code": (code, 0.7), "prose": (prose, 0.3)}, by="tokens")

    sources: name -> a data set with a length, and its weight; weights are divided by their sum.
        Where none has one, it is size ^ (1 / temperature): 1 takes all rows equally often, a higher
        one takes more of small sources, as multilingual models do (Conneau et al.,
        arXiv:1911.02116, with α = 1 / temperature).
    by: whether weights are shares of "rows" or of "tokens" (those of the attention mask, or all).
    seed: of the order in each source, which is another one in every pass through it.

    The next row is always one of the source that is furthest behind its share, so that shares hold
    up to one row at any time and not only on average. Which rows come, and when, depends on the
    sources and the seed alone; a Trainer that resumes skips those that it had.

    Raises TersorError for an empty source, and for weights that are negative or all zero.
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        by: str = "rows",
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not sources:
            raise TersorError("a mixture needs data sets; give at least one")
        if by not in ("rows", "tokens"):
            raise TersorError(f'by is "rows" or "tokens", not {by!r}')
        if not 0 < temperature < math.inf:
            raise TersorError(f"the temperature is {temperature!r}; give a number above 0")
        given = {name: isinstance(source, tuple) for name, source in sources.items()}
        if len(set(given.values())) > 1:
            bare = next(name for name, has in given.items() if not has)
            raise TersorError(
                f"{bare} has no weight and others have; give all of them one, or none"
            )
        weighted = all(given.values())
        if weighted and temperature != 1:
            raise TersorError(
                "the temperature is for weights by size; give it or weights, not both"
            )
        self.sources = {name: source[0] if weighted else source for name, source in sources.items()}
        for name, source in self.sources.items():
            if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
                raise TersorError(
                    f"{name} is a {type(source).__name__}, without length or rows by number; give "
                    "a list, a torch Dataset or a datasets.Dataset"
                )
            if not len(source):
                raise TersorError(f"{name} is empty; leave it out")
        self.by, self.seed = by, seed
        sizes = {name: len(source) for name, source in self.sources.items()}
        most = max(sizes.values())  # a power of the sizes themselves may be beyond any number
        weights = {
            name: sources[name][1] if weighted else math.exp(math.log(size / most) / temperature)
            for name, size in sizes.items()
        }
        self.changes: list[tuple[int, dict[str, float]]] = [(0, self._shares(weights))]
        self.given = 0  # rows, in this process
        self.drawn = dict.fromkeys(self.sources, 0)  # of each source, rows or tokens as in `by`

    @property
    def weights(self) -> dict[str, float]:
        """The shares as they are now, which add up to 1."""
        return dict(self.changes[-1][1])

    def reweigh(self, weights: Mapping[str, float], row: int) -> None:
        """Other shares from this row on, counted from 0 over the whole training. TersorError for a
        row that has been given already."""
        last = max(self.given, self.changes[-1][0])
        if row < last:
            raise TersorError(
                f"row {row} of the mixture has been given ({last} have); change later ones"
            )
        self.changes.append((row, self._shares(weights)))

    def __iter__(self) -> Iterator[Any]:
        credit = dict.fromkeys(self.sources, 0.0)
        self.given, self.drawn = 0, dict.fromkeys(self.sources, 0)
        rows = {name: self._rows(name) for name in self.sources}
        worker = get_worker_info()
        count, mine = (worker.num_workers, worker.id) if worker is not None else (1, 0)
        number, change = 0, 0
        while True:
            while change + 1 < len(self.changes) and self.changes[change + 1][0] <= number:
                change += 1
            shares = self.changes[change][1]
            taken = [name for name, share in shares.items() if share]
            name = max(taken, key=lambda each: credit[each] + shares[each])
            row = next(rows[name])
            size = 1 if self.by == "rows" else _tokens(row)
            for each, share in shares.items():
                credit[each] += share * size
            credit[name] -= size
            self.drawn[name] += size
            self.given = number + 1
            if number % count == mine:
                yield row
            number += 1

    def _rows(self, name: str) -> Iterator[Any]:
        """All rows of a source in some order, again and again."""
        source, times = self.sources[name], 0
        while True:
            draw = torch.Generator().manual_seed(seed_of("mixture", self.seed, name, times))
            for i in torch.randperm(len(source), generator=draw).tolist():
                yield source[i]
            times += 1

    def _shares(self, weights: Mapping[str, float]) -> dict[str, float]:
        if weights.keys() != self.sources.keys():
            raise TersorError(
                f"weights are for {', '.join(weights)} and the mixture has "
                f"{', '.join(self.sources)}; give one for each"
            )
        total = sum(weights.values())
        if not all(0 <= weight < math.inf for weight in weights.values()) or not total > 0:
            raise TersorError(
                f"the weights are {dict(weights)}; give numbers of at least 0, not all of them 0"
            )
        return {name: float(weights[name]) / total for name in self.sources}


class FollowGap(TrainerCallback):
    """Gives more of a mixture to the sources in which the student is further from its teacher.

    Every so many steps each share is multiplied by e^(strength · gap), the gap being the KL from
    the teacher to the student on some rows of that source: dynamic batch loading (Xia et al.,
    arXiv:2310.06694, algorithm 1), whose reference loss is here the teacher's.

    mixture: that the Trainer is trained on. teacher: as given to the DistillTrainer.
    rows: source -> token ids int64 [count, length] to measure on, best none of those trained on.
    every: steps between changes, which come into force a step later.
    least: the part of its share at the beginning that a source keeps in any case.
    batch: rows per forward pass.

    Each change is in the log with what was measured. It is restored from there when a training is
    resumed, which then goes on with the very same rows.
    """

    def __init__(
        self,
        mixture: Mixture,
        teacher: nn.Module,
        rows: Mapping[str, Tensor],
        every: int = 100,
        strength: float = 1.0,
        least: float = 0.1,
        batch: int = 8,
    ) -> None:
        if rows.keys() != mixture.sources.keys():
            raise TersorError(
                f"there are rows to measure {', '.join(rows) or 'nothing'} on, and the mixture has "
                f"{', '.join(mixture.sources)}; give some for each"
            )
        for name, ids in rows.items():
            if ids.dim() != 2 or ids.dtype != torch.int64 or ids.shape[0] < 1 or ids.shape[1] < 2:
                raise TersorError(
                    f"the rows of {name} are {ids.dtype} {list(ids.shape)}; give token ids int64 "
                    "[count, length]"
                )
        if every < 1 or batch < 1:
            raise TersorError(f"every is {every} and batch {batch}; give at least 1")
        if not 0 <= strength < math.inf or not 0 <= least <= 1:
            raise TersorError(
                f"strength is {strength!r} and least {least!r}; give a strength of at least 0 and "
                "a part from 0 to 1"
            )
        self.mixture, self.teacher, self.rows = mixture, teacher, dict(rows)
        self.every, self.strength, self.least, self.batch = every, strength, least, batch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.dataloader_num_workers:
            raise TersorError(
                "workers have copies of the mixture, which do not hear of new shares; set "
                "dataloader_num_workers=0"
            )
        ours, theirs = (vocabulary_of(model) for model in (kwargs["model"], self.teacher))
        if ours != theirs:
            raise TersorError(
                f"the student's vocabulary has {ours} tokens and the teacher's {theirs}, and "
                "FollowGap compares all of them; bring one model to the size of the other, with "
                "resize_token_embeddings"
            )
        del self.mixture.changes[1:]
        self.mixture.given = 0
        for entry in state.log_history:
            if "mixture" in entry:
                self.mixture.reweigh(entry["mixture"]["shares"], entry["mixture"]["from_row"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step % self.every or step >= state.max_steps:
            return
        gaps = self.gaps(kwargs["model"])
        now, begun = self.mixture.weights, self.mixture.changes[0][1]
        largest = max(gaps.values())
        grown = {n: w * math.exp(self.strength * (gaps[n] - largest)) for n, w in now.items()}
        total = sum(grown.values())
        shares = {
            name: self.least * begun[name] + (1 - self.least) * grown[name] / total for name in now
        }
        # Batches are read ahead by one, so those of the next step are settled already.
        size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.mixture.reweigh(shares, (step + 1) * size)
        entry = {"from_row": (step + 1) * size, "shares": shares, "gaps": gaps}
        state.log_history.append({"step": step, "mixture": entry})

    @torch.no_grad()
    def gaps(self, student: nn.Module) -> dict[str, float]:
        """KL(teacher ‖ student) by source, the mean over the tokens of its rows."""
        training = student.training
        student.eval()
        try:
            return {name: self._gap(student, ids) for name, ids in self.rows.items()}
        finally:
            student.train(training)

    def _gap(self, student: nn.Module, ids: Tensor) -> float:
        total, device = 0.0, next(student.parameters()).device
        for part in ids.to(device).split(self.batch):
            ours, theirs = (
                model(input_ids=part).logits[:, :-1].flatten(0, 1)
                for model in (student, self.teacher)
            )
            mean = distill(ours, theirs.to(device), Distillation(alpha=1.0)).distillation
            total += float(mean) * len(part)
        return total / len(ids)


def _tokens(row: Any) -> int:
    if not isinstance(row, Mapping) or "input_ids" not in row:
        raise TersorError(
            "a row has no input_ids, by which shares of tokens are counted; give shares of rows "
            '(by="rows")'
        )
    mask = row.get("attention_mask")
    if mask is None:
        return len(row["input_ids"])
    return int(mask.sum()) if isinstance(mask, Tensor) else sum(mask)
