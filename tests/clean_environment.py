"""A virtual environment with torch, transformers, what these require, and nothing else; what asks for the network is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NO_NETWORK = '''\
"""Refuses the network, and keeps a list of who asked."""

import socket

attempts = []


def refuse(*address, **_):
    attempts.append(repr(address))
    raise OSError(f"there is no network here, but {address} was asked for")


socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
'''


def required(*names: str) -> list[Distribution]:
    """These distributions of the running environment, and all that they require where no extras are asked for."""
    found: dict[str, Distribution] = {}
    open_names = [*names]
    while open_names:
        name = canonicalize_name(open_names.pop())
        if name in found:
            continue
        found[name] = distribution(name)
        for requirement in map(Requirement, found[name].requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                open_names.append(requirement.name)
    return [*found.values()]


def make_environment(directory: Path) -> Path:
    """Makes it, of links into the running environment; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    for one in required("torch", "transformers"):
        for top in {file.parts[0] for file in one.files or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(one.locate_file(top))).resolve())
    # By a .pth file, since a sitecustomize of the system would come first.
    (packages / "no_network.py").write_text(NO_NETWORK)
    (packages / "no_network.pth").write_text("import no_network\n")
    return directory / "bin" / "python"


def run_in(python: Path, script: Path, *arguments: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script with nothing of this process's environment; `home` is where it may keep things."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_MODULES_CACHE": str(home / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    command = [str(python), "-I", str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=240, check=False)
