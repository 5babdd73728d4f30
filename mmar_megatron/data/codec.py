"""Image codecs: picture <-> continuous tokens.

Axes: B pictures, H, W pixels, C channels of a token, N tokens of an image in raster order; "..." any leading axes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.config_checks import DEFAULT_PATCH_SIZE
from mmar_megatron.data.patches import from_patches, pixels_of, scaled, to_patches

if TYPE_CHECKING:
    from mmar_megatron.config import CodecConfig


class ImageCodec(Protocol):
    """What loader, model and sampler need to know of a codec."""

    grid_height: int
    grid_width: int
    num_tokens: int
    channels: int
    image_size: int

    @property
    def fingerprint(self) -> str:
        """Of all that decides what a token means."""

    def encode(self, image_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels [..., H, W, 3] -> tokens [..., N, C]."""

    def decode(self, tokens_NC: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Tokens [..., N, C] -> pixels [..., H, W, 3]."""


class Encoder(Protocol):
    """What preparation runs pictures through, to store the results with the samples."""

    @property
    def fingerprint(self) -> str:
        """Of all that decides the results."""

    def __call__(self, pixels_BHW3: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Pixels uint8 [B, H, W, 3] -> arrays [B, ...] by name; the members `<key>.<name>.npy` hold their rows."""


class PatchCodec:
    """The pixels of each patch, scaled to [-1, 1], are one token: `decode(encode(image))` is the image, to the bit.

    Args:
        image_size: pixels along each side of the image.
        patch_size: pixels along each side of a patch; C = 3 * patch_size ** 2.

    Raises:
        ValueError: the image does not divide into patches.
    """

    def __init__(self, *, image_size: int, patch_size: int) -> None:
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}: change one of them")
        self.image_size = image_size
        self.patch_size = patch_size
        self.grid_height = self.grid_width = image_size // patch_size
        self.num_tokens = self.grid_height * self.grid_width
        self.channels = 3 * patch_size**2
        self.fingerprint = f"patch, image_size {image_size}, patch_size {patch_size}"

    def encode(self, image_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels uint8 [..., H, W, 3] -> tokens float32 [..., N, C] in [-1, 1]."""
        return to_patches(scaled(image_HW3), patch_size=self.patch_size)

    def decode(self, tokens_NC: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Tokens [..., N, C] -> pixels uint8 [..., H, W, 3]; values outside [-1, 1] are clipped."""
        return pixels_of(from_patches(tokens_NC, rows=self.grid_height, patch_size=self.patch_size))


def build_codec(config: CodecConfig) -> ImageCodec:
    """The codec of `data.codec`.

    Raises:
        ValueError: the sizes do not divide; the auto-encoder is not there or not whole.
    """
    patch_size = DEFAULT_PATCH_SIZE[config.kind] if config.patch_size is None else config.patch_size
    if config.kind == "patch":
        return PatchCodec(image_size=config.image_size, patch_size=patch_size)
    if config.path is None:
        raise ValueError("data.codec.kind vae needs data.codec.path, the directory of the auto-encoder: give it")
    from mmar_megatron.data.vae import VAECodec  # here, since torch takes seconds, and preparing with patches needs none

    return VAECodec(config.path, image_size=config.image_size, patch_size=patch_size)
