"""Pieces of HTML: escaped text, figures that can be found again, tables, bars and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmar_megatron.data.inspection.facts import Histogram

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 360, 150, 42, 20, 10
_MOST_PIXELS = 256
"""Along a side of a picture on the page."""
_LOSSLESS_PIXELS = 128


def figure(name: str, value: float, shown: str | None = None) -> str:
    """A number, which is found in the page as the element whose `data-fact` is `name`."""
    return f'<data data-fact="{escape(name)}" value="{value}">{shown if shown is not None else f"{value:,}"}</data>'


def percent(name: str, share: float) -> str:
    """A share, as a figure."""
    return figure(name, share, f"{100 * share:.1f} %")


def of_bytes(count: int) -> str:
    """In the unit that fits."""
    if count < 1000:
        return f"{count:,} bytes"
    size, units = count / 1000, ["kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        del units[0]
    return f"{size:,.1f} {units[0]}"


def shorten(text: str, most: int) -> str:
    """The text, or its begin with an ellipsis."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, title: str, chosen: Sequence[int] = ()) -> str:
    """A table of numbers; its cells are HTML.

    Args:
        head: of each column.
        rows: the first cell of each is its header.
        title: says what the table is of.
        chosen: rows that stand out.
    """
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = []
    for number, (first, *rest) in enumerate(rows):
        cells = "".join(f"<td>{cell}</td>" for cell in rest)
        lines.append(f'<tr{" class=chosen" if number in chosen else ""}><th scope="row">{first}</th>{cells}</tr>')
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(title)}"><table><caption>{escape(title)}</caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def names_and_words(entries: Mapping[str, Any], *, title: str) -> str:
    """A table of names and what they are, of nested json."""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name).replace("_", " "))}</th><td>{_words(value)}</td></tr>'
        for name, value in entries.items()
    )
    return f'<table class="words"><caption>{escape(title)}</caption><tbody>{rows}</tbody></table>'


def _words(value: Any, *, between: str = "<br>") -> str:
    if isinstance(value, Mapping):
        inner = [f"{escape(str(name).replace('_', ' '))}: {_words(of, between=', ')}" for name, of in value.items()]
        return between.join(inner) or "none"
    if isinstance(value, list):
        return ", ".join(_words(of, between=", ") for of in value) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return escape(shorten(f"{value:,.4g}" if isinstance(value, float) else str(value), 500))


def chart(histogram: Histogram, *, fact: str) -> str:
    """Bars, with the figures below and the counts as a table."""
    most = max(histogram.counts)
    width = (_WIDTH - _LEFT - 4) / len(histogram.counts)
    floor = _HEIGHT - _BOTTOM
    whole = histogram.edges == [round(edge) for edge in histogram.edges]
    bars, rows = [], []
    for k, count in enumerate(histogram.counts):
        low, high = histogram.edges[k], histogram.edges[k + 1]
        name = _range(low, high, whole=whole)
        rows.append([name, f"{count:,}"])
        height = (floor - _TOP) * count / most
        bars.append(
            f'<rect class="bar" x="{_LEFT + k * width:.2f}" y="{floor - height:.2f}" width="{max(width - 1, 0.5):.2f}" '
            f'height="{height:.2f}"><title>{name} {escape(histogram.unit)}: {count:,}</title></rect>'
        )
    last = histogram.edges[-1] - 1 if whole else histogram.edges[-1]
    figures = ", ".join(
        f"{said} {figure(f'{fact}.{name}', value, _edge(value))}"
        for said, name, value in (
            ("mean", "mean", histogram.mean),
            ("median", "median", histogram.median),
            ("95 % up to", "percentile_95", histogram.percentile_95),
            ("least", "least", histogram.least),
            ("most", "most", histogram.most),
        )
    )
    said = f"{histogram.name}: {histogram.values:,} values from {histogram.least:,.4g} to {histogram.most:,.4g} {histogram.unit}"
    return (
        f'<figure class="chart"><figcaption>{escape(histogram.name)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(said)}">'
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH}" y1="{_TOP}" y2="{_TOP}"/>'
        f'<text x="{_LEFT - 5}" y="{_TOP + 4}" text-anchor="end">{_brief(most)}</text>'
        f'<text x="{_LEFT - 5}" y="{floor}" text-anchor="end">0</text>{"".join(bars)}'
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH}" y1="{floor}" y2="{floor}"/>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 5}">{_edge(histogram.edges[0])}</text>'
        f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(histogram.unit)}</text>'
        f'<text x="{_WIDTH - 2}" y="{_HEIGHT - 5}" text-anchor="end">{_edge(last)}</text></svg>'
        f'<p class="soft">{figure(f"{fact}.values", histogram.values)} values: {figures}</p>'
        f"<details><summary>Counts</summary>{table([histogram.unit, 'count'], rows, title=said)}</details></figure>"
    )


def _range(low: float, high: float, *, whole: bool) -> str:
    if not whole:
        return f"{low:.2f} to {high:.2f}"
    return f"{low:,.0f}" if high - low == 1 else f"{low:,.0f} to {high - 1:,.0f}"


def _edge(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:.2f}"


def _brief(count: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= 10 * size:
            return f"{count / size:.0f}{letter}"
    return f"{count:,}"


def image(pixels: NDArray[np.uint8], *, alt: str) -> str:
    """A picture [H, W, 3] as a data URI, at most 256 pixels large; small ones keep each pixel."""
    height, width = pixels.shape[:2]
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    small = max(height, width) <= _LOSSLESS_PIXELS
    if max(height, width) > _MOST_PIXELS:
        picture.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    uri = data_uri(picture, lossless=small)
    shape = f'width="{picture.width}" height="{picture.height}"'
    return f'<img{" class=pixels" if small else ""} {shape} src="{uri}" alt="{escape(alt)}">'


def data_uri(picture: Image.Image, *, lossless: bool) -> str:
    """The picture in base64."""
    file = io.BytesIO()
    if lossless:
        picture.save(file, format="PNG", optimize=True)
    else:
        picture.save(file, format="JPEG", quality=85)
    return f"data:image/{'png' if lossless else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
