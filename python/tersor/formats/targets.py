"""Which modules a name in quantization_config means.

A target is an exact module name, a class name, or "re:" and a regular expression that must match
from the beginning of the module name. The expressions come from a file that a stranger may have
written, and one that backtracks without end would hang the reader: they run under a time limit, in
the `regex` package, which has one where the standard library has none.
"""

from __future__ import annotations

from collections.abc import Iterable

import regex

from tersor.errors import TersorError

LONGEST_PATTERN = 1000
SECONDS_PER_MATCH = 0.5


class Targets:
    """A list of targets that answers which of them, if any, means a module."""

    def __init__(self, targets: Iterable[str]) -> None:
        ordered = sorted(set(targets))
        self.names = {target for target in ordered if not target.startswith("re:")}
        self.patterns = {
            target: _compile(target.removeprefix("re:"))
            for target in ordered
            if target.startswith("re:")
        }

    def match(self, name: str, module_class: str) -> str | None:
        """The target that means the module, the most specific first: its name, then an expression
        (in alphabetical order where several match), then its class. It is the order of
        compressed-tensors."""
        if name in self.names:
            return name
        for target, pattern in self.patterns.items():
            if _matches(pattern, name):
                return target
        return module_class if module_class in self.names else None


def _compile(pattern: str) -> regex.Pattern[str]:
    if len(pattern) > LONGEST_PATTERN:
        raise TersorError(
            f"a target expression in quantization_config has {len(pattern)} characters, more than "
            f"{LONGEST_PATTERN}; shorten it or list the module names"
        )
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise TersorError(
            f"target {_shown(pattern)} in quantization_config is no usable expression ({error}); "
            f"correct it in config.json"
        ) from error


def _shown(pattern: str) -> str:
    return repr("re:" + (pattern if len(pattern) < 80 else pattern[:77] + "..."))


def _matches(pattern: regex.Pattern[str], name: str) -> bool:
    try:
        return pattern.match(name, timeout=SECONDS_PER_MATCH) is not None
    except TimeoutError as error:
        raise TersorError(
            f"target {_shown(pattern.pattern)} in quantization_config took more than "
            f"{SECONDS_PER_MATCH} s on the name {name!r}; simplify it in config.json"
        ) from error
