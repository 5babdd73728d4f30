"""A real browser for tests of pages: Chromium without a window, as an npm package ships it.

`@sparticuz/chromium` (MIT; Chromium itself BSD) brings the headless shell and the few libraries that a bare machine may lack:
70 MB, fetched once by `npm pack`, and 210 MB unpacked into .cache/. For x86-64; elsewhere an installed Chromium serves.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from mmar_megatron.data.npm import Package, fetch

PACKAGE = Package(
    name="@sparticuz/chromium",
    version="153.0.0",
    sha256="20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0",
)
CACHE = Path(__file__).resolve().parents[1] / ".cache"
VARIABLE = "MMAR_BROWSER"
"""Names another Chromium or Chrome."""
INSTALLED = ("chromium", "chromium-browser", "google-chrome", "chrome")
ADVICE = f"or get Debian's `apt-get install chromium`, or name a Chromium in {VARIABLE}"
_UNPACK_SECONDS = 250
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
        raise NoBrowserError(f"no browser: {error}, {ADVICE}") from error


def _pinned() -> Path:
    """The folder of the pinned browser, unpacked."""
    folder = CACHE / f"chromium-{PACKAGE.version}"
    if folder.is_dir():
        return folder
    if platform.machine() not in ("x86_64", "AMD64"):
        raise NoBrowserError(f"{PACKAGE.name} is for x86-64, this machine is {platform.machine()}: get another")
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".unfinished-") as temporary:
        unfinished = Path(temporary)
        try:
            package = fetch(PACKAGE, cache=unfinished)
        except ValueError as error:
            raise NoBrowserError(str(error)) from error
        with tarfile.open(package) as tar:
            tar.extractall(unfinished, filter="data")
        ready = unfinished / "ready"
        ready.mkdir()
        packed = unfinished / "package" / "bin"
        _unpack(packed / "chromium.br", ready / "chromium")
        for name in ("al2023", "swiftshader"):  # libraries of the system, and graphics without a GPU: it hangs without
            unpacked = unfinished / f"{name}.tar"
            _unpack(packed / f"{name}.tar.br", unpacked)
            with tarfile.open(unpacked) as tar:
                tar.extractall(ready, filter="data")
        (ready / "chromium").chmod(0o755)
        try:
            ready.rename(folder)
        except OSError:  # another process was faster
            assert folder.is_dir()
    return folder


def _unpack(brotli: Path, to: Path) -> None:
    command = ["node", "-e", _UNPACK, str(brotli), str(to)]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=_UNPACK_SECONDS, check=True)
    except FileNotFoundError as error:
        raise NoBrowserError("node, which unpacks the pinned one, is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise NoBrowserError(f"{brotli.name} was not unpacked within {_UNPACK_SECONDS} s") from error
    except subprocess.CalledProcessError as error:
        raise NoBrowserError(f"{brotli.name} could not be unpacked ({' '.join(error.stderr.split())[-300:]})") from error
