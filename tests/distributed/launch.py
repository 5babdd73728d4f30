"""Starts real groups of processes with torchrun, on this machine, and leaves none behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_TAG = "MMAR_TEST_GROUP"
_TAIL_LINES = 30


class GroupFailed(AssertionError):
    """The group exited with an error or ran out of time; the message has the end of what each rank wrote."""


def run_group(target: Path | str, *args: str, nproc: int, timeout: float = 120.0) -> str:
    """Runs a script (`x.py`) or module (`a.b`) in `nproc` processes under torchrun, from the repository's root.

    The processes meet on the loopback device at a port that is free, and compute with one thread each.

    Returns:
        What the ranks wrote to standard output, one rank after the other.

    Raises:
        GroupFailed: the exit status was not 0, or `timeout` seconds passed. Either way no process of the group is left.
    """
    program = [str(target)] if str(target).endswith(".py") else ["-m", str(target)]
    name, tag = _TAG, uuid.uuid4().hex
    environment = os.environ | {name: tag, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        # Each rank writes its own files: in a common one lines interleave, and a pipe stays open as long as any child does.
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1"]
        command += ["--redirects=3", f"--log_dir={folder}", f"--nproc_per_node={nproc}", *program, *args]
        launcher_log = Path(folder) / "torchrun.log"
        with launcher_log.open("w") as log:
            torchrun = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True)
            try:
                status = torchrun.wait(timeout)
                failure = f"exit status {status}" if status else None
            except subprocess.TimeoutExpired:
                failure = f"no end after {timeout:g} s"
            finally:
                end_processes(f"{name}={tag}")
                torchrun.wait()
        ranks = sorted(Path(folder).glob("*/attempt_0/*"), key=lambda path: int(path.name))
        if failure:
            logs = [launcher_log, *(rank / stream for rank in ranks for stream in ("stdout.log", "stderr.log"))]
            raise GroupFailed(f"{' '.join([*program, *args])} on {nproc} ranks: {failure}.\n" + "\n".join(map(_tail, logs)))
        return "".join((rank / "stdout.log").read_text() for rank in ranks)


def _tail(log: Path) -> str:
    lines = log.read_text().splitlines()[-_TAIL_LINES:]
    return (
        "\n".join([f"--- {log.parent.name}/{log.name}, its end:", *lines])
        if lines
        else f"--- {log.parent.name}/{log.name}: empty"
    )


def tagged_processes(tag: str) -> list[int]:
    """Ids of the living processes that were started with `tag` (NAME=VALUE) in their environment.

    torchrun puts each rank into a session of its own, and ranks start loader and checkpoint processes: neither process groups nor
    parents would find all of them once torchrun is gone, while the environment is inherited by every one.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if tag.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def end_processes(tag: str) -> None:
    """Kills what carries the tag, until nothing does: a process may start another while it is being ended."""
    while processes := tagged_processes(tag):
        for process in processes:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
