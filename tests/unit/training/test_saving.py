"""Saving in the foreground and background, what happens when it fails, and which old checkpoints are deleted."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmar_megatron.config import CheckpointConfig
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.training import checkpoint, manifest, saving
from mmar_megatron.training.checkpoint import Progress
from mmar_megatron.training.saving import CheckpointWriter, SaveError, _Written, delete_old
from tests.unit.tiny import Documents, engine_of, weights


class Run:
    """A run that does nothing but save."""

    def __init__(self, run_dir: Path, *, engine: NativeEngine, groups: ParallelGroups, **options: object) -> None:
        self.run_dir, self.engine, self.said = run_dir, engine, list[str]()
        config = replace(CheckpointConfig(), **options)  # type: ignore[arg-type]
        self.writer = CheckpointWriter(config, run_dir=run_dir, config_yaml="{}", groups=groups, say=self.said.append)

    def save(self, step: int) -> None:
        self.writer.save(self.engine, progress=Progress(step=step))

    def saved(self) -> list[int]:
        return [checkpoint.step_of(path) for path in checkpoint.under_final_names(self.run_dir)]

    def everything(self) -> list[str]:
        return sorted(path.name for path in (self.run_dir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def engine(groups: ParallelGroups) -> NativeEngine:
    return engine_of(groups, "--optimizer.ema_decay=0.9")


@pytest.fixture
def gate(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that writers wait for before they write."""
    path, write = tmp_path_factory.mktemp("gate") / "open", saving._Save._write

    def write_when_open(save: saving._Save) -> saving._Written:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return write(save)

    monkeypatch.setattr(saving._Save, "_write", write_when_open)
    return path


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """The kernel refuses to write more, with EFBIG: as near to a full disk as any process may come."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(at: Path, *, size: str) -> Iterator[None]:
    """A file system of this size."""
    at.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)], capture_output=True, check=False
    ).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


# --- in the background ----------------------------------------------------------------------------------------------------------


def test_a_background_save_holds_the_state_of_its_moment(
    tmp_path: Path, groups: ParallelGroups, coarse_tokenizer: Tokenizer
) -> None:
    engine = engine_of(groups)
    run = Run(tmp_path, engine=engine, groups=groups, async_save=True)
    before = weights(engine)
    run.save(1)
    engine.train_step([Documents(coarse_tokenizer).mixed_batch()], learning_rate=0.1)
    run.writer.close()

    (path,) = checkpoint.under_final_names(tmp_path)
    assert manifest.problems(path) == []
    loaded = engine_of(groups)
    checkpoint.load_weights(loaded, path)
    after = weights(loaded)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not torch.equal(weights(engine)["post_projector.0.weight"], before["post_projector.0.weight"])


def test_nothing_is_seen_under_its_name_before_it_is_polled(tmp_path: Path, engine: NativeEngine, groups: ParallelGroups) -> None:
    run = Run(tmp_path, engine=engine, groups=groups, async_save=True)
    run.save(1)
    assert run.saved() == []
    deadline = time.monotonic() + 60
    while not run.saved() and time.monotonic() < deadline:
        time.sleep(0.01)
        run.writer.poll()
    assert run.everything() == ["step_00000001"]


@pytest.mark.parametrize("most", [1, 2])
def test_saves_in_flight_are_bounded(most: int, tmp_path: Path, engine: NativeEngine, groups: ParallelGroups) -> None:
    run = Run(tmp_path, engine=engine, groups=groups, async_save=True, max_in_flight=most)
    for step in range(1, 5):
        run.save(step)
        partial = [name for name in run.everything() if name.endswith(".partial")]
        assert len(partial) == min(step, most)
        assert run.saved() == list(range(1, step - len(partial) + 1))
    run.writer.close()
    assert run.everything() == [f"step_{step:08d}" for step in range(1, 5)]


# --- failures -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("async_save", [False, True])
def test_a_failed_save_is_said_and_leaves_the_one_before(
    async_save: bool, tmp_path: Path, engine: NativeEngine, groups: ParallelGroups
) -> None:
    run = Run(tmp_path, engine=engine, groups=groups, async_save=async_save)
    run.save(1)
    while not run.saved():
        run.writer.poll()
    with files_no_longer_than(100_000):
        run.save(2)
        run.save(3)  # by now 2 is known to have failed
    assert "the checkpoint of step 2 could not be saved: [Errno 27] File too large (rank 0); training goes on" in run.said[0]
    if async_save:
        with pytest.raises(SaveError, match="the checkpoint of step 3 could not be saved"):
            run.writer.close()
    assert run.everything() == ["step_00000001"]
    assert manifest.problems(checkpoint.directory(tmp_path, step=1)) == []


def test_the_run_may_be_told_to_stop(tmp_path: Path, engine: NativeEngine, groups: ParallelGroups) -> None:
    run = Run(tmp_path, engine=engine, groups=groups, on_failure="stop")
    with files_no_longer_than(100_000), pytest.raises(SaveError, match="step 1 could not be saved"):
        run.save(1)


def test_a_later_save_that_works_makes_up_for_it(tmp_path: Path, engine: NativeEngine, groups: ParallelGroups) -> None:
    run = Run(tmp_path, engine=engine, groups=groups)
    with files_no_longer_than(100_000):
        run.save(1)
    run.save(2)
    run.writer.close()
    assert run.saved() == [2]


def test_a_background_writer_that_dies_is_reported(
    gate: Path, tmp_path: Path, engine: NativeEngine, groups: ParallelGroups
) -> None:
    run = Run(tmp_path, engine=engine, groups=groups, async_save=True)
    run.save(1)
    process = run.writer._under_way[0]._process
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(SaveError, match=r"the writing process ended with exit status -9 \(rank 0\)"):
        run.writer.close()
    assert run.everything() == []


def test_a_background_writer_that_dies_while_it_answers_is_reported(
    tmp_path: Path, engine: NativeEngine, groups: ParallelGroups
) -> None:
    save = Run(tmp_path, engine=engine, groups=groups).writer._prepare(engine, Progress(step=1))
    save._receiver, sender = multiprocessing.Pipe(duplex=False)
    os.write(sender.fileno(), struct.pack("!i", 100) + b"a part")  # of an answer of 100 bytes
    sender.close()
    save._process = multiprocessing.get_context("fork").Process(target=os._exit, args=(3,))
    save._process.start()
    assert save.outcome() == "the writing process ended with exit status 3"


def test_signals_that_stop_training_do_not_stop_a_save(
    gate: Path, tmp_path: Path, engine: NativeEngine, groups: ParallelGroups
) -> None:
    run = Run(tmp_path, engine=engine, groups=groups, async_save=True)
    run.save(1)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(run.writer._under_way[0]._process.pid, number)
    gate.touch()
    run.writer.close()
    assert run.saved() == [1]


def test_a_background_writer_keeps_no_connection_of_the_training_process(
    gate: Path, tmp_path: Path, engine: NativeEngine, groups: ParallelGroups
) -> None:
    """If that is killed, the other ranks learn of it when the connection ends."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(20)
    run = Run(tmp_path, engine=engine, groups=groups, async_save=True)
    run.save(1)
    ours.close()
    assert theirs.recv(1) == b""
    assert not run.writer._under_way[0].is_written()
    theirs.close()
    gate.touch()
    run.writer.close()
    assert run.saved() == [1]


