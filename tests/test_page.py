"""The page of a recipe: what it says, that it needs nothing beside itself, and how a browser that
people use lays it out."""

from __future__ import annotations

import html
import importlib.util
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import recipe_reports
import tiny
from tersor.errors import TersorError
from tersor.recipes.page import page, size, write_page
from tersor.recipes.stages import RECIPE_REPORT, RecipeReport, linear_sizes

pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra [report]")
pytest.importorskip("jinja2", reason="needs Jinja, of the extra [report]")

VOID = {"meta", "br", "hr", "img", "link", "input", "col", "wbr", "source"}
ADDRESS = re.compile(r"""url\(\s*['"]?(?!#)|@import|https?:|//[a-z]""", re.I)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECTIONS = ("Stages", "Size", "Quality", "Speed and memory", "Error by layer", "Training",
            "Search", "How it was made")  # fmt: skip


class Reader(HTMLParser):
    """Every element with its attributes, and the text; AssertionError where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # the innermost tag, and what stands in it
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", " ".join(data.split())))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def within(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


@pytest.fixture(scope="module")
def full() -> str:
    return page(recipe_reports.full())


def assert_needs_nothing(text: str) -> None:
    reader = Reader(text)
    names = {tag for tag, _ in reader.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "image"}
    for tag, attributes in reader.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href", "action", "data"):
                assert value is not None and value.startswith("#"), (tag, name, value)
            if name in ("style", "clip-path", "fill"):
                assert not ADDRESS.search(value or ""), (tag, name, value)
    assert not ADDRESS.search(" ".join(reader.within("style")))


def test_nothing_beside_itself_is_needed(full: str) -> None:
    assert_needs_nothing(full)
    assert full.startswith("<!DOCTYPE html>")


def test_ids_are_unique_and_references_lead_to_them(full: str) -> None:
    reader = Reader(full)
    ids = [a["id"] for _, a in reader.elements if "id" in a]
    assert len(set(ids)) == len(ids) > 100
    wanted = set(re.findall(r"url\(#([^)]+)\)", full))
    wanted |= {a["href"][1:] for _, a in reader.elements if a.get("href")}
    assert wanted and wanted <= set(ids)


def test_every_section_with_its_numbers(full: str) -> None:
    reader = Reader(full)
    assert tuple(reader.within("h2")) == SECTIONS
    report = recipe_reports.full()
    assert reader.within("h1") == [report.model]
    shown = " ".join(text for _, text in reader.texts)
    for stage in report.stages:
        assert shown.count(stage.name) >= 4  # in tables and on axes
        for key in stage.settings:
            assert f"{key}:" in shown
        for note in stage.notes:
            assert note in shown
        for quality in stage.quality.values():
            mean, error = quality["perplexity"]["mean"], quality["perplexity"]["error"]
            assert f"{mean:.2f} ± {error:.2f}" in shown
            if stage.step:
                assert f"{quality['kl']['mean']:.4f} ± {quality['kl']['error']:.4f}" in shown
                assert f"{100 * quality['flips']:.1f} %" in shown
        assert f"{stage.speed['decode']:.1f}" in shown
        assert size(stage.speed["peak"]) in shown
    first, last = report.stages[0], report.stages[-1]
    assert f"{first.bytes / last.bytes:.1f}× smaller" in reader.within("span")
    assert f"{size(first.bytes)} → {size(last.bytes)}" in reader.within("span")
    assert "11.21 → 12.90" in reader.within("span")
    assert "2.15×" in reader.within("span")
    # Names of linears and numbers of blocks are text in the plots.
    plotted = reader.within("text")
    assert {*recipe_reports.LINEARS, *map(str, range(6))} <= set(plotted)


def test_every_figure_has_words_and_every_table_has_heads(full: str) -> None:
    reader = Reader(full)
    count = len(reader.named("figure"))
    assert count == 8  # two of size, quality, speed, two of errors, a training, a search
    captions = [t for t in reader.within("b") if t.startswith("Figure ")]
    assert captions == [f"Figure {number}." for number in range(1, count + 1)]
    labels = [a["aria-label"] for a in reader.named("div") if a.get("role") == "img"]
    assert len(labels) == count
    assert "3 quantize 4.3 MB" in labels[0]
    assert "KL, nats per token on code: 1 prune 0.4310" in labels[2]
    assert "of mlp.down_proj in block 5" in labels[4]
    heads = reader.named("th")
    assert {a.get("scope") for a in heads} == {"col", "row", "rowgroup"}
    assert len(reader.named("caption")) == len(reader.named("table")) == 3


def test_the_same_report_gives_the_same_bytes(full: str, tmp_path: Path) -> None:
    """Also once it has been through its file."""
    (tmp_path / RECIPE_REPORT).write_text(recipe_reports.full().to_json(), encoding="utf-8")
    write_page(RecipeReport.read(tmp_path), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == full
    assert not list(tmp_path.glob("*.tmp"))


HOSTILE = "</title><script>alert(1)</script>\"'&$\\frac{$ \x00\x1b\ud800 ]]> 模型"


def hostile(value: Any) -> Any:
    """Every string, keys of settings included, replaced by one that would do harm."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, dict):
        return {key: hostile(each) for key, each in value.items()}
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return value


