"""The command line of `tools/demo.py`, up to the page; `tests/integration/test_demo.py` opens that in a browser."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest

from mmar_megatron.demo.serving import listen
from tools.demo import main


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_port_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as raised:
            main(["--model", "none", "--port", str(port)])
    assert raised.value.code == f"error: port {port} of 127.0.0.1 is taken: give another --port, or 0 for any that is free"


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_without_gradio_and_open_to_others(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "mmar_megatron.demo.page", raising=False)
    with pytest.raises(SystemExit) as raised:
        main(["--model", "none", "--host", host, "--port", "0"])
    assert raised.value.code == "error: gradio is not installed: pip install -r requirements-demo.txt"
    warned = "warning: at --host 0.0.0.0 other machines may reach this page, which asks for no password\n"
    assert capsys.readouterr().err == (warned if host == "0.0.0.0" else "")
