"""Makes a data set: pictures and texts -> WebDataset shards, index and tokenizer.

    python tools/prepare_data.py shapes --out data/shapes
    python tools/prepare_data.py emoji  --out data/emoji
    python tools/prepare_data.py folder pictures/ --out data/mine
    python tools/prepare_data.py table captions.csv --image file --captions en=caption zh=caption_zh --out data/mine
    python tools/prepare_data.py webdataset 'cc12m/00000.tar' ... --out data/cc12m
    python tools/prepare_data.py conversations llava.json --images coco/ --out data/llava
    python tools/prepare_data.py text books.jsonl --out data/books
    python tools/prepare_data.py index DIR        rebuilds the index of a data set from its tars
    python tools/prepare_data.py verify DIR       compares everything with the index

Under torchrun the processes share the work. The same command goes on where a killed one was; the directory appears when it is
complete. docs/data.md is the guide.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmar_megatron.data.codec import Encoder, ImageCodec, PatchCodec
from mmar_megatron.data.emoji import make_emoji
from mmar_megatron.data.index import SPLITS
from mmar_megatron.data.preparation.documents import DocumentSource
from mmar_megatron.data.preparation.folders import FolderSource
from mmar_megatron.data.preparation.recipe import Recipe
from mmar_megatron.data.preparation.records import CaptionFields, Source
from mmar_megatron.data.preparation.tables import TableSource
from mmar_megatron.data.preparation.tars import TarSource
from mmar_megatron.data.prepare import Preparation, make_shapes
from mmar_megatron.data.verify import rebuild_index, verify

REPOSITORY = Path(__file__).resolve().parents[1]
_Add = Callable[..., Any]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, *parents: argparse.ArgumentParser) -> _Add:
        formatter = argparse.ArgumentDefaultsHelpFormatter
        return commands.add_parser(name, help=help, description=help, parents=parents, formatter_class=formatter).add_argument

    out, made, found, captions, rows, workers = _out(), _common(32, 4), _found(), _captions(), _rows(), _workers()
    add = command("shapes", "coloured shapes, drawn here", out, made)
    add("--train", type=int, default=8000, help="number of training pictures")
    add("--validation", type=int, default=512, help="number of held-out pictures")
    add("--seed", type=int, default=0, help="other seeds give other pictures")

    add = command("emoji", "Noto and Twemoji, with names in English and Chinese", out, made)
    add("--skin_tones", type=int, default=5, help="variants kept for each base emoji and style; 25: all")
    add("--cache", type=Path, default=REPOSITORY / ".cache" / "npm", help="where fetched packages are kept")

    add = command("folder", "pictures with NAME.txt (one caption a line) or NAME.json beside them", out, found, captions)
    add("input", type=Path, metavar="DIR")
    add = command("webdataset", "tars with pictures and txt, caption or json members", out, found, captions)
    add("input", nargs="+", metavar="TAR")
    add = command("table", "CSV, TSV, JSONL, JSON or Parquet with pictures and captions", out, found, captions, rows)
    add("input", nargs="+", metavar="FILE")
    add("--image", default="image", metavar="COLUMN", help="path, bytes or base64 of the picture")
    add("--keep", nargs="+", default=[], metavar="COLUMN", help="store these too")
    add = command("conversations", "JSON or JSONL of LLaVA's form: questions and answers about pictures", out, found, rows)
    add("input", nargs="+", metavar="FILE")
    add = command(
        "text", 'JSONL or Parquet: {"text": ...}, or {"content": [{"text": ...} | {"image": PATH}, ...]}', out, found, rows
    )
    add("input", nargs="+", metavar="FILE")

    add = command(
        "index", "rebuild index.json and the columns of a data set from its tars", _common(None, None), _codec(), workers
    )
    add("directory", type=Path)
    add = command("verify", "compare shards and columns with their checksums, and with each other", workers)
    add("directory", type=Path)
    add("--tokenizer", help="the one that the data set was made with, if it is not in the directory")
    return parser


def _parent() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(add_help=False)


def _out() -> argparse.ArgumentParser:
    parser = _parent()
    parser.add_argument("--out", required=True, type=Path, default=argparse.SUPPRESS, help="directory to make")
    return parser


def _common(image_size: int | None, patch_size: int | None) -> argparse.ArgumentParser:
    parser = _parent()
    parser.add_argument("--image_size", type=int, default=image_size, help="pixels along each side")
    parser.add_argument(
        "--patch_size",
        type=int,
        default=patch_size,
        help="pixels along a token's side (shapes, emoji: 4, others: 16), or with --vae latents (1)",
    )
    parser.add_argument("--tokenizer", help="use this one (see data.tokenizer); else one is trained on the training texts")
    parser.add_argument(
        "--vocab_size", type=int, help="of a tokenizer trained here, at most; shapes 400, emoji 3072, others 8192"
    )
    return parser


def _codec() -> argparse.ArgumentParser:
    parser = _parent()
    parser.add_argument("--vae", type=Path, metavar="DIR", help="a diffusers AutoencoderKL, whose moments are stored")
    return parser


def _found() -> argparse.ArgumentParser:
    """Options of sources whose records are judged."""
    parser = argparse.ArgumentParser(add_help=False, parents=[_common(256, None), _codec(), _workers()])
    add = parser.add_argument
    add("--flip", action="store_true", help="store the moments of the mirrored pictures too")
    add("--keep_images", action="store_true", help="store the pixels beside the moments")
    add("--teacher", metavar="DIR|efficientnet_lite0", help="store this vision model's features, to align with")
    add("--validation", type=float, default=0.01, metavar="SHARE", help="held out, by a hash of the record's name or group")
    add("--min_size", type=int, default=0, metavar="PIXELS", help="drop pictures whose short side is shorter")
    add("--max_aspect", type=float, metavar="RATIO", help="drop pictures whose long side is longer than this times the short one")
    add("--keep_duplicates", action="store_true", help="keep pictures that show the same as one before them")
    add("--text_tokens", type=int, default=1024, help="cut plain texts into pieces of so many tokens")
    add("--samples_per_shard", type=int, default=4096, help="records in a tar")
    add("--encoder_batch", type=int, default=64, help="pictures given to --vae and --teacher at a time")
    return parser


def _workers() -> argparse.ArgumentParser:
    parser = _parent()
    parser.add_argument("--workers", type=int, default=_cores(), help="processes that read and decode; 0: this one does")
    return parser


def _captions() -> argparse.ArgumentParser:
    parser = _parent()
    add = parser.add_argument
    add(
        "--captions",
        nargs="+",
        default=["en=caption"],
        metavar="LANGUAGE=COLUMN",
        help="a text or a list; a language may come twice",
    )
    add("--language", default="en", help="of captions in text files")
    return parser


def _rows() -> argparse.ArgumentParser:
    parser = _parent()
    add = parser.add_argument
    add("--images", type=Path, metavar="DIR", help="what the pictures' paths are relative to; else to the file they stand in")
    add("--key", metavar="COLUMN", help="names the record; else rows are numbered")
    add("--group", metavar="COLUMN", help="records alike in this are held out together; else those of one picture's path")
    return parser


def _cores() -> int:
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def main() -> None:
    """Runs the command; a user's mistake ends in one sentence and exit code 1."""
    args = build_parser().parse_args()
    try:
        if report := run(args):
            print(report)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on from here")


