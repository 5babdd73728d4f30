from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmar_megatron.data.index import Index
from mmar_megatron.data.inspection import facts as facts_module
from mmar_megatron.data.inspection.facts import Histogram, evenly, gather_set, original_aspect, spread
from mmar_megatron.data.inspection.opening import StoredCodec, open_directory, usual_length
from mmar_megatron.data.inspection.views import gather_samples
from mmar_megatron.data.source import DataSource
from tests.unit.data.conftest import TRAIN, VALIDATION
from tests.unit.data.faulty_server import FolderSource, faulty_server
from tests.unit.data.inspection.conftest import CODEC, talks


def test_counts_of_shapes(shapes_dir: Path) -> None:
    source = open_directory(str(shapes_dir))
    facts = gather_set(source.sets[0])
    index = source.sets[0].index
    train, validation = facts.splits
    assert (train.samples, train.pairs, train.images, train.texts) == (TRAIN,) * 4
    assert (validation.samples, validation.pairs, validation.images, validation.texts) == (VALIDATION,) * 4
    assert train.text_tokens + validation.text_tokens == int(index.text_tokens.sum())
    assert (train.content, train.painted, train.texts_by_language) == (0, 0, {"en": TRAIN})
    assert facts.bytes == sum(file.stat().st_size for file in shapes_dir.glob("*.tar"))
    assert facts.samples == facts.looked_at == TRAIN + VALIDATION
    assert facts.lengths is not None
    assert facts.lengths.mean == pytest.approx(4 + CODEC.num_tokens + float(index.text_tokens.mean()))
    assert facts.aspects is None
    assert facts.report == json.loads((shapes_dir / "report.json").read_text())


def test_counts_of_a_mix(mix: DataSource, talks_dir: Path) -> None:
    facts = gather_set(mix.sets[1])
    samples = talks()
    for found in facts.splits:
        mine = [(metadata, pictures) for split, metadata, pictures in samples if split == found.split]
        assert found.samples == len(mine)
        assert found.pairs == sum("captions" in metadata for metadata, _ in mine)
        assert found.content == found.samples - found.pairs
        assert found.images == sum(pictures for _, pictures in mine)
        assert found.painted == sum(metadata.get("content", [{}])[-1].get("image") == 1 for metadata, _ in mine)
        assert found.texts_by_language == {"en": 2 * found.pairs, "zh": found.pairs, "content": found.content}
    assert [histogram.name for histogram in facts.text_tokens] == [
        "A caption in “en”",
        "A caption in “zh”",
        "Text of a content sample",
    ]
    assert facts.images is not None
    assert (facts.images.least, facts.images.most, facts.images.values) == (0, 2, len(samples))
    assert facts.report == json.loads((talks_dir / "report.json").read_text())


def test_length_of_a_document_of_each_kind(mix: DataSource) -> None:
    index = mix.sets[1].index
    conversation, document, story, pair = (facts_module._lengths(index, np.array([i]))[0] for i in range(4))
    count = lambda text: len(mix.tokenizer.encode(text))  # noqa: E731
    image = CODEC.num_tokens + 2
    samples = [metadata for _, metadata, _ in talks()]
    texts = [sum(count(p["text"]) + p.get("end", False) for p in m["content"] if "text" in p) for m in samples[:3]]
    assert [conversation, document, story] == [1 + texts[0] + 2 * image, 1 + texts[1], 1 + texts[2] + 2 * image]
    captions = samples[3]["captions"]
    assert pair in {4 + CODEC.num_tokens + count(text) for texts in captions.values() for text in texts}


