"""One process of a group: loads imported checkpoints in several layouts and compares logits with those of transformers.

Arguments: directory with NAME/ (a checkpoint) and NAME.pt (`tokens_BS`, `logits_BSV`), JSON [[name, [options]], ...]. The last
stage prints the largest difference, relative to the largest logit, and what was not loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from mmar_megatron import parallel, platform
from mmar_megatron.config import parse_command_line
from mmar_megatron.data.batch import IGNORE
from mmar_megatron.data.codec import build_codec
from mmar_megatron.data.sequence import Document, assemble
from mmar_megatron.data.tokenizer import load_tokenizer
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.mmar_model import build_model
from mmar_megatron.training import checkpoint


def main() -> None:
    """One model in one layout after the other."""
    directory = Path(sys.argv[1])
    for name, options in json.loads(sys.argv[2]):
        path = directory / name
        # Another seed: whatever is not loaded is then not what was saved.
        config = parse_command_line(["--config", str(path / checkpoint.CONFIG), "--seed", "7", *options]).config
        groups = parallel.initialize(config.parallel)
        platform.seed_everything(config.seed, tensor_rank=groups.tensor.rank())
        assert config.data.tokenizer is not None
        tokenizer, codec = load_tokenizer(config.data.tokenizer), build_codec(config.data.codec)
        geometry = ImageGeometry.of(codec)
        model = build_model(config.model, geometry=geometry, vocab_size=tokenizer.vocab_size, groups=groups, seed=config.seed)
        engine = NativeEngine(config, chunks=model, groups=groups)
        report = checkpoint.load_weights(engine, checkpoint.resolve(path, groups=groups))

        expected = torch.load(path.with_suffix(".pt"))
        rows = [[Document(sample_id=0, tokens_L=row, labels_L=[IGNORE] * len(row))] for row in expected["tokens_BS"].tolist()]
        shape = (codec.num_tokens, codec.channels)
        batch = assemble(rows, sequence_length=len(rows[0][0].tokens_L), image_shape=shape, timestep_multiplier=1, pad_id=0)
        with engine.evaluating():
            h_SBD = engine.hidden_states(batch)
            if h_SBD is not None and engine.last_stage is not None:
                logits_BSV = expected["logits_BSV"]
                ours_BSV = engine.last_stage.text_logits(h_SBD.flatten(0, 1)).unflatten(0, h_SBD.shape[:2]).transpose(0, 1)
                difference = (ours_BSV[..., : logits_BSV.shape[-1]] - logits_BSV).abs().max() / logits_BSV.abs().max()
                found = {"difference": float(difference), "left": [*report.new, *report.unused]}
                print(json.dumps({" ".join((name, *options)): found}), flush=True)
        engine.close()
        parallel.destroy()
    parallel.leave()


if __name__ == "__main__":
    main()
