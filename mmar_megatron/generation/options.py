"""Options that name a model, the same for all commands that open one. Imports nothing that takes long."""

from __future__ import annotations

import argparse
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds them; the values are for `model_options`."""
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="an export, a checkpoint, or a run: its newest checkpoint")
    add("--ema", action="store_true", help="of a checkpoint, the moving average of the weights")
    add("--dtype", choices=DTYPES, help="of the weights (default: as they are stored)")
    add("--tokenizer", metavar="PATH", help="of a checkpoint, where it is, if not where the run's configuration says")
    add("--vae", metavar="DIR", help="of a checkpoint, where it is, if not where the run's configuration says")


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `open_model`."""
    return {"path": args.model, "average": args.ema, "dtype": args.dtype, "tokenizer": args.tokenizer, "vae": args.vae}