@pytest.mark.parametrize("size", ["1m", "2m"])
def test_a_full_disk(size: str, tmp_path: Path, engine: NativeEngine, groups: ParallelGroups) -> None:
    """Seen before anything is written (1 MB) or while writing (2 MB). Either way room is made again."""
    disk = tmp_path / "disk"
    with small_disk(disk, size=size):
        run = Run(disk, engine=engine, groups=groups)
        run.save(1)
        expected = "GB left" if size == "1m" else "No space left on device"
        assert expected in run.said[0]
        assert run.everything() == []


def test_a_read_only_disk(tmp_path: Path, engine: NativeEngine, groups: ParallelGroups) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, size="20m"):
        run = Run(disk, engine=engine, groups=groups)
        run.save(1)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        run.save(2)
        assert "the checkpoint of step 2 could not be saved: [Errno 30] Read-only file system" in run.said[0]
        assert checkpoint.newest_good(disk, groups=groups, set_aside=True) == checkpoint.directory(disk, step=1)
        (wrong,) = run.said
        assert "the checkpoints before are untouched" in wrong


def test_a_damaged_one_in_the_way_is_put_aside(tmp_path: Path, engine: NativeEngine, groups: ParallelGroups) -> None:
    run = Run(tmp_path, engine=engine, groups=groups)
    run.save(1)
    (checkpoint.directory(tmp_path, step=1) / "common.pt").unlink()
    run.save(1)
    assert run.everything() == ["step_00000001", "step_00000001.damaged"]
    assert manifest.problems(checkpoint.directory(tmp_path, step=1)) == []


