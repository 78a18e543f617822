"""The plots of a recipe's page, as SVG that stands inside HTML.

Everything is drawn through matplotlib's objects, in a style of our own whatever the user's is, and
text stays text. The same figures give the same bytes.
"""

from __future__ import annotations

import io
import itertools
import math
import unicodedata
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

WIDE, HALF = 8.8, 4.4  # inches; the page scales them to its columns
SERIES = ("#14607a", "#d1603d", "#5b8c3e", "#8a5a9e", "#b8860b", "#4d4d4d")
KINDS = (
    *("#14506b", "#2f88a3", "#79bcc4", "#b9d8b0"),
    *("#ecc76b", "#ee9f5b", "#d4633f", "#94384f"),
)
GREY, PALE, INK = "#8a8f94", "#dfe3e6", "#22272b"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tersor",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "text.color": INK,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebed",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_LONGEST = 30  # characters of a name beside a plot


@dataclass(frozen=True)
class Bars:
    """One panel of horizontal bars: a value for each name, None where it is not known, and how
    a value is written."""

    title: str
    values: Sequence[float | None]
    written: Callable[[float], str]


@dataclass(frozen=True)
class Dots:
    """One panel of dots: for each text a (mean, standard error) for each name, or None."""

    title: str
    values: Mapping[str, Sequence[tuple[float, float] | None]]
    digits: int


def render(identity: str, draw: Callable[..., Figure], *args: Any, **kwargs: Any) -> str:
    """The figure that draw(*args, **kwargs) makes, as an <svg> element for HTML.

    identity: a prefix for the ids in it, since those of a page must differ.
    """
    with warnings.catch_warnings(), matplotlib.style.context(["default", _STYLE]):
        # Our fonts measure the text, the browser's draw it: a character missing here is none there.
        warnings.filterwarnings("ignore", message=r"(?s).*Glyph .* missing from")
        figure = draw(*args, **kwargs)
        written = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None, "Creator": None})
    return _inline(written.getvalue(), identity)


def _inline(svg: bytes, identity: str) -> str:
    """An SVG document as an element of HTML: no namespaces, no metadata, no style for the whole
    page, no size but the proportions, and ids of its own."""
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            if name == "id":
                value = f"{identity}-{value}"
            elif name.endswith("href") and value.startswith("#"):
                value = f"#{identity}-{value[1:]}"
            value = value.replace("url(#", f"url(#{identity}-")
            element.set(name.rpartition("}")[2], value)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "presentation")  # what it shows is said by the figure around it
    return ET.tostring(root, encoding="unicode", short_empty_elements=False)


def shortened(name: str, most: int = _LONGEST) -> str:
    """A name with its middle left out where it is long.

    >>> shortened("a-very-long-name", 9)
    'a-ve…name'
    """
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}…{name[len(name) - tail :]}"


def power(value: float) -> str:
    """A number with one digit of its own and a power of ten.

    >>> power(0.00213), power(0.001), power(250.0), power(0.0)
    ('2.1·10⁻³', '10⁻³', '2.5·10²', '0')
    """
    if value <= 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    mantissa, exponent = f"{value:.1e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if mantissa == "1.0" else f"{mantissa}·10{raised}"


# --- by stage ------------------------------------------------------------------------------------


def bars(names: Sequence[str], panels: Sequence[Bars], width: float) -> Figure:
    """A row for each name; the panels side by side, in rows of four at most."""
    figure, grid, middles = _panels(names, len(panels), width)
    for axes, panel in zip(grid, panels, strict=True):
        placed = zip(middles, panel.values, strict=True)
        known = [(row, value) for row, value in placed if value is not None]
        top = max((value for _, value in known), default=0.0)
        axes.barh([row for row, _ in known], [value for _, value in known], 0.62, color=SERIES[0])
        for row, value in known:
            axes.annotate(panel.written(value), (value, row), (3, 0), **_BESIDE)
        axes.set_title(panel.title)
        # Room for the number behind the longest bar.
        axes.set_xlim(0, (top or 1) * (1.15, 1.3, 1.45, 1.65)[min(len(panels), 4) - 1])
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
    return figure


