"""The page's work without the page: pictures that fill in, are stopped, changed and read."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmar_megatron.demo import studio as studio_module
from mmar_megatron.demo.canvas import Canvas
from mmar_megatron.demo.studio import Shown, Studio
from mmar_megatron.generation.opening import Opened, open_model
from mmar_megatron.generation.painting import paint, pictures_of, settle
from mmar_megatron.generation.prompts import Prompt
from mmar_megatron.generation.reading import Input, Reading, read
from tests.unit.data.autoencoders import make_autoencoder
from tests.unit.hf.checkpoints import make_checkpoint

TOKENS = 16
SETTINGS: dict[str, Any] = {"rounds": 4, "steps": 2, "guidance_scale": 1.5}
READING: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0, "top_p": 1.0, "seed": 0}


@pytest.fixture
def studio(opened: Opened) -> Studio:
    return Studio(opened)


def painted(studio: Studio, prompt: str = "a red circle", **options: Any) -> list[Shown]:
    given: dict[str, Any] = {"seed": 5, "settings": SETTINGS, "stop": threading.Event(), **options}
    return list(studio.paint(prompt, **given))


def pixels_of(png: bytes | None) -> np.ndarray:
    assert png is not None
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture)


def by_token(pixels_HW3: np.ndarray) -> np.ndarray:
    """[16 tokens, 8 * 8 * 3 values]"""
    return pixels_HW3.reshape(4, 8, 4, 8, 3).transpose(0, 2, 1, 3, 4).reshape(TOKENS, -1)


def gaps(png: bytes | None) -> set[int]:
    return {token for token, values in enumerate(by_token(pixels_of(png))) if set(values.tolist()) <= {205, 235}}


def test_a_picture_fills_in_and_is_the_commands(studio: Studio) -> None:
    shown = painted(studio)
    assert [one.status.split(",")[0] for one in shown[:-1]] == ["reading the prompt", *(f"round {n} of 4" for n in range(1, 5))]
    assert shown[-1].status.startswith("painted in ")
    drawn = [set(np.flatnonzero(one.canvas.drawn_N)) for one in shown]
    assert [len(tokens) for tokens in drawn] == [0, 2, 5, 10, 16, 16]
    assert all(before <= after for before, after in pairwise(drawn))
    for one, tokens in zip(shown, drawn, strict=True):
        if one.png is not None:
            assert gaps(one.png) == set(range(TOKENS)) - tokens
    assert [one.png is not None for one in (shown[0], shown[1], shown[-1])] == [True] * 3

    assert not torch.equal(shown[1].canvas.latents_NC, shown[-1].canvas.latents_NC)  # each has its own

    pictures = pictures_of([Prompt(text="a red circle", place="")], images=1, seed=5)
    settings = settle(studio.opened, **SETTINGS)
    ((_, expected),) = paint(studio.opened, pictures, settings=settings, batch_size=1)
    np.testing.assert_array_equal(pixels_of(shown[-1].png), expected)


def test_the_file_says_how_it_was_painted(studio: Studio, picture: Path) -> None:
    first = painted(studio)[-1].canvas
    changed = painted(studio, "a blue square", start=first, marked=[2, 7])[-1]
    assert changed.png is not None
    with Image.open(io.BytesIO(changed.png)) as image:
        record = json.loads(image.info["Settings"])
        assert image.info["Description"] == "a blue square"
    assert (record["seed"], record["rounds"], record["redrawn"]) == (5, 4, [2, 7])
    assert record["start"] == first.record
    assert "unfinished_after_round" not in record
    assert studio.open_picture(picture).record["opened"] == "start.png"


def test_what_is_not_marked_stays(studio: Studio, picture: Path) -> None:
    start = studio.open_picture(picture)
    before = by_token(pixels_of(studio.png(start)))
    shown = painted(studio, start=start, marked=[0, 5, 6])
    assert gaps(shown[0].png) == {0, 5, 6}
    after = by_token(pixels_of(shown[-1].png))
    changed = (before != after).any(axis=1)
    assert np.flatnonzero(changed).tolist() == [0, 5, 6]
    assert shown[-1].status.endswith(", 3 rounds")  # of four that were asked for
    kept_N = torch.tensor([token not in (0, 5, 6) for token in range(TOKENS)])
    assert torch.equal(shown[-1].canvas.latents_NC[kept_N], start.latents_NC[kept_N])


def test_stopped_and_gone_on_with(studio: Studio) -> None:
    stop = threading.Event()
    shown: list[Shown] = []
    for one in studio.paint("a red circle", seed=5, settings={**SETTINGS, "rounds": 16, "steps": 200}, stop=stop):
        shown.append(one)
        if one.status.startswith("round 2 "):
            stop.set()
    last = shown[-1]
    assert last.status.startswith("stopped after round ") and last.status.endswith("Redraw goes on with the rest")
    number = last.canvas.record["unfinished_after_round"]
    assert 2 <= number < 16 and int(last.canvas.drawn_N.sum()) == number
    assert len(gaps(last.png)) == TOKENS - number
    with pytest.raises(ValueError, match="no whole picture"):
        last.canvas.check_whole()

    whole = painted(studio, start=last.canvas)[-1]
    assert whole.canvas.drawn_N.all()
    kept = torch.from_numpy(last.canvas.drawn_N)
    assert torch.equal(whole.canvas.latents_NC[kept], last.canvas.latents_NC[kept])


def test_who_comes_second_waits(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work, most, lock = [0], [0], threading.Lock()
    draw = studio_module.draw

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        with lock:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        time.sleep(0.05)
        try:
            return draw(*args, **options)
        finally:
            with lock:
                at_work[0] -= 1

    monkeypatch.setattr(studio_module, "draw", counted)
    done: list[list[Shown]] = []
    threads = [threading.Thread(target=lambda: done.append(painted(studio))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(done), most[0]) == (3, 1)
    assert len({one[-1].png for one in done}) == 1


def test_a_painting_that_nobody_looks_at_lets_the_next_one_begin(studio: Studio) -> None:
    left = studio.paint("a red circle", seed=5, settings={**SETTINGS, "rounds": 16}, stop=threading.Event())
    next(left)
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert painted(studio)[-1].canvas.drawn_N.all()


def test_all_is_left_at_the_end(studio: Studio) -> None:
    statuses: list[str] = []
    for one in studio.paint("a red circle", seed=5, settings={**SETTINGS, "rounds": 16, "steps": 200}, stop=threading.Event()):
        statuses.append(one.status)
        studio.end()
    assert statuses[-1].startswith("stopped after round ")


def test_a_costly_decoder_is_not_asked_for_each_round(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    png = studio.png

    def slow(canvas: Canvas) -> bytes:
        time.sleep(0.1)
        return png(canvas)

    monkeypatch.setattr(studio, "png", slow)
    shown = painted(studio, settings={**SETTINGS, "rounds": 16, "steps": 10})
    assert len(shown) == 18
    assert [one.png is not None for one in (shown[0], shown[1], shown[-1])] == [True] * 3
    assert sum(one.png is not None for one in shown) < 8


def test_latents_of_an_autoencoder(coarse_shapes_dir: Path, picture: Path, tmp_path: Path) -> None:
    make_autoencoder(tmp_path / "vae")
    codec = ["--data.codec.kind", "vae", "--data.codec.path", str(tmp_path / "vae"), "--data.codec.patch_size", "1"]
    make_checkpoint(tmp_path / "run", *codec, data=coarse_shapes_dir)
    studio = Studio(open_model(str(tmp_path / "run")))
    start = studio.open_picture(picture)
    shown = painted(studio, start=start, marked=[0, 5, 6])
    assert gaps(shown[0].png) == {0, 5, 6}
    assert gaps(shown[-1].png) == set()
    changed_N = (shown[-1].canvas.latents_NC != start.latents_NC).any(dim=1)
    assert changed_N.nonzero().flatten().tolist() == [0, 5, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {**SETTINGS, "rounds": 17}}, "17 rounds asked for 16 tokens"),
        ({"settings": {**SETTINGS, "steps": 1001}}, "1001 sampling steps asked"),
        ({"settings": {**SETTINGS, "sampler": "euler"}}, "euler"),
        ({"settings": {**SETTINGS, "order": "spiral"}}, "Unknown order 'spiral'"),
        ({"settings": {**SETTINGS, "guidance_scale": None}}, "Guidance scale is empty: give a value"),
        ({"settings": {**SETTINGS, "guidance_scale": float("nan")}}, "The guidance scale is nan"),
        ({"settings": {**SETTINGS, "temperature": -1.0}}, "The temperature is -1"),
        ({"seed": None}, "Seed is empty"),
        ({"seed": -1}, "seed is -1: give 0 or more"),
        ({"seed": 2**128}, "The seed is "),
        ({"prompt": "a red circle " * 40}, "The prompt has .* tokens, and the model has room for"),
    ],
)
def test_mistakes_are_told_before_anything_is_painted(
    studio: Studio, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studio_module, "draw", None)
    given: dict[str, Any] = {"prompt": "a red circle", "seed": 5, "settings": SETTINGS, **options}
    with pytest.raises(ValueError, match=message):
        next(studio.paint(**given, stop=threading.Event()))


def test_empty_rounds_and_steps_are_the_models(studio: Studio) -> None:
    stop = threading.Event()
    shown = next(studio.paint("", seed=0, settings={"rounds": None, "steps": None, "guidance_scale": 1.0}, stop=stop))
    usual = settle(studio.opened)
    assert (shown.canvas.record["rounds"], shown.canvas.record["steps"]) == (usual["rounds"], usual["steps"])


def test_what_is_not_finite_is_an_error_and_the_next_picture_is_painted(studio: Studio) -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        painted(studio, settings={**SETTINGS, "guidance_scale": 3e38})
    assert painted(studio)[-1].canvas.drawn_N.all()


def test_reading(studio: Studio, picture: Path) -> None:
    for question in ("", "what is this?"):
        text = studio.read([picture, picture], question=question, settings=READING)
        asked = Input(images=("a", "b"), files=(picture, picture), question=question or None)
        assert [(0, text)] == list(read(studio.opened, [asked], reading=Reading(**READING), batch_size=1))
    assert text


def test_what_cannot_be_read_is_named_as_it_was_called(studio: Studio, picture: Path, tmp_path: Path) -> None:
    bad = tmp_path / "sent" / "torn.png"
    bad.parent.mkdir()
    bad.write_bytes(picture.read_bytes()[:100])
    calls: list[Callable[[], Any]] = [
        lambda: studio.read([picture, bad], question="", settings=READING),
        lambda: studio.open_picture(bad),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^torn.png cannot be read as a picture \(.+\): give another one$"):
            call()
    with pytest.raises(ValueError, match="There is no picture to read: add one"):
        studio.read([], question="", settings=READING)
    with pytest.raises(ValueError, match=r"what is asked of them have \d+ tokens"):
        studio.read([picture], question="a red circle " * 40, settings=READING)
    with pytest.raises(ValueError, match="top_p changes nothing at temperature 0"):
        studio.read([picture], question="", settings={**READING, "top_p": 0.5})
    with pytest.raises(ValueError, match="Max tokens is empty"):
        studio.read([picture], question="", settings={**READING, "max_tokens": None})