def test_a_kill_while_one_replaces_another_loses_neither_name_nor_content(
    tmp_path: Path, engine: NativeEngine, groups: ParallelGroups
) -> None:
    run = Run(tmp_path, engine=engine, groups=groups)
    run.save(1)
    path = checkpoint.directory(tmp_path, step=1)
    path.rename(checkpoint.replaced(path))  # as far as it had come
    assert checkpoint.newest_good(tmp_path, groups=groups, set_aside=True) == path
    assert run.everything() == ["step_00000001"]


def test_what_a_rank_wrote_elsewhere_is_missed_before_it_is_published(
    tmp_path: Path, engine: NativeEngine, groups: ParallelGroups
) -> None:
    """As on a machine without the mount, where the path is a local directory."""
    run = Run(tmp_path, engine=engine, groups=groups)
    save = run.writer._prepare(engine, Progress(step=1))
    save.start(background=False)
    of_rank_0 = save.outcome()
    assert isinstance(of_rank_0, _Written)
    of_rank_1 = _Written(results=[], files={"__1_0.distcp": {"bytes": 10, "sha256": "0" * 64}})
    final = checkpoint.directory(tmp_path, step=1)
    with pytest.raises(OSError, match=r"__1_0\.distcp was written, but not where rank 0 looks"):
        save.publish([of_rank_0, of_rank_1], final=final)
    assert run.saved() == []
    save.publish([of_rank_0], final=final)
    assert run.saved() == [1]


# --- old ones -------------------------------------------------------------------------------------------------------------------


def test_old_ones_are_deleted_but_for_the_last_and_every_so_manieth(
    tmp_path: Path, engine: NativeEngine, groups: ParallelGroups
) -> None:
    run = Run(tmp_path, engine=engine, groups=groups, keep_last=2, keep_every=4)
    for step in range(1, 8):
        run.save(step)
        run.writer._deleter.submit(lambda: None).result()  # what was handed in before is done by then
    run.writer.close()
    assert run.everything() == ["step_00000004", "step_00000006", "step_00000007"]


def test_nothing_is_deleted_for_the_sake_of_a_damaged_one(tmp_path: Path, engine: NativeEngine, groups: ParallelGroups) -> None:
    run = Run(tmp_path, engine=engine, groups=groups)
    for step in (1, 2, 3):
        run.save(step)
    newest = checkpoint.directory(tmp_path, step=3)
    (newest / "__0_1.distcp").unlink()
    with pytest.raises(ValueError, match=r"step_00000003 is not as it was written \(__0_1\.distcp is missing\)"):
        delete_old(tmp_path, newest=newest, keep_last=1, keep_every=0)
    assert run.saved() == [1, 2, 3]


def test_later_steps_of_an_earlier_course_are_not_counted(tmp_path: Path, engine: NativeEngine, groups: ParallelGroups) -> None:
    run = Run(tmp_path, engine=engine, groups=groups)
    for step in (1, 2, 8, 9):
        run.save(step)
    delete_old(tmp_path, newest=checkpoint.directory(tmp_path, step=2), keep_last=1, keep_every=0)
    assert run.saved() == [2, 8, 9]


def test_what_a_killed_run_left_unfinished_is_cleared_away(tmp_path: Path, engine: NativeEngine, groups: ParallelGroups) -> None:
    for name in (".step_00000004.0123abcd.partial", ".step_00000001.deleted"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    run = Run(tmp_path, engine=engine, groups=groups)
    assert run.everything() == []


def test_a_step_may_be_saved_again(tmp_path: Path, engine: NativeEngine, groups: ParallelGroups) -> None:
    run = Run(tmp_path, engine=engine, groups=groups)
    for _ in range(2):
        run.save(1)
    assert run.everything() == ["step_00000001"]
    assert manifest.problems(checkpoint.directory(tmp_path, step=1)) == []