def test_names_from_a_checkpoint_do_no_harm() -> None:
    report = recipe_reports.full()
    report.model = report.recipe = HOSTILE
    report.steps, report.machine = hostile(report.steps), {HOSTILE: HOSTILE}
    report.versions = {HOSTILE: HOSTILE}
    for stage in report.stages:
        stage.name = HOSTILE
        stage.settings = {HOSTILE: hostile(stage.settings)}
        stage.notes = [HOSTILE]
        stage.quality = {HOSTILE: stage.quality["code"]}
        stage.layers = [
            layer | {"name": f"h.{i}.{HOSTILE}"} for i, layer in enumerate(stage.layers)
        ]
        stage.linears = {f"h.{i}.{HOSTILE}": n for i, n in enumerate(stage.linears.values())}
        stage.losses = [(step, {HOSTILE: losses["loss"]}) for step, losses in stage.losses]
    text = page(report)
    assert_needs_nothing(text)
    assert "<script" not in text
    text.encode()  # halves of surrogate pairs are gone
    assert not set("\x00\x1b") & set(text)
    (title,) = Reader(text).within("h1")
    assert title == "</title><script>alert(1)</script>\"'&$\\frac{$ ��� ]]> 模型"


def test_what_was_not_measured_is_left_out() -> None:
    reader = Reader(page(recipe_reports.bare()))
    assert reader.within("h2") == ["Stages", "Size", "How it was made"]
    assert len(reader.named("figure")) == 1
    shown = " ".join(text for _, text in reader.texts)
    assert not re.search(r"\b(nan|None|inf|null)\b", shown)
    nothing = replace(recipe_reports.bare(), stages=recipe_reports.bare().stages[:1], steps=[])
    nothing.stages[0].bytes = 0
    assert Reader(page(nothing)).within("h2") == ["Stages", "How it was made"]


def test_speeds_measured_in_turns_are_compared_as_they_were() -> None:
    """With the original again beside every stage, not as it was at first."""
    report = only_sizes()
    report.stages[0].speed = recipe_reports.speed(1000, 100, 10**7)
    report.stages[-1].speed = recipe_reports.speed(1000, 150, 10**7) | {"decode_ratio": 1.75}
    shown = Reader(page(report))
    assert "1.75×" in shown.within("td") and "1.75×" in shown.within("span")
    assert "1.00×" in shown.within("td")
    assert "1.50×" not in shown.within("td")


