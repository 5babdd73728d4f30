"""How many layers each piece of the pipeline has, and what its stages then compute.

A piece is what a stage runs at a time: all of its layers, or under the interleaved schedule one model chunk of them. Pieces are
numbered in the order of the layers, so of S stages number i % S has piece i. Beside layers, the first piece runs EmbeddingViT and
VisProjector, the last one the logits, PostProjector and the diffusion head.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from mmar_megatron.config import Config, TransformerConfig
from mmar_megatron.data.source import DataSource
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.scaling.expected import RowMeans, expected_counts, expected_flops
from mmar_megatron.scaling.flops import StepFlops


def split_pipeline(config: Config, source: DataSource) -> Config:
    """The configuration with `parallel.pipeline_split` in the form that megatron-core takes; to be done before a model is built.

    `auto` is replaced by the numbers of layers that it comes to for these data: a stage's work depends on vocabulary, images and
    captions. The numbers follow from the configuration and the index alone, so all ranks find the same.
    """
    split = config.parallel.pipeline_split
    if split == "even":
        return config
    if split == "auto":
        geometry = ImageGeometry.of(source.codec)
        counts = expected_counts(
            config,
            tokens_per_image=geometry.grid_height * geometry.grid_width,
            rows=RowMeans.of(source, seed=config.seed),
        )
        flops = expected_flops(config, counts, geometry=geometry, vocab_size=source.tokenizer.vocab_size)
        split = PipelineCosts.of(config, flops).balanced(config.model.backbone.num_layers)
    pieces = [["decoder"] * layers for layers in split]
    pieces[0].insert(0, "embedding")
    pieces[-1].append("loss")
    backbone = copy.copy(config.model.backbone)
    backbone.pipeline_model_parallel_layout = PipelineParallelLayerLayout(pieces, config.parallel.pipeline_model_parallel_size)
    return replace(
        config, model=replace(config.model, backbone=backbone), parallel=replace(config.parallel, pipeline_split=list(split))
    )


@dataclass(frozen=True, kw_only=True)
class PipelineCosts:
    """Operations of one step on all ranks of a stage together: forward, backward and recomputation."""

    stages: int
    pieces: int
    layer: int
    """Of a layer, without recomputation."""
    repeated_layer: int
    """Of the forward pass that recomputation repeats for a layer."""
    max_repeated: int
    """Layers of a piece, at most, for which it does."""
    before: int
    """Of what the first piece does before its layers."""
    after: int
    """Of what the last piece does after its layers."""

    @classmethod
    def of(cls, config: Config, flops: StepFlops) -> PipelineCosts:
        """In the layout of the configuration; `flops` are of its step."""
        layout, backbone = config.parallel, config.model.backbone
        # Tensor parallelism divides layers and logits, and deals out the head's rows; but each rank runs all of EmbeddingViT.
        whole_on_each_rank = flops.embedding_vit.total + flops.vis_projector.total
        return cls(
            stages=layout.pipeline_model_parallel_size,
            pieces=layout.pipeline_model_parallel_size * (layout.virtual_pipeline_model_parallel_size or 1),
            layer=flops.backbone.total // backbone.num_layers,
            repeated_layer=flops.backbone.forward // backbone.num_layers,
            max_repeated=max_repeated_layers(backbone),
            before=whole_on_each_rank * layout.tensor_model_parallel_size,
            after=flops.logits.total + flops.post_projector.total + flops.head.total,
        )

    def of_piece(self, number: int, *, layers: int) -> int:
        """Of piece `number`, if it has so many layers."""
        ends = (self.before if number == 0 else 0) + (self.after if number == self.pieces - 1 else 0)
        return ends + layers * self.layer + min(layers, self.max_repeated) * self.repeated_layer

    def of_stages(self, split: Sequence[int]) -> list[int]:
        """Of each stage, if its pieces have so many layers."""
        pieces = [self.of_piece(number, layers=layers) for number, layers in enumerate(split)]
        return [sum(pieces[stage :: self.stages]) for stage in range(self.stages)]

    def balanced(self, num_layers: int) -> list[int]:
        """Layers of each piece, such that stages differ least: the largest is as small as it can be, the smallest as large.

        Each piece that has nothing else to do gets a layer. The rest go one by one to the stage that has least to do, and there
        to the piece that has. While a layer costs the same wherever it is, no other way gives a smaller sum of any convex
        function of the stages' costs (Federgruen and Groenevelt, "The greedy procedure for resource allocation problems",
        Operations Research 34, 1986). That excludes `recompute_method: block` with pieces of fewer layers than it repeats; there
        the largest stage is within a layer of the smallest possible.
        """
        split = [int(0 < number < self.pieces - 1) for number in range(self.pieces)]
        for _ in range(num_layers - sum(split)):
            costs = self.of_stages(split)
            # Of equal ones the later: an earlier stage keeps the activations of more microbatches.
            stage = min(reversed(range(self.stages)), key=costs.__getitem__)
            piece = min(range(stage, self.pieces, self.stages), key=lambda number: self.of_piece(number, layers=split[number]))
            split[piece] += 1
        return split


def max_repeated_layers(backbone: TransformerConfig) -> int:
    """Layers of a piece whose forward pass full recomputation repeats: all (`uniform`), or the first of them (`block`)."""
    if backbone.recompute_granularity != "full":
        return 0
    return backbone.num_layers if backbone.recompute_method == "uniform" else backbone.recompute_num_layers
