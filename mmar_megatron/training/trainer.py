"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mmar_megatron import platform
from mmar_megatron.config import CommandLine
from mmar_megatron.data.batch import Batch
from mmar_megatron.data.source import DataSource
from mmar_megatron.engine.base import Counts, Engine, StepResult
from mmar_megatron.engine.optimizer import learning_rate
from mmar_megatron.model.losses import NUM_BUCKETS, LossSums
from mmar_megatron.model.mmar_model import padded_vocab_size
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.scaling.expected import RowMeans
from mmar_megatron.scaling.flops import ModelShape, Peaks, StepCounts, step_flops
from mmar_megatron.scaling.split import max_repeated_layers
from mmar_megatron.training import checkpoint
from mmar_megatron.training.building import build_loader
from mmar_megatron.training.checkpoint import Progress
from mmar_megatron.training.guard import TooManyBadSteps, judge
from mmar_megatron.training.incidents import Incidents
from mmar_megatron.training.metrics import MetricsWriter, ProgressLine, Throughput
from mmar_megatron.training.previews import Previews, write_png
from mmar_megatron.training.profiling import Profile
from mmar_megatron.training.rank_times import RankTimes
from mmar_megatron.training.saving import CheckpointWriter, SaveError
from mmar_megatron.training.signals import StopRequest
from mmar_megatron.training.validation import Validation
from mmar_megatron.training.watchdog import Watchdog


