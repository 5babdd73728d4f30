"""The visual path into the backbone: EmbeddingViT, VisProjector, 2-D positions.

Suffixes: M images, N tokens of an image, C channels of a latent, V width of EmbeddingViT, D width of the backbone, H heads,
E width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmar_megatron.model.selection import Selection


class PositionEmbedding2D(nn.Module):
    """Learned position of a token in the image grid: the sum of a row's and a column's embedding.

    They start as sines and cosines (as in MAE, arXiv 2111.06377), the row's in the first half of the channels and the column's
    in the second: neighbours are alike from the first step on.

    Args:
        scale: of the start; sines and cosines of amplitude 1 where it is 1.
    """

    def __init__(self, *, grid_height: int, grid_width: int, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.row = nn.Parameter(torch.empty(grid_height, width))
        self.column = nn.Parameter(torch.empty(grid_width, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew."""
        width = self.row.shape[1]
        half = width // 2
        self.row.copy_(F.pad(self.scale * sinusoids(len(self.row), width=half), (0, width - half)))
        self.column.copy_(F.pad(self.scale * sinusoids(len(self.column), width=width - half), (half, 0)))

    def forward(self) -> Tensor:
        """Embeddings of all tokens in raster order, [N, width]."""
        return (self.row[:, None] + self.column[None, :]).flatten(0, 1)


def sinusoids(length: int, *, width: int, max_period: float = 10000.0) -> Tensor:
    """The position encoding of "Attention is all you need" (arXiv 1706.03762), sines first, [length, width]."""
    frequencies = max_period ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angle.sin(), angle.cos()), dim=-1)[:, :width]


class ViTBlock(nn.Module):
    """A pre-norm transformer block (ViT, arXiv 2010.11929)."""

    def __init__(self, *, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, int(width * mlp_ratio))
        self.fc2 = nn.Linear(int(width * mlp_ratio), width)

    def forward(self, x_MNV: Tensor, *, bias_M1NN: Tensor) -> Tensor:
        """[M, N, V] -> the same; `bias_M1NN` is added to the attention's logits."""
        qkv_MN3HE = self.qkv(self.norm1(x_MNV)).unflatten(-1, (3, self.num_heads, -1))
        query_MHNE, key_MHNE, value_MHNE = qkv_MN3HE.permute(2, 0, 3, 1, 4)
        attended_MHNE = F.scaled_dot_product_attention(query_MHNE, key_MHNE, value_MHNE, attn_mask=bias_M1NN)
        x_MNV = x_MNV + self.proj(attended_MHNE.transpose(1, 2).flatten(2))
        return x_MNV + self.fc2(F.gelu(self.fc1(self.norm2(x_MNV))))


class EmbeddingViT(nn.Module):
    """Reads the clean, visible tokens of an image, which attend among themselves only: nothing of a masked one can leak."""

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        num_attention_heads: int,
        mlp_ratio: float,
        channels: int,
        grid_height: int,
        grid_width: int,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(channels, hidden_size)
        self.position = PositionEmbedding2D(grid_height=grid_height, grid_width=grid_width, width=hidden_size, scale=1.0)
        self.blocks = nn.ModuleList(
            ViTBlock(width=hidden_size, num_heads=num_attention_heads, mlp_ratio=mlp_ratio) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial weights of the linears."""
        self.apply(_initialize_linear)

    def forward(self, latents_MNC: Tensor, *, visible_MN: Tensor) -> Tensor:
        """[M, N, C] -> [M, N, V]. What comes out at a token that is not visible must not be used.

        In training all tokens are run over, so that shapes are fixed and nothing waits for the device; else the visible alone.
        """
        x_MNV = self.patch_embed(latents_MNC.to(self.patch_embed.weight.dtype)) + self.position()
        if self.training:
            return self._attend(x_MNV, visible_MN=visible_MN)
        visible = Selection(visible_MN)
        return visible.put_back(self._attend(visible.take(x_MNV), visible_MN=visible.there_BA))

    def _attend(self, x_MNV: Tensor, *, visible_MN: Tensor) -> Tensor:
        # Each token may also attend to itself: an image with no visible token would otherwise have empty softmax rows (NaN).
        itself_NN = torch.eye(visible_MN.shape[1], dtype=torch.bool, device=visible_MN.device)
        allowed_MNN = visible_MN[:, None, :] | itself_NN
        bias_M1NN = torch.zeros_like(allowed_MNN, dtype=x_MNV.dtype).masked_fill_(~allowed_MNN, float("-inf"))[:, None]
        for block in self.blocks:
            x_MNV = block(x_MNV, bias_M1NN=bias_M1NN)
        return self.norm(x_MNV)


class Projector(nn.Sequential):
    """Linear, GELU, linear: VisProjector into the backbone, and PostProjector out of it."""

    def __init__(self, *, in_features: int, out_features: int) -> None:
        super().__init__(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial weights."""
        self.apply(_initialize_linear)


def embed_images(
    latents_MNC: Tensor,
    *,
    visible_MN: Tensor,
    embedding_vit: EmbeddingViT,
    vis_projector: Projector,
    mask_embedding_D: Tensor,
    position: PositionEmbedding2D,
) -> Tensor:
    """What the backbone reads of images, [M, N, D]: features where a token is visible, else one learned vector; and its place."""
    features_MNV = embedding_vit(latents_MNC, visible_MN=visible_MN)
    return torch.where(visible_MN.unsqueeze(-1), vis_projector(features_MNV), mask_embedding_D) + position()


def _initialize_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases, as ViT and MAR have them."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
