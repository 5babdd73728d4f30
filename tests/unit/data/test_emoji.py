import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmar_megatron.data.codec import PatchCodec
from mmar_megatron.data.emoji import (
    NAMES,
    PICTURES,
    Name,
    captions,
    join,
    make_emoji,
    on_white,
    parse_names,
    parse_pictures,
    read_members,
    split_of,
)
from mmar_megatron.data.index import Index
from mmar_megatron.data.shards import ShardReader
from mmar_megatron.data.verify import verify

CACHE = Path(__file__).resolve().parents[3] / ".cache" / "npm"


def png(colour: tuple[int, int, int, int] = (0, 0, 0, 255)) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), colour).save(file, format="PNG")
    return file.getvalue()


def names(language: str) -> dict[str, Name]:
    skins = [{"hexcode": f"270B-1F3F{tone}", "label": f"{language} hand, tone {tone}"} for tone in "BCDEF"]
    return parse_names(
        [
            {"hexcode": "270B", "label": f"{language} hand", "tags": ["stop", "five"], "skins": skins},
            {"hexcode": "2764-FE0F", "label": f"{language} heart"},
        ]
    )


ENTRIES: list[dict[str, Any]] = [
    {
        "unified": "270B",
        "image": "270b.png",
        "skin_variations": {
            f"1F3F{tone}": {"unified": f"270B-1F3F{tone}", "image": f"270b-1f3f{tone.lower()}.png"} for tone in "BCDEF"
        },
    },
    {"unified": "2764-FE0F", "image": "2764-fe0f.png"},
    {"unified": "1F9FF", "image": "1f9ff.png"},
    {"unified": "1F600", "image": "not-drawn-in-this-style.png"},
]
IMAGES = dict.fromkeys(
    ["270b.png", *(f"270b-1f3f{tone}.png" for tone in "bcdef"), "2764-fe0f.png", "1f9ff.png"],
    png(),
)


@pytest.mark.parametrize("skin_tones", [0, 1, 3, 25])
def test_join_of_a_tiny_tree(skin_tones: int) -> None:
    pictures = {style: list(parse_pictures(ENTRIES, IMAGES)) for style in ("Noto", "Twemoji")}
    records, dropped = join(pictures, {"en": names("en"), "zh": names("zh")}, image_size=32, skin_tones=skin_tones)
    kept = min(skin_tones, 5)
    assert len(records) == 2 * (2 + kept)
    assert dropped == {"without a name": 2} | ({"skin-tone variants": 2 * (5 - kept)} if kept < 5 else {})
    by_key = {record.key: record for record in records}
    assert {"noto_270b", "noto_2764", "twemoji_270b", "twemoji_2764"} <= by_key.keys()
    assert by_key["noto_2764"].captions == {"en": ["a Noto emoji of en heart"], "zh": ["Noto表情：zh heart"]}
    assert by_key["noto_270b"].captions["en"][1] == "a Noto emoji of en hand (stop, five)"
    variants = [record for key, record in by_key.items() if "-1f3f" in key]
    assert all(record.captions["en"][1].endswith("(stop, five)") for record in variants)
    assert all(record.extra["base"] == "270B" for record in variants)
    assert [record.split for record in records] == sorted(record.split for record in records)


def test_captions_with_and_without_tags() -> None:
    name = {"en": Name(label="pea pod", tags=("beans", "edamame")), "zh": Name(label="豌豆荚", tags=("毛豆", "豌豆"))}
    assert captions(name, style="Twemoji") == {
        "en": ["a Twemoji emoji of pea pod", "a Twemoji emoji of pea pod (beans, edamame)"],
        "zh": ["Twemoji表情：豌豆荚", "Twemoji表情：豌豆荚（毛豆、豌豆）"],
    }


def test_split_is_by_base_and_about_a_sixteenth() -> None:
    bases = [f"1F{number:03X}" for number in range(4096)]
    held_out = [split_of(base) == "validation" for base in bases]
    assert 0.05 < sum(held_out) / len(bases) < 0.075
    assert held_out == [split_of(base) == "validation" for base in bases]


def test_transparent_pictures_lie_on_white() -> None:
    np.testing.assert_array_equal(on_white(png((0, 0, 0, 0)), image_size=32), np.full((32, 32, 3), 255))
    half = on_white(png((255, 0, 0, 128)), image_size=32)
    np.testing.assert_array_equal(half, np.broadcast_to([255, 127, 127], (32, 32, 3)))


def tarball(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def test_members_of_a_package(tmp_path: Path) -> None:
    file = tarball(tmp_path / "p.tgz", {"emoji.json": b"[]", "img/a/64/1.png": b"one", "img/a/32/1.png": b"small"})
    assert read_members(file, wanted=["emoji.json", "img/a/64/"]) == {"emoji.json": b"[]", "img/a/64/1.png": b"one"}


def packages_are_cached() -> bool:
    return all((CACHE / package.file_name).is_file() for package in (NAMES, *PICTURES.values()))


@pytest.mark.skipif(not packages_are_cached(), reason="run `python tools/prepare_data.py emoji` once to fetch the packages")
def test_the_real_packages(tmp_path: Path) -> None:
    codec = PatchCodec(image_size=32, patch_size=4)
    report = make_emoji(tmp_path / "emoji", codec=codec, cache=CACHE, log=lambda _: None)
    assert sum(report.samples.values()) + sum(report.dropped.values()) == 7572
    assert report.dropped.keys() == {"skin-tone variants"}
    assert report.caption_tokens["en"].mean == pytest.approx(23.66, abs=0.01)
    assert report.caption_tokens["zh"].mean == pytest.approx(15.37, abs=0.01)

    index, _ = verify(tmp_path / "emoji")
    readers = [ShardReader(tmp_path / "emoji", index=index, split=split) for split in ("train", "validation")]
    bases = [{reader.metadata(number)["base"] for number in range(len(reader))} for reader in readers]
    assert not bases[0] & bases[1]
    assert len(bases[0] | bases[1]) == 1911
    assert Index.load(tmp_path / "emoji").made_by["source"] == "emoji"
    texts = [text for reader in readers for number in range(len(reader)) for text in reader.metadata(number)["captions"]["en"]]
    assert len(set(texts)) == len(texts)
