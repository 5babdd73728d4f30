"""A real S3 server on the loopback device: SeaweedFS, with its signatures checked."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import fsspec

from mmar_megatron.platform import die_with_parent

KEY, SECRET, BUCKET = "loopback", "loopback-secret", "datasets"
_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)
_SECONDS = 120


class ObjectStore:
    """The running server."""

    def __init__(self, port: int) -> None:
        self.address = ("127.0.0.1", port)
        self.client: Any = fsspec.filesystem(
            "s3",
            key=KEY,
            secret=SECRET,
            endpoint_url=f"http://127.0.0.1:{port}",
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def put(self, name: str, content: bytes) -> None:
        self.client.pipe_file(f"{BUCKET}/{name}", content)


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Starts the server, makes the bucket, and leaves no process and no file behind."""
    folder = Path(tempfile.mkdtemp(prefix="s3-"))  # a short path: the names of sockets are limited
    program = Path(sysconfig.get_path("scripts"), "weed")
    assert program.is_file(), "pip install -r requirements-dev.txt"
    identity = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    command = [str(program), "server", "-filer", "-s3", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    command += ["-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder}/s3.json"]
    command += [
        "-volume.max=8",
        "-master.volumeSizeLimitMB=64",
        f"-filer.localSocket={folder}/filer",
        f"-s3.localSocket={folder}/s3",
    ]
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={"HOME": str(folder)}, preexec_fn=die_with_parent
    )
    try:
        store = ObjectStore(ports["s3.port"])
        deadline = time.monotonic() + _SECONDS
        while True:
            try:
                store.client.mkdir(BUCKET)
                store.put("first", b"volumes exist from the first write on")
                break
            except Exception:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((folder / "log").read_text()[-2000:]) from None
                time.sleep(0.1)
        yield store
    finally:
        server.kill()  # its orderly end takes 20 s
        server.wait()
        log.close()
        for port in ports.values():
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink()
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def credentials(endpoint: str) -> dict[str, str]:
    """What a user of S3 has in the environment."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
