"""What a student's layers hold, made like what the teacher's hold: hidden states, relations between
values, attention maps, the embedding.

Read with hooks on the very modules that are compared, for one forward pass; nothing else is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.models import find_arch
from tersor.training.attention import KINDS, attention_loss, check_maps, maps_of
from tersor.training.losses import working

_VALUES = ("v_proj", "value", "v_lin")  # what modules are called that make values alone


@dataclass(frozen=True)
class Features:
    """What is compared, and with what weight beside the loss of the predictions; 0: not at all.

    layers: block of the student -> block of the teacher, from 0; None: evenly, the last to the last
        (see even_layers).
    hidden: weight of the blocks' outputs, averaged over the pairs of `layers`.
    kind: how outputs are compared: "mse", the mean of squares over features (FitNets, Romero et
        al., arXiv:1412.6550), or "cosine", 1 - cos (DistilBERT, Sanh et al., arXiv:1910.01108).
    embedding: weight of the embedding's output, compared likewise.
    values: weight of the relations between values in the last pair of `layers` (MiniLM, Wang et
        al., arXiv:2002.10957): see relation_loss.
    heads: of the relations, dividing both models' widths of values (MiniLMv2, arXiv:2012.15828);
        None: as many as the student has heads of values.
    attention: weight of the attention maps of the blocks' queries, averaged over the pairs of
        `layers`; both models must be loaded with attn_implementation="eager".
    attention_kind: "kl" or "mse", see attention_loss.
    attention_heads: head of the student -> head of the teacher, in every block; None: one by one,
        or where their numbers differ the mean over the heads of each.
    """

    layers: Mapping[int, int] | None = None
    hidden: float = 0.0
    kind: str = "mse"
    embedding: float = 0.0
    values: float = 0.0
    heads: int | None = None
    attention: float = 0.0
    attention_kind: str = "kl"
    attention_heads: Mapping[int, int] | None = None

    def __post_init__(self) -> None:
        names = ("hidden", "embedding", "values", "attention")
        for name in names:
            if not getattr(self, name) >= 0:
                raise TersorError(f"the weight {name} is {getattr(self, name)!r}; give at least 0")
        if not any(getattr(self, name) for name in names):
            raise TersorError(
                "no feature has a weight; give one to hidden, embedding, values or attention, or "
                "no Features"
            )
        if self.attention_kind not in KINDS:
            raise TersorError(
                f"there is no attention_kind {self.attention_kind!r}; choose {' or '.join(KINDS)}"
            )
        if self.kind not in ("mse", "cosine"):
            raise TersorError(f"there is no kind {self.kind!r}; choose mse or cosine")
        if self.heads is not None and self.heads < 1:
            raise TersorError(f"heads is {self.heads}; give at least 1")
        for name, of, counts in (
            ("layers", "hidden, values or attention", self.hidden or self.values or self.attention),
            ("kind", "hidden or embedding", self.hidden or self.embedding),
            ("heads", "values", self.values),
            ("attention_kind", "attention", self.attention),
            ("attention_heads", "attention", self.attention),
        ):
            if not counts and getattr(self, name) != getattr(Features, name):
                raise TersorError(f"{name} changes nothing without a weight for {of}; leave it out")


def even_layers(student: int, teacher: int) -> dict[int, int]:
    """For so many blocks each, the last of equal stretches of the teacher for every block."""
    return {i: max(0, (i + 1) * teacher // student - 1) for i in range(student)}


def hidden_loss(student: Tensor, teacher: Tensor, real: Tensor, kind: str = "mse") -> Tensor:
    """The mean over real tokens of one comparison, a scalar in float32 (float64 for float64).

    student, teacher: [batch, length, features]. real: bool [batch, length], no padding.
    """
    s, t = working(student[real]), working(teacher[real])
    t = t.to(s)
    if kind == "mse":
        return (s - t).square().mean()
    return (1 - F.cosine_similarity(s, t, dim=-1)).mean()


def relation_loss(student: Tensor, teacher: Tensor, real: Tensor, heads: int) -> Tensor:
    """KL(R(teacher) ‖ R(student)), the mean over heads and real tokens, a scalar.

    R(V) = softmax(V_h V_hᵀ / √d) over the real tokens, for each of `heads` pieces V_h [length, d]
    of the values (Wang et al., arXiv:2002.10957, equations 8 to 10). So widths may differ.

    student, teacher: [batch, length, width]. real: bool [batch, length].
    """
    total = student.new_zeros((), dtype=working(student[:0]).dtype)
    for s, t, kept in zip(student, teacher, real, strict=True):  # one row's square at a time
        log_q, log_p = (_relations(values[kept], heads) for values in (s, t))
        log_p = log_p.to(log_q)
        p = log_p.exp()
        total = total + (p * (log_p - log_q) + (log_q.exp() - p)).sum()
    return total / (heads * real.sum())


def _relations(values: Tensor, heads: int) -> Tensor:
    """Logarithms of R, [heads, length, length]."""
    split = working(values).unflatten(-1, (heads, -1)).transpose(0, 1)
    return (split @ split.transpose(1, 2) / split.shape[-1] ** 0.5).log_softmax(-1)


class FeatureLoss(nn.Module):
    """The weighted sum of what Features asks for, between two models.

    It owns a projection without bias, [teacher's width, student's width], for each pair whose
    widths differ; they are trained with the student and not part of it.

    Raises TersorError, before anything runs, for layers that there are not, and for values that no
    module makes alone or whose width the heads do not divide.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, features: Features) -> None:
        super().__init__()
        self.features = features
        ours, theirs = (_blocks(model) for model in (student, teacher))
        layers = features.layers
        self.layers = dict(even_layers(len(ours), len(theirs)) if layers is None else layers)
        for whose, numbers, count in (
            ("student", self.layers.keys(), len(ours)),
            ("teacher", self.layers.values(), len(theirs)),
        ):
            wrong = [number for number in numbers if not 0 <= number < count]
            if wrong or not numbers:
                raise TersorError(
                    f"layers names the {whose}'s block {wrong[0]} of {count}, counted from 0"
                    if wrong
                    else "layers is empty; give pairs such as {0: 1}, or None for even ones"
                )
        self.pairs: dict[str, tuple[str, str]] = {}  # what -> paths in student and teacher
        if features.hidden:
            for i, j in self.layers.items():
                self.pairs[f"hidden_{i}"] = ours[i], theirs[j]
        if features.embedding:
            self.pairs["embedding"] = _embedding(student), _embedding(teacher)
        widths = [_width(model) for model in (student, teacher)]
        self.projections = nn.ModuleDict()
        if widths[0] != widths[1]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                for what in self.pairs:
                    self.projections[what] = nn.Linear(*widths, bias=False)
        self.heads = 0
        if features.values:
            last = max(self.layers)
            paths = _values(student, ours[last]), _values(teacher, theirs[self.layers[last]])
            self.pairs["values"] = paths
            self.heads = features.heads or _value_heads(student)
            for model, path in zip((student, teacher), paths, strict=True):
                width = model.get_submodule(path).out_features
                if width % self.heads:
                    raise TersorError(
                        f"{self.heads} heads do not divide the {width} features of {path}; give "
                        "heads that divide the values of student and teacher"
                    )
        if features.attention:
            check_maps(student, teacher, features.attention_heads)

    @contextmanager
    def recorded(self, model: nn.Module, side: int) -> Iterator[dict[str, Tensor]]:
        """Keeps what the model (side 0: student, 1: teacher) computes at the paths of the pairs."""
        paths = {pair[side] for pair in self.pairs.values()}
        with ExitStack() as stack:
            found = stack.enter_context(recording(model, paths))
            if self.features.attention:
                stack.enter_context(maps_of(model, found))
            yield found

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], real: Tensor
    ) -> Tensor:
        """The weighted sum, of what was recorded of both; the teacher gets no gradient.
        real: bool [batch, length], where there is no padding."""
        if not real.any():
            raise TersorError("no token is real: the attention mask is all zeros; leave it out")
        features = self.features
        count = sum(what.startswith("hidden") for what in self.pairs)
        losses = []
        for what, (ours, theirs) in self.pairs.items():
            s, t = student[ours], teacher[theirs].detach()
            if what == "values":
                losses.append(features.values * relation_loss(s, t, real, self.heads))
                continue
            if what in self.projections:
                projection = self.projections[what]
                s = projection(s.to(projection.weight.dtype))
            weight = features.embedding if what == "embedding" else features.hidden / count
            losses.append(weight * hidden_loss(s, t, real, features.kind))
        for i, j in self.layers.items() if features.attention else ():
            maps = student[f"attention_{i}"], teacher[f"attention_{j}"].detach()
            loss = attention_loss(*maps, real, features.attention_kind, features.attention_heads)
            losses.append(features.attention / len(self.layers) * loss)
        return torch.stack(losses).sum()


@contextmanager
def recording(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Path -> the output of that module in the last forward pass inside the block."""
    found: dict[str, Tensor] = {}
    with ExitStack() as undo:
        for path in paths:

            def keep(_: nn.Module, given: Any, output: Any, path: str = path) -> None:
                found[path] = output if isinstance(output, Tensor) else output[0]

            undo.callback(model.get_submodule(path).register_forward_hook(keep).remove)
        yield found


def _blocks(model: nn.Module) -> list[str]:
    return [path for path, _ in find_arch(model).blocks(model)]


def _width(model: nn.Module) -> int:
    return int(model.get_submodule(_embedding(model)).weight.shape[1])


def _embedding(model: nn.Module) -> str:
    module = model.get_input_embeddings()
    return next(path for path, other in model.named_modules() if other is module)


def _values(model: nn.Module, block: str) -> str:
    for path, module in model.get_submodule(block).named_modules():
        if path.rpartition(".")[2] in _VALUES and hasattr(module, "out_features"):
            return f"{block}.{path}"
    raise TersorError(
        f"no module of {type(model).__name__} makes values alone (they come with queries and keys "
        "from one linear); compare hidden states instead"
    )


def _value_heads(model: nn.Module) -> int:
    config = model.config
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
