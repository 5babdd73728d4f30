"""The exported processor makes of texts and pictures what training makes of them.

Axes: B rows, S positions, M images, N tokens of an image, C channels of a token.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image

from mmar_megatron.config import MaskRatioConfig
from mmar_megatron.data.batch import IGNORE
from mmar_megatron.data.content import conversation_parts
from mmar_megatron.data.documents import made_of, visible_image
from mmar_megatron.data.draw import draw_mask, draw_mask_ratio
from mmar_megatron.data.fitting import fit
from mmar_megatron.data.preparation.pictures import open_picture
from mmar_megatron.data.sequence import Document, DocumentBuilder, Text
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.data.vae import VAECodec
from mmar_megatron.hf.exporting import export, open_checkpoint
from mmar_megatron.hf.processing_mmar import MMARProcessor
from tests.distributed.common import CODEC
from tests.unit.data.autoencoders import make_autoencoder
from tests.unit.hf.checkpoints import make_checkpoint

N, SIZE = CODEC.num_tokens, CODEC.image_size
BLANK = visible_image(np.zeros((N, CODEC.channels), np.float32))
TEXTS = ["a small red circle", "", " two  blue\nsquares ", "<s></s><image><pad>"]
"""The names of special tokens are text here, as in a caption."""


@pytest.fixture(scope="module")
def processor(coarse_shapes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> MMARProcessor:
    return exported(tmp_path_factory.mktemp("patches"), data=coarse_shapes_dir)


def exported(root: Path, *options: str, data: Path) -> MMARProcessor:
    """The processor of an export."""
    checkpoint = make_checkpoint(root / "run", *options, data=data)
    export(open_checkpoint(checkpoint), root / "export", say=lambda _: None)
    return MMARProcessor.from_pretrained(root / "export", trust_remote_code=False)


@pytest.fixture(scope="module")
def builder(coarse_tokenizer: Tokenizer) -> DocumentBuilder:
    return DocumentBuilder(coarse_tokenizer, num_tokens=N, sequence_length=512)


def pictures(count: int, *, size: int = SIZE) -> list[NDArray[np.uint8]]:
    return [*np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)]


def assert_rows_are(batch: Any, documents: Sequence[Document], *, learned: bool) -> None:
    """The batch's rows are these documents; in training a label stands one position before its token."""
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(documents), max(len(d.tokens_L) for d in documents))
    assert ("labels" in batch) == learned
    for b, document in enumerate(documents):
        length = len(document.tokens_L)
        assert batch["attention_mask"][b].tolist() == [0] * (batch["input_ids"].shape[1] - length) + [1] * length
        assert batch["input_ids"][b, -length:].tolist() == document.tokens_L
        if learned:
            labels_S = batch["labels"][b].tolist()
            assert labels_S[-length + 1 :] == document.labels_L[:-1]
            assert set(labels_S[: -length + 1]) == {IGNORE}
    assert len(batch.get("image_latents", ())) == sum(len(document.images) for document in documents)


# --- rows -----------------------------------------------------------------------------------------------------------------------


def test_captions_to_paint_are_trainings_up_to_the_image(
    processor: MMARProcessor, builder: DocumentBuilder, coarse_tokenizer: Tokenizer
) -> None:
    batch = processor.to_paint(TEXTS)
    for b, text in enumerate(TEXTS):
        document = builder.text_to_image(coarse_tokenizer.encode(text), image=BLANK, sample_id=0)
        prompt = document.tokens_L[: document.image_start]
        assert batch["input_ids"][b][batch["attention_mask"][b].bool()].tolist() == prompt
        assert batch["input_ids"][b, -1] == coarse_tokenizer.begin_image_id
    assert torch.equal(processor.to_paint(TEXTS[0])["input_ids"], processor.to_paint(TEXTS[:1])["input_ids"])


