"""The exported model: batches are rows, the cache changes nothing, images stay whole, Trainer trains it.

That it is the model that was trained is tested in tests/distributed/test_export.py. Axes: B sequences, N tokens of an image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Trainer, TrainingArguments

from mmar_megatron.hf.modeling_mmar import MMARForCausalLM, mixed_attention_allowed, span_ids
from tests.unit.hf.tiny import BEGIN, BOS, EOS, IMAGE, ONE_IMAGE, PAD, C, N, latents, padded, tiny_config, tiny_model

ROWS: list[tuple[list[int], int]] = [
    ([BOS, 20, 21, *ONE_IMAGE, 30, 31], 1),
    ([BOS, 40], 0),
    ([BOS, *ONE_IMAGE, *ONE_IMAGE, 50], 2),
]
PROMPTS = [[BOS, 20, 21, BEGIN], [BOS, 7, 8, 9, 10, BEGIN], [BOS, BEGIN]]


@pytest.fixture(scope="module")
def model() -> MMARForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    return {**padded([row for row, _ in ROWS]), "image_latents": latents(3)}


def alone(number: int) -> dict[str, Any]:
    """One row of the batch with its images, without padding."""
    row, count = ROWS[number]
    before = sum(images for _, images in ROWS[:number])
    return {"input_ids": torch.tensor([row])} | ({"image_latents": latents(3)[before : before + count]} if count else {})


# --- forward --------------------------------------------------------------------------------------------------------------------


def test_a_batch_is_its_rows(model: MMARForCausalLM, batch: dict[str, Any]) -> None:
    logits_BSV = model(**batch).logits
    for number, (row, _) in enumerate(ROWS):
        torch.testing.assert_close(logits_BSV[number, -len(row) :], model(**alone(number)).logits[0], rtol=1e-5, atol=1e-5)


def test_an_image_sees_itself_whole_and_nothing_behind(model: MMARForCausalLM) -> None:
    """Which positions' outputs change with the last token of an image, and which with the text behind it."""
    inputs = alone(0)
    first, last = ROWS[0][0].index(IMAGE), ROWS[0][0].index(IMAGE) + N - 1
    other = {**inputs, "image_latents": inputs["image_latents"].clone()}
    other["image_latents"][0, -1] += 1
    changed = (model(**inputs).logits - model(**other).logits).abs().amax(dim=-1)[0] > 1e-4
    assert changed.tolist() == [position >= first for position in range(len(changed))]
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, last + 2] = 33
    changed = (model(**inputs).logits - model(**other).logits).abs().amax(dim=-1)[0] > 1e-4
    assert changed.tolist() == [position >= last + 2 for position in range(len(changed))]


def test_a_masked_token_does_not_leak(model: MMARForCausalLM) -> None:
    inputs = alone(0)
    masked = torch.zeros(1, N, dtype=torch.bool)
    masked[0, 4] = True
    other = {**inputs, "image_latents": inputs["image_latents"].clone()}
    other["image_latents"][0, 4] += 1
    same = (
        model(**x, image_masked=masked, timesteps=torch.rand(1, N, 2), noise=torch.zeros(1, N, 2, C)) for x in (inputs, other)
    )
    first, second = same
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.image_conditions, second.image_conditions)


