"""Benchmarks measure what they say, in any number of processes."""

from __future__ import annotations

import json
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import pytest

from mmar_megatron import parallel
from mmar_megatron.benchmarks.exporting import measure_export
from mmar_megatron.benchmarks.indexing import locality, measure_index
from mmar_megatron.benchmarks.loading import Reading, at_random, in_order
from mmar_megatron.benchmarks.quality import QualityPlan
from mmar_megatron.benchmarks.timing import WARM_UP, in_turn, ratio
from mmar_megatron.config import DataConfig, parse_command_line
from mmar_megatron.data.source import DataSource
from tests.distributed.common import MODEL
from tests.distributed.launch import run_group
from tools import benchmark


def test_actions_take_turns_and_are_all_timed() -> None:
    done: list[str] = []
    seconds = in_turn([lambda: done.append("a"), lambda: done.append("b")], rounds=4, after=lambda: done.append("-"))
    assert [len(of_action) for of_action in seconds] == [4, 4]
    assert "".join(done[2 * 2 * WARM_UP :]) == "a-b-b-a-a-b-b-a-"


def test_ratio_is_that_within_a_round() -> None:
    """A machine that slows down to a hundredth in the middle changes nothing."""
    found = ratio([2.0, 2.2, 200.0, 220.0], [1.0, 1.1, 100.0, 110.0])
    assert found == {"ratio": 2.0, "ratio_quartiles": [2.0, 2.0]}


@pytest.mark.distributed
def test_both_kinds(coarse_shapes_dir: Path, tmp_path: Path) -> None:
    options = ["--rounds", "2", *MODEL, "--data.path", str(coarse_shapes_dir)]
    step = ["step", "--variant", "--optimizer.ema_decay 0.9", *options]
    found = json.loads(run_group("tools/benchmark.py", *step, nproc=1).splitlines()[-1])
    assert found["variant"] == "--optimizer.ema_decay 0.9"
    assert found["step_s"] > 0
    assert found["ratio_quartiles"][0] <= found["ratio"] <= found["ratio_quartiles"][1]

    save = ["save", "--directory", str(tmp_path), *options]
    (line,) = [line for line in run_group("tools/benchmark.py", *save, nproc=2).splitlines() if line.startswith("{")]
    found = json.loads(line)
    assert found["bytes"] > 1_000_000
    assert min(found[name] for name in ("foreground_s", "background_s", "verify_s")) > 0
    assert list(tmp_path.iterdir()) == []


def test_weights_pass_through_export_and_import_tensor_by_tensor(tmp_path: Path) -> None:
    """Of 400 MB in files of 60 MB no process has more than a file and twice the largest tensor, beside its libraries."""
    sizes = {"num_layers": 28, "hidden_size": 512, "num_attention_heads": 8, "num_query_groups": 2, "ffn_hidden_size": 2048}
    options = [word for name, size in sizes.items() for word in (f"--model.backbone.{name}", str(size))]
    found = measure_export([*MODEL, *options], shard_gb=0.06, directory=tmp_path)
    assert found["parameters"] * 4 > 4e8
    file, largest_tensor = found["largest_file_gb"], 2 * 2048 * 512 * 4 / 1e9
    assert 0.05 < file <= 0.06
    slack = 0.1  # allocators, and pages of what was read last
    assert found["export_peak_gb"] - found["export_before_gb"] < file + 2 * largest_tensor + slack
    assert found["import_peak_gb"] - found["import_before_gb"] < 2 * largest_tensor + slack
    assert list(tmp_path.iterdir()) == []


def test_what_lay_ready_does_not_count() -> None:
    reading = Reading(repeat(24), microbatches=6, workers=1)
    for _ in range(WARM_UP + 2):
        reading()
    assert reading.samples_per_s([2.0, 3.0]) == pytest.approx([6 * 24 / 2, 6 * 24 / 3])


def result_of(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[dict[str, Any], str]:
    """What a benchmark prints: the JSON object, and the table for people."""
    benchmark.main([*line, "--rounds", "3"])
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def assert_ordered(row: dict[str, Any]) -> None:
    assert row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]


def test_step_beside_plain_pytorch(coarse_shapes_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*MODEL, "--data.path", str(coarse_shapes_dir)]
    found, table = result_of(capsys, "step", *options)
    assert found["parameters"] > 50_000
    assert min(found["engine_step_s"], found["plain_step_s"]) > 0
    assert max(found["relative_loss_difference"], found["relative_grad_norm_difference"]) < 1e-5
    assert_ordered(found)
    assert [row["part"] for row in found["rows"]][:4] == ["embedding", "backbone", "logits", "head"]
    assert "| part | forward_s | backward_s | share |" in table
    with pytest.raises(SystemExit, match="which lacks an option: leave that out"):
        benchmark.main(["step", "--rounds", "2", *options, "--model.backbone.attention_dropout", "0.5"])
    parallel.leave()
    with pytest.raises(SystemExit, match="is held against the engine native on one process"):
        benchmark.main(["step", *options, "--engine", "deepspeed"])


