"""What can influence what, observed on the outputs of the whole model: causal, two-way inside an image, nothing across documents,
and nothing at all from a masked latent but its own target.

Axes: B rows, S positions, D width of the backbone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmar_megatron.data.batch import Batch
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.model.losses import LossSums
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.parallel import ParallelGroups
from tests.unit.tiny import C, Documents, N, build_tiny, hidden_states, stir

TEXT = [100, 101, 102, 103]
MASKED = (1, 2, 5, 7, 8, 15)
VISIBLE = tuple(n for n in range(N) if n not in MASKED)


@pytest.fixture(scope="module")
def model(groups: ParallelGroups) -> MMARModel:
    model = build_tiny(groups)
    stir(model)
    return model.eval()


@pytest.fixture
def documents(coarse_tokenizer: Tokenizer) -> Documents:
    return Documents(coarse_tokenizer)


@pytest.fixture
def batch(documents: Documents) -> Batch:
    """Painting and telling, with images of their own, and padding behind both."""
    painted, told = documents.text_to_image(TEXT, masked=MASKED, seed=1), documents.image_to_text(TEXT, seed=2)
    return documents.batch([[painted], [told]], sequence_length=28)


def packed(documents: Documents) -> Batch:
    """Two documents in one row."""
    painted, told = documents.text_to_image(TEXT[:2], masked=MASKED, seed=1), documents.image_to_text(TEXT, seed=2)
    return documents.batch([[painted, told]], sequence_length=50)


def two_images(documents: Documents) -> Batch:
    """The same as one document."""
    batch = packed(documents)
    in_document_BS = batch.document_ids_BS >= 0
    return replace(
        batch,
        document_ids_BS=torch.where(in_document_BS, 0, -1),
        position_ids_BS=torch.where(in_document_BS, torch.arange(50), 0),
    )


def changed(model: MMARModel, before: Batch, after: Batch) -> Tensor:
    """Where the hidden states are not the same to the bit, bool [B, S]."""
    return (hidden_states(model, before) != hidden_states(model, after)).any(dim=-1)


# --- the backbone, position by position -----------------------------------------------------------------------------------------


def may_see(batch: Batch, *, query: int, key: int) -> bool:
    """The rule, in words of its own, for the first row."""
    documents, images = batch.document_ids_BS[0].tolist(), batch.span_ids_BS[0].tolist()
    if documents[query] != documents[key]:
        return False
    return key <= query or (images[key] >= 0 and images[key] == images[query])


@pytest.mark.parametrize("kind", ["text to image", "image to text", "packed", "two images"])
def test_influence_is_the_rule_and_nothing_else(kind: str, model: MMARModel, documents: Documents, batch: Batch) -> None:
    """Each position's input is perturbed in a copy of the row of its own: exactly those that may see it change."""
    row = {
        "text to image": documents.batch([[documents.text_to_image(TEXT, masked=MASKED)]], sequence_length=28),
        "image to text": documents.batch([[documents.image_to_text(TEXT)]], sequence_length=28),
        "packed": packed(documents),
        "two images": two_images(documents),
    }[kind]
    length = row.tokens_BS.shape[1]
    ids = {
        name: getattr(row, name).expand(length, -1) for name in ("tokens_BS", "document_ids_BS", "span_ids_BS", "position_ids_BS")
    }
    rows = row.changed(labels_BS=row.labels_BS.expand(length, -1), **ids)

    generator = torch.Generator().manual_seed(1)
    input_SBD = torch.randn(length, length, model.config.hidden_size, generator=generator)
    input_SBD = input_SBD[:, :1].repeat(1, length, 1)
    nudged_SBD = input_SBD + torch.eye(length)[:, :, None]

    influenced_KQ = (backbone(model, rows, input_SBD) != backbone(model, rows, nudged_SBD)).any(dim=-1).T
    expected_KQ = [[may_see(row, query=query, key=key) for query in range(length)] for key in range(length)]
    assert influenced_KQ.tolist() == expected_KQ


