"""Writing checkpoints: all of one or nothing, in the background if wanted, and deleting old ones.

A save has three parts. All ranks *prepare* it together: the state is gathered and copied to the host, and they agree who writes
what. Then each rank *writes* its files, alone and, under `async_save`, in a forked process. When all are done they *publish* it
together: rank 0 writes the index of tensors and the manifest, flushes, and renames the directory. So whatever fails, and wherever
a process is killed, there is all of a checkpoint under its name or nothing; and a failure is known to all ranks alike.

megatron-core's own `dist_checkpointing.save` is not used, for three faults: where rank 0 cannot write (`common.pt`, `.metadata`),
the other ranks wait for it for ever; each rank starts a manager process that imports the main program anew and outlives it; and
a background writer that dies is found out by no more than an assertion. Its plan, its writer and its format are.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import secrets
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from mmar_megatron import platform
from mmar_megatron.config import CheckpointConfig, EngineName
from mmar_megatron.engine.base import Engine
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.training import checkpoint, manifest
from mmar_megatron.training.checkpoint import CONFIG, Progress
from mmar_megatron.training.manifest import FileRecord
from mmar_megatron.training.signals import sheltered

BACKEND, BACKEND_VERSION = "torch_dist", 1
_STANDARD_STREAMS = (0, 1, 2)


class SaveError(Exception):
    """A checkpoint could not be saved."""


class CheckpointWriter:
    """Saves the checkpoints of a run. All ranks call each method together.

    Args:
        config: the section of checkpoints.
        run_dir: where they go.
        config_yaml: the run's configuration, which is kept with each.
        groups: process groups.
        say: is told what a person should know; it decides which rank prints.
    """

    def __init__(
        self, config: CheckpointConfig, *, run_dir: Path, config_yaml: str, groups: ParallelGroups, say: Callable[[str], None]
    ) -> None:
        self._config, self._run_dir, self._config_yaml, self._groups, self._say = config, run_dir, config_yaml, groups, say
        self._publishes = torch.distributed.get_rank() == 0
        self._under_way: deque[_Save] = deque()
        self._failure: str | None = None
        self._deletions: deque[Future[None]] = deque()
        self._deleter = ThreadPoolExecutor(max_workers=1)
        if self._publishes:
            checkpoint.restore_replaced(run_dir)
            for leftover in Path(run_dir, "checkpoints").glob(".step_*"):  # of a life of the run that was cut short
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, engine: Engine, *, progress: Progress) -> None:
        """Save; under `async_save` return as soon as the state is on the host, and let `poll` publish it.

        Raises:
            SaveError: it failed, and `checkpoint.on_failure` is `stop`. Otherwise that is only said.
        """
        while len(self._under_way) >= self._config.max_in_flight:
            self._publish(self._under_way.popleft())
        try:
            save = self._prepare(engine, progress)
        except OSError as error:
            self._has_failed(progress, error)
            return
        save.start(background=self._config.async_save)
        self._under_way.append(save)
        if not self._config.async_save:
            self._publish(self._under_way.popleft())

    def poll(self) -> None:
        """Publish what has been written meanwhile; to be called between steps. Raises as `save` does."""
        while self._under_way and self._is_written(self._under_way[0]):
            self._publish(self._under_way.popleft())
        while self._deletions and self._deletions[0].done():
            self._report_deletion()

    def flush(self) -> None:
        """Wait for all that is under way. Raises as `save` does."""
        while self._under_way:
            self._publish(self._under_way.popleft())

    def close(self) -> None:
        """End: wait for all that is under way, deletions too.

        Raises:
            SaveError: the last checkpoint could not be saved, so what was learned since the one before would be lost.
        """
        self.flush()
        self._deleter.shutdown(wait=True)
        while self._deletions:
            self._report_deletion()
        if self._failure is not None:
            raise SaveError(self._failure)

    def _prepare(self, engine: Engine, progress: Progress) -> _Save:
        """Raises OSError, on all ranks alike, where the directory cannot be made or is on a disk that is too full."""
        partial = self._make_partial(progress)
        with engine.evaluating():  # parameters may still be on their way from the ranks that updated them
            state = {**engine.sharded_state_dict(), "progress": asdict(progress), **checkpoint.generators(self._groups)}
            sharded, common = save_preprocess(state)
            writer, index = _Planner(BACKEND, BACKEND_VERSION).async_save(sharded, partial)
            writer.write_buckets = writer.preload_tensors(writer.write_buckets, True)
        self._check_space(partial, writer)
        layout, average = self._groups.layout(), engine.has_average
        facts = facts_of(progress, engine=engine.name, layout=layout, average=average, config_yaml=self._config_yaml)
        small = {COMMON_STATE_FNAME: common, CONFIG: self._config_yaml} if self._publishes else {}
        return _Save(progress=progress, partial=partial, writer=writer, index=index, small=small, facts=facts)

    def _make_partial(self, progress: Progress) -> Path:
        # A name of its own: a writer that has outlived a killed run may still be busy with an earlier one for this step.
        name = [f".step_{progress.step:08d}.{secrets.token_hex(4)}.partial"]
        torch.distributed.broadcast_object_list(name, group=self._groups.control)
        partial = Path(self._run_dir, "checkpoints", name[0])
        with self._groups.fail_together():
            if self._publishes:
                partial.mkdir(parents=True)
        return partial

    def _check_space(self, partial: Path, writer: FileSystemWriterAsync) -> None:
        mine = sum(tensor.nbytes for _, _, (_, tensors) in writer.write_buckets for _, tensor in tensors)
        needed: list[int] = [0] * self._groups.world_size
        torch.distributed.all_gather_object(needed, mine, group=self._groups.control)
        try:
            with self._groups.fail_together():
                if self._publishes and (free := shutil.disk_usage(partial).free) < sum(needed):
                    raise OSError(f"it takes {sum(needed) / 1e9:,.2f} GB, and {partial.parent} has {free / 1e9:,.2f} GB left")
        except OSError:
            self._discard(partial)
            raise

    def _is_written(self, save: _Save) -> bool:
        written = torch.tensor(int(save.is_written()))
        torch.distributed.all_reduce(written, op=torch.distributed.ReduceOp.MIN, group=self._groups.control)
        return bool(written)

    def _publish(self, save: _Save) -> None:
        outcomes: list[_Written | str] | None = [""] * self._groups.world_size if self._publishes else None
        torch.distributed.gather_object(save.outcome(), outcomes, group=self._groups.control)
        final = checkpoint.directory(self._run_dir, step=save.progress.step)
        try:
            with self._groups.fail_together():
                if outcomes is not None:
                    save.publish(outcomes, final=final)
        except OSError as error:
            self._discard(save.partial)
            self._has_failed(save.progress, error)
            return
        self._failure = None
        if self._publishes and self._config.keep_last:
            keep = {"keep_last": self._config.keep_last, "keep_every": self._config.keep_every}
            self._deletions.append(self._deleter.submit(delete_old, self._run_dir, newest=final, **keep))

    def _discard(self, partial: Path) -> None:
        if self._publishes:
            shutil.rmtree(partial, ignore_errors=True)

    def _has_failed(self, progress: Progress, error: OSError) -> None:
        self._failure = f"the checkpoint of step {progress.step} could not be saved: {error}"
        if self._config.on_failure == "stop":
            raise SaveError(self._failure)
        self._say(f"{self._failure}; training goes on, and the checkpoints before are untouched")

    def _report_deletion(self) -> None:
        if error := self._deletions.popleft().exception():
            print(f"no old checkpoint was deleted: {error}", flush=True)  # known to this rank alone


def facts_of(
    progress: Progress, *, engine: EngineName, layout: dict[str, int], average: bool, config_yaml: str
) -> dict[str, Any]:
    """What a checkpoint's manifest says beside its files.

    Args:
        engine: whose optimizer's state it holds.
        layout: `ParallelGroups.layout` of what writes it.
        average: whether it holds a moving average of the weights.
        config_yaml: its configuration.
    """
    return {
        **asdict(progress),
        "engine": engine,
        "layout": layout,
        "average": average,
        "config_sha256": manifest.digest_of_text(config_yaml),
        "versions": platform.versions(),
    }


def write_small(directory: Path, small: dict[str, Any]) -> list[str]:
    """Write what stands beside the tensors: texts, and objects, by file name; with megatron-core's note of the format.

    Returns:
        The names of all these files.
    """
    for name, content in small.items():
        if isinstance(content, str):
            (directory / name).write_text(content)
        else:
            torch.save(content, directory / name)
    save_config(CheckpointingConfig(BACKEND, BACKEND_VERSION), str(directory))
    return [*small, CONFIG_FNAME]


def reason_of(error: BaseException) -> str:
    """torch's zip writer, closing a file that could not be written, buries the system's error under one of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return str(cause or error) or type(error).__name__


