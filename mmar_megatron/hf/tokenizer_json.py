"""A run's tokenizer as files that `transformers.AutoTokenizer` loads without SentencePiece: same ids, same special tokens.

Text becomes the ids that it was in training, and these the same text again. Three things differ: names of special tokens in a
text are the tokens themselves (an image is written so into a prompt) unless `split_special_tokens=True`; in bytes that are no
UTF-8, which only a model can write, more characters become U+FFFD; and SentencePiece's token for the unknown, which no text
becomes, is written as its name.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from transformers.convert_slow_tokenizer import SpmConverter

from mmar_megatron.data.tokenizer import SPECIAL_TOKENS, SentencePieceTokenizer, Tokenizer

_WITH_A_NAME = ("bos", "eos", "pad")
"""Roles that transformers knows too; the others are additional special tokens."""

_ODD_TEXTS = (
    "",
    " ",
    "  two  spaces ",
    "\n a line\t\r\n",
    "\x00\x07\u200b\ufeff",
    "▁ ▁▁",
    "<s></s><unk><0x0A><image>",
    "猫の絵 🐈",
    "e\u0301 ﬁ １",
)


def hugging_face_files(tokenizer: Tokenizer, serialized: bytes) -> dict[str, str]:
    """`tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`: names and contents.

    Special tokens that `tokenizer` has appended above its vocabulary get the first name of their role in `SPECIAL_TOKENS`; where
    this is an ordinary token of the vocabulary, which keeps its id, the first free one of `<image_1>`, `<image_2>` and so on.

    Args:
        tokenizer: what the model was trained with.
        serialized: content of the file that it was read from.

    Raises:
        ValueError: no `tokenizer.json` gives the same ids.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        source = _from_sentencepiece(serialized)
    else:
        source = tokenizers.Tokenizer.from_str(serialized.decode())
    names = _names(tokenizer, source)
    tokenizer_json = _json(_content(tokenizer, source, names))
    _check(tokenizer, tokenizer_json, names)

    special: dict[str, Any] = {f"{role}_token": names[role] for role in _WITH_A_NAME}
    special["additional_special_tokens"] = [name for role, name in names.items() if role not in _WITH_A_NAME]
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special),
    }


def _from_sentencepiece(serialized: bytes) -> tokenizers.Tokenizer:
    """The model's pieces, merges, flags and control symbols, without the tokens that we append.

    Raises:
        ValueError: it is no BPE model with byte fallback that leaves text as it is.
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(serialized)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    # What else there is gets other ids now and then: with Unigram and with user-defined symbols, transformers' conversion finds
    # "<s>" in a text as the control symbol; and it normalises by graphemes, where SentencePiece goes by the longest match.
    obstacles = {
        "is not BPE": trainer.model_type != trainer.BPE,
        "has no byte fallback": not trainer.byte_fallback,
        "normalises text": bool(normalizer.precompiled_charsmap),
        "removes extra whitespace": normalizer.remove_extra_whitespaces,
        "does not escape whitespace": not normalizer.escape_whitespaces,
        "takes whitespace for a suffix": trainer.treat_whitespace_as_suffix,
        "has user-defined symbols": any(piece.type == piece.USER_DEFINED for piece in model.pieces),
    }
    if obstacle := next((text for text, applies in obstacles.items() if applies), None):
        raise ValueError(
            f"this SentencePiece model {obstacle}, so no tokenizer.json gives the same ids: train with a model that is made by "
            "tools/train_tokenizer.py, or like Llama 2's"
        )
    vocabulary = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
    # Merges come from the pieces' scores. `legacy`: text after a special token has the dummy prefix too, as in training, where
    # each text of a document is encoded by itself.
    converted = SpmConverter.build_tokenizer_from_spm_proto(model, vocabulary, legacy=True)
    controls = [piece.piece for piece in model.pieces if piece.type == piece.CONTROL]
    converted.add_special_tokens([tokenizers.AddedToken(control, normalized=False) for control in controls])
    return converted


def _names(tokenizer: Tokenizer, source: tokenizers.Tokenizer) -> dict[str, str]:
    """The name of each role's token."""
    taken = source.get_vocab()
    names = {}
    for role, (ours, *_) in SPECIAL_TOKENS.items():
        spellings = itertools.chain([ours], (f"{ours.removesuffix('>')}_{n}>" for n in itertools.count(1)))
        known = source.id_to_token(getattr(tokenizer, f"{role}_id"))
        names[role] = known or next(spelling for spelling in spellings if spelling not in taken)
    return names


def _content(tokenizer: Tokenizer, source: tokenizers.Tokenizer, names: Mapping[str, str]) -> dict[str, Any]:
    """Of `tokenizer.json`: the source's, with what we have appended."""
    content = json.loads(source.to_str())
    # A tokenizer file may cut and pad what it encodes, which the caller is to decide.
    content["truncation"] = content["padding"] = None
    # Llama 3's adds <|begin_of_text|> to every text; but a prompt is a piece of a document, where special tokens are put one by
    # one. A byte-level one adds nothing: it keeps offsets off the spaces.
    post_processor = content["post_processor"] or {}
    kept = [one for one in post_processor.get("processors", [post_processor]) if one.get("type") == "ByteLevel"]
    content["post_processor"] = kept[0] if kept else None

    vocabulary = source.get_vocab()
    # tokenizers ignores the ids that the file gives to added tokens: it numbers them by how many tokens there are. Where ids have
    # gaps, all go into the model's vocabulary, with placeholders in the gaps that no text becomes: a word has no space.
    if missing := set(range(tokenizer.base_vocab_size)) - set(vocabulary.values()):
        content["model"]["vocab"] = vocabulary | {f"<no token {token_id}>": token_id for token_id in missing}
    for role, name in names.items():
        token_id = getattr(tokenizer, f"{role}_id")
        if token_id >= tokenizer.base_vocab_size:
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            content["added_tokens"].append({"id": token_id, "content": name} | flags)
    return content


def _check(tokenizer: Tokenizer, tokenizer_json: str, names: Mapping[str, str]) -> None:
    """Compares ids: of special tokens, of odd texts, and of every token's text.

    Raises:
        ValueError: some differ.
    """
    exported = tokenizers.Tokenizer.from_str(tokenizer_json)
    exported.encode_special_tokens = True  # as ours, which find no special token in text

    def comparisons() -> Iterator[tuple[str, bool]]:
        for role, name in names.items():
            yield f"the id of {name}", exported.token_to_id(name) == getattr(tokenizer, f"{role}_id")
        yield "the number of ids", exported.get_vocab_size() == tokenizer.vocab_size
        for text in itertools.chain(_ODD_TEXTS, (tokenizer.decode([i]) for i in range(tokenizer.base_vocab_size))):
            yield f"the ids of {text!r}", exported.encode(text).ids == tokenizer.encode(text)

    different = next((what for what, is_same in comparisons() if not is_same), None)
    if different is not None:
        raise ValueError(f"no tokenizer.json gives the ids of this tokenizer ({different} would differ): train with another one")


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"
