"""What anyone does with an export who has torch and transformers alone; runs where nothing else is installed.

    python clean_export.py DIR SHARDED GIVEN OUT

DIR is the export, SHARDED another one in bf16, in several files; GIVEN a file of torch with what the training model makes of some
inputs; OUT a directory to be made. Prints JSON: the name of each check below, and null or what went wrong.

Axes: B sequences, S positions, M images, N tokens of an image, C channels.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import socket
import sys
import traceback
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

ABSENT = ("PIL", "accelerate", "diffusers", "einops", "megatron", "mmar_megatron", "sentencepiece", "torchvision", "pytest")
TEXTS = ["what is this? ", "<image>", "<image>a small<image> red circle and "]
"""Of prompts with no image, one and two, each of another length."""


class Export:
    """An export, and what is known of it."""

    def __init__(self, directory: Path, *, sharded: Path, given: dict[str, Any], out: Path) -> None:
        self.directory, self.sharded, self.given, self.out = directory, sharded, given, out

    @cached_property
    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.directory, trust_remote_code=True)

    @cached_property
    def processor(self) -> Any:
        return AutoProcessor.from_pretrained(self.directory, trust_remote_code=True)

    @property
    def pictures(self) -> list[np.ndarray]:
        return [*self.given["pictures"].numpy()]

    @property
    def painting(self) -> dict[str, Any]:
        """Arguments with which the training model has painted."""
        return {**self.processor.to_paint(self.given["captions"]), **self.given["sampling"]}


def check_nothing_else_is_installed(_: Export) -> None:
    assert [name for name in ABSENT if importlib.util.find_spec(name)] == []


def check_automatic_classes_find_the_code(export: Export) -> None:
    directory, options = export.directory, {"trust_remote_code": True}
    assert type(AutoConfig.from_pretrained(directory, **options)).__name__ == "MMARConfig"
    assert type(AutoModel.from_pretrained(directory, **options)).__name__ == "MMARForCausalLM"
    assert type(export.model).__name__ == "MMARForCausalLM"
    assert type(export.processor).__name__ == "MMARProcessor"
    assert not export.model.training
    assert export.model.dtype == export.given["dtype"]


def check_text_becomes_the_same_ids(export: Export) -> None:
    tokenizer = AutoTokenizer.from_pretrained(export.directory, trust_remote_code=True)
    for text, ids in export.given["ids_of_texts"].items():
        for each in (tokenizer, export.processor.tokenizer):
            assert each(text, add_special_tokens=False)["input_ids"] == ids
            assert each.decode(ids, skip_special_tokens=True) == text
    for text, prompt in export.given["prompts"].items():
        assert export.processor.to_paint(text)["input_ids"].tolist() == [prompt]


def check_logits_and_conditions_and_losses_are_those_of_training(export: Export) -> None:
    with torch.no_grad():
        output = export.model(**export.given["inputs"])
    valid_BS = export.given["inputs"]["attention_mask"].bool()
    expected = export.given["expected"]
    same(output.logits[valid_BS], expected["logits"][valid_BS])
    same(output.image_conditions, expected["conditions"])
    same(output.text_loss, expected["text_loss"])
    same(output.image_loss, expected["image_loss"])
    assert torch.equal(output["loss"], output[0])  # as Trainer and others look for it
    same(output["loss"], expected["text_loss"] + expected["image_loss"])


def check_a_batch_is_continued_as_each_row_alone(export: Export) -> None:
    pictures = export.pictures[:3]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    batch = export.processor(TEXTS, images=pictures, return_tensors="pt")
    together = export.model.generate(**batch, **options)
    assert torch.equal(together, export.model.generate(**batch, **options, use_cache=False))
    assert together[:, batch["input_ids"].shape[1] :].unique().numel() > 1
    images = [[], pictures[:1], pictures[1:]]
    for row, text, its_own in zip(together, TEXTS, images, strict=True):
        alone = export.model.generate(**export.processor([text], images=its_own or None, return_tensors="pt"), **options)[0]
        assert torch.equal(alone, row[-len(alone) :]), text


def check_beams_keep_each_row_with_its_images(export: Export) -> None:
    pictures = export.pictures[:3]
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    together = export.model.generate(**export.processor(TEXTS, images=pictures), **options)
    images = [[], pictures[:1], pictures[1:]]
    for number, (text, its_own) in enumerate(zip(TEXTS, images, strict=True)):
        alone = export.model.generate(**export.processor([text], images=its_own or None), **options)
        rows = slice(2 * number, 2 * number + 2)
        assert torch.equal(alone.sequences, together.sequences[rows, -alone.sequences.shape[1] :]), text
        same(together.sequences_scores[rows], alone.sequences_scores)  # the same words may follow other images


def check_captions_are_those_of_training(export: Export) -> None:
    pictures = export.pictures
    inputs = export.processor(["<image>"] * len(pictures), images=pictures, return_tensors="pt")
    ids = export.model.generate(**inputs, max_new_tokens=export.given["caption_tokens"], do_sample=False)
    texts = export.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts == export.given["read"], texts


def check_painted_images_are_those_of_training(export: Export) -> None:
    latents_BNC = export.model.generate_images(**export.painting)
    pictures = export.processor.to_pictures(latents_BNC)
    difference = np.abs(pictures.astype(int) - export.given["painted"].numpy().astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.001, difference.max()
    assert not torch.equal(latents_BNC, export.model.generate_images(**{**export.painting, "seed": 1}))


def check_inpainting_keeps_the_rest_to_the_bit(export: Export) -> None:
    start_BNC = export.processor.to_latents(export.pictures[: len(export.given["captions"])])
    redraw_BN = torch.zeros(start_BNC.shape[:2], dtype=torch.bool)
    redraw_BN[:, ::3] = True
    painted_BNC = export.model.generate_images(**export.painting, start_latents=start_BNC, redraw=redraw_BN)
    assert torch.equal(painted_BNC[~redraw_BN], start_BNC[~redraw_BN])
    assert (painted_BNC[redraw_BN] != start_BNC[redraw_BN]).any(dim=-1).all()
    pictures = export.processor.to_pictures(export.processor.to_latents(export.pictures))
    assert np.array_equal(pictures, np.stack(export.pictures))


def check_another_size_asks_for_pillow(export: Export) -> None:
    try:
        export.processor(["<image>"], images=[np.zeros((20, 48, 3), np.uint8)])
    except ValueError as error:
        assert "a picture is 48 x 20, the model's are 32 x 32: install pillow" in str(error), error
    else:
        raise AssertionError("a picture of another size was taken")


def check_shards_in_bf16_are_read_as_such(export: Export) -> None:
    model = AutoModelForCausalLM.from_pretrained(export.sharded, trust_remote_code=True, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.generate_images(**export.painting).isfinite().all()
    inputs = export.processor(TEXTS, images=export.pictures[:3])
    assert model.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]
    assert "image_loss" in model(**export.given["inputs"])


def check_what_is_saved_again_is_the_same(export: Export) -> None:
    export.model.save_pretrained(export.out)
    export.processor.save_pretrained(export.out)
    again = Export(export.out, sharded=export.sharded, given=export.given, out=export.out)
    assert AutoModel.from_pretrained(export.out, trust_remote_code=True).config.to_dict().keys() >= {"image", "rotary"}
    state, saved = export.model.state_dict(), again.model.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in state.items())
    first, second = (one.processor(TEXTS, images=one.pictures[:3]) for one in (export, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(export.model(**first).logits, again.model(**second).logits)
    assert torch.equal(export.model.generate_images(**export.painting), again.model.generate_images(**again.painting))
    settings = ("codec", "special_tokens", "mask_ratio")
    assert all(getattr(export.processor, name) == getattr(again.processor, name) for name in settings)
    first, second = (one.model.generate(**one.processor(["a "]), max_new_tokens=8) for one in (export, again))
    assert torch.equal(first, second)


def check_nobody_asked_for_the_network(_: Export) -> None:
    no_network = importlib.import_module("no_network")  # of the environment
    assert no_network.attempts == []
    try:
        socket.create_connection(("huggingface.co", 443))
    except OSError:
        assert len(no_network.attempts) == 1
    else:
        raise AssertionError("there is a network here")


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


def same(got: Tensor, expected: Tensor) -> None:
    """To fp32's precision, relative to the largest value."""
    largest = expected.abs().max()
    assert largest > 0 and got.shape == expected.shape
    difference = float((got - expected).abs().max() / largest)
    assert difference < 1e-5, difference


def main() -> None:
    """All checks, in their order."""
    directory, sharded, given, out = map(Path, sys.argv[1:])
    export = Export(directory, sharded=sharded, given=torch.load(given), out=out)
    results: dict[str, str | None] = {}
    for check in CHECKS:
        try:
            check(export)
            results[check.__name__] = None
        except Exception:
            results[check.__name__] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
