"""The `emoji` data set: Noto and Twemoji pictures with their names and tags from CLDR, in English and Chinese.

The sources are pinned npm packages, fetched once into a cache. A picture and a name belong together where their code points
agree, U+FE0F (which only asks for the coloured glyph) left out. H = W pixels.

Of the 7,572 pictures 3,750 are skin-tone variants, up to 25 of one emoji: half of what the model sees would be variations on a
few themes. So of each emoji in each style the base itself is kept and, chosen by a hash, `skin_tones` of its variants.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmar_megatron.data.codec import ImageCodec
from mmar_megatron.data.index import Split
from mmar_megatron.data.npm import Package, fetch
from mmar_megatron.data.prepare import Record, Report, write_dataset

LANGUAGES = ("en", "zh")
_HELD_OUT_OF_256 = 16


NAMES = Package(
    name="emojibase-data",
    version="17.0.0",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
PICTURES = {
    "Noto": Package(
        name="emoji-datasource-google",
        version="16.0.0",
        sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "Twemoji": Package(
        name="emoji-datasource-twitter",
        version="16.0.0",
        sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
}
"""By style. Noto: Apache-2.0; Twemoji: CC-BY 4.0; the names: MIT."""


def read_members(tarball: Path, *, wanted: Sequence[str]) -> dict[str, bytes]:
    """Content by name of the files of an npm tarball whose names begin like one of `wanted`, the leading "package/" left out."""
    members = {}
    with tarfile.open(tarball, "r|gz") as tar:
        for member in tar:
            name = member.name.removeprefix("package/")
            if member.isfile() and name.startswith(tuple(wanted)):
                stream = tar.extractfile(member)
                assert stream is not None
                members[name] = stream.read()
    return members


@dataclass(frozen=True, kw_only=True)
class Name:
    """What an emoji is called."""

    label: str
    tags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One emoji in one style."""

    code: str
    """Code points in hexadecimal, joined by "-", without FE0F."""
    base: str
    """The code of the emoji without skin tones."""
    image: bytes
    """PNG."""


def plain_code(code: str) -> str:
    """The code without the variation selector, which the two sources set differently."""
    return "-".join(point for point in code.upper().split("-") if point != "FE0F")


def parse_names(entries: Sequence[Mapping[str, Any]]) -> dict[str, Name]:
    """`data.json` of a language of emojibase -> names by plain code; skin-tone variants have the tags of their base."""
    return {
        plain_code(variant["hexcode"]): Name(label=variant["label"], tags=tuple(entry.get("tags", ())))
        for entry in entries
        for variant in (entry, *entry.get("skins", ()))
    }


def parse_pictures(entries: Sequence[Mapping[str, Any]], images: Mapping[str, bytes]) -> Iterator[Picture]:
    """`emoji.json` of an emoji-datasource and its images by file name -> the pictures that there are."""
    for entry in entries:
        for variant in (entry, *entry.get("skin_variations", {}).values()):
            if variant["image"] in images:
                yield Picture(
                    code=plain_code(variant["unified"]), base=plain_code(entry["unified"]), image=images[variant["image"]]
                )


def captions(name: Mapping[str, Name], *, style: str) -> dict[str, list[str]]:
    """By language, with and without the tags: "a Twemoji emoji of pea pod (beans, edamame)"."""
    en, zh = name["en"], name["zh"]
    plain = {"en": f"a {style} emoji of {en.label}", "zh": f"{style}表情：{zh.label}"}
    tagged = {"en": f"{plain['en']} ({', '.join(en.tags)})", "zh": f"{plain['zh']}（{'、'.join(zh.tags)}）"}
    return {language: [plain[language], *([tagged[language]] if name[language].tags else [])] for language in LANGUAGES}


def split_of(base: str) -> Split:
    """By a hash of the base's code, so that a held-out emoji is held out in all styles and skin tones: about one in sixteen."""
    return "validation" if hashlib.sha256(base.encode()).digest()[0] < _HELD_OUT_OF_256 else "train"


