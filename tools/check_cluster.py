"""Whether the machines of a job are fit for a run, before it starts. Takes the options of pretrain_mmar.py.

    torchrun --nproc_per_node 8 tools/check_cluster.py --config my.yaml

examples/launch.sh runs it on all nodes before each start. Exit status 1: there is an error; warnings do not count.
docs/cluster.md has what is looked at.
"""

from __future__ import annotations

import sys

from mmar_megatron import platform
from mmar_megatron.cluster.checking import check
from mmar_megatron.config import parse_command_line


def main(argv: list[str]) -> None:
    """Prints what was found, once; exits with 1 where that is an error."""
    try:
        report = check(parse_command_line(argv).config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if platform.rank() == platform.world_size() - 1:  # which speaks for the run too
        print(report, flush=True)
    if not report.passed:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