def dots(names: Sequence[str], panels: Sequence[Dots], width: float) -> Figure:
    """Means with ± one standard error; texts by colour and shape. Axes are logarithmic where the
    values differ much, and say so."""
    texts = list(dict.fromkeys(text for panel in panels for text in panel.values))
    # The texts of each row, one below the other.
    inside = [
        [text for text in texts if any(text in p.values and p.values[text][place] for p in panels)]
        for place in range(len(names))
    ]
    figure, grid, middles = _panels(
        names, len(panels), width, [max(1.0, 0.7 * len(row)) for row in inside]
    )
    for axes, panel in zip(grid, panels, strict=True):
        means = [each[0] for row in panel.values.values() for each in row if each is not None]
        logarithmic = min(means) > 0 and max(means) > 8 * min(means)
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        for text, row in panel.values.items():
            look, at = texts.index(text) % 6, []
            for place, each in enumerate(row):
                if each is not None:
                    rank = inside[place].index(text) - (len(inside[place]) - 1) / 2
                    at.append((middles[place] + 0.5 * rank, *each))
            errors = [error if math.isfinite(error) else 0.0 for _, _, error in at]
            axes.errorbar(
                [mean for _, mean, _ in at],
                [y for y, _, _ in at],
                xerr=errors,
                fmt="osD^vP"[look],
                color=SERIES[look],
                markersize=5,
                capsize=2.5,
                elinewidth=1.1,
                label=shortened(text),
            )
            for (y, mean, _), error in zip(at, errors, strict=True):
                axes.annotate(f"{mean:.{panel.digits}f}", (mean + error, y), (6, 0), **_BESIDE)
        axes.set_title(panel.title + (" (logarithmic)" if logarithmic else ""))
        _give_room(axes, means, logarithmic)
    if len(texts) > 1:
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(texts)))
    return figure


_BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center_baseline", "fontsize": 8}


def _panels(
    names: Sequence[str], count: int, width: float, heights: Sequence[float] | None = None
) -> tuple[Figure, list[Any], list[float]]:
    """Axes side by side, four at most in a row, that share a vertical axis of names; and where on
    it each name is."""
    heights = heights or [1.0] * len(names)
    ends = list(itertools.accumulate(heights))
    middles = [end - height / 2 for end, height in zip(ends, heights, strict=True)]
    lines = -(-count // 4)
    height = 0.55 + 0.27 * max(2.0, ends[-1])
    figure = Figure(figsize=(width, lines * height + 0.1), layout="constrained")
    grid: Any = figure.subplots(lines, -(-count // lines), sharey=True, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.set_visible(False)
    for axes in grid[:count]:
        axes.grid(visible=False, axis="y")
    grid[0].set_yticks(middles, [shortened(name) for name in names])
    grid[0].set_ylim(ends[-1] + 0.1, -0.1)
    return figure, list(grid[:count]), middles


def _give_room(axes: Any, means: Sequence[float], logarithmic: bool) -> None:
    """Space on the right for the number beside the last dot."""
    low, high = axes.get_xlim()
    if logarithmic:
        axes.set_xlim(low, high * (high / low) ** 0.35)
    else:
        low = 0.0 if min(means) >= 0 and min(means) < 0.5 * max(means) else low
        axes.set_xlim(low, high + 0.35 * (high - low))
        axes.xaxis.set_major_locator(MaxNLocator(4))


# --- by layer ------------------------------------------------------------------------------------


def blocks(
    labels: Sequence[str], before: Sequence[float], after: Mapping[str, Sequence[float]]
) -> Figure:
    """Megabytes of each block: a pale bar before, and upon it what is left, stacked by linear.

    after: kind of linear -> megabytes by block.
    """
    figure = Figure(figsize=(WIDE, 3.1), layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(labels))
    axes.bar(at, before, 0.86, color=PALE, label="before")
    floor = np.zeros(len(labels))
    for number, (kind, values) in enumerate(after.items()):
        colour = KINDS[number % len(KINDS)]
        axes.bar(at, values, 0.56, bottom=floor, color=colour, label=shortened(kind))
        floor += np.asarray(values)
    axes.set_ylabel("MB")
    axes.grid(visible=False, axis="x")
    _name_blocks(axes, labels)
    figure.legend(loc="outside lower center", ncols=min(5, len(after) + 1))
    return figure


def heat(labels: Sequence[str], linears: Sequence[str], values: np.ndarray) -> Figure:
    """values: [linears, blocks], NaN where there is none; colours by their logarithm."""
    figure = Figure(figsize=(WIDE, 1.0 + 0.27 * len(linears)), layout="constrained")
    axes = figure.subplots()
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = float(positive.min()), float(positive.max())
    norm = LogNorm(low, max(high, 1.0001 * low), clip=True)
    colours = colormaps["YlOrBr"].resampled(24)
    shown = np.ma.masked_invalid(np.where(values <= 0, low, values))
    axes.set_facecolor("#f4f5f6")
    axes.pcolormesh(shown, norm=norm, cmap=colours, edgecolors="white", linewidth=0.6)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(linears)) + 0.5, [shortened(name) for name in linears])
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    _name_blocks(axes, labels, shift=0.5)
    if len(labels) <= 10:
        for (row, column), value in np.ndenumerate(values):
            if math.isfinite(value):
                ink = "white" if norm(max(value, low)) > 0.62 else INK
                axes.annotate(power(value), (column + 0.5, row + 0.5), color=ink, **_CENTRED)
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.01, aspect=12)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.ax.grid(visible=False)
    if high < 10 * low:  # there may be no power of ten between them
        bar.set_ticks([low, high])
    return figure