def run(args: argparse.Namespace) -> str:
    """Makes, verifies or indexes a data set, and returns what to report."""
    if args.command == "verify":
        index, unchecked = verify(args.directory, tokenizer=args.tokenizer, workers=args.workers)
        counts = ", ".join(f"{index.count(split):,} {split}" for split in SPLITS)
        return f"{args.directory}: {len(index.shards)} shards are whole ({counts})" + "".join(f"; {line}" for line in unchecked)
    if args.command == "index":
        index = rebuild_index(args.directory, codec=_codec_for_index(args), tokenizer=args.tokenizer, workers=args.workers)
        return f"{args.directory}: indexed {len(index):,} samples in {len(index.shards)} shards"
    vocabulary = {} if args.vocab_size is None else {"vocab_size": args.vocab_size}
    if args.command in ("shapes", "emoji"):
        patches = PatchCodec(image_size=args.image_size, patch_size=args.patch_size)
        common = {"codec": patches, "tokenizer": args.tokenizer, **vocabulary}
        if args.command == "shapes":
            return str(make_shapes(args.out, train=args.train, validation=args.validation, seed=args.seed, **common))
        return str(make_emoji(args.out, cache=args.cache, skin_tones=args.skin_tones, **common))
    source = build_source(args)
    codec, encoders = build_encoders(args)
    recipe = Recipe(
        image_size=codec.image_size,
        validation=args.validation,
        min_size=args.min_size,
        max_aspect=args.max_aspect,
        deduplicate=not args.keep_duplicates,
        samples_per_shard=args.samples_per_shard,
        text_tokens=args.text_tokens,
        keep_pictures=args.keep_images or args.vae is None,
        encoder_batch=args.encoder_batch,
        **({"vocab_size": 8192} | vocabulary),
    )
    report = Preparation(
        out=args.out,
        source=source,
        codec=codec,
        recipe=recipe,
        tokenizer=args.tokenizer,
        encoders=encoders,
        workers=args.workers,
        rank=int(os.environ.get("RANK", "0")),
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
    ).run()
    return str(report) if report else ""


