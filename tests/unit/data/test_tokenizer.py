from pathlib import Path

import pytest
import tokenizers

from mmar_megatron.data import shapes
from mmar_megatron.data.tokenizer import SPECIAL_TOKENS, SentencePieceTokenizer, Tokenizer, load_tokenizer, train_sentencepiece

CAPTIONS = [scene.caption for scene in shapes.draw_scenes(500, split="train", seed=0)]


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {role: getattr(tokenizer, f"{role}_id") for role in SPECIAL_TOKENS}


@pytest.fixture
def trained(tmp_path: Path) -> Tokenizer:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(CAPTIONS, vocab_size=400))
    return load_tokenizer(tmp_path)


@pytest.fixture
def foreign_file(tmp_path: Path) -> Path:
    """A tokenizer.json like Qwen's: byte-level BPE with some special tokens of its own."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"])
    file = tmp_path / "foreign" / "tokenizer.json"
    file.parent.mkdir()
    tokenizer.save(str(file))
    return file


def test_words_of_the_captions_are_whole_pieces(trained: Tokenizer) -> None:
    caption = "a small blue square at the bottom right and a large red circle at the top left, on a white background"
    assert len(trained.encode(caption)) == len(caption.replace(",", " ,").split())


@pytest.mark.parametrize(
    "text",
    [
        CAPTIONS[0],
        "  two  spaces ",
        "猫の絵 🐈",
        "",
        "a <image> and </s>",
        "an <|image_pad|> and <|endoftext|>",
        "a tab\tand a\nline",
    ],
)
def test_text_survives_and_never_becomes_special(trained: Tokenizer, foreign_file: Path, text: str) -> None:
    for tokenizer in (trained, load_tokenizer(foreign_file)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(special_ids(tokenizer).values())
        with_specials = [tokenizer.bos_id, *ids, tokenizer.end_image_id, tokenizer.eos_id, tokenizer.pad_id, 10**6]
        assert tokenizer.decode(with_specials) == text


def test_ours_has_all_special_tokens(trained: Tokenizer) -> None:
    assert special_ids(trained) == {"bos": 1, "eos": 2, "pad": 3, "begin_image": 4, "end_image": 5, "image": 6}
    assert trained.vocab_size == trained.base_vocab_size == 400


def test_what_a_foreign_one_lacks_is_appended(foreign_file: Path) -> None:
    tokenizer, base = load_tokenizer(foreign_file.parent), 304
    expected = {"bos": base, "eos": 300, "pad": base + 1, "begin_image": 301, "end_image": 302, "image": 303}
    assert special_ids(tokenizer) == expected
    assert (tokenizer.base_vocab_size, tokenizer.vocab_size) == (base, base + 2)


def test_training_is_reproducible(trained: Tokenizer) -> None:
    assert train_sentencepiece(CAPTIONS, vocab_size=400) == train_sentencepiece(CAPTIONS, vocab_size=400)


def test_as_many_pieces_as_there_are() -> None:
    enough = train_sentencepiece(CAPTIONS, vocab_size=400, or_fewer=True)
    assert SentencePieceTokenizer(enough).encode(CAPTIONS[0]) == SentencePieceTokenizer(
        train_sentencepiece(CAPTIONS, vocab_size=400)
    ).encode(CAPTIONS[0])
    fewer = SentencePieceTokenizer(train_sentencepiece(CAPTIONS, vocab_size=100_000, or_fewer=True))
    assert 400 < fewer.vocab_size < 100_000
    assert [fewer.decode(fewer.encode(text)) for text in CAPTIONS] == list(CAPTIONS)


@pytest.mark.parametrize("vocab_size", [200, 100_000])
def test_impossible_vocabulary_size(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size {vocab_size} is too"):
        train_sentencepiece(CAPTIONS, vocab_size=vocab_size)


def test_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_text("nonsense")
        with pytest.raises(ValueError, match=f"{name} is not a .* tokenizer"):
            load_tokenizer(tmp_path / name)


def test_ids_have_the_names_of_the_vocabulary(trained: Tokenizer, foreign_file: Path) -> None:
    foreign = load_tokenizer(foreign_file)
    assert [trained.name_of(i) for i in (1, 6, 400)] == ["<s>", "<image>", None]
    assert [foreign.name_of(i) for i in (300, 303, 304)] == ["<|endoftext|>", "<|image_pad|>", None]
    assert foreign.special_names == {
        "eos": "<|endoftext|>",
        "begin_image": "<|vision_start|>",
        "end_image": "<|vision_end|>",
        "image": "<|image_pad|>",
    }
