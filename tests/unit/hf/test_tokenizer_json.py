"""Exported tokenizers against ours: ids and texts are the same, or the export is refused."""

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from mmar_megatron.data import shapes
from mmar_megatron.data.tokenizer import (
    SPECIAL_TOKENS,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    train_sentencepiece,
)
from mmar_megatron.hf.tokenizer_json import hugging_face_files
from tests.packages import MISTRAL, pypi_file, qwen3_tokenizer

CAPTIONS = [scene.caption for scene in shapes.draw_scenes(300, split="train", seed=0)]
PARTS = (
    *CAPTIONS[:20],
    *(
        "豌豆荚",
        "猫の絵",
        "Привет, мир",
        "नमस्ते",
        "한국어",
        "Grüße",
        "e\u0301",
        "ﬁ",
        "１２",
        "𝒳",
        "🐈",
        "👩‍👩‍👧‍👦",
        "\U0010ffff",
        "\ue000",
    ),
    *("\t", "\n", "\r\n", "\n\n", " ", "  ", "     ", "\xa0", "\u3000", "\u200b", "\ufeff", "\x00", "\x07", "\x7f", "▁", "▁▁"),
    *("<image>", "<s>", "</s>", "<pad>", "<unk>", "<0x0A>", "<|endoftext|>", "<|image_pad|>", "<image_1>", "[PAD]", "[INST]"),
    *("aaaa", "=====", "abcabcab", "000", "https://a.b/c?d=e", "def f(x):\n    return x", "a", "b", "1", "-"),
)


def fuzzed(count: int) -> list[str]:
    """Texts of these parts, of their characters, and of any characters."""
    draw = random.Random(0)
    characters = sorted(set("".join(PARTS)))
    alphabets = (PARTS, characters, [chr(code) for code in (*range(0x300), *range(0x3000, 0x3100), *range(0x1F300, 0x1F400))])
    return ["", *("".join(draw.choices(draw.choice(alphabets), k=draw.randint(1, 12))) for _ in range(count - 1))]


def sentencepiece_model(**options: Any) -> bytes:
    model = io.BytesIO()
    defaults: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 600,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    texts = iter([*CAPTIONS, *PARTS])
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **defaults | options)
    return model.getvalue()


def byte_level_bpe() -> tokenizers.Tokenizer:
    """Like Llama 3's: what it puts before each text is its special token for a document's begin."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    template = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))]
    )
    tokenizer.post_processor = tokenizers.processors.Sequence([tokenizers.processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def edited(change: Callable[[dict[str, Any]], None]) -> bytes:
    content = json.loads(byte_level_bpe().to_str())
    change(content)
    return json.dumps(content).encode()


def with_gaps(content: dict[str, Any]) -> None:
    """The last two tokens of the vocabulary have larger ids, and so have the special tokens behind them."""
    vocabulary = content["model"]["vocab"]
    for name in sorted(vocabulary, key=vocabulary.__getitem__)[-2:]:
        vocabulary[name] += 10


def with_names_as_words(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    for token_id, name in enumerate(("<image>", "<image_1>", "<pad>"), start=len(vocabulary)):
        vocabulary[name] = token_id


def with_cutting_and_padding(content: dict[str, Any]) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.enable_truncation(400)
    tokenizer.enable_padding(direction="right", pad_id=0, pad_token="!")
    content |= {key: json.loads(tokenizer.to_str())[key] for key in ("truncation", "padding")}


SOURCES: Mapping[str, Callable[[], bytes]] = {
    "ours": lambda: train_sentencepiece(CAPTIONS, vocab_size=400),
    "no dummy prefix": lambda: sentencepiece_model(add_dummy_prefix=False),
    "more control symbols": lambda: sentencepiece_model(control_symbols=["[INST]", "<image>"]),
    "whitespace within pieces": lambda: sentencepiece_model(split_by_whitespace=False, allow_whitespace_only_pieces=True),
    "Mistral": lambda: pypi_file(*MISTRAL).read_bytes(),
    "Qwen3": qwen3_tokenizer,
    "like Llama 3": lambda: edited(lambda _: None),
    "gaps": lambda: edited(with_gaps),
    "names as words": lambda: edited(with_names_as_words),
    "cuts and pads": lambda: edited(with_cutting_and_padding),
}


def load(serialized: bytes) -> Tokenizer:
    return HuggingFaceTokenizer(serialized) if serialized.startswith(b"{") else SentencePieceTokenizer(serialized)


def export(directory: Path, serialized: bytes) -> Path:
    for name, content in hugging_face_files(load(serialized), serialized).items():
        (directory / name).write_text(content)
    return directory


@pytest.mark.parametrize("source", SOURCES)
def test_same_ids_and_texts(tmp_path: Path, source: str) -> None:
    serialized = SOURCES[source]()
    ours, theirs = load(serialized), AutoTokenizer.from_pretrained(export(tmp_path, serialized))

    texts = fuzzed(1000)
    ids = [ours.encode(text) for text in texts]
    for add_special_tokens in (True, False):
        assert theirs(texts, add_special_tokens=add_special_tokens, split_special_tokens=True)["input_ids"] == ids
    assert theirs.batch_decode(ids, skip_special_tokens=True) == [ours.decode(one) for one in ids]

    assert len(theirs) == ours.vocab_size
    roles = {role: getattr(ours, f"{role}_id") for role in SPECIAL_TOKENS}
    named = {"bos": theirs.bos_token_id, "eos": theirs.eos_token_id, "pad": theirs.pad_token_id}
    assert named == {role: roles[role] for role in named}
    assert set(roles.values()) <= set(theirs.all_special_ids)

    # A prompt: texts become what each is by itself, as in training.
    image = [ours.begin_image_id, ours.image_id, ours.image_id, ours.end_image_id]
    document = [ours.bos_id, *ours.encode(CAPTIONS[0]), *image, *ours.encode(" 豌豆荚"), *image, ours.eos_id]
    bos, begin, placeholder, _, end = theirs.convert_ids_to_tokens([ours.bos_id, *image])
    painted = f"{begin}{placeholder}{placeholder}{end}"
    assert theirs(f"{bos}{CAPTIONS[0]}{painted} 豌豆荚{painted}{theirs.eos_token}")["input_ids"] == document
    assert theirs.decode(document, skip_special_tokens=True) == ours.decode(document)


def test_loads_without_sentencepiece(tmp_path: Path) -> None:
    export(tmp_path, SOURCES["ours"]())
    script = """