def test_numbers_that_are_none() -> None:
    """One window has no error, as NaN or as null; a training that blew up has no loss."""
    for missing in (None, math.nan):
        report = recipe_reports.full()
        for stage in report.stages:
            for quality in stage.quality.values():
                for key in ("perplexity", "delta", "kl"):
                    quality[key]["error"] = missing
                quality["flips"] = None
            stage.losses = [(step, {"loss": math.nan}) for step, _ in stage.losses]
            for layer in stage.layers[::3]:
                layer["error"] = math.nan
        report.front[0]["latency"] = None
        reader = Reader(page(report))
        shown = " ".join(text for _, text in reader.texts)
        assert not re.search(r"\b(nan|None|null)\b", shown)
        assert "12.90" in reader.within("td")
        assert "Training" not in reader.within("h2")
        assert len(reader.named("figure")) == 7


def only_sizes() -> RecipeReport:
    report = recipe_reports.full()
    report.front = []
    for stage in report.stages:
        stage.quality, stage.speed, stage.losses = {}, None, []
        stage.layers = [layer | {"error": 0.0} for layer in stage.layers]
    return report


def test_sizes_by_layer_come_from_the_stages_or_from_the_reports() -> None:
    report = only_sizes()
    said = re.compile(r"6 blocks, ([\d.]+) MB of linears before and ([\d.]+) MB now")
    found = said.search(page(report))
    assert found is not None
    totals = [sum(stage.linears.values()) / 1e6 for stage in (report.stages[0], report.stages[-1])]
    assert found.groups() == tuple(f"{total:.1f}" for total in totals)
    for stage in report.stages:
        stage.linears = {}
    again = said.search(page(report))
    assert again is not None and again.groups() == found.groups()
    report.stages[-1].parameters -= 1  # some linear is smaller, and which is not known
    assert not said.search(page(report))


def test_linear_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    found, model = linear_sizes(folder), tiny.model("llama")
    linears = {n: m for n, m in model.named_modules() if n.startswith("model.layers.")
               and hasattr(m, "weight") and m.weight.dim() == 2}  # fmt: skip
    assert found == {name: module.weight.nbytes for name, module in linears.items()}
    assert len(found) == 14


def test_many_kinds_of_linears_share_the_colours() -> None:
    report = only_sizes()
    names = [f"model.layers.{block}.kind_{kind}.proj" for block in range(3) for kind in range(20)]
    for stage in report.stages:
        stage.linears = {name: 1000 * (number % 20 + 1) for number, name in enumerate(names)}
    plotted = Reader(page(report)).within("text")
    assert "others" in plotted
    assert "kind_19.proj" in plotted
    assert "kind_3.proj" not in plotted


def test_errors_name_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = recipe_reports.bare()
    with pytest.raises(TersorError, match="cannot be written; name a file in a folder there is"):
        write_page(report, tmp_path)
    with pytest.raises(TersorError, match="cannot be written"):
        write_page(report, tmp_path / "absent" / "page.html")
    with pytest.raises(TersorError, match="no stage"):
        page(replace(report, stages=[]))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(TersorError, match=r"needs matplotlib.*pip install tersor\[report\]"):
        write_page(report, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_the_style_of_the_user_is_left_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "red"}):
        text = page(recipe_reports.bare())
        assert matplotlib.rcParams["font.size"] == 40
    assert text == page(recipe_reports.bare())
    assert dict(matplotlib.rcParams) == before


# --- in a browser --------------------------------------------------------------------------------

