"""The `shapes` data set: one or two coloured shapes on a 2 x 2 grid of places, and captions that say all there is to see.

It needs no download, a tiny model learns it in minutes, and `evaluation.shapes` can tell from the pixels what was painted.
Lengths are in units of 1/32 of the image's side: at 32 pixels, pixels. H = W pixels.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from einops import reduce
from numpy.typing import NDArray

from mmar_megatron.data.draw import Use, sample_generator
from mmar_megatron.data.index import Split

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 20, 30),
    "green": (20, 160, 40),
    "blue": (20, 50, 230),
    "yellow": (250, 225, 0),
    "cyan": (0, 210, 225),
    "pink": (250, 60, 200),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "tan": (205, 180, 135),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES: dict[str, int] = {"small": 8, "large": 14}
"""Side of the square that the shape fills."""
PLACES: dict[str, tuple[int, int]] = {
    f"{row} {column}": (x, y) for row, y in (("top", 8), ("bottom", 24)) for column, x in (("left", 8), ("right", 24))
}
"""Centre (x, y). Centres are multiples of the default patch, so that a shape always looks the same."""
UNITS = 32
_SUPERSAMPLING = 8


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One shape in the picture."""

    size: str
    colour: str
    shape: str
    place: str

    @property
    def held_out(self) -> bool:
        """Whether this colour, shape and place never come together in training: about one combination in eight."""
        return hashlib.sha256(f"{self.colour} {self.shape} {self.place}".encode()).digest()[0] < 256 // 8

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} at the {self.place}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is in a picture: one thing, or two that do not touch."""

    background: str
    things: tuple[Thing, ...]

    @property
    def caption(self) -> str:
        """For example "a large red circle at the top left, on a white background"."""
        return f"{' and '.join(map(str, self.things))}, on a {self.background} background"

    @property
    def split(self) -> Split:
        """Pictures with a held-out combination are for validation, all others for training."""
        return "validation" if any(thing.held_out for thing in self.things) else "train"

    @property
    def spec(self) -> dict[str, Any]:
        """As it is stored beside the picture."""
        return asdict(self)

    @staticmethod
    def from_spec(spec: dict[str, Any]) -> Scene:
        """The inverse of `spec`."""
        return Scene(background=spec["background"], things=tuple(Thing(**thing) for thing in spec["things"]))


ONE_THING_SCENES: tuple[Scene, ...] = tuple(
    Scene(background=background, things=(Thing(size=size, colour=colour, shape=shape, place=place),))
    for background, size, colour, shape, place in itertools.product(BACKGROUNDS, SIZES, COLOURS, SHAPES, PLACES)
)


def draw_scenes(count: int, *, split: Split, seed: int) -> Iterator[Scene]:
    """`count` scenes of a split, alternately with one thing and with two.

    The scenes with one thing go round all of the split's in random order; those with two are drawn independently.
    """
    generator = sample_generator(0, seed=seed, epoch=int(split == "validation"), use=Use.SHAPES)
    ones = [scene for scene in ONE_THING_SCENES if scene.split == split]
    order = generator.permutation(len(ones))
    for number in range(count):
        if number % 2 == 0:
            yield ones[order[number // 2 % len(ones)]]
        else:
            yield _draw_two(generator, split=split)


def _draw_two(generator: np.random.Generator, *, split: Split) -> Scene:
    def choose(values: Any) -> str:
        return str(list(values)[generator.integers(len(values))])

    while True:
        things = tuple(
            Thing(size=choose(SIZES), colour=choose(COLOURS), shape=choose(SHAPES), place=choose(PLACES)) for _ in range(2)
        )
        scene = Scene(background=choose(BACKGROUNDS), things=things)
        (x1, y1), (x2, y2) = (PLACES[thing.place] for thing in things)
        apart = max(abs(x1 - x2), abs(y1 - y2)) >= max(SIZES.values())
        if apart and scene.split == split:
            return scene


def render(scene: Scene, *, image_size: int) -> NDArray[np.uint8]:
    """The picture, uint8 [H, W, 3], with smooth edges."""
    image_HW3 = np.full((image_size, image_size, 3), BACKGROUNDS[scene.background], dtype=np.float32)
    for thing in scene.things:
        cover_HW1 = coverage(thing.shape, size=thing.size, place=thing.place, image_size=image_size)[..., None]
        image_HW3 = image_HW3 + cover_HW1 * (np.array(COLOURS[thing.colour], dtype=np.float32) - image_HW3)
    return np.rint(image_HW3).astype(np.uint8)


@cache
def coverage(shape: str, *, size: str, place: str, image_size: int) -> NDArray[np.float32]:
    """cover_HW: the share of each pixel that the shape covers, in [0, 1], from 8 x 8 points in it."""
    points = (np.arange(image_size * _SUPERSAMPLING) + 0.5) * UNITS / (image_size * _SUPERSAMPLING)
    (x, y), half = PLACES[place], SIZES[size] / 2
    # Across and down from the centre; the shape fills [-1, 1] in both.
    across, down = (points[None, :] - x) / half, (points[:, None] - y) / half
    farther, nearer = np.maximum(abs(across), abs(down)), np.minimum(abs(across), abs(down))
    match shape:
        case "circle":
            inside = across**2 + down**2 < 1
        case "square":
            inside = farther < 1
        case "triangle":
            inside = (abs(across) < (down + 1) / 2) & (farther < 1)
        case "cross":
            inside = (nearer < 1 / 3) & (farther < 1)
        case _:
            raise AssertionError(shape)
    cover_HW = reduce(inside.astype(np.float32), "(h a) (w b) -> h w", "mean", a=_SUPERSAMPLING, b=_SUPERSAMPLING)
    cover_HW.setflags(write=False)  # it is cached
    return cover_HW
