"""Token pruning: a long prompt loses its least attended tokens on its way through the layers.

After chosen layers the tokens that got the least attention there leave the hidden states (FastV,
arXiv:2403.06764; LazyLLM, arXiv:2407.14057): all later layers have less to compute, and their
caches less to keep. What stays keeps its position, so that every later layer computes exactly what
it would if the tokens that went were masked for it. Causal models are pruned while they read a
prompt into an empty cache, and decode with the shorter cache; encoders in every call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from tersor.errors import TersorError
from tersor.tokens.report import TokenReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TokenReport", "prune_tokens"]


@contextmanager
def prune_tokens(
    model: PreTrainedModel,
    shares: Mapping[int, float],
    *,
    merge: bool = False,
    keep_first: int = 4,
    keep_last: int | None = None,
    min_tokens: int = 256,
) -> Iterator[TokenReport]:
    """Prunes the tokens of all that the model reads inside the `with` block.

        with tersor.prune_tokens(model, {8: 0.5, 16: 0.5}) as report:
            model.generate(...)   # half of the tokens go after layer 8, half of the rest after 16

    A token's score is the attention that it receives in that very layer, averaged over heads and
    over queries: the last `keep_last` tokens' in a causal model, everyone's in an encoder. A layer
    with a sliding window sees nothing beyond it, and its oldest tokens go first: choose layers with
    full attention where there are some.

    model: of transformers, causal or encoder, in evaluation mode, its linears quantized or not,
        with attention "sdpa" or "eager".
    shares: layer, counted from 0 -> the share of the tokens there, above 0 and below 1, that leave
        after it. Not the last layer: nothing comes after it.
    merge: a token that leaves is averaged into the most similar one that stays (ToMe,
        arXiv:2210.09461) instead of dropped; see tersor.tokens.choice.merge.
    keep_first, keep_last: so many tokens of a row stay whatever their score: attention sinks
        (arXiv:2309.17453) or [CLS], and the end of the prompt. keep_last is 32 by default in a
        causal model, where it is at least 1, and 0 in an encoder.
    min_tokens: shorter inputs are not pruned.

    All rows of a batch keep the same number of tokens, each its own; padding goes first.
    Outputs keep their shape. In a causal model the places of the tokens that went hold NaN, for
    there are no logits of theirs; `generate` needs the last token's only. In an encoder they hold
    the state in which a token went, or that of the token which it was merged into.
    A cache made inside the block must not be used outside. One thread at a time.

    Raises TersorError, before the model runs, for a model, layers, shares or counts that cannot be
    served, for a prompt that is too short for keep_first and keep_last, for any cache but a
    DynamicCache, for labels of a causal model (NaN has no loss), and for nested use.
    """
    _check_transformers()
    from tersor.tokens.checks import TokenSettings
    from tersor.tokens.run import Run

    settings = TokenSettings(shares, merge, keep_first, keep_last, min_tokens)
    run = Run(model, settings)
    with run.attached():
        yield run.report


def _check_transformers() -> None:
    """Before an import that would fail."""
    found = version("transformers")
    if int(found.partition(".")[0]) < 5:
        raise TersorError(
            "token pruning needs transformers 5 or newer, where all attention goes through one "
            f"interface, not {found}; upgrade it"
        )
