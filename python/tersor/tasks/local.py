"""Tasks made of Python source at hand, for machines that cannot download any: what comes next, and
what cannot? The same text gives the same tasks."""

from __future__ import annotations

import keyword
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tersor.errors import TersorError
from tersor.tasks.items import Item, Task

_LINES, _CHARACTERS = 7, 240  # of a context, at most
_APART = 3  # lines at least between items of a task
_FAR = 100  # lines between an item and text that has nothing to do with it
_INDENTS = (0, 4, 8, 12)
_NAME = re.compile(r"(?<![\w\"'])[A-Za-z]\w{2,}")


def local_tasks(source: str, count: int = 200, seed: int = 0) -> tuple[Task, ...]:
    """Four tasks of `count` items each, made of Python source.

    next_line: which of four lines comes next? The others are from elsewhere, with the same
        indentation and about as long.
    name: which of four names, all seen before and about as long, ends here?
    indent: where does the next line begin? Every indentation is right as often.
    order: which of two lines comes first? Both begin in the same column.

    So that nothing is gained without reading: by length, or by how common an answer is. Right
    answers are in every place as often as chance has it.
    Raises TersorError where the text does not give so many.
    """
    lines = _Lines([line.rstrip() for line in source.expandtabs().splitlines()])
    makers: dict[str, Callable[[_Lines, int, random.Random], Item | None]] = {
        "next_line": _next_line,
        "name": _name,
        "indent": _indent,
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
    # Of those with a few answers that are not equally common, as many of each.
    quota = {indent: -(-count // len(_INDENTS)) for indent in _INDENTS}
    made = 0
    for at in places:
        if made == count:
            return
        if used.isdisjoint(range(at - _APART, at + _APART + 1)):
            if name == "indent" and not quota.get(lines.indent(at)):
                continue
            if (item := make(lines, at, draw)) is not None:
                quota[lines.indent(at)] = quota.get(lines.indent(at), 0) - 1
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


def _telling(line: str) -> bool:
    """Whether a line has something to say."""
    return 8 <= len(line.strip()) <= 60


def _next_line(lines: _Lines, at: int, draw: random.Random) -> Item | None:
    line, context = lines.lines[at], lines.context(at)
    if context is None or not _telling(line):
        return None
    wrong: list[str] = []
    for _ in range(400):
        other = draw.randrange(len(lines.lines))
        text = lines.lines[other]
        if (
            abs(other - at) > _FAR
            and _telling(text)
            and lines.indent(other) == lines.indent(at)
            and abs(len(text) - len(line)) <= 4
            and text not in (line, *wrong)
            and text.strip() not in context
        ):
            wrong.append(text)
            if len(wrong) == 3:
                return _shuffled(context, line, wrong, draw)
    return None


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
    return _shuffled(context, right, draw.sample(others, 3), draw)


def _indent(lines: _Lines, at: int, draw: random.Random) -> Item | None:
    context, text = lines.context(at), lines.lines[at].strip()
    if context is None or len(text) < 4 or lines.indent(at) not in _INDENTS:
        return None
    right = lines.lines[at]
    wrong = [" " * indent + text for indent in _INDENTS if indent != lines.indent(at)]
    return _shuffled(context, right, wrong, draw)


def _order(lines: _Lines, at: int, draw: random.Random) -> Item | None:
    if at + 1 >= len(lines.lines):
        return None
    one, two = lines.lines[at], lines.lines[at + 1]
    context, level = lines.context(at), lines.indent(at) == lines.indent(at + 1)
    if context is None or not level or one == two or not (_telling(one) and _telling(two)):
        return None
    return _shuffled(context, f"{one}\n{two}", [f"{two}\n{one}"], draw)
