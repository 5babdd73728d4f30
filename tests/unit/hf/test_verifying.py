"""verify finds what differs: a bit of a tensor, a setting, a type that is not that of the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mmar_megatron.hf.exporting import Exportable, export, open_checkpoint
from mmar_megatron.hf.verifying import Comparison, compare
from tests.unit.command_line import share_parser
from tests.unit.hf.checkpoints import make_checkpoint

NORM = "model.norm.weight"


@pytest.fixture(scope="module", autouse=True)
def parser() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        share_parser(patch)
        yield


@pytest.fixture(scope="module")
def source(coarse_shapes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Exportable:
    return open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("run"), data=coarse_shapes_dir))


@pytest.fixture(scope="module")
def exported(source: Exportable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    export(source, out, say=lambda _: None)
    return out


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "model")


def found(source: Exportable, directory: Path) -> Comparison:
    return compare(source, directory, say=lambda _: None)


def change(directory: Path, name: str, **fields: Any) -> None:
    file = directory / name
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("config.json", {"qk_norm": True}),
        ("config.json", {"is_encoder_decoder": True}),
        ("config.json", {"dtype": "float16"}),
        ("generation_config.json", {"repetition_penalty": 9.0}),
        ("tokenizer_config.json", {"add_bos_token": True}),
        ("processor_config.json", {"image_size": 3}),
    ],
)
def test_a_setting_that_differs_or_is_added(
    name: str, fields: dict[str, Any], source: Exportable, exported: Path, copied: Path
) -> None:
    assert found(source, exported).equal
    change(copied, name, **fields)
    assert found(source, copied).files == [name]


def test_a_file_that_is_no_json(source: Exportable, copied: Path) -> None:
    (copied / "config.json").write_text("{")
    assert found(source, copied).files == ["config.json"]


def test_another_type_and_what_transformers_saves_are_no_difference(source: Exportable, exported: Path, tmp_path: Path) -> None:
    narrow = replace(source, dtype=torch.bfloat16)
    export(narrow, tmp_path / "narrow", say=lambda _: None)
    assert found(source, tmp_path / "narrow").equal
    again = shutil.copytree(exported, tmp_path / "again")
    AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).save_pretrained(again)
    assert found(source, again).equal


def _negated_zero(norm_D: Tensor) -> None:
    norm_D[3] = -0.0


def _last_bit(norm_D: Tensor) -> None:
    norm_D.view(torch.int32)[4] += 1


@pytest.mark.parametrize("spoil", [_negated_zero, _last_bit])
def test_a_bit(spoil: Callable[[Tensor], None], source: Exportable, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Exportable.tensors

    def with_odd_values(self: Exportable, link: Any) -> dict[str, Tensor]:
        tensors = original(self, link)
        if NORM in tensors:
            tensors[NORM][3], tensors[NORM][5] = 0.0, float("nan")
        return tensors

    monkeypatch.setattr(Exportable, "tensors", with_odd_values)
    state = load_file(copied / "model.safetensors")
    state[NORM][3], state[NORM][5] = 0.0, float("nan")
    save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    assert found(source, copied).equal
    spoil(state[NORM])
    save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    assert [*found(source, copied).different] == [NORM]


@pytest.mark.parametrize("name", ["chat_template.jinja", "adapter_config.json", "tokenizer.model"])
def test_a_file_that_changes_what_is_loaded(name: str, source: Exportable, copied: Path) -> None:
    (copied / "notes.txt").write_text("Anybody may add these.")
    assert found(source, copied).equal
    (copied / name).write_text("{}")
    assert found(source, copied).files == [name]
