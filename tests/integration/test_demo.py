"""The page of `tools/demo.py` in a real browser, served by the command as it is started."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
import playwright.sync_api
import pytest
from PIL import Image
from playwright.sync_api import expect

from mmar_megatron.generation.files import record_of
from mmar_megatron.generation.opening import Opened, open_model
from mmar_megatron.generation.painting import paint, pictures_of, settle
from mmar_megatron.generation.prompts import Prompt
from mmar_megatron.generation.reading import Input, Reading, read
from tests.distributed.common import make_data
from tests.unit.hf.checkpoints import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TOKENS, SIDE = 16, 4
START_SECONDS, END_SECONDS, PAGE_MS = 200, 30, 60_000
PROMPT, SEED, STEPS = "a red circle", 3, 60
IN_THE_MIDST = re.compile(r"round \d+ of")
WATCH = """() => {
  window.pictures = [document.querySelector("#picture .picture").src];
  new MutationObserver(() => {
    const source = document.querySelector("#picture .picture")?.src;
    if (source && source !== window.pictures.at(-1)) window.pictures.push(source);
  }).observe(document.querySelector("#picture"), { subtree: true, childList: true, attributes: true });
}"""


class Server:
    """The command, from the line that says where the page is to its end."""

    def __init__(self, run_dir: Path, *, folder: Path) -> None:
        self.report, self.errors, self.temporary = folder / "asked.txt", folder / "stderr.txt", folder / "temporary"
        self.temporary.mkdir()
        tool = [ROOT / "tools" / "demo.py", "--model", run_dir, "--port", "0"]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, [ROOT / "tests" / "integration" / "watched.py", self.report, *tool])],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary)},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout is not None
        alarm = threading.Timer(START_SECONDS, self.process.kill)
        alarm.start()
        line = self.process.stdout.readline()
        alarm.cancel()
        assert line.startswith("open http://127.0.0.1:"), self.errors.read_text()
        self.url = line.split()[1]

    def end(self, number: signal.Signals) -> int:
        """Its exit status; it is killed where it does not end."""
        self.process.send_signal(number)
        try:
            return self.process.wait(END_SECONDS)
        finally:
            self.process.kill()
            self.process.wait()


class Page:
    """The page in a tab, and what happened there."""

    def __init__(self, tab: playwright.sync_api.Page, url: str) -> None:
        self.tab, self.url = tab, url
        self.said: list[str] = []
        self.requests: list[str] = []
        tab.set_default_timeout(PAGE_MS)
        expect.set_options(timeout=PAGE_MS)
        tab.on("console", lambda message: self.said.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: self.said.append(str(error)))
        tab.on("request", lambda request: self.requests.append(request.url))
        tab.goto(url)
        tab.wait_for_selector("#picture .marks")
        tab.click("#advanced > button")
        tab.uncheck("#another-seed input")
        self.fill(seed=SEED, steps=STEPS, rounds=TOKENS)

    def fill(self, **numbers: int | str) -> None:
        for name, value in numbers.items():
            self.tab.fill(f"#{name} input", str(value))

    def paint(self, prompt: str = PROMPT) -> None:
        self.tab.fill("#prompt textarea", prompt)
        self.tab.click("#paint")

    def says(self, text: str | re.Pattern[str], *, where: str = "#status") -> None:
        expect(self.tab.locator(where)).to_contain_text(text)

    def complains(self, text: str) -> None:
        """In a message, which is then closed."""
        toast = self.tab.locator(".toast-body", has_text=text)
        expect(toast).to_have_count(1)
        toast.locator(".toast-close").click()
        expect(toast).to_have_count(0)
        expect(self.tab.locator(".block.status:visible")).to_contain_text(text)

    def pixels(self) -> np.ndarray:
        return decoded(self.tab.locator("#picture .picture").get_attribute("src"))

    def open(self, picture: Path) -> None:
        with self.tab.expect_file_chooser() as chooser:
            self.tab.click("#open")
        chooser.value.set_files(picture)

    def drag(self, *tokens: int) -> None:
        """Draws with the mouse from the middle of one token to that of the next."""
        box = self.tab.locator("#picture .marks").bounding_box()
        assert box is not None
        for number, token in enumerate(tokens):
            x, y = ((value + 0.5) / SIDE for value in (token % SIDE, token // SIDE))
            self.tab.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
            if number == 0:
                self.tab.mouse.down()
        self.tab.mouse.up()

    def marked(self) -> list[int]:
        text = self.tab.locator("#picture [data-marked]").get_attribute("data-marked")
        return [int(token) for token in (text or "").split()]


def by_token(file: Path | io.BytesIO) -> np.ndarray:
    """Pixels of a picture, uint8 [N, 8 * 8 * 3]."""
    with Image.open(file) as image:
        return split(np.asarray(image))


def split(pixels_HW3: np.ndarray) -> np.ndarray:
    assert pixels_HW3.shape == (32, 32, 3)
    return pixels_HW3.reshape(SIDE, 8, SIDE, 8, 3).transpose(0, 2, 1, 3, 4).reshape(TOKENS, -1)


def decoded(url: str | None) -> np.ndarray:
    assert url is not None and url.startswith("data:image/png;base64,")
    return by_token(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def gaps(pixels_NP: np.ndarray) -> set[int]:
    return {token for token, values in enumerate(pixels_NP) if set(values.tolist()) <= {205, 235}}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder / "run", "--data.sequence_length", "96", data=make_data(folder / "shapes"))
    return folder / "run"


@pytest.fixture(scope="module")
def opened(run_dir: Path) -> Opened:
    return open_model(str(run_dir))


@pytest.fixture(scope="module")
def server(browser: playwright.sync_api.Browser, run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(run_dir, folder=tmp_path_factory.mktemp("server"))
    yield server
    assert server.end(signal.SIGINT) == 1
    assert server.errors.read_text() == "stopped\n"


@pytest.fixture
def page(browser: playwright.sync_api.Browser, server: Server) -> Iterator[Page]:
    """Whatever happens on it, it asks this machine alone, and complains of nothing."""
    with browser.new_page(viewport={"width": 1280, "height": 800}) as tab:
        page = Page(tab, server.url)
        yield page
        assert {urlsplit(url).netloc for url in page.requests if not url.startswith("data:")} == {urlsplit(server.url).netloc}
        assert page.said == []
    assert server.report.read_text() == ""
    assert server.process.poll() is None
    assert "Traceback" not in server.errors.read_text()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "start.png")
    return tmp_path / "start.png"


def painted(opened: Opened) -> np.ndarray:
    """What the command paints."""
    pictures = pictures_of([Prompt(text=PROMPT, place="")], images=1, seed=SEED)
    settings = settle(opened, rounds=TOKENS, steps=STEPS)
    ((_, pixels_HW3),) = paint(opened, pictures, settings=settings, batch_size=1)
    return split(pixels_HW3)


def test_a_picture_fills_in(page: Page, opened: Opened) -> None:
    page.tab.evaluate(WATCH)
    page.paint()
    page.says("painted in")
    seen = [gaps(decoded(url)) for url in page.tab.evaluate("window.pictures")]
    assert seen[0] == set(range(TOKENS)) and seen[-1] == set()
    assert all(after <= before for before, after in pairwise(seen))
    assert len({len(tokens) for tokens in seen}) > 4  # of seventeen; a decoded picture rests a while
    np.testing.assert_array_equal(page.pixels(), painted(opened))
    # Small pictures are enlarged without blur.
    style = "img => [getComputedStyle(img).imageRendering, img.getBoundingClientRect().width > 300]"
    assert page.tab.locator("#picture .picture").evaluate(style) == ["pixelated", True]


def test_what_is_drawn_over_is_redrawn_and_the_rest_is_kept(page: Page) -> None:
    page.paint()
    page.says("painted in")
    before = page.pixels()
    page.drag(0, 2, 10)
    assert page.marked() == [0, 1, 2, 6, 10]
    page.drag(6)  # which takes the mark off
    assert page.marked() == [0, 1, 2, 10]
    page.fill(seed=SEED + 1)
    page.tab.click("#redraw")
    page.says("4 rounds")
    assert page.marked() == []
    assert np.flatnonzero((page.pixels() != before).any(axis=1)).tolist() == [0, 1, 2, 10]
    page.tab.fill("#picture .brush", "2")
    page.drag(5)
    assert len(page.marked()) == 4
    page.tab.click("#picture .clear")
    assert page.marked() == []


def test_an_opened_picture_is_changed_saved_and_read(page: Page, picture: Path, opened: Opened, tmp_path: Path) -> None:
    page.open(picture)
    page.says("what is to change, and redraw it")
    np.testing.assert_array_equal(page.pixels(), by_token(picture))
    page.drag(15)
    page.tab.click("#redraw")
    page.says("painted in")
    assert np.flatnonzero((page.pixels() != by_token(picture)).any(axis=1)).tolist() == [15]
    with page.tab.expect_download() as download:
        page.tab.click("#picture .save")
    assert download.value.suggested_filename == f"seed-{SEED}.png"
    download.value.save_as(tmp_path / "saved.png")
    assert record_of(tmp_path / "saved.png")["start"]["opened"] == "start.png"

    page.tab.click("#read-it")
    page.tab.fill("#question textarea", "what is this?")
    page.tab.click("#read")
    page.says("read in", where="#read-status")
    asked = Input(images=("saved",), files=(tmp_path / "saved.png",), question="what is this?")
    ((_, text),) = read(opened, [asked], reading=Reading(), batch_size=1)
    assert page.tab.input_value("#answer textarea").split() == text.split() != []


def test_stop_and_go_on(page: Page) -> None:
    page.fill(steps=1000)
    page.paint()
    page.says(IN_THE_MIDST)
    page.tab.click("#stop")
    page.says("stopped after round")
    stopped = page.pixels()
    left = gaps(stopped)
    assert 0 < len(left) < TOKENS
    page.tab.click("#read-it")
    page.complains("There is no whole picture to read yet")
    page.fill(steps=2)
    page.tab.click("#redraw")
    page.says("painted in")
    assert set(np.flatnonzero((page.pixels() != stopped).any(axis=1)).tolist()) == left


def test_mistakes_are_told_and_the_page_lives(page: Page, picture: Path, opened: Opened, tmp_path: Path) -> None:
    torn = tmp_path / "<torn>.png"
    torn.write_bytes(picture.read_bytes()[:100])
    page.tab.click("#redraw")
    page.complains("There is no picture to change yet")
    page.open(torn)
    page.complains("cannot be read as a picture")
    page.fill(rounds=TOKENS + 1)
    page.paint()
    page.complains("17 rounds asked for 16 tokens")
    page.fill(rounds=TOKENS, steps=1001)
    page.paint()
    page.complains("1001 sampling steps asked")
    page.fill(steps=STEPS, seed="")
    page.paint()
    page.complains("Seed is empty")
    page.fill(seed=SEED)
    page.paint("a red circle " * 40)
    page.complains("the model has room for")
    assert gaps(page.pixels()) == set(range(TOKENS))  # nothing was begun
    page.paint()
    page.says("painted in")
    np.testing.assert_array_equal(page.pixels(), painted(opened))
    page.tab.click("#redraw")
    page.complains("Nothing is marked")

    page.tab.click("button[role=tab]:has-text('Read')")
    page.tab.click("#read")
    page.complains("There is no picture to read")
    page.tab.set_input_files("#pictures input[type=file]", [picture, torn])
    expect(page.tab.locator("#pictures .thumbnail-item")).to_have_count(2)
    page.tab.click("#read")
    page.complains("cannot be read as a picture")


def test_a_tab_that_is_closed_holds_nobody_up(page: Page, browser: playwright.sync_api.Browser) -> None:
    with browser.new_page() as tab:
        left = Page(tab, page.url)
        left.fill(steps=1000)
        left.paint()
        left.says(IN_THE_MIDST)
    page.fill(steps=2)
    page.paint()
    page.says("painted in")


@pytest.mark.parametrize("width", [400, 1024, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen(page: Page, width: int, scheme: Literal["light", "dark"]) -> None:
    page.tab.set_viewport_size({"width": width, "height": 700})
    page.tab.emulate_media(color_scheme=scheme)
    assert page.tab.evaluate("document.documentElement.scrollWidth") == width
    box = page.tab.locator("#picture .marks").bounding_box()
    assert box is not None and 250 < box["width"] < 701 and box["width"] == pytest.approx(box["height"], abs=1)


def test_it_ends_in_the_midst_and_leaves_nothing(
    browser: playwright.sync_api.Browser, run_dir: Path, picture: Path, tmp_path: Path
) -> None:
    server = Server(run_dir, folder=tmp_path)
    try:
        with browser.new_page() as tab:
            page = Page(tab, server.url)
            page.open(picture)  # a file is sent
            page.says("what is to change, and redraw it")
            assert list(server.temporary.rglob("start.png")) != []
            page.fill(steps=1000)
            page.paint()
            page.says(IN_THE_MIDST)
            status = server.end(signal.SIGTERM)
    finally:
        server.end(signal.SIGKILL)
    assert (status, server.errors.read_text()) == (1, "stopped\n")
    assert list(server.temporary.iterdir()) == []
