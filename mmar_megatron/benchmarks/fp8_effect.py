"""What bf16 and each recipe of FP8 do to a trained model: condition, prediction, losses and gradient, beside those of fp32.

Weights and held-out batches are the same for all. Passes are as in training, backward too, and no weight is changed. FP8 is
emulated (`fp8_emulation`) in the layers of a model in bf16, as it would be used.

Axes: K masked tokens, R noise levels, C channels, Z width of the condition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmar_megatron import platform
from mmar_megatron.benchmarks.fp8_emulation import E4M3, Emulation, Fp8Recipe, emulating
from mmar_megatron.config import Config, ModelConfig
from mmar_megatron.data.batch import LEARNED, Batch
from mmar_megatron.data.held_out import HeldOut, ValidationLoader
from mmar_megatron.data.source import DataSource
from mmar_megatron.engine.base import Counts
from mmar_megatron.engine.losses import weighted
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.progress import Progress
from mmar_megatron.training import checkpoint
from mmar_megatron.training.building import build_engine, build_loader
from mmar_megatron.training.reopening import one_process, reopen

RECIPES = {
    "tensorwise": Fp8Recipe(scaling="tensorwise"),
    "delayed": Fp8Recipe(scaling="delayed"),
    "delayed-1": Fp8Recipe(scaling="delayed", amax_history_len=1, amax_compute_algo="most_recent"),
    "blockwise": Fp8Recipe(scaling="blockwise", gradients=E4M3),
    "blockwise-hybrid": Fp8Recipe(scaling="blockwise"),
}
"""`delayed-1` looks back at one pass alone; `blockwise-hybrid` has gradients in E5M2."""
TASKS: tuple[Literal["text_to_image", "image_to_text"], ...] = ("text_to_image", "image_to_text")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of all batches in one number format, on the CPU."""

    z_KZ: Tensor
    v_KRC: Tensor
    loss_image: float
    loss_text: float
    gradients: dict[str, Tensor]
    """Of the weighted sum of both losses, fp32; mean over the batches."""


def measure_effect(
    run_dir: Path,
    *,
    recipes: Sequence[str] = tuple(RECIPES),
    layers_in_bf16: Sequence[str] = ("none", "ends"),
    samples: int = 240,
    warmup: int = 16,
    average: bool = False,
) -> dict[str, Any]:
    """Rows of errors, one for each number format.

    Args:
        run_dir: a run, or a checkpoint.
        recipes: of `RECIPES`.
        layers_in_bf16: which layers are spared, as `spared_layers` reads them.
        samples: held-out samples, each once for each task, in the run's own grid of mask ratios and noise levels.
        warmup: passes over training data that fill the histories of `delayed`.
        average: take the moving average of the weights in their place.

    Raises:
        ValueError: the run cannot be loaded, or something cannot be measured.
        OSError: something cannot be read.
    """
    path = checkpoint.resolve(run_dir)
    exact = reopen(path, "--precision.dtype", "fp32", "--model.backbone.recompute_granularity", "null", average=average)
    config, source = exact.config, exact.source
    layers = config.model.backbone.num_layers
    chosen = {name: spared_layers(name, layers=layers) for name in layers_in_bf16}
    if not source.validation_set.has_pairs:
        raise ValueError(
            f"{source.validation_set.path} holds no pictures with captions, so that there is no condition to measure."
        )
    engine = build_engine(one_process(path / checkpoint.CONFIG, "--precision.dtype", "bf16"), source=source, groups=exact.groups)
    checkpoint.load_weights(engine, path, average=average)
    batches = held_out_batches(config, source, samples=samples)
    before = training_batches(config, source, exact.groups, count=warmup)
    (reference,), (model,) = exact.engine.models, engine.models

    # Transformer Engine's delayed scaling is for all layers or none.
    variants = [
        (recipe, name, Emulation(recipe=RECIPES[recipe], layers_in_bf16=spared))
        for recipe in recipes
        for name, spared in chosen.items()
        if RECIPES[recipe].scaling != "delayed" or not spared
    ]
    progress = Progress.on_stderr((2 + len(variants)) * len(batches), what="passes")

    def run(of: MMARModel, emulation: Emulation | None) -> Outcome:
        with emulating([of], emulation) if emulation else nullcontext():
            if emulation and emulation.recipe.scaling == "delayed":
                outcome_of(of, before, settings=config.model)
            return outcome_of(of, batches, settings=config.model, progress=progress)

    expected, plain = run(reference, None), run(model, None)
    rows = [{"format": "bf16", "layers in bf16": "all", **errors(plain, expected=expected)}]
    for recipe, name, emulation in variants:
        rows.append({"format": recipe, "layers in bf16": name, **errors(run(model, emulation), expected=expected)})
    progress.close()
    return {
        "checkpoint": str(path),
        "parameters": sum(parameter.numel() for parameter in reference.parameters()),
        "layers": layers,
        "masked_tokens": len(expected.z_KZ),
        "loss_image_fp32": expected.loss_image,
        "loss_text_fp32": expected.loss_text,
        "rows": rows,
    }


