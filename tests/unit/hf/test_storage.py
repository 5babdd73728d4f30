"""Checkpoints are read and written tensor by tensor, and are what a run's ranks would read and write together."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mmar_megatron.config import CheckpointConfig
from mmar_megatron.data.batch import Batch
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.hf import storage
from mmar_megatron.hf.storage import CheckpointReader, TensorSpec, write_checkpoint
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.training import checkpoint, manifest
from mmar_megatron.training.checkpoint import Progress
from mmar_megatron.training.saving import CheckpointWriter
from tests.unit.tiny import Documents, engine_of, weights
from tests.unit.training.test_saving import files_no_longer_than

OPTIONS = ["--optimizer.ema_decay=0.5", "--model.backbone.add_qkv_bias=true", "--model.tie_embeddings=false"]


class Saved(NamedTuple):
    engine: NativeEngine
    path: Path


@pytest.fixture(scope="module")
def saved(groups: ParallelGroups, coarse_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """An engine and the checkpoint that it saved after a step, which has made the average another one than the weights."""
    engine, run_dir = engine_of(groups, *OPTIONS), tmp_path_factory.mktemp("run")
    engine.train_step([batch_of(coarse_tokenizer)], learning_rate=1e-2)
    writer = CheckpointWriter(CheckpointConfig(), run_dir=run_dir, config_yaml="seed: 1\n", groups=groups, say=print)
    writer.save(engine, progress=Progress(step=1))
    writer.close()
    return Saved(engine, checkpoint.directory(run_dir, step=1))


def batch_of(tokenizer: Tokenizer) -> Batch:
    return Documents(tokenizer).mixed_batch()


def parameter(engine: NativeEngine, key: str, layer: int | None) -> Tensor:
    """What the model itself has of a checkpoint's tensor."""
    name = key if layer is None else key.replace("layers.", f"layers.{layer}.")
    name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    return weights(engine)[name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")]


def test_every_weight_is_read_layer_by_layer(saved: Saved) -> None:
    reader = CheckpointReader(saved.path)
    keys = [key for key in reader.tensors if not key.startswith("average.")]
    total = 0
    for key, layer in storage.pieces({key: reader.tensors[key] for key in keys}):
        tensor = reader.read(key, layer)
        assert torch.equal(tensor, parameter(saved.engine, key, layer)), key
        assert tensor.shape == (reader.tensors[key].shape if layer is None else reader.tensors[key].shape[1:])
        total += tensor.numel()
    assert total == sum(tensor.numel() for tensor in weights(saved.engine).values())


def test_average_is_read_under_its_own_names(saved: Saved) -> None:
    reader, average = CheckpointReader(saved.path), saved.engine.average
    assert average is not None
    assert sum(key.startswith("average.") for key in reader.tensors) * 2 == len(reader.tensors)
    of_parameter = {id(p): a for p, a in average.whole().items()}
    model = saved.engine.chunks[0].module
    key = "average.decoder.layers.mlp.linear_fc2.weight"
    expected = of_parameter[id(model.decoder.layers[2].mlp.linear_fc2.weight)]
    assert torch.equal(reader.read(key, 2), expected)
    assert not torch.equal(reader.read(key, 2), reader.read(key.removeprefix("average."), 2))


def test_stacked_tensor_is_read_as_a_whole_too(saved: Saved) -> None:
    reader, key = CheckpointReader(saved.path), "decoder.layers.mlp.linear_fc1.weight"
    assert torch.equal(reader.read(key), torch.stack([reader.read(key, layer) for layer in range(4)]))


def test_no_more_is_read_than_is_asked_for(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, loaded, load = CheckpointReader(saved.path), list[Tensor](), torch.load

    def noting(*args: Any, **options: Any) -> Tensor:
        loaded.append(load(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(torch, "load", noting)
    reader.read("decoder.layers.mlp.linear_fc1.weight", 3)
    assert sum(tensor.numel() for tensor in loaded) == 2 * 64 * 32


def test_what_is_no_checkpoint(tmp_path: Path, saved: Saved) -> None:
    with pytest.raises(ValueError, match=r"is no checkpoint .*: give a directory step_XXXXXXXX"):
        CheckpointReader(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match="makes no sense"):
        CheckpointReader(tmp_path)


def rewritten(saved: Saved, out: Path) -> Path:
    """The weights of a checkpoint, written anew."""
    reader = CheckpointReader(saved.path)
    tensors = {key: spec for key, spec in reader.tensors.items() if not key.startswith("average.")}
    write_checkpoint(out, tensors, reader.read, config_yaml="seed: 2\n", facts={"layout": {}}, say=lambda _: None)
    return out


@pytest.mark.parametrize("file_bytes", [4 * 10**9, 10_000])
def test_written_loads_as_a_runs_does(
    saved: Saved, groups: ParallelGroups, tmp_path: Path, file_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_FILE_BYTES", file_bytes)
    out = rewritten(saved, tmp_path / "made" / "weights")
    assert (len(list(out.glob("*.distcp"))) > 1) == (file_bytes < 10**6)
    assert [path.name for path in out.parent.iterdir()] == ["weights"]
    assert manifest.problems(out) == []
    assert set(manifest.read(out)["files"]) == {path.name for path in out.iterdir()} - {"manifest.json"}
    assert (out / "config.yaml").read_text() == "seed: 2\n"
    engine = engine_of(groups, *OPTIONS, "--seed=5")
    report = checkpoint.load_weights(engine, checkpoint.resolve(out, groups=groups))
    assert (report.new, report.unused) == ((), ())
    expected = weights(saved.engine)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(engine).items())


@pytest.mark.parametrize(("stored", "run"), [(torch.bfloat16, "fp32"), (torch.float16, "fp32"), (torch.float32, "bf16")])
def test_type_of_the_run_may_be_another(
    saved: Saved, groups: ParallelGroups, tmp_path: Path, stored: torch.dtype, run: str
) -> None:
    reader = CheckpointReader(saved.path)
    tensors = {key: TensorSpec(s.shape, stored) for key, s in reader.tensors.items() if not key.startswith("average.")}
    read = lambda key, layer: reader.read(key, layer).to(stored)  # noqa: E731
    write_checkpoint(tmp_path / "out", tensors, read, config_yaml="", facts={}, say=lambda _: None)
    engine = engine_of(groups, *OPTIONS, f"--precision.dtype={run}")
    checkpoint.load_weights(engine, tmp_path / "out")
    expected = weights(saved.engine)
    for name, tensor in weights(engine).items():
        assert torch.equal(tensor, expected[name].to(stored).to(tensor.dtype))


def test_existing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists: remove it or choose another --out"):
        write_checkpoint(tmp_path, {}, no_read, config_yaml="", facts={})


def test_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    tensors = {"a": TensorSpec((10**9, 10**9), torch.float32)}
    with pytest.raises(OSError, match=f"takes 4,000,000,000.00 GB, and {tmp_path} has .* GB left: make room"):
        write_checkpoint(tmp_path / "new" / "out", tensors, no_read, config_yaml="", facts={})
    assert list(tmp_path.iterdir()) == []


def no_read(key: str, layer: int | None) -> Tensor:
    raise AssertionError


def read_error(key: str, layer: int | None) -> Tensor:
    raise ValueError("unreadable")


def interrupt(key: str, layer: int | None) -> Tensor:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("read", "error"), [(read_error, ValueError), (interrupt, KeyboardInterrupt)])
def test_nothing_is_left_of_what_failed(
    tmp_path: Path, read: Callable[[str, int | None], Tensor], error: type[BaseException]
) -> None:
    with pytest.raises(error):
        write_checkpoint(tmp_path / "out", {"a": TensorSpec((3,), torch.float32)}, read, config_yaml="", facts={})
    assert list(tmp_path.iterdir()) == []


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        steps.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        steps.append(f"-> {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    with storage.all_or_nothing(tmp_path / "out", needed=0) as partial:
        (partial / "vae").mkdir()
        for name in ("a", "vae/b"):
            (partial / name).write_text(name)
    assert set(steps[:4]) == {"a", "vae", "b", partial.name}
    assert steps[4:] == ["-> out", tmp_path.name]


def test_a_part_that_is_not_there_is_missed(saved: Saved) -> None:
    """Else it would be whatever the memory held."""
    reader, key = CheckpointReader(saved.path), "embedding.word_embeddings.weight"
    stored = reader._stored[key]
    (chunk,) = stored.chunks
    stored.chunks = [replace(chunk, sizes=torch.Size((chunk.sizes[0] - 1, *chunk.sizes[1:])))]
    with pytest.raises(ValueError, match=r"lacks a part of embedding.word_embeddings.weight: give another one"):
        reader.read(key)


def test_of_a_larger_tensor_only_the_part_is_written(tmp_path: Path) -> None:
    """As of the one matrix in which a checkpoint has query, key and value."""
    part = torch.arange(100_000.0)[10:20]
    write_checkpoint(tmp_path / "out", {"a": TensorSpec((10,), torch.float32)}, lambda *_: part, config_yaml="", facts={})
    assert torch.equal(CheckpointReader(tmp_path / "out").read("a"), part)
    assert sum(file.stat().st_size for file in (tmp_path / "out").rglob("*")) < 20_000


def test_disk_that_fills_up_is_named(tmp_path: Path) -> None:
    tensors = {"a": TensorSpec((9000,), torch.float32)}
    with files_no_longer_than(10_000), pytest.raises(OSError, match="File too large"):
        write_checkpoint(tmp_path / "out", tensors, lambda *_: torch.ones(9000), config_yaml="", facts={})
    assert list(tmp_path.iterdir()) == []


def test_weights_alone_are_not_resumed(saved: Saved, groups: ParallelGroups, tmp_path: Path) -> None:
    path = tmp_path / "step_00000001"
    shutil.copytree(saved.path, path)
    facts = manifest.read(path)
    manifest.write(path, files=facts.pop("files"), facts={**facts, checkpoint.WEIGHTS_ONLY: True})
    with pytest.raises(ValueError, match=r"holds weights alone, which no run can continue: give it as checkpoint.init_from"):
        checkpoint.load(saved.engine, path, groups=groups)
