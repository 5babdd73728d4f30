"""Painting: the same image in any company, each position once, guidance as its formula says.

Axes: B images, H and W pixels, N tokens, C channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mmar_megatron.benchmarks.sampling import paint_plainly
from mmar_megatron.diffusion.painting import ImageSampling
from mmar_megatron.inference.images import paint, paint_latents
from mmar_megatron.parallel import ParallelGroups
from tests.unit.inference.scene import Batches, Scene

CAPTIONS = ["a small red circle at the top left, on a white background", "a large blue square", "nothing"]
SAMPLING = ImageSampling(rounds=3, steps=4, guidance_scale=2.0, seed=3)


def painted(scene: Scene, captions: list[str], sampling: ImageSampling = SAMPLING, **options: Any) -> NDArray[np.uint8]:
    with scene.engine.evaluating():
        return paint(scene.engine, captions, source=scene.source, groups=scene.groups, sampling=sampling, **options)


# --- rounds ---------------------------------------------------------------------------------------------------------------------


def test_rounds_of_a_painting(scene: Scene) -> None:
    """Nothing is known in the first round; what was drawn is then visible, stays as it is, and all is drawn in the end."""
    with Batches(scene.engine) as seen:
        images_BHW3 = painted(scene, CAPTIONS, replace(SAMPLING, guidance_scale=1.0, rounds=4))
    assert len(seen) == 1 + 4  # the prompts, once
    del seen[0]
    assert seen[0].masked_MN.all()
    for before, after in itertools.pairwise(seen):
        assert (before.visible_MN <= after.visible_MN).all()
        assert (after.visible_MN.sum(dim=1) > before.visible_MN.sum(dim=1)).all()
        assert torch.equal(before.latents_MNC[before.visible_MN], after.latents_MNC[before.visible_MN])
    final_NC = scene.source.codec.encode(images_BHW3)
    np.testing.assert_allclose(final_NC[seen[-1].visible_MN], seen[-1].latents_MNC[seen[-1].visible_MN].clip(-1, 1), atol=1 / 127)
    orders = [tuple(int(batch.masked_MN[b].sum()) for batch in seen) for b in range(3)]
    assert len(set(orders)) == 1
    assert not torch.equal(seen[1].visible_MN[0], seen[1].visible_MN[1])  # each image has an order of its own


def test_progress_is_reported(scene: Scene) -> None:
    reported: list[tuple[int, int]] = []
    painted(scene, CAPTIONS[:1], progress=lambda number, rounds, *_: reported.append((number, rounds)))
    assert reported == [(1, 3), (2, 3), (3, 3)]


def test_more_rounds_than_tokens(scene: Scene) -> None:
    with pytest.raises(ValueError, match="17 rounds asked for 16 tokens: use at least 1, and at most"):
        painted(scene, CAPTIONS, replace(SAMPLING, rounds=17))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_scale": 1.0, "sampler": "ancestral"},
        {"guidance_schedule": "linear", "guidance_scale": 3.0, "order": "raster"},
        {"order": "confidence"},
    ],
)
def test_prompts_read_once_are_whole_sequences_anew_in_each_round(changes: dict[str, Any], scene: Scene) -> None:
    sampling = replace(SAMPLING, rounds=5, **changes)
    with scene.engine.evaluating():
        cached_BNC = paint_latents(scene.engine, CAPTIONS, source=scene.source, groups=scene.groups, sampling=sampling)
        plain_BNC = paint_plainly(scene.engine, CAPTIONS, source=scene.source, sampling=sampling)
    torch.testing.assert_close(cached_BNC, plain_BNC, rtol=1e-5, atol=1e-5 * float(plain_BNC.abs().max()))


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_reuse_is_exact_where_nothing_else_changes(order: Any, shallow: Scene) -> None:
    """With one layer, keys and values of a token follow from its own embedding, which only drawing it changes."""
    sampling = replace(SAMPLING, rounds=6, order=order)
    with Batches(shallow.engine) as seen, shallow.engine.evaluating():
        reusing_BNC = paint_latents(
            shallow.engine,
            CAPTIONS,
            source=shallow.source,
            groups=shallow.groups,
            sampling=replace(sampling, refresh_every=4),
        )
    with shallow.engine.evaluating():
        plain_BNC = paint_plainly(shallow.engine, CAPTIONS, source=shallow.source, sampling=sampling)
    torch.testing.assert_close(reusing_BNC, plain_BNC, rtol=1e-5, atol=1e-5 * float(plain_BNC.abs().max()))
    run_over = [batch.tokens_BS.shape[1] for batch in seen[1:]]
    assert run_over[0] == run_over[4] == 16
    assert all(tokens < 16 for number, tokens in enumerate(run_over) if number not in (0, 1 if order == "confidence" else 0, 4))


def test_reuse_changes_little(scene: Scene) -> None:
    """What the tokens that keep their keys and values would have seen of those just drawn is left out, and that alone."""
    exact, reusing = (
        painted(scene, CAPTIONS, replace(SAMPLING, rounds=6, refresh_every=every)).astype(float) for every in (1, 3)
    )
    other = painted(scene, CAPTIONS, replace(SAMPLING, rounds=6, seed=4)).astype(float)
    assert 0 < np.abs(reusing - exact).mean() < 0.2 * np.abs(other - exact).mean()


def test_reuse_does_not_depend_on_the_images_beside(scene: Scene) -> None:
    sampling = replace(SAMPLING, rounds=6, refresh_every=3)
    together_BHW3 = painted(scene, CAPTIONS, sampling)
    assert close(painted(scene, CAPTIONS[1:], sampling, first_number=1)[1], together_BHW3[2])


def test_a_long_caption_loses_its_end(scene: Scene) -> None:
    """As in training."""
    tokenizer, most = scene.source.tokenizer, scene.source.builder.max_text
    long = "a small red circle " * most
    cut = tokenizer.decode(tokenizer.encode(long)[:most])
    assert len(tokenizer.encode(long)) > most == len(tokenizer.encode(cut))
    with Batches(scene.engine) as seen:
        painted(scene, [long, cut], replace(SAMPLING, rounds=1))
    assert torch.equal(seen[0].tokens_BS[0], seen[0].tokens_BS[1])


# --- what an image depends on ---------------------------------------------------------------------------------------------------


def close(a_HW3: NDArray[np.uint8], b_HW3: NDArray[np.uint8]) -> bool:
    """Equal but for the rounding of another batch size."""
    return int(np.abs(a_HW3.astype(int) - b_HW3.astype(int)).max()) <= 1


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_image_does_not_depend_on_those_beside_it(scale: float, sampler: Any, scene: Scene) -> None:
    sampling = replace(SAMPLING, guidance_scale=scale, sampler=sampler)
    together_BHW3 = painted(scene, CAPTIONS, sampling)
    assert together_BHW3.shape == (3, 32, 32, 3)
    assert together_BHW3.dtype == np.uint8
    assert close(painted(scene, CAPTIONS[:1], sampling)[0], together_BHW3[0])
    others_BHW3 = painted(scene, ["something", CAPTIONS[1], "else"], sampling)
    assert close(others_BHW3[1], together_BHW3[1])
    assert not close(others_BHW3[0], together_BHW3[0])


def test_a_list_may_be_painted_in_parts(scene: Scene) -> None:
    together_BHW3 = painted(scene, CAPTIONS)
    parts = [painted(scene, CAPTIONS[:1]), painted(scene, CAPTIONS[1:], first_number=1)]
    assert all(close(a, b) for a, b in zip(np.concatenate(parts), together_BHW3, strict=True))


def test_the_same_seed_the_same_image(scene: Scene) -> None:
    first, again, other = (painted(scene, CAPTIONS, replace(SAMPLING, seed=seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not any(close(a, b) for a, b in zip(first, other, strict=True))


def test_images_of_one_caption_differ(scene: Scene) -> None:
    a_HW3, b_HW3 = painted(scene, [CAPTIONS[0]] * 2)
    assert not close(a_HW3, b_HW3)


# --- guidance -------------------------------------------------------------------------------------------------------------------


def test_guidance_of_1_is_the_conditional_model(scene: Scene) -> None:
    """Scale 1 leaves the unconditional half out; a scale of nearly 1 computes it, and paints the same."""
    with Batches(scene.engine) as seen:
        plain = painted(scene, CAPTIONS, replace(SAMPLING, guidance_scale=1.0))
        guided = painted(scene, CAPTIONS, replace(SAMPLING, guidance_scale=1.0 + 1e-7))
    assert [len(batch.tokens_BS) for batch in seen] == [3] * 4 + [6] * 4
    assert all(close(a, b) for a, b in zip(plain, guided, strict=True))


def test_the_unconditional_half_has_no_caption(scene: Scene) -> None:
    with Batches(scene.engine) as seen:
        painted(scene, CAPTIONS)
        painted(scene, ["", "", ""], replace(SAMPLING, guidance_scale=1.0))
    without = seen[4].tokens_BS
    assert without.shape == (3, 2)
    assert torch.equal(seen[0].tokens_BS[3:, :2], without)
    assert (seen[0].document_ids_BS[3:, 2:] == -1).all()


def test_guidance_of_0_is_the_unconditional_model(scene: Scene) -> None:
    without = painted(scene, CAPTIONS, replace(SAMPLING, guidance_scale=0.0))
    empty = painted(scene, ["", "", ""], replace(SAMPLING, guidance_scale=1.0))
    assert all(close(a, b) for a, b in zip(without, empty, strict=True))


def test_guidance_changes_the_image(scene: Scene) -> None:
    images = [painted(scene, CAPTIONS[:1], replace(SAMPLING, guidance_scale=scale))[0] for scale in (0.0, 1.0, 4.0)]
    assert not any(close(images[i], images[j]) for i, j in ((0, 1), (1, 2), (0, 2)))


# --- failure --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(scene: Scene) -> Iterator[Scene]:
    """With one weight that is not a number."""
    bias = scene.model.diffusion_head.final_layer.linear.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias[0] = math.nan
    yield scene
    with torch.no_grad():
        bias.copy_(before)


def test_tokens_that_are_not_finite(broken: Scene) -> None:
    with pytest.raises(FloatingPointError, match=r"image tokens just drawn are not finite: the weights or the guidance scale"):
        painted(broken, CAPTIONS)


def test_training_goes_on_as_before(scene: Scene, groups: ParallelGroups) -> None:
    """Painting leaves the model in training mode, and no generator or weight other than it found it."""
    before, generator = [p.detach().clone() for p in scene.model.parameters()], torch.get_rng_state()
    painted(scene, CAPTIONS[:1])
    assert scene.model.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(a, b) for a, b in zip(before, scene.model.parameters(), strict=True))
