"""Measured ratios: what an option costs, all in one run, so that the machine's moods cancel out.

    python tools/benchmark.py step --config examples/configs/tiny.yaml
    python tools/benchmark.py step --variant "--optimizer.ema_decay 0.9999" --config examples/configs/tiny.yaml
    python tools/benchmark.py head --model.head.depth 6
    python tools/benchmark.py logits --vocabulary 32000 --model.backbone.hidden_size 1024
    python tools/benchmark.py attention --lengths 320 2048 8192
    python tools/benchmark.py causal --lengths 512 2048 --config examples/configs/tiny.yaml
    torchrun --nproc_per_node 8 tools/benchmark.py save --config my.yaml
    python tools/benchmark.py loader --config examples/configs/tiny.yaml --data.sequence_length 512
    python tools/benchmark.py index --samples 10000000 --config my.yaml
    python tools/benchmark.py export --shard_gb 5 --config my.yaml
    python tools/benchmark.py sampler --images 4 --mar_rounds 32 --config my.yaml
    python tools/benchmark.py quality --model runs/mine --images 256 --out runs/quality --config my.yaml

`step` trains two engines that differ in the options of the variant, one step of each in turn, on the same microbatches; without a
variant, the engine and the same model in plain PyTorch. `head` and `logits` compute losses and gradients where there is a loss,
as the model does, and everywhere, masking the rest; `attention` the mixed mask by all there is to compute it with; `causal`
trains on rows of one text each without a mask, as the model does, and with it. These four need no data: what their own options do
not say, the model's do, by default a width of 1,024, 16 heads and MAR's smallest head. `save` writes checkpoints in the
foreground and in the background in turn, and tells for how long training waits. `loader` reads the same tars in their order by
webdataset and in random order by this program, makes whole microbatches of them, and trains on one, in turn. `index` opens the
index of a data set that is not there, and plans. `export` makes a Hugging Face model of a checkpoint of random weights, and a
checkpoint of that, and tells what memory this takes. `sampler` paints, and paints the plain way, which runs over prompt and image
anew in each round. `quality` paints captions of held-out pictures in several numbers of steps of the head by several samplers,
and tells how far from true pictures they are (by features of EfficientNet-Lite0, so that it is no FID); stopped, it goes on. All
other options are those of pretrain_mmar.py; for `quality` they name the data.
Prints one JSON object: medians over the rounds, and the quartiles of ratios; `head`, `logits`, `attention`, `causal`, and `step`
without a variant print a table on standard error too; `quality` writes tables and curves.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any, get_args

import torch

from mmar_megatron import parallel, platform
from mmar_megatron.benchmarks.attention import compare_attention
from mmar_megatron.benchmarks.causal import compare_causal
from mmar_megatron.benchmarks.exporting import measure_export
from mmar_megatron.benchmarks.indexing import measure_index
from mmar_megatron.benchmarks.loading import compare_loaders
from mmar_megatron.benchmarks.quality import QualityPlan
from mmar_megatron.benchmarks.quality_report import measure_quality
from mmar_megatron.benchmarks.rows import compare_head, compare_logits
from mmar_megatron.benchmarks.sampling import compare_sampling
from mmar_megatron.benchmarks.tables import show
from mmar_megatron.benchmarks.training import compare_saves, compare_steps, compare_with_plain
from mmar_megatron.diffusion.painting import ImageSampling
from mmar_megatron.diffusion.sampler import SamplerKind


def main(argv: list[str]) -> None:
    """One benchmark."""
    args, options = build_parser().parse_known_args(argv)
    try:
        found = args.run(args, options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(json.dumps({"device": platform.device_name(), "rounds": args.rounds, **platform.versions(), **found}))
    parallel.leave()


def _step(args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    if args.variant is None:
        return show(compare_with_plain(options, rounds=args.rounds))
    return compare_steps(options, variant=shlex.split(args.variant), rounds=args.rounds)


def _head(args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    found = compare_head(options, images=args.images, image_tokens=args.image_tokens, channels=args.channels, rounds=args.rounds)
    return show(found)


def _logits(args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    found = compare_logits(
        options,
        sequences=args.sequences,
        text=args.text_tokens,
        image_tokens=args.image_tokens,
        vocabulary=args.vocabulary,
        rounds=args.rounds,
    )
    return show(found)


def _attention(args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    found = compare_attention(
        options,
        lengths=args.lengths,
        positions=args.positions,
        text=args.text_tokens,
        image_tokens=args.image_tokens,
        rounds=args.rounds,
    )
    return show(found)


def _causal(args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    return show(compare_causal(options, lengths=args.lengths, positions=args.positions, rounds=args.rounds))


def _sampler(args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    sampling = ImageSampling(
        rounds=args.mar_rounds, steps=args.steps, guidance_scale=args.guidance_scale, refresh_every=args.refresh_every
    )
    return compare_sampling(options, images=args.images, sampling=sampling, rounds=args.rounds)


def _quality(args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    plan = QualityPlan(
        models=tuple(args.model),
        steps=tuple(args.steps),
        samplers=tuple(args.samplers),
        images=args.images,
        rounds=args.mar_rounds,
        guidance_scale=args.guidance_scale,
        batch_size=args.batch_size,
        path_steps=args.path_steps,
        path_images=min(args.path_images, args.images),
        seed=args.seed,
    )
    return measure_quality(options, plan=plan, out=args.out)


def build_parser() -> argparse.ArgumentParser:
    """The command line; what it does not know is for pretrain_mmar.py's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    kinds = parser.add_subparsers(required=True)
    step = kinds.add_parser("step", help="the time of a training step with and without some options, or beside plain PyTorch")
    step.add_argument("--variant", metavar="OPTIONS", help="in one argument; the layout must stay the same")
    step.set_defaults(run=_step)
    save = kinds.add_parser("save", help="for how long a checkpoint holds up training, in the foreground and in the background")
    save.add_argument("--directory", type=Path, help="on the storage to be measured (default: the system's temporary one)")
    save.set_defaults(run=lambda args, options: compare_saves(options, directory=args.directory, rounds=args.rounds))
    loader = kinds.add_parser("loader", help="samples a second, read in order and at random, and what a step takes of them")
    loader.add_argument("--microbatches", type=int, default=50, help="of each way of reading, in each round (default 50)")
    loader.add_argument("--cold", action="store_true", help="drop the shards from the system's cache before each turn")
    loader.set_defaults(
        run=lambda args, options: compare_loaders(options, microbatches=args.microbatches, cold=args.cold, rounds=args.rounds)
    )
    index = kinds.add_parser("index", help="opening the index of many samples, planning, and how the order moves over the shards")
    index.add_argument("--samples", type=int, default=10_000_000, help="in the index (default 10,000,000)")
    index.set_defaults(run=lambda args, options: measure_index(options, samples=args.samples, windows=args.rounds))
    weights = kinds.add_parser("export", help="memory and time of exporting and importing a checkpoint of random weights")
    weights.add_argument("--shard_gb", type=float, default=5.0, help="most that a file of weights has (default 5)")
    weights.add_argument("--directory", type=Path, help="on the storage to be used (default: the system's temporary one)")
    weights.set_defaults(
        run=lambda args, options: measure_export(options, shard_gb=args.shard_gb, directory=args.directory), rounds=1
    )
    sampler = kinds.add_parser("sampler", help="painting beside running over the whole sequence in each round")
    sampler.add_argument("--images", type=int, default=4, help="painted together (default 4)")
    sampler.add_argument("--mar_rounds", type=int, default=32, help="of each painting (default 32)")
    sampler.add_argument("--steps", type=int, default=25, help="of the head (default 25)")
    sampler.add_argument("--guidance_scale", type=float, default=2.0, help="1: none (default 2)")
    sampler.add_argument("--refresh_every", type=int, default=8, help="of the mode that re-uses keys and values; 1: leave it out")
    sampler.set_defaults(run=_sampler)
    _add_quality(kinds)
    _add_parts(kinds)
    for kind, rounds in ((sampler, 10), (step, 20), (save, 20), (loader, 20), (index, 100)):
        of = "windows that are planned" if kind is index else "of which medians are taken"
        kind.add_argument("--rounds", type=int, default=rounds, help=f"{of} (default {rounds})")
    return parser


