"""The page: one HTML file that needs nothing else. What it says is in the facts; here is only how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from mmar_megatron.data.inspection.facts import MOST_LOOKED_AT, SetFacts
from mmar_megatron.data.inspection.markup import (
    chart,
    data_uri,
    figure,
    image,
    names_and_words,
    of_bytes,
    percent,
    shorten,
    table,
)
from mmar_megatron.data.inspection.plans import Share, StreamFacts
from mmar_megatron.data.inspection.style import STYLE
from mmar_megatron.data.inspection.views import AttentionView, Cell, DocumentView, RowView, SampleView

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The browser itself sees to it that nothing is fetched and no script runs."""
_MOST_TEXT = 400
_MOST_PICTURES = 9
_MOST_ALT = 250
_SAID = {
    "text": "text",
    "special": "special token",
    "seen": "visible image token",
    "masked": "masked image token",
    "padding": "padding",
}
_ALLOWED, _AHEAD, _FORBIDDEN, _PADDING = (47, 109, 181), (230, 140, 20), (240, 241, 243), (170, 176, 183)
_ATTENTION_PIXELS = 640


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that is shown."""

    title: str
    sets: list[SetFacts]
    samples: list[list[SampleView]]
    """Of each set."""
    stream: StreamFacts
    rows: list[RowView]
    attention: AttentionView | None


def render(page: Page) -> str:
    """The HTML file."""
    several = len(page.sets) > 1
    sections = [
        (f"set-{k}", facts.name if several else "The data set", _set_section(facts, k)) for k, facts in enumerate(page.sets)
    ]
    sections += [
        ("packing", "Rows and packing", _stream_section(page.stream)),
        ("samples", "Samples", _samples_section(page)),
        ("tokens", "What the model reads", _rows_section(page)),
    ]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in sections)
    body = "".join(f'<section id="{anchor}"><h2>{escape(name)}</h2>{content}</section>' for anchor, name, content in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(page.title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><header><h1>{escape(page.title)}</h1>{_tiles(page)}"
        f'<nav aria-label="Sections">{links}</nav></header><main>{body}</main>'
        f'<footer class="soft">Made by tools/inspect_data.py.</footer></body></html>\n'
    )


def _tiles(page: Page) -> str:
    chosen = page.stream.chosen
    tiles = {
        "samples": figure("samples", sum(facts.samples for facts in page.sets)),
        "images": figure("images", sum(split.images for facts in page.sets for split in facts.splits)),
        "text tokens": figure("text_tokens", sum(split.text_tokens for facts in page.sets for split in facts.splits)),
        "in shards": figure("bytes", (count := sum(facts.bytes for facts in page.sets)), of_bytes(count)),
        f"of {chosen.sequence_length:,} positions used": percent("used", chosen.used),
        "documents in a row": figure("documents_per_row", chosen.documents_per_row, f"{chosen.documents_per_row:.2f}"),
    }
    return f'<dl class="tiles">{"".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items())}</dl>'


# --- a data set -----------------------------------------------------------------------------------------------------------------


def _set_section(facts: SetFacts, k: int) -> str:
    index = facts.index
    teacher = "none" if index.teacher is None else f"{index.teacher.get('fingerprint')}, {index.teacher.get('features')} features"
    stored = {"pictures": index.pictures, "moments": index.moments, "moments of the mirrored pictures": index.flipped}
    about = {
        "path": facts.path,
        "made by": index.made_by,
        "codec": index.codec,
        "images": f"{index.image_size} x {index.image_size} pixels, {index.num_tokens} tokens of {index.channels} numbers",
        "stored": [name for name, is_stored in stored.items() if is_stored],
        "tokenizer": index.tokenizer,
        "teacher": teacher,
        "languages": index.languages,
        "checksum": facts.fingerprint,
    }
    return (
        names_and_words(about, title="What it is")
        + _counts(facts, k)
        + _report(facts)
        + f"<h3>Lengths</h3><p class=soft>{_looked_at(facts)}</p>"
        + _charts(facts, k)
    )


def _counts(facts: SetFacts, k: int) -> str:
    fields = ("samples", "pairs", "content", "images", "painted", "texts", "text_tokens", "shards")
    said = {"painted": "content to paint", "text_tokens": "text tokens", "pairs": "pairs", "texts": "texts"}
    rows = [
        [
            split.split,
            *(figure(f"sets.{k}.{split.split}.{name}", getattr(split, name)) for name in fields),
            figure(f"sets.{k}.{split.split}.bytes", split.bytes, of_bytes(split.bytes)),
        ]
        for split in facts.splits
    ]
    counts = table(["split", *(said.get(name, name) for name in fields), "size"], rows, title="Counts; exact")
    languages = sorted({name for split in facts.splits for name in split.texts_by_language})
    rows = [
        [
            escape(name),
            *(figure(f"sets.{k}.{split.split}.language.{name}", split.texts_by_language.get(name, 0)) for split in facts.splits),
        ]
        for name in languages
    ]
    return counts + table(["texts", *(split.split for split in facts.splits)], rows, title="Texts by language; exact")


def _report(facts: SetFacts) -> str:
    if facts.report is None:
        return ""
    hidden = {"directory"}
    shown = {name: value for name, value in facts.report.items() if name not in hidden}
    return f"<h3>Preparation</h3>{names_and_words(shown, title='report.json, as it was written')}"


def _looked_at(facts: SetFacts) -> str:
    if facts.looked_at == facts.samples:
        return "Of all samples; a pair counts with one of its captions."
    return (
        f"Of {facts.looked_at:,} of {facts.samples:,} samples, and of no more than {MOST_LOOKED_AT:,} texts, each at a random "
        "place in one of equal stretches of the index; a pair counts with one of its captions."
    )


def _charts(facts: SetFacts, k: int) -> str:
    charts = [chart(histogram, fact=f"sets.{k}.tokens.{n}") for n, histogram in enumerate(facts.text_tokens)]
    for name, histogram in (("lengths", facts.lengths), ("images_of", facts.images), ("aspects", facts.aspects)):
        charts += [chart(histogram, fact=f"sets.{k}.{name}")] if histogram else []
    html = f'<div class="charts">{"".join(charts)}</div>'
    if facts.aspects is None and any(split.images for split in facts.splits):
        html += (
            '<p class="soft">No aspect ratios of the pictures as they were before they were cut: the samples’ json has neither '
            "<code>width</code> and <code>height</code> nor <code>original_size</code>.</p>"
        )
    elif facts.aspects is not None:
        html += f'<p class="soft">Width by height was read from the json of {facts.aspects_read:,} samples, evenly spread.</p>'
    return html


# --- the stream -----------------------------------------------------------------------------------------------------------------


def _stream_section(stream: StreamFacts) -> str:
    rows, chosen = [], []
    for number, facts in enumerate(stream.table):
        name = f"packing.{facts.sequence_length}.{'packed' if facts.packing else 'single'}"
        if facts is stream.chosen:
            chosen.append(number)
        rows.append(
            [
                f"{facts.sequence_length:,}",
                "as many as fit" if facts.packing else "one",
                figure(f"{name}.rows", facts.rows),
                percent(f"{name}.used", facts.used),
                figure(f"{name}.documents_per_row", facts.documents_per_row, f"{facts.documents_per_row:.2f}"),
                figure(f"{name}.images_per_row", facts.images_per_row, f"{facts.images_per_row:.2f}"),
                percent(f"{name}.cut", facts.cut),
            ]
        )
    head = ["sequence length", "documents in a row", "rows", "positions used", "documents a row", "images a row", "cut off"]
    return (
        f"<p>The first {stream.window:,} documents of the training stream, in rows of several lengths. In bold: as it is set, "
        f"<code>sequence_length {stream.sequence_length}</code>, <code>packing {str(stream.packing).lower()}</code>.</p>"
        + table(head, rows, title=f"{stream.window:,} documents", chosen=chosen)
        + _shares(stream.tasks, "task")
        + _shares(stream.sources, "source")
    )


def _shares(shares: Sequence[Share], of: str) -> str:
    rows = [
        [
            escape(share.name),
            percent(f"{of}.{share.name}.documents", share.documents),
            percent(f"{of}.{share.name}.positions", share.positions),
            figure(f"{of}.{share.name}.images", share.images),
            figure(f"{of}.{share.name}.painted", share.painted),
            figure(f"{of}.{share.name}.labels", share.labels),
        ]
        for share in shares
    ]
    head = [of, "of documents", "of positions", "images", "images to paint", "text tokens to learn"]
    return table(head, rows, title=f"By {of}, at the length that is set")


# --- samples --------------------------------------------------------------------------------------------------------------------


def _samples_section(page: Page) -> str:
    parts = ["<p>Evenly spread over each split, with all captions.</p>"]
    for facts, samples in zip(page.sets, page.samples, strict=True):
        if len(page.sets) > 1:
            parts.append(f"<h3>{escape(facts.name)}</h3>")
        if facts.index.moments and not facts.index.pictures:
            parts.append('<p class="soft">No pictures: the codec’s moments are stored, the pixels are not.</p>')
        parts.append(f'<div class="sheet">{"".join(_sample(sample) for sample in samples)}</div>')
    return "".join(parts)


def _sample(sample: SampleView) -> str:
    tag = f'<p class="tag">{sample.split} {sample.number:,} <code>{escape(sample.key)}</code></p>'
    if sample.damage is not None:
        return f"<figure><figcaption>{tag}<p>Cannot be decoded: {escape(sample.damage)}</p></figcaption></figure>"
    alt = shorten(caption_of(sample), _MOST_ALT)
    pictures = "".join(image(pixels, alt=alt) for pixels in sample.pictures[:_MOST_PICTURES])
    if len(sample.pictures) > 1:
        pictures = f'<div class="several">{pictures}</div>'
    if len(sample.pictures) > _MOST_PICTURES:
        pictures += f'<p class="tag">and {len(sample.pictures) - _MOST_PICTURES} more</p>'
    return f"<figure>{pictures}<figcaption>{_texts(sample)}{tag}</figcaption></figure>"


def caption_of(sample: SampleView) -> str:
    """One line that stands for the sample's pictures."""
    if sample.content is not None:
        return " ".join(part["text"].strip() for part in sample.content if "text" in part) or f"picture of {sample.key}"
    return " / ".join(texts[0] for texts in sample.captions.values() if texts)