def spared_layers(name: str, *, layers: int) -> frozenset[int]:
    """`none`, `ends` (the first and the last), or numbers from 0 with commas between.

    Raises:
        ValueError: there is no such layer.
    """
    if name == "none":
        return frozenset()
    if name == "ends":
        return frozenset({0, layers - 1})
    numbers = name.split(",")
    if not all(number.isdecimal() and int(number) < layers for number in numbers):
        raise ValueError(f"Layers are none, ends, or numbers from 0 to {layers - 1} with commas between, not {name}: change it.")
    return frozenset(map(int, numbers))


def held_out_batches(config: Config, source: DataSource, *, samples: int) -> list[Batch]:
    """Those of validation, half of each a task's, so that a pass is like one of training."""
    held_out, settings = HeldOut(source), config.validation
    halves = (
        ValidationLoader(
            held_out,
            seed=config.seed,
            timesteps=settings.timesteps,
            mask_ratios=settings.mask_ratios,
            samples=samples,
            micro_batch_size=-(-config.train.micro_batch_size // 2),
            task=task,
        )
        for task in TASKS
    )
    return [joined(first, second) for first, second in zip(*halves, strict=True)]


def joined(first: Batch, second: Batch) -> Batch:
    """The rows of both, and their images."""
    positions = first.tokens_BS.numel()
    placed_MN = torch.where(second.image_positions_MN < 0, -1, second.image_positions_MN + positions)
    second = replace(second, image_positions_MN=placed_MN)
    pairs = {f.name: (getattr(first, f.name), getattr(second, f.name)) for f in fields(Batch) if f.name not in LEARNED}
    both = {name: torch.cat(pair) for name, pair in pairs.items() if isinstance(pair[0], Tensor)}
    return Batch.of(causal=first.causal and second.causal, **both)


def training_batches(config: Config, source: DataSource, groups: ParallelGroups, *, count: int) -> list[Batch]:
    """The first of the run."""
    with closing(iter(build_loader(config, source=source, groups=groups))) as batches:
        return list(islice(batches, count))


def outcome_of(model: MMARModel, batches: Sequence[Batch], *, settings: ModelConfig, progress: Progress | None = None) -> Outcome:
    """Forward and backward over all batches, each as a step of its own; the gradient is the mean of theirs."""
    model.train()
    every = Counts.of(batches)
    parameters = dict(model.named_parameters())
    gradients = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    text = image = 0.0
    with recorded(model.post_projector) as z, recorded(model.diffusion_head) as v:
        for batch in (batch.to(platform.device()) for batch in batches):
            sums = model(batch)
            # Not `backward`, which would add to the buffers of the engine that holds the model.
            found = torch.autograd.grad(
                weighted(sums, Counts.of([batch]), settings=settings), list(parameters.values()), allow_unused=True
            )
            for total, gradient in zip(gradients.values(), found, strict=True):
                if gradient is not None:
                    total += gradient / len(batches)
            text, image = text + sums.text.item(), image + sums.image.item()
            if progress is not None:
                progress.add(1)
    return Outcome(
        z_KZ=torch.cat(z),
        v_KRC=torch.cat(v),
        loss_image=image / every.image.item(),
        loss_text=text / every.text.item(),
        gradients={name: gradient.cpu() for name, gradient in gradients.items()},
    )


@contextmanager
def recorded(module: nn.Module) -> Iterator[list[Tensor]]:
    """What it returns within, in fp32 on the CPU."""
    outputs: list[Tensor] = []
    hook = module.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach().float().cpu()))
    try:
        yield outputs
    finally:
        hook.remove()


def errors(found: Outcome, *, expected: Outcome) -> dict[str, float]:
    """Beside fp32: of z and v, relative to their root mean square; changes of the losses; cosine and error of the gradient."""
    gradient, reference = (torch.cat([g.flatten() for g in of.gradients.values()]).double() for of in (found, expected))
    return {
        "z error": relative_error(found.z_KZ, expected.z_KZ),
        "v error": relative_error(found.v_KRC, expected.v_KRC),
        "image loss": found.loss_image,
        "image loss change": found.loss_image / expected.loss_image - 1,
        "text loss": found.loss_text,
        "text loss change": found.loss_text / expected.loss_text - 1,
        "gradient cosine": float(gradient @ reference / (gradient.norm() * reference.norm())),
        "gradient error": relative_error(gradient, reference),
    }


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