def test_losses_are_means_over_their_own_tokens(model: MMARForCausalLM, batch: dict[str, Any]) -> None:
    masked = torch.zeros(3, N, dtype=torch.bool)
    masked[0, :2] = masked[2, 5] = True
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    output = model(**batch, image_masked=masked, labels=labels)
    log_probability = output.logits[:, :-1].log_softmax(dim=-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    learned = (labels[:, 1:] != -100) & (labels[:, 1:] != IMAGE)
    torch.testing.assert_close(output.text_loss, -log_probability[learned].mean())
    torch.testing.assert_close(output.loss, output.text_loss + output.image_loss)
    assert output.image_conditions.shape == (3, 64)
    weighted = tiny_model(text_loss_weight=0.5, image_loss_weight=2.0)
    torch.manual_seed(3)
    again = weighted(**batch, image_masked=masked, labels=labels)
    torch.testing.assert_close(again.loss, 0.5 * again.text_loss + 2 * again.image_loss)


def test_alignment_loss_is_of_visible_tokens() -> None:
    model = tiny_model(alignment_features=7, alignment_loss_weight=0.5)
    masked = torch.zeros(1, N, dtype=torch.bool)
    masked[0, 3:] = True
    features = torch.randn(1, N, 7)
    output = model(**alone(0), image_masked=masked, teacher_features=features, output_hidden_states=True)
    first = ROWS[0][0].index(IMAGE)
    projected = model.alignment_projector(output.last_hidden_state[0, first : first + 3])
    expected = 1 - torch.cosine_similarity(projected, features[0, :3], dim=-1).mean()
    torch.testing.assert_close(output.alignment_loss, expected)


def test_mask_of_a_continued_sequence_is_the_end_of_the_whole_one() -> None:
    ids = torch.tensor([ROWS[2][0]])
    spans = span_ids(ids, image_token_id=IMAGE, num_tokens=N)
    valid = torch.ones(1, ids.shape[1], dtype=torch.bool)
    whole = mixed_attention_allowed(spans, valid_BT=valid)
    cut = 1 + len(ONE_IMAGE)
    assert torch.equal(mixed_attention_allowed(spans[:, cut:], valid_BT=valid), whole[:, cut:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_latents": None}, "input_ids have the tokens of 1 images, but image_latents hold 0"),
        ({"image_latents": latents(2)}, "input_ids have the tokens of 1 images, but image_latents hold 2"),
        ({"image_latents": latents(1)[:, :, :5]}, r"image_latents are \(1, 9, 5\), but must be \[images, 9, 12\]"),
        (
            {"input_ids": torch.tensor([[BOS, BEGIN, *[IMAGE] * 8]])},
            r"a row has \[8\] image tokens, which are not whole images of 9",
        ),
        (
            {"input_ids": torch.tensor([[BOS, *[IMAGE] * 4, 7, *[IMAGE] * 5]])},
            "must stand behind each other, with nothing in between",
        ),
        ({"attention_mask": torch.ones(1, 1, 16, 16)}, r"attention_mask must be \[B, T\]"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask is \(1, 3\), but there are 1 rows of 16 positions"),
        ({"input_ids": None}, "give input_ids"),
        (
            {"image_masked": torch.ones(2, N, dtype=torch.bool)},
            r"image_masked is torch\.bool \(2, 9\), but must be bool \(1, 9\)",
        ),
        ({"image_masked": torch.ones(1, N)}, r"image_masked is torch\.float32 \(1, 9\), but must be bool"),
    ],
)
def test_what_does_not_fit_is_told(model: MMARForCausalLM, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**{**alone(0), **changes})


# --- writing text ---------------------------------------------------------------------------------------------------------------


def test_text_is_the_same_with_a_cache_without_and_alone(model: MMARForCausalLM, batch: dict[str, Any]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    for number in range(len(ROWS)):
        single = model.generate(**alone(number), **options)[0, len(ROWS[number][0]) :]
        ended = [*single.tolist(), *[3] * 8][:8]
        assert cached[number, -8:].tolist()[: len(single)] == ended[: len(single)]


def test_beams_and_several_sequences_keep_their_images(model: MMARForCausalLM, batch: dict[str, Any]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    together = model.generate(**batch, **options)[:, -5:]
    for number in range(len(ROWS)):
        single = model.generate(**alone(number), **options)[:, -5:]
        assert torch.equal(together[2 * number : 2 * number + 2], single)


def test_a_conversation_goes_on_from_its_cache(model: MMARForCausalLM) -> None:
    cache = DynamicCache()
    first = model.generate(**alone(0), max_new_tokens=3, do_sample=False, cache=cache)
    longer = torch.cat((first, torch.tensor([[60, *ONE_IMAGE, 61]])), dim=1)
    more = latents(1, seed=5)
    continued = model.generate(input_ids=longer, image_latents=more, max_new_tokens=4, do_sample=False, cache=cache)
    both = torch.cat((alone(0)["image_latents"], more))
    assert torch.equal(continued, model.generate(input_ids=longer, image_latents=both, max_new_tokens=4, do_sample=False))


def test_a_static_cache_is_refused(model: MMARForCausalLM) -> None:
    with pytest.raises(ValueError, match="a static cache would lose the images' attention: use the default"):
        model.generate(**alone(0), max_new_tokens=3, cache_implementation="static")


@pytest.mark.parametrize("use_cache", [True, False])
def test_images_that_no_token_stands_for_are_told(use_cache: bool, model: MMARForCausalLM) -> None:
    with pytest.raises(ValueError, match="input_ids have the tokens of 0 images, but image_latents hold 1"):
        model.generate(torch.tensor([[BOS, 7, 8]]), image_latents=latents(1), max_new_tokens=2, use_cache=use_cache)


def test_prompts_that_are_padded_on_the_right_are_refused(model: MMARForCausalLM) -> None:
    rows = {"input_ids": torch.tensor([[BOS, 7, PAD], [BOS, 7, 8]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    with pytest.raises(ValueError, match="prompts are padded on the right"):
        model.generate(**rows, max_new_tokens=2)


# --- painting -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"sampler": "ancestral", "temperature": 0.7}])
def test_a_picture_is_the_same_in_any_company(model: MMARForCausalLM, options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"rounds": 4, "steps": 5, "seed": 3, **options}
    together = model.generate_images(**padded(PROMPTS), **settings)
    assert together.shape == (3, N, C)
    for number, prompt in enumerate(PROMPTS):
        single = model.generate_images(torch.tensor([prompt]), first_number=number, **settings)
        torch.testing.assert_close(together[number], single[0], rtol=1e-4, atol=1e-4)
    other = model.generate_images(**padded(PROMPTS), **{**settings, "seed": 4})
    assert not torch.allclose(together, other, atol=1e-2)


def test_padding_is_found_without_a_mask(model: MMARForCausalLM) -> None:
    rows = padded(PROMPTS)
    assert (rows["attention_mask"] == 0).any()
    expected = model.generate_images(**rows, rounds=2, steps=2)
    assert torch.equal(model.generate_images(rows["input_ids"], rounds=2, steps=2), expected)


def test_the_prefix_computed_once_is_the_whole_run_anew(model: MMARForCausalLM) -> None:
    """One round in which all is drawn: conditions from the cached prompt are those of one pass over prompt and image."""
    prompt = PROMPTS[1]
    seen: list[Tensor] = []
    handle = model.post_projector.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model.generate_images(torch.tensor([prompt]), rounds=1, steps=1, guidance_scale=1.0)
    handle.remove()
    masked = torch.ones(1, N, dtype=torch.bool)
    ids = torch.tensor([[*prompt, *[IMAGE] * N, 5, EOS]])
    whole = model(ids, image_latents=torch.zeros(1, N, C), image_masked=masked).image_conditions
    torch.testing.assert_close(seen[-1], whole, rtol=1e-5, atol=1e-5)


def test_inpainting_draws_what_was_asked_for_alone(model: MMARForCausalLM) -> None:
    prompts = padded(PROMPTS)
    start = latents(3, seed=9)
    redraw = torch.zeros(3, N, dtype=torch.bool)
    redraw[0, :3] = redraw[1, 4] = True  # and nothing of the third
    before = start.clone()
    reports: list[tuple[int, int, int]] = []

    def report(number: int, of: int, latents: Tensor, masked: Tensor) -> None:
        drawn = (latents != start).any(dim=-1)
        assert torch.equal(drawn | masked, redraw)
        assert not (drawn & masked).any()
        reports.append((number, of, int(drawn.sum())))

    drawn = model.generate_images(
        **prompts,
        start_latents=start,
        redraw=redraw,
        rounds=4,
        steps=3,
        progress=report,
    )
    assert torch.equal(start, before)
    assert torch.equal(drawn[~redraw], start[~redraw])
    assert (drawn[redraw] != start[redraw]).all()
    assert [report[:2] for report in reports] == [(number, 4) for number in range(1, 5)]
    drawn_counts = [report[2] for report in reports]
    assert drawn_counts == sorted(drawn_counts)
    assert drawn_counts[-1] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"input_ids": torch.tensor([[BOS, 7]])},
            "each prompt must be bos_token_id, text, begin_image_token_id, padded on the left",
        ),
        ({"input_ids": torch.tensor([[BEGIN]])}, "each prompt must be bos_token_id, text, begin_image_token_id"),
        ({"rounds": N + 1}, "10 rounds asked for 9 tokens"),
        ({"rounds": 0}, "0 rounds asked for 9 tokens"),
        ({"steps": 1001}, "1001 sampling steps asked of a schedule of 1000"),
        ({"sampler": "euler"}, "Unknown sampler 'euler': choose one of ddim, ancestral"),
        ({"start_latents": latents(1)}, "give start_latents and redraw together"),
        (
            {"start_latents": latents(2), "redraw": torch.ones(1, N)},
            r"start_latents are \(2, 9, 12\) and redraw \(1, 9\), not \(1, 9, 12\)",
        ),
    ],
)
def test_what_cannot_be_painted_is_told(model: MMARForCausalLM, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate_images(**{"input_ids": torch.tensor([PROMPTS[0]]), "steps": 2, "rounds": 2, **changes})


def test_no_picture_is_made_of_what_is_not_finite() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.diffusion_head.input_proj.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="The image tokens just drawn are not finite"):
        model.generate_images(torch.tensor([PROMPTS[0]]), steps=2, rounds=2)


# --- learning, keeping ----------------------------------------------------------------------------------------------------------


def test_trainer_trains_it(tmp_path: Path) -> None:
    """Real steps on a batch of both tasks: both losses fall."""
    model = MMARForCausalLM(tiny_config())
    rows = [[BOS, 20, 21, *ONE_IMAGE, EOS], [BOS, *ONE_IMAGE, 30, 31, EOS]]

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = padded([rows[example["row"]] for example in examples])
        labels = torch.full_like(batch["input_ids"], -100)
        masked = torch.zeros(len(examples), N, dtype=torch.bool)
        for number, example in enumerate(examples):
            masked[number] = example["row"] == 0
            if example["row"] == 1:
                labels[number, -3:] = batch["input_ids"][number, -3:]
        pictures = torch.cat([latents(1, seed=example["row"]) for example in examples])
        return {**batch, "image_latents": pictures, "image_masked": masked, "labels": labels}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=5,
        save_steps=60,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"row": number % 2} for number in range(16)]
    model.gradient_checkpointing_enable()
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
    before = {key: getattr(model(**collate(data)), key).item() for key in ("text_loss", "image_loss")}
    trainer.train()
    after = {key: getattr(model(**collate(data)), key).item() for key in ("text_loss", "image_loss")}
    assert after["text_loss"] < 0.1 * before["text_loss"]
    assert after["image_loss"] < 0.7 * before["image_loss"]
    again = MMARForCausalLM.from_pretrained(tmp_path / "checkpoint-60")
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("tied", [True, False])
def test_saving_and_loading_changes_nothing(tied: bool, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    again = MMARForCausalLM.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert model.state_dict().keys() == again.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert torch.equal(model(**alone(0)).logits, again.eval()(**alone(0)).logits)


@pytest.mark.parametrize("loaded", [False, True])
def test_what_is_not_loaded_has_the_initial_weights_of_training(loaded: bool, tmp_path: Path) -> None:
    """The head predicts zero, norms are one, positions are sines; nothing is left as memory had it, what was loaded stays."""
    model: Any = MMARForCausalLM(tiny_config())
    if loaded:
        stirred = tiny_model()
        kept = {name: tensor for name, tensor in stirred.state_dict().items() if "layers.1." in name or ".fc1." in name}
        stirred.save_pretrained(tmp_path, state_dict=kept)
        model = MMARForCausalLM.from_pretrained(tmp_path)
        for name, tensor in kept.items():
            assert torch.equal(model.state_dict()[name], tensor), name
    assert not model.diffusion_head.final_layer.linear.weight.any()
    assert not model.diffusion_head.res_blocks[0].adaLN_modulation[1].weight.any()
    assert model.model.layers[0].input_layernorm.weight.eq(1).all()
    assert model.model.embedding_vit.patch_embed.bias.eq(0).all()
    assert 0.05 < float(model.model.mask_embedding.detach().std()) < 0.2
    row = model.model.image_position.row.detach()
    assert not row[:, 32:].any()
    assert float(row.abs().max()) == pytest.approx(0.1)