def _add_parts(kinds: Any) -> None:
    head = kinds.add_parser("head", help="the diffusion head on masked tokens beside the head on all")
    head.add_argument("--images", type=int, default=64 if platform.HAS_CUDA else 16, help="(default 16, on a GPU 64)")
    head.add_argument("--channels", type=int, default=16, help="of a token (default 16)")
    head.set_defaults(run=_head)
    logits = kinds.add_parser("logits", help="logits and cross-entropy at labels beside those at all positions")
    logits.add_argument("--sequences", type=int, default=16 if platform.HAS_CUDA else 4, help="(default 4, on a GPU 16)")
    logits.add_argument("--vocabulary", type=int, default=32000, help="(default 32,000)")
    logits.set_defaults(run=_logits)
    attention = kinds.add_parser("attention", help="mixed attention by all there is to compute it with, over the length")
    lengths = [320, 640, 1280, 2560, 4096, 8192] if platform.HAS_CUDA else [320, 640, 1280, 2560]
    attention.add_argument("--lengths", type=int, nargs="+", default=lengths, help=f"of sequences (default {lengths})")
    positions = 32768 if platform.HAS_CUDA else 2560
    attention.add_argument("--positions", type=int, default=positions, help="of all sequences (default 2,560, on a GPU 32,768)")
    attention.set_defaults(run=_attention)
    causal = kinds.add_parser("causal", help="a step on texts alone, without a mask and with it")
    causal.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="of sequences (default 512 2048)")
    causal.add_argument("--positions", type=int, default=16384 if platform.HAS_CUDA else 2048, help="of all sequences")
    causal.set_defaults(run=_causal)
    for kind in (logits, attention):
        kind.add_argument("--text_tokens", type=int, default=64, help="of a sequence, or a document (default 64)")
    for kind, tokens in ((head, 256 if platform.HAS_CUDA else 32), (logits, 256), (attention, 256)):
        kind.add_argument("--image_tokens", type=int, default=tokens, help=f"of an image (default {tokens})")
    for kind in (head, logits, attention, causal):
        kind.add_argument("--rounds", type=int, default=10, help="of which medians are taken (default 10)")


