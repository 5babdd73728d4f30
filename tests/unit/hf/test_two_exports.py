"""Two exports in one process, of the same name and with other code: each runs its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from mmar_megatron.hf import exporting
from mmar_megatron.hf.exporting import export, open_checkpoint
from mmar_megatron.hf.shipping import shipped_code
from tests.unit.command_line import share_parser
from tests.unit.hf.checkpoints import make_checkpoint


def test_each_runs_its_own_code(coarse_shapes_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share_parser(monkeypatch)
    source = open_checkpoint(make_checkpoint(tmp_path / "run", data=coarse_shapes_dir))
    models = []
    for version in ("1", "2"):
        code = shipped_code()
        code["modeling_mmar.py"] += f"\n\nVERSION = {version}\n"
        monkeypatch.setattr(exporting, "shipped_code", lambda code=code: code)
        out = tmp_path / version / "model"
        export(source, out, say=lambda _: None)
        models.append(AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True))
    first, second = (type(model).forward.__globals__["VERSION"] for model in models)
    assert (first, second) == (1, 2)
