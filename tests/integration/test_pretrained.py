"""A real pretrained language model, SmolLM2-135M-Instruct: in, through a run that learns nothing, and out it is what it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmar_megatron.hf.modeling_mmar import MMARForCausalLM
from tests.distributed.launch import ROOT, run_group
from tests.packages import smollm2

IMAGE_PARTS = [
    *("--model.embedding_vit.num_layers", "1", "--model.embedding_vit.hidden_size", "32"),
    *("--model.embedding_vit.num_attention_heads", "2"),
    *("--model.head.depth", "1", "--model.head.width", "32", "--model.head.timestep_multiplier", "1"),
    *("--data.codec.image_size", "32", "--data.codec.patch_size", "8", "--data.sequence_length", "64"),
]
ONE_STEP = [
    *("--optimizer.lr", "0", "--train.steps", "1", "--train.micro_batch_size", "1", "--train.global_batch_size", "1"),
    *("--validation.every", "0", "--preview.every", "0"),
]
SHAPES = ["--patch_size", "8", "--train", "8", "--validation", "2"]
PASSAGES = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.",
    "Water boils at a lower temperature on a high mountain, because the pressure of the air is lower there.",
    "The mitochondrion is the part of a cell that turns food into energy.",
)
QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.", "What colour is a ripe banana?")

Models = tuple[Any, MMARForCausalLM, Path]
"""The original, what has come back of it, and where that lies."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder, original = tmp_path_factory.mktemp("pretrained"), smollm2()
    start, section, back = folder / "start", folder / "start.yaml", folder / "back"
    convert("from-hf", "--hf", original, "--out", start, "--write-config", section, *IMAGE_PARTS)
    run_tool("prepare_data.py", "shapes", "--out", folder / "shapes", "--tokenizer", original, *SHAPES)
    arguments = ["--config", str(section), *IMAGE_PARTS, *ONE_STEP, "--data.path", str(folder / "shapes")]
    arguments += [f"--checkpoint.init_from={start}", f"--run_dir={folder / 'run'}"]
    assert "57 tensors loaded" in run_group("pretrain_mmar.py", *arguments, nproc=1, timeout=240)
    convert("to-hf", "--checkpoint", folder / "run", "--out", back)
    assert "321 tensors compared, 321 equal to the bit" in convert("verify", "--checkpoint", start, "--hf", back)
    return AutoModelForCausalLM.from_pretrained(original).eval(), MMARForCausalLM.from_pretrained(back).eval(), back


def convert(*arguments: object) -> str:
    return run_tool("convert_ckpt.py", *arguments)


def run_tool(name: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_its_weights_are_the_same_to_the_bit(models: Models) -> None:
    with safe_open(smollm2() / "model.safetensors", "pt") as before, safe_open(models[2] / "model.safetensors", "pt") as after:
        names = list(before.keys())
        assert len(names) == 272
        for name in names:
            ours, theirs = after.get_tensor(name), before.get_tensor(name)
            assert torch.equal(ours[: len(theirs)], theirs), name


@torch.no_grad()
def test_it_keeps_its_perplexity(models: Models) -> None:
    original, model, _ = models
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    for passage in PASSAGES:
        ids_BS = tokenizer(passage, return_tensors="pt")["input_ids"]
        before, after = (perplexity(m(ids_BS).logits[..., : original.config.vocab_size], ids_BS) for m in (original, model))
        assert after == pytest.approx(before, rel=1e-5)
        assert after < 60  # of a language model, not of noise


def perplexity(logits_BSV: Tensor, ids_BS: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits_BSV[0, :-1], ids_BS[0, 1:]).exp())


def test_it_keeps_its_answers(models: Models) -> None:
    original, model, _ = models
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    options["eos_token_id"] = tokenizer.convert_tokens_to_ids("<|im_end|>")
    new_ids = list(range(original.config.vocab_size, model.config.vocab_size))
    answers = []
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        before = original.generate(**prompt, **options)
        assert torch.equal(model.generate(**prompt, **options, suppress_tokens=new_ids), before)
        answers.append(tokenizer.decode(before[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    assert "Paris" in answers[0]
