"""Converts between models of Hugging Face and checkpoints of this package.

    python tools/convert_ckpt.py from-hf --hf models/Qwen2.5-0.5B --config mine.yaml --out models/start

makes a checkpoint that `checkpoint.init_from` loads in any layout.

    python tools/convert_ckpt.py to-hf --checkpoint runs/mine/checkpoints/step_00010000 --out models/mine --ema --dtype bfloat16
    python tools/convert_ckpt.py verify --checkpoint runs/mine/checkpoints/step_00010000 --hf models/mine --ema

makes a directory that transformers loads, and compares the two. `COMMAND --help` says more.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")

_FROM_HF = """\
A pretrained language model (Llama, Mistral, Qwen2, Qwen3), or an MMAR model that was exported from here, becomes a checkpoint.
The configuration is that of the run which will start from it: --config and --section.key VALUE as for pretrain_mmar.py.

    python tools/convert_ckpt.py from-hf --hf models/Qwen2.5-0.5B --config mine.yaml --out models/start \\
        --write-config models/start.yaml
    torchrun --nproc_per_node 8 pretrain_mmar.py --config mine.yaml --config models/start.yaml --checkpoint.init_from models/start

The data must be prepared with the model's tokenizer: tools/prepare_data.py --tokenizer models/Qwen2.5-0.5B.
"""

_TO_HF = """\
A checkpoint becomes a directory that anyone loads with torch and transformers:

    model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(DIR, trust_remote_code=True)

It appears when it is complete. docs/huggingface.md has what can be done with it.
"""
_VERIFY = """\
Compares every tensor and file of an export with its source. Exit code 1 where anything differs; the worst tensor is named.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line, one subcommand for each direction."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    subcommand = partial(commands.add_parser, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    _add_from_hf(subcommand("from-hf", help="a Hugging Face model -> a checkpoint", description=_FROM_HF))
    _add_to_hf(subcommand("to-hf", help="a checkpoint -> a Hugging Face model", description=_TO_HF))
    _add_verify(subcommand("verify", help="compare an export with its source", description=_VERIFY))
    return parser


def _add_from_hf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="the model: config.json, safetensors, tokenizer")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML; may be given several times")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the checkpoint to make")
    parser.add_argument(
        "--write-config", type=Path, metavar="FILE", help="YAML to make, with the model and the tokenizer; wins over --config"
    )
    parser.set_defaults(run=from_hf)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help="a step_XXXXXXXX, or a run: its newest")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    parser.add_argument("--tokenizer", metavar="PATH", help="where it is, if not where the run's configuration says")
    parser.add_argument("--vae", metavar="DIR", help="where it is, if not where the run's configuration says")


def _add_to_hf(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are stored)")
    parser.add_argument("--shard_gb", type=_gigabytes, default=5.0, help="most that a file of weights has (default: %(default)s)")
    parser.set_defaults(run=to_hf)


def _gigabytes(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a size above 0")
    return value


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="the export")
    parser.set_defaults(run=verify)


def from_hf(args: argparse.Namespace, options: list[str]) -> None:
    """Runs `from-hf`; `options` are the run's own."""
    from mmar_megatron.hf.importing import import_model  # here, since megatron-core takes seconds

    report = import_model(args.hf, args.out, configs=args.config, options=options, write_config=args.write_config, say=_say)
    print(f"{args.out}:\n{report}")


def to_hf(args: argparse.Namespace, options: list[str]) -> None:
    """Runs `to-hf`."""
    import torch

    from mmar_megatron.hf.exporting import export

    source = _opened(args, options, dtype=args.dtype and getattr(torch, args.dtype))
    export(source, args.out, shard_bytes=round(args.shard_gb * 1e9), say=_say)
    print(f"{args.out}: {source.path} as a Hugging Face model")


def verify(args: argparse.Namespace, options: list[str]) -> None:
    """Runs `verify`."""
    from mmar_megatron.hf.verifying import compare

    found = compare(_opened(args, options), args.hf, say=_say)
    print(found)
    if not found.equal:
        sys.exit(f"error: {args.hf} is not {args.checkpoint}: export it again")


def _opened(args: argparse.Namespace, options: list[str], **settings: Any) -> Any:
    from mmar_megatron.hf.exporting import open_checkpoint

    if options:
        raise ValueError(f"there is no option {options[0]}: see --help")
    return open_checkpoint(args.checkpoint, average=args.ema, tokenizer=args.tokenizer, vae=args.vae, say=_say, **settings)


def _say(line: str) -> None:
    print(line, flush=True)


def main(argv: list[str]) -> None:
    """Runs the command; a user's mistake ends in one sentence and exit code 1."""
    args, options = build_parser().parse_known_args(argv)
    from mmar_megatron import platform  # here, since torch takes seconds

    platform.prepare_for_megatron()
    run: Callable[[argparse.Namespace, list[str]], None] = args.run
    try:
        run(args, options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