def build_source(args: argparse.Namespace) -> Source:
    """Where the records come from."""
    if args.command in ("conversations", "text"):
        return DocumentSource(args.input, kind=args.command, images=args.images, key=args.key, group=args.group)
    captions = CaptionFields.parse(args.captions)
    if args.command == "folder":
        return FolderSource(args.input, captions=captions, language=args.language)
    if args.command == "webdataset":
        return TarSource(args.input, captions=captions, language=args.language)
    return TableSource(
        args.input, captions=captions, image=args.image, images=args.images, key=args.key, group=args.group, keep=args.keep
    )


def build_encoders(args: argparse.Namespace) -> tuple[ImageCodec, list[Encoder]]:
    """The codec that the pictures are for, and what looks at them."""
    encoders: list[Encoder] = []
    if args.vae is not None or args.teacher is not None:
        from mmar_megatron import platform  # here and below, since torch takes seconds

        platform.choose_device()
    if args.vae is None:
        if args.flip or args.keep_images:
            raise ValueError("--flip and --keep_images say what to store of a VAE's moments: give --vae, or leave them out")
        codec: ImageCodec = PatchCodec(image_size=args.image_size, patch_size=args.patch_size or 16)
    else:
        from mmar_megatron.data.vae import MomentsEncoder, VAECodec

        codec = vae = VAECodec(args.vae, image_size=args.image_size, patch_size=args.patch_size or 1)
        encoders.append(MomentsEncoder(vae, flip=args.flip))
    if args.teacher is not None:
        from mmar_megatron.data.teacher import load_teacher

        encoders.append(load_teacher(args.teacher, grid_height=codec.grid_height, grid_width=codec.grid_width))
    return codec, encoders


def _codec_for_index(args: argparse.Namespace) -> ImageCodec | None:
    if args.image_size is None and args.patch_size is None and args.vae is None:
        return None
    if args.image_size is None:
        raise ValueError("--image_size is needed beside --patch_size or --vae: give all that the data set was made with")
    return build_encoders(argparse.Namespace(**vars(args), teacher=None, flip=False, keep_images=False))[0]


if __name__ == "__main__":
    main()
