"""Requests to a remote root, one process's: each is tried again with backoff, and what fails in the end is named.

`fsspec` knows the drivers. Of those for S3 and HTTP the answer's header is looked at too: it says which bytes of which version
of the object these are, so that an answer to another question, or of another version, is no more taken than one cut short.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec.asyn import sync
from fsspec.exceptions import FSTimeoutError

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_HOPELESS = (PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, TypeError, AttributeError, ImportError)
"""Whoever asks again gets the same answer. So it is without credentials, which the driver for S3 tells by an error of its own."""
_IDENTITIES = ("ETag", "etag", "md5Hash", "generation", "LastModified", "Last-Modified", "updated", "mtime", "created")
"""What drivers call that by which a version of an object is told from another; the first that is there counts."""
_MOST_CONNECTIONS = 64


class StorageError(OSError):
    """Bytes could not be had; the message names the file, the range and the last reason."""


class MissingError(StorageError):
    """There is no such file."""


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How long a request is tried again. The wait doubles each time, and is drawn from half to one and a half of that."""

    attempts: int = 6
    request_seconds: float = 60.0
    """One attempt takes at most so long."""
    total_seconds: float = 300.0
    """No attempt begins later than this after the first."""
    first_wait_seconds: float = 0.25
    longest_wait_seconds: float = 15.0


class ObjectInfo(NamedTuple):
    """A remote file."""

    size: int
    identity: str
    """Another one after any change, as far as the server tells."""


class Remote:
    """The files below a URL.

    Args:
        root: URL of the folder.
        retry: see there.

    Raises:
        ValueError: nothing installed can read such a URL.
    """

    def __init__(self, root: str, *, retry: Retry) -> None:
        self._root = root.rstrip("/")
        self._retry = retry
        self._random = random.Random()  # its own: the run's generators are not touched, and no two processes wait alike
        self._closed = Event()
        self._versions: dict[str, str | int] = {}
        protocol = check_driver(root)
        self._fs, path = fsspec.core.url_to_fs(self._root, **_options(protocol, retry))
        self._path = path.rstrip("/")
        self._kind = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}.get(protocol, "other")
        if self._kind == "s3":
            self._fs.retries = 1  # the driver's own attempts would be silent, and multiply ours

    def fetch(self, name: str, start: int, end: int) -> bytes:
        """The bytes [start, end) of a file.

        Raises:
            StorageError: see there.
        """
        path = f"{self._path}/{name}"

        def attempt() -> bytes:
            content, version = self._range(path, start, end)
            if len(content) != end - start:
                raise OSError(f"{len(content):,} bytes came instead of {end - start:,}")
            if version is not None and version != self._versions.setdefault(name, version):
                raise OSError("the file has changed since it was first read")
            return content

        return self._tried(f"{self.shown(name)}, bytes {start} to {end}", attempt)

    def info(self, name: str) -> ObjectInfo | None:
        """None: there is no such file.

        Raises:
            StorageError: it cannot be told.
        """

        def attempt() -> ObjectInfo:
            info = self._call("info", f"{self._path}/{name}")
            if info["type"] == "directory":
                raise FileNotFoundError(name)
            if info["size"] is None:
                raise OSError("the server does not tell the size")
            identity = next((str(info[key]) for key in _IDENTITIES if info.get(key)), "")
            return ObjectInfo(int(info["size"]), identity)

        try:
            found = self._tried(self.shown(name), attempt)
        except MissingError:
            return None
        if self._kind != "other":
            self._versions.setdefault(name, found.identity if self._kind == "s3" else found.size)
        return found

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """In bytes; None where there is no such file. One listing a folder where there is such a thing.

        Raises:
            StorageError: it cannot be told.
        """
        folders: dict[str, list[str]] = {}
        for name in names:
            folders.setdefault(name.rpartition("/")[0], []).append(name)
        sizes: dict[str, int | None] = {}
        for folder, members in folders.items():
            listed = self._listing(folder) if len(members) > 1 and self._kind != "http" else None
            if listed is not None:
                sizes |= {name: listed.get(name.rpartition("/")[2]) for name in members}
            else:
                with ThreadPoolExecutor(8) as pool:
                    infos = list(pool.map(self.info, members))
                sizes |= {name: info.size if info else None for name, info in zip(members, infos, strict=True)}
        return sizes

    def shown(self, name: str = "") -> str:
        """The URL without a password that it may hold."""
        return re.sub(r"//[^/@]*@", "//", f"{self._root}/{name}" if name else self._root)

    def close(self) -> None:
        """Whoever waits for another attempt stops waiting, with an error."""
        self._closed.set()

    def _listing(self, folder: str) -> dict[str, int] | None:
        """Name within the folder -> size; None where listing is forbidden."""

        def attempt() -> dict[str, int] | None:
            try:
                entries = self._call("ls", f"{self._path}/{folder}".rstrip("/"), detail=True)
            except FileNotFoundError:
                return {}
            except PermissionError:
                return None  # reading may be allowed all the same
            return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in entries if entry["type"] == "file"}

        return self._tried(f"the listing of {self.shown(folder)}", attempt)

    def _tried(self, what: str, attempt: Callable[[], _T]) -> _T:
        retry, began, wait = self._retry, time.monotonic(), self._retry.first_wait_seconds
        tried = 1
        while True:
            try:
                return attempt()
            except FileNotFoundError as error:
                raise MissingError(f"{what}: there is no such file") from error
            except Exception as error:
                if isinstance(error, _HOPELESS) or type(error).__name__ == "NoCredentialsError":
                    raise StorageError(f"{what}: {_reason(error)}") from error
                pause = min(wait, retry.longest_wait_seconds) * self._random.uniform(0.5, 1.5)
                passed = time.monotonic() - began
                if tried >= retry.attempts or passed + pause > retry.total_seconds or self._closed.is_set():
                    raise StorageError(
                        f"{what}: {tried} attempts in {passed:.0f} s failed, the last: {_reason(error)}"
                    ) from error
                _LOG.warning("%s: %s; attempt %d follows in %.1f s", what, _reason(error), tried + 1, pause)
            self._closed.wait(pause)
            wait *= 2
            tried += 1

    def _range(self, path: str, start: int, end: int) -> tuple[bytes, str | int | None]:
        """One attempt: the bytes, and by what a change of the file would be seen."""
        seconds = self._retry.request_seconds
        if self._kind == "s3":
            return sync(self._fs.loop, _range_of_s3, self._fs, path, start, end, timeout=seconds)
        if self._kind == "http":
            return sync(self._fs.loop, _range_of_http, self._fs, path, start, end, timeout=seconds)
        return self._call("cat_file", path, start=start, end=end), None

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if not self._fs.async_impl:
            return getattr(self._fs, method)(*args, **kwargs)
        seconds = self._retry.total_seconds if method == "ls" else self._retry.request_seconds  # a listing is many requests
        try:
            return sync(self._fs.loop, getattr(self._fs, f"_{method}"), *args, timeout=seconds, **kwargs)
        except FileNotFoundError as error:
            # The driver for HTTP says so of any failure to tell a file's size; its cause says what it was.
            cause = error.__cause__
            if self._kind == "http" and isinstance(cause, Exception) and getattr(cause, "status", None) not in (404, 410):
                raise OSError(_reason(cause)) from cause
            raise


