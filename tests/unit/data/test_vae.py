"""The codec of latents against diffusers' own calls, in each layout."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from mmar_megatron.config import CodecConfig
from mmar_megatron.data import vae
from mmar_megatron.data import weights as weights_module
from mmar_megatron.data.codec import ImageCodec, build_codec
from mmar_megatron.data.vae import MomentsEncoder, VAECodec, sample_tokens
from tests.unit.data.autoencoders import LAYOUTS, make_autoencoder

SIZE = 32
WEIGHTS = vae.WEIGHTS_NAMES[0]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("autoencoders")
    for layout in LAYOUTS:
        make_autoencoder(root / layout, layout)
    return {layout: root / layout for layout in LAYOUTS}


@pytest.fixture
def copy(directories: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(directories["sd"], tmp_path / "sd"))


@pytest.fixture(scope="module")
def pixels_BHW3() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)


def reference_latents(directory: Path, pixels_BHW3: NDArray[np.uint8]) -> Any:
    """diffusers' distribution of the unscaled latents [B, C, H, W]."""
    pixels = torch.tensor(pixels_BHW3).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        return AutoencoderKL.from_pretrained(directory).eval().encode(pixels).latent_dist


@pytest.mark.parametrize(("layout", "shift", "scale"), [("sd", 0, 0.18215), ("flux", 0.1159, 0.3611), ("kl16", 0, 0.2325)])
def test_tokens_are_the_scaled_latents_of_diffusers(
    directories: dict[str, Path], pixels_BHW3: NDArray[np.uint8], layout: str, shift: float, scale: float
) -> None:
    codec = VAECodec(directories[layout], image_size=SIZE)
    side = SIZE // (16 if layout == "kl16" else 8)
    channels = 4 if layout == "sd" else 16
    assert (codec.grid_height, codec.grid_width, codec.num_tokens, codec.channels) == (side, side, side**2, channels)
    latents = reference_latents(directories[layout], pixels_BHW3)

    tokens_BNC = codec.encode(pixels_BHW3)
    assert (tokens_BNC.dtype, tokens_BNC.shape) == (np.float32, (3, side**2, channels))
    expected_BNC = ((latents.mean - shift) * scale).flatten(2).transpose(1, 2).numpy()
    np.testing.assert_allclose(tokens_BNC, expected_BNC, atol=1e-6)

    std_BNC = (latents.std * scale).flatten(2).transpose(1, 2).numpy()
    moments_B2NC = codec.moments(pixels_BHW3)
    assert moments_B2NC.dtype == np.float32
    np.testing.assert_array_equal(moments_B2NC[:, 0], tokens_BNC)
    np.testing.assert_allclose(np.exp(moments_B2NC[:, 1] / 2), std_BNC, atol=1e-6)

    with torch.no_grad():
        model = AutoencoderKL.from_pretrained(directories[layout]).eval()
        decoded = model.decode(torch.tensor(expected_BNC).transpose(1, 2).unflatten(2, (side, side)) / scale + shift).sample
    expected_BHW3 = ((decoded.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    decoded_BHW3 = codec.decode(expected_BNC)
    assert decoded_BHW3.dtype == np.uint8
    np.testing.assert_allclose(decoded_BHW3, expected_BHW3, atol=0.501)


def test_patches_of_latents_are_tokens_and_come_apart_again(directories: dict[str, Path], pixels_BHW3: NDArray[np.uint8]) -> None:
    fine, coarse = (VAECodec(directories["sd"], image_size=SIZE, patch_size=patch_size) for patch_size in (1, 2))
    assert (coarse.num_tokens, coarse.channels) == (4, 16)
    fine_BHWC = fine.encode(pixels_BHW3).reshape(3, 4, 4, 4)
    coarse_BNC = coarse.encode(pixels_BHW3)
    np.testing.assert_array_equal(coarse_BNC[:, 1], fine_BHWC[:, 0:2, 2:4].reshape(3, 16))  # the second patch: top right
    np.testing.assert_array_equal(coarse.decode(coarse_BNC), fine.decode(fine_BHWC.reshape(3, 16, 4)))
    latents = torch.randn(2, 4, 4, 4)
    assert torch.equal(coarse._to_latents(coarse._to_tokens(latents)), latents)


def test_leading_axes_and_chunks_change_nothing(
    directories: dict[str, Path], pixels_BHW3: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = VAECodec(directories["sd"], image_size=SIZE)
    whole_BNC = codec.encode(pixels_BHW3)
    np.testing.assert_allclose(codec.encode(pixels_BHW3[0]), whole_BNC[0], atol=1e-6)
    np.testing.assert_array_equal(codec.encode(pixels_BHW3[None, :]), whole_BNC[None])
    assert codec.decode(whole_BNC[0]).shape == (SIZE, SIZE, 3)
    assert codec.decode(whole_BNC[:0]).shape == (0, SIZE, SIZE, 3)
    assert codec.encode(pixels_BHW3[:0]).shape == (0, 16, 4)
    monkeypatch.setattr(vae, "_PIXELS_AT_A_TIME", 2 * SIZE**2)
    np.testing.assert_allclose(codec.encode(pixels_BHW3), whole_BNC, atol=1e-6)
    with pytest.raises(ValueError, match="this codec's are 32 pixels"):
        codec.encode(pixels_BHW3[:, :16, :16])


def test_means_and_deviations_for_each_channel(tmp_path: Path, pixels_BHW3: NDArray[np.uint8]) -> None:
    """SDXL-like configs with `latents_mean` and `latents_std`, as diffusers' pipelines read them."""
    mean, std = [0.5, -1.0, 0.25, 2.0], [1.0, 2.0, 4.0, 0.5]
    make_autoencoder(tmp_path / "vae", latents_mean=mean, latents_std=std, scaling_factor=0.5)
    tokens_BNC = VAECodec(tmp_path / "vae", image_size=SIZE).encode(pixels_BHW3)
    latents = reference_latents(tmp_path / "vae", pixels_BHW3).mean.flatten(2).transpose(1, 2).numpy()
    np.testing.assert_allclose(tokens_BNC, (latents - mean) * 0.5 / std, atol=1e-6)


def test_stored_moments(directories: dict[str, Path], pixels_BHW3: NDArray[np.uint8]) -> None:
    codec = VAECodec(directories["flux"], image_size=SIZE, patch_size=2)
    encoder = MomentsEncoder(codec, flip=True)
    stored = encoder(pixels_BHW3)
    assert encoder.fingerprint == codec.fingerprint
    assert stored.keys() == {"moments", "flipped"}
    assert all((array.dtype, array.shape) == (np.float16, (3, 2, 4, 64)) for array in stored.values())
    np.testing.assert_array_equal(stored["moments"], codec.moments(pixels_BHW3).astype(np.float16))
    mirrored_BHW3 = np.ascontiguousarray(pixels_BHW3[:, :, ::-1])
    np.testing.assert_array_equal(stored["flipped"], codec.moments(mirrored_BHW3).astype(np.float16))
    assert not np.array_equal(stored["flipped"], stored["moments"])
    assert MomentsEncoder(codec, flip=False)(pixels_BHW3).keys() == {"moments"}


def test_extreme_moments_stay_finite(tmp_path: Path, pixels_BHW3: NDArray[np.uint8]) -> None:
    model = make_autoencoder(tmp_path / "vae")
    with torch.no_grad():
        model.quant_conv.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "vae")
    codec = VAECodec(tmp_path / "vae", image_size=SIZE)
    logvar_BNC = codec.moments(pixels_BHW3)[:, 1]
    expected = np.array([-30.0, 20.0]) + 2 * np.log(0.18215)
    np.testing.assert_allclose([logvar_BNC.min(), logvar_BNC.max()], expected, rtol=1e-6)
    assert all(np.isfinite(array).all() for array in MomentsEncoder(codec, flip=True)(pixels_BHW3).values())


def test_samples_have_the_moments() -> None:
    generator = np.random.default_rng(0)
    mean_NC, std_NC = np.array([[1.0, -2.0]]), np.array([[0.5, 3.0]])
    moments_2NC = np.stack([mean_NC, 2 * np.log(std_NC)]).astype(np.float16)
    samples = np.stack([sample_tokens(moments_2NC, generator) for _ in range(20_000)])
    assert (samples.dtype, samples.shape) == (np.float32, (20_000, 1, 2))
    np.testing.assert_allclose(samples.mean(0), mean_NC, atol=4 * 3 / 20_000**0.5)
    np.testing.assert_allclose(samples.std(0), std_NC, rtol=0.02)
    moments_2NC[1] = -30
    np.testing.assert_allclose(sample_tokens(moments_2NC, generator), mean_NC, atol=1e-5)
    expected = np.random.default_rng(7).standard_normal((1, 2), dtype=np.float32)
    np.testing.assert_array_equal(sample_tokens(np.zeros((2, 1, 2), np.float16), np.random.default_rng(7)), expected)


def test_weights_are_read_when_first_needed(
    directories: dict[str, Path], pixels_BHW3: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Path] = []
    load = vae.load_autoencoder

    def counted(path: Path) -> Any:
        loads.append(path)
        return load(path)

    monkeypatch.setattr(vae, "load_autoencoder", counted)
    codec = VAECodec(directories["sd"], image_size=SIZE)
    assert codec.fingerprint
    sample_tokens(np.zeros((2, codec.num_tokens, codec.channels), np.float16), np.random.default_rng(0))
    assert loads == []
    tokens_BNC = codec.encode(pixels_BHW3)
    assert codec.decode(tokens_BNC).shape == pixels_BHW3.shape
    assert loads == [directories["sd"]]

    travelled = pickle.loads(pickle.dumps(codec))
    assert len(loads) == 1
    np.testing.assert_array_equal(travelled.encode(pixels_BHW3), tokens_BNC)
    assert len(loads) == 2


def test_loading_draws_nothing_from_the_global_generator(directories: dict[str, Path]) -> None:
    before = torch.get_rng_state()
    vae.load_autoencoder(directories["sd"])
    assert torch.equal(torch.get_rng_state(), before)


def test_fingerprint(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(path: Path = copy, **sizes: int) -> str:
        return VAECodec(path, image_size=SIZE, **sizes).fingerprint

    original = fingerprint()
    elsewhere = Path(shutil.copytree(copy, tmp_path / "elsewhere"))
    config = json.loads((elsewhere / "config.json").read_text())
    (elsewhere / "config.json").write_text(json.dumps({**dict(reversed(config.items())), "_diffusers_version": "9"}))
    assert fingerprint(elsewhere) == original
    assert fingerprint(patch_size=2) != original
    assert VAECodec(copy, image_size=64).fingerprint != original

    (elsewhere / "config.json").write_text(json.dumps({**config, "scaling_factor": 1.0}))
    assert fingerprint(elsewhere) != original
    weights = load_file(copy / WEIGHTS)
    weights["encoder.conv_in.weight"][0, 0, 0, 0] += 1
    save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
    assert fingerprint() != original

    # A large file is represented by blocks of it, the first and the last among them.
    monkeypatch.setattr(weights_module, "_HASHED_WHOLE", 0)
    monkeypatch.setattr(weights_module, "_HASHED_BLOCKS", 8)
    monkeypatch.setattr(weights_module, "_BLOCK_BYTES", 64)
    sampled = fingerprint()
    for tensor in weights.values():
        tensor += 1e-3
    save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
    assert fingerprint() != sampled


def test_weights_in_torchs_format_and_with_the_old_names_of_attention(
    copy: Path, directories: dict[str, Path], pixels_BHW3: NDArray[np.uint8]
) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    for new_name, old_name in old.items():
        weights = {name.replace(f".{new_name}.", f".{old_name}."): tensor for name, tensor in weights.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in weights
    torch.save(weights, copy / vae.WEIGHTS_NAMES[1])
    expected = VAECodec(directories["sd"], image_size=SIZE).encode(pixels_BHW3)
    np.testing.assert_array_equal(VAECodec(copy, image_size=SIZE).encode(pixels_BHW3), expected)


def refuse(path: Path, message: str, *, image_size: int = SIZE) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        VAECodec(path, image_size=image_size).decode(np.zeros((16, 4), np.float32))
    assert "\n" not in str(caught.value)


def test_what_is_no_autoencoder_is_refused(copy: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "there is no directory .*nowhere: give the directory of a diffusers AutoencoderKL")
    (tmp_path / "kl16.ckpt").write_bytes(b"")
    refuse(
        tmp_path / "kl16.ckpt",
        r"kl16.ckpt is a file: convert it with `python tools/convert_vae.py .*kl16.ckpt --out DIR --scaling_factor SCALE`",
    )
    refuse(copy, "image_size 36 is not a multiple of 8, .*: change one", image_size=36)
    config = json.loads((copy / "config.json").read_text())
    for change, message in (
        ({"_class_name": "AutoencoderTiny"}, "is of AutoencoderTiny, not of an AutoencoderKL"),
        ({"in_channels": 1}, "is not for pictures of 3 channels"),
        ({"latent_channels": 8}, "the weights in .* cannot be loaded .*: copy the directory again"),
        ({"layers_per_block": 2}, "lacks [0-9]+ weights that its config asks for, such as .*: copy it again"),
    ):
        (copy / "config.json").write_text(json.dumps({**config, **change}))
        refuse(copy, message)
    del config["latent_channels"]
    (copy / "config.json").write_text(json.dumps(config))
    refuse(copy, "has no latent_channels")
    (copy / "config.json").write_text("{")
    refuse(copy, "config.json is not a JSON object: copy it again")
    (copy / "config.json").unlink()
    refuse(copy, "has no config.json: give the directory")


def test_damaged_weights_are_refused(copy: Path) -> None:
    content = (copy / WEIGHTS).read_bytes()
    for damaged in (b"", content[:5], content[:200], content[:-1], content + b"x"):
        (copy / WEIGHTS).write_bytes(damaged)
        refuse(copy, "diffusion_pytorch_model.safetensors is cut off or no file of weights: copy it again")
    (copy / WEIGHTS).unlink()
    refuse(copy, "has no diffusion_pytorch_model.safetensors: copy the weights there too")
    torch.save({}, copy / vae.WEIGHTS_NAMES[1])
    (copy / vae.WEIGHTS_NAMES[1]).write_bytes((copy / vae.WEIGHTS_NAMES[1]).read_bytes()[:-30])
    refuse(copy, "diffusion_pytorch_model.bin is cut off")


def test_built_from_the_config(directories: dict[str, Path]) -> None:
    codec: ImageCodec = build_codec(CodecConfig(kind="vae", path=str(directories["kl16"]), image_size=64))
    assert (codec.num_tokens, codec.channels, codec.image_size) == (16, 16, 64)
    assert build_codec(CodecConfig(kind="vae", path=str(directories["kl16"]), image_size=64, patch_size=2)).num_tokens == 4
    assert build_codec(CodecConfig()).fingerprint == "patch, image_size 32, patch_size 4"
    with pytest.raises(ValueError, match="give it"):
        build_codec(CodecConfig(kind="vae"))
