"""Stage 0: tokens and visible latents become one sequence.

Suffixes: B sequences, S positions, D width of the backbone, M images, N tokens of an image, C channels of a latent,
P places of images.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from einops import rearrange
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mmar_megatron.config import EmbeddingViTConfig
from mmar_megatron.data.batch import Batch
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.initialization import seeded
from mmar_megatron.model.vision import EmbeddingViT, PositionEmbedding2D, Projector, embed_images


class MultimodalEmbedding(MegatronModule):
    """Word embeddings at text; EmbeddingViT and VisProjector at visible image tokens; a learned embedding at hidden ones.

    All but the word embeddings is replicated over the tensor-parallel ranks and sees the same data there, so its gradients agree.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vit: EmbeddingViTConfig,
        geometry: ImageGeometry,
        vocab_size: int,
        tensor_group: ProcessGroup,
        seed: int,
    ) -> None:
        super().__init__(config=config)
        self.tensor_group = tensor_group
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size, config.hidden_size, init_method=config.init_method, config=config, tp_group=tensor_group
        )
        grid = {"grid_height": geometry.grid_height, "grid_width": geometry.grid_width}
        with seeded(seed, "embedding"):
            self.embedding_vit = EmbeddingViT(**asdict(vit), channels=geometry.channels, **grid)
            self.vis_projector = Projector(in_features=vit.hidden_size, out_features=config.hidden_size)
            self.mask_embedding = nn.Parameter(torch.randn(config.hidden_size) * config.init_method_std)
            self.position = PositionEmbedding2D(**grid, width=config.hidden_size, scale=config.init_method_std)

    def forward(self, batch: Batch) -> Tensor:
        """The backbone's input, [S, B, D] (under sequence parallelism this rank's [S / TP, B, D])."""
        text_BSD = self.word_embeddings(batch.tokens_BS)
        is_text_BS1 = (batch.span_ids_BS < 0).unsqueeze(-1)
        image_MND = embed_images(
            batch.latents_MNC,
            visible_MN=batch.visible_MN,
            embedding_vit=self.embedding_vit,
            vis_projector=self.vis_projector,
            mask_embedding_D=self.mask_embedding,
            position=self.position,
        )
        # Every token is added at its place; those that stand nowhere add zeros at the first: shapes are fixed, nothing waits for
        # the device. The conditional and the unconditional half of a painting show the same images, which are looked at once.
        places_PN = batch.image_positions_MN
        image_PND = image_MND.repeat(len(places_PN) // len(image_MND), 1, 1) * (places_PN >= 0).unsqueeze(-1)
        h = rearrange(text_BSD * is_text_BS1, "b s d -> (b s) d").index_add(
            0, places_PN.flatten().clamp(min=0), rearrange(image_PND, "p n d -> (p n) d")
        )
        h_SBD = rearrange(h, "(b s) d -> s b d", b=text_BSD.shape[0]).contiguous()
        if self.config.sequence_parallel:
            h_SBD = scatter_to_sequence_parallel_region(h_SBD, group=self.tensor_group)
        return h_SBD
