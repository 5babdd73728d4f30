"""The training loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mmar_megatron import platform
from mmar_megatron.config import CommandLine
from mmar_megatron.data.batch import Batch
from mmar_megatron.data.loader import TrainLoader
from mmar_megatron.engine.base import Counts, Engine, StepResult
from mmar_megatron.engine.optimizer import learning_rate
from mmar_megatron.model.losses import NUM_BUCKETS, LossSums
from mmar_megatron.model.mmar_model import padded_vocab_size
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.scaling.flops import ModelShape, StepCounts, peak_flops, step_flops
from mmar_megatron.training import checkpoint
from mmar_megatron.training.checkpoint import Progress
from mmar_megatron.training.metrics import MetricsWriter, ProgressLine, Throughput
from mmar_megatron.training.previews import Previews, write_png
from mmar_megatron.training.saving import CheckpointWriter
from mmar_megatron.training.validation import Validation


class Trainer:
    """Brings a run from where it stands to its last step.

    Args:
        command: configuration, and the text of it that is kept with the run.
        engine: holds model and optimizer.
        groups: process groups.
    """

    def __init__(self, command: CommandLine, *, engine: Engine, groups: ParallelGroups) -> None:
        config = command.config
        self.config, self.engine, self.groups = config, engine, groups
        self.config_yaml = command.yaml
        self.run_dir = Path(config.run_dir)
        self.progress = self._restore()
        self.checkpoints = CheckpointWriter(
            config.checkpoint, run_dir=self.run_dir, config_yaml=self.config_yaml, groups=groups, say=self._say
        )
        self._counted = self.progress.step
        self._bad_images = 0
        self.loader = TrainLoader(
            config.data,
            seed=config.seed,
            timestep_multiplier=config.model.head.timestep_multiplier,
            micro_batch_size=config.train.micro_batch_size,
            global_batch_size=config.train.global_batch_size,
            data_parallel_rank=groups.data.rank(),
            data_parallel_size=groups.data.size(),
            start_sample=self.progress.consumed_samples,
            pin_memory=platform.HAS_CUDA,
        )
        source = self.loader.source
        if config.model.alignment_loss_weight > 0 and source.assemble([None], timestep_multiplier=1).teacher_MNF is None:
            raise ValueError(f"{config.data.path} holds no teacher features: set model.alignment_loss_weight to 0.")
        self.validation = Validation(config, groups=groups) if config.validation.every else None
        self.previews = Previews(config.preview, source=source, groups=groups, seed=config.seed) if config.preview.every else None
        self.shape = ModelShape.of(
            config.model,
            vocab_size=padded_vocab_size(config.model, source.tokenizer.vocab_size),
            tokens_per_image=source.codec.num_tokens,
            token_channels=source.codec.channels,
            condition_width=config.model.head.width,
        )
        self.microbatches = config.train.global_batch_size // (config.train.micro_batch_size * groups.data.size())
        self._keep_config()

    # --- the loop ---------------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train until `train.steps`; at the end validate, preview and save."""
        config, total = self.config, self.config.train.steps
        writer = MetricsWriter(self.run_dir, resume_step=self.progress.step or None, enabled=self.groups.is_main)
        line = ProgressLine(first_step=self.progress.step, total_steps=total)
        throughput = Throughput(
            num_devices=torch.distributed.get_world_size(),
            peak_flops=peak_flops(platform.device_name(), dtype=config.precision.dtype),
        )
        counts_in_window = torch.zeros(3, device=platform.device())
        batches = iter(self.loader)
        while self.progress.step < total:
            rate = learning_rate(self.progress.step, config=config.optimizer, total_steps=total)
            result = self.engine.train_step(self._next(batches), learning_rate=rate)
            counts_in_window += result.counts.to_tensor()
            self._advance(result)
            step = self.progress.step

            validate, preview, save = map(self._due, (config.validation.every, config.preview.every, config.checkpoint.every))
            if validate or step % config.train.log_every == 0 or step == total:
                metrics = self._metrics(result, learning_rate=rate)
                self._count(throughput, counts_in_window)
                metrics |= throughput.report()
                with throughput.paused():
                    metrics |= self.validation.run(self.engine) if validate and self.validation else {}
                    writer.write(metrics, step=step)
                    writer.scalars(_bucket_scalars(result.sums), step=step)
                self._say(line.line(metrics, step=step))
                self._report_bad_images()
            with throughput.paused():
                if preview:
                    self._preview(writer)
                self.checkpoints.poll()
                if save:
                    self.checkpoints.save(self.engine, progress=self.progress)
        self.checkpoints.close()
        writer.close()
        self._say(f"{self.run_dir} stands at step {self.progress.step}, the last of train.steps {total}")

    def _due(self, every: int) -> bool:
        return every > 0 and (self.progress.step % every == 0 or self.progress.step == self.config.train.steps)

    def _next(self, batches: Iterator[Batch]) -> list[Batch]:
        return list(islice(batches, self.microbatches))

    def _advance(self, result: StepResult) -> None:
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            consumed_samples=self.progress.consumed_samples + self.config.train.global_batch_size,
            skipped_steps=self.progress.skipped_steps + result.skipped,
        )
        if result.skipped:
            self._say(f"step {self.progress.step}: the gradient norm is {result.grad_norm}; the step is skipped")

    # --- reports ----------------------------------------------------------------------------------------------------------------

    def _metrics(self, result: StepResult, *, learning_rate: float) -> dict[str, float | None]:
        """Of this one step, so that a resumed run prints what an uninterrupted one does."""
        model, sums, counts = self.config.model, result.sums, result.counts
        text, image = float(sums.text / counts.text.clamp(min=1)), float(sums.image / counts.image.clamp(min=1))
        loss = model.text_loss_weight * text + model.image_loss_weight * image
        alignment: dict[str, float | None] = {}
        if model.alignment_loss_weight > 0:
            alignment["loss_alignment"] = aligned = float(sums.alignment / counts.alignment.clamp(min=1))
            loss += model.alignment_loss_weight * aligned
        return {
            "consumed_samples": self.progress.consumed_samples,
            "consumed_tokens": self.progress.consumed_samples * self.config.data.sequence_length,
            "loss": loss,
            "loss_text": text,
            "loss_image": image,
            **alignment,
            "grad_norm": result.grad_norm,
            "lr": learning_rate,
            "skipped_steps": self.progress.skipped_steps,
        }

    def _count(self, throughput: Throughput, counts_in_window: Tensor) -> None:
        """Add the steps since the last report; the counts stay on the device until then."""
        counts = Counts.from_tensor(counts_in_window.cpu())
        steps = self.progress.step - self._counted
        samples = steps * self.config.train.global_batch_size
        flops = step_flops(
            self.shape,
            StepCounts(
                sequences=samples,
                sequence_length=self.config.data.sequence_length,
                images=samples,
                labels=int(counts.text),
                masked=int(counts.image),
            ),
        )
        throughput.count(steps=steps, samples=samples, tokens=samples * self.config.data.sequence_length, flops=flops.model)
        counts_in_window.zero_()
        self._counted = self.progress.step

    def _report_bad_images(self) -> None:
        """Say so when more images could not be decoded; the loader stops the run when they are too many."""
        read, skipped, _ = self.loader.counts
        if skipped > self._bad_images:
            self._bad_images = skipped
            print(f"{skipped} of the {read} images read by rank {torch.distributed.get_rank()} could not be decoded", flush=True)

    def _preview(self, writer: MetricsWriter) -> None:
        assert self.previews is not None
        image_HW3 = self.previews.paint(self.engine)
        writer.image("samples", image_HW3, step=self.progress.step)
        if self.groups.is_main:
            write_png(self.run_dir / "previews" / f"step_{self.progress.step:08d}.png", image_HW3)

    # --- checkpoints ------------------------------------------------------------------------------------------------------------

    def _restore(self) -> Progress:
        """Continue what is in the run directory, or begin, as `resume` and `checkpoint.init_from` say."""
        resume, init_from, groups = self.config.resume, self.config.checkpoint.init_from, self.groups
        if resume == "never" and self.run_dir.exists() and any(self.run_dir.iterdir()):
            raise ValueError(f"The run directory {self.run_dir} is not empty: choose another, or continue it with --resume auto.")
        found = None
        if resume == "auto":
            found = checkpoint.newest_good(self.run_dir, groups=groups, set_aside=True, say=self._say)
        elif resume != "never":
            found = checkpoint.resolve(resume, groups=groups, say=self._say)
        if found is not None:
            progress = checkpoint.load(self.engine, found, groups=groups)
            self._say(f"continues {found} at step {progress.step}")
            if changed := checkpoint.changed_options(found, self.config_yaml):
                self._say(f"the configuration has changed since: {'; '.join(changed)}")
            return progress
        if init_from is not None:
            path = checkpoint.resolve(init_from, groups=groups, say=self._say)
            report = checkpoint.load_weights(self.engine, path, average=self.config.checkpoint.init_from_average)
            self._say(f"starts from the weights of {path}: {report}")
        return Progress()

    def _keep_config(self) -> None:
        with self.groups.fail_together():
            if self.groups.is_main:
                self.run_dir.mkdir(parents=True, exist_ok=True)
                (self.run_dir / checkpoint.CONFIG).write_text(self.config_yaml)

    def _say(self, line: str) -> None:
        if self.groups.is_main:
            print(line, flush=True)


def _bucket_scalars(sums: LossSums) -> dict[str, float | None]:
    """The image loss by noise level and by mask ratio, for TensorBoard; None where the step had no such rows."""
    scalars: dict[str, float | None] = {}
    for name, total, count in (
        ("timestep", sums.image_by_timestep, sums.count_by_timestep),
        ("mask_ratio", sums.image_by_mask_ratio, sums.count_by_mask_ratio),
    ):
        for bucket, (value, rows) in enumerate(zip(total.tolist(), count.tolist(), strict=True)):
            label = f"loss_image_by_{name}/{bucket / NUM_BUCKETS:.3f}-{(bucket + 1) / NUM_BUCKETS:.3f}"
            scalars[label] = value / rows if rows else None
    return scalars
