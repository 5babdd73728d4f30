"""One of two processes that pose as two nodes: checks them as they are, then with one fault after another on the second.

Arguments: data directory, run directory, an empty directory. The second process prints a line of JSON for each check.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmar_megatron import parallel, platform
from mmar_megatron.cluster.checking import Size, checkpoint_size, join, look
from mmar_megatron.config import Config
from tests.distributed.common import command

_ALL_REDUCE = torch.distributed.all_reduce


def adds_wrongly(values: Tensor, *, group: ProcessGroup | None) -> None:
    """In one place."""
    _ALL_REDUCE(values, group=group)
    values[0] += 1


def main() -> None:
    """As a node of its own."""
    data, run_dir, empty = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    second = platform.rank() == 1
    os.environ |= {"GROUP_RANK": str(platform.rank()), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}

    def config(*options: str, run_dir: Path = run_dir) -> Config:
        return command(*options, "--run_dir", str(run_dir), data=data).config

    good, huge = config(), config("--model.backbone.hidden_size", "32768", "--model.backbone.num_layers", "800")
    relative, elsewhere = config("--data.path", os.path.relpath(data)), config(run_dir=empty / "second" if second else run_dir)
    size, huge_size, no_size = (
        Size() if second else checkpoint_size(each) for each in (good, huge, config("--data.path", "nowhere"))
    )
    join()

    def report(name: str, config: Config, **settings: Any) -> None:
        found = look(config, **settings)
        if second:
            said = {"passed": found.passed, "findings": list(map(str, found.findings)), "measured": found.measured}
            print(json.dumps({name: said | {"left": sorted(map(str, run_dir.parent.iterdir()))}}), flush=True)

    report("good", good, size=size)
    report("clock", good, size=size, clock=lambda: time.time() + 30 * second)
    with mock.patch("torch.distributed.all_reduce", adds_wrongly if second else torch.distributed.all_reduce):
        report("sum", good, size=size)
    report("elsewhere", elsewhere, size=size)
    report("flex", config("--model.attention", "flex", "--model.backbone.kv_channels", "16"), size=size)
    report("no room", huge, size=huge_size)
    report("no plan", good, size=no_size)
    if second:
        os.chdir(empty)
    report("no data", relative, size=size)
    if second:
        information = empty / "apex-0.9.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9\nSummary: Pyramid toolkit\n")
        sys.path.insert(0, str(empty))
    report("apex", good, size=size)
    parallel.leave()


if __name__ == "__main__":
    main()
