"""Conversion of latent diffusion's auto-encoders, against its networks written out here with its names."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from mmar_megatron.data.ldm import config_of, convert, diffusers_names, read_checkpoint
from mmar_megatron.data.vae import load_autoencoder


class Block(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, inner, eps=1e-6), nn.GroupNorm(32, outer, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)
        if inner != outer:
            self.nin_shortcut = nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (project(h).flatten(2) for project in (self.q, self.k, self.v))
        weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(dim=2)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = Block(width, width), Attention(width), Block(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Resize(nn.Module):
    def __init__(self, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=2 - stride)

    def forward(self, x: Tensor) -> Tensor:
        coarser = self.conv.stride == (2, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)) if coarser else F.interpolate(x, scale_factor=2.0, mode="nearest"))


def level(widths: list[int], *, attends: bool) -> nn.Module:
    module = nn.Module()
    module.block = nn.ModuleList(Block(inner, outer) for inner, outer in pairwise(widths))
    module.attn = nn.ModuleList(Attention(width) for width in widths[1:] if attends)
    return module


def levels_of(coder: Any) -> list[Any]:
    """In the order of computation."""
    return [*reversed(coder.up)] if coder.decodes else [*coder.down]


def through(module: Any, h: Tensor) -> Tensor:
    for number, block in enumerate(module.block):
        h = block(h)
        h = module.attn[number](h) if len(module.attn) else h
    return h


class Coder(nn.Module):
    """Encoder or decoder; `widths` finest first."""

    def __init__(self, widths: list[int], *, channels: int, blocks: int, attends_last: bool, decodes: bool) -> None:
        super().__init__()
        self.decodes, self.widths = decodes, widths
        order = list(range(len(widths)))[:: -1 if decodes else 1]
        levels: dict[int, Any] = {}
        width = widths[order[0]]
        self.conv_in = nn.Conv2d(channels if decodes else 3, width, 3, padding=1)
        if decodes:
            self.mid = Middle(width)
        for i in order:
            levels[i] = level([width, *[widths[i]] * (blocks + decodes)], attends=attends_last and i == len(widths) - 1)
            width = widths[i]
            if decodes and i > 0:
                levels[i].upsample = Resize(width, stride=1)
            elif not decodes and i < len(widths) - 1:
                levels[i].downsample = Resize(width, stride=2)
        setattr(self, "up" if decodes else "down", nn.ModuleList(levels[i] for i in range(len(widths))))
        if not decodes:
            self.mid = Middle(width)
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 3 if decodes else 2 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        if self.decodes:
            h = self.mid(h)
            for module in levels_of(self):
                h = through(module, h)
                h = module.upsample(h) if hasattr(module, "upsample") else h
        else:
            for module in levels_of(self):
                h = through(module, h)
                h = module.downsample(h) if hasattr(module, "downsample") else h
            h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Original(nn.Module):
    def __init__(self, widths: list[int], *, channels: int, attends_last: bool, quantizes: bool) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"channels": channels, "blocks": 2, "attends_last": attends_last}
        self.encoder = Coder(widths, **sizes, decodes=False)
        self.decoder = Coder(widths, **sizes, decodes=True)
        if quantizes:
            self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
            self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        return self.quant_conv(h) if hasattr(self, "quant_conv") else h

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z) if hasattr(self, "post_quant_conv") else z)


LAYOUTS: dict[str, dict[str, Any]] = {
    "kl16": {"widths": [32, 32, 64, 64, 96], "channels": 16, "attends_last": True, "quantizes": True},
    "sd": {"widths": [32, 64, 96, 96], "channels": 4, "attends_last": False, "quantizes": True},
    "flux": {"widths": [32, 64, 96, 96], "channels": 16, "attends_last": False, "quantizes": False},
}


def original(layout: str) -> Original:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Original(**LAYOUTS[layout]).eval()


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_converted_network_computes_the_same(tmp_path: Path, layout: str) -> None:
    reference = original(layout)
    save_file(reference.state_dict(), tmp_path / "ae.safetensors")
    convert(tmp_path / "ae.safetensors", tmp_path / "out", scaling_factor=0.5, shift_factor=0.25)
    model = load_autoencoder(tmp_path / "out").eval().double()
    assert (model.config.scaling_factor, model.config.shift_factor) == (0.5, 0.25)
    reference.double()  # fp32 would leave the last digits to the order of sums
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    parameters = reference.encode(images)
    mean, logvar = parameters.chunk(2, dim=1)
    latents = model.encode(images).latent_dist
    torch.testing.assert_close(latents.mean, mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(latents.logvar, logvar, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model.decode(mean).sample, reference.decode(mean), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layout", ["sd", "flux"])
def test_names_are_those_of_diffusers_converter(layout: str) -> None:
    weights = original(layout).state_dict()
    ours, theirs = diffusers_names(weights), convert_ldm_vae_checkpoint(dict(weights), config_of(weights))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].view_as(ours[name])) for name in ours)


@pytest.mark.parametrize("wrap", ["", "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_how_checkpoints_hold_it(tmp_path: Path, wrap: str, prefix: str) -> None:
    weights = original("sd").state_dict()
    content: dict[str, Any] = {prefix + name: weight for name, weight in weights.items()}
    content |= {"loss.logvar": torch.zeros(()), "model.diffusion_model.out.0.weight": torch.zeros(1)}
    torch.save({wrap: content} if wrap else content, tmp_path / "sd.ckpt")
    found = read_checkpoint(tmp_path / "sd.ckpt")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_what_is_no_autoencoder_is_refused(tmp_path: Path) -> None:
    def refuse(content: Any, message: str) -> None:
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "x.ckpt", tmp_path / "out", scaling_factor=1.0)
        assert not (tmp_path / "out").exists()

    with pytest.raises(ValueError, match=r"there is no file .*nothing: give a checkpoint"):
        convert(tmp_path / "nothing", tmp_path / "out", scaling_factor=1.0)
    weights = original("sd").state_dict()
    refuse({"a": torch.zeros(1)}, "has no weights named encoder and decoder")
    refuse({**weights, "quant_conv.weight": torch.zeros(6, 8, 1, 1)}, "embed_dim is not z_channels")
    refuse({name: w for name, w in weights.items() if "mid.block_2" not in name}, "is no auto-encoder of latent diffusion")
    refuse({"weights": weights, "by": Fraction(1)}, "holds more than weights, which could run as a program")
    (tmp_path / "x.ckpt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"x\.ckpt is cut off"):
        read_checkpoint(tmp_path / "x.ckpt")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists: remove it"):
        convert(tmp_path / "x.ckpt", tmp_path / "out", scaling_factor=1.0)
