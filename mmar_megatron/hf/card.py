"""The model card of an export: what the run was, how far it came, how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmar_megatron import platform
from mmar_megatron.config import Config
from mmar_megatron.training import manifest
from mmar_megatron.training.checkpoint import IMPORTED_FROM
from mmar_megatron.training.metrics import read_metrics

_USAGE = """```python
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(DIR, trust_remote_code=True)

# Text to image: uint8 pictures [H, W, 3]
latents = model.generate_images(**processor.to_paint(["a caption"]), guidance_scale=2.0, rounds=16, steps=25, seed=0)
pictures = processor.to_pictures(latents)

# Image to text
inputs = processor(["<image>"], images=[pictures[0]])
ids = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))

# A conversation about a picture
inputs = processor.converse([[{"role": "user", "content": "<image>What is this?"}]], images=[pictures[0]])

# Inpainting: draw the masked tokens anew, [B, N]
latents = processor.to_latents([pictures[0]])
redraw = torch.zeros(latents.shape[:2], dtype=torch.bool)
redraw[:, : latents.shape[1] // 2] = True
latents = model.generate_images(**processor.to_paint(["a caption"]), start_latents=latents, redraw=redraw)
```"""
_FRONT = """---
library_name: transformers
pipeline_tag: any-to-any
tags:
- mmar
- text-to-image
- image-to-text
- masked-autoregressive
---
"""
_SHOWN = {
    "val_loss_text": "text, cross-entropy (nats a token)",
    "val_loss_image": "image, diffusion loss",
    "val_loss_image_over_zero": "image, over that of predicting zero",
    "loss_text": "text in training",
    "loss_image": "image in training",
}


def model_card(checkpoint: Path, config: Config, *, average: bool) -> str:
    """README.md, with the metadata that the Hub reads.

    Args:
        checkpoint: its manifest, and the metrics of the run it lies in, are quoted.
        config: of the run.
        average: whether the weights are the moving average.
    """
    facts = manifest.read(checkpoint)
    step = facts["step"]
    sizes = config.model.backbone
    data = [source.path for source in config.data.sources.values()] or [config.data.path]
    codec = config.data.codec
    rows = [
        (
            "backbone",
            f"{sizes.num_layers} layers, {sizes.hidden_size} wide, {sizes.num_attention_heads} heads in "
            f"{sizes.num_query_groups} groups",
        ),
        (
            "diffusion head",
            f"{config.model.head.depth} x {config.model.head.width}, predicts "
            f"{config.model.diffusion.parameterization}, schedule {config.model.diffusion.schedule}",
        ),
        ("pictures", f"{codec.image_size} x {codec.image_size}, {codec.kind} codec"),
        *([("backbone from", facts[IMPORTED_FROM])] if IMPORTED_FROM in facts else []),
        *([("started from", Path(config.checkpoint.init_from).name)] if config.checkpoint.init_from else []),
        ("step", f"{step:,}" + (", moving average of the weights" if average else "")),
        ("tokens seen", f"{facts['stream']['tokens']:,}, among {facts['stream']['images']:,} images"),
        ("data", ", ".join(Path(path).name for path in data)),
        ("software", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
    ]
    metrics = _last_metrics(checkpoint, step=step)
    losses = [(title, f"{metrics[name]:.4f}") for name, title in _SHOWN.items() if isinstance(metrics.get(name), float)]
    of_weights = ", of the weights before averaging" if average else ""
    origin = "imported by" if IMPORTED_FROM in facts else "trained with"
    needs = "torch, transformers" + (", diffusers" if codec.kind == "vae" else "")
    parts = [
        f"{_FRONT}\n# MMAR model\n\nOne decoder that reads and writes text, and reads and paints images as continuous tokens; "
        f"{origin} MMAR-Megatron {platform.versions()['mmar_megatron']}.",
        f"## The run\n\n{_table(rows)}",
        f"## Last losses up to step {step:,}{of_weights}\n\n{_table(losses)}" if losses else "",
        f"## Use\n\nNeeds {needs}. The code ships with the weights, so that `trust_remote_code=True` is asked for; `DIR` is this "
        f"directory.\n\n{_USAGE}",
        "## Limits\n\nNot evaluated for safety or bias. It knows what its training data held, and no more.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _last_metrics(checkpoint: Path, *, step: int) -> dict[str, Any]:
    """The newest value of each metric up to a step; none where the checkpoint does not lie in a run's directory."""
    if checkpoint.parent.name != "checkpoints":
        return {}
    values: dict[str, Any] = {}
    for logged in read_metrics(checkpoint.parent.parent):
        if logged["step"] <= step:
            values |= {name: value for name, value in logged.items() if value is not None}
    if zero := values.get("val_loss_image_zero"):
        values["val_loss_image_over_zero"] = values["val_loss_image"] / zero
    return values
