"""Paints pictures for prompts, with an export, a checkpoint or a run.

    python tools/generate.py --model runs/quickstart --prompt "a large red circle" --prompt "two blue squares" --out out/
    python tools/generate.py --model models/mine --prompts prompts.jsonl --images 4 --guidance_scale 3 --grid --out out/
    python tools/generate.py --model models/mine --prompt "a blue kite" --start kite.png --redraw mask.png --out out/

OUT gets 000000-0.png (prompt, picture of it) and so on, each with all its settings in its text, and manifest.jsonl with the same,
one line for each picture in order. The same command goes on where a stopped one was. A picture follows from its prompt, seed and
number; with another --batch_size, which adds numbers up in another order, a colour may differ by one step of 255.

Prompts come from the command line or a file: .txt, one a line; .jsonl, {"prompt": ..., "id": ..., "seed": ...}, of which the last
two may be left out; .csv with columns of these names. Pictures of prompts with a seed of their own do not depend on their place
in the file, and are batched with others of their prompt alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmar_megatron.generation.options import add_model_options, model_options

if TYPE_CHECKING:
    from mmar_megatron.generation.files import Folder
    from mmar_megatron.generation.prompts import Prompt

SAMPLERS = ("ddim", "ancestral", "dpm_solver++")
SETTINGS = ("rounds", "steps", "sampler", "order", "guidance_scale", "guidance_schedule", "temperature", "refresh_every")
SHEET_PICTURES = 64


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIR", help="where the pictures go")

    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times; '': without a caption")
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help=".txt, .jsonl or .csv")

    group = parser.add_argument_group("painting")
    add = group.add_argument
    add("--images", type=int, default=1, metavar="N", help="pictures of each prompt (default: %(default)s)")
    add("--seed", type=int, default=0, help="of order and noise (default: %(default)s)")
    add(
        "--rounds", type=int, help="runs of the backbone for each picture (default: 32, or one for each token of a small picture)"
    )
    add("--steps", type=int, help="diffusion steps for each token (default: as the model's configuration says)")
    add("--sampler", choices=SAMPLERS, help="of each token (default: as the model's configuration says)")
    orders = ("random", "raster", "confidence")
    add("--order", choices=orders, default=orders[0], help="of tokens; raster: row by row; confidence: the surest first")
    add("--guidance_scale", type=float, default=2.0, help="classifier-free guidance; 1: none (default: %(default)s)")
    schedules = ("constant", "linear")
    add("--guidance_schedule", choices=schedules, default=schedules[0], help="linear: it grows as the picture does")
    add("--temperature", type=float, default=1.0, help="scales the noise (default: %(default)s)")
    add(
        "--refresh_every",
        type=int,
        default=1,
        metavar="N",
        help="run over the whole picture every N rounds, in the others over tokens that changed: faster, not exact (default: 1)",
    )
    add("--batch_size", type=int, default=8, help="pictures painted at a time (default: %(default)s)")
    add("--grid", action="store_true", help=f"also write grid-0.png ..., sheets of {SHEET_PICTURES} pictures with their captions")

    group = parser.add_argument_group("changing a picture")
    add = group.add_argument
    add("--start", type=Path, metavar="PICTURE", help="to begin from, with one of:")
    add("--redraw", type=Path, metavar="MASK", help="a picture of any size, white where to draw anew; whole tokens are redrawn")
    add(
        "--outpaint", type=_margins, metavar="L,T,R,B", help="draw margins around it: shares of the new picture, as 0.25,0,0.25,0"
    )
    add("--vary", type=float, metavar="SHARE", help="redraw this share of its tokens, chosen by seed and number")
    return parser


def _margins(text: str) -> tuple[float, float, float, float]:
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} are not four numbers: give left,top,right,bottom, as 0.25,0,0.25,0"
        ) from error
    return left, top, right, bottom


def run(args: argparse.Namespace) -> str:
    """Paints, and returns what to report."""
    from mmar_megatron.generation.editing import read_edit  # here, since torch takes seconds
    from mmar_megatron.generation.files import Folder
    from mmar_megatron.generation.opening import open_model
    from mmar_megatron.generation.painting import paint, pictures_of, settle
    from mmar_megatron.generation.prompts import check_lengths
    from mmar_megatron.progress import Progress

    if args.batch_size < 1:
        raise ValueError(f"--batch_size is {args.batch_size}: give 1 or more")
    changes = {name: getattr(args, name) for name in ("redraw", "outpaint", "vary")}
    if args.start is None and any(value is not None for value in changes.values()):
        raise ValueError("--redraw, --outpaint and --vary change a picture: give it by --start")
    prompts = _prompts(args)
    pictures = pictures_of(prompts, images=args.images, seed=args.seed)

    opened = open_model(**model_options(args))
    settings = settle(opened, **{name: getattr(args, name) for name in SETTINGS})
    tokens = opened.model.config.num_image_tokens
    check_lengths(prompts, processor=opened.processor, image_tokens=tokens, longest=opened.longest_text)
    edit = None if args.start is None else read_edit(args.start, processor=opened.processor, **changes)

    records = [picture.record(opened, settings, edit=edit) for picture in pictures]
    with Folder(args.out, records=records) as folder:
        before = folder.done
        progress = Progress.on_stderr(len(pictures), done=before, what="pictures")
        painted = paint(
            opened,
            pictures,
            settings=settings,
            batch_size=args.batch_size,
            done=before,
            edit=edit,
            progress=progress.at,
        )
        try:
            for record, (_, pixels_HW3) in zip(records[before:], painted, strict=True):
                folder.add(pixels_HW3, record=record)
        finally:
            progress.close()
        if args.grid:
            _write_sheets(folder, records)
    there = f", {before} of them before" if before else ""
    return f"{args.out}: {len(pictures)} pictures of {len(prompts)} prompts{there}"


def _prompts(args: argparse.Namespace) -> list[Prompt]:
    from mmar_megatron.generation.prompts import Prompt, read_prompts

    if args.prompts is not None:
        return read_prompts(args.prompts)
    return [Prompt(text=text, place=f"--prompt {number}") for number, text in enumerate(args.prompt, start=1)]


def _write_sheets(folder: Folder, records: list[dict[str, Any]]) -> None:
    import numpy as np
    from PIL import Image

    from mmar_megatron.evaluation.sheet import write_sheet

    for number, first in enumerate(range(0, len(records), SHEET_PICTURES)):
        shown = records[first : first + SHEET_PICTURES]
        write_sheet(
            folder.path / f"grid-{number}.png",
            captions=[record["prompt"] for record in shown],
            painted_BHW3=np.stack([np.asarray(Image.open(folder.path / record["file"])) for record in shown]),
            title=f"{shown[0]['file']} to {shown[-1]['file']}, painted by {shown[0]['model']}",
        )


def main(argv: list[str]) -> None:
    """Runs the command; a user's mistake ends in one sentence and exit code 1."""
    args = build_parser().parse_args(argv)
    from mmar_megatron import platform  # here, since torch takes seconds

    platform.prepare_for_megatron()
    try:
        print(run(args))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on from here")


if __name__ == "__main__":
    main(sys.argv[1:])
