"""Runs groups of `pretrain_mmar.py` with faults built in, each rank forked from one process that has imported it.

Arguments: a directory, JSON [{name: {"options": [...], "faults": [[rank, step, kind, argument], ...]}, ...}, ...]. Groups of one
round, a dictionary, run side by side. Ranks meet as under any launcher but torchrun: nobody ends the others when one dies. What
rank 1 of the group called `name` writes goes to name.1.out and name.1.err in the directory; printed is JSON {name: [exit status
of each rank]}. Faults come with the data of their step:

    poison     one image is not a number
    swell      images are `argument` times as bright
    slow       loading takes `argument` seconds longer
    slow_pass  so does each forward pass
    seize      for `argument` seconds no other thread of the process can run
    bad_data   the data cannot be read
    kill       the signal `argument`, to this process
    kill_all   the same to its loader's and checkpoint's processes too, as terminals and torchrun send it
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.utils.tensorboard  # noqa: F401  imported late by what writes metrics, and for seconds
from torch import nn

from mmar_megatron.chaos.life import environments
from mmar_megatron.data.batch import Batch
from mmar_megatron.data.index import BadDataError
from mmar_megatron.data.loader import TrainLoader
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.training import building, watchdog
from tests.integration.forked import run

RANKS = 2
Fault = tuple[int, int, str, float]


def inject(faults: list[Fault], *, rank: int) -> None:
    """Build these faults into this process."""
    seconds_in_pass = 0.0

    class FaultyLoader(TrainLoader):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.first_step = options["state"].documents // options["global_batch_size"]  # no sample of these is bad
            self.in_a_step = options["global_batch_size"] // options["micro_batch_size"] // options["data_parallel_size"]

        def __iter__(self) -> Generator[Batch, None, None]:
            with closing(super().__iter__()) as batches:
                for number, batch in enumerate(batches):
                    step = self.first_step + number // self.in_a_step + 1
                    for of_rank, at_step, kind, argument in faults:
                        if (of_rank, at_step) == (rank, step) and number % self.in_a_step == 0:
                            batch = strike(batch, kind, argument)
                    yield batch

    def strike(batch: Batch, kind: str, argument: float) -> Batch:
        nonlocal seconds_in_pass
        seconds_in_pass = argument if kind == "slow_pass" else 0.0
        if kind == "slow":
            time.sleep(argument)
        elif kind == "seize":
            ctypes.PyDLL(None).usleep(int(argument * 1e6))
        elif kind == "bad_data":
            raise BadDataError("nothing can be read")
        elif kind == "kill":
            os.kill(os.getpid(), int(argument))
        elif kind == "kill_all":
            subprocess.run(["kill", f"-{argument:.0f}", "--", f"-{os.getpgrp()}"], check=False)  # which ends itself, too
        factor = {"poison": float("nan"), "swell": argument}.get(kind, 1.0)
        return replace(batch, latents_MNC=batch.latents_MNC * factor)

    forward = MMARModel.forward

    def slow_forward(self: nn.Module, *args: Any, **options: Any) -> Any:
        time.sleep(seconds_in_pass)
        return forward(self, *args, **options)  # type: ignore[arg-type]

    MMARModel.forward = slow_forward  # type: ignore[method-assign]
    building.TrainLoader = FaultyLoader  # type: ignore[misc]
    watchdog._MARGIN_S = 7.0  # not for those that wait for an end of a test


def start(rank: int, *, environment: dict[str, str], written: Path, options: list[str], faults: list[Fault]) -> int:
    """Fork a rank. Returns its process id."""
    child = os.fork()
    if child == 0:
        os.setsid()
        for descriptor, suffix in ((1, "out"), (2, "err")):
            os.dup2(os.open(written.with_name(f"{written.name}.{rank}.{suffix}"), os.O_WRONLY | os.O_CREAT), descriptor)
        os.environ |= environment
        inject(faults, rank=rank)
        sys.exit(run(options))
    return child


def run_round(groups: dict[str, Any], directory: Path) -> dict[str, list[int]]:
    """How each rank of these groups ended; nothing of them is left."""
    endings, ranks = {name: [0] * RANKS for name in groups}, {}
    for name, group in groups.items():
        for rank, environment in enumerate(environments(RANKS)):
            ranks[start(rank, environment=environment, written=directory / name, **group)] = (name, rank)
    while ranks:
        child, status = os.wait()
        if child not in ranks:
            continue
        name, rank = ranks.pop(child)
        endings[name][rank] = os.waitstatus_to_exitcode(status)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # helpers of a rank that could not end them
    return endings


def main() -> None:
    """Round after round."""
    ended: dict[str, Any] = {}
    for groups in json.loads(sys.argv[2]):
        ended |= run_round(groups, Path(sys.argv[1]))
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
