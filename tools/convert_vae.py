"""Converts an auto-encoder from the names of latent diffusion's original code to the directory that `data.codec.path` names.

    python tools/convert_vae.py kl16.ckpt      --out models/kl16     --scaling_factor 0.2325
    python tools/convert_vae.py ae.safetensors --out models/flux-vae --scaling_factor 0.3611 --shift_factor 0.1159
    python tools/convert_vae.py sd.ckpt        --out models/sd-vae   --scaling_factor 0.18215

The first is MAR's KL-16. What diffusers wrote needs no conversion.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmar_megatron.data.ldm import convert


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help=".safetensors, or what torch.save wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--scaling_factor", type=float, required=True, help="a token is (latent - shift) * scale")
    parser.add_argument("--shift_factor", type=float, default=0.0, help="(default: 0)")
    return parser


def main() -> None:
    """Runs the command; a user's mistake ends in one sentence and exit code 1."""
    args = build_parser().parse_args()
    try:
        model = convert(args.checkpoint, args.out, scaling_factor=args.scaling_factor, shift_factor=args.shift_factor)
    except ValueError as error:
        sys.exit(f"error: {error}")
    downscale = 2 ** (len(model.config.block_out_channels) - 1)
    print(f"{args.out}: {model.config.latent_channels} channels for {downscale} x {downscale} pixels")


if __name__ == "__main__":
    main()