def test_pictures_to_be_described(processor: MMARProcessor, builder: DocumentBuilder, coarse_tokenizer: Tokenizer) -> None:
    documents = [builder.image_to_text(coarse_tokenizer.encode(text), image=BLANK, sample_id=0) for text in TEXTS]
    batch = processor(["<image>"] * len(TEXTS), images=pictures(len(TEXTS)), answers=TEXTS)
    assert_rows_are(batch, documents, learned=True)
    prompts = processor(["<image>"] * 2, images=pictures(2))
    assert prompts["input_ids"].tolist() == [document.tokens_L[: N + 3] for document in documents[:2]]
    assert "labels" not in prompts


def test_a_picture_in_a_prompt_to_paint(processor: MMARProcessor) -> None:
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    batch = processor.to_paint(["<image> in red", "a circle"], images=[picture])
    reading = processor(["<image> in red"], images=[picture])
    begin = processor.special_tokens["begin_image"]
    assert batch["input_ids"][0].tolist() == [*reading["input_ids"][0].tolist(), begin]
    assert torch.equal(batch["image_latents"], reading["image_latents"])
    with pytest.raises(ValueError, match="the texts have 1 times <image>, but there are 0 images: give as many"):
        processor.to_paint("<image> in red", images=[])


def test_a_turn_in_parts_is_refused(processor: MMARProcessor) -> None:
    turn: Any = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    with pytest.raises(ValueError, match="the content of a turn is a list: give text, with <image> for an image"):
        processor.converse([[turn]])


def test_pictures_to_learn_to_paint(processor: MMARProcessor, builder: DocumentBuilder, coarse_tokenizer: Tokenizer) -> None:
    for dropout in (0.0, 1.0):
        kept = [[] if dropout else coarse_tokenizer.encode(text) for text in TEXTS]
        documents = [builder.text_to_image(ids, image=BLANK, sample_id=0) for ids in kept]
        batch = processor.to_learn_painting(TEXTS, pictures(len(TEXTS)), caption_dropout=dropout)
        assert_rows_are(batch, documents, learned=False)
        assert batch["image_masked"].shape == (len(TEXTS), N)
    batch = processor.to_learn_painting(["a"] * 200, pictures(200), generator=torch.Generator().manual_seed(0))
    assert 0.05 < (batch["attention_mask"] == 0).any(dim=1).float().mean() < 0.15


def test_texts_with_pictures_anywhere(processor: MMARProcessor, builder: DocumentBuilder, coarse_tokenizer: Tokenizer) -> None:
    prompts = ["<image><image>what? ", "no picture", "first <image> then <image> and ", "at the end <image>"]
    answers = ["a circle", "", "two\n", "<image>"]
    documents = []
    for prompt, answer in zip(prompts, answers, strict=True):
        parts: list[Any] = []
        for number, piece in enumerate(prompt.split("<image>")):
            parts += [BLANK] if number else []
            parts += [Text(coarse_tokenizer.encode(piece), learn=False, end=False)] if piece else []
        parts.append(Text(coarse_tokenizer.encode(answer), learn=True, end=True))
        documents.append(builder.content(parts, sample_id=0))
    assert_rows_are(processor(prompts, images=pictures(5), answers=answers), documents, learned=True)


CONVERSATIONS = [
    [
        {"role": "user", "content": "<image>What is it? {}"},
        {"role": "assistant", "content": "A circle."},
        {"role": "user", "content": "And <image><image>?"},
        {"role": "assistant", "content": "<image> squares"},
    ],
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}],
    [
        {"role": "system", "content": "Be short. <image>"},
        {"role": "user", "content": "Why?\n<image>"},
        {"role": "assistant", "content": "So."},
    ],
]


