"""A run as on a GPU with FP8, whose layers compute it by emulation: for loss curves where there is no such GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmar_megatron import parallel, platform
from mmar_megatron.benchmarks.fp8_emulation import Emulation, emulating
from mmar_megatron.config import parse_command_line
from mmar_megatron.config_checks import validate_world
from mmar_megatron.data.prepare import ensure_data
from mmar_megatron.training.building import build_engine, open_source
from mmar_megatron.training.reopening import ON_ANY_MACHINE
from mmar_megatron.training.trainer import Trainer
from mmar_megatron.training.watchdog import Watchdog

RECORD = "fp8_emulation.json"
"""In the run directory: what was emulated, for the configuration there says `fp8: off`."""


def train_emulated(options: Sequence[str]) -> None:
    """Train with the options of pretrain_mmar.py; what they say of FP8 is emulated.

    Raises:
        ValueError: FP8 is off, or something that the emulation does not know is on; and as pretrain_mmar.py.
    """
    asked = parse_command_line(options)
    if asked.config.precision.fp8 == "off":
        raise ValueError("precision.fp8 is off, so that there is nothing to emulate: set it, or run pretrain_mmar.py.")
    if asked.dry_run:
        raise ValueError("There is no plan of an emulation: leave out --dry_run, or run pretrain_mmar.py.")
    emulation = Emulation.of(asked.config.model.backbone)
    command = parse_command_line([*options, *ON_ANY_MACHINE])
    config = command.config
    if config.engine != "native" or platform.world_size() > 1:
        raise ValueError("The emulation of FP8 is for engine native in one process: set engine native, and start one.")
    validate_world(config, world_size=1)
    groups = parallel.initialize(config.parallel, hang_timeout_s=config.train.hang_timeout_s)
    with Watchdog(hang_timeout_s=config.train.hang_timeout_s, groups=groups) as watchdog:
        platform.seed_everything(config.seed, tensor_rank=groups.tensor.rank())
        ensure_data(config.data)
        source = open_source(config)
        engine = build_engine(config, source=source, groups=groups)
        with emulating(engine.models, emulation):
            trainer = Trainer(command, engine=engine, source=source, groups=groups, watchdog=watchdog)
            record = json.dumps({"precision.fp8": asked.config.precision.fp8, **as_record(emulation)}, indent=1)
            Path(config.run_dir, RECORD).write_text(record + "\n")
            try:
                trainer.fit()
            finally:
                engine.close()
    parallel.leave()


def as_record(emulation: Emulation) -> dict[str, Any]:
    """For JSON."""
    gradients = str(emulation.recipe.gradients).removeprefix("torch.")
    return {"recipe": asdict(emulation.recipe) | {"gradients": gradients}, "layers_in_bf16": sorted(emulation.layers_in_bf16)}
