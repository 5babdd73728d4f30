"""Texts for pictures: what is asked, in batches of different lengths, and a file of them that is gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmar_megatron.generation.opening import Opened
from mmar_megatron.generation.reading import Input, Reading, find_pictures, read, read_inputs
from mmar_megatron.generation.texts import TextFile


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Five, of random pixels."""
    files = [tmp_path / "pictures" / f"{number}.png" for number in range(5)]
    files[0].parent.mkdir()
    for number, file in enumerate(files):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return files


@pytest.fixture
def inputs(pictures: list[Path]) -> list[Input]:
    """Of different lengths."""
    questions = [None, "what?", "which of these is a red circle?", None, "two"]
    return [
        Input(images=(file.name,), files=(file,), question=question) for file, question in zip(pictures, questions, strict=True)
    ]


def texts_of(opened: Opened, inputs: list[Input], *, batch_size: int, **options: Any) -> dict[int, str]:
    reading = options.pop("reading", Reading(max_tokens=6))
    return dict(read(opened, inputs, reading=reading, batch_size=batch_size, **options))


def test_files_directories_and_patterns(pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures[0].parent
    monkeypatch.chdir(folder.parent)
    (folder / "notes.txt").write_text("no picture")
    found = find_pictures(["pictures/3.png", "pictures", "**/[01].png"], question="what?")
    assert [one.images[0] for one in found] == [
        "pictures/3.png",
        *(f"pictures/{number}.png" for number in range(5)),
        *("pictures/0.png", "pictures/1.png"),
    ]
    assert {one.question for one in found} == {"what?"}
    with pytest.raises(ValueError, match=r"\*\.gif has no pictures"):
        find_pictures(["*.gif"], question=None)


def test_inputs_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(
        '{"images": ["a.png"]}\n'
        '{"images": ["a.png"], "question": "where?"}\n'
        '{"images": ["a.png", "b.png"], "text": "<image>x<image>"}\n'
    )
    plain, asked, text = read_inputs(tmp_path / "in.jsonl", question="what?")
    assert plain.files == (tmp_path / "a.png",)
    assert (plain.question, asked.question, text.question) == ("what?", "where?", None)
    assert text.asked == {"images": ["a.png", "b.png"], "text_before": "<image>x<image>"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "what?"}', 'line 1 has no list of "images"'),
        ('{"images": "a.png"}', 'line 1 has no list of "images"'),
        ('{"images": ["a.png"], "question": "q", "text": "<image>"}', "line 1 has a question and a text"),
        ('{"images": ["a.png"], "text": "no place"}', "line 1 has 1 images, but 0 times <image>"),
        ('{"images": ["a.png"], "question": "<image><image>"}', "line 1 has 1 images, but 2 times <image>"),
        ('{"images": ["a.png"], "question": 5}', "line 1 has a question or text that is no text"),
        ("", "has no inputs"),
    ],
)
def test_unfit_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "in.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        read_inputs(tmp_path / "in.jsonl", question=None)


def test_greedy_texts_do_not_depend_on_the_batch(opened: Opened, inputs: list[Input]) -> None:
    alone = texts_of(opened, inputs, batch_size=1)
    assert alone == texts_of(opened, inputs, batch_size=3)
    assert list(alone) == list(range(5))
    processor = opened.processor
    with Image.open(inputs[1].files[0]) as image:
        prompt = processor.converse([[{"role": "user", "content": "<image>what?"}]], images=[image])
    ids = opened.model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert alone[1] == processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_drawn_texts_follow_from_the_seed(opened: Opened, inputs: list[Input]) -> None:
    reading = Reading(max_tokens=6, temperature=2.0, top_p=0.95, seed=1)
    whole = texts_of(opened, inputs, batch_size=2, reading=reading)
    # Taken up in the midst of a batch.
    assert texts_of(opened, inputs, batch_size=2, reading=reading, is_done=lambda number: number < 3) == {
        number: text for number, text in whole.items() if number >= 3
    }
    assert texts_of(opened, inputs, batch_size=2, reading=Reading(max_tokens=6, temperature=2.0, seed=2)) != whole
    assert texts_of(opened, [inputs[0]] * 4, batch_size=2, reading=reading)[2] != whole[0]


