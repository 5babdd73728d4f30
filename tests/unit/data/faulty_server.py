"""An HTTP server on the loopback device that answers late, wrongly, by halves or not at all, as a test asks.

Behind it stands a folder (`FolderSource`), or a real server that it is a proxy of (`ServerSource`). It notes all requests.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, NamedTuple, Protocol
from urllib.parse import unquote

Fault = Literal["500", "503", "503 without body", "cut", "reset", "truncated", "longer", "hang", "stale", "no ranges"]
FAULTS: tuple[Fault, ...] = ("500", "503", "503 without body", "cut", "reset", "truncated", "longer", "hang", "stale")
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Source(Protocol):
    """Answers rightly."""

    def __call__(self, method: str, path: str, headers: Mapping[str, str]) -> Answer: ...


class FolderSource:
    """Files with ranges and entity tags."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        file = self._folder / unquote(path).lstrip("/")
        if not file.is_file():
            return Answer(404, {}, b"not here")
        content = file.read_bytes()
        shown = {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("Range", ""))
        if match is None:
            return Answer(200, {**shown, "Content-Length": str(len(content))}, b"" if method == "HEAD" else content)
        start, last = int(match[1]), min(int(match[2]), len(content) - 1)
        if start > last:
            return Answer(416, {}, b"")
        return Answer(206, {**shown, "Content-Range": f"bytes {start}-{last}/{len(content)}"}, content[start : last + 1])


class ServerSource:
    """Passes requests on as they are, so that their signatures hold."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address

    def __call__(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        connection = http.client.HTTPConnection(*self._address, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name.lower() != "connection":
                    connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            found = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP - {"content-length"}}
            return Answer(answer.status, found, answer.read())
        finally:
            connection.close()


@dataclass
class Request:
    method: str
    path: str
    range: str | None


@dataclass
class FaultyServer:
    """Settings may be changed at any time.

    Attributes:
        faults: one for each of the next requests for bytes (GET with a range), in their order; None: the right answer.
        always: of all requests for bytes after those.
        everything: `faults` and `always` are for every request, listings and questions for sizes too.
        latency: seconds before each answer.
        requests: all that came.
        most_at_once: requests under way together.
    """

    source: Source
    port: int = 0
    faults: list[Fault | None] = field(default_factory=list)
    always: Fault | None = None
    everything: bool = False
    latency: float = 0.0
    requests: list[Request] = field(default_factory=list)
    most_at_once: int = 0
    _at_once: int = 0
    _last: dict[str, Answer] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ranges(self) -> list[str]:
        """Of the requests for bytes, those that came."""
        return [request.range for request in self.requests if request.range is not None]

    def forget(self) -> None:
        """As if nothing had been asked."""
        self.requests.clear()
        self.most_at_once = 0

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        request = Request(handler.command, handler.path, handler.headers.get("Range") if handler.command == "GET" else None)
        with self._lock:
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            fault = None
            if request.range is not None or self.everything:
                fault = self.faults.pop(0) if self.faults else self.always
        try:
            time.sleep(self.latency)
            headers = dict(handler.headers.items())
            if fault == "no ranges":
                del headers["Range"]
            right = self.source(handler.command, handler.path, headers)
            self._answer(handler, fault, right)
            if fault is None and request.range is not None:
                self._last[handler.path] = right
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True
        finally:
            with self._lock:
                self._at_once -= 1

    def _answer(self, handler: BaseHTTPRequestHandler, fault: Fault | None, right: Answer) -> None:
        half = len(right.body) // 2
        if fault in ("500", "503"):
            code = "InternalError" if fault == "500" else "ServiceUnavailable"
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>try again</Message></Error>".encode()
            right = Answer(int(fault), {"Content-Type": "application/xml"}, b"" if handler.command == "HEAD" else body)
        elif fault == "503 without body":
            right = Answer(503, {}, b"")
        elif fault == "truncated":  # a right answer by its own account
            right = right._replace(body=right.body[:half])
        elif fault == "longer":
            right = right._replace(body=right.body + b"and more")
        elif fault == "stale":
            right = self._last.get(handler.path, Answer(503, {}, b""))
        elif fault == "hang":
            self._ended.wait(60)
            handler.close_connection = True
            return
        elif fault == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            return
        handler.send_response(right.status)
        for name, value in right.headers.items():
            if name.lower() != "content-length":
                handler.send_header(name, value)
        length = right.headers.get("Content-Length") if handler.command == "HEAD" else None
        handler.send_header("Content-Length", length or str(len(right.body)))
        handler.end_headers()
        if fault == "cut":
            handler.wfile.write(right.body[:half])
            handler.wfile.flush()
            handler.close_connection = True
        elif handler.command != "HEAD":
            handler.wfile.write(right.body)

    def end(self) -> None:
        """Lets go of those who hang."""
        self._ended.set()


@contextmanager
def faulty_server(source: Source) -> Iterator[FaultyServer]:
    """Listens on a free port until the end of the block."""
    server = FaultyServer(source)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60
        disable_nagle_algorithm = True
        wbufsize = -1

        def do_GET(self) -> None:
            server.handle(self)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Threads(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    with Threads(("127.0.0.1", 0), Handler) as listener:
        server.port = listener.server_address[1]
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.end()
            listener.shutdown()
            thread.join()