def test_conversations(processor: MMARProcessor, builder: DocumentBuilder, coarse_tokenizer: Tokenizer) -> None:
    documents = []
    for turns, images in zip(CONVERSATIONS, (3, 0, 1), strict=True):
        parts = conversation_parts(turns, pictures=images)
        assert parts is not None
        made = made_of(parts, encode=coarse_tokenizer.encode, image=lambda *_: BLANK)
        documents.append(builder.content(made, sample_id=0))
    assert_rows_are(processor.converse(CONVERSATIONS, images=pictures(4)), documents, learned=True)

    asked = processor.converse([CONVERSATIONS[0][:3], CONVERSATIONS[1][:1]], images=pictures(3))
    assert "labels" not in asked
    for b, document in enumerate(documents[:2]):
        question = asked["input_ids"][b][asked["attention_mask"][b].bool()].tolist()
        assert question == document.tokens_L[: len(question)]
        assert document.labels_L[len(question) - 1] != IGNORE  # the answer begins right there


def test_one_is_a_list_of_one(processor: MMARProcessor) -> None:
    picture = pictures(1)[0]
    expected = processor(["<image>"], images=[picture])
    for images in (picture, Image.fromarray(picture), picture[None], torch.from_numpy(picture)):
        batch = processor("<image>", images=images)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    several = np.stack(pictures(2))
    assert torch.equal(processor(["<image>"] * 2, images=several)["image_latents"], processor.to_latents([*several]))


# --- pictures -------------------------------------------------------------------------------------------------------------------


def test_latents_of_patches_are_the_codecs(processor: MMARProcessor) -> None:
    given = pictures(3)
    latents_MNC = processor.to_latents(given)
    np.testing.assert_array_equal(latents_MNC.numpy(), CODEC.encode(np.stack(given)))
    np.testing.assert_array_equal(processor.to_pictures(latents_MNC), np.stack(given))
    wild = torch.randn(2, N, CODEC.channels) * 3
    np.testing.assert_array_equal(processor.to_pictures(wild), CODEC.decode(wild.numpy()))


