"""Noting a signal, and who does not get it. How ranks stop together is in tests/integration/test_faults.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.platform import STOP_SIGNALS
from mmar_megatron.training.signals import StopRequest, sheltered


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_the_next_one_would_end_the_process(number: signal.Signals, groups: ParallelGroups) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with StopRequest(groups) as request:
        assert request.agreed() is None
        os.kill(os.getpid(), number)
        assert request.agreed() is number
        assert [signal.getsignal(each) for each in STOP_SIGNALS] == [signal.SIG_DFL] * 3
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_processes_started_in_shelter_outlive_the_signals(groups: ParallelGroups) -> None:
    program = [sys.executable, "-c", "print('here', flush=True); input()"]
    with sheltered():
        child = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    assert child.stdout is not None
    child.stdout.readline()
    for number in STOP_SIGNALS:
        child.send_signal(number)
    child.communicate(b"\n", timeout=20)
    assert child.returncode == 0