def join(
    pictures: Mapping[str, Sequence[Picture]],
    names: Mapping[str, Mapping[str, Name]],
    *,
    image_size: int,
    skin_tones: int,
) -> tuple[list[Record], dict[str, int]]:
    """Pictures by style and names by language -> records, the training samples first, and what was dropped, by reason."""
    records: list[Record] = []
    dropped: Counter[str] = Counter()
    for style, of_style in pictures.items():
        kept = _kept_variants(of_style, style=style, skin_tones=skin_tones)
        for picture in of_style:
            if any(picture.code not in names[language] for language in LANGUAGES):
                dropped["without a name"] += 1
            elif picture.code != picture.base and picture.code not in kept:
                dropped["skin-tone variants"] += 1
            else:
                records.append(_record(picture, {lang: names[lang][picture.code] for lang in LANGUAGES}, style, image_size))
    records.sort(key=lambda record: record.split != "train")
    return records, dict(dropped)


def _kept_variants(pictures: Sequence[Picture], *, style: str, skin_tones: int) -> set[str]:
    variants: dict[str, list[str]] = {}
    for picture in pictures:
        if picture.code != picture.base:
            variants.setdefault(picture.base, []).append(picture.code)

    def by_hash(code: str) -> bytes:
        return hashlib.sha256(f"{style} {code}".encode()).digest()

    return {code for codes in variants.values() for code in sorted(codes, key=by_hash)[:skin_tones]}


def _record(picture: Picture, name: Mapping[str, Name], style: str, image_size: int) -> Record:
    return Record(
        key=f"{style.lower()}_{picture.code.lower()}",
        split=split_of(picture.base),
        captions=captions(name, style=style),
        image=partial(on_white, picture.image, image_size=image_size),
        extra={"base": picture.base, "style": style},
    )


def on_white(encoded: bytes, *, image_size: int) -> NDArray[np.uint8]:
    """A picture with transparency -> uint8 [H, W, 3] on white."""
    # First the white, then the resizing: the colour under transparent pixels, often black, must not reach the edges.
    with Image.open(io.BytesIO(encoded)) as file:
        picture = file.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    return np.asarray(flat.resize((image_size, image_size), Image.Resampling.LANCZOS))


def make_emoji(
    out: str | Path,
    *,
    codec: ImageCodec,
    cache: str | Path,
    skin_tones: int = 5,
    tokenizer: str | None = None,
    vocab_size: int = 3072,
    log: Callable[[str], None] = print,
) -> Report:
    """Makes the `emoji` data set.

    Args:
        out: directory to make.
        codec: the pictures are resized for it.
        cache: directory that keeps the fetched packages.
        skin_tones: number of skin-tone variants kept for each base emoji and style; 25 keeps all.
        tokenizer, vocab_size, log: see `write_dataset`.

    Raises:
        ValueError: `out` exists; the packages cannot be fetched.
    """
    cache = Path(cache)
    annotations = read_members(fetch(NAMES, cache=cache, log=log), wanted=[f"{language}/data.json" for language in LANGUAGES])
    names = {language: parse_names(json.loads(annotations[f"{language}/data.json"])) for language in LANGUAGES}
    pictures = {}
    for style, package in PICTURES.items():
        folder = f"img/{package.name.rpartition('-')[2]}/64/"
        members = read_members(fetch(package, cache=cache, log=log), wanted=["emoji.json", folder])
        images = {name.removeprefix(folder): content for name, content in members.items()}
        pictures[style] = list(parse_pictures(json.loads(members["emoji.json"]), images))
    records, dropped = join(pictures, names, image_size=codec.image_size, skin_tones=skin_tones)
    made_by = {
        "source": "emoji",
        "packages": [f"{p.name}@{p.version}" for p in (NAMES, *PICTURES.values())],
        "skin_tones": skin_tones,
    }
    return write_dataset(
        out,
        records=records,
        codec=codec,
        made_by=made_by,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        dropped=dropped,
        log=log,
    )
