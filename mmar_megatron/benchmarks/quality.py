"""What steps of the head, and which sampler, are worth: pictures painted in all ways from the same captions, order and noise.

Each way is a *cell*: its features, rule scores and first latents lie in one file, whole or not at all, and a command that was
stopped goes on with the next. A held-out split is shuffled; captions of the first pictures are painted, and the distance is that
of what is painted to the pictures that follow. The true pictures of the painted captions have one too, the *floor*: no painter
can be expected below it.

Axes: N pictures, H, W pixels, F features, A attributes of shapes.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmar_megatron import platform
from mmar_megatron.config import parse_command_line
from mmar_megatron.data.held_out import HeldOut
from mmar_megatron.data.preparation.unfinished import atomically
from mmar_megatron.data.source import DataSource
from mmar_megatron.diffusion.sampler import SamplerKind
from mmar_megatron.evaluation.features import PictureFeatures
from mmar_megatron.evaluation.frechet import GROUPS
from mmar_megatron.evaluation.shapes import score_image
from mmar_megatron.generation.opening import Opened, open_model
from mmar_megatron.generation.painting import settle
from mmar_megatron.generation.resuming import difference
from mmar_megatron.progress import Progress

ATTRIBUTES = ("colour", "place", "background", "shape")
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class QualityPlan:
    """What is painted.

    Raises:
        ValueError: too few pictures, or nothing to paint.
    """

    models: tuple[str, ...]
    """Runs, checkpoints or exports."""
    steps: tuple[int, ...] = (10, 25, 50, 100)
    """Of the head."""
    samplers: tuple[SamplerKind, ...] = ("ddim", "ancestral", "dpm_solver++")
    images: int = 256
    """Of each cell; the reference has as many."""
    rounds: int = 16
    guidance_scale: float = 2.0
    batch_size: int = 64
    path_steps: int = 400
    """Of `ddim`, whose path the deterministic samplers follow; 0: that is not measured."""
    path_images: int = 32
    """Pictures for which it is."""
    seed: int = 0
    """Of the choice of pictures, order and noise."""

    def __post_init__(self) -> None:
        if self.images < 2 * GROUPS:
            raise ValueError(f"--images is {self.images}: give {2 * GROUPS} or more, hundreds for a distance that says much")
        if not 1 <= self.path_images <= self.images or self.batch_size < 1:
            raise ValueError(f"--batch_size must be 1 or more, and --path_images 1 to --images {self.images}: change them")
        if repeated := [model for model in self.models if self.models.count(model) > 1]:
            raise ValueError(f"--model {repeated[0]} is given twice: leave out one")
        object.__setattr__(self, "steps", tuple(sorted(set(self.steps))))

    def cells(self) -> list[Cell]:
        """Of each model; that of the path, if any, comes first."""
        path = [Cell(sampler="ddim", steps=self.path_steps, images=self.path_images)] if self.path_steps else []
        return path + [Cell(sampler=kind, steps=count, images=self.images) for kind in self.samplers for count in self.steps]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to paint."""

    sampler: SamplerKind
    steps: int
    images: int


@dataclass(frozen=True, kw_only=True)
class HeldOutPictures:
    """What is painted, and what it is held against."""

    captions: list[str]
    specs: dict[int, dict[str, Any]]
    """Scenes of one thing, by their picture; empty for other data than shapes."""
    true_NHW3: NDArray[np.uint8]
    reference_NHW3: NDArray[np.uint8]
    facts: dict[str, Any]
    """Which they are."""