def _texts(sample: SampleView) -> str:
    if sample.content is not None:
        said = []
        for part in sample.content:
            text = f"[image {part['image']}]" if "image" in part else shorten(part["text"], _MOST_TEXT)
            said.append(f"<u>{escape(text)}</u>" if part.get("learn") else escape(text))
        return f"<p>{' '.join(said)}</p>"
    return "".join(
        f'<p lang="{escape(language)}">{escape(shorten(text, _MOST_TEXT))}</p>'
        for language, texts in sample.captions.items()
        for text in texts
    )


# --- rows -----------------------------------------------------------------------------------------------------------------------


def _rows_section(page: Page) -> str:
    swatches = "".join(f'<li><span class="cells"><i class="{kind}"></i></span>{said}</li>' for kind, said in _SAID.items())
    legend = (
        f'<ul class="legend" aria-label="Legend">{swatches}<li><span class="cells"><i class="text learned"></i></span>'
        "learned: predicted from the position before it</li></ul>"
    )
    intro = (
        f"<p>The first {len(page.rows):,} rows of the training stream, position by position; each box is a document. Its images "
        "are beside it, what is masked in them hatched in grey. Point at a position to see its token.</p>"
    )
    attention = _attention(page.attention) if page.attention else ""
    return intro + legend + "".join(_row(row, number) for number, row in enumerate(page.rows)) + attention


