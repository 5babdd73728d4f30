"""Where the page listens, and what is left of it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mmar_megatron.demo.serving import address_of, is_private, keeping_to_itself, listen


def test_any_free_port_and_one_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert address_of(first) == f"http://127.0.0.1:{port}/"
        assert is_private(first)
        with socket.create_connection(("127.0.0.1", port), timeout=10):
            pass
        with pytest.raises(ValueError, match=rf"port {port} of 127.0.0.1 is taken: give another --port, or 0 for any"):
            listen("127.0.0.1", port)
    with listen("localhost", port) as again:
        assert is_private(again)


def test_all_addresses_are_not_private() -> None:
    with listen("0.0.0.0", 0) as open_to_all:
        assert not is_private(open_to_all)


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 65536, "--port is 65536: give 1 to 65535"),
        ("127.0.0.1", -1, "--port is -1"),
        ("no host", 0, r"--host no host is not known \(.+\): give an address of this machine"),
        ("192.0.2.1", 0, r"port 0 of 192.0.2.1 is not to be had \(.+\): give another --host or --port"),
    ],
)
def test_places_that_are_not_to_be_had(host: str, port: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listen(host, port)


def test_what_is_sent_is_gone_at_the_end() -> None:
    with keeping_to_itself():
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        (folder / "sent.png").write_bytes(b"")
    assert not folder.exists()
