"""The head's rows filled up to few numbers, and the head compiled: losses and gradients are those of it as it is.

On a CPU compiled by torch's tracer alone; tests/gpu has its kernels and CUDA graphs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmar_megatron.config_checks import validate_machine
from mmar_megatron.data.batch import Batch
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.model.losses import LossSums
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.parallel import ParallelGroups
from tests.unit.model.traced import traced
from tests.unit.tiny import Documents, N, R, build_tiny, config_of, stir

MULTIPLE = 8
FILLED = ["--model.head.row_multiple", str(MULTIPLE)]


@pytest.fixture
def batches(coarse_tokenizer: Tokenizer) -> list[Batch]:
    """With 6, 6 + 16 and no masked tokens beside labels."""
    documents = Documents(coarse_tokenizer)
    painted = documents.text_to_image([100, 101], masked=(1, 2, 5, 7, 8, 15), seed=1)
    told = documents.image_to_text([100, 101, 102, 103], seed=2)
    also_painted = documents.text_to_image([110], masked=range(N), seed=3)
    return [
        documents.batch(rows, sequence_length=50) for rows in ([[painted], [told]], [[painted, told], [also_painted]], [[told]])
    ]


def model_with(groups: ParallelGroups, *options: str) -> MMARModel:
    model = build_tiny(groups, *options)
    stir(model)
    return model


def learned(model: MMARModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """All sums, and the gradients of both losses."""
    model.zero_grad()
    sums = model(batch)
    assert isinstance(sums, LossSums)
    (sums.text + sums.image).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return sums.flatten(), gradients


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_filled_up_rows_teach_nothing(groups: ParallelGroups, batches: list[Batch]) -> None:
    plain, filled = model_with(groups), model_with(groups, *FILLED)
    rows: list[int] = []
    filled.diffusion_head.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for batch in batches:
        assert_same(learned(filled, batch), learned(plain, batch))
    assert [batch.num_masked for batch in batches] == [6, 22, 0]
    assert rows == [8, 24, 8]


@pytest.mark.parametrize(("options", "compiled"), [((), 1), (FILLED, 2)], ids=["any number of rows", "few numbers"])
def test_compiled_in_training_alone(options: list[str], compiled: int, groups: ParallelGroups, batches: list[Batch]) -> None:
    """Once for any number of rows, or once for each of 8 and 24; hooks see the head run, and its parameters have their names."""
    plain = model_with(groups, *options)
    with traced() as graphs:
        model = model_with(groups, *options, "--model.head.compile", "kernels")
        calls: list[int] = []
        model.diffusion_head.register_forward_hook(lambda module, args, output: calls.append(len(output)))
        assert dict(model.named_parameters()).keys() == dict(plain.named_parameters()).keys()
        with_rows = batches[:2]
        for batch in (*with_rows, *with_rows):
            assert_same(learned(model, batch), learned(plain, batch))
        assert len(graphs) == compiled
        assert len(calls) == 4

        model.eval()
        with torch.no_grad():
            model(batches[1])
            x_KRC = torch.zeros(5, R, model.diffusion_head.input_proj.in_features)
            model.denoise(x_KRC, timestep_KR=torch.zeros(5, R), z_KZ=torch.zeros(5, model.settings.head.width))
        assert len(graphs) == compiled


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compile graphs wants few numbers of rows: give model\.head\.row_multiple"):
        config_of("--model.head.compile", "graphs")
    with pytest.raises(ValueError, match=r"model\.head\.row_multiple is 0: it must be at least 1"):
        config_of("--model.head.row_multiple", "0")
    config = config_of("--model.head.compile", "graphs", *FILLED)
    validate_machine(config, compute_capability=(9, 0))
    with pytest.raises(ValueError, match=r"model\.head\.compile graphs needs a GPU: set it to off"):
        validate_machine(config, compute_capability=None)
