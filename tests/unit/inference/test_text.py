"""Greedy captions: word after word the most likely one, until the end or the limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mmar_megatron.data.sequence import DocumentImage
from mmar_megatron.inference.text import caption
from mmar_megatron.parallel import ParallelGroups
from tests.unit.inference.scene import Batches, Scene, build_scene


@pytest.fixture(scope="module")
def images_BHW3() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def captions(scene: Scene, images_BHW3: NDArray[np.uint8], *, max_tokens: int) -> list[str]:
    with scene.engine.evaluating():
        return caption(scene.engine, list(images_BHW3), source=scene.source, groups=scene.groups, max_tokens=max_tokens)


def seen_image(scene: Scene, image_HW3: NDArray[np.uint8]) -> DocumentImage:
    latents_NC = scene.source.codec.encode(image_HW3)
    return DocumentImage(latents_NC=latents_NC, masked_N=np.zeros(len(latents_NC), dtype=np.bool_))


@torch.no_grad()
def greedy(scene: Scene, image_HW3: NDArray[np.uint8], *, max_tokens: int) -> list[int]:
    """Of one picture, by hand: the most likely token after <end_image>, then after that token, ..."""
    source, image = scene.source, seen_image(scene, image_HW3)
    text: list[int] = []
    while len(text) < max_tokens:
        document = source.builder.image_to_text(text, image=image, sample_id=0)
        h_SBD = scene.model(source.assemble([[document]], timestep_multiplier=1), return_hidden=True)
        last = 2 + source.codec.num_tokens + len(text)  # after <bos> <begin_image> and the image
        assert document.tokens_L[last] == (text[-1] if text else source.tokenizer.end_image_id)
        logits_V = h_SBD[last, 0] @ scene.model.embedding.word_embeddings.weight.T
        token = int(logits_V[: source.tokenizer.vocab_size].argmax())
        if token == source.tokenizer.eos_id:
            break
        text.append(token)
    return text


def test_captions_are_greedy(scene: Scene, images_BHW3: NDArray[np.uint8]) -> None:
    expected = [scene.source.tokenizer.decode(greedy(scene, image_HW3, max_tokens=5)) for image_HW3 in images_BHW3]
    assert captions(scene, images_BHW3, max_tokens=5) == expected
    assert len(set(expected)) > 1, "the pictures must matter"


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_limit(max_tokens: int, scene: Scene, images_BHW3: NDArray[np.uint8]) -> None:
    with Batches(scene.engine) as seen:
        captions(scene, images_BHW3, max_tokens=max_tokens)
    assert len(seen) == max_tokens


def test_limit_of_the_sequence(scene: Scene, images_BHW3: NDArray[np.uint8]) -> None:
    """A model that never ends stops where the sequence is full."""
    assert len(greedy(scene, images_BHW3[0], max_tokens=28)) == scene.source.builder.max_text == 48 - 16 - 4
    with Batches(scene.engine) as seen:
        captions(scene, images_BHW3[:1], max_tokens=1000)
    assert len(seen) == 28


def test_what_was_learned_is_said(coarse_shapes_dir: Path, groups: ParallelGroups, images_BHW3: NDArray[np.uint8]) -> None:
    """Pictures learned by heart with captions of several lengths: each is told to its end, and no further."""
    scene = build_scene(coarse_shapes_dir, groups)
    learned = ["a red circle", "a large blue square at the top left", "a"]
    texts = [scene.source.tokenizer.encode(text) for text in learned]
    assert len({len(text) for text in texts}) == 3
    # The first is learned with words after its end, which must not be said while the others still are.
    after_the_end = [scene.source.tokenizer.eos_id, *scene.source.tokenizer.encode("small")]
    documents = [
        scene.source.builder.image_to_text(text, image=seen_image(scene, image_HW3), sample_id=0)
        for text, image_HW3 in zip([texts[0] + after_the_end, *texts[1:]], images_BHW3, strict=True)
    ]
    batch = scene.source.assemble([[document] for document in documents], timestep_multiplier=1)
    for _ in range(60):
        result = scene.engine.train_step([batch], learning_rate=5e-3)
    assert float(result.sums.text / result.counts.text) < 0.1
    with Batches(scene.engine) as seen:
        assert captions(scene, images_BHW3, max_tokens=25) == learned
    assert len(seen) == 1 + max(len(text) for text in texts)