def picture_file(mode: str, kind: str, *, width: int = 50, height: int = 41, **options: Any) -> bytes:
    """A random picture of a mode."""
    generator = np.random.default_rng(1)
    if mode == "I;16":
        image = Image.fromarray(generator.integers(0, 2**16, (height, width), dtype=np.uint16))
    else:
        image = Image.fromarray(generator.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA").convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


TURNED = Image.Exif()
TURNED[0x0112] = 6
FILES: dict[str, Callable[[], bytes]] = {
    **{mode: partial(picture_file, mode, "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")},
    "CMYK": partial(picture_file, "CMYK", "TIFF"),
    "turned camera": partial(picture_file, "RGB", "JPEG", exif=TURNED.tobytes()),
    "transparent colour": partial(picture_file, "P", "PNG", transparency=0),
    "small": partial(picture_file, "RGB", "PNG", width=5, height=9),
    "long": partial(picture_file, "RGB", "PNG", width=400, height=33),
    "of this size": partial(picture_file, "RGB", "PNG", width=SIZE, height=SIZE),
}


@pytest.mark.parametrize("name", FILES)
def test_pictures_become_what_preparation_makes_of_their_files(name: str, processor: MMARProcessor) -> None:
    encoded = FILES[name]()
    prepared = fit(open_picture(encoded, about=SIZE), image_size=SIZE)
    with Image.open(io.BytesIO(encoded)) as image:
        np.testing.assert_array_equal(processor.to_pictures(processor.to_latents([image]))[0], prepared)


def test_arrays_of_other_sizes_become_what_their_pictures_do(processor: MMARProcessor) -> None:
    pixels = pictures(1, size=70)[0][:50]
    assert torch.equal(processor.to_latents([pixels]), processor.to_latents([Image.fromarray(pixels)]))


# --- masks ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["truncated_normal", "uniform"])
def test_masks_are_drawn_as_in_training(distribution: Any, processor: MMARProcessor) -> None:
    settings = MaskRatioConfig(distribution=distribution, mean=0.8, std=0.25, minimum=0.3)
    count = 3000
    generator = np.random.default_rng(0)
    ratios = [draw_mask_ratio(generator, settings) for _ in range(count)]
    expected_MN = np.stack([draw_mask(generator, num_tokens=N, ratio=ratio) for ratio in ratios])
    changed = MMARProcessor(
        processor.tokenizer, codec=processor.codec, special_tokens=processor.special_tokens, mask_ratio=vars(settings)
    )
    masked_MN = changed.to_learn_painting(["a"] * count, pictures(1) * count, generator=torch.Generator().manual_seed(0))[
        "image_masked"
    ].numpy()
    counts, expected = masked_MN.sum(axis=1), expected_MN.sum(axis=1)
    assert (counts.min(), counts.max()) == (expected.min(), expected.max()) == (5, N)
    np.testing.assert_allclose(np.bincount(counts) / count, np.bincount(expected) / count, atol=0.03)
    np.testing.assert_allclose(masked_MN.mean(axis=0), expected_MN.mean(axis=0).mean(), atol=0.04)


def test_masks_follow_from_the_generator_and_are_never_empty(processor: MMARProcessor) -> None:
    first, second, third = (
        processor.to_learn_painting(TEXTS, pictures(4), generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first["image_masked"], second["image_masked"])
    assert not torch.equal(first["image_masked"], third["image_masked"])
    assert processor.mask_ratio["minimum"] == 0.3  # the run's
    nothing = {"distribution": "uniform", "mean": 1.0, "std": 0.25, "minimum": 0.0}
    changed = MMARProcessor(
        processor.tokenizer, codec=processor.codec, special_tokens=processor.special_tokens, mask_ratio=nothing
    )
    masked = changed.to_learn_painting(["a"] * 200, pictures(1) * 200, generator=torch.Generator().manual_seed(0))["image_masked"]
    assert masked.any(dim=1).all()


# --- errors ---------------------------------------------------------------------------------------------------------------------

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
REFUSED: dict[str, tuple[Callable[[MMARProcessor], Any], str]] = {
    "no text": (lambda p: p(images=pictures(1)), "give text; for images alone it is '<image>'"),
    "no texts": (lambda p: p([]), "there is no text: give at least one"),
    "no captions": (lambda p: p.to_paint([]), "there is no text: give at least one"),
    "too few images": (
        lambda p: p(["<image>", "<image>"], images=pictures(1)),
        "the texts have 2 times <image>, but there are 1",
    ),
    "no images": (lambda p: p("<image>"), "the texts have 1 times <image>, but there are 0 images: give as many"),
    "too many images": (lambda p: p(["a", "b"], images=pictures(1)), "the texts have 0 times <image>, but there are 1 images"),
    "too few answers": (lambda p: p(["a", "b"], answers=["c"]), "there are 2 texts, but 1 answers: give one for each"),
    "too few captions": (lambda p: p.to_learn_painting(["a"], pictures(2)), "there are 1 captions, but 2 images"),
    "other tensors": (lambda p: p("a", return_tensors="np"), "return_tensors is 'np': only 'pt' is there"),
    "floats": (
        lambda p: p.to_latents([pictures(1)[0] / 255]),
        r"a picture is float64 \(32, 32, 3\): arrays must be uint8 \[H, W, 3\]",
    ),
    "grey": (lambda p: p.to_latents([pictures(1)[0][..., 0]]), r"a picture is uint8 \(32, 32\): arrays must be uint8"),
    "channels first": (lambda p: p.to_latents([pictures(1)[0].T]), r"a picture is uint8 \(3, 32, 32\): arrays must be"),
    "a path": (lambda p: p("<image>", images="cat.png"), r"a picture is a str: give PIL images, or arrays uint8 \[H, W, 3\]"),
    "no turns": (lambda p: p.converse([[]]), "by nobody: user and assistant must take turns"),
    "nobody asks": (lambda p: p.converse([[ASSISTANT]]), "by assistant: user and assistant must take turns"),
    "two questions": (lambda p: p.converse([[USER, USER]]), "by user, user: user and assistant must take turns"),
    "late system": (lambda p: p.converse([[USER, {"role": "system", "content": "a"}]]), "by user, system: user and"),
    "another role": (lambda p: p.converse([[{"role": "human", "content": "a"}]]), "by human: user and assistant must"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str, processor: MMARProcessor) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        call(processor)
    assert "\n" not in str(error.value)


# --- an auto-encoder ------------------------------------------------------------------------------------------------------------

CODECS = {"sd": ("sd", 1), "sd in patches": ("sd", 2), "flux": ("flux", 1)}


@pytest.fixture(scope="module")
def encoders(coarse_shapes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[MMARProcessor, VAECodec]]:
    """Processors of exports, and training's codecs."""
    found = {}
    for name, (layout, patch_size) in CODECS.items():
        root = tmp_path_factory.mktemp(layout)
        make_autoencoder(root / "vae", layout)
        options = ["--data.codec.kind", "vae", "--data.codec.path", str(root / "vae"), "--data.codec.patch_size", str(patch_size)]
        codec = VAECodec(root / "vae", image_size=SIZE, patch_size=patch_size)
        found[name] = exported(root, *options, data=coarse_shapes_dir), codec
    return found


@pytest.mark.parametrize("name", CODECS)
def test_latents_of_an_autoencoder_are_the_codecs(name: str, encoders: dict[str, tuple[MMARProcessor, VAECodec]]) -> None:
    processor, codec = encoders[name]
    given = np.stack(pictures(3))
    latents_MNC = processor.to_latents([*given])
    np.testing.assert_allclose(latents_MNC.numpy(), codec.encode(given), rtol=1e-5, atol=1e-5)
    tokens_MNC = codec.encode(given)
    np.testing.assert_array_equal(processor.to_pictures(torch.from_numpy(tokens_MNC)), codec.decode(tokens_MNC))


def test_the_autoencoder_is_saved_with_the_processor(encoders: dict[str, tuple[MMARProcessor, VAECodec]], tmp_path: Path) -> None:
    processor, _ = encoders["flux"]
    source = Path(str(processor._directory)) / "vae"
    processor.save_pretrained(tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "copy" / "vae").iterdir()
    }
    again = MMARProcessor.from_pretrained(tmp_path / "copy", trust_remote_code=False)
    assert torch.equal(again.to_latents(pictures(1)), processor.to_latents(pictures(1)))
    again.save_pretrained(tmp_path / "copy")  # into its own directory

    # One from the Hub has no directory here, but what is loaded.
    again._directory = "someone/model"
    again.save_pretrained(tmp_path / "third")
    third = MMARProcessor.from_pretrained(tmp_path / "third", trust_remote_code=False)
    assert torch.equal(third.to_latents(pictures(1)), processor.to_latents(pictures(1)))
    assert isinstance(AutoencoderKL.from_pretrained(tmp_path / "third" / "vae"), AutoencoderKL)


def test_an_autoencoder_asks_for_diffusers(
    encoders: dict[str, tuple[MMARProcessor, VAECodec]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    processor = MMARProcessor.from_pretrained(str(encoders["sd"][0]._directory), trust_remote_code=False)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="images are latents of a diffusers AutoencoderKL: install diffusers"):
        processor.to_latents(pictures(1))
    processor.save_pretrained(tmp_path / "copy")  # copying takes none
    assert (tmp_path / "copy" / "vae" / "config.json").is_file()


def test_a_processor_from_nowhere_has_no_autoencoder(encoders: dict[str, tuple[MMARProcessor, VAECodec]]) -> None:
    loaded, _ = encoders["sd"]
    processor = MMARProcessor(loaded.tokenizer, codec=loaded.codec, special_tokens=loaded.special_tokens)
    with pytest.raises(ValueError, match="load that with from_pretrained"):
        processor.to_latents(pictures(1))
