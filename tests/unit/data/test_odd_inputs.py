"""What people's collections hold beside pictures and captions."""

import base64
import datetime
import io
import json
import os
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from mmar_megatron.data.content import conversation_parts, cut_text
from mmar_megatron.data.index import Index
from mmar_megatron.data.preparation.documents import DocumentSource
from mmar_megatron.data.preparation.folders import FolderSource
from mmar_megatron.data.preparation.records import CaptionFields
from mmar_megatron.data.preparation.tables import TableSource
from mmar_megatron.data.preparation.unfinished import Unfinished
from tests.unit.data.sources import contents, encoded, picture, prepare, samples_of, scene

EN = CaptionFields.parse(["en=caption"])


def folder(directory: Path, names: str = "ab") -> Path:
    directory.mkdir()
    for number, name in enumerate(names):
        (directory / f"{name}.jpg").write_bytes(picture(number))
        (directory / f"{name}.txt").write_text("one")
    return directory


def test_links_that_lead_nowhere_are_missing_pictures(tmp_path: Path) -> None:
    pictures = folder(tmp_path / "in")
    (pictures / "gone.jpg").symlink_to(pictures / "nothing.jpg")
    (pictures / "loop.jpg").symlink_to(pictures / "loop.jpg")
    for name in ("gone", "loop"):
        (pictures / f"{name}.txt").write_text("one")
    (pictures / "c.jpg").write_bytes(picture(2))
    (pictures / "c.txt").mkdir()
    report = prepare(tmp_path / "out", FolderSource(pictures, captions=EN, language="en"))
    assert report.dropped == {"missing picture": 2, "missing caption": 1}
    assert sorted(samples_of(tmp_path / "out")) == ["a", "b"]


def test_a_name_in_another_encoding_is_named(tmp_path: Path) -> None:
    pictures = folder(tmp_path / "in")
    with open(os.fsencode(pictures) + b"/k\xe4se.jpg", "wb") as file:
        file.write(picture(2))
    with pytest.raises(ValueError, match=r"in holds b'k\\xe4se.jpg', whose name is not UTF-8: rename it"):
        prepare(tmp_path / "out", FolderSource(pictures, captions=EN, language="en"))


def rows_file(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_half_of_a_surrogate_pair_is_unfit(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(0))
    (tmp_path / "b.jpg").write_bytes(picture(1))
    table = rows_file(
        tmp_path / "t.jsonl",
        {"image": "a.jpg", "caption": "cut \ud83d", "note": ""},
        {"image": "a.jpg", "caption": "one", "note": "\ude00"},
        {"image": "a\ud83d.jpg", "caption": "one", "note": ""},
        {"image": "a.jpg", "caption": "one", "note": ""},
        {"image": "b.jpg", "caption": "two", "note": ""},
    )
    report = prepare(tmp_path / "pairs", TableSource([table], captions=EN, image="image", keep=["note"]))
    assert report.dropped == {"unfit content": 2, "undecodable picture": 1}
    texts = rows_file(tmp_path / "x.jsonl", {"text": "cut \ud83d"}, {"text": "one"}, {"text": "two"})
    assert prepare(tmp_path / "texts", DocumentSource([texts], kind="text")).dropped == {"unfit content": 1}


def test_what_is_kept_is_json_and_replaces_nothing(tmp_path: Path) -> None:
    columns = {
        "image": [picture(0), picture(1)],
        "caption": ["one", "two"],
        "when": [datetime.date(2020, 1, 31), None],
        "raw": [b"x", b"y"],
        "content": ["x", "y"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")

    def source(*keep: str) -> TableSource:
        return TableSource([tmp_path / "t.parquet"], captions=EN, image="image", keep=keep)

    prepare(tmp_path / "out", source("when"))
    assert {sample.metadata["when"] for sample in samples_of(tmp_path / "out").values()} == {"2020-01-31", None}
    with pytest.raises(ValueError, match=r"--keep raw holds bytes, which json cannot: leave it out"):
        prepare(tmp_path / "bytes", source("raw"))
    with pytest.raises(ValueError, match=r"--keep content would take the place of what the loader reads"):
        source("content")


def test_rows_of_json_need_not_all_be_alike(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(0))
    (tmp_path / "b.jpg").write_bytes(picture(1))
    rows = rows_file(tmp_path / "t.jsonl", 5, {"image": "a.jpg"}, *({"caption": "one", "image": f"{name}.jpg"} for name in "ab"))
    report = prepare(tmp_path / "out", TableSource([rows], captions=EN, image="image"))
    assert (report.pictures, report.dropped) == (2, {"missing caption": 1, "unfit content": 1})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.csv",
            b"image,caption\na.jpg,one\rtwo\nb.jpg,two\n",
            r"t.csv is no table before byte 28 \(new-line .*\): quote the field",
        ),
        ("t.csv", b"image,caption\ra.jpg,one\r", r"t.csv is no table before byte 24 \(new-line .*\): quote the field"),
        ("t.json", b'[{"image": "a.jpg", "caption": "\xe4"}]', r"t.json is not UTF-8 \(.*\): convert it"),
        ("t.jsonl", b"5\n", r"t.jsonl has no rows, or none with named fields: name one that has"),
    ],
)
def test_files_that_are_no_tables_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "out", TableSource([tmp_path / name], captions=EN, image="image"))


