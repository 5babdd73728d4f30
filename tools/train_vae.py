"""Trains a small auto-encoder of images on a prepared data set, for `data.codec.kind: vae` where no pretrained one can be had.

    python tools/train_vae.py --data data/emoji --out models/vae-emoji --steps 2500

The result is a `diffusers.AutoencoderKL`: 8 x 8 pixels to a latent of 16 channels, 1.3 million parameters by default. Its
directory appears when it is complete, with `report.json` (PSNR and SSIM of held-out pictures, the settings) and
`reconstructions.png` (held-out pictures above what became of them). Where training was killed, the same command goes on from its
last checkpoint and ends with the same weights as if nothing had happened.

The loss is the mean absolute and the mean squared error of the pixels in [-1, 1], and `--kl_weight` times the mean divergence
of a latent from the normal distribution. Scale and shift in the config are measured on training pictures, such that tokens have
mean 0 and variance 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from mmar_megatron import platform
from mmar_megatron.data.index import Index
from mmar_megatron.data.shards import Sample, ShardReader
from mmar_megatron.data.vae import VAECodec, new_autoencoder, save_autoencoder
from mmar_megatron.evaluation.reconstruction import psnr, ssim

_CACHE_BYTES = 2**30
_MEASURED = 2048
"""Pictures of each split, at most, that scale and scores are measured on."""
_SHOWN = 12
_WARMUP_STEPS = 50
_NORM_GROUPS = 8
_FIRST_LOGVAR = -6.0


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it stands, and the defaults."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument(
        "--data", required=True, type=Path, default=argparse.SUPPRESS, metavar="DIR", help="a data set with its pictures"
    )
    parser.add_argument("--out", required=True, type=Path, default=argparse.SUPPRESS, metavar="DIR", help="directory to make")
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures in a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="largest learning rate: it rises for 50 steps, then falls to 0")
    parser.add_argument("--kl_weight", type=float, default=1e-4, help="weight of the divergence from the normal distribution")
    parser.add_argument("--latent_channels", type=int, default=16, help="channels of a latent")
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 80], help="width of each level, finest first")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and noise")
    parser.add_argument("--save_every", type=int, default=100, help="steps between checkpoints for going on after a kill")
    parser.add_argument("--fresh", action="store_true", help="begin anew even where a killed training could be gone on with")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; a user's mistake ends in one sentence and exit code 1."""
    args = build_parser().parse_args(argv)
    try:
        print(run(args))
    except ValueError as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> str:
    """Trains, measures and writes, and returns what to report."""
    downscale = 2 ** (len(args.channels) - 1)
    if args.out.exists():
        raise ValueError(f"{args.out} exists: remove it or choose another --out")
    if any(width % _NORM_GROUPS for width in args.channels):
        raise ValueError(f"--channels {args.channels} are not all multiples of {_NORM_GROUPS}, the groups of a norm: change them")
    if min(args.steps, args.batch_size, args.latent_channels, args.save_every) < 1:
        raise ValueError("--steps, --batch_size, --latent_channels and --save_every must be at least 1: raise them")
    index = Index.load(args.data)
    if not index.pictures:
        raise ValueError(f"{args.data} stores no pixels: prepare it without --vae, or with --keep_images, from pictures")
    if index.image_size % downscale:
        raise ValueError(
            f"the {index.image_size} pixels of {args.data} are not a multiple of the {downscale} that {len(args.channels)} "
            "--channels make one latent of: give fewer, or prepare pictures of another size"
        )
    train = ShardReader(args.data, index=index, split="train", cache_bytes=_CACHE_BYTES)
    held_out = ShardReader(args.data, index=index, split="validation")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    training = Training(args, reader=train, image_size=index.image_size)
    training.run()
    unfinished = args.out.with_name(f".{args.out.name}.unfinished-{os.getpid()}")
    try:
        report = finish(training, unfinished, train=train, held_out=held_out, image_size=index.image_size)
        unfinished.rename(args.out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    training.state_file.unlink(missing_ok=True)
    return (
        f"{args.out}: {report['parameters']:,} parameters; {report['held_out_pictures']:,} held-out pictures of "
        f"{index.image_size} pixels: PSNR {report['psnr']:.2f} dB, SSIM {report['ssim']:.4f}"
    )


class Training:
    """Weights, optimizer and step; all of it is in the state file, and what a step sees is a function of the seed and its number.

    Args:
        args: the command line.
        reader: the training pictures.
        image_size: pixels along each side.

    Raises:
        ValueError: a training with other settings was killed here.
    """

    def __init__(self, args: argparse.Namespace, *, reader: ShardReader, image_size: int) -> None:
        self._args = args
        self._reader = reader
        self.settings = {key: str(value) for key, value in vars(args).items() if key not in ("out", "fresh", "save_every")}
        self.state_file = args.out.with_name(f".{args.out.name}.training.pt")
        torch.manual_seed(args.seed)
        levels = len(args.channels)
        model = new_autoencoder(
            block_out_channels=tuple(args.channels),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            latent_channels=args.latent_channels,
            norm_num_groups=_NORM_GROUPS,
            sample_size=image_size,
        )
        initialize(model)
        self.model = model.to(platform.device(), memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr, betas=(0.9, 0.99))
        self.step = 0
        self.seconds = 0.0
        if args.fresh:
            self.state_file.unlink(missing_ok=True)
        elif self.state_file.is_file():
            self._load()

    def run(self) -> None:
        """To the last step, with a line on progress every few seconds."""
        args, begin, before = self._args, time.monotonic(), self.seconds
        next_line, first_step = begin, self.step
        while self.step < args.steps:
            absolute, divergence = self._one_step()
            self.step += 1
            now = time.monotonic()
            self.seconds = before + now - begin
            if self.step % args.save_every == 0 and self.step < args.steps:
                self._save()
            if now >= next_line or self.step == args.steps:
                left = (now - begin) / (self.step - first_step) * (args.steps - self.step)
                print(
                    f"step {self.step:,} of {args.steps:,}: mean error {127.5 * absolute:.2f} of 255, "
                    f"divergence {divergence:.2f}, {left:,.0f} s left",
                    flush=True,
                )
                next_line = now + 10

    def _one_step(self) -> tuple[float, float]:
        args = self._args
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * learning_rate_share(self.step, steps=args.steps)
        drawn = np.random.default_rng([args.seed, self.step])
        numbers = drawn.integers(len(self._reader), size=args.batch_size)
        pixels_BHW3 = pictures(self._reader, numbers)
        mirrored_B = drawn.random(args.batch_size) < 0.5
        pixels_BHW3[mirrored_B] = pixels_BHW3[mirrored_B, :, ::-1]
        images = to_images(pixels_BHW3)

        latents = self.model.encode(images).latent_dist
        eps = torch.tensor(drawn.standard_normal(tuple(latents.mean.shape), dtype=np.float32), device=images.device)
        painted = self.model.decode(latents.mean + latents.std * eps).sample
        absolute = F.l1_loss(painted, images)
        divergence = 0.5 * (latents.mean**2 + latents.var - 1 - latents.logvar).mean()
        loss = absolute + F.mse_loss(painted, images) + args.kl_weight * divergence
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return absolute.item(), divergence.item()

    def _save(self) -> None:
        partial = self.state_file.with_suffix(".partial")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "step": self.step, "seconds": self.seconds, "settings": self.settings}, partial)
        partial.replace(self.state_file)

    def _load(self) -> None:
        try:
            state = torch.load(self.state_file, map_location=platform.device(), weights_only=True)
        except Exception as error:  # whatever damage does to an archive with a pickle
            raise ValueError(f"{self.state_file} of a killed training is damaged: give --fresh to begin anew") from error
        if state["settings"] != self.settings:
            other = [f"--{key} {value}" for key, value in state["settings"].items() if self.settings.get(key) != value]
            raise ValueError(
                f"a training for {self._args.out} was begun with {' '.join(other)}: give that, or --fresh to begin anew"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        print(f"going on from step {self.step:,}", flush=True)


@torch.no_grad()
def initialize(model: Any) -> None:
    """Makes a fresh auto-encoder pass on, from its first step, what it reads.

    400 steps of 8 emoji of 32 pixels then reach 18.3 dB, not 15.8 (widths 32 64 64 64, the absolute error alone).
    torch's convolutions shrink the variance by 3 each, of which dozens leave nothing; here they keep it. Residual branches begin
    at zero. Noise as large as that of a normal distribution would drown the latents, so it begins small.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4:
            parameter.mul_(0 if name.endswith("conv2.weight") else math.sqrt(3))
    model.quant_conv.bias[model.config.latent_channels :] = _FIRST_LOGVAR


def learning_rate_share(step: int, *, steps: int) -> float:
    """A linear rise, then half a cosine down to 0."""
    warmup = min(_WARMUP_STEPS, steps)
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def to_images(pixels_BHW3: NDArray[np.uint8]) -> torch.Tensor:
    """Pixels uint8 [B, H, W, 3] -> [B, 3, H, W] in [-1, 1]."""
    images = torch.tensor(pixels_BHW3, device=platform.device(), dtype=torch.float32) / 127.5 - 1
    return rearrange(images, "b h w c -> b c h w")


def finish(training: Training, directory: Path, *, train: ShardReader, held_out: ShardReader, image_size: int) -> dict[str, Any]:
    """Writes weights, config, report and picture into `directory`, and returns the report."""
    model = training.model.eval().to(memory_format=torch.contiguous_format)
    save_autoencoder(model, directory, scaling_factor=1.0, shift_factor=0.0)
    mean_and_logvar = VAECodec(directory, image_size=image_size).moments(spread_pictures(train))
    mean, variance = mean_and_logvar[:, 0].astype(np.float64), np.exp(mean_and_logvar[:, 1].astype(np.float64))
    shift, noise = float(mean.mean()), float(variance.mean())
    std = math.sqrt(mean.var() + noise)
    save_autoencoder(model, directory, scaling_factor=1 / std, shift_factor=shift)

    originals_BHW3 = spread_pictures(held_out)
    codec = VAECodec(directory, image_size=image_size)
    reconstructed_BHW3 = codec.decode(codec.encode(originals_BHW3))
    report = {
        "psnr": float(psnr(originals_BHW3, reconstructed_BHW3).mean()),
        "ssim": float(ssim(originals_BHW3, reconstructed_BHW3).mean()),
        "held_out_pictures": len(originals_BHW3),
        "image_size": image_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "scaling_factor": 1 / std,
        "shift_factor": shift,
        "noise_share_of_token_variance": noise / std**2,
        "training_seconds": round(training.seconds, 1),
        "settings": training.settings,
    }
    (directory / "report.json").write_text(json.dumps(report, indent=2))
    write_comparison(directory / "reconstructions.png", originals_BHW3[:: -(-len(originals_BHW3) // _SHOWN)], codec)
    return report


def spread_pictures(reader: ShardReader) -> NDArray[np.uint8]:
    """At most 2,048 pictures, evenly spread: uint8 [B, H, W, 3]."""
    return pictures(reader, np.linspace(0, len(reader) - 1, min(len(reader), _MEASURED)).astype(int))


def pictures(reader: ShardReader, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The first picture of each of these samples, or of the next that has one, as a text has not: uint8 [B, H, W, 3]."""
    found = []
    for number in numbers.tolist():
        onwards = (n % len(reader) for n in range(number, number + len(reader)))
        found.append(reader.read_first(onwards, check=_first_picture).image_HW3)
    return np.stack(found)


def _first_picture(sample: Sample) -> NDArray[np.uint8]:
    return sample.image_HW3


def write_comparison(file: Path, originals_BHW3: NDArray[np.uint8], codec: VAECodec) -> None:
    """A PNG: the originals in the upper row, what became of them in the lower, twice as large as they are."""
    rows = [rearrange(pixels, "b h w c -> h (b w) c") for pixels in (originals_BHW3, codec.decode(codec.encode(originals_BHW3)))]
    Image.fromarray(np.concatenate(rows).repeat(2, axis=0).repeat(2, axis=1)).save(file)


if __name__ == "__main__":
    main()
