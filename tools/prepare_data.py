"""Makes a data set: images and captions -> WebDataset shards, index and tokenizer.

    python tools/prepare_data.py shapes --out data/shapes
    python tools/prepare_data.py emoji  --out data/emoji
    python tools/prepare_data.py verify data/shapes

`shapes` draws its pictures and needs nothing. `emoji` fetches pinned npm packages (140 MB, once). `verify` compares every shard
with its checksum. The directory appears when it is complete.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmar_megatron.data.codec import PatchCodec
from mmar_megatron.data.emoji import make_emoji
from mmar_megatron.data.index import SPLITS
from mmar_megatron.data.prepare import make_shapes
from mmar_megatron.data.verify import verify

REPOSITORY = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", required=True, type=Path, default=argparse.SUPPRESS, help="directory to make")
    common.add_argument("--image_size", type=int, default=32, help="pixels along each side")
    common.add_argument("--patch_size", type=int, default=4, help="pixels along each side of a patch, which is one token")
    common.add_argument("--tokenizer", help="use this one (see data.tokenizer); else one is trained on the training captions")
    common.add_argument("--vocab_size", type=int, help="of the tokenizer trained here; shapes: 400, emoji: 3072")

    shapes = commands.add_parser("shapes", parents=[common], formatter_class=formatter, help="coloured shapes, drawn here")
    shapes.add_argument("--train", type=int, default=8000, help="number of training pictures")
    shapes.add_argument("--validation", type=int, default=512, help="number of held-out pictures")
    shapes.add_argument("--seed", type=int, default=0, help="other seeds give other pictures")

    emoji = commands.add_parser("emoji", parents=[common], formatter_class=formatter, help="Noto and Twemoji, with names")
    emoji.add_argument("--skin_tones", type=int, default=5, help="variants kept for each base emoji and style; 25: all")
    emoji.add_argument("--cache", type=Path, default=REPOSITORY / ".cache" / "npm", help="where fetched packages are kept")

    check = commands.add_parser("verify", help="compare the shards with their checksums")
    check.add_argument("directory", type=Path)
    return parser


def main() -> None:
    """Runs the command; a user's mistake ends in one sentence and exit code 1."""
    args = build_parser().parse_args()
    try:
        print(run(args))
    except ValueError as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> str:
    """Makes or verifies a data set, and returns what to report."""
    if args.command == "verify":
        index = verify(args.directory)
        counts = ", ".join(f"{index.count(split):,} {split}" for split in SPLITS)
        return f"{args.directory}: {len(index.shards)} shards are whole ({counts})"
    codec = PatchCodec(image_size=args.image_size, patch_size=args.patch_size)
    vocabulary = {} if args.vocab_size is None else {"vocab_size": args.vocab_size}
    if args.command == "shapes":
        report = make_shapes(
            args.out,
            codec=codec,
            train=args.train,
            validation=args.validation,
            seed=args.seed,
            tokenizer=args.tokenizer,
            **vocabulary,
        )
    else:
        report = make_emoji(
            args.out, codec=codec, cache=args.cache, skin_tones=args.skin_tones, tokenizer=args.tokenizer, **vocabulary
        )
    return str(report)


if __name__ == "__main__":
    main()