@torch.no_grad()
def backbone(model: MMARModel, batch: Batch, input_SBD: Tensor) -> Tensor:
    """The final hidden states [S, B, D] when the embedding's output is this."""

    def put_in(module: torch.nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return input_SBD

    handle = model.embedding.register_forward_hook(put_in)
    try:
        h_SBD = model(batch, return_hidden=True)
    finally:
        handle.remove()
    assert isinstance(h_SBD, Tensor)
    return h_SBD


# --- the whole model ------------------------------------------------------------------------------------------------------------


def test_masked_latents_change_no_hidden_state(model: MMARModel, batch: Batch) -> None:
    other = replace(batch, latents_MNC=batch.latents_MNC + 10 * batch.masked_MN[..., None])
    assert not changed(model, batch, other).any()


def test_a_masked_latent_changes_the_loss_of_its_own_target_alone(model: MMARModel, batch: Batch) -> None:
    token = MASKED[3]
    timesteps_MNR = batch.timesteps_MNR * 0.85
    timesteps_MNR[0, token] = 0.95  # so it has the last of the eight buckets of noise levels to itself
    batch = replace(batch, timesteps_MNR=timesteps_MNR)
    latents_MNC = batch.latents_MNC.clone()
    latents_MNC[0, token] += 0.5
    before, after = sums(model, batch), sums(model, replace(batch, latents_MNC=latents_MNC))
    assert torch.equal(before.text, after.text)
    assert (before.image_by_timestep != after.image_by_timestep).tolist() == [False] * 7 + [True]
    assert before.count_by_timestep[-1] == 2


@torch.no_grad()
def sums(model: MMARModel, batch: Batch) -> LossSums:
    found = model(batch)
    assert isinstance(found, LossSums)
    return found


def test_gradient_flows_to_visible_latents_alone(model: MMARModel, batch: Batch) -> None:
    latents_MNC = batch.latents_MNC.clone().requires_grad_()
    h_SBD = model(replace(batch, latents_MNC=latents_MNC), return_hidden=True)
    assert isinstance(h_SBD, Tensor)
    weight_SBD = torch.randn(h_SBD.shape, generator=torch.Generator().manual_seed(0))
    (gradient_MNC,) = torch.autograd.grad((h_SBD * weight_SBD).sum(), latents_MNC)
    assert (gradient_MNC[batch.masked_MN] == 0).all()
    assert (gradient_MNC[batch.visible_MN] != 0).any(dim=-1).all()


def test_a_visible_latent_reaches_its_image_both_ways_and_what_follows(model: MMARModel, batch: Batch) -> None:
    for slot, token in ((0, VISIBLE[5]), (1, 9)):
        latents_MNC = batch.latents_MNC.clone()
        latents_MNC[slot, token] += torch.linspace(-1, 1, C)
        first = int((batch.span_ids_BS[slot] >= 0).nonzero()[0])
        expected_BS = torch.zeros_like(batch.tokens_BS, dtype=torch.bool)
        expected_BS[slot] = (torch.arange(28) >= first) & (batch.document_ids_BS[slot] >= 0)
        assert torch.equal(changed(model, batch, replace(batch, latents_MNC=latents_MNC)), expected_BS)


def test_a_word_reaches_itself_and_what_follows(model: MMARModel, batch: Batch) -> None:
    for row, position in ((0, 2), (1, 20)):  # in a caption before, and in a text after the image
        assert batch.span_ids_BS[row, position] == -1
        tokens_BS = batch.tokens_BS.clone()
        tokens_BS[row, position] = 200
        expected_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
        expected_BS[row, position:] = batch.document_ids_BS[row, position:] >= 0
        assert torch.equal(changed(model, batch, replace(batch, tokens_BS=tokens_BS)), expected_BS)


def test_documents_in_a_row_do_not_meet(model: MMARModel, documents: Documents) -> None:
    """Each packed document has the hidden states that it has alone; the second's positions restart."""
    batch = packed(documents)
    painted, told = documents.text_to_image(TEXT[:2], masked=MASKED, seed=1), documents.image_to_text(TEXT, seed=2)
    a, b = len(painted.tokens_L), len(told.tokens_L)
    together_SD = hidden_states(model, batch)[0]
    for document, part in ((painted, slice(0, a)), (told, slice(a, a + b))):
        alone_SD = hidden_states(model, documents.batch([[document]], sequence_length=50))[0]
        torch.testing.assert_close(together_SD[part], alone_SD[: part.stop - part.start], rtol=1e-5, atol=1e-5)
    # As one document they would meet: the comparison can fail.
    as_one_SD = hidden_states(model, two_images(documents))[0]
    assert not torch.isclose(as_one_SD[a : a + b], together_SD[a : a + b], rtol=1e-5, atol=1e-5).all(dim=-1).any()


def test_padding_changes_nothing(model: MMARModel, documents: Documents, batch: Batch) -> None:
    padding_BS = batch.document_ids_BS < 0
    assert padding_BS.any()
    other = replace(batch, tokens_BS=torch.where(padding_BS, 300, batch.tokens_BS))
    assert not changed(model, batch, other)[~padding_BS].any()

    painted, told = documents.text_to_image(TEXT, masked=MASKED, seed=1), documents.image_to_text(TEXT, seed=2)
    longer = documents.batch([[painted], [told]], sequence_length=40)
    real = ~padding_BS
    torch.testing.assert_close(
        hidden_states(model, longer)[:, :28][real], hidden_states(model, batch)[real], rtol=1e-5, atol=1e-5
    )


def test_a_row_of_padding_is_finite_and_teaches_nothing(model: MMARModel, documents: Documents) -> None:
    painted = documents.text_to_image(TEXT, masked=MASKED, seed=1)
    alone, beside = (documents.batch(rows, sequence_length=28) for rows in ([[painted]], [[painted], []]))
    assert hidden_states(model, beside).isfinite().all()
    np.testing.assert_allclose(sums(model, beside).flatten(), sums(model, alone).flatten(), rtol=1e-5)

    found = model(beside)
    assert isinstance(found, LossSums)
    gradients = torch.autograd.grad(found.image + found.text, list(model.parameters()), allow_unused=True)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


def test_an_image_all_masked_and_one_all_visible(model: MMARModel, documents: Documents) -> None:
    """The two ends of the mask ratio: no empty softmax, and no latent at all in the first."""
    rows = [[documents.text_to_image(TEXT, masked=range(N), seed=3)], [documents.image_to_text(TEXT, seed=4)]]
    batch = documents.batch(rows, sequence_length=28)
    assert hidden_states(model, batch).isfinite().all()
    latents_MNC = batch.latents_MNC.clone()
    latents_MNC[0] = 7.0
    assert not changed(model, batch, replace(batch, latents_MNC=latents_MNC)).any()
