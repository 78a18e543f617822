"""A recipe's report as one page of HTML that needs nothing beside itself: no script, no other file,
no network. It reads on a screen and in print."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from tersor.durable import durable
from tersor.errors import TersorError
from tersor.recipes.stages import RecipeReport, Stage
from tersor.report import in_block

_TEMPLATE = Path(__file__).with_name("page.html")
_SETTING = 160  # characters of one setting that are shown; the JSON has all
_KINDS = 8  # of linears that have a colour of their own


def require() -> None:
    """TersorError where what draws the page is not installed. For before the work."""
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise TersorError(
            f"a page needs {' and '.join(missing)}, not installed; run pip install tersor[report]"
        )


def write_page(report: RecipeReport, path: str | Path) -> None:
    """Writes the page; it appears under its name whole or not at all.

    Sections that the report has nothing for are left out. The same report gives the same bytes.
    TersorError where the path cannot be written, or matplotlib or Jinja is not installed.
    """
    path = Path(path)
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise TersorError(f"{path} cannot be written; name a file in a folder there is")
    content = page(report).encode()
    with durable(path, len(content)) as file:
        file.write(content)


def page(report: RecipeReport) -> str:
    """The page as text. Names, settings and notes come from files of others and are escaped."""
    require()
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from tersor.recipes.figures import printable

    if not report.stages:
        raise TersorError("the report has no stage, not even the original; run the recipe again")
    report = _read(_cleaned(asdict(report), printable))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "size": size,
        "pm": _plus_minus,
        "estimate": _estimate,
        "percent": _percent,
        "duration": _duration,
        "count": lambda value: f"{value:,}".replace(",", " "),
        "setting": _setting,
        "times": _times,
        "markup": Markup,  # of our own figures alone
    }
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    first, last = report.stages[0], report.stages[-1]
    return template.render(
        report=report,
        stages=report.stages,
        first=first,
        texts=_texts(report.stages),
        flips=any("flips" in row for stage in report.stages for row in stage.quality.values()),
        tiles=list(_tiles(first, last)),
        figures=_figures(report),
        steps=yaml.safe_dump(report.steps, sort_keys=False, allow_unicode=True, width=90)
        if report.steps
        else "",
    )


def _cleaned(value: Any, clean: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {_cleaned(str(key), clean): _cleaned(each, clean) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cleaned(each, clean) for each in value]
    return value if isinstance(value, (int, float, bool, type(None))) else clean(str(value))


def _read(content: dict[str, Any]) -> RecipeReport:
    return RecipeReport(**content | {"stages": [Stage(**stage) for stage in content["stages"]]})


# --- figures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Figure:
    """svg: as markup. caption: below it. alt: what it shows, for who does not see it.
    wide: over both columns."""

    svg: str
    caption: str
    alt: str
    wide: bool = True


def _figures(report: RecipeReport) -> dict[str, list[_Figure]]:
    """By section."""
    from tersor.recipes import figures as draw

    stages = report.stages
    names = [stage.name for stage in stages]
    out: dict[str, list[_Figure]] = {}

    def add(
        section: str, caption: str, alt: str, function: Any, *args: Any, wide: bool = True
    ) -> None:
        identity = f"f{sum(map(len, out.values())) + 1}"
        svg = draw.render(identity, function, *args)
        out.setdefault(section, []).append(_Figure(svg, caption, alt, wide))

    if any(stage.bytes for stage in stages):
        panels = [draw.Bars("size of all tensors", [s.bytes or None for s in stages], size)]
        if any(stage.bits_per_weight != 16 for stage in stages):
            bits = [stage.bits_per_weight for stage in stages]
            panels.append(draw.Bars("bits per weight", bits, "{:.2f}".format))
        add("size", "Size by stage: of all tensors of the checkpoint; bits per weight of all "
            "linears in its blocks, 16-bit ones and scales included.", _listed(names, panels),
            draw.bars, names, panels, draw.WIDE)  # fmt: skip
    if (layers := _layer_sizes(stages)) is not None:
        labels, before, after = layers
        total = sum(sum(row) for row in after.values())
        add("size", "Size by layer: what each block's linears took before (pale) and take now "
            "(coloured, stacked by linear).",
            f"{len(labels)} blocks, {sum(before):.1f} MB of linears before and {total:.1f} MB now.",
            draw.blocks, labels, before, after)  # fmt: skip
    if (shown := _quality_panels(stages)) is not None:
        add("quality", "Perplexity and KL by stage, ± one standard error over windows of text.",
            _listed_dots(names, shown), draw.dots, names, shown, draw.WIDE)  # fmt: skip
    if speeds := _speed_panels(stages):
        add("speed", "Speed in tokens per second and memory by stage, before and after.",
            _listed(names, speeds), draw.bars, names, speeds, draw.WIDE)  # fmt: skip
    for stage in stages:
        if (errors := _layer_errors(stage)) is not None:
            labels, kinds, values = errors
            worst, at = max((v, (k, b)) for (k, b), v in values.items())
            of = "outputs" if any(layer.get("tokens") for layer in stage.layers) else "weights"
            add("layers", f"{stage.name}: error of each layer, squared and relative to its {of}; "
                "of experts the worst.",
                f"{len(values)} errors; the largest is {draw.power(worst)}, of {at[0]} in block "
                f"{at[1]}.", draw.heat, labels, kinds, _matrix(labels, kinds, values))  # fmt: skip
    for stage in stages:
        if curves := _curves(stage):
            ends = (f"{name} from {p[0][1]:.4g} to {p[-1][1]:.4g}" for name, p in curves.items())
            add("training", f"{stage.name}: losses by step.",
                f"Over {len(stage.losses)} records: {'; '.join(ends)}.",
                draw.curves, curves, wide=False)  # fmt: skip
    if points := _front(report.front):
        add("search", "The Pareto front: size against KL of what the search tried, coloured by "
            "latency. The line joins those that none beats both in size and in KL.",
            f"{len(points)} points, from {min(p[0] for p in points):.1f} to "
            f"{max(p[0] for p in points):.1f} MB and KL {min(p[1] for p in points):.4g} to "
            f"{max(p[1] for p in points):.4g}.", draw.front, points)  # fmt: skip
    return out


def _listed(names: Sequence[str], panels: Sequence[Any]) -> str:
    return " ".join(
        f"{panel.title}: "
        + "; ".join(
            f"{name} {panel.written(value)}"
            for name, value in zip(names, panel.values, strict=True)
            if value is not None
        )
        + "."
        for panel in panels
    )


def _listed_dots(names: Sequence[str], panels: Sequence[Any]) -> str:
    return " ".join(
        f"{panel.title} on {text}: "
        + "; ".join(
            f"{name} {each[0]:.{panel.digits}f}"
            for name, each in zip(names, row, strict=True)
            if each is not None
        )
        + "."
        for panel in panels
        for text, row in panel.values.items()
    )


def _layer_sizes(
    stages: Sequence[Stage],
) -> tuple[list[str], list[float], dict[str, list[float]]] | None:
    """Names of blocks, megabytes of each before, and now by linear; None where it is not known.

    Where the stages do not say what their linears take, it is what the last report of each says,
    against the bits of the original: as long as none changed its shape.
    """
    before, after = stages[0].linears, stages[-1].linears
    if not (before and after):
        last = {layer["name"]: layer for stage in stages for layer in stage.layers}
        if not last or stages[0].parameters != stages[-1].parameters:
            return None
        bits = stages[0].bits_per_weight
        before = {name: math.prod(each["shape"]) * bits / 8 for name, each in last.items()}
        after = {name: each["bytes"] for name, each in last.items()}
    totals: dict[str, int] = {}
    for name, nbytes in after.items():
        kind = in_block(name)[1]
        totals[kind] = totals.get(kind, 0) + nbytes
    few = len(totals) <= _KINDS
    shown = set(sorted(totals, key=totals.__getitem__, reverse=True)[: _KINDS - (not few)])
    places = list(dict.fromkeys(in_block(name)[0] for name in [*before, *after]))
    rows = {kind: [0.0] * len(places) for kind in totals if kind in shown}
    if not few:
        rows["others"] = [0.0] * len(places)
    was = [0.0] * len(places)
    for name, nbytes in before.items():
        was[places.index(in_block(name)[0])] += nbytes / 1e6
    for name, nbytes in after.items():
        place, kind = in_block(name)
        rows[kind if kind in shown else "others"][places.index(place)] += nbytes / 1e6
    return _short(places), was, rows


def _layer_errors(
    stage: Stage,
) -> tuple[list[str], list[str], dict[tuple[str, str], float]] | None:
    """Names of blocks, of linears, and the worst error by (linear, block)."""
    found: dict[tuple[str, str], float] = {}
    for layer in stage.layers:
        error = layer.get("error")
        if error is not None and math.isfinite(error):
            place, kind = in_block(layer["name"])
            found[kind, place] = max(error, found.get((kind, place), 0.0))
    if not any(found.values()):
        return None
    places = list(dict.fromkeys(place for _, place in found))
    short = dict(zip(places, _short(places), strict=True))
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    values = {(kind, short[place]): error for (kind, place), error in found.items()}
    return list(short.values()), kinds, values


def _matrix(
    labels: Sequence[str], kinds: Sequence[str], values: Mapping[tuple[str, str], float]
) -> Any:
    import numpy as np

    return np.array([[values.get((kind, label), math.nan) for label in labels] for kind in kinds])


def _short(places: Sequence[str]) -> list[str]:
    """The numbers of blocks, where these tell them apart."""
    numbers = [place.rpartition(".")[2] or "outside" for place in places]
    return numbers if len(set(numbers)) == len(places) else [place or "outside" for place in places]


def _quality_panels(stages: Sequence[Stage]) -> list[Any] | None:
    from tersor.recipes.figures import Dots

    texts = _texts(stages)
    panels = []
    for title, key, digits in (("perplexity", "perplexity", 2), ("KL, nats per token", "kl", 4)):
        rows = {}
        for text in texts:
            measured = [_estimate(stage.quality.get(text), key) for stage in stages]
            if key == "kl":  # the original against itself is nothing to show
                measured = [m if s.step else None for m, s in zip(measured, stages, strict=True)]
            if any(measured):
                rows[text] = measured
        if rows:
            panels.append(Dots(title, rows, digits))
    return panels or None


def _speed_panels(stages: Sequence[Stage]) -> list[Any]:
    from tersor.recipes.figures import Bars

    panels = []
    for title, key, written in (
        ("prefill, tokens/s", "prefill", "{:.0f}".format),
        ("decode, tokens/s", "decode", "{:.1f}".format),
        ("weights in memory", "weights", size),
        ("peak memory", "peak", size),
    ):
        values = [(stage.speed or {}).get(key) or None for stage in stages]
        if any(values):
            panels.append(Bars(title, values, written))
    return panels


def _curves(stage: Stage) -> dict[str, list[tuple[int, float]]]:
    out: dict[str, list[tuple[int, float]]] = {}
    for step, values in stage.losses:
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                out.setdefault(name, []).append((step, value))
    return out


def _front(points: Iterable[Mapping[str, Any]]) -> list[tuple[float, float, float | None]]:
    """(megabytes, KL, milliseconds or None); points without a size or a KL are left out."""
    out = []
    for point in points:
        nbytes, kl, latency = (point.get(key) for key in ("bytes", "kl", "latency"))
        kl = kl.get("mean") if isinstance(kl, Mapping) else kl
        if nbytes is not None and kl is not None and math.isfinite(kl):
            known = latency is not None and math.isfinite(latency)
            out.append((nbytes / 1e6, float(kl), 1e3 * float(latency or 0) if known else None))
    return out


# --- words and numbers ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tile:
    label: str
    value: str
    detail: str


def _tiles(first: Stage, last: Stage) -> Iterable[_Tile]:
    """What the whole came to, as far as it is known."""
    if first.bytes and last.bytes:
        ratio = first.bytes / last.bytes
        change = f"{ratio:.1f}× smaller" if ratio >= 1 else f"{1 / ratio:.1f}× larger"
        yield _Tile("size", change, f"{size(first.bytes)} → {size(last.bytes)}")
    texts = _texts([last])[:2]
    for text in texts:
        now = _estimate(last.quality[text], "perplexity")
        was = _estimate(first.quality.get(text), "perplexity")
        if now is not None and was is not None:
            digits = 2 if max(was[0], now[0]) < 100 else 1
            error = f"± {now[1]:.{digits}f}" if math.isfinite(now[1]) else ""
            change = f"{was[0]:.{digits}f} → {now[0]:.{digits}f}"
            yield _Tile(f"perplexity, {text}", change, error)
    if texts and last.step is not None:
        measured = last.quality[texts[0]]
        if (kl := _estimate(measured, "kl")) is not None:
            top1 = measured.get("top1")
            same = f"same first token: {_percent(top1)}" if top1 is not None else ""
            yield _Tile(f"KL, {texts[0]}", f"{kl[0]:.4f}", same)
    if first.speed and last.speed and first is not last:
        for key in ("decode", "prefill"):
            change = f"{first.speed[key]:.0f} → {last.speed[key]:.0f} tokens/s"
            yield _Tile(f"{key} speed", f"{_times(last, first, key):.2f}×", change)


def _times(stage: Stage, first: Stage, key: str) -> float:
    """How many times as fast as the original; as measured in turns with it, where it was."""
    assert stage.speed and first.speed
    ratio = stage.speed.get(f"{key}_ratio")
    return float(ratio if ratio is not None else stage.speed[key] / first.speed[key])


def _texts(stages: Iterable[Stage]) -> list[str]:
    return list(dict.fromkeys(text for stage in stages for text in stage.quality))


def _estimate(quality: Mapping[str, Any] | None, key: str) -> tuple[float, float] | None:
    """(mean, standard error, NaN where unknown) of what evaluate measured."""
    found = (quality or {}).get(key)
    if found is None or found["mean"] is None or not math.isfinite(found["mean"]):
        return None
    error = found["error"]
    return found["mean"], math.nan if error is None else error


def _plus_minus(estimate: tuple[float, float] | None, digits: int) -> str:
    if estimate is None:
        return "–"
    mean, error = estimate
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def size(nbytes: float) -> str:
    """Bytes for people, in powers of ten.

    >>> size(512), size(18_123_456), size(7.1e9)
    ('512 B', '18.1 MB', '7.1 GB')
    """
    for unit, least in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= least:
            return f"{nbytes / least:.1f} {unit}"
    return f"{nbytes:.0f} B"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _setting(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SETTING else text[: _SETTING - 1] + "…"
