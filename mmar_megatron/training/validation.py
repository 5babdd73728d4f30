"""Held-out losses, and whether the model heeds its conditions."""

from __future__ import annotations

from typing import Literal

from mmar_megatron.config import Config
from mmar_megatron.data.batch import Batch
from mmar_megatron.data.held_out import HeldOut, ValidationLoader
from mmar_megatron.data.source import DataSource
from mmar_megatron.engine.base import Engine
from mmar_megatron.parallel import ParallelGroups


class Validation:
    """The same held-out microbatches each time: a grid of (mask ratio x noise level x noise) for images, captions for text.

    Beside the losses themselves it measures them under wrong conditions: an image given another one's caption, a caption given
    another image. A model that ignores its condition, the commonest silent failure, does not mind. Data without pairs of
    picture and caption have a text loss alone.
    """

    def __init__(self, config: Config, *, source: DataSource, groups: ParallelGroups) -> None:
        self._config = config
        self._held_out = HeldOut(source)
        self._groups = groups
        self._batches = {"text": self._load("image_to_text")}
        if source.validation_set.has_pairs:
            self._batches |= {
                "image": self._load("text_to_image"),
                "image_wrong_text": self._load("text_to_image", wrong_condition=True),
                "text_wrong_image": self._load("image_to_text", wrong_condition=True),
            }

    def _load(self, task: Literal["text_to_image", "image_to_text"], *, wrong_condition: bool = False) -> list[Batch]:
        config = self._config
        loader = ValidationLoader(
            self._held_out,
            seed=config.seed,
            timesteps=config.validation.timesteps,
            mask_ratios=config.validation.mask_ratios,
            samples=config.validation.samples,
            micro_batch_size=config.train.micro_batch_size,
            data_parallel_rank=self._groups.data.rank(),
            data_parallel_size=self._groups.data.size(),
            task=task,
            wrong_condition=wrong_condition,
        )
        return list(loader)

    def run(self, engine: Engine) -> dict[str, float]:
        """Means over held-out tokens, by their names in `metrics.jsonl`. All ranks call it together."""
        with engine.evaluating():
            results = {name: engine.evaluate(batches) for name, batches in self._batches.items()}
        text = results["text"]
        losses = {"val_loss_text": float(text.sums.text / text.counts.text)}
        if "image" not in results:
            return losses
        image, wrong_text, wrong_image = (results[name] for name in ("image", "image_wrong_text", "text_wrong_image"))
        return losses | {
            "val_loss_image": float(image.sums.image / image.counts.image),
            "val_loss_image_zero": float(image.sums.image_zero / image.counts.image),
            "val_loss_text_wrong_image": float(wrong_image.sums.text / wrong_image.counts.text),
            "val_loss_image_wrong_text": float(wrong_text.sums.image / wrong_text.counts.image),
        }