def _add_quality(kinds: Any) -> None:
    quality = kinds.add_parser("quality", help="what steps of the head and samplers are worth, on pictures of a trained model")
    quality.add_argument("--model", required=True, action="append", help="a run, a checkpoint or an export; also several times")
    quality.add_argument("--out", required=True, type=Path, help="directory of tables, curves, and what goes on after a stop")
    quality.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50, 100], help="of the head (default 10 25 50 100)")
    quality.add_argument(
        "--samplers", nargs="+", choices=get_args(SamplerKind), default=get_args(SamplerKind), help="(default: all)"
    )
    quality.add_argument(
        "--images", type=int, default=256, help="painted each way; as many others are the reference (default 256)"
    )
    quality.add_argument("--mar_rounds", type=int, default=16, help="of each painting (default 16)")
    quality.add_argument("--guidance_scale", type=float, default=2.0, help="1: none (default 2)")
    quality.add_argument("--batch_size", type=int, default=64, help="pictures painted together (default 64)")
    quality.add_argument("--path_steps", type=int, default=400, help="of the path that ddim follows (default 400; 0: leave out)")
    quality.add_argument("--path_images", type=int, default=32, help="pictures painted along it (default 32)")
    quality.add_argument("--seed", type=int, default=0, help="of the choice of pictures, order and noise (default 0)")
    quality.set_defaults(run=_quality, rounds=1)


if __name__ == "__main__":
    main(sys.argv[1:])