def test_aspects_of_the_pictures_as_they_were(mix: DataSource) -> None:
    facts = gather_set(mix.sets[1])
    assert facts.aspects is not None
    pairs = [metadata for _, metadata, _ in talks() if "captions" in metadata]
    ratios = [metadata["width"] / metadata["height"] for metadata in pairs]
    assert facts.aspects.values == len(pairs)
    assert facts.aspects.mean == pytest.approx(np.mean(ratios))
    by_bin = {facts.aspects.edges[k]: count for k, count in enumerate(facts.aspects.counts) if count}
    assert sorted(by_bin.values()) == sorted(ratios.count(ratio) for ratio in set(ratios))
    assert facts.aspects.counts[len(facts.aspects.counts) // 2] == ratios.count(1.0)


@pytest.mark.parametrize(
    ("metadata", "aspect"),
    [
        ({"width": 640, "height": 320}, 2.0),
        ({"original_width": 300, "original_height": 600}, 0.5),
        ({"original_size": [30, 10]}, 3.0),
        ({"original_size": [30, 10], "width": 1, "height": 1}, 3.0),
        ({"original_size": "30x10"}, None),
        ({"width": 640}, None),
        ({"width": "640", "height": "320"}, None),
        ({"width": 640, "height": 0}, None),
        ({"width": None, "height": None, "original_width": 2, "original_height": 1}, 2.0),
        ({}, None),
    ],
)
def test_original_aspect(metadata: dict[str, Any], aspect: float | None) -> None:
    assert original_aspect(metadata) == aspect


def test_histogram_counts_every_value() -> None:
    values = np.random.default_rng(0).integers(3, 1000, 5000)
    histogram = Histogram.of(values, name="", unit="")
    assert histogram is not None
    expected, _ = np.histogram(values, bins=histogram.edges)
    assert histogram.counts == expected.tolist()
    assert (histogram.values, histogram.least, histogram.most) == (5000, values.min(), values.max())
    assert (histogram.mean, histogram.median) == (values.mean(), np.median(values))
    assert Histogram.of(values[:0], name="", unit="") is None


def test_a_spread_has_one_of_each_stretch() -> None:
    assert spread(7, most=10).tolist() == list(range(7))
    found = spread(10_007, most=100)
    begins = np.arange(100) * 10_007 // 100
    assert ((begins <= found) & (found < np.append(begins[1:], 10_007))).all()
    # Texts that come in turn all have their share, which none has at every 100th place.
    assert min(np.bincount(spread(100_000, most=1000) % 5, minlength=5).tolist()) > 150


def test_evenly() -> None:
    assert evenly(0, most=5) == []
    assert evenly(3, most=5) == [0, 1, 2]
    assert evenly(101, most=5) == [0, 25, 50, 75, 100]
    assert evenly(101, most=1) == [0]


def test_a_large_index_is_looked_at_in_part(mix: DataSource, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gather_set(mix.sets[1])
    monkeypatch.setattr(facts_module, "MOST_LOOKED_AT", 10)
    monkeypatch.setattr(facts_module, "_PIECE", 7)
    part = gather_set(mix.sets[1])
    assert part.splits == whole.splits  # counts are exact however they are added up
    assert part.looked_at == 10
    assert part.lengths is not None
    assert part.lengths.values == 10


def test_a_report_that_is_no_report_is_left_out(shapes_copy: Path) -> None:
    (shapes_copy / "report.json").write_text("[1, 2")
    assert gather_set(open_directory(str(shapes_copy)).sets[0]).report is None
    (shapes_copy / "report.json").write_text("[1, 2]")
    assert gather_set(open_directory(str(shapes_copy)).sets[0]).report is None


def test_a_directory_is_opened_as_its_index_says(shapes_dir: Path, talks_dir: Path, moments_dir: Path) -> None:
    source = open_directory(str(shapes_dir))
    assert source.codec.fingerprint == Index.load(shapes_dir).codec
    assert (source.config.sequence_length, source.config.packing) == (128, True)
    assert open_directory(str(talks_dir)).config.languages == ["en", "zh"]
    assert isinstance(open_directory(str(moments_dir)).codec, StoredCodec)
    assert [usual_length(tokens) for tokens in (16, 64, 65, 256, 1024)] == [128, 128, 256, 512, 2048]


def test_a_url(talks_dir: Path) -> None:
    with faulty_server(FolderSource(talks_dir)) as server:
        source = open_directory(server.url)
        facts, expected = gather_set(source.sets[0]), gather_set(open_directory(str(talks_dir)).sets[0])
        assert replace(facts, path="", index=expected.index) == replace(expected, path="")
        assert gather_samples(source, source.sets[0], most=4)[0].key == "talk_00"
        source.sets[0].storage.close()


def test_a_directory_without_tokenizer(shapes_copy: Path, shapes_dir: Path) -> None:
    (shapes_copy / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"holds no tokenizer: give the one that it was made with as --tokenizer"):
        open_directory(str(shapes_copy))
    opened = open_directory(str(shapes_copy), tokenizer=str(shapes_dir / "tokenizer.model"))
    assert opened.tokenizer.fingerprint == open_directory(str(shapes_dir)).tokenizer.fingerprint
