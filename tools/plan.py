"""What a run takes on GPUs that need not be at hand, and which layout suits them: in one process, on any machine.

    python tools/plan.py --config FILE --gpus 64 --gpu h100
    python tools/plan.py --config FILE --gpus 64 --gpu h100 --search

All other options are those of pretrain_mmar.py. Prints parameters, memory and operations as `--dry_run` does, and the memory of
activations, what is sent, and a forecast of a step's time and MFU. With --search it goes through all layouts that divide the
model and the batch (tensor, pipeline and data parallelism, chunks, micro-batch size, recomputation, ZeRO), and ranks those that
fit. Of the data it needs index, tokenizer and codec. Bytes and operations are counted, from the code that trains; times are
forecast from shares of peaks: docs/planning.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial

from mmar_megatron.config import Config, parse_command_line
from mmar_megatron.config_checks import OTHER_SPLITS
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.scaling.expected import FullestRow, RowMeans, expected_counts, expected_flops
from mmar_megatron.scaling.footprint import Microbatch
from mmar_megatron.scaling.forecast import forecast
from mmar_megatron.scaling.forecast_report import as_json, found_table, table
from mmar_megatron.scaling.gpus import GPUS
from mmar_megatron.scaling.layout import Layout
from mmar_megatron.scaling.pieces import Footprints
from mmar_megatron.scaling.search import search
from mmar_megatron.training.building import open_data
from mmar_megatron.training.planning import plan_run


def main(argv: list[str]) -> None:
    """One plan, or a search."""
    args, options = build_parser().parse_known_args(argv)
    try:
        report(args, parse_command_line(options).config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def report(args: argparse.Namespace, config: Config) -> None:
    """Print what is asked for."""
    backbone = config.model.backbone
    if taken := next((name for name in OTHER_SPLITS if getattr(backbone, name)), None):
        raise ValueError(f"model.backbone.{taken} is not planned with: say the same by parallel.pipeline_split.")
    source = open_data(config)
    geometry, vocab_size = ImageGeometry.of(source.codec), source.tokenizer.vocab_size
    tokens_per_image = geometry.grid_height * geometry.grid_width
    rows, fullest = RowMeans.of(source, seed=config.seed), FullestRow.of(source, seed=config.seed)
    row = Microbatch(
        sequences=1,
        sequence_length=config.data.sequence_length,
        images=fullest.images,
        labels=fullest.labels,
        masked=fullest.painted * tokens_per_image,
    )
    counts = expected_counts(config, tokens_per_image=tokens_per_image, rows=rows)
    flops = expected_flops(config, counts, geometry=geometry, vocab_size=vocab_size)
    gpu = GPUS[args.gpu]
    if args.search:
        found = search(
            config,
            world_size=args.gpus,
            gpu=gpu,
            flops=flops,
            row=row,
            geometry=geometry,
            vocab_size=vocab_size,
            say=partial(print, file=sys.stderr),
        )
        print(json.dumps([as_json(forecast) for forecast in found.fitting]) if args.json else found_table(found))
        return
    planned = plan_run(config, source=source, world_size=args.gpus, rows=rows)
    footprints = Footprints(config, microbatch=row, geometry=geometry, vocab_size=vocab_size)
    layout = Layout.of(config, world_size=args.gpus, flops=flops)
    of_layout = forecast(layout, footprints=footprints, flops=flops, gpu=gpu)
    print(json.dumps(as_json(of_layout)) if args.json else f"{planned.table()}\n\n{table(of_layout)}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of GPUs: give 1 or more")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line; what it does not know is for pretrain_mmar.py's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gpus", type=_positive, required=True, help="of the whole job")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="which (default h100)")
    parser.add_argument("--search", action="store_true", help="rank the layouts that fit")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
