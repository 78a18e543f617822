"""Attention maps, the student's made like the teacher's: where each token looks (TinyBERT, Jiao et
al., arXiv:1909.10351; MobileBERT, Sun et al., arXiv:2004.02984).

Kernels that never make the maps cannot give them, so both models must attend in the plain way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.training.losses import working

KINDS = ("kl", "mse")
# What configurations call the dropout of attention maps, which are given after it.
_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")


def attention_loss(
    student: Tensor,
    teacher: Tensor,
    real: Tensor,
    kind: str = "kl",
    heads: Mapping[int, int] | None = None,
) -> Tensor:
    """How far the student's maps are from the teacher's, a scalar in float32 (float64 for float64).

    student, teacher: probabilities [batch, heads, length, length], a row for each token that looks.
    real: bool [batch, length]; rows of padding are left out.
    kind: "kl", KL(teacher ‖ student), the mean over rows and heads (MobileBERT); or "mse", the mean
        of squares over the places at which one of the two looks at all, so that what a mask hides
        does not count.
    heads: head of the student -> head of the teacher; None: one by one, or the mean over heads of
        each where their numbers differ.
    """
    q, p = working(student), working(teacher).to(working(student))
    if heads is not None:
        q, p = q[:, list(heads.keys())], p[:, list(heads.values())]
    elif q.shape[1] != p.shape[1]:
        q, p = q.mean(1, keepdim=True), p.mean(1, keepdim=True)
    q, p = q.transpose(1, 2)[real], p.transpose(1, 2)[real]  # [tokens, heads, length]
    if kind == "mse":
        seen = (p > 0) | (q > 0)
        return (p - q).square().sum() / seen.sum()
    log_q = q.clamp_min(torch.finfo(q.dtype).tiny).log()
    return (torch.xlogy(p, p) - p * log_q + (q - p)).sum(-1).mean()


@contextmanager
def maps_of(model: nn.Module, into: dict[str, Tensor]) -> Iterator[None]:
    """While it lasts, every forward pass leaves its maps in `into` as attention_0, attention_1 ...,
    and not in its outputs, where a Trainer would take them for predictions."""

    def ask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"output_attentions": True}

    def take(_: nn.Module, __: Any, outputs: Any) -> Any:
        maps = getattr(outputs, "attentions", None)
        if not maps or any(each is None for each in maps):
            raise TersorError(
                f"{type(model).__name__} gives no attention maps; compare hidden states instead"
            )
        into.update({f"attention_{i}": each for i, each in enumerate(maps)})
        return type(outputs)(**{k: v for k, v in outputs.items() if k != "attentions"})

    handles = [
        model.register_forward_pre_hook(ask, with_kwargs=True),
        model.register_forward_hook(take),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_maps(student: nn.Module, teacher: nn.Module, heads: Mapping[int, int] | None) -> None:
    """TersorError where a model makes no maps, or lacks a head that is named, and where a student's
    maps would be read with holes of dropout in them."""
    for whose, model, named in (
        ("student", student, heads.keys() if heads else ()),
        ("teacher", teacher, heads.values() if heads else ()),
    ):
        config: Any = model.config
        how = getattr(config, "_attn_implementation", None)
        if how != "eager":
            raise TersorError(
                f"the {whose} attends with {how!r}, which makes no attention maps; load it with "
                'attn_implementation="eager", or model.set_attn_implementation("eager")'
            )
        count = int(config.num_attention_heads)
        wrong = [head for head in named if not 0 <= head < count]
        if wrong:
            raise TersorError(
                f"attention_heads names the {whose}'s head {wrong[0]} of {count}, counted from 0"
            )
    for name in _DROPOUTS:
        share = getattr(student.config, name, None)
        if share:
            raise TersorError(
                f"the student's attention maps have {name}={share} of dropout in training, and "
                "would not be what it computes; set it to 0 before the model is made"
            )
    if heads is not None and not heads:
        raise TersorError("attention_heads is empty; give pairs such as {0: 0}, or None")
