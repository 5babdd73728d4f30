"""What was trained in any layout and what is exported of it are the same model.

Axes: B sequences, S positions, M images, N tokens of an image.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mmar_megatron.hf.exporting import export, open_checkpoint
from mmar_megatron.hf.importing import import_model
from mmar_megatron.hf.modeling_mmar import IGNORE, MMARForCausalLM
from mmar_megatron.hf.processing_mmar import MMARProcessor
from mmar_megatron.hf.verifying import compare
from tests.distributed.common import make_data
from tests.distributed.export_worker import CAPTIONS, SAMPLINGS
from tests.distributed.launch import run_group
from tests.distributed.test_layouts import PP2, SP, TP2

WORKER = Path(__file__).with_name("export_worker.py")
OTHER_MODEL = [
    *("--model.tie_embeddings", "false", "--model.backbone.add_qkv_bias", "true", "--model.backbone.qk_layernorm", "true"),
    *("--model.rotary_scaling.scaling", "llama3", "--model.rotary_scaling.factor", "8"),
    *("--model.rotary_scaling.original_max_position", "64", "--model.backbone.kv_channels", "12"),
]
BF16 = ["--precision.dtype", "bf16"]
ONE: dict[str, list[str]] = {"one": [], "one bf16": BF16, "one other": OTHER_MODEL}
TWO = {"TP2 SP": [*TP2, *SP], "PP2": PP2, "TP2 other": [*TP2, *OTHER_MODEL], "TP2 bf16": [*TP2, *SP, *BF16]}
FP32 = [name for name in (*ONE, *TWO) if "bf16" not in name]
HALF = [name for name in (*ONE, *TWO) if "bf16" in name]


class Pair(NamedTuple):
    """What training said, and the model that was exported."""

    said: Mapping[str, Any]
    model: MMARForCausalLM
    directory: Path
    checkpoint: Path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """By layout."""
    folder = tmp_path_factory.mktemp("exports")
    data = make_data(folder / "shapes")
    run_group(WORKER, str(data), str(folder), json.dumps(ONE), nproc=1, timeout=120)
    run_group(WORKER, str(data), str(folder), json.dumps(TWO), nproc=2, timeout=180)
    return {name: exported(folder, name) for name in (*ONE, *TWO)}


def exported(folder: Path, name: str) -> Pair:
    directory = folder / f"{name} hf"
    source = open_checkpoint(folder / name)
    export(source, directory, say=lambda _: None)
    model = MMARForCausalLM.from_pretrained(directory, dtype="auto").eval()
    return Pair(torch.load(folder / f"{name}.pt", weights_only=False), model, directory, source.path)


def processor_of(pair: Pair) -> MMARProcessor:
    return MMARProcessor.from_pretrained(pair.directory)


def hugging_face_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of one document a row, in the words of Hugging Face: labels stand where the token is, not one before."""
    occupied_M = (batch["visible_MN"] | batch["masked_MN"]).any(dim=1)
    labels_BS = torch.full_like(batch["labels_BS"], IGNORE)
    labels_BS[:, 1:] = batch["labels_BS"][:, :-1]
    inputs = {
        "input_ids": batch["tokens_BS"],
        "attention_mask": (batch["document_ids_BS"] >= 0).long(),
        "image_latents": batch["latents_MNC"][occupied_M],
        "image_masked": batch["masked_MN"][occupied_M],
        "timesteps": batch["timesteps_MNR"][occupied_M],
        "noise": batch["noise_MNRC"][occupied_M],
        "labels": labels_BS,
    }
    return inputs


def deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


@torch.no_grad()
def deviations(pair: Pair) -> dict[str, float]:
    batch = pair.said["batch"]
    output = pair.model(**hugging_face_inputs(batch))
    inside_BS = batch["document_ids_BS"] >= 0
    return {
        "logits": deviation(output.logits[inside_BS], pair.said["logits"][inside_BS]),
        "conditions": deviation(output.image_conditions, pair.said["conditions"]),
        "text": abs(float(output.text_loss) / pair.said["losses"]["text"] - 1),
        "image": abs(float(output.image_loss) / pair.said["losses"]["image"] - 1),
    }


@pytest.mark.distributed
@pytest.mark.parametrize("name", FP32)
def test_logits_conditions_and_losses_are_those_of_training(name: str, pairs: dict[str, Pair]) -> None:
    found = deviations(pairs[name])
    assert max(found.values()) < 1e-5, found


@pytest.mark.distributed
@pytest.mark.parametrize("name", HALF)
def test_in_bf16_they_differ_by_its_rounding(name: str, pairs: dict[str, Pair]) -> None:
    """A sum in another order is rounded another way: 2^-8 of the largest value, a few times over four layers."""
    assert pairs[name].model.dtype is torch.bfloat16
    found = deviations(pairs[name])
    assert max(found["logits"], found["conditions"]) < 2**-6, found
    assert max(found["text"], found["image"]) < 2**-8, found


@pytest.mark.distributed
@pytest.mark.parametrize("name", FP32)
def test_a_seed_paints_the_same_picture(name: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[name]
    processor = processor_of(pair)
    for sampling, expected in zip(SAMPLINGS, pair.said["painted"], strict=True):
        latents = pair.model.generate_images(**processor.to_paint(CAPTIONS), **asdict(sampling))
        difference = np.abs(processor.to_pictures(latents).astype(int) - expected.astype(int))
        assert difference.max() <= 1  # of 255: a value between two pixel values may be rounded either way
        assert (difference > 0).mean() < 1e-3


@pytest.mark.distributed
@pytest.mark.parametrize("name", FP32)
def test_the_same_words_are_read_in_a_picture(name: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[name]
    processor = processor_of(pair)
    inputs = processor(["<image>"] * 2, images=list(pair.said["painted"][0]))
    padding = list(range(len(processor.tokenizer), pair.model.config.vocab_size))
    ids = pair.model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=padding)
    texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts == pair.said["captions"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", [*ONE, *TWO])
def test_an_export_comes_back_to_the_bit(name: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs[name]
    config = str(pair.checkpoint / "config.yaml")
    import_model(pair.directory, tmp_path / "again", configs=[config], options=[], write_config=None, say=lambda _: None)
    source = open_checkpoint(tmp_path / "again")
    export(source, tmp_path / "hf", say=lambda _: None)
    assert weights(tmp_path / "hf") == weights(pair.directory)
    assert compare(open_checkpoint(pair.checkpoint), tmp_path / "hf", say=lambda _: None).equal


def weights(directory: Path) -> dict[str, bytes]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name).view(torch.uint8).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
