"""A page to try a model: paint round by round, change parts of a picture with the mouse, read pictures.

    python tools/demo.py --model runs/quickstart
    python tools/demo.py --model models/mine --port 8000

It is served to this machine alone, fetches nothing from elsewhere and reports to nobody; Ctrl-C ends it. It needs what
requirements-demo.txt names.
"""

from __future__ import annotations

import argparse
import signal
import sys

from mmar_megatron.demo.serving import address_of, is_private, keeping_to_itself, listen
from mmar_megatron.generation.options import add_model_options, model_options


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, which this machine alone reaches)")
    add("--port", type=int, default=7860, help="0: any that is free (default: %(default)s)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Opens the model and serves the page until it is stopped."""
    with listen(args.host, args.port) as listening, keeping_to_itself():
        if not is_private(listening):
            print(
                f"warning: at --host {args.host} other machines may reach this page, which asks for no password", file=sys.stderr
            )
        try:
            from mmar_megatron.demo.page import serve  # here, since it takes seconds, and the environment must be set
        except ModuleNotFoundError as error:
            raise ValueError(f"{error.name} is not installed: pip install -r requirements-demo.txt") from error
        from mmar_megatron.demo.studio import Studio
        from mmar_megatron.generation.opening import open_model

        studio = Studio(open_model(**model_options(args)))
        print(f"open {address_of(listening)} in a browser; Ctrl-C ends it", flush=True)
        serve(studio, listening=listening)


def main(argv: list[str]) -> None:
    """Runs the command; a user's mistake ends in one sentence and exit code 1."""
    args = build_parser().parse_args(argv)
    from mmar_megatron import platform  # here, since torch takes seconds

    platform.prepare_for_megatron()
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # the same tidy end for both, also in the background, where a shell ignores SIGINT
        signal.signal(number, signal.default_int_handler)
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


if __name__ == "__main__":
    main(sys.argv[1:])
