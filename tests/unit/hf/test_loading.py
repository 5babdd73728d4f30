"""A run, its checkpoint and an export of it are the same model to paint and read with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmar_megatron.hf.exporting import export, open_checkpoint
from mmar_megatron.hf.loading import load_model
from tests.unit.hf.checkpoints import make_checkpoint


def test_from_wherever_it_is_the_same_model(coarse_shapes_dir: Path, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "run", data=coarse_shapes_dir)
    export(open_checkpoint(path), tmp_path / "hf", say=lambda _: None)
    found = []
    for place in (tmp_path / "run", path, tmp_path / "hf"):
        model, processor = load_model(place)
        assert not model.training
        assert model.lm_head.weight is model.model.embed_tokens.weight
        latents = model.generate_images(**processor.to_paint(["a red circle"]), rounds=2, steps=2)
        inputs = processor(["<image>"], images=list(processor.to_pictures(latents)))
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        found.append((latents, ids, model.state_dict()))
    for latents, ids, weights in found[1:]:
        assert weights.keys() == found[0][2].keys()
        assert all(torch.equal(weight, found[0][2][name]) for name, weight in weights.items())
        # Weights of a file lie in memory as they do in it, and products of what begins elsewhere may differ in the last bit.
        torch.testing.assert_close(latents, found[0][0], rtol=1e-5, atol=1e-5)
        assert torch.equal(ids, found[0][1])


def test_average_and_type(coarse_shapes_dir: Path, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "run", "--model.tie_embeddings", "false", data=coarse_shapes_dir, average=True)
    plain, _ = load_model(path)
    average, _ = load_model(path, average=True, dtype=torch.bfloat16)
    assert average.dtype is torch.bfloat16
    torch.testing.assert_close(average.lm_head.weight.float(), plain.lm_head.weight + 1, rtol=2**-7, atol=0)


def test_what_cannot_be_loaded_is_told(coarse_shapes_dir: Path, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "run", data=coarse_shapes_dir)
    export(open_checkpoint(path), tmp_path / "hf", say=lambda _: None)
    with pytest.raises(ValueError, match="hf is an export, which has its weights, tokenizer and codec: leave out --ema"):
        load_model(tmp_path / "hf", average=True)
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="hf is not a whole export"):
        load_model(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"config.json is of a llama model: give an export, a checkpoint or a run"):
        load_model(tmp_path / "hf")
    with pytest.raises(ValueError, match="no checkpoint at"):
        load_model(tmp_path / "nothing")
