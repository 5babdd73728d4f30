"""Pretrain an MMAR model.

    python pretrain_mmar.py --config examples/configs/tiny.yaml [--section.key VALUE ...]
    torchrun --nproc_per_node 8 pretrain_mmar.py --config ...

`--help` lists every option, `--print_config` shows the resolved configuration, `--dry_run` validates and plans without training.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mmar_megatron import parallel, platform
from mmar_megatron.config import CommandLine, Config, parse_command_line
from mmar_megatron.config_checks import validate_world
from mmar_megatron.data.index import BadDataError
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.scaling.split import split_pipeline
from mmar_megatron.training.building import build_engine, open_data
from mmar_megatron.training.guard import TooManyBadSteps
from mmar_megatron.training.planning import plan_run
from mmar_megatron.training.saving import SaveError
from mmar_megatron.training.trainer import Trainer
from mmar_megatron.training.watchdog import RanksLost, Watchdog


class UserError(Exception):
    """Options, data or paths that a user can mend."""


def main(argv: list[str]) -> None:
    """From the command line to the last step."""
    try:
        with user_errors():
            command = parse_command_line(argv)
            if command.dry_run:
                print_plan(command.config)
                return
            validate_world(command.config, world_size=platform.world_size())
            hang_timeout_s = command.config.train.hang_timeout_s
            groups = parallel.initialize(command.config.parallel, hang_timeout_s=hang_timeout_s)
        with Watchdog(hang_timeout_s=hang_timeout_s, groups=groups) as watchdog:
            with user_errors():
                trainer = build(command, groups=groups, watchdog=watchdog)
            try:
                trainer.fit()
            finally:
                trainer.engine.close()
    except (UserError, BadDataError, SaveError, TooManyBadSteps, RanksLost, OSError) as error:
        sys.exit(f"error: {error}")
    parallel.leave()


@contextmanager
def user_errors() -> Iterator[None]:
    """What goes wrong while a run is prepared is a user's to mend; later it would be ours."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def build(command: CommandLine, *, groups: ParallelGroups, watchdog: Watchdog) -> Trainer:
    """Build everything, in the order in which each part needs the one before."""
    config = command.config
    platform.seed_everything(config.seed, tensor_rank=groups.tensor.rank())

    source = open_data(config, groups=groups)
    config = split_pipeline(config, source)
    engine = build_engine(config, source=source, groups=groups)
    return Trainer(command, engine=engine, source=source, groups=groups, watchdog=watchdog)


def print_plan(config: Config) -> None:
    """What the run would need: parameters and memory of each stage, operations of a step. Any layout, in one process."""
    world_size = platform.world_size() if platform.launched() else None
    print(plan_run(config, source=open_data(config), world_size=world_size).table())


if __name__ == "__main__":
    main(sys.argv[1:])
