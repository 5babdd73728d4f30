"""A real browser for tests of pages: Chromium without a window, as an npm package ships it.

`@sparticuz/chromium` (MIT; Chromium itself BSD) brings the headless shell and the few libraries that a bare machine may lack:
70 MB, fetched once by `npm pack`, and 210 MB unpacked into .cache/. For x86-64; elsewhere an installed Chromium serves.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

NAME, VERSION = "@sparticuz/chromium", "153.0.0"
SHA256 = "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0"
CACHE = Path(__file__).resolve().parents[1] / ".cache"
VARIABLE = "MMAR_BROWSER"
"""Names another Chromium or Chrome."""
INSTALLED = ("chromium", "chromium-browser", "google-chrome", "chrome")
ADVICE = (
    f"install npm (`npm pack {NAME}@{VERSION}` brings a browser of 70 MB) or Debian's `apt-get install chromium`, "
    f"or name a Chromium in {VARIABLE}"
)
_FETCH_SECONDS = 250
_UNPACK = """
const fs = require("fs"), zlib = require("zlib"), [from, to] = process.argv.slice(1);
fs.writeFileSync(to, zlib.brotliDecompressSync(fs.readFileSync(from)));
"""  # npm comes with node, and Python has no brotli


class NoBrowserError(Exception):
    """There is none, and why."""


@dataclass(frozen=True, kw_only=True)
class Browser:
    """What to start, and how."""

    executable: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def options(self) -> list[str]:
        """For the command line: one process for graphics and the browser, and no chatter with its makers."""
        return ["--no-sandbox", "--no-zygote", "--in-process-gpu", "--disable-gpu", "--disable-background-networking"]


def find_browser() -> Browser:
    """The one that `MMAR_BROWSER` names, the pinned one, or an installed one.

    Raises:
        NoBrowserError: none is there, and none can be fetched.
    """
    if named := os.environ.get(VARIABLE):
        return Browser(executable=Path(named))
    try:
        folder = _pinned()
        libraries = os.pathsep.join(filter(None, [str(folder / "lib"), os.environ.get("LD_LIBRARY_PATH")]))
        return Browser(executable=folder / "chromium", environment={**os.environ, "LD_LIBRARY_PATH": libraries})
    except NoBrowserError as error:
        found = [path for name in INSTALLED if (path := shutil.which(name))]
        if found:
            return Browser(executable=Path(found[0]))
        raise NoBrowserError(f"no browser: {error}; {ADVICE}") from error


def _pinned() -> Path:
    """The folder of the pinned browser, unpacked."""
    folder = CACHE / f"chromium-{VERSION}"
    if folder.is_dir():
        return folder
    if platform.machine() not in ("x86_64", "AMD64"):
        raise NoBrowserError(f"{NAME} is for x86-64, this machine is {platform.machine()}")
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".unfinished-") as temporary:
        unfinished = Path(temporary)
        _run(["npm", "pack", f"{NAME}@{VERSION}", "--silent"], at=unfinished)
        (package,) = unfinished.glob("*.tgz")
        with package.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
                raise NoBrowserError(f"{NAME} {VERSION} from npm is not the pinned package (SHA-256 differs)")
        with tarfile.open(package) as tar:
            tar.extractall(unfinished, filter="data")
        ready = unfinished / "ready"
        ready.mkdir()
        packed = unfinished / "package" / "bin"
        _run(["node", "-e", _UNPACK, str(packed / "chromium.br"), str(ready / "chromium")], at=unfinished)
        for name in ("al2023", "swiftshader"):  # libraries of the system, and graphics without a GPU: it hangs without
            unpacked = unfinished / f"{name}.tar"
            _run(["node", "-e", _UNPACK, str(packed / f"{name}.tar.br"), str(unpacked)], at=unfinished)
            with tarfile.open(unpacked) as tar:
                tar.extractall(ready, filter="data")
        (ready / "chromium").chmod(0o755)
        try:
            ready.rename(folder)
        except OSError:  # another process was faster
            assert folder.is_dir()
    return folder


def _run(command: list[str], *, at: Path) -> None:
    try:
        result = subprocess.run(command, cwd=at, capture_output=True, text=True, timeout=_FETCH_SECONDS)
    except FileNotFoundError as error:
        raise NoBrowserError(f"{command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise NoBrowserError(f"`{' '.join(command[:3])}` did not end within {_FETCH_SECONDS} s") from error
    if result.returncode:
        reason = " ".join(result.stderr.split())[-300:] or f"exit code {result.returncode}"
        raise NoBrowserError(f"`{' '.join(command[:3])}` failed ({reason})")
