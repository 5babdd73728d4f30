"""MMAR: one decoder that reads text and clean image tokens, and whose outputs are words, or conditions for the diffusion head.

Suffixes: B sequences, S positions, T all positions, D width of the backbone, L labelled positions, M images, N tokens of each,
I all image tokens, K those that a rank learns, R noise levels for each, C channels of a token, Z width of the condition,
F teacher features. Data is [B, S]; megatron-core is [S, B, D].
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from megatron.core.enums import ModelType
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from mmar_megatron.config import ModelConfig
from mmar_megatron.data.batch import Batch
from mmar_megatron.diffusion.conditional import denoising_loss
from mmar_megatron.diffusion.parameterization import Parameterization, check_compatible
from mmar_megatron.diffusion.schedule import NoiseSchedule
from mmar_megatron.model.attention import attention_bias, kept_allowed, mixed_attention_allowed, rotary_angles
from mmar_megatron.model.compilation import compile_in_training
from mmar_megatron.model.embedding import MultimodalEmbedding
from mmar_megatron.model.flex import mixed_block_mask
from mmar_megatron.model.head import DiffusionHead
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.initialization import initialize_backbone, seeded
from mmar_megatron.model.key_values import KeyValueCache
from mmar_megatron.model.layer_specs import block_spec
from mmar_megatron.model.losses import LossSums, bucketed
from mmar_megatron.model.tensor_overlap import overlapping
from mmar_megatron.model.vision import Projector
from mmar_megatron.parallel import ParallelGroups

_SCALES = "_extra_state"
"""How the names end under which Transformer Engine's modules keep scales of FP8, pickled."""


