import numpy as np
import pytest

from mmar_megatron.data.shapes import BACKGROUNDS, COLOURS, ONE_THING_SCENES, PLACES, SHAPES, SIZES, Scene, Thing, render
from mmar_megatron.evaluation.shapes import describe_image, score_image


def other(value: str, values: object) -> str:
    names = list(values)  # type: ignore[call-overload]
    return str(names[(names.index(value) + 1) % len(names)])


@pytest.mark.parametrize("image_size", [32, 64])
def test_every_true_picture_is_right_in_all(image_size: int) -> None:
    for scene in ONE_THING_SCENES[:: image_size // 8]:
        assert all(score_image(render(scene, image_size=image_size), scene.spec).values()), scene.caption


def test_moderate_noise_is_forgiven() -> None:
    generator = np.random.default_rng(0)
    rates = []
    for scene in ONE_THING_SCENES[::5]:
        noisy_HW3 = render(scene, image_size=32) + generator.normal(0, 15, (32, 32, 3))
        rates.append(list(score_image(noisy_HW3.clip(0, 255).astype(np.uint8), scene.spec).values()))
    assert np.mean(rates, axis=0).min() > 0.97


def test_a_picture_of_everything_else_is_wrong_in_all() -> None:
    for scene in ONE_THING_SCENES[::7]:
        thing = scene.things[0]
        elsewise = Thing(
            size=other(thing.size, SIZES),
            colour=other(thing.colour, COLOURS),
            shape=other(thing.shape, SHAPES),
            place=other(thing.place, PLACES),
        )
        spec = Scene(background=other(scene.background, BACKGROUNDS), things=(elsewise,)).spec
        assert not any(score_image(render(scene, image_size=32), spec).values())


def test_pictures_of_random_other_scenes_score_by_chance() -> None:
    generator = np.random.default_rng(0)
    pairs = generator.integers(len(ONE_THING_SCENES), size=(400, 2))
    scores = [list(score_image(render(ONE_THING_SCENES[a], image_size=32), ONE_THING_SCENES[b].spec).values()) for a, b in pairs]
    assert np.mean(scores) < 0.3


def test_an_empty_picture_has_only_a_background() -> None:
    found = describe_image(np.full((32, 32, 3), BACKGROUNDS["tan"], np.uint8))
    assert found == {"background": "tan", "colour": None, "shape": None, "size": None, "place": None}


def test_two_things_are_refused() -> None:
    scene = ONE_THING_SCENES[0]
    two = Scene(background=scene.background, things=scene.things * 2)
    with pytest.raises(ValueError, match="pictures of one thing"):
        score_image(render(scene, image_size=32), two.spec)