def _row(row: RowView, number: int) -> str:
    used = len(row.cells) - row.count("padding")
    boxes, begin = [], 0
    for document in row.documents:
        boxes.append(_document(document, row.cells[begin : begin + document.length]))
        begin += document.length
    if row.cells[begin:]:
        boxes.append(f'<div class="document rest"><div><h4>padding</h4>{_cells(row.cells[begin:])}</div></div>')
    skipped = f", {row.skipped} that cannot be decoded" if row.skipped else ""
    return (
        f'<article class="row" data-row="{number}"><h3>Row {number}: {len(row.documents)} documents{skipped}, {used:,} of '
        f"{len(row.cells):,} positions</h3>{''.join(boxes)}</article>"
    )


def _document(document: DocumentView, cells: Sequence[Cell]) -> str:
    learned = f", {document.labels} text tokens learned" if document.labels else ""
    cut = ", cut off" if document.truncated else ""
    head = (
        f"{document.task}, {document.length} positions{learned}{cut} · {document.source}: {document.key}, epoch {document.epoch}"
    )
    figures = []
    for view in document.images:
        said = f"{view.masked} of {view.tokens} masked" if view.masked else "all visible"
        if view.picture is None:
            figures.append(f'<figure><figcaption class="soft">image without stored pixels, {said}</figcaption></figure>')
        else:
            alt = shorten(document.text, _MOST_ALT) or f"picture of {document.key}"
            picture = image(view.picture, alt=alt)
            figures.append(f'<figure>{picture}<figcaption class="soft">{said}</figcaption></figure>')
    return f'<div class="document"><div><h4>{escape(head)}</h4>{_cells(cells)}</div>{"".join(figures)}</div>'


