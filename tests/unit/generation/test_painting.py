"""A picture follows from its prompt, seed and number; not from its batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmar_megatron.generation.editing import read_edit
from mmar_megatron.generation.files import as_png, record_of
from mmar_megatron.generation.opening import Opened, open_model
from mmar_megatron.generation.painting import batches, paint, pictures_of, settle
from mmar_megatron.generation.prompts import Prompt
from mmar_megatron.hf.exporting import export, open_checkpoint

PROMPTS = [
    Prompt(text="a red circle", place="first"),
    Prompt(text="", place="second", seed=7),
    Prompt(text="two small blue squares", place="third"),
]
QUICK: dict[str, Any] = {"rounds": 3, "steps": 3, "sampler": "ancestral", "guidance_scale": 1.5}


def assert_same_picture(one: np.ndarray, other: np.ndarray) -> None:
    """But for what sums in another order come to, which may round to another step of 255."""
    np.testing.assert_allclose(one.astype(int), other.astype(int), rtol=0, atol=1)
    assert (one != other).mean() < 0.01


def painted(opened: Opened, prompts: list[Prompt], *, batch_size: int, images: int = 2, **options: Any) -> dict[str, np.ndarray]:
    pictures = pictures_of(prompts, images=images, seed=5)
    made = paint(opened, pictures, settings=settle(opened, **QUICK), batch_size=batch_size, **options)
    return {picture.file: pixels for picture, pixels in made}


def test_numbers_and_batches() -> None:
    pictures = pictures_of(PROMPTS, images=2, seed=5)
    assert [(picture.file, picture.seed, picture.number) for picture in pictures] == [
        ("000000-0.png", 5, 0),
        ("000000-1.png", 5, 1),
        ("000001-0.png", 7, 0),
        ("000001-1.png", 7, 1),
        ("000002-0.png", 5, 4),
        ("000002-1.png", 5, 5),
    ]
    assert [len(batch) for batch in batches(pictures, size=3)] == [2, 2, 2]
    same_seed = pictures_of([PROMPTS[0], PROMPTS[2]], images=2, seed=5)
    assert [len(batch) for batch in batches(same_seed, size=3)] == [3, 1]


def test_neither_batch_nor_place_change_a_picture(opened: Opened) -> None:
    alone, together = (painted(opened, PROMPTS, batch_size=size) for size in (1, 3))
    assert alone.keys() == together.keys()
    for file, pixels in alone.items():
        assert_same_picture(together[file], pixels)
    assert len({pixels.tobytes() for pixels in alone.values()}) == len(alone)
    first = painted(opened, [PROMPTS[1]], batch_size=8)  # which has its own seed
    assert_same_picture(first["000000-1.png"], alone["000001-1.png"])


def test_pictures_are_the_same_to_the_bit_when_work_is_taken_up(opened: Opened) -> None:
    whole = painted(opened, PROMPTS, batch_size=2, images=3)
    for done in (2, 4, 8):  # at the end of a batch, and in the midst of one
        rest = painted(opened, PROMPTS, batch_size=2, images=3, done=done)
        assert list(rest) == list(whole)[done:]
        for file, pixels in rest.items():
            np.testing.assert_array_equal(pixels, whole[file], err_msg=file)


@pytest.mark.parametrize("edited", [False, True])
def test_what_a_png_says_paints_it_again(opened: Opened, picture: Path, tmp_path: Path, edited: bool) -> None:
    edit = read_edit(picture, processor=opened.processor, vary=0.5) if edited else None
    settings = settle(opened, **QUICK)
    pictures = pictures_of(PROMPTS, images=2, seed=5)
    for one, pixels in paint(opened, pictures, settings=settings, batch_size=1, edit=edit):
        (tmp_path / one.file).write_bytes(as_png(pixels, record=one.record(opened, settings, edit=edit)))

    record = record_of(tmp_path / "000002-1.png")
    again = open_model(record["model"], average=record["average"], dtype=record["dtype"])
    options = {name: record[name] for name in ("seed", *settings)}
    if edited:
        same = read_edit(Path(record["start"]), processor=again.processor, vary=record["vary"])
        redraw = torch.from_numpy(same.redraw(seed=record["seed"], number=record["number"]))
        options |= {"start_latents": same.latents_NC[None], "redraw": redraw[None]}
    inputs = again.processor.to_paint([record["prompt"]])
    latents = again.model.generate_images(**inputs, **options, first_number=record["number"])
    with Image.open(tmp_path / record["file"]) as image:
        np.testing.assert_array_equal(again.processor.to_pictures(latents)[0], np.asarray(image))
        assert image.info["Description"] == "two small blue squares"
    assert (record["step"], record["model_sha256"]) == (4, opened.facts["model_sha256"])


def test_what_is_not_redrawn_stays(opened: Opened, picture: Path, tmp_path: Path) -> None:
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[:8, 8:24] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    edit = read_edit(picture, processor=opened.processor, redraw=tmp_path / "mask.png")
    before = opened.processor.to_pictures(edit.latents_NC[None])[0]
    for pixels in painted(opened, PROMPTS, batch_size=4, edit=edit).values():
        np.testing.assert_array_equal(pixels[mask == 0], before[mask == 0])
        assert not np.array_equal(pixels[mask > 0], before[mask > 0])


def test_settings_that_do_not_fit_the_model(opened: Opened) -> None:
    assert settle(opened)["rounds"] == 16
    with pytest.raises(ValueError, match="17 rounds asked for 16 tokens: use at least 1, and at most as many rounds as tokens"):
        settle(opened, rounds=17)
    with pytest.raises(ValueError, match="1001 sampling steps asked of a schedule of 1000 timesteps"):
        settle(opened, steps=1001)
    with pytest.raises(ValueError, match="The temperature is -1"):
        settle(opened, temperature=-1)
    with pytest.raises(ValueError, match="--images is 0"):
        pictures_of(PROMPTS, images=0, seed=0)
    with pytest.raises(ValueError, match="seed is -1"):
        pictures_of(PROMPTS, images=1, seed=-1)


def test_the_prompt_whose_tokens_are_not_finite_is_named(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    original = opened.model.generate_images

    def fails_on_the_third(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        if options["first_number"] <= 2 < options["first_number"] + len(input_ids):
            raise FloatingPointError("not finite")
        return original(input_ids, **options)

    monkeypatch.setattr(opened.model, "generate_images", fails_on_the_third)
    prompts = [replace(PROMPTS[0], place=f"line {number}") for number in range(1, 5)]
    made = paint(opened, pictures_of(prompts, images=1, seed=0), settings=settle(opened, **QUICK), batch_size=4)
    files: list[str] = []
    with pytest.raises(ValueError, match=r"line 3 \('a red circle'\), picture 000002-0.png: not finite"):
        files.extend(picture.file for picture, _ in made)
    assert files == ["000000-0.png", "000001-0.png"]


def test_progress_counts_pictures(opened: Opened) -> None:
    told: list[float] = []
    painted(opened, PROMPTS, batch_size=3, progress=told.append)
    assert told == pytest.approx([2 / 3, 4 / 3, 2, 8 / 3, 10 / 3, 4, 14 / 3, 16 / 3, 6])


def test_an_export_is_known_by_its_weights(opened: Opened, run_dir: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(open_checkpoint(run_dir), tmp_path / name, say=lambda _: None)
    (tmp_path / "two" / "README.md").write_text("changed")
    one, two = (open_model(str(tmp_path / name)).facts for name in ("one", "two"))
    assert one["model_sha256"] == two["model_sha256"]
    assert one["model"] == str(tmp_path / "one")
    (tmp_path / "two" / "generation_config.json").write_text("{}")
    assert open_model(str(tmp_path / "two")).facts["model_sha256"] != one["model_sha256"]