def test_a_text_ends_where_the_sequences_of_training_did(opened: Opened, inputs: list[Input]) -> None:
    config = opened.model.config
    long = Input(images=inputs[0].images, files=inputs[0].files, question="a red circle " * 40)
    with pytest.raises(
        ValueError, match=rf"0.png and what is asked of them have \d+ tokens, of {config.max_position_embeddings}"
    ):
        texts_of(opened, [long], batch_size=1)


def test_a_longer_text_beside_it_does_not_lengthen_a_text(
    opened: Opened, inputs: list[Input], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened.model.config, "max_position_embeddings", 57)  # the longest prompt has 55 tokens
    alone = texts_of(opened, inputs, batch_size=1)
    assert alone == texts_of(opened, inputs, batch_size=5)
    assert alone[2] != texts_of(opened, inputs, batch_size=1, reading=Reading(max_tokens=1))[2]


def test_bad_pictures_end_the_work_or_are_counted(opened: Opened, inputs: list[Input]) -> None:
    inputs[2].files[0].write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"2.png cannot be read as a picture \(cannot identify image file"):
        texts_of(opened, inputs, batch_size=2)
    told: list[str] = []
    assert list(texts_of(opened, inputs, batch_size=2, on_bad=told.append)) == [0, 1, 3, 4]
    assert len(told) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0"),
        ({"top_p": 0.5}, "top_p changes nothing at temperature 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reading(**settings).check()


def test_a_file_of_texts_is_gone_on_with(inputs: list[Input], tmp_path: Path) -> None:
    out, settings = tmp_path / "made" / "out.jsonl", {"seed": 1, "model": "here"}
    with TextFile(out, inputs=inputs, settings=settings) as file:
        file.add(0, "猫\tone")
        file.add(2, "three")
        with pytest.raises(ValueError, match="another process writes"):
            TextFile(out, inputs=inputs, settings=settings)
    assert json.loads(out.read_text().splitlines()[0]) == {"images": ["0.png"], "text": "猫\tone"}
    out.write_bytes(out.read_bytes() + b'{"images": ["1.p')
    with TextFile(out, inputs=inputs, settings={**settings, "model": "there"}) as file:
        assert [file.has(number) for number in range(5)] == [True, False, True, False, False]
        file.add(1, "two")
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == ["猫\tone", "three", "two"]

    with pytest.raises(ValueError, match=r"out.jsonl was begun with other settings \(seed was 1 and is 2\)"):
        TextFile(out, inputs=inputs, settings={**settings, "seed": 2})
    with pytest.raises(ValueError, match=r"out.jsonl has 2 lines of inputs that are not given now"):
        TextFile(out, inputs=inputs[2:], settings=settings)
    out.with_name("out.jsonl.settings.json").unlink()
    with pytest.raises(ValueError, match=r"out.jsonl is there, and no out.jsonl.settings.json that says how it was made"):
        TextFile(out, inputs=inputs, settings=settings)
    assert len(out.read_text().splitlines()) == 3


@pytest.mark.parametrize("content", ['{"images": ["0.png"], "text": "mine"}', '{"images": ["0.png"]}\n', "no JSON\n"])
def test_a_foreign_file_stays_as_it_is(inputs: list[Input], tmp_path: Path, content: str) -> None:
    (tmp_path / "out.jsonl").write_text(content)
    with pytest.raises(ValueError, match="choose another --out"):
        TextFile(tmp_path / "out.jsonl", inputs=inputs, settings={})
    assert [(file.name, file.read_text()) for file in tmp_path.glob("out*")] == [("out.jsonl", content)]