def test_rows_that_matter(capsys: pytest.CaptureFixture[str]) -> None:
    small = [*MODEL, "--image_tokens", "16"]
    head, table = result_of(capsys, "head", *small, "--images", "8", "--channels", "4")
    assert (head["depth"], head["width"], head["timestep_multiplier"], head["tokens"]) == (2, 24, 2, 128)
    assert list(head["skipped"]) == ["compiled"]
    assert "compiled is left out: torch.compile is measured on GPUs alone" in table
    assert [row["case"] for row in head["rows"]] == ["stage 1", "uniform"]
    assert 0.7 < head["rows"][0]["share"] < 1
    assert 0.2 < head["rows"][1]["share"] < 0.7

    logits, _ = result_of(capsys, "logits", *small, "--sequences", "2", "--text_tokens", "4", "--vocabulary", "300")
    assert (logits["positions"], logits["labels"], logits["hidden_size"]) == (2 * 20, 2 * 4, 32)
    assert logits["rows"][0]["share"] == 0.2
    for row in [*head["rows"], *logits["rows"]]:
        assert_ordered(row)
        assert row["limit"] == pytest.approx(1 / row["share"], rel=1e-3)
        assert row["of_limit"] == pytest.approx(row["ratio"] * row["share"], rel=1e-3)
        assert row["relative_loss_difference"] < 1e-5


def test_attention(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["attention", *MODEL, "--text_tokens", "4", "--image_tokens", "16"]
    found, table = result_of(capsys, *line, "--lengths", "20", "50", "--positions", "60")
    assert (found["heads"], found["groups"], found["width"], found["document"]) == (4, 2, 8, [4, 16])
    of_length = {length: [row for row in found["rows"] if row["length"] == length] for length in (20, 50)}
    assert [row["implementation"] for row in of_length[20]] == ["dense", "causal", "unfused"]
    assert [rows[0]["sequences"] for rows in of_length.values()] == [3, 1]
    assert all(rows[0]["ratio"] == 1 for rows in of_length.values())
    for row in found["rows"]:
        assert_ordered(row)
    assert found["skipped"].keys() == {"flex", "cudnn", "te unfused", "te causal"}
    assert "flex is left out: torch's FlexAttention has no backward pass on a CPU" in table
    with pytest.raises(SystemExit, match="error: length 19 has no room for a document of 4 \\+ 16 positions: make it longer"):
        benchmark.main([*line, "--lengths", "19"])


@pytest.mark.distributed
def test_loader(coarse_shapes_dir: Path) -> None:
    options = ["--rounds", "2", "--microbatches", "2", "--cold", *MODEL, "--data.path", str(coarse_shapes_dir)]
    options += ["--data.num_workers", "1", "--data.sequence_length", "96"]
    found = json.loads(run_group("tools/benchmark.py", "loader", *options, nproc=1).splitlines()[-1])
    assert found["samples_per_s"].keys() == {"webdataset", "random_access", "unpacked", "packed", "step"}
    assert min(found["samples_per_s"].values()) > 0
    assert (found["cold"], found["workers"], found["packing"]) == (True, 1, False)
    for name in ("random_access_to_webdataset", "loader_to_step"):
        assert found[name]["ratio_quartiles"][0] <= found[name]["ratio"] <= found[name]["ratio_quartiles"][1]


def test_both_ways_of_reading_give_the_same_samples(coarse_shapes_dir: Path) -> None:
    config = parse_command_line([*MODEL, "--data.path", str(coarse_shapes_dir)]).config
    source = DataSource(config.data)
    (tar,) = coarse_shapes_dir.glob("train-*.tar")
    of_epoch = len(source.reader("train")) // config.train.micro_batch_size
    both = (islice(reading, of_epoch) for reading in (in_order([tar], config), at_random(source, config)))
    first, second = (
        {
            json.dumps(metadata): image.tolist()
            for texts, images, _ in reading
            for metadata, image in zip(texts, images, strict=True)
        }
        for reading in both
    )
    assert first == second


def test_larger_blocks_are_read_from_fewer_places() -> None:
    far, near = (locality(DataConfig(shuffle_block=block, shuffle_pool=4096), samples=1_000_000, seed=1) for block in (16, 1024))
    assert 250 < far["contiguous_ranges_in_a_pool"] <= 256  # two of its blocks may be neighbours by chance
    assert 2 <= near["contiguous_ranges_in_a_pool"] <= 4
    assert far["shards_in_1000_reads"] > 100 > 10 > near["shards_in_1000_reads"]


def test_index_of_samples_that_are_not_there() -> None:
    found = measure_index([*MODEL, "--data.sequence_length", "256"], samples=20_000, windows=3)
    assert found["samples"] == 20_000
    assert min(found[name] for name in ("open_s", "first_window_s", "last_window_s", "window_s")) > 0


def test_quality_of_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        benchmark, "measure_quality", lambda options, **rest: asked.update(options=options, **rest) or {"rows": []}
    )
    line = ["quality", "--model", "a", "--model", "b", "--out", str(tmp_path), "--steps", "50", "5", "--samplers", "ddim"]
    benchmark.main([*line, "--images", "32", "--mar_rounds", "4", "--path_images", "64", "--data.path", "d"])
    assert asked["options"] == ["--data.path", "d"]
    assert asked["out"] == tmp_path
    assert asked["plan"] == QualityPlan(models=("a", "b"), steps=(5, 50), samplers=("ddim",), images=32, rounds=4, path_images=32)
    assert json.loads(capsys.readouterr().out)["rows"] == []
    with pytest.raises(SystemExit, match="error: --images is 3: give 32 or more"):
        benchmark.main([*line, "--images", "3"])
