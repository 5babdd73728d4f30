import base64
import csv
import datetime
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from mmar_megatron.data.content import ANSWER, conversation_parts
from mmar_megatron.data.index import CONTENT, Index
from mmar_megatron.data.preparation import rows as rows_module
from mmar_megatron.data.preparation.documents import DocumentSource, interleaved_parts
from mmar_megatron.data.preparation.folders import FolderSource
from mmar_megatron.data.preparation.pictures import fit, on_white, open_picture
from mmar_megatron.data.preparation.records import CaptionFields, key_of
from mmar_megatron.data.preparation.rows import Rows
from mmar_megatron.data.preparation.tables import TableSource
from mmar_megatron.data.preparation.tars import TarSource
from mmar_megatron.data.tokenizer import load_tokenizer
from tests.unit.data.sources import SIZE, encoded, picture, prepare, samples_of, scene, tokenizer_file, write_tar

EN = CaptionFields.parse(["en=caption"])
BOTH = CaptionFields.parse(["en=caption", "en=other", "zh=caption_zh"])


def pixels(data: bytes) -> np.ndarray:
    return fit(open_picture(data, about=SIZE), image_size=SIZE)


def test_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "no.jpg").write_bytes(picture(9))
    files = {"a.jpg": picture(0), "sub/b.c.png": encoded(scene(1), format="PNG"), "d.webp": encoded(scene(2), format="WEBP")}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "a.txt").write_text("one\n\n two \none\n")
    (folder / "sub" / "b.c.json").write_text(json.dumps({"caption": "three", "caption_zh": ["四", ""]}))
    (folder / "d.json").write_text(json.dumps({"captions": {"de": ["fünf"]}}))
    report = prepare(tmp_path / "out", FolderSource(folder, captions=BOTH, language="fr"))
    samples = samples_of(tmp_path / "out")
    assert {key: sample.captions for key, sample in samples.items()} == {
        "a": {"fr": ["one", "two"]},
        key_of("sub/b.c"): {"en": ["three"], "zh": ["四"]},
        "d": {"de": ["fünf"]},
    }
    np.testing.assert_array_equal(samples["a"].image_HW3, pixels(files["a.jpg"]))
    np.testing.assert_array_equal(samples[key_of("sub/b.c")].image_HW3, pixels(files["sub/b.c.png"]))
    index = Index.load(tmp_path / "out")
    assert index.languages == ["de", "en", "fr", "zh"]
    assert (report.pictures, report.samples["train"] + report.samples["validation"]) == (3, 3)
    assert index.made_by["source"] == "folder"


TABLE: list[dict[str, Any]] = [
    {"id": f"row-{k}", "caption": f'caption {k}, "quoted"\nin two lines', "other": f"other {k}", "caption_zh": f"说明{k}", "n": k}
    for k in range(5)
]


def write_table(folder: Path, suffix: str) -> Path:
    file = folder / f"table{suffix}"
    for k in range(5):
        (folder / f"{k}.jpg").write_bytes(picture(k))
    table = [{**row, "image": f"{row['n']}.jpg"} for row in TABLE]
    if suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    elif suffix == ".jsonl":
        file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in table))
    elif suffix == ".json":
        file.write_text(json.dumps(table, ensure_ascii=False, indent=1))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), file, row_group_size=2)
    return file


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_tables_of_every_kind(tmp_path: Path, suffix: str) -> None:
    file = write_table(tmp_path, suffix)
    source = TableSource([file], captions=BOTH, image="image", key="id", keep=["n"])
    prepare(tmp_path / "out", source)
    samples = samples_of(tmp_path / "out")
    assert samples.keys() == {row["id"] for row in TABLE}
    for row in TABLE:
        sample = samples[row["id"]]
        assert sample.captions == {"en": [row["caption"], row["other"]], "zh": [row["caption_zh"]]}
        assert str(sample.metadata["n"]) == str(row["n"])
        np.testing.assert_array_equal(sample.image_HW3, pixels(picture(row["n"])))


