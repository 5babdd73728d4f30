"""Prompts from files, and what is said of unfit ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmar_megatron.generation.opening import Opened
from mmar_megatron.generation.prompts import Prompt, check_lengths, read_prompts


def test_three_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa red kite\r\n\n 猫\n".encode())
    assert [(prompt.text, prompt.place) for prompt in read_prompts(tmp_path / "a.txt")] == [
        ("a red kite", f"{tmp_path}/a.txt, line 1"),
        ("猫", f"{tmp_path}/a.txt, line 3"),
    ]
    (tmp_path / "a.jsonl").write_text('{"prompt": " a kite ", "id": 7, "seed": 3}\n\n{"prompt": ""}\n')
    (tmp_path / "a.csv").write_text('prompt,id,seed\n"a kite, red",x,3\nanother,,\n')
    fields = [
        [(prompt.text, prompt.id, prompt.seed) for prompt in read_prompts(tmp_path / name)] for name in ("a.jsonl", "a.csv")
    ]
    assert fields == [[(" a kite ", "7", 3), ("", None, None)], [("a kite, red", "x", 3), ("another", None, None)]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "a.txt has no prompts: write one a line"),
        ("a.jsonl", b"", "a.jsonl has no prompts"),
        ("a.csv", b"", "a.csv has no prompts"),
        ("a.csv", b"text\na kite\n", "a.csv has no column prompt"),
        ("a.csv", b"prompt,seed\na kite,1.5\n", "a.csv, row 1 has the seed '1.5'"),
        ("a.txt", b"one\n\xff\n", "a.txt, line 2 is not UTF-8"),
        ("a.jsonl", b'{"prompt": "one"}\n{"prompt"\n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'["one"]\n', "a.jsonl, line 1 is no JSON object"),
        ("a.jsonl", b'{"text": "one"}\n', 'a.jsonl, line 1 has no text "prompt"'),
        ("a.jsonl", b'{"prompt": "one", "seed": -1}\n', "a.jsonl, line 1 has the seed -1"),
        ("a.jsonl", b'{"prompt": "one", "seed": true}\n', "a.jsonl, line 1 has the seed True"),
        ("a.yaml", b"", "a.yaml is of no known kind"),
    ],
)
def test_unfit_files_are_named_with_the_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.txt cannot be read \(No such file or directory\)"):
        read_prompts(tmp_path / "none.txt")


def test_a_prompt_must_fit_beside_its_picture(opened: Opened) -> None:
    processor = opened.processor
    text = "a red circle " * 3
    tokens = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    prompts = [Prompt(text="a", place="--prompt 1"), Prompt(text=text, place="--prompt 2")]
    check_lengths(prompts, processor=processor, image_tokens=16, longest=tokens + 16 + 4)
    check_lengths(prompts, processor=processor, image_tokens=16, longest=None)
    with pytest.raises(ValueError, match=f"--prompt 2 has {tokens} tokens, and the model has room for {tokens - 1} beside"):
        check_lengths(prompts, processor=processor, image_tokens=16, longest=tokens + 16 + 3)
