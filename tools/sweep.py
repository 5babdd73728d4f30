"""Scaling laws: what a model of any size will reach, and what a budget of compute is best spent on.

    python tools/sweep.py plan examples/scaling/sweep_tiny.yaml --out runs/sweep
    python tools/sweep.py run runs/sweep --jobs 2
    python tools/sweep.py status runs/sweep
    python tools/sweep.py fit --sweep runs/sweep --budget 1e15
    python tools/sweep.py fit --csv points.csv --budget 1e21 --out runs/law

`COMMAND --help` says more; docs/scaling.md has the method, what was measured, and its limits.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path

from mmar_megatron.sweep.points import LOSSES, points_of
from mmar_megatron.sweep.queueing import open_commands, retry_failed, run_queue
from mmar_megatron.sweep.records import read_plan, write_whole
from mmar_megatron.sweep.slurm import submit
from mmar_megatron.sweep.status import status as status_of

_PLAN = """\
Lays out an IsoFLOP grid: for each budget several sizes about the expected optimum, each trained for as many steps as it pays.

    python tools/sweep.py plan examples/scaling/sweep_tiny.yaml --out runs/sweep
    python tools/sweep.py plan examples/scaling/sweep_cluster.yaml --out runs/cluster    # on a CPU: no weight is allocated

The cost of a step is counted part by part, as --dry_run of pretrain_mmar.py prints it. DIR gets plan.json and, for each run,
runs/NAME/run.yaml, so that it is `pretrain_mmar.py --config BASE --config DIR/runs/NAME/run.yaml`. docs/scaling.md has all keys.
"""

_RUN = """\
Trains the runs of a plan. The same command goes on after any stop; a run that fails is retried, and then marked.

    python tools/sweep.py run runs/sweep --jobs 2                     # here, two at a time
    python tools/sweep.py run runs/sweep --jobs 4 --gpus-per-run 2    # on eight GPUs
    python tools/sweep.py run runs/sweep --slurm --jobs 8             # as a job array, submitted where sbatch is there
    python tools/sweep.py run runs/sweep --commands > commands.txt    # for any other scheduler

Ctrl-C or SIGTERM has the runs save and stop. Exit status: 0 all are done, 1 some have failed, 75 stopped before the end.
"""

_STATUS = """\
A table of a sweep's runs: waiting, running, stopped, failed or done, their losses, and the time left.

    python tools/sweep.py status runs/sweep
"""

_FIT = """\
Fits L = E + A / N^alpha + B / D^beta to runs with N parameters, D tokens and loss L.

    python tools/sweep.py fit --sweep runs/sweep --budget 1e15
    python tools/sweep.py fit --csv points.csv --budget 1e21 --out runs/law
    python tools/sweep.py fit --csv points.csv --loss val_loss_text --loss val_loss_image --budget 1e21 --out runs/law

FILE has a header and a row for each run, with the columns n_params, n_tokens and loss (or those that --loss names). Used where
they are there: `flops` (of training; else 6 N D is taken), `budget` (rows with the same word in it belong together; else they are
grouped by their FLOPs), and `run` (a name; rows of one name are drawn together for intervals). Other columns are ignored.
Of a sweep the finished runs are taken, with parameters and FLOPs of its plan, and tokens and losses after their last step.

DIR gets fit.json, table.txt (what is printed), runs.csv with predictions and residuals, plots, and report.html with all of it.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line, one subcommand for each part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    subcommand = partial(commands.add_parser, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    _add_plan(subcommand("plan", help="shapes and budgets -> a grid of runs", description=_PLAN))
    _add_run(subcommand("run", help="trains them, here or on a cluster", description=_RUN))
    _add_status(subcommand("status", help="what has become of them", description=_STATUS))
    _add_fit(subcommand("fit", help="runs -> the law of their losses, and the best use of a budget", description=_FIT))
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", type=Path, metavar="SPEC.yaml", help="what is to be trained")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the sweep; made if need be")
    parser.set_defaults(run=plan)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", type=Path, metavar="DIR", help="directory of the sweep")
    parser.add_argument("--jobs", type=_at_least_one, metavar="N", help="runs at a time (default: 1; --slurm: no limit)")
    parser.add_argument(
        "--gpus-per-run", type=_at_least_one, default=0, metavar="K", help="GPUs that each run here sees (default: all of them)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--slurm", action="store_true", help="write DIR/slurm.sh, a job array, and submit it if sbatch is there")
    where.add_argument("--commands", action="store_true", help="print the command of each run that is not done")
    parser.add_argument("--retry-failed", action="store_true", help="give runs that have failed as many tries again")
    parser.set_defaults(run=run)


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", type=Path, metavar="DIR", help="directory of the sweep")
    parser.set_defaults(run=status)


def _add_fit(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--csv", type=Path, metavar="FILE", help="the runs")
    source.add_argument("--sweep", type=Path, metavar="DIR", help="a sweep, of which the finished runs are taken")
    parser.add_argument(
        "--loss",
        action="append",
        metavar="COLUMN",
        help="to fit; may be given several times (default: the column `loss`; of a sweep val_loss_text and val_loss_image)",
    )
    parser.add_argument(
        "--budget",
        type=_positive,
        action="append",
        metavar="FLOPS",
        help="to be answered for; may be given several times (default: 10 and 100 times the largest of the runs)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="directory for what is found; made if need be (default: of a sweep, its law/)"
    )
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


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def plan(args: argparse.Namespace) -> None:
    """Runs `plan`."""
    from mmar_megatron.sweep.planning import make_plan  # here, since torch takes seconds

    print(make_plan(args.spec, out=args.out, say=_to_stderr))


def run(args: argparse.Namespace) -> None:
    """Runs `run`; ends with its exit status."""
    sweep = read_plan(args.sweep)
    if args.retry_failed:
        retry_failed(sweep)
    if args.commands:
        for words in open_commands(sweep):
            print(words)
    elif args.slurm:
        print(submit(sweep, jobs=args.jobs))
    else:
        sys.exit(run_queue(sweep, jobs=args.jobs or 1, gpus_per_run=args.gpus_per_run, say=partial(print, flush=True)))


def status(args: argparse.Namespace) -> None:
    """Runs `status`."""
    print(status_of(read_plan(args.sweep)))


def fit(args: argparse.Namespace) -> None:
    """Runs `fit`."""
    from mmar_megatron.scaling.law.reporting import fit_table  # here, since torch and matplotlib take seconds

    out, table, losses = args.out, args.csv, args.loss
    if args.sweep is not None:
        out, losses = out or args.sweep / "law", losses or list(LOSSES)
        content, remarks = points_of(read_plan(args.sweep), losses=list(dict.fromkeys(losses)))
        for remark in remarks:
            _to_stderr(remark)
        out.mkdir(parents=True, exist_ok=True)
        table = out / f"{args.sweep.resolve().name}.csv"
        write_whole(table, content)
    elif out is None:
        raise ValueError("fit --csv needs --out, the directory for what is found: give it")
    text = fit_table(table, losses=losses or ["loss"], flops=args.budget, resamples=args.resamples, seed=args.seed, out=out)
    print(text)
    print(f"{out}: report.html, fit.json, table.txt, runs.csv and the plots")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    """One command; a user's mistake ends in one sentence and exit code 1."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
