"""What one rank sees of its machine."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mmar_megatron import platform

_OPTIONAL = ("deepspeed", "transformer_engine")
_SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of one rank; what is of its machine as a whole is the same for all ranks there."""

    node: int
    host: str
    local_rank: int
    processes: int
    """Of this job on the machine."""
    versions: dict[str, str]
    """Of what must be the same everywhere."""
    driver: str | None
    """Of the GPUs, where there are any, whether or not torch can use them."""
    gpus: tuple[str, ...]
    """Names of those that torch can use."""
    gpu_used_bytes: int
    """On this rank's own, by others."""
    reorders_launches: bool
    """Whether that GPU lets kernels overtake each other (before Blackwell, unless CUDA_DEVICE_MAX_CONNECTIONS is 1)."""
    wrong_apex: str | None
    """What the installed package `apex` is, if it is not NVIDIA's."""
    open_files: int
    """That a process may have."""
    shared_memory_bytes: int
    sizes: dict[str, int | None]
    """Bytes of each file that the run reads (0: a directory); None: it is not there."""

    @property
    def place(self) -> str:
        """The machine, in words."""
        return f"node {self.node} ({self.host})"


def collect(paths: Sequence[str]) -> Facts:
    """The facts of this rank.

    Args:
        paths: files and directories that the run reads.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = platform.devices()
    usable = local_rank < len(gpus)
    free, total = platform.device_memory(local_rank) if usable else (0, 0)
    return Facts(
        node=int(os.environ.get("GROUP_RANK", 0)),
        host=socket.gethostname(),
        local_rank=local_rank,
        processes=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        versions=platform.versions() | platform.device_versions() | {name: _version(name) for name in _OPTIONAL},
        driver=_driver() if local_rank == 0 else None,
        gpus=gpus,
        gpu_used_bytes=total - free,
        reorders_launches=usable and platform.reorders_launches(local_rank),
        wrong_apex=wrong_apex(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shared_memory_bytes=shutil.disk_usage(_SHARED_MEMORY).total,
        sizes={path: _size(Path(path)) for path in paths},
    )


def wrong_apex() -> str | None:
    """Version and summary of an installed package `apex` that is not NVIDIA's; that one is built from source.

    megatron-core takes any package of this name for NVIDIA's and chooses its norms by it. The package index has another one.
    """
    try:
        found = metadata.metadata("apex")
    except metadata.PackageNotFoundError:
        return None
    summary = found["Summary"] or "no summary"
    return None if "NVIDIA" in summary else f"{found['Version']}, {summary}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if not path.is_dir() else 0
    except OSError:
        return None