class MMARModel(LanguageModule):
    """One pipeline stage of MMAR (all of it without pipeline parallelism).

    Args:
        config: the model's section; its `backbone` holds the layout's sizes too.
        geometry: grid and channels of the image codec.
        vocab_size: of the tokenizer; padded here to a multiple of `make_vocab_size_divisible_by`, alike in any layout.
        groups: process groups.
        seed: initial weights are a function of it and of each parameter's name.
        vp_stage: which model chunk of the stage, under the interleaved schedule.
        draw_weights: whether to draw initial weights; False where there are only shapes, on the meta device.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        geometry: ImageGeometry,
        vocab_size: int,
        groups: ParallelGroups,
        seed: int,
        vp_stage: int | None = None,
        draw_weights: bool = True,
    ) -> None:
        super().__init__(config=config.backbone, pg_collection=groups.megatron)
        self.model_type = ModelType.encoder_or_decoder  # asked for by megatron-core's schedules
        self.settings = config
        self.vp_stage = vp_stage
        self.groups = groups
        self.pre_process = groups.is_first_stage and vp_stage in (None, 0)
        last_chunk = None if groups.virtual_pipeline_size is None else groups.virtual_pipeline_size - 1
        self.post_process = groups.is_last_stage and vp_stage == last_chunk
        self.share_embeddings_and_output_weights = config.tie_embeddings
        self.schedule = NoiseSchedule(config.diffusion.schedule, num_timesteps=config.diffusion.num_timesteps)
        self.parameterization = Parameterization(config.diffusion.parameterization)
        check_compatible(self.schedule, self.parameterization)
        padded = padded_vocab_size(config, vocab_size)

        if self.pre_process:
            self.embedding = MultimodalEmbedding(
                config.backbone,
                vit=config.embedding_vit,
                geometry=geometry,
                vocab_size=padded,
                tensor_group=groups.tensor,
                seed=seed,
            )
        self.decoder = TransformerBlock(
            config.backbone,
            block_spec(config.backbone, vp_stage=vp_stage, pipeline_rank=groups.pipeline.rank()),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups.megatron,
            vp_stage=vp_stage,
        )
        if self.post_process:
            self._build_heads(channels=geometry.channels, vocab_size=padded, seed=seed)
        self.to(dtype=config.backbone.params_dtype)
        self.register_load_state_dict_post_hook(_without_scales)
        if draw_weights:
            if self.pre_process or self.post_process:
                self.setup_embeddings_and_output_layer()  # marks the tied weights, and makes them equal on first and last stage
            initialize_backbone(self, seed=seed)

    def _build_heads(self, *, channels: int, vocab_size: int, seed: int) -> None:
        config = self.settings
        # `_enter_heads` undoes sequence parallelism and sums the gradients of all that follows: the output layer must do neither.
        output_config = copy.copy(config.backbone)
        output_config.sequence_parallel = False
        self.output_layer = ColumnParallelLinear(
            config.backbone.hidden_size,
            vocab_size,
            config=output_config,
            init_method=config.backbone.init_method,
            bias=False,
            disable_grad_reduce=True,
            skip_weight_param_allocation=self.pre_process and config.tie_embeddings,
            tp_group=self.groups.tensor,
        )
        with seeded(seed, "heads"):
            width = config.head.width
            self.post_projector = Projector(in_features=config.backbone.hidden_size, out_features=width)
            self.diffusion_head = DiffusionHead(depth=config.head.depth, width=width, channels=channels, condition_width=width)
            if config.head.compile != "off":
                few = config.head.row_multiple > 1
                compile_in_training(self.diffusion_head, fixed_rows=few, graphs=config.head.compile == "graphs")
            if config.alignment_loss_weight > 0:
                self.alignment_projector = nn.Linear(config.backbone.hidden_size, config.alignment_features)
        for module in self._row_parallel_modules():
            for parameter in module.parameters():
                # Each tensor-parallel rank sees its share of the rows: its gradient is a part. The engine sums them by this mark.
                parameter.sum_gradients_across_tp_domain = True  # type: ignore[attr-defined]

    def _row_parallel_modules(self) -> list[nn.Module]:
        modules: list[nn.Module] = [self.post_projector, self.diffusion_head]
        return modules + ([self.alignment_projector] if self.settings.alignment_loss_weight > 0 else [])

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Called by megatron-core's schedules: the previous stage's output."""
        self.decoder.set_input_tensor(input_tensor[0])

    def sharded_state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        """megatron-core's, without what is no weight: scales of FP8, and room for them, of whatever modules the layers are."""
        state = super().sharded_state_dict(*args, **options)
        return {name: value for name, value in state.items() if not name.endswith(_SCALES)}

    def forward(self, batch: Batch, *, return_hidden: bool = False, cache: KeyValueCache | None = None) -> Tensor | LossSums:
        """One stage's forward pass.

        Args:
            batch: the microbatch, on this device; every stage reads what it needs of it.
            return_hidden: on the last stage, give the final hidden states instead of the losses (for generation).
            cache: keys and values of what stands before the batch's rows, or of images that they are a part of (for generation).

        Returns:
            On the last stage `LossSums`, or [S, B, D] with `return_hidden`; on the others the hidden states for the next.
        """
        backbone = self.settings.backbone
        overlap = overlapping(self.decoder, enabled=self.training or not backbone.tp_comm_overlap)
        with self._attending_to(cache), self._fp8_in_training_alone(), overlap:
            h_SBD = self.decoder(
                hidden_states=self.embedding(batch) if self.pre_process else None,
                **self._mask(batch, cache),
                rotary_pos_emb=rotary_angles(
                    batch.position_ids_BS,
                    head_dim=backbone.kv_channels,
                    base=self.settings.rotary_base,
                    **asdict(self.settings.rotary_scaling),
                ),
            )
        if not self.post_process:
            return h_SBD
        h_SBD = self._enter_heads(h_SBD)
        return h_SBD if return_hidden else self.losses(h_SBD, batch=batch)

    def _mask(self, batch: Batch, cache: KeyValueCache | None) -> dict[str, Any]:
        """The mask of all layers, as `MixedAttention` takes it: none where causal order says all."""
        if batch.causal and cache is None:
            return {"attention_mask": None}
        # Passes with a cache are short and of ever other lengths, for each of which a kernel would be compiled.
        if self.settings.attention == "flex" and cache is None:
            block_mask = mixed_block_mask(document_ids_BS=batch.document_ids_BS, span_ids_BS=batch.span_ids_BS)
            return {"attention_mask": None, "attention_bias": block_mask}
        return {"attention_mask": attention_bias(_allowed(batch, cache), dtype=self.settings.backbone.params_dtype)}

    @contextmanager
    def _attending_to(self, cache: KeyValueCache | None) -> Iterator[None]:
        attentions = [layer.self_attention.core_attention for layer in self.decoder.layers]
        for attention in attentions:
            attention.cache = cache
        try:
            yield
        finally:
            for attention in attentions:
                attention.cache = None

    @contextmanager
    def _fp8_in_training_alone(self) -> Iterator[None]:
        """Evaluation and painting compute what an exported model does, and their rows need not be whole tiles of FP8 kernels."""
        backbone, fp8 = self.settings.backbone, self.settings.backbone.fp8
        backbone.fp8 = fp8 if self.training else None  # megatron-core asks it in each forward pass
        try:
            yield
        finally:
            backbone.fp8 = fp8

    def _enter_heads(self, h_SBD: Tensor) -> Tensor:
        """Full hidden states on each tensor-parallel rank; backward sums the ranks' gradients, which from here on are parts."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(h_SBD, tensor_parallel_output_grad=True, group=self.groups.tensor)
        return copy_to_tensor_model_parallel_region(h_SBD, group=self.groups.tensor)

    def losses(self, h_SBD: Tensor, *, batch: Batch) -> LossSums:
        """From the final hidden states. Only rows that have a loss reach the heads: on each tensor-parallel rank all labels, for
        the vocabulary is divided, and its own share of the image tokens. Nothing here waits for the device. Last stage only.
        """
        h_TD = rearrange(h_SBD, "s b d -> (s b) d")
        return LossSums(
            text=self.text_loss(h_TD, batch=batch),
            **self.image_loss(h_TD, batch=batch),
            alignment=self.alignment_loss(h_TD, batch=batch),
        )

    def _own_share(self, tokens: Tensor) -> Tensor:
        """This tensor-parallel rank's even share of image tokens."""
        return tokens[self.groups.tensor.rank() :: self.groups.tensor.size()]

    def text_errors(self, h_LD: Tensor, *, labels_L: Tensor) -> Tensor:
        """Cross-entropy of each label, [L] in fp32, from final hidden states that have entered the heads. Last stage only."""
        logits_LV = self._parallel_logits(h_LD).float()
        if self.config.cross_entropy_loss_fusion:
            return fused_vocab_parallel_cross_entropy(logits_LV, labels_L, self.groups.tensor)
        return vocab_parallel_cross_entropy(logits_LV, labels_L)

    def image_errors(self, h_KD: Tensor, *, batch: Batch, tokens_K: Tensor) -> tuple[Tensor, Tensor]:
        """Squared errors of image tokens, and what predicting zero would cost, each [K, R] in fp32. Last stage only.

        Args:
            h_KD: final hidden states that have entered the heads.
            batch: has the tokens, their noise and its levels.
            tokens_K: which they are, as indices into (M N).
        """
        x_KC, noise_KRC, u_KR = (
            rearrange(t, "m n ... -> (m n) ...")[tokens_K] for t in (batch.latents_MNC, batch.noise_MNRC, batch.timesteps_MNR)
        )
        return denoising_loss(
            self.denoise,
            x_KC=x_KC,
            noise_KRC=noise_KRC,
            u_KR=u_KR,
            z_KZ=self.post_projector(h_KD),
            schedule=self.schedule,
            parameterization=self.parameterization,
        )

    def text_loss(self, h_TD: Tensor, *, batch: Batch) -> Tensor:
        """Of `losses`: `LossSums.text`, from all hidden states [T, D]. Last stage only, as those below."""
        labels_T = rearrange(batch.labels_BS, "b s -> (s b)")
        return self.text_errors(h_TD[batch.labelled_L], labels_L=labels_T[batch.labelled_L]).sum()

    def image_loss(self, h_TD: Tensor, *, batch: Batch) -> dict[str, Tensor]:
        """Of `losses`: what `LossSums` has of the masked tokens of this rank."""
        masked_K, learned_K = filled_up(self._own_share(batch.masked_P), multiple=self.settings.head.row_multiple)
        loss_KR, zero_KR = self.image_errors(h_TD[_image_rows(batch)[masked_K]], batch=batch, tokens_K=masked_K)
        u_KR = rearrange(batch.timesteps_MNR, "m n r -> (m n) r")[masked_K]
        loss_K = loss_KR.mean(dim=1)
        learned_KR = learned_K[:, None].expand_as(u_KR)
        by_timestep, rows_by_timestep = bucketed(loss_KR.detach().flatten(), position=u_KR.flatten(), weight=learned_KR.flatten())
        ratio_MN = batch.masked_MN.float().mean(dim=1, keepdim=True).expand_as(batch.masked_MN)
        by_mask_ratio, rows_by_mask_ratio = bucketed(loss_K.detach(), position=ratio_MN.flatten()[masked_K], weight=learned_K)
        return {
            "image": (loss_K * learned_K).sum(),
            "image_zero": (zero_KR.mean(dim=1) * learned_K).sum(),
            "image_by_timestep": by_timestep,
            "count_by_timestep": rows_by_timestep,
            "image_by_mask_ratio": by_mask_ratio,
            "count_by_mask_ratio": rows_by_mask_ratio,
        }

    def alignment_loss(self, h_TD: Tensor, *, batch: Batch) -> Tensor:
        """Of `losses`: `LossSums.alignment`, of the visible tokens of this rank."""
        if self.settings.alignment_loss_weight == 0:
            return torch.zeros((), device=h_TD.device)
        if batch.teacher_MNF is None:
            raise ValueError("model.alignment_loss_weight is not 0, but the data holds no teacher features: set it to 0.")
        visible_K = self._own_share(batch.aligned_V)
        projected_KF = self.alignment_projector(h_TD[_image_rows(batch)[visible_K]]).float()
        teacher_KF = rearrange(batch.teacher_MNF, "m n f -> (m n) f")[visible_K]
        return (1 - F.cosine_similarity(projected_KF, teacher_KF, dim=-1)).sum()

    def _parallel_logits(self, h_LD: Tensor) -> Tensor:
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits_LV, _ = self.output_layer(h_LD, weight=weight)
        return logits_LV

    def text_logits(self, h_LD: Tensor) -> Tensor:
        """Logits over the whole (padded) vocabulary, [L, V], from final hidden states. For generation; last stage only."""
        return gather_from_tensor_model_parallel_region(self._parallel_logits(h_LD), group=self.groups.tensor)

    def image_condition(self, h_KD: Tensor) -> Tensor:
        """The head's condition, [K, Z], from final hidden states at image positions. Last stage only."""
        return self.post_projector(h_KD)

    def denoise(self, x_KRC: Tensor, *, timestep_KR: Tensor, z_KZ: Tensor) -> Tensor:
        """The head's prediction u, [K, R, C], for tokens at integer noise levels of the schedule. Last stage only."""
        # MAR's sinusoids span 1,000 levels; another number of levels is brought to that scale.
        scale = 1000 / self.schedule.num_timesteps
        return self.diffusion_head(x_KRC, timestep_KR=timestep_KR * scale, z_KZ=z_KZ)


