"""Where the page is to be had, and that nobody else hears of it."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def keeping_to_itself() -> Iterator[None]:
    """Gradio reports to nobody, and pictures that are sent to it are gone at the end. Enter it before gradio is imported."""
    with tempfile.TemporaryDirectory(prefix="mmar-demo-") as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_TEMP_DIR": folder}
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: at any that is free.

    Raises:
        ValueError: the port is taken, or the host is none of this machine.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port is {port}: give 1 to {2**16 - 1}, or 0 for any that is free")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, kind, protocol)
    except socket.gaierror as error:
        raise ValueError(f"--host {host} is not known ({error.strerror}): give an address of this machine") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} of {host} is taken: give another --port, or 0 for any that is free") from error
        raise ValueError(f"port {port} of {host} is not to be had ({error.strerror}): give another --host or --port") from error
    return listening


def address_of(listening: socket.socket) -> str:
    """What to open in a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def is_private(listening: socket.socket) -> bool:
    """Whether this machine alone reaches it."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback
