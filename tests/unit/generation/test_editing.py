"""Which tokens a mask, margins and a share redraw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmar_megatron.generation.editing import place, read_edit, read_picture, tokens_of
from mmar_megatron.generation.opening import Opened


def mask_of(height: int, width: int, *white: tuple[int, int]) -> Image.Image:
    pixels = np.zeros((height, width), dtype=np.uint8)
    for row, column in white:
        pixels[row, column] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("mask", "tokens"),
    [
        (mask_of(32, 32, (0, 7), (31, 0)), [0, 12]),
        (mask_of(32, 32, (8, 8)), [5]),
        (mask_of(32, 48, (0, 7), (0, 8), (0, 40)), [0]),  # whose middle square begins at column 8
        (mask_of(10, 10, (2, 0)), [0, 4]),  # 2.5 pixels to a token: a pixel may lie in two
        (mask_of(2, 2, (0, 1)), [2, 3, 6, 7]),
        (mask_of(1, 1, (0, 0)), list(range(16))),
        (mask_of(64, 64), []),
    ],
)
def test_a_token_with_a_white_pixel_is_redrawn(mask: Image.Image, tokens: list[int]) -> None:
    assert np.flatnonzero(tokens_of(mask.convert("RGB"), grid=(4, 4))).tolist() == tokens


def test_what_is_transparent_in_a_mask_is_white(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 4), dtype=np.uint8)
    pixels[:, :, 3] = 255
    pixels[0, 0, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert np.flatnonzero(tokens_of(read_picture(tmp_path / "mask.png"), grid=(4, 4))).tolist() == [0]


def test_margins() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    canvas, outside = place(picture, margins=(0.25, 0.5, 0.25, 0.0), size=32)
    np.testing.assert_array_equal(np.asarray(canvas)[16:, 8:24], np.asarray(picture))
    assert np.asarray(canvas).shape == (32, 32, 3)
    kept = np.flatnonzero(~tokens_of(outside, grid=(4, 4)))
    assert kept.tolist() == [9, 10, 13, 14]
    _, outside = place(picture, margins=(0.1, 0.0, 0.0, 0.0), size=32)  # tokens that are partly outside are drawn
    assert np.flatnonzero(tokens_of(outside, grid=(4, 4))).tolist() == [0, 4, 8, 12]


def test_a_share_is_of_each_picture_its_own(opened: Opened, picture: Path) -> None:
    edit = read_edit(picture, processor=opened.processor, vary=0.25)
    chosen = [edit.redraw(seed=seed, number=number) for seed, number in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert [int(redraw.sum()) for redraw in chosen] == [4] * 4
    np.testing.assert_array_equal(chosen[0], chosen[1])
    assert not np.array_equal(chosen[0], chosen[2])
    assert not np.array_equal(chosen[0], chosen[3])
    with Image.open(picture) as image:
        assert torch.equal(edit.latents_NC, opened.processor.to_latents([image])[0])


def test_mistakes(opened: Opened, picture: Path, tmp_path: Path) -> None:
    processor = opened.processor
    mask_of(32, 32).save(tmp_path / "black.png")
    (tmp_path / "torn.png").write_bytes(picture.read_bytes()[:-300])
    with pytest.raises(ValueError, match="--start needs one of --redraw, --outpaint and --vary"):
        read_edit(picture, processor=processor)
    with pytest.raises(ValueError, match="--start needs one of"):
        read_edit(picture, processor=processor, vary=0.5, redraw=picture)
    with pytest.raises(ValueError, match=r"black.png has no white pixel"):
        read_edit(picture, processor=processor, redraw=tmp_path / "black.png")
    with pytest.raises(ValueError, match=r"torn.png cannot be read as a picture \(.+\): give another one"):
        read_edit(tmp_path / "torn.png", processor=processor, vary=0.5)
    with pytest.raises(ValueError, match=r"none.png cannot be read as a picture \(there is no such file\)"):
        read_edit(picture, processor=processor, redraw=tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"--vary is 0.0: it must be a share"):
        read_edit(picture, processor=processor, vary=0.0)
    for margins, message in {
        (0.0, 0.0, 0.0, 0.0): "leaves no token to draw",
        (0.3, 0.3, 0.3, 0.3): "leaves no token to keep",
        (0.5, 0.0, 0.5, 0.0): "opposite ones below 1",
        (-0.5, 0.0, 0.0, 0.0): "shares from 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_edit(picture, processor=processor, outpaint=margins)
