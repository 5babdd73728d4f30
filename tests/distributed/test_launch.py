"""The launcher of the distributed tests: groups that finish, hang and crash."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.distributed.launch import GroupFailed, run_group, tagged_processes

pytestmark = pytest.mark.distributed

# Each rank starts a child, as a data loader does, and says who they are.
PREAMBLE = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(os.path.join(sys.argv[1], os.environ["RANK"]), "w") as file:
    file.write(os.environ["MMAR_TEST_GROUP"] + f" {os.getpid()} {child.pid}")
while len(os.listdir(sys.argv[1])) < 2:
    time.sleep(0.01)
"""


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    path = tmp_path / "ranks"
    path.mkdir()
    return path


def script(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text(PREAMBLE + text)
    return path


def assert_nothing_left(ranks: Path) -> None:
    tag, *_ = (ranks / "0").read_text().split()
    processes = [int(word) for rank in ranks.iterdir() for word in rank.read_text().split()[1:]]
    assert len(processes) == 4, "two ranks with a child each must have run, or this test shows nothing"
    assert tagged_processes(f"MMAR_TEST_GROUP={tag}") == []
    assert not [process for process in processes if is_running(process)]


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_ranks_meet_and_their_output_comes_back(tmp_path: Path, ranks: Path) -> None:
    text = """
import torch
torch.distributed.init_process_group("gloo")
value = torch.tensor([torch.distributed.get_rank() + 1.0])
torch.distributed.all_reduce(value)
print(f"sum {value.item():g}", "arguments", sys.argv[2:], "threads", torch.get_num_threads())
torch.distributed.destroy_process_group()
"""
    output = run_group(script(tmp_path, text), str(ranks), "--flag", nproc=2, timeout=60)
    assert output == "sum 3 arguments ['--flag'] threads 1\n" * 2
    assert_nothing_left(ranks)


def test_timeout_leaves_no_process(tmp_path: Path, ranks: Path) -> None:
    # The signal that asks a process to end is ignored, as by a rank that hangs in a collective.
    text = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('before the hang'); time.sleep(600)"
    start = time.monotonic()
    with pytest.raises(GroupFailed, match=r"(?s)no end after 10 s.*before the hang"):
        run_group(script(tmp_path, text), str(ranks), nproc=2, timeout=10)
    assert time.monotonic() - start < 20
    assert_nothing_left(ranks)


def test_crash_of_one_rank_leaves_no_process(tmp_path: Path, ranks: Path) -> None:
    text = "\nif os.environ['RANK'] == '1': raise RuntimeError('rank one gave up')\ntime.sleep(600)"
    with pytest.raises(GroupFailed, match=r"(?s)exit status 1.*rank one gave up"):
        run_group(script(tmp_path, text), str(ranks), nproc=2, timeout=60)
    assert_nothing_left(ranks)