def filled_up(tokens_K: Tensor, *, multiple: int) -> tuple[Tensor, Tensor]:
    """Tokens up to a multiple of their number, by the first of the batch; and 1 for each own, 0 for what fills up."""
    own = len(tokens_K)
    filled_K = F.pad(tokens_K, (0, -(-max(own, 1) // multiple) * multiple - own if multiple > 1 else 0))
    return filled_K, (torch.arange(len(filled_K), device=tokens_K.device) < own).float()


def _without_scales(model: nn.Module, incompatible: Any) -> None:
    """Scales of FP8 are not kept in checkpoints: where they are missing, nothing is."""
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not name.endswith(_SCALES)]


def _allowed(batch: Batch, cache: KeyValueCache | None) -> Tensor:
    """Which of all keys each query may attend to, bool [B, S, keys]."""
    if (
        cache is not None and cache.overwriting is not None
    ):  # tokens of images see all that is kept; what filler sees is no matter
        assert cache.valid_BT is not None
        return cache.valid_BT[:, None, :].expand(-1, batch.tokens_BS.shape[1], -1)
    allowed_BSS = mixed_attention_allowed(document_ids_BS=batch.document_ids_BS, span_ids_BS=batch.span_ids_BS)
    if cache is None or cache.valid_BT is None:
        return allowed_BSS
    return torch.cat((kept_allowed(cache.valid_BT, document_ids_BS=batch.document_ids_BS), allowed_BSS), dim=2)


def _image_rows(batch: Batch) -> Tensor:
    """Rows of hidden states as (S B) in which image tokens stand, int64 [(M N)]."""
    sequences, positions = batch.tokens_BS.shape
    places = batch.image_positions_MN.flatten()  # in (B S)
    return places % positions * sequences + places // positions


def padded_vocab_size(config: ModelConfig, vocab_size: int) -> int:
    """Rows of the word embeddings: alike in any layout, so that initial weights and checkpoints are too."""
    multiple = config.make_vocab_size_divisible_by
    return -(-vocab_size // multiple) * multiple


def build_model(
    config: ModelConfig,
    *,
    geometry: ImageGeometry,
    vocab_size: int,
    groups: ParallelGroups,
    seed: int,
    draw_weights: bool = True,
) -> list[MMARModel]:
    """The model chunks of this process: one, or several under the interleaved schedule. Arguments as `MMARModel`'s."""
    chunks = [None] if groups.virtual_pipeline_size is None else range(groups.virtual_pipeline_size)
    return [
        MMARModel(
            config,
            geometry=geometry,
            vocab_size=vocab_size,
            groups=groups,
            seed=seed,
            vp_stage=chunk,
            draw_weights=draw_weights,
        )
        for chunk in chunks
    ]
