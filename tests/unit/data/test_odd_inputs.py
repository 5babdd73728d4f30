"""What people's collections hold beside pictures and captions."""

import os
from pathlib import Path

import pytest

from mmar_megatron.data.preparation.folders import FolderSource
from mmar_megatron.data.preparation.records import CaptionFields
from tests.unit.data.sources import picture, prepare, samples_of

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