def test_pictures_in_a_table(tmp_path: Path) -> None:
    data = [picture(k) for k in range(3)]
    struct = [{"bytes": data[0], "path": "a.jpg"}, {"bytes": data[1], "path": None}]
    pyarrow.parquet.write_table(pyarrow.table({"image": struct, "caption": ["a", "b"]}), tmp_path / "struct.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"image": data, "caption": [["a"], ["b", "c"], ["d"]]}), tmp_path / "bytes.parquet")
    rows = [{"image": "data:image/jpeg;base64," + base64.b64encode(d).decode(), "caption": "x"} for d in data]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, count in (("struct.parquet", 2), ("bytes.parquet", 3), ("text.jsonl", 3)):
        prepare(tmp_path / f"out-{name}", TableSource([tmp_path / name], captions=EN, image="image"))
        samples = samples_of(tmp_path / f"out-{name}")
        assert len(samples) == count
        for k in range(count):
            sample = samples[key_of(f"{name.partition('.')[0]}/{k:09d}")]
            np.testing.assert_array_equal(sample.image_HW3, pixels(data[k]))


def test_kept_columns_harm_nothing(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(picture(0))
    when = datetime.datetime(2026, 1, 2)
    row = {"image": "0.jpg", "caption": "a", "when": when, "box": [1.5, 2]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "t.parquet")
    source = TableSource([tmp_path / "t.parquet"], captions=EN, image="image", keep=["when", "box"])
    prepare(tmp_path / "out", source, validation=0)
    (sample,) = samples_of(tmp_path / "out").values()
    size = list(Image.open(tmp_path / "0.jpg").size)
    assert sample.metadata == {"captions": {"en": ["a"]}, "when": str(when), "box": [1.5, 2], "original_size": size}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_blocks_can_be_read_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(rows_module, "BLOCK_RECORDS", 2)
    monkeypatch.setattr(rows_module, "_CHUNK", 64)
    source = Rows([write_table(tmp_path, suffix)])
    blocks = list(source.blocks())
    assert [block.records for block in blocks] == [2, 2, 1]
    everything = [(name, row["id"]) for block in blocks for _, name, row in source.read(block) if row]
    assert everything == [(f"table/{k:09d}", f"row-{k}") for k in range(5)]
    assert [row["id"] for block in blocks[:2] for _, _, row in source.read(block, [1]) if row] == ["row-1", "row-3"]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars(tmp_path: Path, format: int) -> None:
    long = "x" * 150
    members = {
        "dir/000.jpg": picture(0),
        "dir/000.txt": b"a text",
        "dir/000.json": json.dumps({"caption": "a json", "url": "u"}).encode(),
        f"{long}.png": encoded(scene(1), format="PNG"),
        f"{long}.txt": "ein Süßer".encode(),
        "002.cls": b"7",
        "002.WEBP": encoded(scene(2), format="WEBP"),
        "002.caption": b"a caption",
    }
    file = write_tar(tmp_path / "some.tar", members, format=format)
    prepare(tmp_path / "out", TarSource([file], captions=EN, language="de"))
    samples = samples_of(tmp_path / "out")
    assert {key: sample.captions for key, sample in samples.items()} == {
        key_of("some/dir/000"): {"en": ["a json"]},
        key_of(f"some/{long}"): {"de": ["ein Süßer"]},
        key_of("some/002"): {"de": ["a caption"]},
    }
    np.testing.assert_array_equal(samples[key_of("some/dir/000")].image_HW3, pixels(members["dir/000.jpg"]))
    assert all(len(key) <= 80 for key in samples)


def test_conversations(tmp_path: Path) -> None:
    for k in range(3):
        (tmp_path / f"{k}.jpg").write_bytes(picture(k))
    ask, say = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}], {"from": "gpt", "value": "no"}
    more = [{"from": "human", "value": "Why {}?"}, {"from": "gpt", "value": "So."}]
    rows: list[dict[str, Any]] = [
        {"id": "same", "image": "0.jpg", "conversations": [*ask, *more]},
        {"id": "same", "image": ["1.jpg", "2.jpg"], "conversations": [{"from": "human", "value": "<image> or <image>?"}, say]},
        {"id": "same", "conversations": more},
        {"id": "same", "image": "gone.jpg", "conversations": ask},
        {"id": "same", "image": ["0.jpg"], "conversations": [{"from": "human", "value": "<image> or <image>?"}, say]},
        {"id": "same", "image": "0.jpg", "conversations": ask[:1]},
    ]
    (tmp_path / "c.json").write_text(json.dumps(rows))
    report = prepare(tmp_path / "out", DocumentSource([tmp_path / "c.json"], kind="conversations"))
    assert report.dropped == {"missing picture": 1, "unfit content": 2}
    samples = samples_of(tmp_path / "out")
    answer = {"learn": True, "end": True}
    assert samples[key_of("c/000000000")].content == [
        {"text": "USER: "},
        {"image": 0},
        {"text": "\nWhat?\nASSISTANT: "},
        {"text": "A cat.", **answer},
        {"text": "USER: Why {}?\nASSISTANT: "},
        {"text": "So.", **answer},
    ]
    two = samples[key_of("c/000000001")]
    assert [part["image"] for part in two.content or [] if "image" in part] == [0, 1]
    np.testing.assert_array_equal(two.images, [pixels(picture(k)) for k in (1, 2)])
    assert samples[key_of("c/000000002")].num_pictures == 0
    index = Index.load(tmp_path / "out")
    assert (index.kind == CONTENT).all()
    assert sorted(index.images.tolist()) == [0, 1, 2]
    encode = load_tokenizer(tokenizer_file()).encode
    number = two.sample_id
    assert index.learned[number] == len(encode(ANSWER.format("no"))) + 1
    total = sum(len(encode(part["text"])) + part.get("end", False) for part in two.content or [] if "text" in part)
    assert index.text_tokens[int(index.text_start[number])] == total


