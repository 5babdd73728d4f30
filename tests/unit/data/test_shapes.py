import itertools

import numpy as np
import pytest

from mmar_megatron.data.index import Split
from mmar_megatron.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    ONE_THING_SCENES,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    draw_scenes,
    render,
)

SQUARE = Scene(background="white", things=(Thing(size="large", colour="red", shape="square", place="top left"),))


def combinations(split: Split, count: int) -> set[tuple[str, str, str]]:
    return {(t.colour, t.shape, t.place) for scene in draw_scenes(count, split=split, seed=0) for t in scene.things}


def test_no_held_out_combination_in_training() -> None:
    held_out = {
        (colour, shape, place)
        for colour, shape, place in itertools.product(COLOURS, SHAPES, PLACES)
        if Thing(size="large", colour=colour, shape=shape, place=place).held_out
    }
    everything = len(COLOURS) * len(SHAPES) * len(PLACES)
    assert 0.08 < len(held_out) / everything < 0.17
    assert combinations("train", 8000) == set(itertools.product(COLOURS, SHAPES, PLACES)) - held_out
    for scene in draw_scenes(512, split="validation", seed=0):
        assert any((t.colour, t.shape, t.place) in held_out for t in scene.things)


def test_every_value_of_every_attribute_is_seen_in_training_and_held_out() -> None:
    for split in ("train", "validation"):
        seen = combinations(split, 2000)
        assert [len(set(values)) for values in zip(*seen, strict=True)] == [len(COLOURS), len(SHAPES), len(PLACES)]


def test_half_the_scenes_have_one_thing_and_two_never_touch() -> None:
    scenes = list(draw_scenes(400, split="train", seed=0))
    assert sum(len(scene.things) == 1 for scene in scenes) == 200
    for scene in scenes:
        background_HW3 = np.array(BACKGROUNDS[scene.background])
        covered = [
            (render(Scene(background=scene.background, things=(thing,)), image_size=32) != background_HW3).any(axis=-1)
            for thing in scene.things
        ]
        assert sum(c.astype(int) for c in covered).max() == 1


def test_scenes_are_a_function_of_the_seed() -> None:
    assert list(draw_scenes(50, split="train", seed=3)) == list(draw_scenes(50, split="train", seed=3))
    assert list(draw_scenes(50, split="train", seed=3)) != list(draw_scenes(50, split="train", seed=4))


def test_captions() -> None:
    assert SQUARE.caption == "a large red square at the top left, on a white background"
    blue = Thing(size="small", colour="blue", shape="circle", place="bottom right")
    two = Scene(background="black", things=(blue, *SQUARE.things))
    expected = "a small blue circle at the bottom right and a large red square at the top left, on a black background"
    assert two.caption == expected
    assert Scene.from_spec(two.spec) == two
    assert len({scene.caption for scene in ONE_THING_SCENES}) == len(ONE_THING_SCENES)


@pytest.mark.parametrize("image_size", [32, 64])
def test_the_square_is_where_it_belongs(image_size: int) -> None:
    image_HW3, scale = render(SQUARE, image_size=image_size), image_size // 32
    expected_HW3 = np.full((image_size, image_size, 3), 255)
    expected_HW3[scale : 15 * scale, scale : 15 * scale] = COLOURS["red"]
    np.testing.assert_array_equal(image_HW3, expected_HW3)


def test_shapes_are_symmetric_and_fill_their_size() -> None:
    for shape, (size, side) in itertools.product(SHAPES, SIZES.items()):
        scene = Scene(background="white", things=(Thing(size=size, colour="red", shape=shape, place="top left"),))
        image_HW3 = render(scene, image_size=32)
        np.testing.assert_array_equal(image_HW3[:, :16], image_HW3[:, 15::-1])
        rows, columns = np.nonzero((image_HW3 != 255).any(axis=-1))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (side, side)
