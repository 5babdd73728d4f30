"""`fit` as a command: its files, its page in a real browser, and what it says of mistakes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import playwright.sync_api
import pytest
from PIL import Image

from tests.unit.scaling.law.surfaces import Truth, isoflop_grid, measured, write_csv
from tools.sweep import main

TEXT, IMAGE = Truth(), Truth(E=0.13, A=30.0, B=8.0, alpha=0.4, beta=0.25)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 runs, of which `<b>odd</b>` has diverged, with two losses and 7 N D FLOPs."""
    params, tokens = isoflop_grid(TEXT)
    rng = np.random.default_rng(1)
    text, image = (measured(truth, params, tokens, rng=rng, noise=0.003) for truth in (TEXT, IMAGE))
    text[5] *= 3
    names = [f"run {number}" for number in range(42)]
    names[5] = "<b>odd</b>"
    columns = {"n_params": params, "n_tokens": tokens, "loss": text, "loss / image": image, "flops": 7 * params * tokens}
    return write_csv(tmp_path_factory.mktemp("sweep") / "points.csv", {"run": names, **columns})


@pytest.fixture(scope="module")
def out(table: Path) -> Path:
    out = table.parent / "law"
    losses = ("--loss", "loss", "--loss", "loss / image")
    main(["fit", "--csv", str(table), *losses, "--budget", "1e22", "--budget", "1e23", "--resamples", "200", "--out", str(out)])
    return out


def test_files(out: Path) -> None:
    plots = {f"{name}-{loss}.png" for name in ("isoflop", "frontier", "residuals") for loss in ("loss", "loss___image")}
    assert {path.name for path in out.iterdir()} == plots | {"fit.json", "table.txt", "runs.csv", "report.html"}
    for name in plots:
        with Image.open(out / name) as image:
            assert image.width > 900 and len(image.getcolors(1 << 24) or ()) > 50, "something is drawn"
    fits: dict[str, Any] = json.loads((out / "fit.json").read_text())
    assert list(fits) == ["loss", "loss / image"]
    for fit, truth in zip(fits.values(), (TEXT, IMAGE), strict=True):
        for name in ("E", "A", "B", "alpha", "beta"):
            interval = fit[name]
            assert interval["low"] < interval["value"] < interval["high"]
            assert interval["value"] == pytest.approx(getattr(truth, name), rel=0.5)
        assert [answer["flops"] for answer in fit["answers"]] == [1e22, 1e23]
        best = fit["answers"][0]
        assert 7 * best["n_params"]["value"] * best["n_tokens"]["value"] == pytest.approx(1e22), "by the column's FLOPs"
        assert fit["isoflop"]["agrees"] and len(fit["isoflop"]["budgets"]) == 6
        assert len(fit["held_out"]["errors"]) == 7 and fit["held_out"]["mean_error"] < 0.02
    assert "<b>odd</b>" in fits["loss"]["far_off"] and not fits["loss / image"]["far_off"]

    text = (out / "table.txt").read_text()
    assert "<b>odd</b> is" in text and "held out" in text and "7.000 N D" in text
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 42
    row = rows[7]
    assert float(row["loss"]) / float(row["loss_predicted"]) - 1 == pytest.approx(float(row["loss_residual"]), abs=1e-7)


@pytest.mark.parametrize("width", [400, 1600])
def test_page(browser: playwright.sync_api.Browser, out: Path, width: int) -> None:
    fits: dict[str, Any] = json.loads((out / "fit.json").read_text())
    said: list[str] = []
    requests: list[str] = []
    with browser.new_page(viewport={"width": width, "height": 900}) as tab:
        tab.on("console", lambda message: said.append(message.text))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto((out / "report.html").as_uri(), wait_until="load")
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert len(tab.query_selector_all("img.plot")) == 6
        for k, fit in enumerate(fits.values()):
            for name in ("E", "alpha", "a"):
                for end in ("value", "low", "high"):
                    shown = tab.locator(f'[data-fact="{k}.{name}.{end}"]').get_attribute("value")
                    assert shown is not None and float(shown) == fit[name][end]
        assert tab.locator("th", has_text="<b>odd</b>").count() == 2, "in both tables of the runs, as text"
        assert tab.locator("p.warning").count() == 1
    assert said == [] and all(url.startswith(("file:", "data:")) for url in requests)


def test_the_same_command_gives_the_same_numbers_and_another_seed_others(table: Path, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        main(["fit", "--csv", str(table), "--resamples", "100", "--seed", seed, "--out", str(tmp_path / name)])
        found.append(json.loads((tmp_path / name / "fit.json").read_text())["loss"])
    assert found[0] == found[1]
    assert found[0]["alpha"]["value"] == found[2]["alpha"]["value"] and found[0]["alpha"]["low"] != found[2]["alpha"]["low"]
    assert found[0]["answers"][0]["flops"] == pytest.approx(10 * 1.024e21 * 7 / 6), "of a budget that nobody named"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--loss", "val"], "has no column `val`, only run, n_params"),
        (["--resamples", "10"], "--resamples 10 are too few"),
        (["--csv", "missing.csv"], "No such file or directory: 'missing.csv'"),
    ],
)
def test_mistakes_end_in_one_sentence(table: Path, tmp_path: Path, options: list[str], said: str) -> None:
    out = tmp_path / "law"
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--csv", str(table), "--out", str(out), *options])
    assert isinstance(stopped.value.code, str) and said in stopped.value.code and "\n" not in stopped.value.code
    assert not out.exists()
