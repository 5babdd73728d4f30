"""Converts between models of Hugging Face and checkpoints of this package.

    python tools/convert_ckpt.py from-hf --hf models/Qwen2.5-0.5B --config examples/configs/stage1.yaml --out models/start \\
        --write-config models/start.yaml

makes a checkpoint that `checkpoint.init_from` loads in any layout. Run `from-hf --help` for more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

_FROM_HF = """\
A pretrained language model (Llama, Mistral, Qwen2, Qwen3), or an MMAR model that was exported from here, becomes a checkpoint.
The configuration is that of the run which will start from it: --config and --section.key VALUE as for pretrain_mmar.py.

    python tools/convert_ckpt.py from-hf --hf models/Qwen2.5-0.5B --config mine.yaml --out models/start \\
        --write-config models/start.yaml
    torchrun --nproc_per_node 8 pretrain_mmar.py --config mine.yaml --config models/start.yaml --checkpoint.init_from models/start

The data must be prepared with the model's tokenizer: tools/prepare_data.py --tokenizer models/Qwen2.5-0.5B.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line, one subcommand for each direction."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    subcommand = partial(commands.add_parser, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    _add_from_hf(subcommand("from-hf", help="a Hugging Face model -> a checkpoint", description=_FROM_HF))
    return parser


def _add_from_hf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="the model: config.json, safetensors, tokenizer")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML; may be given several times")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the checkpoint to make")
    parser.add_argument(
        "--write-config", type=Path, metavar="FILE", help="YAML to make, with the model and the tokenizer; wins over --config"
    )
    parser.set_defaults(run=from_hf)


def from_hf(args: argparse.Namespace, options: list[str]) -> None:
    """Runs `from-hf`; `options` are the run's own."""
    from mmar_megatron.hf.importing import import_model  # here, since megatron-core takes seconds

    report = import_model(args.hf, args.out, configs=args.config, options=options, write_config=args.write_config, say=_say)
    print(f"{args.out}:\n{report}")


def _say(line: str) -> None:
    print(line, flush=True)


def main(argv: list[str]) -> None:
    """Runs the command; a user's mistake ends in one sentence and exit code 1."""
    args, options = build_parser().parse_known_args(argv)
    run: Callable[[argparse.Namespace, list[str]], None] = args.run
    try:
        run(args, options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
