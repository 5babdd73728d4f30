"""Checkpoints with random weights, as a run has them, made without one."""

from __future__ import annotations

from pathlib import Path

import torch

from mmar_megatron.data.codec import build_codec
from mmar_megatron.data.tokenizer import load_tokenizer
from mmar_megatron.engine.sharding import AVERAGE_PREFIX
from mmar_megatron.hf.exporting import heads_of, hugging_face_config, tensors_of
from mmar_megatron.hf.names import join, links
from mmar_megatron.hf.storage import TensorSpec, is_stacked, write_checkpoint
from mmar_megatron.training.checkpoint import Progress
from mmar_megatron.training.saving import facts_of
from tests.distributed.common import command

STEP = 4


def make_checkpoint(run_dir: Path, *options: str, data: Path, average: bool = False) -> Path:
    """The checkpoint of step `STEP` of a run; its average, where it has one, is the weights plus one.

    Weights differ from zero, and those of norms from one, which would hide what they do.
    """
    line = command(*options, data=data)
    tokenizer, codec = load_tokenizer(data), build_codec(line.config.data.codec)
    config = hugging_face_config(line.config, tokenizer=tokenizer, codec=codec)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(tensor.shape, generator=generator) * 0.1 + name.endswith("norm.weight")
        for name, tensor in tensors_of(config).items()
    }
    parts: dict[str, list[torch.Tensor]] = {}
    for link in links(state):
        parts.setdefault(link.ours, []).append(join(link, state, heads=heads_of(config)))
    tensors = {key: torch.stack(layers) if is_stacked(key) else layers[0] for key, layers in parts.items()}
    if average:
        tensors |= {AVERAGE_PREFIX + key: tensor + 1 for key, tensor in tensors.items()}
    progress = Progress(step=STEP, fingerprints={"tokenizer": tokenizer.fingerprint, "codec": codec.fingerprint})
    out = run_dir / "checkpoints" / f"step_{STEP:08d}"
    write_checkpoint(
        out,
        {key: TensorSpec(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()},
        lambda key, layer: tensors[key] if layer is None else tensors[key][layer],
        config_yaml=line.yaml,
        facts=facts_of(progress, engine="native", layout={}, average=average, config_yaml=line.yaml),
        say=lambda _: None,
    )
    return out