MEASURE = """
<script>
const box = (e) => { const r = e.getBoundingClientRect();
                     return [r.left, r.top, r.right, r.bottom].map(v => Math.round(10 * v) / 10); };
const out = {
  width: document.documentElement.clientWidth,
  scroll: document.documentElement.scrollWidth,
  fetched: performance.getEntriesByType("resource").map(e => e.name),
  words: document.body.innerText,
  captions: [...document.querySelectorAll("figcaption")].map(box),
  figures: [...document.querySelectorAll("figure svg")].map(svg => ({
    box: box(svg),
    shapes: svg.querySelectorAll("path").length,
    texts: [...svg.querySelectorAll("text")].map(t => [
      t.textContent, ...box(t), parseFloat(getComputedStyle(t).fontSize)
        * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width]),
  })),
};
console.log("measured");
const holder = document.createElement("pre");
holder.id = "measured";
holder.textContent = JSON.stringify(out);
document.body.append(holder);
</script>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on the path")
    return found


def open_page(browser: str, path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    profile = path.parent / "profile"
    return subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--no-first-run", "--enable-logging=stderr", f"--user-data-dir={profile}", *options,
         path.resolve().as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def measured(browser: str, path: Path, report: RecipeReport, width: int) -> dict[str, Any]:
    """Opens a copy of the page that has a script at its end, which says how it was laid out."""
    path.write_text(page(report).replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    done = open_page(browser, path, f"--window-size={width},900", "--dump-dom")
    # Errors and warnings of the page would be lines like ours, which shows that they are seen.
    (said,) = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert "measured" in said
    (held,) = re.findall(r'<pre id="measured">(.*?)</pre>', done.stdout, re.S)
    content: dict[str, Any] = json.loads(html.unescape(held))
    return content


def overlaps(texts: list[list[Any]]) -> Iterator[tuple[str, str]]:
    """Texts of a plot of which one covers the other by more than the gap between lines."""
    for i, (first, left, top, right, bottom, _) in enumerate(texts):
        for second, left2, top2, right2, bottom2, _ in texts[i + 1 :]:
            across = min(right, right2) - max(left, left2)
            down = min(bottom, bottom2) - max(top, top2)
            if across > 1 and down > 4:
                yield first, second


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "width"), [("full", 1280), ("full", 1024), ("crowded", 1280), ("bare", 1280)]
)
def test_in_a_browser(name: str, width: int, browser: str, tmp_path: Path) -> None:
    report: RecipeReport = getattr(recipe_reports, name)()
    found = measured(browser, tmp_path / "page.html", report, width)
    assert found["fetched"] == []
    assert found["scroll"] <= found["width"]  # nothing to scroll sideways
    for stage in report.stages:
        assert stage.name in " ".join(found["words"].split())
    count = {"full": 8, "crowded": 12, "bare": 1}[name]
    assert len(found["figures"]) == len(found["captions"]) == count
    for figure, caption in zip(found["figures"], found["captions"], strict=True):
        left, top, right, bottom = figure["box"]
        assert right - left > 0.4 * width * 0.8
        assert bottom - top > 80
        assert 0 <= left < right <= found["width"]
        assert caption[1] >= bottom - 1
        assert figure["shapes"] > 2
        assert figure["texts"]
        for text, x, y, x2, y2, font in figure["texts"]:
            assert font >= 8, text
            # Within the plot, which cuts off what is outside.
            assert left - 1 <= x and x2 <= right + 1, text
            assert top - 1 <= y and y2 <= bottom + 1, text
        assert list(overlaps(figure["texts"])) == []


@pytest.mark.slow
def test_in_print(browser: str, tmp_path: Path, full: str) -> None:
    (tmp_path / "page.html").write_text(full, encoding="utf-8")
    target = tmp_path / "page.pdf"
    open_page(browser, tmp_path / "page.html", f"--print-to-pdf={target}", "--no-pdf-header-footer")
    content = target.read_bytes()
    assert content.startswith(b"%PDF-")
    boxes = re.findall(rb"/MediaBox\s*\[0 0 ([\d.]+) ([\d.]+)\]", content)
    assert 1 <= len(boxes) <= 6
    for wide, high in boxes:  # A4 in points
        assert (round(float(wide)), round(float(high))) == (595, 842)


def test_reports_go_through_json() -> None:
    """The made reports hold what a file can hold."""
    for report in (recipe_reports.full(), recipe_reports.bare()):
        assert json.loads(report.to_json())["stages"][0]["name"] == "original"
        assert asdict(report)
    assert len(recipe_reports.crowded().stages) == 8
