"""The loss sums of the model, recomputed in plain PyTorch from its hidden states.

Axes: B rows, S positions, D width of the backbone, V vocabulary, K masked tokens, R noise levels, C channels, F teacher features.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmar_megatron.data.batch import IGNORE, Batch
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.model.losses import NUM_BUCKETS, LossSums, bucketed
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.parallel import ParallelGroups
from tests.unit.tiny import Documents, N, R, build_tiny, hidden_states, stir

FEATURES = 6
ALIGNED = ["--model.alignment_loss_weight", "0.5", "--model.alignment_features", str(FEATURES)]


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request: pytest.FixtureRequest, groups: ParallelGroups) -> MMARModel:
    model = build_tiny(groups, "--model.tie_embeddings", str(request.param == "tied"))
    stir(model)
    return model.eval()


@pytest.fixture(scope="module")
def aligned_model(groups: ParallelGroups) -> MMARModel:
    model = build_tiny(groups, *ALIGNED)
    stir(model)
    return model.eval()


@pytest.fixture
def batch(coarse_tokenizer: Tokenizer) -> Batch:
    """Two documents in the first row, one in the second; the loss of neither kind is in every row."""
    documents = Documents(coarse_tokenizer)
    painted = documents.text_to_image([100, 101], masked=(1, 2, 5, 7, 8, 15), seed=1)
    told = documents.image_to_text([100, 101, 102, 103], seed=2)
    also_painted = documents.text_to_image([110], masked=range(N), seed=3)
    return documents.batch([[painted, told], [also_painted]], sequence_length=50)


def loss_sums(model: MMARModel, batch: Batch) -> LossSums:
    found = model(batch)
    assert isinstance(found, LossSums)
    return found


def output_weight(model: MMARModel) -> Tensor:
    tied = model.share_embeddings_and_output_weights
    return model.embedding.word_embeddings.weight if tied else model.output_layer.weight


def image_rows(batch: Batch) -> list[tuple[int, int, int, int]]:
    """(slot, token, row, position) of each image token of each image that is there."""
    found = []
    for slot, (positions_N, there) in enumerate(zip(batch.image_positions_MN, batch.visible_MN | batch.masked_MN, strict=True)):
        if there.any():
            found += [(slot, n, *divmod(int(p), batch.tokens_BS.shape[1])) for n, p in enumerate(positions_N)]
    return found


@torch.no_grad()
def test_text_loss(model: MMARModel, batch: Batch) -> None:
    h_BSD = hidden_states(model, batch)
    logits_BSV = h_BSD @ output_weight(model).T
    expected = F.cross_entropy(logits_BSV.flatten(0, 1), batch.labels_BS.flatten(), ignore_index=IGNORE, reduction="sum")
    assert int(batch.num_labels) == 5
    torch.testing.assert_close(loss_sums(model, batch).text, expected, rtol=1e-5, atol=0)


@torch.no_grad()
def test_image_loss(model: MMARModel, batch: Batch) -> None:
    """v-prediction on the cosine schedule with the formulas of the papers, one masked token after the other."""
    h_BSD = hidden_states(model, batch)
    edges = (np.linspace(0, 1, 1001) + 0.008) / 1.008
    f = np.cos(edges * np.pi / 2) ** 2
    alpha_bar_T = np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))

    loss, zero = [], []
    for slot, n, row, position in image_rows(batch):
        if not batch.masked_MN[slot, n]:
            continue
        z_1Z = model.post_projector(h_BSD[row, position])[None]
        for r in range(R):
            t = int(1000 * batch.timesteps_MNR[slot, n, r])
            alpha, sigma = float(np.sqrt(alpha_bar_T[t])), float(np.sqrt(1 - alpha_bar_T[t]))
            x_C, eps_C = batch.latents_MNC[slot, n], batch.noise_MNRC[slot, n, r]
            u_C = model.diffusion_head((alpha * x_C + sigma * eps_C)[None, None], timestep_KR=torch.tensor([[t]]), z_KZ=z_1Z)[
                0, 0
            ]
            v_C = alpha * eps_C - sigma * x_C
            loss.append(float((u_C - v_C).square().mean()))
            zero.append(float(v_C.square().mean()))
    found = loss_sums(model, batch)
    assert len(loss) == R * int(batch.num_masked) == R * (6 + N)
    assert float(found.image) == pytest.approx(sum(loss) / R, rel=1e-5)
    assert float(found.image_zero) == pytest.approx(sum(zero) / R, rel=1e-5)
    assert float(found.image) != pytest.approx(float(found.image_zero), rel=1e-2)


@torch.no_grad()
def test_buckets_add_up(model: MMARModel, batch: Batch) -> None:
    found = loss_sums(model, batch)
    assert float(found.image_by_timestep.sum()) == pytest.approx(R * float(found.image), rel=1e-5)
    assert float(found.image_by_mask_ratio.sum()) == pytest.approx(float(found.image), rel=1e-5)
    # One image has 6 of 16 masked, which is bucket 3 of 8, the other all, which belongs to the last.
    assert found.count_by_mask_ratio.tolist() == [0, 0, 0, 6, 0, 0, 0, N]
    levels = batch.timesteps_MNR[batch.masked_MN].flatten()
    assert found.count_by_timestep.tolist() == torch.histc(levels, bins=NUM_BUCKETS, min=0, max=1).tolist()


def test_bucketed() -> None:
    values, position = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.0, 0.124, 0.125, 1.0])
    sums, counts = bucketed(values, position=position, weight=torch.tensor([1.0, 1.0, 1.0, 0.5]))
    assert sums.tolist() == [3, 4, 0, 0, 0, 0, 0, 4]
    assert counts.tolist() == [2, 1, 0, 0, 0, 0, 0, 0.5]


def test_sums_survive_flattening(model: MMARModel, batch: Batch) -> None:
    flat = loss_sums(model, batch).flatten()
    assert flat.shape == (LossSums.size(),)
    assert not flat.requires_grad
    assert torch.equal(LossSums.unflatten(flat).flatten(), flat)


def test_text_logits_are_those_of_the_loss(model: MMARModel, batch: Batch) -> None:
    h_LD = hidden_states(model, batch)[0, -5:]
    torch.testing.assert_close(model.text_logits(h_LD), h_LD @ output_weight(model).T, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_alignment_loss(aligned_model: MMARModel, batch: Batch) -> None:
    """1 - cosine over visible tokens; masked ones, whose content the backbone does not know, are left alone."""
    teacher_MNF = torch.randn(*batch.masked_MN.shape, FEATURES, generator=torch.Generator().manual_seed(0))
    batch = batch.changed(teacher_MNF=teacher_MNF)
    h_BSD = hidden_states(aligned_model, batch)
    expected = 0.0
    for slot, n, row, position in image_rows(batch):
        if batch.visible_MN[slot, n]:
            a = aligned_model.alignment_projector(h_BSD[row, position])
            b = teacher_MNF[slot, n]
            expected += 1 - float((a @ b) / (a.norm() * b.norm()))
    assert int(batch.num_aligned) == (N - 6) + N
    assert float(loss_sums(aligned_model, batch).alignment) == pytest.approx(expected, rel=1e-5)


def test_alignment_without_teacher_is_refused(aligned_model: MMARModel, batch: Batch) -> None:
    with pytest.raises(ValueError, match=r"alignment_loss_weight is not 0, but the data holds no teacher features"):
        aligned_model(batch)


def test_no_alignment_without_weight(model: MMARModel, batch: Batch) -> None:
    teacher_MNF = torch.randn(*batch.masked_MN.shape, FEATURES)
    assert float(loss_sums(model, batch.changed(teacher_MNF=teacher_MNF)).alignment) == 0
    assert not hasattr(model, "alignment_projector")


@pytest.mark.parametrize("lacking", ["labels", "masked tokens", "both"])
def test_nothing_to_learn_of_one_kind(lacking: str, model: MMARModel, batch: Batch) -> None:
    """Zero and finite, and the gradient of what is there is what it would be anyway."""
    whole = gradients(model, batch)
    if lacking == "both":
        batch = batch.without_losses()
    elif lacking == "labels":
        batch = batch.changed(labels_BS=torch.full_like(batch.labels_BS, IGNORE))
    else:
        batch = batch.changed(masked_MN=torch.zeros_like(batch.masked_MN))
    with torch.no_grad():
        found = loss_sums(model, batch)
    assert found.flatten().isfinite().all()
    assert (float(found.text) == 0) == (lacking != "masked tokens")
    assert (float(found.image) == 0) == (lacking != "labels")
    part = gradients(model, batch)
    head, projector = "diffusion_head.final_layer.linear.weight", "post_projector.0.weight"
    if lacking == "labels":
        torch.testing.assert_close(part[head], whole[head])
    else:
        assert not part[head].any()
        assert not part[projector].any()
    if lacking == "both":
        assert not any(gradient.any() for gradient in part.values())


def gradients(model: MMARModel, batch: Batch) -> dict[str, Tensor]:
    """Of the plain sum of both losses, zeros where there is none; all of them finite."""
    model.zero_grad()
    found = loss_sums(model, batch)
    (found.text + found.image).backward()
    result = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        assert gradient.isfinite().all(), name
        result[name] = gradient
    return result


def test_fused_cross_entropy(groups: ParallelGroups, batch: Batch) -> None:
    """megatron-core's: the same losses, and gradients up to bf16, in which it hands them on."""
    options = ["--precision.dtype", "bf16", "--model.backbone.cross_entropy_loss_fusion"]
    plain, fused = (build_tiny(groups, *options, value) for value in ("false", "true"))
    for model in (plain, fused):
        stir(model)
    assert torch.equal(loss_sums(fused, batch).flatten(), loss_sums(plain, batch).flatten())
    of_fused = gradients(fused, batch)
    for name, gradient in gradients(plain, batch).items():
        torch.testing.assert_close(of_fused[name], gradient, rtol=0, atol=float(gradient.abs().max()) * 2**-5, msg=name)
    with pytest.raises(
        ValueError, match=r"cross_entropy_loss_fusion rounds gradients to bf16: leave it out, or set precision\.dtype"
    ):
        build_tiny(groups, "--model.backbone.cross_entropy_loss_fusion", "true")
