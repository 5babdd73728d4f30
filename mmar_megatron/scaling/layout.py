"""A configured run on a number of GPUs, in the numbers that its cost follows from."""

from __future__ import annotations

from dataclasses import dataclass

from mmar_megatron.config import Config
from mmar_megatron.scaling.flops import StepFlops
from mmar_megatron.scaling.footprint import Piece
from mmar_megatron.scaling.split import PipelineCosts


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Of a world whose size fits the configuration."""

    config: Config
    world_size: int
    split: tuple[int, ...]
    """Layers of each piece of the pipeline."""

    @classmethod
    def of(cls, config: Config, *, world_size: int, flops: StepFlops) -> Layout:
        """With the layers divided as `parallel.pipeline_split` says; `flops` are of a step."""
        split, costs = config.parallel.pipeline_split, PipelineCosts.of(config, flops)
        layers = config.model.backbone.num_layers
        if split == "even":
            split = [layers // costs.pieces] * costs.pieces
        elif split == "auto":
            split = costs.balanced(layers)
        return cls(config=config, world_size=world_size, split=tuple(split))

    @property
    def tensor(self) -> int:
        """Ranks that share each layer."""
        return self.config.parallel.tensor_model_parallel_size

    @property
    def stages(self) -> int:
        """Of the pipeline."""
        return self.config.parallel.pipeline_model_parallel_size

    @property
    def chunks(self) -> int:
        """On each stage."""
        return len(self.split) // self.stages

    @property
    def data(self) -> int:
        """Replicas."""
        return self.world_size // (self.tensor * self.stages)

    @property
    def microbatches(self) -> int:
        """In a step, of each replica."""
        return self.config.train.global_batch_size // (self.config.train.micro_batch_size * self.data)

    def pieces(self, stage: int) -> list[Piece]:
        """Of a stage, in the order of the layers."""
        pieces = [Piece(layers, first=k == 0, last=k == len(self.split) - 1) for k, layers in enumerate(self.split)]
        return pieces[stage :: self.stages]

    @property
    def weight_bytes(self) -> int:
        """Of a parameter, or an element of the hidden states."""
        return 4 if self.config.precision.dtype == "fp32" else 2

    @property
    def hidden_bytes(self) -> int:
        """Of a microbatch between two stages, on each of their ranks."""
        config = self.config
        positions = config.train.micro_batch_size * config.data.sequence_length
        whole = positions * config.model.backbone.hidden_size * self.weight_bytes
        return whole // self.tensor if config.parallel.sequence_parallel else whole

    @property
    def zero_stage(self) -> int | None:
        """None with the native engine."""
        return self.config.deepspeed.zero_stage if self.config.engine == "deepspeed" else None

    def describe(self) -> str:
        """In one line."""
        parallel, backbone = self.config.parallel, self.config.model.backbone
        words = [f"TP {self.tensor} x PP {self.stages} x DP {self.data}"]
        if self.chunks > 1:
            words.append(f"{self.chunks} chunks a stage")
        if parallel.sequence_parallel:
            words.append("SP")
        if self.zero_stage is not None:
            words.append(f"ZeRO {self.zero_stage}")
        if backbone.recompute_granularity == "full":
            words.append("recomputation")
        return ", ".join(words)