def _cells(cells: Sequence[Cell]) -> str:
    return f'<div class="cells">{"".join(map(_cell, cells))}</div>'


def _cell(cell: Cell) -> str:
    learned = " learned" if cell.learned else ""
    if cell.kind == "padding":
        said = "padding"
    elif cell.place >= 0:
        said = f"{cell.position}: image {cell.image}, token {cell.place}, {'masked' if cell.kind == 'masked' else 'visible'}"
    else:
        text = cell.text or "part of a character"
        said = f"{cell.position}: {text} (token {cell.token}{', learned' if cell.learned else ''})"
    return f'<i class="{cell.kind}{learned}" title="{escape(said)}">{escape(cell.text)}</i>'


def _attention(view: AttentionView) -> str:
    size = len(view.allowed_SS)
    position_S = np.arange(size)
    ahead_SS = view.allowed_SS & (position_S[None, :] > position_S[:, None])
    pixels = np.full((size, size, 3), _FORBIDDEN, dtype=np.uint8)
    pixels[view.allowed_SS] = _ALLOWED
    pixels[ahead_SS] = _AHEAD
    pixels[view.allowed_SS & view.padding_S[:, None]] = _PADDING
    scale = max(1, _ATTENTION_PIXELS // size)
    picture = Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1))
    part = "" if view.whole else f", its first {size:,} positions"
    alt = (
        f"Attention within row {view.row}{part}: {size:,} queries downwards, as many keys to the right; {view.share:.1%} of the "
        "pairs are allowed: lower triangles, one for each document, and full squares within them, one for each image."
    )
    legend = "".join(
        f'<li><span class="swatch" style="background:rgb{colour}"></span>{said}</li>'
        for colour, said in (
            (_ALLOWED, "at or before the query"),
            (_AHEAD, "after it, within its image"),
            (_FORBIDDEN, "not allowed"),
            (_PADDING, "padding, which sees padding alone"),
        )
    )
    return (
        f'<h3>Attention within row {view.row}{part}</h3><figure class="attention"><ul class="legend">{legend}</ul>'
        f'<img class="pixels" width="{picture.width}" height="{picture.height}" src="{data_uri(picture, lossless=True)}" '
        f'alt="{escape(alt)}"><figcaption class="soft">Downwards the queries, to the right the keys; '
        f"{percent('attention.share', view.share)} of the pairs are allowed.</figcaption></figure>"
    )
