"""Runs `pretrain_mmar.py` with one command line after the other, each in a process forked from one that has imported it.

Arguments: a directory, JSON {name: [options]}. What the command called `name` writes goes to name.out and name.err in the
directory; printed is JSON {name: exit code}. Starting Python and importing everything takes far longer than most of the commands.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch.utils.tensorboard  # noqa: F401  imported late by what writes metrics, and for seconds

import pretrain_mmar


def run(options: list[str]) -> int:
    """The exit code that Python would give the command."""
    try:
        pretrain_mmar.main(options)
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
            return 1
        return stopped.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """All commands."""
    directory, codes = Path(sys.argv[1]), {}
    for name, options in json.loads(sys.argv[2]).items():
        child = os.fork()
        if child == 0:
            for descriptor, suffix in ((1, "out"), (2, "err")):
                os.dup2(os.open(directory / f"{name}.{suffix}", os.O_WRONLY | os.O_CREAT), descriptor)
            sys.exit(run(options))  # the usual way out, which also ends the process that saving a checkpoint starts
        codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
