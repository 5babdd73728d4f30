"""One process of a group: in one layout after another gives what the model says to a batch, and saves a checkpoint of it.

Arguments: data directory, directory, JSON {name: [options]}. DIRECTORY/NAME is a run directory with a checkpoint of step 1, and
DIRECTORY/NAME.pt holds the batch with logits, conditions, losses, painted pictures and captions. Weights are stirred.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from einops import rearrange

from mmar_megatron import parallel
from mmar_megatron.config import CheckpointConfig
from mmar_megatron.data.batch import IGNORE
from mmar_megatron.diffusion.painting import ImageSampling
from mmar_megatron.inference.images import paint
from mmar_megatron.inference.text import caption
from mmar_megatron.training import checkpoint
from mmar_megatron.training.saving import CheckpointWriter
from tests.distributed.common import build, command, means
from tests.distributed.gradients import stir

CAPTIONS = ["a small red circle at the top left, on a white background", "a large blue cross"]
SAMPLINGS = (
    ImageSampling(rounds=4, steps=3, guidance_scale=2.0, sampler="ancestral", seed=7),
    ImageSampling(rounds=6, steps=3, guidance_scale=2.0, order="confidence", refresh_every=4, seed=7),
)


def main() -> None:
    """Layout after layout in the same processes."""
    data, directory, layouts = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    for name, options in layouts.items():
        line = command(*options, "--train.micro_batch_size=4", data=data)
        engine, loader, groups = build(line)
        stir(engine)
        batch = next(iter(loader))
        with engine.evaluating():
            losses = means(engine.evaluate([batch]))
            h_SBD = engine.hidden_states(batch)
            painted = [paint(engine, CAPTIONS, source=loader.source, groups=groups, sampling=sampling) for sampling in SAMPLINGS]
            captions = caption(engine, list(painted[0]), source=loader.source, groups=groups, max_tokens=6)
            if h_SBD is not None and engine.last_stage is not None:
                h_BSD = rearrange(h_SBD, "s b d -> b s d")
                said = {
                    "batch": asdict(batch),
                    "labelled": batch.labels_BS != IGNORE,
                    "logits": engine.last_stage.text_logits(h_BSD.flatten(0, 1)).view(*h_BSD.shape[:2], -1),
                    "conditions": engine.last_stage.image_condition(
                        h_BSD.flatten(0, 1)[batch.image_positions_MN[batch.masked_MN]]
                    ),
                    "losses": losses,
                    "painted": painted,
                    "captions": captions,
                }
                if groups.is_main:
                    torch.save(said, directory / f"{name}.pt")
        writer = CheckpointWriter(CheckpointConfig(), run_dir=directory / name, config_yaml=line.yaml, groups=groups, say=print)
        writer.save(engine, progress=checkpoint.Progress(step=1, fingerprints=loader.source.fingerprints))
        writer.close()
        engine.close()
        parallel.destroy()
    parallel.leave()


if __name__ == "__main__":
    main()
