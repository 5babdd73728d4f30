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

import torch

from mmar_megatron import platform
from mmar_megatron.cluster.checking import check
from tests.distributed.common import command


def main() -> None:
    data, run_dir, empty = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    second = platform.rank() == 1
    os.environ |= {"GROUP_RANK": str(platform.rank()), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}

    def report(name: str, *options: str, run_dir: Path = run_dir, **settings: Any) -> None:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = name  # each group has a part of the store to itself
        found = check(command(*options, "--run_dir", str(run_dir), data=data).config, say=lambda _: None, **settings)
        if second:
            said = {"passed": found.passed, "findings": list(map(str, found.findings)), "measured": found.measured}
            print(json.dumps({name: said | {"left": sorted(map(str, run_dir.parent.iterdir()))}}), flush=True)

    report("good")
    report("clock", clock=lambda: time.time() + 30 * second)
    report("elsewhere", run_dir=empty / "second" if second else run_dir)
    relative = os.path.relpath(data)
    if second:
        os.chdir(empty)
    report("no data", "--data.path", relative)
    report("no room", "--model.backbone.hidden_size", "32768", "--model.backbone.num_layers", "800")
    if second:
        information = empty / "apex-0.9.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9\nSummary: Pyramid toolkit\n")
        sys.path.insert(0, str(empty))
    report("apex")
    assert not torch.distributed.is_initialized()


if __name__ == "__main__":
    main()
