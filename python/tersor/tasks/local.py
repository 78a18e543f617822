"""Tasks made of Python source at hand, for machines that cannot download any: what comes next, and
what cannot? The same text gives the same tasks."""

from __future__ import annotations

import itertools
import keyword
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tersor.errors import TersorError
from tersor.tasks.items import Item, Task

_LINES, _CHARACTERS = 7, 240  # of a context, at most
_APART = 3  # lines at least between items of a task
_INDENTS = (0, 4, 8, 12)
_BRACKETS = (")", "]", "}")
_NAME = re.compile(r"(?<![\w\"'])[A-Za-z]\w{2,}")


def local_tasks(source: str, count: int = 100, seed: int = 0) -> tuple[Task, ...]:
    """Four tasks of `count` items each, made of Python source.

    name: which of four names ends this line? All were seen before, about as often, and are about
        as long; but whoever always names the commonest is right more often than by chance.
    indent: where does the next line begin? Every indentation is right as often.
    bracket: which bracket comes next? Every closing one is right as often.
    order: which line has its words in their places? In the others, two have changed theirs.

    Right answers are in every place as often as chance has it.
    Raises TersorError where the text does not give so many.
    """
    lines = _Lines([line.rstrip() for line in source.expandtabs().splitlines()])
    makers: dict[str, Callable[[_Lines, int, random.Random], Item | None]] = {
        "name": _name,
        "indent": _indent,
        "bracket": _bracket,
        "order": _order,
    }
    return tuple(
        Task(f"python_{name}", tuple(_items(lines, make, name, count, seed)))
        for name, make in makers.items()
    )


@dataclass(frozen=True)
class _Lines:
    lines: list[str]

    def context(self, at: int) -> str | None:
        """The lines before a line, from one that is not blank; None where there are too few."""
        first, size = at, 0
        while first > 0 and at - first < _LINES and size + len(self.lines[first - 1]) < _CHARACTERS:
            first -= 1
            size += len(self.lines[first]) + 1
        while first < at and not self.lines[first]:
            first += 1
        kept = self.lines[first:at]
        return "\n".join(kept) + "\n" if sum(map(bool, kept)) >= 3 else None

    def indent(self, at: int) -> int:
        line = self.lines[at]
        return len(line) - len(line.lstrip())


def _items(
    lines: _Lines,
    make: Callable[[_Lines, int, random.Random], Item | None],
    name: str,
    count: int,
    seed: int,
) -> Iterator[Item]:
    draw = random.Random(f"{seed} {name}")
    places = list(range(len(lines.lines)))
    draw.shuffle(places)
    used: set[int] = set()
    # Where there are a few answers, all that are not equally common: as many of each.
    answers = {"indent": len(_INDENTS), "bracket": len(_BRACKETS)}.get(name)
    quota: dict[str, int] = {}
    made = 0
    for at in places:
        if made == count:
            return
        if not used.isdisjoint(range(at - _APART, at + _APART + 1)):
            continue
        if (item := make(lines, at, draw)) is None:
            continue
        if answers is not None:
            right = item.choices[item.answer]
            kind = right if name == "bracket" else str(lines.indent(at))
            quota[kind] = quota.get(kind, 0) + 1
            if quota[kind] > -(-count // answers):
                continue
        used.add(at)
        made += 1
        yield item
    if made < count:
        raise TersorError(
            f"the text gives {made} items of {name}, not {count}; give more Python source, or ask "
            "for fewer"
        )


def _shuffled(context: str, right: str, wrong: list[str], draw: random.Random) -> Item:
    choices = [right, *wrong]
    draw.shuffle(choices)
    return Item(context, tuple(choices), choices.index(right))


def _name(lines: _Lines, at: int, draw: random.Random) -> Item | None:
    line, before = lines.lines[at], lines.context(at)
    names = [found for found in _NAME.finditer(line) if not keyword.iskeyword(found.group())]
    if before is None or not names or line.lstrip().startswith("#"):
        return None
    right, context = names[-1].group(), before + line[: names[-1].start()]
    seen = {found.group() for found in _NAME.finditer(context)}
    others = sorted(
        name
        for name in seen - {right}
        if not keyword.iskeyword(name) and abs(len(name) - len(right)) <= 2
    )
    if right not in seen or len(others) < 3:
        return None
    draw.shuffle(others)
    others.sort(key=lambda name: abs(context.count(name) - context.count(right)))
    return _shuffled(context, right, others[:3], draw)


def _indent(lines: _Lines, at: int, draw: random.Random) -> Item | None:
    context, text = lines.context(at), lines.lines[at].strip()
    if context is None or len(text) < 4 or lines.indent(at) not in _INDENTS:
        return None
    right = lines.lines[at]
    wrong = [" " * indent + text for indent in _INDENTS if indent != lines.indent(at)]
    return _shuffled(context, right, wrong, draw)


def _bracket(lines: _Lines, at: int, draw: random.Random) -> Item | None:
    line, before = lines.lines[at], lines.context(at)
    # Behind a word: tokenizers join brackets to each other and to quotes.
    places = [m.end() - 1 for m in re.finditer(r"\w[)\]}]", line)]
    if before is None or not places:
        return None
    place = draw.choice(places)
    wrong = [bracket for bracket in _BRACKETS if bracket != line[place]]
    return _shuffled(before + line[:place], line[place], wrong, draw)


def _order(lines: _Lines, at: int, draw: random.Random) -> Item | None:
    line, context = lines.lines[at], lines.context(at)
    words = list(re.finditer(r"[A-Za-z]\w*", line))
    if context is None or not 4 <= len(words) <= 12 or line.lstrip().startswith("#"):
        return None
    wrong: set[str] = set()
    for one, two in itertools.combinations(words, 2):
        between = line[one.end() : two.start()]
        wrong.add(line[: one.start()] + two.group() + between + one.group() + line[two.end() :])
    found = sorted(wrong - {line})
    return _shuffled(context, line, draw.sample(found, 3), draw) if len(found) >= 3 else None
