"""The model and its training step in plain PyTorch: what the engine's step is held against.

It computes what `MMARModel` and `NativeEngine` do, as one would write it for one device with nothing else in mind. EmbeddingViT,
the projectors and the diffusion head are plain PyTorch already, and are the model's own.

Suffixes: B sequences, S positions, D width of the backbone, H heads, G key-value groups, P heads of a group, E width of a head,
L labelled positions, K masked tokens, R noise levels for each, M images, N tokens of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
import torch.nn.functional as F
from einops import rearrange
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mmar_megatron import platform
from mmar_megatron.config import ModelConfig, OptimizerConfig
from mmar_megatron.data.batch import IGNORE, Batch
from mmar_megatron.diffusion.conditional import denoising_loss
from mmar_megatron.engine.optimizer import decays
from mmar_megatron.model.attention import mixed_attention_allowed
from mmar_megatron.model.head import DiffusionHead
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.model.rotary import inverse_frequencies
from mmar_megatron.model.vision import EmbeddingViT, PositionEmbedding2D, Projector, embed_images


class PlainAttention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.width = config.num_attention_heads, config.num_query_groups, config.kv_channels
        self.qkv = nn.Linear(config.hidden_size, (self.heads + 2 * self.groups) * self.width, bias=False)
        self.proj = nn.Linear(self.heads * self.width, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, *, allowed_B1SS: Tensor, cos_B1SE: Tensor, sin_B1SE: Tensor) -> Tensor:
        """[B, S, D] -> the same."""
        # Each group's queries, its key, its value.
        qkv_BGPSE = rearrange(self.qkv(x_BSD), "b s (g p e) -> b g p s e", g=self.groups, e=self.width)
        query_BHSE = _rotated(qkv_BGPSE[:, :, :-2].flatten(1, 2), cos=cos_B1SE, sin=sin_B1SE)
        key_BGSE = _rotated(qkv_BGPSE[:, :, -2], cos=cos_B1SE, sin=sin_B1SE)
        attended_BHSE = F.scaled_dot_product_attention(
            query_BHSE, key_BGSE, qkv_BGPSE[:, :, -1], attn_mask=allowed_B1SS, enable_gqa=True
        )
        return self.proj(rearrange(attended_BHSE, "b h s e -> b s (h e)"))


def _rotated(x: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class PlainBlock(nn.Module):
    """A pre-norm layer as Llama has it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = PlainAttention(config)
        self.norm2 = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, *, allowed_B1SS: Tensor, cos_B1SE: Tensor, sin_B1SE: Tensor) -> Tensor:
        """[B, S, D] -> the same."""
        x_BSD = x_BSD + self.attention(self.norm1(x_BSD), allowed_B1SS=allowed_B1SS, cos_B1SE=cos_B1SE, sin_B1SE=sin_B1SE)
        gate, up = self.fc1(self.norm2(x_BSD)).chunk(2, dim=-1)
        return x_BSD + self.fc2(F.silu(gate) * up)


