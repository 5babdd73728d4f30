"""The page in a real browser: what it shows are the facts, on screens of any width, and nothing is fetched."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import playwright.sync_api
import pytest
from PIL import Image
from playwright.sync_api import Page as Tab

from mmar_megatron.config import DataConfig
from mmar_megatron.data.inspection.opening import open_directory
from mmar_megatron.data.inspection.page import Page, render
from mmar_megatron.data.inspection.views import KINDS
from mmar_megatron.data.source import DataSource
from tests.unit.data.conftest import TRAIN
from tests.unit.data.inspection.conftest import SEQUENCE_LENGTH
from tools.inspect_data import gather

WIDTHS = (400, 1600)
ROWS, SAMPLES = 5, 12


@pytest.fixture(scope="module")
def gathered(mix: DataSource) -> Page:
    return gather(mix, seed=3, samples=SAMPLES, rows=ROWS)


class Opened:
    """A tab with a page, and what happened while it was opened."""

    def __init__(self, tab: Tab, page: Page, file: Path) -> None:
        self.tab = tab
        self.said: list[str] = []
        self.requests: list[str] = []
        tab.on("console", lambda message: self.said.append(message.text))
        tab.on("pageerror", lambda error: self.said.append(str(error)))
        tab.on("request", lambda request: self.requests.append(request.url))
        file.write_text(render(page))
        self.url = file.as_uri()
        tab.goto(self.url, wait_until="load")

    def numbers(self) -> dict[str, float]:
        """The figures, by name; one that is there twice says the same."""
        script = "all => all.map(element => [element.dataset.fact, Number(element.value)])"
        pairs: list[Any] = self.tab.locator("[data-fact]").evaluate_all(script)
        numbers = dict(pairs)
        assert all(numbers[name] == value for name, value in pairs)
        return numbers


@pytest.fixture
def opened(browser: playwright.sync_api.Browser, gathered: Page, tmp_path: Path) -> Iterator[Opened]:
    with browser.new_page() as tab:
        yield Opened(tab, gathered, tmp_path / "report.html")


def test_nothing_is_fetched_and_nothing_complained_of(opened: Opened) -> None:
    assert opened.said == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [opened.url]
    assert opened.tab.title() == opened.tab.inner_text("h1")


def test_all_images_decode_and_say_what_they_show(opened: Opened, gathered: Page) -> None:
    images: list[Any] = opened.tab.locator("img").evaluate_all("all => all.map(i => [i.complete, i.naturalWidth, i.alt])")
    in_samples = [len(sample.pictures) for samples in gathered.samples for sample in samples]
    in_rows = [len(document.images) for row in gathered.rows for document in row.documents]
    assert len(images) == sum(in_samples) + sum(in_rows) + 1  # and the attention
    assert all(complete and width > 0 and len(alt) > 3 for complete, width, alt in images)
    alts = {alt for _, _, alt in images}
    assert {" / ".join(texts[0] for texts in s.captions.values()) for s in gathered.samples[0]} <= alts


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen(opened: Opened, width: int, scheme: Any) -> None:
    opened.tab.set_viewport_size({"width": width, "height": 900})
    opened.tab.emulate_media(color_scheme=scheme)
    assert opened.tab.evaluate("document.documentElement.scrollWidth") == width
    # What is wider than its place scrolls in it, and nothing is painted beyond the edge.
    beyond = opened.tab.evaluate(
        """() => [...document.querySelectorAll("body *")].filter(element => !element.closest(".wide")
            && element.getBoundingClientRect().right > innerWidth + 0.5).map(element => element.outerHTML.slice(0, 80))"""
    )
    assert beyond == []
    # In the colours that are asked for. Not of the whole page: it is higher than graphics in software can always draw.
    pixels = np.asarray(Image.open(io.BytesIO(opened.tab.screenshot())).convert("L"))
    assert pixels.shape == (900, width)
    assert (np.median(pixels) > 128) == (scheme == "light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(opened: Opened, scheme: Any) -> None:
    """The contrast of text and ground, as WCAG 2 reckons it, is 4.5 or more."""
    opened.tab.emulate_media(color_scheme=scheme)
    contrasts: dict[str, float] = opened.tab.evaluate(CONTRAST)
    assert len(contrasts) > 8
    assert {name: value for name, value in contrasts.items() if value < 4.5} == {}


def test_figures_are_the_facts(opened: Opened, gathered: Page) -> None:
    numbers = opened.numbers()
    expected: dict[str, float] = {}
    for k, facts in enumerate(gathered.sets):
        for split in facts.splits:
            values = {name: value for name, value in vars(split).items() if isinstance(value, int)}
            expected |= {f"sets.{k}.{split.split}.{name}": value for name, value in values.items()}
            languages = sorted({name for s in facts.splits for name in s.texts_by_language})
            texts = {name: split.texts_by_language.get(name, 0) for name in languages}
            expected |= {f"sets.{k}.{split.split}.language.{name}": count for name, count in texts.items()}
        charts = {f"tokens.{n}": histogram for n, histogram in enumerate(facts.text_tokens)}
        charts |= {"lengths": facts.lengths, "images_of": facts.images, "aspects": facts.aspects}  # type: ignore[dict-item]
        for name, histogram in charts.items():
            for value in ("mean", "median", "percentile_95", "least", "most", "values") if histogram else ():
                expected[f"sets.{k}.{name}.{value}"] = getattr(histogram, value)
    for row in gathered.stream.table:
        name = f"packing.{row.sequence_length}.{'packed' if row.packing else 'single'}"
        fields = ("rows", "used", "documents_per_row", "images_per_row", "cut")
        expected |= {f"{name}.{field}": getattr(row, field) for field in fields}
    for of, shares in (("task", gathered.stream.tasks), ("source", gathered.stream.sources)):
        for share in shares:
            values = {name: value for name, value in vars(share).items() if name != "name"}
            expected |= {f"{of}.{share.name}.{name}": value for name, value in values.items()}
    splits = [split for facts in gathered.sets for split in facts.splits]
    expected |= {name: sum(getattr(split, name) for split in splits) for name in ("samples", "images", "text_tokens", "bytes")}
    expected |= {"used": gathered.stream.chosen.used, "documents_per_row": gathered.stream.chosen.documents_per_row}
    assert gathered.attention is not None
    expected["attention.share"] = gathered.attention.share
    assert numbers == expected


def test_the_token_view_has_each_position(opened: Opened, gathered: Page) -> None:
    rows = opened.tab.locator("[data-row]")
    assert rows.count() == ROWS
    for number, row in enumerate(gathered.rows):
        cells: list[Any] = (
            rows.nth(number)
            .locator(".cells i")
            .evaluate_all(
                "all => all.map(i => [[...i.classList], i.textContent, i.title, getComputedStyle(i).borderBottomColor])"
            )
        )
        assert len(cells) == len(row.cells) == SEQUENCE_LENGTH
        for (classes, text, title, border), cell in zip(cells, row.cells, strict=True):
            assert classes == [cell.kind, *(["learned"] if cell.learned else [])]
            assert text == cell.text
            assert title.startswith("padding" if cell.kind == "padding" else f"{cell.position}: ")
            assert (border == "rgb(179, 38, 30)") == cell.learned
        assert rows.nth(number).locator(".document:not(.rest)").count() == len(row.documents)
    assert {cell.kind for row in gathered.rows for cell in row.cells} == set(KINDS)


def test_captions_are_text_and_know_their_language(opened: Opened, gathered: Page) -> None:
    chinese = opened.tab.locator('.sheet p[lang="zh"]').all_inner_texts()
    expected = [text for samples in gathered.samples for sample in samples for text in sample.captions.get("zh", [])]
    assert chinese == expected != []
    assert "what is <this>? &" in opened.tab.locator("#samples").inner_text()
    assert "<a>.jpg" in opened.tab.locator("#set-1").inner_text()
    assert "elsewhere" not in opened.tab.locator("#set-1").inner_text()
    learned = opened.tab.locator(".sheet u").all_inner_texts()
    assert {"a text <without> any picture, &amp; learned to its end", "a red circle", "[image 1]"} == set(learned)


def test_bars_are_as_high_as_the_counts(opened: Opened, gathered: Page) -> None:
    histogram = gathered.sets[1].lengths
    assert histogram is not None
    heights: list[float] = (
        opened.tab.locator("#set-1 .chart")
        .filter(has_text=histogram.name)
        .locator("rect")
        .evaluate_all("all => all.map(rect => rect.getBoundingClientRect().height)")
    )
    assert [height / max(heights) for height in heights] == pytest.approx(
        [count / max(histogram.counts) for count in histogram.counts], abs=1e-3
    )


def test_tables_have_headers(opened: Opened) -> None:
    tables = opened.tab.locator("table")
    assert tables.count() > 8
    assert opened.tab.locator("table:not(:has(caption))").count() == 0
    assert opened.tab.locator("tbody tr:not(:has(th[scope=row]))").count() == 0
    assert opened.tab.locator("thead th:not([scope=col])").count() == 0


def test_moments_without_pixels(browser: playwright.sync_api.Browser, moments_dir: Path, tmp_path: Path) -> None:
    page = gather(open_directory(str(moments_dir), sequence_length=SEQUENCE_LENGTH), seed=0, samples=6, rows=2)
    with browser.new_page() as tab:
        opened = Opened(tab, page, tmp_path / "report.html")
        assert opened.said == []
        assert tab.locator("img").count() == 1  # of the attention
        assert "the pixels are not" in tab.locator("#samples").inner_text()
        assert "image without stored pixels" in tab.locator("#tokens").inner_text()


def test_one_set_without_rows_or_samples(
    browser: playwright.sync_api.Browser, shapes_dir: Path, mix_config: DataConfig, tmp_path: Path
) -> None:
    config = replace(mix_config, sources={}, path=str(shapes_dir))
    with browser.new_page() as tab:
        opened = Opened(tab, gather(DataSource(config), seed=0, samples=1, rows=0), tmp_path / "report.html")
        assert opened.said == []
        assert opened.numbers()["sets.0.train.samples"] == TRAIN
        assert tab.locator("[data-row]").count() == 0


CONTRAST = """() => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return parse(getComputedStyle(document.documentElement).backgroundColor);
  };
  const found = {};
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const text = light(parse(element.closest("svg") ? style.fill : style.color)), behind = light(ground(element));
    const name = element.tagName + "." + element.className;
    const value = (Math.max(text, behind) + 0.05) / (Math.min(text, behind) + 0.05);
    found[name] = Math.min(found[name] ?? 99, value);
  }
  return found;
}"""