_CENTRED: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}


def _name_blocks(axes: Any, labels: Sequence[str], shift: float = 0.0) -> None:
    every = -(-len(labels) // 24)
    shown = range(0, len(labels), every)
    long = max(map(len, labels)) > 4
    axes.set_xticks(
        [at + shift for at in shown],
        [shortened(labels[at], 16) for at in shown],
        rotation=60 if long else 0,
        **({"ha": "right", "rotation_mode": "anchor"} if long else {}),
    )
    axes.set_xlabel("block")


# --- training and search -------------------------------------------------------------------------


def curves(steps: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """A line for each quantity over the steps of a training."""
    figure = Figure(figsize=(HALF, 2.7), layout="constrained")
    axes = figure.subplots()
    values = [value for points in steps.values() for _, value in points]
    for number, (name, points) in enumerate(steps.items()):
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            color=SERIES[number % 6],
            linestyle=("-", "--", ":", "-.")[number % 4],
            marker="." if len(points) < 12 else None,
            label=shortened(name),
        )
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step")
    if len(steps) > 1:
        axes.legend(fontsize=8)
    else:
        axes.set_ylabel(next(iter(steps)))
    return figure


def front(points: Sequence[tuple[float, float, float | None]]) -> Figure:
    """points: (megabytes, KL, milliseconds or None). The line joins those that no other one beats
    both in size and in KL."""
    figure = Figure(figsize=(WIDE, 3.3), layout="constrained")
    axes = figure.subplots()
    size, kl = (np.array([point[i] for point in points], dtype=float) for i in (0, 1))
    edge = sorted((s, k) for s, k in zip(size, kl, strict=True) if not _beaten(s, k, size, kl))
    axes.step(*zip(*edge, strict=True), where="post", color=GREY, linewidth=1.2, zorder=1)
    known = [point[2] for point in points if point[2] is not None]
    if len(known) == len(points):
        latency = np.array(known, dtype=float)
        norm, colours = Normalize(latency.min(), latency.max()), colormaps["viridis"].resampled(24)
        axes.scatter(size, kl, 34, c=latency, norm=norm, cmap=colours, edgecolors="white")
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.01, aspect=14)
        bar.outline.set_visible(False)
        bar.ax.grid(visible=False)
        bar.ax.tick_params(labelsize=8)
        bar.set_label("latency, ms")
    else:
        axes.scatter(size, kl, 34, color=SERIES[0], edgecolors="white")
    if kl.min() > 0 and kl.max() > 8 * kl.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("MB")
    axes.set_ylabel("KL, nats per token")
    return figure


def _beaten(size: float, kl: float, sizes: np.ndarray, kls: np.ndarray) -> bool:
    better = (sizes <= size) & (kls <= kl) & ((sizes < size) | (kls < kl))
    return bool(better.any())


def printable(text: str) -> str:
    """Text without what neither SVG nor UTF-8 can hold: control characters, halves of pairs."""
    return "".join(
        "�" if (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or c in "\ufffe\uffff"
        else c
        for c in text
    )  # fmt: skip
