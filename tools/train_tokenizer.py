"""Trains a SentencePiece tokenizer (BPE with byte fallback, and MMAR's special tokens) on captions and other texts.

    python tools/train_tokenizer.py --data data/emoji --vocab_size 4096 --out tokenizer.model
    python tools/train_tokenizer.py --text captions.txt --vocab_size 8000 --out tokenizer.model

A data set must be prepared with the tokenizer it is read with: pass the new one to `tools/prepare_data.py --tokenizer`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmar_megatron.data.content import texts_in
from mmar_megatron.data.index import Index
from mmar_megatron.data.preparation.training_texts import pieces
from mmar_megatron.data.shards import ShardReader
from mmar_megatron.data.tokenizer import load_tokenizer, train_sentencepiece


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, metavar="DIR", help="the training texts of this data set")
    source.add_argument("--text", type=Path, metavar="FILE", help="the lines of this UTF-8 file")
    parser.add_argument("--vocab_size", type=int, default=4096, help="number of pieces (default: 4096)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the model to write")
    return parser


def main() -> None:
    """Runs the command; a user's mistake ends in one sentence and exit code 1."""
    args = build_parser().parse_args()
    try:
        print(run(args))
    except ValueError as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> str:
    """Trains and writes the tokenizer, and returns what to report."""
    if args.out.exists():
        raise ValueError(f"{args.out} exists: remove it or choose another --out")
    texts = texts_of(args.data) if args.data else read_lines(args.text)
    unfinished = args.out.with_name(f".{args.out.name}.unfinished")
    unfinished.write_bytes(train_sentencepiece(texts, vocab_size=args.vocab_size))
    unfinished.rename(args.out)
    tokenizer = load_tokenizer(args.out)
    mean = sum(len(tokenizer.encode(text)) for text in texts) / len(texts)
    return f"{args.out}: {tokenizer.vocab_size:,} pieces; {len(texts):,} texts of {mean:.1f} tokens on average"


def texts_of(directory: Path) -> list[str]:
    """All captions and texts of the training samples of a data set."""
    reader = ShardReader(directory, index=Index.load(directory), split="train")
    texts = (text for number in range(len(reader)) for text in texts_in(reader.metadata(number)))
    return [piece for text in texts for piece in pieces(text)]


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    if not file.is_file():
        raise ValueError(f"no text file at {file}")
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


if __name__ == "__main__":
    main()