def check_driver(root: str) -> str:
    """The protocol of a URL.

    Raises:
        ValueError: nothing installed can read it; the message says what to install.
    """
    protocol = root.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        fix = f"`pip install {package}`" if package else str(error)
        raise ValueError(f"{root} cannot be read without another package: {fix}") from error
    except ValueError as error:
        raise ValueError(
            f"{root}: {protocol}:// is no protocol that fsspec knows: use a path, s3://, gs:// or https://"
        ) from error
    return protocol


def _options(protocol: str, retry: Retry) -> dict[str, Any]:
    """For the driver. No instance is shared: one from before a fork does not work, and its listings would be old."""
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {
            "connect_timeout": retry.request_seconds,
            "read_timeout": retry.request_seconds,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": _MOST_CONNECTIONS,
            **configured,
        }
    return options


async def _range_of_s3(fs: Any, path: str, start: int, end: int) -> tuple[bytes, str | None]:
    bucket, key, version = fs.split_path(path)
    of_version = {"VersionId": version} if version else {}
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **of_version)
    try:
        _check_range(answer.get("ContentRange"), start, end)
        return await answer["Body"].read(), answer.get("ETag")
    finally:
        answer["Body"].close()


async def _range_of_http(fs: Any, path: str, start: int, end: int) -> tuple[bytes, int]:
    settings = dict(fs.kwargs)
    headers = {**settings.pop("headers", {}), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    session = await fs.set_session()
    async with session.get(fs.encode_url(path), headers=headers, **settings) as answer:
        if answer.status in (404, 410):
            raise FileNotFoundError(path)
        answer.raise_for_status()
        if answer.status == 200 and start == 0 and answer.content_length == end:
            return await answer.read(), end  # a server without ranges, asked for all there is
        size = _check_range(answer.headers.get("Content-Range"), start, end)
        return await answer.read(), size


def _check_range(header: str | None, start: int, end: int) -> int:
    """The size of the file, of which the header says that this range comes. Looked at before the bytes, which may be many."""
    if header is None:
        raise OSError("the server sends the whole file instead of a range")
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", header.strip())
    if match is not None and match[3] != "*" and int(match[3]) < end:
        raise OSError(f"the file has {int(match[3]):,} bytes")
    if match is None or (int(match[1]), int(match[2]) + 1) != (start, end):
        raise OSError(f"the server sends `{header}` instead of bytes {start}-{end - 1}")
    return 0 if match[3] == "*" else int(match[3])


def _reason(error: BaseException) -> str:
    if isinstance(error, FSTimeoutError):
        return "no complete answer in time"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
