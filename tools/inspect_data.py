"""One page that shows what is in a data set, or in a mix of them, and how a run reads it.

    python tools/inspect_data.py data/shapes --out report.html
    python tools/inspect_data.py s3://bucket/pictures --out report.html --sequence_length 512
    python tools/inspect_data.py --config run.yaml [--section.key VALUE ...] --out report.html

The page has counts, lengths, aspect ratios, how full the rows are, a contact sheet with captions, and rows of the training stream
position by position with their masks. It is one HTML file that fetches nothing. With `--config` and options as `pretrain_mmar.py`
takes them it shows what that run reads; a directory by itself is read with all of its languages.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mmar_megatron.config import parse_command_line
from mmar_megatron.data.inspection.facts import gather_set
from mmar_megatron.data.inspection.opening import open_directory, with_options
from mmar_megatron.data.inspection.page import Page, render
from mmar_megatron.data.inspection.plans import gather_stream
from mmar_megatron.data.inspection.views import RowViewer, gather_attention, gather_samples
from mmar_megatron.data.source import DataSource
from mmar_megatron.data.storage import StorageError
from mmar_megatron.model.attention import mixed_attention_allowed


def build_parser() -> argparse.ArgumentParser:
    """The command line, but for the options of a run."""
    # What is not among these options is DIR or belongs to a run. As an argument of its own, DIR would take the FILE of --config.
    parser = argparse.ArgumentParser(
        usage="inspect_data.py (DIR | --config FILE [--section.key VALUE ...]) --out HTML [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, type=Path, help="HTML file to write")
    parser.add_argument("--force", action="store_true", help="replace --out where it exists")
    parser.add_argument("--samples", type=int, default=24, help="of each data set on the contact sheet (default 24)")
    parser.add_argument("--rows", type=int, default=6, help="of the stream, position by position (default 6)")
    parser.add_argument("--sequence_length", type=int, help="of a row (default: the run's; of a DIR 128, or more for its images)")
    parser.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        help="as many documents in a row as fit (default: the run's; of a DIR yes)",
    )
    parser.add_argument("--tokenizer", help="of a DIR that holds none")
    parser.add_argument("--seed", type=int, help="of the stream (default: the run's)")
    return parser


def main(argv: list[str]) -> None:
    """Writes the page; a user's mistake ends in one sentence and exit code 1."""
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    begin = time.monotonic()
    try:
        if options.out.exists() and not options.force:
            raise ValueError(f"{options.out} exists: choose another --out, or replace it with --force")
        if not options.out.parent.is_dir():
            raise ValueError(f"there is no directory {options.out.parent}: make it, or choose another --out")
        source, seed = _open(options, rest)
        page = gather(source, seed=seed, samples=options.samples, rows=options.rows)
        html = render(page)
    except (ValueError, StorageError, OSError) as error:
        sys.exit(f"error: {error}")
    partial = options.out.with_name(f".{options.out.name}.unfinished")
    partial.write_text(html)
    partial.replace(options.out)
    print(summary(page))
    print(f"{options.out}: {len(html.encode()) / 1e6:.1f} MB, {time.monotonic() - begin:.1f} s")


def gather(source: DataSource, *, seed: int, samples: int, rows: int) -> Page:
    """All that the page shows.

    Args:
        source: the opened data sets, with the settings of the stream.
        seed: of the stream.
        samples: on each data set's contact sheet.
        rows: position by position.
    """
    sets, views = [], []
    for opened in source.sets:
        _progress(f"{opened.path}: counting {len(opened.index):,} samples")
        sets.append(gather_set(opened))
        _progress(f"{opened.path}: reading samples")
        views.append(gather_samples(source, opened, most=samples))
    _progress("planning rows")
    stream = gather_stream(source, seed=seed)
    _progress("reading rows")
    made, batch = RowViewer(source, seed=seed).rows(rows)
    return Page(
        title=" + ".join(facts.path for facts in sets),
        sets=sets,
        samples=views,
        stream=stream,
        rows=made,
        attention=gather_attention(made, batch, allowed=mixed_attention_allowed),
    )


def summary(page: Page) -> str:
    """The key figures, for the terminal."""
    lines = []
    for facts in page.sets:
        counts = ", ".join(f"{split.samples:,} {split.split}" for split in facts.splits)
        lines.append(f"{facts.path}: {counts}")
        lines += [
            f"  {histogram.name}: {histogram.mean:.1f} {histogram.unit}, at most {histogram.most:,.0f}"
            for histogram in [*facts.text_tokens, *([facts.lengths] if facts.lengths else [])]
        ]
    chosen = page.stream.chosen
    how = "packed" if chosen.packing else "one document a row"
    lines.append(
        f"rows of {chosen.sequence_length:,}, {how}: {chosen.used:.1%} of the positions used, {chosen.documents_per_row:.2f} "
        f"documents and {chosen.images_per_row:.2f} images a row, {chosen.cut:.1%} of the documents cut off"
    )
    return "\n".join(lines)


def _open(options: argparse.Namespace, rest: list[str]) -> tuple[DataSource, int]:
    """The data sets, and the seed of the stream."""
    if not rest:
        raise ValueError("nothing to look at: give the directory of a data set, or --config FILE")
    if not rest[0].startswith("-"):
        if rest[1:]:
            raise ValueError(
                f"{rest[1]} is not an option for a DIR: of a run with such options give --config FILE, without a DIR"
            )
        source = open_directory(
            rest[0],
            tokenizer=options.tokenizer,
            sequence_length=options.sequence_length,
            packing=options.packing is not False,
        )
        return source, options.seed or 0
    if options.tokenizer is not None:
        raise ValueError("--tokenizer is for a DIR: give --data.tokenizer beside --config")
    config = parse_command_line(rest).config
    data = with_options(config.data, sequence_length=options.sequence_length, packing=options.packing)
    return DataSource(data), config.seed if options.seed is None else options.seed


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
