"""Kills a tiny training again and again, damages its checkpoints, and holds every step against an undisturbed run.

    python tools/chaos.py --out runs/chaos [--kills 100] [--seed 0] [--nproc 2] [--steps 400] [-- OPTIONS OF pretrain_mmar.py]

Ranks are killed (one, or all) during start-up, steps and saves, told to stop by SIGTERM and SIGUSR1, killed while they do, and
find their newest checkpoint damaged; each time the very same command is started again. Exits with 1 where a logged value of any
step differs, a signal is not obeyed, damage is not reported, a rank outlives another's death, or anything else is not as
docs/reliability.md promises. DIR keeps both runs, the output of each life, and report.json.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from pathlib import Path

from mmar_megatron.chaos.life import Main
from mmar_megatron.chaos.schedule import draw_schedule
from mmar_megatron.chaos.trial import Trial, summary

ROOT = Path(__file__).resolve().parents[1]
SAVE_EVERY = 5


def main(argv: list[str]) -> int:
    """The trial; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where everything goes; must not exist")
    parser.add_argument("--kills", type=int, default=100, help="a tenth as many signals and a fifth as many damages come on top")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule (default 0)")
    parser.add_argument("--nproc", type=int, default=2, help="ranks (default 2)")
    parser.add_argument("--steps", type=int, help="of the run (default: 4 for each kill, at least 60)")
    end = argv.index("--") if "--" in argv else len(argv)
    args, passed_on = parser.parse_args(argv[:end]), argv[end + 1 :]
    steps = args.steps or max(60, 4 * args.kills)
    try:
        if args.out.exists():
            raise ValueError(f"{args.out} is there already: give --out another directory, or remove it.")
        schedule = draw_schedule(
            seed=args.seed,
            kills=args.kills,
            signals=max(3, args.kills // 10),
            damages=max(5, args.kills // 5),
            nproc=args.nproc,
            steps=steps,
            save_every=SAVE_EVERY,
        )
        trial = Trial(
            import_training(),
            training_options(passed_on, data=make_data(args.out / "data"), steps=steps),
            nproc=args.nproc,
            out=args.out,
            save_every=SAVE_EVERY,
            seed=args.seed,
            log=lambda line: print(line, flush=True),
        )
        tally = trial.run(schedule)
    except ValueError as error:
        sys.exit(f"error: {error}")
    report = {"seed": args.seed, "nproc": args.nproc, "steps": steps, "passed": tally.passed, **vars(tally)}
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(summary(tally))
    return 0 if tally.passed else 1


def import_training() -> Main:
    """The training command, in this process, with all that it would import; ranks are forked from it."""
    os.environ["OMP_NUM_THREADS"] = "1"  # the model is so small that threads only get in each other's way
    import torch.utils.tensorboard  # noqa: F401  imported late by what writes metrics, and for seconds

    return runpy.run_path(str(ROOT / "pretrain_mmar.py"), run_name="pretrain_mmar")["main"]


def make_data(directory: Path) -> Path:
    """So few pictures that epochs end between any two saves."""
    from mmar_megatron.data.codec import PatchCodec
    from mmar_megatron.data.prepare import make_shapes

    make_shapes(directory, codec=PatchCodec(image_size=32, patch_size=8), train=64, validation=16, log=lambda _: None)
    return directory


def training_options(passed_on: list[str], *, data: Path, steps: int) -> list[str]:
    """Those of the small run; those given; and last, for the last wins, those that the trial rests on."""
    return [
        *("--config", str(ROOT / "examples/configs/chaos.yaml"), *passed_on),
        *("--data.path", str(data), "--train.steps", str(steps), "--train.log_every", "1"),
        *("--checkpoint.every", str(SAVE_EVERY), "--checkpoint.keep_last", "3"),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
