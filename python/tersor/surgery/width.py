"""The hidden width of a model: what hangs on its residual stream, and how wide it shall be, settled
before any work."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import TersorError
from tersor.models import Stream, config_value, parts_of
from tersor.source import Source
from tersor.surgery.smaller import channels_left, is_number, parameters, smaller_skeleton

UPDATES = ("least-squares", "none")  # of what reads the stream


@dataclass(frozen=True)
class Part:
    """How a parameter hangs on the residual stream.

    kind: "embeds" [tokens, d], "norm" [d], "reads" [n, d], or "writes" [d, k] ([d] of a bias).
    norm: path of the norm through which it reads, in the model."""

    kind: str
    norm: str = ""


@dataclass(frozen=True)
class Width:
    """`kept` of `count` channels of the residual stream stay.

    parts: of the model, by the parameter's name; what is not here stays as it is.
    norm, head: path of the last norm, and name of the head's weight. twins: the names of the head
        and the embeddings where they are one tensor.
    scale: a factor for the embeddings, for what the model itself multiplies them by.
    """

    stream: Stream
    count: int
    kept: int
    parts: dict[str, Part]
    norm: str
    head: str
    twins: tuple[str, ...]
    scale: float

    def config(self, source: Source) -> dict[str, Any]:
        """config.json of the narrower model."""
        config, before = copy.deepcopy(source.checkpoint.config), source.model.config
        config[self.stream.width] = self.kept
        heads = self.count // before.num_attention_heads
        config[self.stream.head_width] = config_value(before, self.stream.head_width) or heads
        if self.twins:  # the norm's weight goes into the head alone
            config["tie_word_embeddings"] = False
        return config

    def skeleton(self, source: Source) -> nn.Module:
        """The narrower model, as plain transformers makes it, on the meta device."""
        state = source.model.state_dict()
        shapes = {name: self._shape(name, tuple(state[name].shape)) for name in source.where}
        return smaller_skeleton(source, self.config(source), shapes)

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        part = self.parts.get(name)
        if part is None:
            return shape
        if part.kind in ("embeds", "reads"):
            return (shape[0], self.kept)
        return (self.kept, *shape[1:])


def settle_width(source: Source, hidden: float, multiple: int | None) -> Width:
    """hidden: the share to cut. multiple: of which the width that is left shall be one; None: as
    the model's, up to 128.

    Raises TersorError for a model whose residual stream cannot be rotated, where nothing would go
    or the model would not be smaller, and where transformers has no model of that width.
    """
    stream = _stream_of(source)
    if not is_number(hidden) or not 0 < hidden < 1:
        raise TersorError(f"hidden is a share between 0 and 1, such as 0.25, not {hidden}")
    count = config_value(source.model.config, stream.width)
    kept = channels_left("hidden", count, hidden, multiple)
    width = _width(source, stream, count, kept)
    try:
        small = width.skeleton(source)
    except TersorError as reason:
        raise TersorError(
            f"the hidden width cannot be cut to {kept} of {count} ({reason}); "
            f"{_other(source, stream, count, kept)}"
        ) from None
    before, after = parameters(source.model), parameters(small)
    if after >= before:
        raise TersorError(
            f"with {kept} of {count} channels the model would have {after} parameters, not less "
            f"than its {before}: its head is tied to the embeddings, and a rotated one cannot be; "
            "cut more, or cut heads, ffn or layers"
        )
    return width


def settle_slice(
    source: Source, *, hidden: float, multiple: int | None, update: str, damp: float
) -> Width:
    """What slice_checkpoint leaves of the width. TersorError for what it refuses by the model's
    configuration alone."""
    if update not in UPDATES:
        raise TersorError(f"update is {' or '.join(UPDATES)} for the hidden width, not {update!r}")
    if not is_number(damp) or not 0 < damp < 1:
        raise TersorError(f"damp must be between 0 and 1, not {damp!r}; 0.01 is usual")
    return settle_width(source, hidden, multiple)


def check_tokens(width: Width, windows: Tensor) -> None:
    """TersorError for a text, token ids int64 [samples, seq_len], too short to find as many
    directions in."""
    if windows.numel() < width.kept:
        raise TersorError(
            f"{windows.numel()} tokens cannot tell which {width.kept} directions matter; give more "
            "text (--samples, --seq-len)"
        )


def _stream_of(source: Source) -> Stream:
    """TersorError where there is none that can be rotated."""
    arch = source.found.arch
    if any(isinstance(m, nn.LayerNorm) for m in source.blocks[0].modules()):
        raise TersorError(
            f"the hidden width of {arch.name} cannot be cut: its blocks have LayerNorms, which "
            "take the mean off in the directions there are, so that a rotated model would need "
            "other code; use heads, ffn or layers"
        )
    if arch.stream is None:
        raise TersorError(
            f"the residual stream of this model is not known ({source.found.how}); cutting the "
            "hidden width needs a Stream in tersor.models"
        )
    if arch.stream.branch_norms:
        raise TersorError(
            f"the hidden width of {arch.name} cannot be cut: {arch.stream.branch_norms[0]} "
            "multiplies what is added to the residual stream channel by channel, so that a rotated "
            "model would need other code; use heads, ffn or layers"
        )
    return arch.stream


def _width(source: Source, stream: Stream, count: int, kept: int) -> Width:
    found, model = source.found, source.model
    if found.head is None:
        raise TersorError(
            f"{type(model).__name__} has no language model's head, so what reads its last norm is "
            "not known; give a model for causal language modelling"
        )
    final, head = found.prefix + stream.norm, f"{found.head}.weight"
    table = f"{found.prefix}{stream.embeddings}.weight"
    parts = {table: Part("embeds"), f"{final}.weight": Part("norm"), head: Part("reads", final)}
    for path, block in found.blocks(model):
        for norm, linears in stream.reads:
            (here,) = parts_of(found.arch, block, (norm,))
            parts[f"{path}.{here}.weight"] = Part("norm")
            for linear in parts_of(found.arch, block, linears):
                parts[f"{path}.{linear}.weight"] = Part("reads", f"{path}.{here}")
        for linear in parts_of(found.arch, block, stream.writes):
            parts[f"{path}.{linear}.weight"] = Part("writes")
            parts[f"{path}.{linear}.bias"] = Part("writes")
    parts = {name: part for name, part in parts.items() if name in source.where}
    before, after = found.outside(source.where)
    for name in (n for n in (*before, *after) if n not in parts and n != f"{found.head}.bias"):
        raise TersorError(
            f"{type(model).__name__} has {name}, of which it is not known what it reads or writes; "
            "only plain language models can be cut to another hidden width"
        )
    factors = [torch.tensor(n**0.5, dtype=source.dtype).item() for n in (count, kept)]
    tied = model.get_parameter(head) is model.get_parameter(table)
    return Width(
        stream=stream,
        count=count,
        kept=kept,
        parts=parts,
        norm=final,
        head=head,
        twins=(head, table) if tied else (),
        scale=factors[0] / factors[1] if stream.scaled else 1.0,
    )


def _other(source: Source, stream: Stream, count: int, kept: int) -> str:
    """What to do where transformers has no model of that width: the nearest ones that it has."""
    heads = source.model.config.num_attention_heads
    fits = []
    for near in (kept // heads * heads, (kept // heads + 1) * heads):
        if 0 < near < count:
            try:
                _width(source, stream, count, near).skeleton(source)
            except TersorError:
                continue
            fits.append(f"hidden={1 - near / count:.4g} by a multiple of {heads}")
    return f"what works is {' or '.join(fits)}" if fits else "use heads, ffn or layers"
