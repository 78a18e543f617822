"""The seam at attention: where every layer's queries and keys pass, after all that an architecture
does to them, and where its mask can still be changed.

transformers looks the attention function up by the name in a model's configuration. While tokens
are pruned that is the name of a function that does the same, but first shows what it was given to
the block's watcher, which answers with the mask to use.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

# (query, key, mask, eager, further arguments of the attention) -> the mask to use
Watcher = Callable[[Tensor, Tensor, "Tensor | None", bool, dict[str, Any]], "Tensor | None"]

# Attention implementation -> the name of the one with the seam around it.
SEAMS = {"sdpa": "tersor_tokens_sdpa", "eager": "tersor_tokens_eager"}
_WATCHERS: dict[nn.Module, Watcher] = {}  # of modules in the blocks of models being pruned


@contextmanager
def switched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """With the attention of these modules going through the seam."""
    with ExitStack() as undo:
        for config in _configs(modules):
            undo.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = SEAMS[config._attn_implementation]
        yield


@contextmanager
def watched(block: nn.Module, watcher: Watcher) -> Iterator[None]:
    """With a watcher at all attention in a block."""
    modules = list(block.modules())
    _WATCHERS.update(dict.fromkeys(modules, watcher))
    try:
        yield
    finally:
        for module in modules:
            del _WATCHERS[module]


def _attend(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **given: Any,
) -> Any:
    """An attention function of transformers with the seam around it."""
    eager = implementation == "eager"
    if module in _WATCHERS:
        attention_mask = _WATCHERS[module](query, key, attention_mask, eager, given)
    if eager:  # each architecture's own
        plain = sys.modules[type(module).__module__].eager_attention_forward
    else:
        plain = AttentionInterface()[implementation]
    return plain(module, query, key, value, attention_mask, **given)


def _configs(modules: Iterable[nn.Module]) -> list[Any]:
    """The configuration objects from which these modules, and those in them, read how to attend."""
    found = {}
    for module in (inner for outer in modules for inner in outer.modules()):
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) in SEAMS:
            found[id(config)] = config
    return list(found.values())


for _plain, _name in SEAMS.items():
    AttentionInterface.register(_name, functools.partial(_attend, _plain))
    AttentionMaskInterface.register(_name, AttentionMaskInterface()[_plain])