def test_base64_in_lines_and_shorter_than_a_path(tmp_path: Path) -> None:
    small = encoded(scene(0, width=16, height=12), format="PNG")
    other = encoded(scene(1, width=16, height=12), format="PNG")
    lines = base64.encodebytes(other).decode()
    assert len(lines) < 4096
    rows = rows_file(
        tmp_path / "t.jsonl",
        {"image": base64.b64encode(small).decode(), "caption": "one"},
        {"image": f"data:image/png;base64,{lines}", "caption": "two"},
    )
    report = prepare(tmp_path / "out", TableSource([rows], captions=EN, image="image"))
    assert (report.pictures, report.dropped) == (2, {})


def test_of_one_record_none_is_held_out(tmp_path: Path) -> None:
    report = prepare(tmp_path / "out", FolderSource(folder(tmp_path / "in", "a"), captions=EN, language="en"))
    assert report.samples == {"train": 1, "validation": 0}


def test_a_system_that_says_nothing_is_no_conversation() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert conversation_parts([{"from": "system", "value": None}, *turns], pictures=0) is None


def test_killed_after_the_data_set_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FolderSource(folder(tmp_path / "in", "abcd"), captions=EN, language="en")
    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "remove", Unfinished.release)
        prepare(tmp_path / "out", source)
    expected = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    prepare(tmp_path / "out", source)
    assert contents(tmp_path / "out") == expected


def test_the_locale_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FolderSource(folder(tmp_path / "Käse", "abcd"), captions=EN, language="en")
    monkeypatch.setattr(io, "text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")  # what files are opened with
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Unfinished, "finish", lambda self: raise_(KeyboardInterrupt))
        prepare(tmp_path / "out", source)
    prepare(tmp_path / "out", source)
    assert Index.load(tmp_path / "out").made_by["directory"] == str(tmp_path / "Käse")


def raise_(error: type[BaseException]) -> None:
    raise error


@pytest.mark.parametrize("word", [7, 100])
def test_cutting_a_book_takes_time_in_proportion(word: int) -> None:
    counted = []

    def count(text: str) -> int:
        counted.append(len(text))
        return len(text.split())

    book = ("x" * word + " ") * 20_000
    pieces = cut_text(book, count=count, longest=100)
    assert "".join(pieces) == book
    assert {len(piece.split()) for piece in pieces[:-1]} <= {99, 100}
    assert sum(counted) < 10 * len(book)


def test_no_records_at_all(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,caption\n")
    with pytest.raises(ValueError, match="there are no records in the input"):
        prepare(tmp_path / "out", TableSource([tmp_path / "t.csv"], captions=EN, image="image"))


def test_captions_that_are_not_by_language(tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "t.jsonl", {"image": "a.jpg", "captions": {str(k): "one" for k in range(65)}})
    with pytest.raises(ValueError, match=r"more than 64 languages, such as '64' of t/000000000: "):
        prepare(tmp_path / "out", TableSource([rows], captions=CaptionFields(()), image="image"))
