"""Accounts of skipped steps. What ranks add to them is in tests/integration/test_faults.py."""

from __future__ import annotations

import math
from pathlib import Path

from mmar_megatron.data.batch import Batch
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.training.incidents import Incidents
from mmar_megatron.training.metrics import read_rows
from tests.unit.tiny import Documents


def microbatches(tokenizer: Tokenizer, *, samples: int) -> list[Batch]:
    documents = Documents(tokenizer)
    rows = [[documents.image_to_text([100], seed=sample)] for sample in range(samples)]
    return [documents.batch([row], sequence_length=32) for row in rows]


def test_each_skipped_step_stands_once_after_a_resume(
    tmp_path: Path, groups: ParallelGroups, coarse_tokenizer: Tokenizer
) -> None:
    batches = microbatches(coarse_tokenizer, samples=2)
    for resume_step, steps, reason in ((0, (2, 5, 7), "first"), (5, (6, 7), "second")):
        incidents = Incidents(tmp_path, resume_step=resume_step, groups=groups, name_of="a:{}".format)
        for step in steps:
            incidents.report(reason, {"loss": math.nan, "lr": 0.1}, microbatches=batches, step=step)
    rows = read_rows(tmp_path / "incidents.jsonl")
    assert [(row["step"], row["reason"]) for row in rows] == [(2, "first"), (5, "first"), (6, "second"), (7, "second")]
    assert rows[-1] == {"step": 7, "reason": "second", "loss": None, "lr": 0.1, "samples": ["a:0", "a:1"]}


def test_the_line_names_some_samples_and_the_file_all(
    tmp_path: Path, groups: ParallelGroups, coarse_tokenizer: Tokenizer
) -> None:
    incidents = Incidents(tmp_path, resume_step=0, groups=groups, name_of="a:{}".format)
    line = incidents.report("odd", {}, microbatches=microbatches(coarse_tokenizer, samples=11), step=3)
    path = tmp_path / "incidents.jsonl"
    assert line == f"step 3: odd; the step is skipped (samples a:0, a:1, a:2, a:3, a:4, a:5, a:6, a:7 and 3 more, see {path})"
    assert read_rows(path)[0]["samples"] == [f"a:{i}" for i in range(11)]