import sys
for absent in ("sentencepiece", "google.protobuf"):
    sys.modules[absent] = None
from transformers import AutoTokenizer
print(AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2])["input_ids"])
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), CAPTIONS[0]], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == load(SOURCES["ours"]()).encode(CAPTIONS[0])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("like Llama 3", ["<|begin_of_text|>", "<|end_of_text|>", "<pad>", "<begin_image>", "<end_image>", "<image>"]),
        ("names as words", ["<|begin_of_text|>", "<|end_of_text|>", "<pad_1>", "<begin_image>", "<end_image>", "<image_2>"]),
    ],
)
def test_names_of_special_tokens(source: str, expected: list[str]) -> None:
    serialized = SOURCES[source]()
    files = hugging_face_files(load(serialized), serialized)
    special = json.loads(files["special_tokens_map.json"])
    assert [*(special[f"{role}_token"] for role in ("bos", "eos", "pad")), *special["additional_special_tokens"]] == expected


def test_settings(tmp_path: Path) -> None:
    export(tmp_path, SOURCES["like Llama 3"]())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.padding_side, tokenizer.clean_up_tokenization_spaces) == ("left", False)
    padded = tokenizer(["a", "a b c d"], padding=True)["input_ids"]
    assert padded[0][0] == tokenizer.pad_token_id
    assert len(padded[0]) == len(padded[1])


def test_other_control_symbols_are_special_too(tmp_path: Path) -> None:
    serialized = SOURCES["more control symbols"]()
    theirs = AutoTokenizer.from_pretrained(export(tmp_path, serialized))
    token_id = sentencepiece.SentencePieceProcessor(model_proto=serialized).piece_to_id("[INST]")
    assert theirs("[INST]")["input_ids"] == [token_id]
    assert theirs.decode([token_id], skip_special_tokens=True) == ""


def test_a_file_that_cuts_and_pads_does_so_no_longer() -> None:
    serialized = SOURCES["cuts and pads"]()
    assert all(json.loads(serialized)[key] for key in ("truncation", "padding"))
    exported = json.loads(hugging_face_files(load(serialized), serialized)["tokenizer.json"])
    assert exported["truncation"] is exported["padding"] is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "is not BPE"),
        ({"byte_fallback": False}, "has no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises text"),
        ({"remove_extra_whitespaces": True}, "removes extra whitespace"),
        ({"treat_whitespace_as_suffix": True}, "takes whitespace for a suffix"),
        ({"user_defined_symbols": ["<x>"]}, "has user-defined symbols"),
    ],
)
def test_what_would_get_other_ids_is_refused(options: dict[str, Any], reason: str) -> None:
    serialized = sentencepiece_model(**options)
    with pytest.raises(ValueError, match=f"this SentencePiece model {reason}, so no tokenizer.json gives the same ids"):
        hugging_face_files(load(serialized), serialized)


def test_ids_that_differ_are_found() -> None:
    one, another = (train_sentencepiece(CAPTIONS, vocab_size=size) for size in (400, 390))
    with pytest.raises(ValueError, match=r"no tokenizer.json gives the ids of this tokenizer \(the ids of .* would differ\)"):
        hugging_face_files(load(one), another)
