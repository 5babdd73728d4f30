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
def test_a_signal_is_noted_and_its_echo_does_no_harm(number: signal.Signals, groups: ParallelGroups) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with StopRequest(groups) as request:
        assert request.agreed() is None
        os.kill(os.getpid(), number)
        assert request.agreed() is number
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.agreed() is number
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_a_second_signal_ends_a_process_that_is_deep_in_a_library() -> None:
    """Where Python runs no handler, as in a collective that waits for a lost rank."""
    program = """
import hashlib, os, signal, threading, time
from types import SimpleNamespace
from mmar_megatron.training import signals
signals._ECHO_S = 0.2
def send():
    for _ in range(2):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGUSR1)
with signals.StopRequest(SimpleNamespace(control=None)):
    threading.Thread(target=send).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 500_000_000)  # minutes
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert ended.returncode == 128 + signal.SIGUSR1


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
