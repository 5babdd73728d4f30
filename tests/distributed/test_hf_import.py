"""Imported language models give transformers' logits, in any layout, and a run starts from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmar_megatron.data.prepare import make_shapes
from mmar_megatron.hf.importing import import_model
from tests.distributed.common import CODEC
from tests.distributed.launch import run_group
from tests.distributed.test_layouts import PP2, SP, TP2
from tests.unit.hf.pretrained import FAMILIES, IMAGES, TOKENS, save_pretrained

WORKER = Path(__file__).with_name("hf_import_worker.py")
LAYOUTS: list[tuple[str, list[str]]] = [
    *((name, options) for name in FAMILIES for options in ([], TP2)),
    ("qwen2", PP2),
    ("llama", [*TP2, *SP]),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME/ is the checkpoint, NAME.pt what transformers computes, hf/NAME the model."""
    folder = tmp_path_factory.mktemp("imported")
    for name in FAMILIES:
        model = save_pretrained(name, folder / "hf" / name, max_shard_size="20KB" if name == "llama3" else "5GB")
        import_model(folder / "hf" / name, folder / name, configs=[], options=IMAGES, write_config=folder / f"{name}.yaml")
        tokens_BS = torch.randint(TOKENS, (2, 64), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits_BSV = model(tokens_BS).logits[..., :TOKENS]
        torch.save({"tokens_BS": tokens_BS, "logits_BSV": logits_BSV}, folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="module")
def results(directory: Path) -> dict[str, dict[str, Any]]:
    """What the worker found, by family and layout."""
    output = run_group(WORKER, str(directory), json.dumps(LAYOUTS), nproc=2, timeout=240)
    return {k: v for line in output.splitlines() if line.startswith("{") for k, v in json.loads(line).items()}


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "options"), LAYOUTS)
def test_logits_are_transformers(name: str, options: list[str], results: dict[str, dict[str, Any]]) -> None:
    result = results[" ".join((name, *options))]
    assert result["left"] == []
    assert result["difference"] <= 1e-5


@pytest.mark.distributed
def test_a_run_starts_from_it(directory: Path, tmp_path: Path) -> None:
    hf, path = directory / "hf" / "qwen3", directory / "qwen3"
    data = tmp_path / "shapes"
    make_shapes(data, codec=CODEC, train=16, validation=8, tokenizer=str(hf), log=lambda _: None)
    arguments = ["--config", str(directory / "qwen3.yaml"), *IMAGES, "--data.path", str(data), "--run_dir", str(tmp_path / "run")]
    arguments += ["--train.steps", "1", "--train.micro_batch_size", "2", "--train.global_batch_size", "2", "--preview.every", "0"]
    arguments += ["--data.num_workers", "0", "--validation.samples", "4"]
    output = run_group("pretrain_mmar.py", *arguments, "--checkpoint.init_from", str(path), nproc=1, timeout=120)
    assert f"starts from the weights of {path}: " in output
    assert "new, which keep" not in output and "no place for" not in output
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 1
