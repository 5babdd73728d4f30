"""Scaling laws: what a model of any size will reach, and what a budget of compute is best spent on.

    python tools/sweep.py fit --csv points.csv --budget 1e21 --out runs/law

`COMMAND --help` says more; docs/scaling.md has the method, what was measured, and its limits.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path

_FIT = """\
Fits L = E + A / N^alpha + B / D^beta to runs with N parameters, D tokens and loss L.

    python tools/sweep.py fit --csv points.csv --budget 1e21 --out runs/law
    python tools/sweep.py fit --csv points.csv --loss val_loss_text --loss val_loss_image --budget 1e21 --out runs/law

FILE has a header and a row for each run, with the columns n_params, n_tokens and loss (or those that --loss names). Used where
they are there: `flops` (of training; else 6 N D is taken), `budget` (rows with the same word in it belong together; else they are
grouped by their FLOPs), and `run` (a name; rows of one name are drawn together for intervals). Other columns are ignored.

DIR gets fit.json, table.txt (what is printed), runs.csv with predictions and residuals, plots, and report.html with all of it.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line, one subcommand for each part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    subcommand = partial(commands.add_parser, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    _add_fit(subcommand("fit", help="runs -> the law of their losses, and the best use of a budget", description=_FIT))
    return parser


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", type=Path, required=True, metavar="FILE", help="the runs")
    parser.add_argument(
        "--loss", action="append", metavar="COLUMN", help="to fit; may be given several times (default: the column `loss`)"
    )
    parser.add_argument(
        "--budget",
        type=_positive,
        action="append",
        metavar="FLOPS",
        help="to be answered for; may be given several times (default: 10 and 100 times the largest of the runs)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for what is found; made if need be")
    parser.add_argument(
        "--resamples", type=int, default=1000, metavar="COUNT", help="of the runs, for intervals (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (default: %(default)s)")
    parser.set_defaults(run=fit)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of FLOPs above 0")
    return value


def fit(args: argparse.Namespace) -> None:
    """Runs `fit`."""
    from mmar_megatron.scaling.law.reporting import fit_table  # here, since torch and matplotlib take seconds

    text = fit_table(
        args.csv,
        losses=args.loss or ["loss"],
        flops=args.budget,
        resamples=args.resamples,
        seed=args.seed,
        out=args.out,
    )
    print(text)
    print(f"{args.out}: report.html, fit.json, table.txt, runs.csv and the plots")


def main(argv: list[str]) -> None:
    """One command; a user's mistake ends in one sentence and exit code 1."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