class Trainer:
    """Brings a run from where it stands to its last step.

    Args:
        command: configuration, and the text of it that is kept with the run.
        engine: holds model and optimizer.
        source: the opened data.
        groups: process groups.
        watchdog: is told of each thing that may take long.
    """

    def __init__(
        self, command: CommandLine, *, engine: Engine, source: DataSource, groups: ParallelGroups, watchdog: Watchdog
    ) -> None:
        config = command.config
        self.config, self.engine, self.groups, self.watchdog = config, engine, groups, watchdog
        self.config_yaml = command.yaml
        self.run_dir = Path(config.run_dir)
        self.progress = self._restore(source.fingerprints)
        self.checkpoints = CheckpointWriter(
            config.checkpoint, run_dir=self.run_dir, config_yaml=self.config_yaml, groups=groups, say=self._say
        )
        self._counted = self.progress
        self._bad_samples = 0
        self.incidents = Incidents(self.run_dir, resume_step=self.progress.step, groups=groups, name_of=source.name_of)
        self.rank_times = RankTimes(groups)
        self.loader = build_loader(config, source=source, groups=groups, state=self.progress.stream)
        if cut := RowMeans.of(source, seed=config.seed).cut:
            self._say(f"{cut:.1%} of the documents are longer than data.sequence_length and lose their end")
        if self.loader.again:
            self._say(f"the settings of the data have changed: {self.loader.again} rows already read are planned and read anew")
        self.validation = Validation(config, source=source, groups=groups) if config.validation.every else None
        self.previews = Previews(config.preview, source=source, groups=groups, seed=config.seed) if config.preview.every else None
        self.shape = ModelShape.of(
            config.model,
            vocab_size=padded_vocab_size(config.model, source.tokenizer.vocab_size),
            tokens_per_image=source.codec.num_tokens,
            token_channels=source.codec.channels,
            condition_width=config.model.head.width,
        )
        self.repeated_layers = self._count_repeated_layers()
        self.microbatches = config.train.global_batch_size // (config.train.micro_batch_size * groups.data.size())
        self.profile = Profile(config.train.profile, run_dir=self.run_dir, models=engine.models, groups=groups)
        self._keep_config()

    # --- the loop ---------------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train until `train.steps`, or until a signal asks to stop; at the end validate, preview and save.

        Raises:
            BadDataError: too many images could not be decoded.
            TooManyBadSteps: `train.max_bad_steps` in a row were skipped.
        """
        config, total = self.config, self.config.train.steps
        writer = MetricsWriter(self.run_dir, resume_step=self.progress.step or None, enabled=self.groups.is_main)
        line = ProgressLine(first_step=self.progress.step, total_steps=total)
        throughput = Throughput(
            num_devices=torch.distributed.get_world_size(),
            peaks=Peaks.of(platform.device_name(), precision=config.precision, backbone=config.model.backbone),
        )
        counts_in_window = torch.zeros(3, device=platform.device())
        stop = None
        with StopRequest(self.groups) as request, closing(iter(self.loader)) as batches:
            self._catch_up(writer)
            while self.progress.step < total and stop is None:
                rate = learning_rate(self.progress.step, config=config.optimizer, total_steps=total)
                with self.profile.step(self.progress.step + 1):
                    result = self._step(batches, learning_rate=rate)
                counts_in_window += result.counts.to_tensor()
                step = self.progress.step

                stop = request.agreed()
                validate, preview, save = map(self._due, (config.validation.every, config.preview.every, config.checkpoint.every))
                # Validation and preview are left to the next start, for who sent the signal may not wait for them.
                self.progress = replace(self.progress, interrupted=stop is not None)
                if validate or step % config.train.log_every == 0 or step == total:
                    metrics = self._metrics(result, learning_rate=rate)
                    self._count(throughput, counts_in_window)
                    rates = throughput.report()
                    metrics |= rates | self.rank_times.report(step_time_s=rates["step_time_s"])
                    with throughput.paused():
                        metrics |= self._validate() if validate and stop is None else {}
                        writer.write(metrics, step=step)
                        writer.scalars(_bucket_scalars(result.sums) | self._epochs(), step=step)
                    self._say(line.line(metrics, step=step))
                    self._report_bad_samples()
                with throughput.paused():
                    if self.profile.due(step):
                        self._write_profile()
                    if preview and stop is None:
                        self._preview(writer)
                    self.checkpoints.poll()
                    if save or stop is not None:
                        writer.sync()
                        self._save()
            self._write_profile()
            self.watchdog.beat("waiting for checkpoints to be written")
            self.checkpoints.close()
        writer.close()
        if stop is not None:
            self._say(f"{stop.name}: {self.run_dir} stands at step {self.progress.step}; the same command goes on from there")
        else:
            self._say(f"{self.run_dir} stands at step {self.progress.step}, the last of train.steps {total}")

    def _catch_up(self, writer: MetricsWriter) -> None:
        """What was due at the step that is continued, where a signal left no time for it."""
        if not self.progress.interrupted:
            return
        if self._due(self.config.validation.every):
            writer.amend(self._validate(), step=self.progress.step)
        if self._due(self.config.preview.every):
            self._preview(writer)

    def _step(self, batches: Iterator[Batch], *, learning_rate: float) -> StepResult:
        """One step, and what is to be said if it was skipped."""
        step = self.progress.step + 1
        self.watchdog.beat(f"loading the data of step {step}")
        start = time.perf_counter()
        with self.profile.part("data"):
            microbatches = list(islice(batches, self.microbatches))
        loading_s = time.perf_counter() - start
        self.watchdog.beat(f"step {step}")
        verdict = partial(judge, recent_losses=self.progress.recent_losses, config=self.config.train)
        result = self.engine.train_step(microbatches, learning_rate=learning_rate, judge=verdict)
        self.rank_times.count(loading_s=loading_s, work_s=result.work_s)
        self._advance(result)
        if result.skipped is not None:
            figures = self._figures(result, learning_rate=learning_rate)
            self._say(self.incidents.report(result.skipped, figures, microbatches=microbatches, step=step))
            self._give_up_if_hopeless(microbatches)
        return result

    def _due(self, every: int) -> bool:
        return every > 0 and (self.progress.step % every == 0 or self.progress.step == self.config.train.steps)

    def _advance(self, result: StepResult) -> None:
        before, bad = self.progress, result.skipped is not None
        positions = self.config.train.global_batch_size * self.config.data.sequence_length
        self._filled = (self.loader.state.tokens - before.stream.tokens) / positions
        losses = before.recent_losses if bad else (*before.recent_losses, result.loss)
        self.progress = replace(
            before,
            step=before.step + 1,
            stream=self.loader.state,
            skipped_steps=before.skipped_steps + bad,
            bad_steps_in_a_row=before.bad_steps_in_a_row + 1 if bad else 0,
            recent_losses=losses[-self.config.train.spike_window :],
        )

    def _give_up_if_hopeless(self, microbatches: list[Batch]) -> None:
        bad_steps = self.progress.bad_steps_in_a_row
        if not 0 < self.config.train.max_bad_steps <= bad_steps:
            return
        path = self.incidents.diagnose(self.engine, microbatches=microbatches, progress=self.progress)
        try:
            self.checkpoints.flush()
        except SaveError as error:
            self._say(str(error))
        raise TooManyBadSteps(
            f"{bad_steps} steps in a row were skipped: {path} has samples, gradients and batches; "
            "mend the data, lower optimizer.lr, or raise train.max_bad_steps."
        )

    def _count_repeated_layers(self) -> int:
        """Of the whole model, those whose forward pass full recomputation repeats."""
        most = max_repeated_layers(self.config.model.backbone)
        own = sum(min(len(model.decoder.layers), most) for model in self.engine.models)
        of_stages = torch.tensor(own, device=platform.device())
        torch.distributed.all_reduce(of_stages, group=self.groups.pipeline)
        return int(of_stages)

    # --- reports ----------------------------------------------------------------------------------------------------------------

    def _metrics(self, result: StepResult, *, learning_rate: float) -> dict[str, float | None]:
        """Of this one step, so that a resumed run prints what an uninterrupted one does."""
        return {
            "consumed_samples": self.progress.stream.documents,
            "consumed_tokens": self.progress.stream.tokens,
            "filled_share": self._filled,
            **self._figures(result, learning_rate=learning_rate),
            "skipped_steps": self.progress.skipped_steps,
        }

    def _epochs(self) -> dict[str, float]:
        """How often each source was read, for TensorBoard; its window as a whole counts when it is done."""
        sizes = {opened.name: opened.index.count("train") for opened in self.loader.source.sets}
        return {f"epochs/{name}": self.progress.stream.places.get(name, 0) / size for name, size in sizes.items()}

    def _figures(self, result: StepResult, *, learning_rate: float) -> dict[str, float | None]:
        sums, counts = result.sums, result.counts
        figures: dict[str, float | None] = {
            "loss": result.loss,
            "loss_text": float(sums.text / counts.text) if counts.text else None,
            "loss_image": float(sums.image / counts.image) if counts.image else None,
        }
        if self.config.model.alignment_loss_weight > 0:
            figures["loss_alignment"] = float(sums.alignment / counts.alignment.clamp(min=1))
        return figures | {"grad_norm": result.grad_norm, "lr": learning_rate}

    def _validate(self) -> dict[str, float]:
        assert self.validation is not None
        self.watchdog.beat(f"validation at step {self.progress.step}")
        return self.validation.run(self.engine)

    def _count(self, throughput: Throughput, counts_in_window: Tensor) -> None:
        """Add the steps since the last report; the counts stay on the device until then."""
        counts = Counts.from_tensor(counts_in_window.cpu())
        now, before = self.progress, self._counted
        sequences = (now.step - before.step) * self.config.train.global_batch_size
        samples, tokens, images = (
            getattr(now.stream, name) - getattr(before.stream, name) for name in ("documents", "tokens", "images")
        )
        flops = step_flops(
            self.shape,
            StepCounts(
                sequences=sequences,
                sequence_length=self.config.data.sequence_length,
                images=images,
                labels=int(counts.text),
                masked=int(counts.image),
            ),
            repeated_layers=self.repeated_layers,
        )
        throughput.count(steps=now.step - before.step, samples=samples, tokens=tokens, flops=flops)
        counts_in_window.zero_()
        self._counted = self.progress

    def _write_profile(self) -> None:
        self.watchdog.beat(f"writing the profile at step {self.progress.step}")
        self.profile.close()

    def _report_bad_samples(self) -> None:
        """Say so when more samples could not be decoded; the loader stops the run when they are too many."""
        bad = {name: counts for name, counts in self.loader.counts.items() if counts.skipped}
        if (skipped := sum(counts.skipped for counts in bad.values())) > self._bad_samples:
            self._bad_samples = skipped
            named = ", ".join(f"{counts.skipped} of the {counts.read} samples of {name}" for name, counts in bad.items())
            last = self.loader.last_problem
            print(f"{named} read by rank {torch.distributed.get_rank()} could not be decoded; the last one: {last}", flush=True)

    def _preview(self, writer: MetricsWriter) -> None:
        assert self.previews is not None
        self.watchdog.beat(f"the preview at step {self.progress.step}")
        image_HW3 = self.previews.paint(self.engine)
        writer.image("samples", image_HW3, step=self.progress.step)
        if self.groups.is_main:
            write_png(self.run_dir / "previews" / f"step_{self.progress.step:08d}.png", image_HW3)

    # --- checkpoints ------------------------------------------------------------------------------------------------------------

    def _restore(self, fingerprints: Mapping[str, str]) -> Progress:
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
            checkpoint.check_fingerprints(found, fingerprints)
            progress = checkpoint.load(self.engine, found, groups=groups)
            self._say(f"continues {found} at step {progress.step}")
            if changed := checkpoint.changed_options(found, self.config_yaml):
                self._say(f"the configuration has changed since: {'; '.join(changed)}")
            return progress
        if init_from is not None:
            path = checkpoint.resolve(init_from, groups=groups, say=self._say)
            checkpoint.check_fingerprints(path, fingerprints)
            report = checkpoint.load_weights(self.engine, path, average=self.config.checkpoint.init_from_average)
            self._say(f"starts from the weights of {path}: {report}")
        return Progress(fingerprints=fingerprints)

    def _save(self) -> None:
        self.watchdog.beat(f"saving step {self.progress.step}")
        self.checkpoints.save(self.engine, progress=self.progress)

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
