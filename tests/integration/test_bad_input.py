"""What a user gets wrong ends the whole command with one sentence that names the thing and the fix, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmar_megatron.data.index import Index, Split
from mmar_megatron.data.prepare import TOKENIZER_NAME, make_shapes
from mmar_megatron.data.tokenizer import train_sentencepiece
from mmar_megatron.training.metrics import read_metrics
from tests.distributed.common import CODEC, MODEL, make_data
from tests.unit.data.damage import damage_image

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    *("--train.steps", "2", "--train.log_every", "1", "--validation.every", "2", "--validation.samples", "4"),
    *("--checkpoint.every", "2", "--preview.every", "0"),
]
WRITES_BEFORE_IT_FAILS = ("bad-images", "bad-images-in-a-worker", "no-good-image-in-a-worker")
"""What is seen only while training makes a run directory; a checkpoint it never makes."""
EPS_AT_PURE_NOISE = ["--model.diffusion.parameterization", "eps", "--model.diffusion.schedule", "cosine_zero_snr"]

REFUSED: dict[str, tuple[list[str], str]] = {
    # options, in which {data}, {other}, ... are paths; what the sentence must say, in this order
    "no-data": (["--data.path", "{nowhere}"], "{nowhere} ... tools/prepare_data.py"),
    "other-tokenizer": (
        ["--data.tokenizer", "{other}/tokenizer.model"],
        "{data} was made with the tokenizer ... change data.tokenizer",
    ),
    "other-codec": (["--data.codec.patch_size", "16"], "{data} was made for the codec ... change data.codec or prepare"),
    "truncated-shard": (["--data.path", "{truncated}"], "train-000000.tar has ... bytes, the index says"),
    "torn-index": (["--data.path", "{torn}"], "{torn}"),
    "no-such-language": (["--data.languages", "[zh]"], "data.languages is ['zh']"),
    "bad-images": (
        ["--data.path", "{bad}"],
        "samples could not be decoded ... the last one: shard {bad}/train-000000.tar at ... raise the limit",
    ),
    "bad-images-in-a-worker": (
        ["--data.path", "{bad}", "--data.num_workers", "1"],
        "samples could not be decoded ... the last one: shard {bad}/train-000000.tar at ... raise the limit",
    ),
    "no-good-image-in-a-worker": (["--data.path", "{hopeless}", "--data.num_workers", "1"], "samples could not be decoded"),
    "no-good-image-held-out": (
        ["--data.path", "{hopeless_held_out}"],
        "no validation sample of {hopeless_held_out} can be decoded",
    ),
    "heads": (
        ["--parallel.tensor_model_parallel_size", "3"],
        "num_attention_heads 4 is not divisible by parallel.tensor_model_parallel_size 3: change one",
    ),
    "processes": (
        ["--parallel.tensor_model_parallel_size", "2"],
        "1 processes do not divide into replicas of 2 ... start a multiple",
    ),
    "noise": (EPS_AT_PURE_NOISE, "'eps' ... use 'v', or the schedule 'cosine'"),
    "typo": (["--train.step", "2"], "there is no option 'train.step'; did you mean 'train.steps'?"),
    "typo-in-a-file": (["--config", "{typo}"], "no option 'model.bakbone.num_layers'; did you mean 'model.backbone.num_layers'?"),
    "run-dir-is-a-file": (["--run_dir", "{typo}"], "{typo}"),
    "no-teacher": (
        ["--model.alignment_loss_weight", "1", "--model.alignment_features", "4"],
        "{data} holds no teacher features: set model.alignment_loss_weight to 0",
    ),
    "other-shape": (["--resume", "{done}", "--model.backbone.ffn_hidden_size", "128"], "{done} ... linear_fc1"),
    "other-shape-to-begin-with": (["--checkpoint.init_from", "{done}", "--model.head.width", "32"], "{done} ... post_projector"),
    "other-words": (["--resume", "{done}", "--data.path", "{other_words}"], "{done} ... was trained with the tokenizer ... give"),
    "other-words-to-begin-with": (
        ["--checkpoint.init_from", "{done}", "--data.path", "{other_words}"],
        "{done} ... was trained with the tokenizer",
    ),
    "run-dir-in-use": (["--run_dir", "{done}", "--resume", "never"], "{done} is not empty: choose another, or continue"),
    "nothing-to-resume": (["--resume", "{nowhere}"], "no checkpoint at {nowhere}: give"),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one command."""

    code: int
    out: str
    err: str
    run_dir: Path

    @property
    def sentence(self) -> str:
        """The only line on standard error."""
        (line,) = self.err.splitlines()
        return line


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Good data and copies of it, each broken in one way."""
    root = tmp_path_factory.mktemp("data")
    data = make_data(root / "data")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(data, root / name))

    (copy("other") / TOKENIZER_NAME).write_bytes(train_sentencepiece(["one two three four", "five six seven"], vocab_size=300))
    shard = copy("truncated") / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1000])
    (copy("torn") / "index.json").write_text('{"format_version": 1, "sha')
    damages: list[tuple[str, Split, int]] = [
        ("bad", "train", 40),
        ("one_bad", "train", 1),
        ("hopeless", "train", 64),
        ("hopeless_held_out", "validation", 16),
    ]
    for name, split, count in damages:
        directory = copy(name)
        assert Index.load(directory).count(split) >= count
        for number in range(count):
            damage_image(directory, split=split, number=number)
    make_shapes(root / "other_words", codec=CODEC, train=64, validation=16, vocab_size=390, log=lambda _: None)
    (root / "typo.yaml").write_text("model: {bakbone: {num_layers: 2}}\n")
    names = ("data", "other", "truncated", "torn", "bad", "one_bad", "hopeless", "hopeless_held_out", "other_words", "nowhere")
    return {name: str(root / name) for name in names} | {
        "typo": str(root / "typo.yaml"),
        "root": str(root),
        "done": str(root / "runs" / "one-bad-image"),
    }


@pytest.fixture(scope="module")
def outcomes(places: dict[str, str]) -> dict[str, Outcome]:
    """Of all refused commands and of some that go through, from one start of Python."""
    root = Path(places["root"])
    (root / "written").mkdir()
    commands = {
        "one-bad-image": ["--data.path", "{one_bad}", "--data.max_bad_fraction", "0.05"],
        "absurd-learning-rate": ["--optimizer.lr", "1e30", "--optimizer.clip_grad", "0", "--optimizer.warmup_steps", "0"],
    } | {name: options for name, (options, _) in REFUSED.items()}
    arguments = {
        name: [
            *(*MODEL, *SHORT, "--data.path", places["data"], "--run_dir", str(root / "runs" / name)),
            *(option.format(**places) for option in options),
        ]
        for name, options in commands.items()
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    driver = [sys.executable, str(ROOT / "tests/integration/forked.py"), str(root / "written"), json.dumps(arguments)]
    finished = subprocess.run(driver, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=True)
    codes = json.loads(finished.stdout.splitlines()[-1])
    return {
        name: Outcome(
            code=code,
            out=(root / "written" / f"{name}.out").read_text(),
            err=(root / "written" / f"{name}.err").read_text(),
            run_dir=root / "runs" / name,
        )
        for name, code in codes.items()
    }


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str, outcomes: dict[str, Outcome], places: dict[str, str]) -> None:
    outcome = outcomes[name]
    assert outcome.code in (1, 2)
    assert outcome.sentence.startswith("error: ")
    rest = outcome.sentence
    for part in REFUSED[name][1].format(**places).split(" ... "):
        assert part in rest, outcome.sentence
        rest = rest.partition(part)[2]


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_is_left_behind(name: str, outcomes: dict[str, Outcome]) -> None:
    """No checkpoint, nor anything that looks like one; and no run directory at all where training did not begin."""
    run_dir = outcomes[name].run_dir
    assert not (run_dir / "checkpoints").exists()
    assert not run_dir.exists() or name in WRITES_BEFORE_IT_FAILS


def test_the_command_itself_says_the_same(outcomes: dict[str, Outcome], places: dict[str, str], tmp_path: Path) -> None:
    """The forked commands stand for real ones."""
    command = [sys.executable, "pretrain_mmar.py", *MODEL, "--data.path", places["nowhere"], "--run_dir", str(tmp_path / "run")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (finished.returncode, finished.stderr) == (outcomes["no-data"].code, outcomes["no-data"].err)
    assert not (tmp_path / "run").exists()


def test_one_bad_image_is_skipped(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["one-bad-image"]
    assert (outcome.code, outcome.err) == (0, "")
    assert (outcome.run_dir / "checkpoints" / "step_00000002" / "manifest.json").is_file()
    assert [row["step"] for row in read_metrics(outcome.run_dir)] == [1, 2]


def test_steps_that_blow_up_are_skipped_and_counted(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["absurd-learning-rate"]
    assert (outcome.code, outcome.err) == (0, "")
    assert [row["skipped_steps"] for row in read_metrics(outcome.run_dir)] == [0, 1]
    assert "step 2: the loss is nan, the gradient norm nan; the step is skipped (samples " in outcome.out