def delete_old(run_dir: Path, *, newest: Path, keep_last: int, keep_every: int) -> None:
    """Delete checkpoints that newer ones have made superfluous.

    Args:
        run_dir: the run's directory.
        newest: was saved just now. Nothing is deleted before it has been read back whole.
        keep_last: so many of the newest stay.
        keep_every: and those whose step is a multiple of this; 0: none.

    Raises:
        ValueError: `newest` is not as it was written.
    """
    old = [path for path in checkpoint.under_final_names(run_dir) if path <= newest][:-keep_last]
    superfluous = [path for path in old if not keep_every or checkpoint.step_of(path) % keep_every]
    if superfluous and (wrong := manifest.problems(newest)):
        raise ValueError(f"{newest} is not as it was written ({wrong[0]})")
    for path in superfluous:
        doomed = path.with_name(f".{path.name}.deleted")  # half of a checkpoint must not stand under its name
        path.rename(doomed)
        shutil.rmtree(doomed)


class _Planner(TorchDistSaveShardedStrategy):
    """megatron-core's agreement on who writes what: `async_save` gives the rank's writer, and on rank 0 the index."""

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> tuple[FileSystemWriterAsync, Any]:
        # What is there already is not made: a manager process (see above). Nothing ever goes through this queue.
        filesystem_async._results_queue = filesystem_async._results_queue or queue.Queue()
        return super().async_save(sharded_state_dict, checkpoint_dir)

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, planned: Any) -> Any:
        return writer, planned[1]


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What a rank wrote."""

    results: list[Any]
    """Where each tensor lies, for torch's index."""
    files: dict[str, FileRecord]


