"""Writes texts for pictures, with an export, a checkpoint or a run: captions, or answers to a question.

    python tools/caption.py --model runs/quickstart a.png pictures/ 'more/**/*.jpg'
    python tools/caption.py --model models/mine pictures/ --question "What is this?" --out answers.jsonl
    python tools/caption.py --model models/mine --input asked.jsonl --out answers.jsonl

Prints PATH<TAB>TEXT, line breaks within a text as blanks; or writes, with --out, lines {"images": [...], "text": ...}, where the
same command goes on after a stop, with inputs that have none yet.

Lines of --input are {"images": ["kite.png"]}, paths relative to the file, and, where wanted, "question" (of a conversation) or
"text" (to be gone on with), with <image> where each picture stands; a question without any comes behind its pictures. In the
output a text that was gone on with is "text_before".

Greedy texts (--temperature 0) do not depend on the batch. What is drawn follows from --seed and the first input of each batch: it
is the same again for the same inputs and --batch_size.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from mmar_megatron.generation.options import add_model_options, model_options


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("pictures", nargs="*", metavar="PICTURE", help="files, directories, or patterns in quotes")
    add("--input", type=Path, metavar="FILE.jsonl", help="in their place: pictures with questions or texts of their own")
    add_model_options(parser)
    add("--question", metavar="TEXT", help="ask this, as in a conversation (default: a plain caption)")
    add("--max_tokens", type=int, default=64, help="most that a text has (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0: the most likely word after word (default)")
    add("--top_p", type=float, default=1.0, help="draw from the most likely words of this probability (default: %(default)s)")
    add("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    add("--batch_size", type=int, default=8, help="inputs read at a time (default: %(default)s)")
    add("--out", type=Path, metavar="FILE.jsonl", help="write lines there, and print nothing")
    add("--skip_bad", action="store_true", help="leave out pictures that cannot be read, and count them (default: end there)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Reads the pictures."""
    from mmar_megatron.generation.opening import open_model  # here, since torch takes seconds
    from mmar_megatron.generation.reading import Reading, find_pictures, read, read_inputs
    from mmar_megatron.generation.texts import TextFile
    from mmar_megatron.progress import Progress

    if (args.input is None) == (not args.pictures):
        raise ValueError("give pictures, or else --input with a file that names them")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size is {args.batch_size}: give 1 or more")
    reading = Reading(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    reading.check()
    if args.input is not None:
        inputs = read_inputs(args.input, question=args.question)
    else:
        inputs = find_pictures(args.pictures, question=args.question)
    opened = open_model(**model_options(args))

    bad: list[str] = []

    def skip(reason: str) -> None:
        bad.append(reason)
        print(f"left out: {reason}", file=sys.stderr, flush=True)

    with ExitStack() as stack:
        file = None
        if args.out is not None:
            drawn = {"batch_size": args.batch_size} if args.temperature > 0 else {}
            settings = {**asdict(reading), **drawn, **opened.facts}
            file = stack.enter_context(TextFile(args.out, inputs=inputs, settings=settings))
        done = before = 0 if file is None else file.done
        progress = Progress.on_stderr(len(inputs), done=before, what="inputs")
        stack.callback(progress.close)
        found = read(
            opened,
            inputs,
            reading=reading,
            batch_size=args.batch_size,
            is_done=(lambda _: False) if file is None else file.has,
            on_bad=skip if args.skip_bad else None,
        )
        for number, text in found:
            if file is None:
                print(f"{' '.join(inputs[number].images)}\t{' '.join(text.split())}", flush=True)
            else:
                file.add(number, text)
            done += 1
            progress.at(done)
    left_out = f", {len(bad)} left out" if bad else ""
    there = f", {before} of them before" if before else ""
    print(f"{args.out or 'read'}: {done} of {len(inputs)} inputs{there}{left_out}", file=sys.stderr)


def main(argv: list[str]) -> None:
    """Runs the command; a user's mistake ends in one sentence and exit code 1."""
    args = build_parser().parse_args(argv)
    from mmar_megatron import platform  # here, since torch takes seconds

    platform.prepare_for_megatron()
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped" if args.out is None else "stopped: the same command goes on from here")


if __name__ == "__main__":
    main(sys.argv[1:])
