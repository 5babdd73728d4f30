"""Whether the machines of a job are fit for a run, before it starts. Takes the options of pretrain_mmar.py.

    torchrun --nproc_per_node 8 tools/check_cluster.py --config my.yaml

examples/launch.sh runs it on all nodes before each start. Exit status 1: there is an error; warnings do not count.
docs/cluster.md has what is looked at.
"""

from __future__ import annotations

import sys
from functools import partial

from mmar_megatron.cluster.checking import check
from mmar_megatron.config import parse_command_line


def main(argv: list[str]) -> None:
    """Has what was found printed, once; exits with 1 where that is an error."""
    try:
        report = check(parse_command_line(argv).config, say=partial(print, flush=True))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if not report.passed:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
