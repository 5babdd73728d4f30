"""Tokenizers: SentencePiece models and Hugging Face `tokenizer.json` files behind one interface.

MMAR needs six special tokens. A tokenizer trained here has them as control symbols; in a foreign one each is looked up by the
names it commonly goes by, and what is absent is appended above the vocabulary. Text can never produce any of them.
"""

from __future__ import annotations

import hashlib
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import sentencepiece
import tokenizers

SPECIAL_TOKENS: Mapping[str, tuple[str, ...]] = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "pad": ("<pad>", "<|pad|>", "[PAD]"),
    "begin_image": ("<begin_image>", "<|vision_start|>"),
    "end_image": ("<end_image>", "<|vision_end|>"),
    "image": ("<image>", "<|image_pad|>"),
}
"""Each role and the names it is known by; the first is ours."""
TOKENIZER_NAMES = ("tokenizer.model", "tokenizer.json")
"""In a directory the first that is there is used."""


class Tokenizer(ABC):
    """Text <-> ids, and the ids of the special tokens.

    Attributes:
        bos_id, eos_id, pad_id: of a document's begin and end, and of what fills a sequence up.
        begin_image_id, end_image_id, image_id: around an image, and the placeholder at each of its positions.
        base_vocab_size: number of ids that it has itself.
        vocab_size: number of ids, with the appended special tokens.
        special_names: of the special tokens that it has itself, by role; the others are appended.
        fingerprint: SHA-256 of the tokenizer's file, in hexadecimal.
    """

    bos_id: int
    eos_id: int
    pad_id: int
    begin_image_id: int
    end_image_id: int
    image_id: int

    def __init__(self, *, serialized: bytes, base_vocab_size: int) -> None:
        self.fingerprint = hashlib.sha256(serialized).hexdigest()
        self.base_vocab_size = base_vocab_size
        self.vocab_size = base_vocab_size
        self.special_names = {}
        for role, names in SPECIAL_TOKENS.items():
            known = {name: token_id for name in names if (token_id := self._special_id(name)) is not None}
            if known:
                self.special_names[role], token_id = next(iter(known.items()))
            else:
                token_id = self.vocab_size
                self.vocab_size += 1
            setattr(self, f"{role}_id", token_id)
        self._special_ids = {getattr(self, f"{role}_id") for role in SPECIAL_TOKENS}

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the text, with no special token around or in it."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special tokens, and ids that only pad the model's vocabulary, are left out."""
        return self._decode([i for i in map(int, ids) if i < self.base_vocab_size and i not in self._special_ids])

    @abstractmethod
    def name_of(self, token_id: int) -> str | None:
        """What the vocabulary calls an id; None where it has none of that number, as of the special tokens that were appended."""

    @abstractmethod
    def _special_id(self, name: str) -> int | None:
        """Id of a special token, if the vocabulary has it as one."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (`tokenizer.model`).

    Args:
        serialized: content of the model file.
    """

    def __init__(self, serialized: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        super().__init__(serialized=serialized, base_vocab_size=self._processor.get_piece_size())

    def encode(self, text: str) -> list[int]:
        """Ids of the text, with no special token around or in it."""
        return self._processor.encode(text)

    def name_of(self, token_id: int) -> str | None:
        """What the vocabulary calls an id."""
        return self._processor.id_to_piece(token_id) if token_id < self.base_vocab_size else None

    def _special_id(self, name: str) -> int | None:
        token_id = self._processor.piece_to_id(name)
        return token_id if self._processor.is_control(token_id) else None

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`.

    Args:
        serialized: content of that file.
    """

    def __init__(self, serialized: bytes) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(serialized.decode())
        self._tokenizer.encode_special_tokens = True  # "<image>" in a caption is text like any other
        self._special_names = {t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        # Not get_vocab_size(): where ids have gaps, it is less than the largest id.
        super().__init__(serialized=serialized, base_vocab_size=1 + max(self._tokenizer.get_vocab().values()))

    def encode(self, text: str) -> list[int]:
        """Ids of the text, with no special token around or in it."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def name_of(self, token_id: int) -> str | None:
        """What the vocabulary calls an id."""
        return self._tokenizer.id_to_token(token_id)

    def _special_id(self, name: str) -> int | None:
        return self._special_names.get(name)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a SentencePiece model, a `tokenizer.json`, or a directory that holds either.

    Raises:
        ValueError: there is none at `path`, or it cannot be read.
    """
    file = find_tokenizer(path)
    kind = HuggingFaceTokenizer if file.suffix == ".json" else SentencePieceTokenizer
    try:
        return kind(file.read_bytes())
    except Exception as error:  # both libraries raise bare Exceptions and RuntimeErrors
        raise ValueError(f"{file} is not a {kind.__name__.removesuffix('Tokenizer')} tokenizer: {error}") from error


def find_tokenizer(path: str | Path) -> Path:
    """The file of a tokenizer: `path` itself, or the SentencePiece model or `tokenizer.json` in it.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    candidates = [path / name for name in TOKENIZER_NAMES] if path.is_dir() else [path]
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        raise ValueError(f"no tokenizer at {path}: expected a SentencePiece model, a tokenizer.json, or a directory with one")
    return file


def train_sentencepiece(texts: Sequence[str], *, vocab_size: int, or_fewer: bool = False) -> bytes:
    """Trains a BPE model with byte fallback, so that nothing is out of vocabulary and `decode(encode(text)) == text`.

    BPE and not unigram: on captions with few distinct words, SentencePiece's unigram trainer, which finds its pieces as
    substrings that distinct words share, never sees a whole word twice and leaves words in pieces.

    Args:
        texts: one caption each.
        vocab_size: number of pieces, with 256 bytes and the special tokens.
        or_fewer: whether to do with as many as there are in the texts, where these are too few for so many.

    Returns:
        The content of a `tokenizer.model`; the same for the same arguments.

    Raises:
        ValueError: `vocab_size` has no room for the bytes, the special tokens and the characters of `texts`, or is more than
            there are pieces in them (but for `or_fewer`).
    """
    characters = set("".join(texts)) | {" "}
    smallest = 256 + 1 + len(SPECIAL_TOKENS) + len(characters)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is too small for these texts: give at least {smallest}")
    ours = {role: names[0] for role, names in SPECIAL_TOKENS.items()}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            bos_piece=ours["bos"],
            eos_piece=ours["eos"],
            pad_piece=ours["pad"],
            control_symbols=[ours["begin_image"], ours["end_image"], ours["image"]],
            num_threads=1,  # more threads add up in an order that varies
            minloglevel=2,
        )
    except RuntimeError as error:
        # Its message ends with what it allows: "[...] Vocabulary size too high (9000). Please set it to a value <= 513."
        if or_fewer and (most := re.search(r"a value <= (\d+)", str(error))):
            return train_sentencepiece(texts, vocab_size=int(most[1]))
        raise ValueError(f"vocab_size {vocab_size} is too large for these texts: {str(error).rpartition('] ')[2]}") from error
    return model.getvalue()
