"""The command: what it writes and prints, and how it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mmar_megatron.data.codec import PatchCodec
from mmar_megatron.data.prepare import make_shapes
from tests.unit.command_line import SIZES
from tools.inspect_data import main


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inspected") / "shapes"
    make_shapes(out, codec=PatchCodec(image_size=32, patch_size=4), train=20, validation=6, log=lambda _: None)
    return out


def refusal(*options: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*options])
    assert isinstance(ended.value.code, str) and "\n" not in ended.value.code
    return ended.value.code


def test_a_directory(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    main([str(data), "--out", str(out), "--sequence_length", "256", "--rows", "3", "--samples", "4"])
    html = out.read_text()
    assert html.startswith("<!doctype html>") and html.rstrip().endswith("</html>")
    assert html.count("data-row=") == 3
    assert html.count('class="cells"') > 3
    printed = capsys.readouterr()
    assert f"{data}: 20 train, 6 validation" in printed.out
    assert "rows of 256, packed: " in printed.out
    assert f"{out}: " in printed.out
    assert "planning rows" in printed.err
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, config = tmp_path / "report.html", tmp_path / "run.yaml"
    sources = {"one": {"path": str(data), "weight": 3}, "two": {"path": str(data), "weight": 1}}
    config.write_text(yaml.safe_dump({"data": {"sources": sources, "sequence_length": 192}}))
    main(["--config", str(config), *SIZES, "--data.packing", "true", "--out", str(out), "--rows", "1", "--samples", "2"])
    html = out.read_text()
    assert 'data-fact="source.one.documents"' in html and 'data-fact="source.two.documents"' in html
    assert "rows of 192, packed: " in capsys.readouterr().out

    main(["--out", str(out), "--force", "--no-packing", "--sequence_length", "128", "--config", str(config), *SIZES])
    assert "rows of 128, one document a row: " in capsys.readouterr().out


def test_the_same_twice(data: Path, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        main([str(data), "--out", str(tmp_path / name), "--rows", "2", "--samples", "3"])
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    main([str(data), "--out", str(tmp_path / "c.html"), "--rows", "2", "--samples", "3", "--seed", "1"])
    assert (tmp_path / "a.html").read_bytes() != (tmp_path / "c.html").read_bytes()


def test_refusals(data: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "report.html")
    assert refusal(str(tmp_path / "nothing"), "--out", out).startswith(f"error: no data set at {tmp_path / 'nothing'}: make one")
    assert refusal("--out", out) == "error: nothing to look at: give the directory of a data set, or --config FILE"
    assert "give --config FILE, without a DIR" in refusal(str(data), "--out", out, "--data.packing", "true")
    assert refusal(str(data), "--out", str(tmp_path / "no" / "report.html")).startswith("error: there is no directory")
    assert "has no room for 64 image tokens" in refusal(str(data), "--out", out, "--sequence_length", "60")
    assert "--tokenizer is for a DIR" in refusal("--config", str(data / "x.yaml"), "--out", out, "--tokenizer", "t")
    assert not Path(out).exists()


def test_what_is_there_is_kept_without_force(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("precious")
    assert refusal(str(data), "--out", str(out)) == f"error: {out} exists: choose another --out, or replace it with --force"
    assert out.read_text() == "precious"
    main([str(data), "--out", str(out), "--force", "--rows", "1", "--samples", "1"])
    assert out.read_text() != "precious"


def test_another_data_set_than_the_runs(data: Path, tmp_path: Path) -> None:
    message = refusal(*SIZES, "--data.path", str(data), "--data.codec.patch_size", "8", "--out", str(tmp_path / "report.html"))
    assert "was made for the codec" in message
