"""Runs a script and writes down which other machines it asked for.

python watched.py REPORT SCRIPT [ARGUMENT ...]
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


def main(report: Path) -> None:
    """Empty is the report of one that asked for none."""
    report.write_text("")

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo":
            host = arguments[0]
        elif event == "socket.connect" and isinstance(arguments[1], tuple):  # a text is a path on this machine
            host = arguments[1][0]
        else:
            return
        if host is not None and not str(host).startswith(LOOPBACK):
            with report.open("a") as file:
                file.write(f"{event} {host}\n")

    sys.addaudithook(hear)
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