class Cells:
    """The files of a directory.

    Args:
        directory: made where it is missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, *, made_of: dict[str, Any], make: Callable[[], Arrays]) -> Arrays:
        """The content of a file, which is made where it is missing.

        Raises:
            ValueError: it was made of something else.
        """
        path = self._directory / f"{name}.npz"
        if not path.is_file():
            content = io.BytesIO()
            arrays = {**make(), "made_of": np.array(json.dumps(made_of))}
            np.savez(content, allow_pickle=False, **arrays)
            atomically(path, content.getvalue())
        with np.load(path) as stored:
            arrays = dict(stored)
        if differs := difference(json.loads(str(arrays.pop("made_of"))), made_of, except_for=()):
            raise ValueError(f"{path} was made otherwise ({differs}): choose another --out")
        return arrays

    def has(self, name: str) -> bool:
        """Whether it is there."""
        return (self._directory / f"{name}.npz").is_file()


@dataclass(frozen=True, kw_only=True)
class Painted:
    """What came out, for one model."""

    predicts: str
    cells: dict[tuple[str, int], Arrays]
    """By sampler and steps: features by their depth, `right_NA`, `latents`, `seconds`."""
    path: Arrays | None


def paint_all(options: Sequence[str], *, plan: QualityPlan, out: Path) -> tuple[Arrays, list[Painted]]:
    """Features of true pictures, and what each model painted.

    Args:
        options: of pretrain_mmar.py, for the data.
        plan: what is painted.
        out: a directory for the cells.

    Raises:
        ValueError: a model or the data cannot be read; there are too few held-out pictures; what was drawn is not finite.
    """
    pictures = choose_pictures(DataSource(parse_command_line(options).config.data), images=plan.images, seed=plan.seed)
    features, cells = PictureFeatures(), Cells(out)
    facts = {**pictures.facts, "features": features.fingerprint}

    def true_features() -> Arrays:
        sets = {"true": features(pictures.true_NHW3), "reference": features(pictures.reference_NHW3)}
        return {f"{which}_{depth}": values for which, by_depth in sets.items() for depth, values in by_depth.items()}

    true = cells.get("true", made_of=facts, make=true_features)
    painted = []
    for number, place in enumerate(plan.models, start=1):
        progress = Progress.on_stderr(
            sum(cell.images for cell in plan.cells()), what=f"pictures painted, model {number} of {len(plan.models)}"
        )
        painted.append(
            _paint_model(place, plan=plan, pictures=pictures, facts=facts, features=features, cells=cells, progress=progress)
        )
        progress.close()
    return true, painted


def choose_pictures(source: DataSource, *, images: int, seed: int) -> HeldOutPictures:
    """Two disjoint sets of held-out pictures, drawn at random.

    Raises:
        ValueError: there are not that many.
    """
    held_out = HeldOut(source)
    if not source.validation_set.has_pairs or len(held_out) < 2 * images:
        raise ValueError(
            f"{source.validation_set.path} has {len(held_out)} held-out samples, but captions of {images} pictures and as many "
            f"others to compare with are needed: lower --images, or prepare more"
        )
    order = np.random.default_rng(seed).permutation(len(held_out))[: 2 * images]
    samples = [held_out.read(int(place)) for place in order]
    made_by = source.validation_set.index.made_by
    specs = {n: sample.metadata["spec"] for n, sample in enumerate(samples[:images])} if made_by["source"] == "shapes" else {}
    pixels = np.stack([source.picture(sample) for sample in samples])
    return HeldOutPictures(
        captions=[source.captions(sample)[0] for sample in samples[:images]],
        specs={n: spec for n, spec in specs.items() if len(spec["things"]) == 1},
        true_NHW3=pixels[:images],
        reference_NHW3=pixels[images:],
        facts={"data": source.validation_set.index.fingerprint, "images": images, "seed": seed},
    )


def _paint_model(
    place: str,
    *,
    plan: QualityPlan,
    pictures: HeldOutPictures,
    facts: dict[str, Any],
    features: PictureFeatures,
    cells: Cells,
    progress: Progress,
) -> Painted:
    opened = open_model(place)
    identity = opened.facts["model_sha256"]
    contents: list[Arrays] = []
    done = 0
    for cell in plan.cells():
        settings = settle(opened, rounds=plan.rounds, steps=cell.steps, sampler=cell.sampler, guidance_scale=plan.guidance_scale)

        def make(cell: Cell = cell, settings: dict[str, Any] = settings, done: int = done) -> Arrays:
            try:
                return _paint_cell(
                    opened, pictures, cell, settings, plan=plan, features=features, tell=lambda count: progress.at(done + count)
                )
            except FloatingPointError as error:
                raise ValueError(f"{place} with {cell.sampler} in {cell.steps} steps: {error}") from error

        name = f"{identity[:12]}-{cell.sampler}-{cell.steps}-of-{cell.images}"
        made_of = {**facts, **settings, "images": cell.images, "path_images": plan.path_images, "model_sha256": identity}
        contents.append(cells.get(name, made_of=made_of, make=make))
        done += cell.images
        progress.at(done)
    path, rest = (contents[0], contents[1:]) if plan.path_steps else (None, contents)
    keys = [(cell.sampler, cell.steps) for cell in plan.cells()[len(contents) - len(rest) :]]
    return Painted(predicts=opened.model.parameterization.name, cells=dict(zip(keys, rest, strict=True)), path=path)


def _paint_cell(
    opened: Opened,
    pictures: HeldOutPictures,
    cell: Cell,
    settings: dict[str, Any],
    *,
    plan: QualityPlan,
    features: PictureFeatures,
    tell: Callable[[int], None],
) -> Arrays:
    """Raises FloatingPointError where what was drawn is not finite."""
    parts: list[NDArray[np.uint8]] = []
    latents: list[NDArray[np.float32]] = []
    seconds = 0.0
    for begin in range(0, cell.images, plan.batch_size):
        inputs = opened.processor.to_paint(pictures.captions[begin : min(begin + plan.batch_size, cell.images)])
        start = time.perf_counter()
        latents_BNC = opened.model.generate_images(
            **inputs.to(opened.model.device), **settings, seed=plan.seed, first_number=begin
        )
        platform.synchronize()
        seconds += time.perf_counter() - start
        parts.append(opened.processor.to_pictures(latents_BNC))
        latents.append(latents_BNC[: max(0, plan.path_images - begin)].cpu().numpy())
        tell(begin + len(latents_BNC))
    painted_NHW3 = np.concatenate(parts)
    judged = [score_image(painted_NHW3[n], spec) for n, spec in pictures.specs.items() if n < cell.images]
    return {
        **features(painted_NHW3),
        "right_NA": np.array([[one[name] for name in ATTRIBUTES] for one in judged], dtype=bool).reshape(-1, len(ATTRIBUTES)),
        "latents": np.concatenate(latents),
        "seconds": np.array(seconds),
    }