@dataclass(kw_only=True)
class _Save:
    """One save under way, on this rank."""

    progress: Progress
    partial: Path
    writer: FileSystemWriterAsync
    index: Any
    """torch's index of all tensors; None but on rank 0."""
    small: dict[str, Any]
    """What rank 0 writes beside tensors, by file name."""
    facts: dict[str, Any]
    """For the manifest."""
    _outcome: _Written | str | None = None
    _process: Any = field(default=None, repr=False)
    _receiver: Connection | None = field(default=None, repr=False)

    def start(self, *, background: bool) -> None:
        """Write this rank's files: here and now, or in a process of its own."""
        if not background:
            self._outcome = self._attempt()
            return
        self._receiver, sender = multiprocessing.Pipe(duplex=False)
        # Forked, so that it has the state as it is at this moment, without a copy where pages stay as they are.
        self._process = multiprocessing.get_context("fork").Process(target=self._in_background, args=(sender,))
        with sheltered():
            self._process.start()
        sender.close()

    def is_written(self) -> bool:
        """Whether `outcome` would not wait."""
        return self._receiver is None or self._receiver.poll()

    def outcome(self) -> _Written | str:
        """What this rank wrote, or why it could not."""
        if self._receiver is not None:
            try:
                self._outcome = self._receiver.recv()
            except (EOFError, OSError):  # before its answer, or in the midst of it
                self._outcome = ""
            self._process.join()
            self._outcome = self._outcome or f"the writing process ended with exit status {self._process.exitcode}"
        assert self._outcome is not None
        return self._outcome

    def publish(self, outcomes: list[_Written | str], *, final: Path) -> None:
        """Make a checkpoint of what all ranks have written.

        Raises:
            OSError: a rank could not write, or did so elsewhere, or this one cannot.
        """
        if failures := [f"{what} (rank {rank})" for rank, what in enumerate(outcomes) if isinstance(what, str)]:
            raise OSError("; ".join(failures[:3]))
        written = [what for what in outcomes if isinstance(what, _Written)]
        files = {name: file for what in written for name, file in what.files.items()}
        for name, file in files.items():
            if not (self.partial / name).is_file() or (self.partial / name).stat().st_size != file["bytes"]:
                raise OSError(
                    f"{name} was written, but not where rank 0 looks: see that all machines have the same storage there"
                )
        self.writer.finish(self.index, [what.results for what in written])
        index = self.partial / ".metadata"
        files[index.name] = manifest.record(index)
        manifest.write(self.partial, files=files, facts=self.facts)
        if final.exists():  # an earlier course of the run came as far
            _make_way(final)
        self.partial.rename(final)
        manifest.flush(final.parent)
        shutil.rmtree(checkpoint.replaced(final), ignore_errors=True)

    def _in_background(self, sender: Connection) -> None:
        platform.die_with_parent()
        gc.disable()  # collecting what the training process holds would free GPU memory from here
        _close_files_but(sender.fileno())
        with suppress(BrokenPipeError):  # nobody waits for this any more
            sender.send(self._attempt())
        sender.close()

    def _attempt(self) -> _Written | str:
        try:
            return self._write()
        except Exception as error:  # of whatever kind: it must reach the other ranks
            return reason_of(error)

    def _write(self) -> _Written:
        names = write_small(self.partial, self.small) if self.small else []
        buckets = self.writer.write_buckets or []
        transforms = [self.writer.transforms] if hasattr(self.writer, "transforms") else []
        answers: queue.Queue[tuple[int, Any]] = queue.Queue()
        unfinished: queue.Queue[int] = queue.Queue()
        for number in range(len(buckets)):
            unfinished.put(number)

        def write_bucket(number: int) -> None:
            FileSystemWriterAsync.write_preloaded_data(transforms, number, buckets[number], answers, unfinished, use_fsync=True)

        with ThreadPoolExecutor() as threads:
            list(threads.map(write_bucket, range(len(buckets))))
        results = []
        for _, answer in sorted(answers.queue, key=itemgetter(0)):
            if isinstance(answer, Exception):
                raise answer
            results += answer
        names += [name for _, name, _ in buckets]
        return _Written(results=results, files={name: manifest.record(self.partial / name) for name in names})


def _make_way(final: Path) -> None:
    """Take a checkpoint's name away: from a good one until the new one has it, from a damaged one for good."""
    if manifest.problems(final):
        checkpoint.put_aside(final)
    else:
        final.rename(checkpoint.replaced(final))


def _close_files_but(needed: int) -> None:
    """Let go of what a fork has inherited, but for the standard streams.

    A connection ends when nobody holds it any more: while a writer held the sockets of a training process that was killed, the
    other ranks would not learn of its end, and its port could not be used again. Nor would the writer learn that nobody reads
    its answer, for it would hold that end of the pipe itself.
    """
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor not in (*_STANDARD_STREAMS, needed):
            with suppress(OSError):  # of the listing itself
                os.close(descriptor)