def test_turns_of_another_form_and_pictures_without_a_place() -> None:
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert conversation_parts(turns, pictures=1) == [
        {"text": "S\n"},
        {"text": "USER: "},
        {"image": 0},
        {"text": "Q\nASSISTANT: "},
        {"text": "A", "learn": True, "end": True},
    ]
    for bad in (None, [], [{"from": "gpt", "value": "A"}], [{"from": "human"}, {"from": "gpt", "value": "A"}], ["x"]):
        assert conversation_parts(bad, pictures=0) is None


def test_texts_are_cut_and_their_pieces_make_them_up(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in generator.integers(26, size=generator.integers(1, 9))) for _ in range(60)]
    long, short, dense = " ".join(generator.choice(words, size=700)), "short one", "字" * 500
    rows = [{"text": long}, {"text": short}, {"text": dense}, {"text": " "}, {"text": None}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = prepare(tmp_path / "out", DocumentSource([tmp_path / "t.jsonl"], kind="text"), text_tokens=100)
    assert report.dropped == {"empty text": 2}
    index, samples = Index.load(tmp_path / "out"), samples_of(tmp_path / "out")
    assert int(index.text_tokens.max()) <= 100 + 1  # and the <eos>
    np.testing.assert_array_equal(index.learned, index.text_tokens)
    assert samples[key_of("t/000000001")].content == [{"text": short, "learn": True, "end": True}]
    for row, text in ((0, long), (2, dense)):
        pieces: list[dict[str, Any]] = []
        while (key := key_of(f"t/{row:09d}.{len(pieces)}")) in samples:
            pieces.append((samples[key].content or [])[0])
        assert "".join(piece["text"] for piece in pieces) == text
        assert [piece["end"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        counts = [int(index.text_tokens[samples[key_of(f"t/{row:09d}.{k}")].sample_id]) for k in range(len(pieces) - 1)]
        assert min(counts) > 60


def test_content_in_parts(tmp_path: Path) -> None:
    for k in range(2):
        (tmp_path / f"{k}.jpg").write_bytes(picture(k))
    told = [{"text": "draw", "learn": False}, {"image": "1.jpg", "learn": True}]
    rows = [
        {"content": [{"text": "see"}, {"image": "0.jpg"}, {"text": "and"}, {"image": "1.jpg"}]},
        {"content": told},
        {"content": [{"image": "1.jpg", "learn": True}, {"text": "after it"}]},
        {"content": []},
        {"text": "plain"},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = prepare(tmp_path / "out", DocumentSource([tmp_path / "t.jsonl"], kind="text"))
    assert report.dropped == {"unfit content": 2}
    samples = samples_of(tmp_path / "out")
    assert samples[key_of("t/000000000")].content == [
        {"text": "see", "learn": True},
        {"image": 0},
        {"text": "and", "learn": True},
        {"image": 1, "learn": True},
    ]
    assert samples[key_of("t/000000001")].content == [{"text": "draw", "learn": False}, {"image": 0, "learn": True}]
    index = Index.load(tmp_path / "out")
    assert sorted(index.paints.tolist()) == [0, 1, 1]
    assert interleaved_parts([{"image": "a"}, {"text": "b"}])[-1] == {"text": "b", "learn": True, "end": True}


def test_one_picture_is_held_out_with_all_its_captions(tmp_path: Path) -> None:
    for k in range(6):
        (tmp_path / f"{k}.jpg").write_bytes(picture(k))
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}]
    rows = [{"image": f"{k % 6}.jpg", "conversations": turns} for k in range(60)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare(tmp_path / "out", DocumentSource([tmp_path / "c.jsonl"], kind="conversations"), validation=0.4)
    index, samples = Index.load(tmp_path / "out"), samples_of(tmp_path / "out")
    train = index.ids("train")
    sides: dict[int, set[bool]] = {}
    for k in range(60):
        sides.setdefault(k % 6, set()).add(samples[key_of(f"c/{k:09d}")].sample_id in train)
    assert all(len(side) == 1 for side in sides.values())
    assert {True, False} == set().union(*sides.values())


def test_modes_orientation_and_size() -> None:
    transparent = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(on_white(transparent)).min() == 255
    assert np.asarray(on_white(Image.fromarray(np.full((2, 2), 65535, np.uint16)))).min() == 255
    assert on_white(Image.new("P", (3, 3))).mode == on_white(Image.new("CMYK", (3, 3))).mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    turned = open_picture(encoded(scene(0, width=80, height=40), exif=exif), about=80)
    assert turned.size == (40, 80)
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    fitted = fit(Image.fromarray(wide), image_size=10)
    assert fitted.shape == (10, 10, 3)
    assert fitted[:, 3:-3].min() == 200


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: FolderSource(d / "none", captions=EN, language="en"), "there is no directory .*none"),
        (lambda d: FolderSource(d / "empty", captions=EN, language="en"), "there is no picture in .*empty"),
        (lambda d: TarSource([d / "none.tar"], captions=EN, language="en"), "there is no file .*none.tar"),
        (lambda d: list(TarSource([d / "bad.tar"], captions=EN, language="en").blocks()), "bad.tar is not an uncompressed tar"),
        (lambda d: TableSource([d / "t.xls"], captions=EN, image="image"), r"t.xls is of no known kind: .*\.csv"),
        (lambda d: TableSource([d / "t.csv"], captions=EN, image="picture"), "no column 'picture', but image, text: .* --image"),
        (lambda d: TableSource([d / "t.csv"], captions=EN, image="image"), "no column 'caption', but .* --captions"),
        (lambda d: TableSource([d / "bad.parquet"], captions=EN, image="image"), "bad.parquet is not a whole Parquet file"),
        (lambda d: list(Rows([d / "open.json"]).blocks()), "open.json is not a whole JSON array"),
        (lambda d: list(Rows([d / "lines.json"]).blocks()), "lines.json is not a JSON array: .*name it .jsonl"),
        (lambda d: DocumentSource([d / "t.csv"], kind="conversations"), "neither 'conversations' nor 'messages'"),
        (lambda d: CaptionFields.parse(["en="]), "--captions takes LANGUAGE=COLUMN"),
        (lambda d: Rows([]), "no input file is named"),
    ],
)
def test_bad_inputs_are_refused(tmp_path: Path, make: Any, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.csv").write_text("image,text\na.jpg,hello\n")
    (tmp_path / "t.xls").write_text("")
    for name in ("bad.tar", "bad.parquet"):
        (tmp_path / name).write_text("nothing of the kind " * 100)
    (tmp_path / "open.json").write_text('[{"a": 1}, {"a"')
    (tmp_path / "lines.json").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(ValueError, match=message):
        make(tmp_path)