class PlainModel(nn.Module):
    """The whole model with the weights of another.

    Args:
        config: the model's section.
        model: of one process, whose shapes and weights are taken over.

    Raises:
        ValueError: it has a part that this one lacks.
    """

    def __init__(self, config: ModelConfig, model: MMARModel) -> None:
        super().__init__()
        backbone, vit, head = config.backbone, config.embedding_vit, config.head
        self.settings, self.schedule, self.parameterization = config, model.schedule, model.parameterization
        embedding = model.embedding
        channels = embedding.embedding_vit.patch_embed.in_features
        grid = {"grid_height": len(embedding.position.row), "grid_width": len(embedding.position.column)}
        self.words = nn.Embedding(len(embedding.word_embeddings.weight), backbone.hidden_size)
        self.embedding_vit = EmbeddingViT(**asdict(vit), channels=channels, **grid)
        self.vis_projector = Projector(in_features=vit.hidden_size, out_features=backbone.hidden_size)
        self.mask_embedding = nn.Parameter(torch.empty(backbone.hidden_size))
        self.position = PositionEmbedding2D(**grid, width=backbone.hidden_size, scale=1.0)
        self.blocks = nn.ModuleList(PlainBlock(backbone) for _ in range(backbone.num_layers))
        self.norm = nn.RMSNorm(backbone.hidden_size, eps=backbone.layernorm_epsilon)
        self.output = nn.Linear(backbone.hidden_size, len(self.words.weight), bias=False)
        if config.tie_embeddings:
            self.output.weight = self.words.weight
        self.post_projector = Projector(in_features=backbone.hidden_size, out_features=head.width)
        self.diffusion_head = DiffusionHead(depth=head.depth, width=head.width, channels=channels, condition_width=head.width)
        self.to(platform.device())
        self._take_over(model)

    @torch.no_grad()
    def _take_over(self, model: MMARModel) -> None:
        own = dict(self.named_parameters())
        theirs = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        if further := sorted(theirs.keys() ^ own.keys()):
            raise ValueError(f"the model in plain PyTorch has no {further[0]}: leave out the option that adds it")
        for name, parameter in own.items():
            parameter.copy_(theirs[name])
        # By the other's names, which the rule is made of.
        self.decayed = {plain_name(name) for name, parameter in model.named_parameters() if decays(name, parameter)}

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sums over a microbatch: cross-entropies over labelled positions, squared errors over masked tokens."""
        allowed_B1SS = mixed_attention_allowed(document_ids_BS=batch.document_ids_BS, span_ids_BS=batch.span_ids_BS).unsqueeze(1)
        cos_B1SE, sin_B1SE = self._turns(batch.position_ids_BS)
        x_BSD = self._embed(batch)
        for block in self.blocks:
            x_BSD = block(x_BSD, allowed_B1SS=allowed_B1SS, cos_B1SE=cos_B1SE, sin_B1SE=sin_B1SE)
        x_BSD = self.norm(x_BSD)
        labelled_BS = batch.labels_BS != IGNORE
        logits_LV = self.output(x_BSD[labelled_BS]).float()
        text = F.cross_entropy(logits_LV, batch.labels_BS[labelled_BS], reduction="sum")
        h_KD = x_BSD.flatten(0, 1)[batch.image_positions_MN[batch.masked_MN]]
        return text, self._image_loss(h_KD, batch=batch)

    def _embed(self, batch: Batch) -> Tensor:
        image_MND = embed_images(
            batch.latents_MNC,
            visible_MN=batch.visible_MN,
            embedding_vit=self.embedding_vit,
            vis_projector=self.vis_projector,
            mask_embedding_D=self.mask_embedding,
            position=self.position,
        )
        there_MN = batch.image_positions_MN >= 0
        x_TD = self.words(batch.tokens_BS).flatten(0, 1)
        x_TD = x_TD.index_put((batch.image_positions_MN[there_MN],), image_MND[there_MN].to(x_TD.dtype))
        return x_TD.unflatten(0, batch.tokens_BS.shape)

    def _turns(self, position_ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        config = self.settings
        frequencies_F = inverse_frequencies(
            config.backbone.kv_channels, base=config.rotary_base, device=position_ids_BS.device, **asdict(config.rotary_scaling)
        )
        angles_B1SE = (position_ids_BS[:, None, :, None] * frequencies_F).repeat(1, 1, 1, 2)
        return angles_B1SE.cos(), angles_B1SE.sin()

    def _image_loss(self, h_KD: Tensor, *, batch: Batch) -> Tensor:
        loss_KR, _ = denoising_loss(
            self._denoise,
            x_KC=batch.latents_MNC[batch.masked_MN],
            noise_KRC=batch.noise_MNRC[batch.masked_MN],
            u_KR=batch.timesteps_MNR[batch.masked_MN],
            z_KZ=self.post_projector(h_KD),
            schedule=self.schedule,
            parameterization=self.parameterization,
        )
        return loss_KR.mean(dim=1).sum()

    def _denoise(self, x_KRC: Tensor, *, timestep_KR: Tensor, z_KZ: Tensor) -> Tensor:
        return self.diffusion_head(x_KRC, timestep_KR=timestep_KR * (1000 / self.schedule.num_timesteps), z_KZ=z_KZ)


_NAMES = {
    "embedding.word_embeddings.": "words.",
    "embedding.": "",
    "decoder.layers.": "blocks.",
    "decoder.final_layernorm.": "norm.",
    ".input_layernorm.": ".norm1.",
    ".pre_mlp_layernorm.": ".norm2.",
    ".self_attention.linear_qkv.": ".attention.qkv.",
    ".self_attention.linear_proj.": ".attention.proj.",
    ".mlp.linear_": ".",
    "output_layer.": "output.",
}


def plain_name(name: str) -> str:
    """How the parameter of `MMARModel` is called in `PlainModel`."""
    if name.startswith(("diffusion_head.", "post_projector.", "embedding.embedding_vit.", "embedding.vis_projector.")):
        return name.removeprefix("embedding.")
    for theirs, own in _NAMES.items():
        name = name.replace(theirs, own)
    return name


class PlainTrainer:
    """The usual training step: gradients added up over microbatches, clipping by their norm, AdamW.

    Args:
        model: in fp32.
        config: of the optimizer.
        bf16: compute under `torch.autocast` to bf16.
    """

    def __init__(self, model: PlainModel, config: OptimizerConfig, *, bf16: bool) -> None:
        self.model, self.config = model, config
        self._autocast = torch.autocast(platform.device().type, dtype=torch.bfloat16, enabled=bf16)
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in model.named_parameters():
            groups[name in model.decayed].append(parameter)
        self._optimizer = torch.optim.AdamW(
            [{"params": params, "weight_decay": config.weight_decay if decayed else 0.0} for decayed, params in groups.items()],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
        )

    def backward(self, microbatches: Sequence[Batch]) -> Tensor:
        """The step's loss, whose gradients are there afterwards."""
        batches = [batch.to(platform.device()) for batch in microbatches]
        labels = max(1, sum(batch.num_labels for batch in batches))
        masked = max(1, sum(batch.num_masked for batch in batches))
        self._optimizer.zero_grad()
        losses = []
        for batch in batches:
            with self._autocast:
                text, image = self.model(batch)
            settings = self.model.settings
            loss = settings.text_loss_weight * text / labels + settings.image_loss_weight * image / masked
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def train_step(self, microbatches: Sequence[Batch]) -> tuple[float, float]:
        """One step; its loss, and the norm of its gradient."""
        loss = self.backward(microbatches)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad or float("inf"))
        self._optimizer.step()
        return float(loss), float(norm)
