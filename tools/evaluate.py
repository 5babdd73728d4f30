"""Score a trained run: held-out losses, and what it paints and reads.

    python tools/evaluate.py --run_dir runs/quickstart [--images 96]

Writes RUN_DIR/samples.png (held-out captions with the images drawn for them) and RUN_DIR/scores.json, prints the scores beside
their targets, and exits with 1 where one is missed. On `shapes` the pictures are scored by a rule on their pixels, and the
captions of pictures with one object must be exactly right; other data sets are judged by their losses, and of those without
pictures nothing is painted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from torch import Tensor

from mmar_megatron import parallel
from mmar_megatron.data.held_out import HeldOut
from mmar_megatron.data.shards import Sample
from mmar_megatron.data.source import DataSource
from mmar_megatron.diffusion.painting import ImageSampling
from mmar_megatron.engine.base import Engine
from mmar_megatron.evaluation.scores import TARGETS, loss_scores, missed, shape_scores, table
from mmar_megatron.evaluation.sheet import write_sheet
from mmar_megatron.inference.images import paint
from mmar_megatron.inference.text import caption
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.training import checkpoint, manifest
from mmar_megatron.training.metrics import read_metrics
from mmar_megatron.training.reopening import reopen

SHEET_IMAGES = 16


def main(argv: list[str]) -> int:
    """Score the newest checkpoint; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", required=True, type=Path, help="of a run of pretrain_mmar.py")
    parser.add_argument("--images", type=int, default=96, help="pictures to paint and to read for the scores (default 96)")
    parser.add_argument("--rounds", type=int, default=32, help="masked auto-regressive rounds (default 32)")
    parser.add_argument("--steps", type=int, default=25, help="diffusion steps of the head in each round (default 25)")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="classifier-free guidance (default 2; 1: none)")
    parser.add_argument("--average", action="store_true", help="score the moving average of the weights in their place")
    parser.add_argument("--seed", type=int, default=0, help="of order and noise (default 0)")
    options = parser.parse_args(argv)
    try:
        path = checkpoint.resolve(options.run_dir)
        validated = [row for row in read_metrics(options.run_dir) if "val_loss_text" in row]
        if not validated:
            raise ValueError(f"{options.run_dir}/metrics.jsonl has no validated step: train with --validation.every above 0.")
        run = reopen(path, average=options.average)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

    engine, source, groups = run.engine, run.source, run.groups
    data_set = source.validation_set.index.made_by["source"]
    step = manifest.read(path)["step"]
    scores = loss_scores(validated[-1])
    if source.validation_set.has_pairs:
        title = f"{data_set}, step {step}: painted for held-out captions (left), the true pictures (right)"
        scores |= _paint(engine, source, groups, options, data_set=data_set, title=title)
    (options.run_dir / "scores.json").write_text(json.dumps({"step": step, **scores}, indent=1) + "\n")
    targets = TARGETS.get(data_set, {})
    print(table(scores, targets=targets))
    if failed := missed(scores, targets=targets):
        print(f"missed: {', '.join(failed)}", file=sys.stderr)
    parallel.leave()
    return 1 if failed else 0


def _paint(
    engine: Engine, source: DataSource, groups: ParallelGroups, options: argparse.Namespace, *, data_set: str, title: str
) -> dict[str, float]:
    """Writes samples.png, and returns the scores of what was painted and read."""
    sampling = ImageSampling(
        rounds=min(options.rounds, source.codec.num_tokens),
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        seed=options.seed,
    )
    samples = _held_out(source, options.images if data_set == "shapes" else SHEET_IMAGES, one_object=data_set == "shapes")
    captions = [source.captions(sample)[0] for sample in samples]
    with engine.evaluating():
        painted_BHW3 = paint(engine, captions, source=source, groups=groups, sampling=sampling, progress=_progress)
        scores = {}
        if data_set == "shapes":
            read = caption(engine, [sample.image_HW3 for sample in samples], source=source, groups=groups, max_tokens=40)
            specs = [sample.metadata["spec"] for sample in samples]
            scores = shape_scores(painted_BHW3, specs=specs, captions=captions, read=read)
    write_sheet(
        options.run_dir / "samples.png",
        captions=captions[:SHEET_IMAGES],
        painted_BHW3=painted_BHW3[:SHEET_IMAGES],
        true_BHW3=[source.picture(sample) for sample in samples[:SHEET_IMAGES]],
        title=title,
    )
    return scores


def _held_out(source: DataSource, count: int, *, one_object: bool) -> list[Sample]:
    """Evenly spread over the held-out split; of shapes only pictures with one object."""
    held_out = HeldOut(source)
    places = [p for p in range(len(held_out)) if not one_object or len(held_out.metadata(p)["spec"]["things"]) == 1]
    chosen = np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)
    return [held_out.read(places[i]) for i in chosen]


def _progress(done: int, rounds: int, *_: Tensor) -> None:
    if sys.stderr.isatty():
        print(f"\rpainting, round {done}/{rounds}", end="\n" if done == rounds else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
