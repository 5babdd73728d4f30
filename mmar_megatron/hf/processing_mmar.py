"""Text and pictures <-> what `MMARForCausalLM` reads and gives. Ships with the weights.

Pictures are PIL images, or uint8 arrays [H, W, 3], which need no pillow where they have the model's size. Each text between two
special tokens is encoded by itself, as in training.

Axes: B sequences, S positions; M images, N tokens of an image, C channels of a token; H, W pixels.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from mmar_megatron.data.fitting import fit, on_white
from mmar_megatron.data.patches import from_patches, pixels_of, scaled, to_patches

IGNORE = -100
"""Label of a position that is not learned."""
QUESTION = "USER: {}\nASSISTANT: "
"""How a conversation's questions stand in training; answers stand as they are, and end in eos."""
VAE = "vae"
"""Where the auto-encoder lies, beside the processor."""


class MMARProcessor(ProcessorMixin):
    """The tokenizer and the image codec of a model.

    Args:
        tokenizer: with the special tokens below.
        codec: kind ("patch" or "vae"), image_size, patch_size, grid_height, grid_width, channels; of a vae also shift and scale,
            a number for each channel of its latents.
        special_tokens: ids of bos, eos, pad, begin_image, end_image and image.
        mask_ratio: distribution ("truncated_normal" or "uniform"), mean, std and minimum of the share of an image that is masked
            in training.
    """

    attributes: ClassVar = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        codec: dict[str, Any] | None = None,
        special_tokens: dict[str, int] | None = None,
        mask_ratio: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.codec, self.special_tokens, self.mask_ratio = codec or {}, special_tokens or {}, mask_ratio or {}
        self._directory: str | None = None
        self._autoencoder: Any = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> MMARProcessor:
        """See transformers."""
        # The tokenizer's, which has no code: transformers would ask for it on the terminal.
        options.setdefault("trust_remote_code", False)
        processor = super().from_pretrained(pretrained_model_name_or_path, **options)
        processor._directory = str(pretrained_model_name_or_path)  # where a vae lies
        return processor

    def save_pretrained(self, save_directory: Any, **options: Any) -> Any:
        """See transformers; a vae goes with it."""
        saved = super().save_pretrained(save_directory, **options)
        if self.codec.get("kind") == "vae":
            source, target = Path(self._directory or "", VAE), Path(save_directory, VAE)
            if not source.is_dir():
                self.autoencoder().save_pretrained(target)
            elif source.resolve() != target.resolve():
                shutil.copytree(source, target, dirs_exist_ok=True)
        return saved

    def to_dict(self, **options: Any) -> dict[str, Any]:
        """See transformers."""
        return {name: value for name, value in super().to_dict(**options).items() if not name.startswith("_")}

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` gives."""
        return ["input_ids", "attention_mask", "image_latents"]

    # --- sequences --------------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        *,
        answers: Sequence[str] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prompts, for `generate` or, with answers, for learning.

        Args:
            text: one or several, in which each `<image>` stands for the next of the images.
            images: all of them, in their order, also as an array [M, H, W, 3]; or None.
            answers: for each text; they follow it with eos, and are what is learned.
            return_tensors: "pt".

        Returns:
            input_ids and attention_mask [B, S], padded on the left; image_latents [M, N, C] where there are images; labels [B, S]
            where there are answers.

        Raises:
            ValueError: not as many `<image>` as images, or answers as texts; an array is no picture, or of another size where
                pillow is missing.
        """
        if text is None:
            raise ValueError("give text; for images alone it is '<image>'")
        texts = [text] if isinstance(text, str) else list(text)
        if answers is not None and len(answers) != len(texts):
            raise ValueError(f"there are {len(texts)} texts, but {len(answers)} answers: give one for each")
        rows = [self._with_images(one) for one in texts]
        labels = None
        if answers is not None:
            learned = [[*self._encode(answer), self.special_tokens["eos"]] for answer in answers]
            labels = [[IGNORE] * len(row) + answer for row, answer in zip(rows, learned, strict=True)]
            rows = [row + answer for row, answer in zip(rows, learned, strict=True)]
        return self._batch(rows, labels=labels, images=images, return_tensors=return_tensors)

    def converse(
        self, conversations: Sequence[Sequence[dict[str, str]]], images: Any = None, *, return_tensors: str = "pt"
    ) -> BatchFeature:
        """Conversations, as `__call__` gives prompts; where the last turn is an answer, all answers have labels.

        Args:
            conversations: turns {"role": "user" or "assistant", "content": text}, a "system" may come first; `<image>` in a
                question stands for an image.
            images: all of them, in their order, also as an array [M, H, W, 3]; or None.
            return_tensors: "pt".

        Raises:
            ValueError: as `__call__`; turns are not by user and assistant in turn, or not text.
        """
        rows, labels = [], []
        for turns in conversations:
            _check_turns(turns)
            row, learned = [self.special_tokens["bos"]], [IGNORE]
            for turn in turns:
                if turn["role"] == "system":
                    ids = self._encode(f"{turn['content']}\n")
                elif turn["role"] == "user":
                    ids = self._with_images(QUESTION.format(turn["content"]))[1:]
                else:
                    ids = [*self._encode(turn["content"]), self.special_tokens["eos"]]
                learned += ids if turn["role"] == "assistant" else [IGNORE] * len(ids)
                row += ids
            rows.append(row)
            labels.append(learned)
        answered = all(turns[-1]["role"] == "assistant" for turns in conversations)
        return self._batch(rows, labels=labels if answered else None, images=images, return_tensors=return_tensors)

    def to_paint(self, text: str | Sequence[str], images: Any = None, *, return_tensors: str = "pt") -> BatchFeature:
        """Captions, or "" for none, for `generate_images`.

        Where there are images, each `<image>` stands for the next of them, as in `__call__`; else it is text, as in training.
        """
        texts = [text] if isinstance(text, str) else list(text)
        ids = self.special_tokens
        read = [self._with_images(one) if images is not None else [ids["bos"], *self._encode(one)] for one in texts]
        rows = [[*row, ids["begin_image"]] for row in read]
        return self._batch(rows, labels=None, images=images, return_tensors=return_tensors)

    def to_learn_painting(
        self,
        text: Sequence[str],
        images: Sequence[Any],
        *,
        caption_dropout: float = 0.1,
        generator: torch.Generator | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Captions with their pictures, of which a random share is masked as in training, for `forward` to learn from.

        Args:
            text: captions.
            images: a picture for each.
            caption_dropout: share of captions that are left out, for classifier-free guidance.
            generator: of that choice and of the masks.
            return_tensors: "pt".

        Returns:
            As `__call__`, and image_masked, bool [M, N].
        """
        if len(text) != len(images):
            raise ValueError(f"there are {len(text)} captions, but {len(images)} images: give one for each")
        dropped = torch.rand(len(text), generator=generator) < caption_dropout
        ids = self.special_tokens
        rows = [
            [ids["bos"], *([] if drop else self._encode(one)), *self._image_tokens(), ids["eos"]]
            for one, drop in zip(text, dropped, strict=True)
        ]
        batch = self._batch(rows, labels=None, images=images, return_tensors=return_tensors)
        batch["image_masked"] = torch.stack([self._mask(generator) for _ in images])
        return batch

    def _with_images(self, text: str) -> list[int]:
        row = [self.special_tokens["bos"]]
        for number, piece in enumerate(text.split("<image>")):
            row += self._image_tokens() if number else []
            row += self._encode(piece) if piece else []
        return row

    def _image_tokens(self) -> list[int]:
        ids = self.special_tokens
        return [ids["begin_image"], *[ids["image"]] * self._num_tokens, ids["end_image"]]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _batch(self, rows: list[list[int]], *, labels: list[list[int]] | None, images: Any, return_tensors: str) -> BatchFeature:
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}: only 'pt' is there")
        if not rows:
            raise ValueError("there is no text: give at least one")
        longest = max(map(len, rows))
        several = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
        pictures = [] if images is None else list(images) if several else [images]
        places = sum(row.count(self.special_tokens["image"]) for row in rows) // max(self._num_tokens, 1)
        if places != len(pictures):
            raise ValueError(f"the texts have {places} times <image>, but there are {len(pictures)} images: give as many")
        batch = {
            "input_ids": torch.tensor([[self.special_tokens["pad"]] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }
        if pictures:
            batch["image_latents"] = self.to_latents(pictures)
        if labels is not None:
            batch["labels"] = torch.tensor([[IGNORE] * (longest - len(row)) + row for row in labels])
        return BatchFeature(data=batch)

    def _mask(self, generator: torch.Generator | None) -> Tensor:
        """At least one token of an image, at random places; the share as in training."""
        settings = self.mask_ratio
        low = settings["minimum"]
        if settings["distribution"] == "uniform":
            ratio = low + (1 - low) * float(torch.rand((), generator=generator))
        else:
            ratio = -1.0
            while not low <= ratio <= 1:
                ratio = settings["mean"] + settings["std"] * float(torch.randn((), generator=generator))
        count = max(1, int(np.ceil(ratio * self._num_tokens - 1e-9)))
        masked = torch.zeros(self._num_tokens, dtype=torch.bool)
        masked[torch.randperm(self._num_tokens, generator=generator)[:count]] = True
        return masked

    # --- pictures ---------------------------------------------------------------------------------------------------------------

    @property
    def _num_tokens(self) -> int:
        return int(self.codec["grid_height"] * self.codec["grid_width"])

    def to_latents(self, images: Sequence[Any]) -> Tensor:
        """Pictures -> tokens, fp32 [M, N, C]; of a vae the means."""
        pixels_MHW3 = np.stack([self._fitted(image) for image in images])
        if self.codec["kind"] == "patch":
            return torch.from_numpy(to_patches(scaled(pixels_MHW3), patch_size=self.codec["patch_size"]))
        model = self.autoencoder()
        with torch.no_grad():
            latents = model.encode(torch.from_numpy(scaled(pixels_MHW3)).movedim(-1, 1)).latent_dist.mean
        latents_MHWC = latents.movedim(1, -1).numpy()
        values = (latents_MHWC - self._per_channel("shift")) * self._per_channel("scale")
        return torch.from_numpy(to_patches(values, patch_size=self.codec["patch_size"]))

    def to_pictures(self, latents_MNC: Tensor) -> NDArray[np.uint8]:
        """Tokens -> pixels, uint8 [M, H, W, 3], each of which `PIL.Image.fromarray` takes."""
        tokens_MNC = latents_MNC.detach().float().cpu().numpy()
        sizes = {"rows": self.codec["grid_height"], "patch_size": self.codec["patch_size"]}
        if self.codec["kind"] == "patch":
            return pixels_of(from_patches(tokens_MNC, **sizes))
        model = self.autoencoder()
        latents_MHWC = from_patches(tokens_MNC, **sizes)
        latents_MHWC = latents_MHWC / self._per_channel("scale") + self._per_channel("shift")
        with torch.no_grad():
            pixels = model.decode(torch.from_numpy(latents_MHWC).movedim(-1, 1).contiguous()).sample
        return pixels_of(pixels.movedim(1, -1).numpy())

    def _fitted(self, image: Any) -> NDArray[np.uint8]:
        """Any picture -> uint8 [H, W, 3] of the model's size, as pictures were prepared for training."""
        size = self.codec["image_size"]
        if isinstance(image, (np.ndarray, Tensor)):
            pixels = np.asarray(image)
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
                raise ValueError(f"a picture is {pixels.dtype} {pixels.shape}: arrays must be uint8 [H, W, 3]")
            if pixels.shape[:2] == (size, size):
                return pixels
            try:
                image = importlib.import_module("PIL.Image").fromarray(pixels)
            except ImportError as error:
                raise ValueError(
                    f"a picture is {pixels.shape[1]} x {pixels.shape[0]}, the model's are {size} x {size}: install pillow, with "
                    "which it is resized"
                ) from error
        if not hasattr(image, "convert"):
            raise ValueError(f"a picture is a {type(image).__name__}: give PIL images, or arrays uint8 [H, W, 3]")
        upright = importlib.import_module("PIL.ImageOps").exif_transpose(image)
        return fit(on_white(upright), image_size=size)

    def _per_channel(self, name: str) -> NDArray[np.float32]:
        return np.asarray(self.codec[name], dtype=np.float32)

    def autoencoder(self) -> Any:
        """The codec's `diffusers.AutoencoderKL`, loaded when it is first asked for."""
        if self._autoencoder is None:
            if self._directory is None:
                raise ValueError("the auto-encoder lies beside the processor: load that with from_pretrained")
            try:
                diffusers = importlib.import_module("diffusers")
            except ImportError as error:
                raise ImportError("this model's images are latents of a diffusers AutoencoderKL: install diffusers") from error
            model = diffusers.AutoencoderKL.from_pretrained(
                self._directory, subfolder=VAE, torch_dtype=torch.float32, low_cpu_mem_usage=False
            )
            self._autoencoder = model.eval().requires_grad_(False)
        return self._autoencoder


def _check_turns(conversation: Sequence[dict[str, str]]) -> None:
    for turn in conversation:
        if not isinstance(turn["content"], str):
            raise ValueError(f"the content of a turn is a {type(turn['content']).__name__}: give text, with <image> for an image")
    roles = [turn["role"] for turn in conversation]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != (["user", "assistant"] * len(turns))[: len(turns)]:
        raise ValueError(f"the turns of a conversation are by {', '.join(roles) or 'nobody'}: user and assistant must take turns")
