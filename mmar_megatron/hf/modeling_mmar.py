"""MMAR in plain PyTorch: one decoder that reads text and clean image tokens, writes text, and conditions a diffusion head that
paints image tokens. Ships with the weights, and needs nothing but torch, transformers and the files beside it.

    model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(DIR, trust_remote_code=True)
    latents = model.generate_images(**processor.to_paint(["a small red circle"]), guidance_scale=3.0, seed=0)
    pictures = processor.to_pictures(latents)
    ids = model.generate(**processor(text=["<image>"], images=[pictures[0]], return_tensors="pt"), max_new_tokens=32)

Axes: B sequences, S positions of them, P positions before them (in the cache), T = P + S, D width of the backbone, H heads, G
key-value groups, E width of a head, V vocabulary; M images, N tokens of an image, C channels of a token; K masked tokens, R noise
levels for each, Z width of the head's condition.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmar_megatron.diffusion.conditional import denoising_loss
from mmar_megatron.diffusion.painting import GuidanceSchedule, ImageSampling, Order, Painter, Report, paint_tokens
from mmar_megatron.diffusion.parameterization import Parameterization
from mmar_megatron.diffusion.sampler import SamplerKind
from mmar_megatron.diffusion.schedule import NoiseSchedule
from mmar_megatron.hf.configuration_mmar import MMARConfig
from mmar_megatron.model.head import DiffusionHead
from mmar_megatron.model.key_values import KeyValueCache, Overwriting
from mmar_megatron.model.rotary import inverse_frequencies
from mmar_megatron.model.selection import Selection
from mmar_megatron.model.vision import EmbeddingViT, PositionEmbedding2D, Projector, embed_images

IGNORE = -100
"""Label of a position that is not learned."""


@dataclass
class MMAROutput(CausalLMOutputWithPast):
    """What `MMARForCausalLM` gives, beside transformers' own `loss` (the weighted sum of those below), `logits` and cache."""

    last_hidden_state: Tensor | None = None
    """[B, S, D], where it was asked for."""
    text_loss: Tensor | None = None
    """Mean cross-entropy over labelled positions, nats."""
    image_loss: Tensor | None = None
    """Mean diffusion loss over masked image tokens."""
    alignment_loss: Tensor | None = None
    """Mean of 1 - cosine to the teacher's features over visible image tokens."""
    image_conditions: Tensor | None = None
    """The head's condition at each masked image token, image by image, [K, Z]."""


CACHE_NAME = "cache" if any(field.name == "cache" for field in fields(CausalLMOutputWithPast)) else "past_key_values"
"""What this version of transformers calls it."""


class MMARRMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467)."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotate(x_BHSE: Tensor, *, cos_B1SE: Tensor, sin_B1SE: Tensor) -> Tensor:
    """The rotary embedding: channel i turns with channel i + E / 2."""
    first, second = x_BHSE.chunk(2, dim=-1)
    return x_BHSE * cos_B1SE + torch.cat((-second, first), dim=-1) * sin_B1SE


class MMARAttention(nn.Module):
    """Grouped-query attention under an additive mask."""

    def __init__(self, config: MMARConfig, *, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        width, groups = config.hidden_size, config.num_key_value_heads
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, groups * self.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, groups * self.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=False)
        if config.qk_norm:
            self.q_norm = MMARRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = MMARRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, h_BSD: Tensor, *, bias_B1ST: Tensor, rotary: tuple[Tensor, Tensor], cache: Any) -> Tensor:
        """[B, S, D] -> the same. `rotary` holds cosines and sines [B, 1, S, E]."""
        query, key, value = (
            projection(h_BSD).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key = (rotate(x, cos_B1SE=rotary[0], sin_B1SE=rotary[1]) for x in (query, key))
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias_B1ST, enable_gqa=query.shape[1] != key.shape[1]
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class MMARMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: MMARConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MMARDecoderLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer."""

    def __init__(self, config: MMARConfig, *, layer: int) -> None:
        super().__init__()
        self.input_layernorm = MMARRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = MMARAttention(config, layer=layer)
        self.post_attention_layernorm = MMARRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MMARMLP(config)

    def forward(self, h_BSD: Tensor, *, bias_B1ST: Tensor, rotary: tuple[Tensor, Tensor], cache: Any) -> Tensor:
        """[B, S, D] -> the same."""
        attended = self.self_attn(self.input_layernorm(h_BSD), bias_B1ST=bias_B1ST, rotary=rotary, cache=cache)
        h_BSD = h_BSD + attended
        return h_BSD + self.mlp(self.post_attention_layernorm(h_BSD))


class MMARPreTrainedModel(PreTrainedModel):
    """What transformers must know of both classes below."""

    config_class = MMARConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MMARDecoderLayer", "EmbeddingViT", "DiffusionHead")
    _supports_sdpa = True
    _skip_keys_device_placement = ("cache", "past_key_values")

    def _init_weights(self, module: nn.Module) -> None:
        """Called for each module that has weights which were not loaded; `nn.init` leaves those alone that were."""
        parts = (
            part for part in self.modules() if isinstance(part, DiffusionHead | EmbeddingViT | Projector | PositionEmbedding2D)
        )
        part = next((part for part in parts if any(inner is module for inner in part.modules())), None)
        if part is not None:
            part.reset_parameters()
        elif isinstance(module, MMARModel):
            nn.init.normal_(module.mask_embedding, std=self.config.initializer_range)
        else:
            super()._init_weights(module)  # normal linears and embeddings, norms of one


class MMARModel(MMARPreTrainedModel):
    """The backbone with what it reads: word embeddings, EmbeddingViT, VisProjector, mask and position embeddings."""

    def __init__(self, config: MMARConfig) -> None:
        super().__init__(config)
        vit, image = config.embedding_vit, config.image
        grid = {"grid_height": image["grid_height"], "grid_width": image["grid_width"]}
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_vit = EmbeddingViT(**vit, channels=image["channels"], **grid)
        self.vis_projector = Projector(in_features=vit["hidden_size"], out_features=config.hidden_size)
        self.mask_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.image_position = PositionEmbedding2D(**grid, width=config.hidden_size, scale=config.initializer_range)
        self.layers = nn.ModuleList(MMARDecoderLayer(config, layer=layer) for layer in range(config.num_hidden_layers))
        self.norm = MMARRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embeddings."""
        self.embed_tokens = value

    def embed_images(self, latents_MNC: Tensor, *, masked_MN: Tensor | None = None) -> Tensor:
        """What the layers read of images, [M, N, D]; none masked where that is not given."""
        visible_MN = torch.ones(latents_MNC.shape[:2], dtype=torch.bool, device=latents_MNC.device)
        return embed_images(
            latents_MNC,
            visible_MN=visible_MN if masked_MN is None else ~masked_MN,
            embedding_vit=self.embedding_vit,
            vis_projector=self.vis_projector,
            mask_embedding_D=self.mask_embedding,
            position=self.image_position,
        )

    def embed(self, input_ids: Tensor, *, latents_MNC: Tensor | None, masked_MN: Tensor | None) -> Tensor:
        """Tokens and images -> [B, S, D]. Arguments and errors as `MMARForCausalLM.forward`'s."""
        is_image_BS = input_ids == self.config.image_token_id
        images = check_images(is_image_BS, num_tokens=self.config.num_image_tokens)
        given = 0 if latents_MNC is None else len(latents_MNC)
        if images != given:
            raise ValueError(f"input_ids have the tokens of {images} images, but image_latents hold {given}: give as many")
        h_BSD = self.embed_tokens(input_ids)
        if latents_MNC is None or not images:
            return h_BSD
        shape = (self.config.num_image_tokens, self.config.image["channels"])
        if tuple(latents_MNC.shape[1:]) != shape:
            raise ValueError(f"image_latents are {tuple(latents_MNC.shape)}, but must be [images, {shape[0]}, {shape[1]}]")
        if masked_MN is not None and (masked_MN.shape != latents_MNC.shape[:2] or masked_MN.dtype != torch.bool):
            raise ValueError(
                f"image_masked is {masked_MN.dtype} {tuple(masked_MN.shape)}, but must be bool {tuple(latents_MNC.shape[:2])}"
            )
        image_MND = self.embed_images(latents_MNC, masked_MN=masked_MN)
        return h_BSD.masked_scatter(is_image_BS[..., None], image_MND.to(h_BSD.dtype))

    def forward(
        self,
        h_BSD: Tensor,
        *,
        span_ids_BS: Tensor | None,
        valid_BT: Tensor,
        position_ids_BS: Tensor,
        cache: Any = None,
    ) -> Tensor:
        """Embedded sequence -> final hidden states, [B, S, D].

        Args:
            h_BSD: from `embed` and `embed_images`.
            span_ids_BS: number of the image that a position is of; -1 at text. None: tokens of images that write over a part of
                the cache, and see all of it.
            valid_BT: False at padding, positions in the cache included.
            position_ids_BS: for the rotary embedding.
            cache: of the positions before; it is filled further.
        """
        if span_ids_BS is None:
            allowed_BST = valid_BT[:, None].expand(-1, h_BSD.shape[1], -1)
        else:
            allowed_BST = mixed_attention_allowed(span_ids_BS, valid_BT=valid_BT)
        bias_BST = torch.zeros(allowed_BST.shape, dtype=h_BSD.dtype, device=h_BSD.device)
        bias_B1ST = bias_BST.masked_fill_(~allowed_BST, float("-inf"))[:, None]
        frequencies_F = inverse_frequencies(self.config.head_dim, device=h_BSD.device, **self.config.rotary)
        angle_BSF = position_ids_BS.float()[..., None] * frequencies_F
        angle_B1SE = torch.cat((angle_BSF, angle_BSF), dim=-1)[:, None]
        rotary = angle_B1SE.cos().to(h_BSD.dtype), angle_B1SE.sin().to(h_BSD.dtype)
        for layer in self.layers:
            h_BSD = layer(h_BSD, bias_B1ST=bias_B1ST, rotary=rotary, cache=cache)
        return self.norm(h_BSD)


def check_images(is_image_BS: Tensor, *, num_tokens: int) -> int:
    """How many images there are.

    Raises:
        ValueError: one is not whole, or not in one piece.
    """
    per_row_B = is_image_BS.sum(dim=1)
    if (per_row_B % num_tokens).any():
        raise ValueError(
            f"a row has {per_row_B.tolist()} image tokens, which are not whole images of {num_tokens}: an image must stand in "
            "one piece, and in one call where there is a cache"
        )
    position = is_image_BS.flatten().nonzero().view(-1, num_tokens)
    if (position.diff(dim=1) != 1).any():
        raise ValueError(f"the {num_tokens} tokens of an image must stand behind each other, with nothing in between")
    return len(position)


def span_ids(input_ids_BS: Tensor, *, image_token_id: int, num_tokens: int) -> Tensor:
    """The number of the image in its row, -1 at text, [B, S]."""
    is_image_BS = input_ids_BS == image_token_id
    return torch.where(is_image_BS, (is_image_BS.cumsum(dim=1) - 1) // num_tokens, -1)


def mixed_attention_allowed(span_ids_BS: Tensor, *, valid_BT: Tensor) -> Tensor:
    """Which key each query may attend to, bool [B, S, T].

    A query sees the keys at or before it, and all of its own image. Padding sees padding alone, which keeps every row of the
    softmax non-empty. Images in the cache are complete, and lie before every query.
    """
    length, total = span_ids_BS.shape[1], valid_BT.shape[1]
    key_T = torch.arange(total, device=valid_BT.device)
    causal_ST = key_T[total - length :, None] >= key_T
    of_keys_BT = F.pad(span_ids_BS, (total - length, 0), value=-1)
    same_span_BST = (span_ids_BS[:, :, None] == of_keys_BT[:, None, :]) & (span_ids_BS[:, :, None] >= 0)
    same_kind_BST = valid_BT[:, total - length :, None] == valid_BT[:, None, :]
    return same_kind_BST & (causal_ST | same_span_BST)


class MMARForCausalLM(MMARPreTrainedModel, GenerationMixin):
    """The whole model: `generate` writes text, `generate_images` paints, `forward` gives both losses."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MMARConfig) -> None:
        super().__init__(config)
        self.model = MMARModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        width = config.head["width"]
        self.post_projector = Projector(in_features=config.hidden_size, out_features=width)
        self.diffusion_head = DiffusionHead(
            depth=config.head["depth"], width=width, channels=config.image["channels"], condition_width=width
        )
        if config.alignment_features:
            self.alignment_projector = nn.Linear(config.hidden_size, config.alignment_features)
        self.schedule = NoiseSchedule(config.diffusion["schedule"], num_timesteps=config.diffusion["num_timesteps"])
        self.parameterization = Parameterization(config.diffusion["parameterization"])
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The layer that gives logits."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the layer that gives logits."""
        self.lm_head = new_embeddings

    def denoise(self, x_KRC: Tensor, *, timestep_KR: Tensor, z_KZ: Tensor) -> Tensor:
        """The head's prediction u, [K, R, C], for tokens at integer noise levels of the schedule."""
        # MAR's sinusoids span 1,000 levels; another number of levels is brought to that scale.
        scale = 1000 / self.schedule.num_timesteps
        return self.diffusion_head(x_KRC, timestep_KR=timestep_KR * scale, z_KZ=z_KZ)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        image_latents: Tensor | None = None,
        image_masked: Tensor | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        teacher_features: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MMAROutput | tuple[Any, ...]:
        """One pass.

        Args:
            input_ids: int64 [B, S]; an image is begin_image_token_id, num_image_tokens times image_token_id, end_image_token_id.
            attention_mask: [B, T], 0 at padding, cached positions included; none: there is no padding.
            position_ids: [B, S]; none: they count what is not padding.
            cache, past_key_values: of transformers, two names of the same. A static cache is refused.
            inputs_embeds: [B, S, D] in place of the word embeddings of input_ids, where there are no images.
            image_latents: fp32 [M, N, C], tokens of all images in the order in which they stand in input_ids.
            image_masked: bool [M, N]: image tokens to hide and learn; none: all are visible, and there is no image loss.
            timesteps: [M, N, R] in [0, 1), noise levels for the image loss; none: drawn here.
            noise: [M, N, R, C], standard normal; none: drawn here.
            teacher_features: [M, N, F]: of a frozen vision model, for the alignment loss.
            labels: int64 [B, S], input_ids where text is to be learned, -100 elsewhere; shifted here. Not of image tokens.
            logits_to_keep: logits of so many last positions, or of these; 0: of all.
            output_hidden_states: give `last_hidden_state`.

        Raises:
            ValueError: images are not whole, not as many as latents, or of another shape; a static cache.
        """
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("attention_mask must be [B, T]: masks of more dimensions (a static cache makes one) lose the images")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache and not self.training:
            cache = DynamicCache()
        if input_ids is None:
            if inputs_embeds is None or image_latents is not None:
                raise ValueError("give input_ids (with images they cannot be left out), or inputs_embeds")
            h_BSD, spans_BS = inputs_embeds, torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
        else:
            h_BSD = self.model.embed(input_ids, latents_MNC=image_latents, masked_MN=image_masked)
            spans_BS = span_ids(input_ids, image_token_id=self.config.image_token_id, num_tokens=self.config.num_image_tokens)
        before = 0 if cache is None else cache.get_seq_length()
        valid_BT = self._valid(attention_mask, rows=len(h_BSD), length=h_BSD.shape[1], before=before, device=h_BSD.device)
        if position_ids is None:
            position_ids = (valid_BT.cumsum(dim=1) - 1).clamp(min=0)[:, before:]
        h_BSD = self.model(h_BSD, span_ids_BS=spans_BS, valid_BT=valid_BT, position_ids_BS=position_ids, cache=cache)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = self.lm_head(h_BSD[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else kept])
        losses = self._losses(
            h_BSD[spans_BS >= 0],
            h_BSD,
            latents_MNC=image_latents,
            masked_MN=image_masked,
            timesteps_MNR=timesteps,
            noise_MNRC=noise,
            teacher_MNF=teacher_features,
            labels_BS=labels,
        )
        # All at once: to transformers 4 a field that is filled in later is none.
        output = MMAROutput(
            logits=logits, last_hidden_state=h_BSD if output_hidden_states else None, **losses, **{CACHE_NAME: cache}
        )
        return output.to_tuple() if return_dict is False else output

    def _valid(self, attention_mask: Tensor | None, *, rows: int, length: int, before: int, device: torch.device) -> Tensor:
        if attention_mask is None:
            return torch.ones(rows, before + length, dtype=torch.bool, device=device)
        if attention_mask.shape != (rows, before + length):
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}, but there are {rows} rows of {length} positions behind "
                f"{before} in the cache"
            )
        return attention_mask.bool()

    def _losses(
        self,
        h_ID: Tensor,
        h_BSD: Tensor,
        *,
        latents_MNC: Tensor | None,
        masked_MN: Tensor | None,
        timesteps_MNR: Tensor | None,
        noise_MNRC: Tensor | None,
        teacher_MNF: Tensor | None,
        labels_BS: Tensor | None,
    ) -> dict[str, Tensor]:
        """The losses that there is something for, and their sum; I image tokens, all images' behind each other."""
        config = self.config
        found: dict[str, Tensor] = {}
        terms = []
        if labels_BS is not None:
            # Where labels are a copy of input_ids: image tokens are no text.
            learned_BS = (labels_BS[:, 1:] != IGNORE) & (labels_BS[:, 1:] != config.image_token_id)
            logits_LV = self.lm_head(h_BSD[:, :-1][learned_BS])
            total = F.cross_entropy(logits_LV.float(), labels_BS[:, 1:][learned_BS], reduction="sum")
            found["text_loss"] = total / learned_BS.sum().clamp(min=1)
            terms.append(config.text_loss_weight * found["text_loss"])
        if masked_MN is not None and latents_MNC is not None:
            masked_I = masked_MN.flatten()
            z_KZ = found["image_conditions"] = self.post_projector(h_ID[masked_I])
            x_KC = latents_MNC.flatten(0, 1)[masked_I]
            found["image_loss"] = self._image_loss(z_KZ, x_KC, masked_I, timesteps_MNR, noise_MNRC)
            terms.append(config.image_loss_weight * found["image_loss"])
        if teacher_MNF is not None:
            visible_I = torch.ones(len(h_ID), dtype=torch.bool, device=h_ID.device) if masked_MN is None else ~masked_MN.flatten()
            projected_KF = self.alignment_projector(h_ID[visible_I]).float()
            cosine_K = F.cosine_similarity(projected_KF, teacher_MNF.flatten(0, 1)[visible_I], dim=-1)
            found["alignment_loss"] = (1 - cosine_K).sum() / visible_I.sum().clamp(min=1)
            terms.append(config.alignment_loss_weight * found["alignment_loss"])
        return found | ({"loss": torch.stack(terms).sum()} if terms else {})

    def _image_loss(
        self, z_KZ: Tensor, x_KC: Tensor, masked_I: Tensor, timesteps_MNR: Tensor | None, noise_MNRC: Tensor | None
    ) -> Tensor:
        levels = self.config.head["timestep_multiplier"]
        if timesteps_MNR is None:
            u_KR = torch.rand(len(x_KC), levels, device=x_KC.device)
        else:
            u_KR = timesteps_MNR.flatten(0, 1)[masked_I]
        if noise_MNRC is None:
            noise_KRC = torch.randn(*u_KR.shape, x_KC.shape[1], device=x_KC.device)
        else:
            noise_KRC = noise_MNRC.flatten(0, 1)[masked_I]
        loss_KR, _ = denoising_loss(
            self.denoise,
            x_KC=x_KC,
            noise_KRC=noise_KRC,
            u_KR=u_KR,
            z_KZ=z_KZ,
            schedule=self.schedule,
            parameterization=self.parameterization,
        )
        return loss_KR.mean(dim=1).sum() / max(len(x_KC), 1)

    # --- text -------------------------------------------------------------------------------------------------------------------

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, image_latents: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Called by `generate` before each pass: images go with the pass that reads their tokens, and with no other.

        Raises:
            ValueError: the prompts are padded on the right.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs.pop("cache_position", None)  # transformers 4 gives it; here it follows from the cache
        read, mask, cache = (inputs.get(name) for name in ("input_ids", "attention_mask", CACHE_NAME))
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError("prompts are padded on the right, and their text would go on behind the padding: pad on the left")
        # A pass from the beginning gets them in any case, so that images which no token stands for are told.
        if cache is None or cache.get_seq_length() == 0 or (read is not None and (read == self.config.image_token_id).any()):
            inputs["image_latents"] = image_latents
        return inputs

    def create_masks_for_generate(self, *_: Any, **__: Any) -> Any:
        """Called by `generate` for caches of fixed size, with a mask that knows no images."""
        raise ValueError("a static cache would lose the images' attention: use the default, a dynamic cache")

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        image_latents: Tensor | None = None,
        **options: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Beams and several sequences: each row's images are repeated with it, where transformers would repeat image by image."""
        if image_latents is not None and input_ids is not None and expand_size > 1:
            per_row_B = (input_ids == self.config.image_token_id).sum(dim=1) // self.config.num_image_tokens
            rows = image_latents.split(per_row_B.tolist())
            image_latents = torch.cat([row for row in rows for _ in range(expand_size)])
        ids, options = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **options
        )
        return ids, options if image_latents is None else {**options, "image_latents": image_latents}

    # --- images -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate_images(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        image_latents: Tensor | None = None,
        start_latents: Tensor | None = None,
        redraw: Tensor | None = None,
        guidance_scale: float = 2.0,
        rounds: int = 16,
        steps: int | None = None,
        sampler: SamplerKind | None = None,
        order: Order = "random",
        guidance_schedule: GuidanceSchedule = "constant",
        temperature: float = 1.0,
        refresh_every: int = 1,
        seed: int = 0,
        first_number: int = 0,
        progress: Report | None = None,
    ) -> Tensor:
        """Paint one image for each prompt (MAR, arXiv 2406.11838, section 4).

        All tokens are masked at first. In each round the backbone runs over the image, and the diffusion head draws some of the
        tokens that are still masked. Order and noise follow from (seed, number of the image, round): neither
        the batch nor its composition changes an image.

        Args:
            input_ids: [B, S], prompts that end in begin_image_token_id, as `processor.to_paint` makes them; padded on the left.
            attention_mask: [B, S], 0 at padding; none: pad_token_id is padding.
            image_latents: [M, N, C], of images within the prompts.
            start_latents: [B, N, C], images to be changed (inpainting); none: they begin empty.
            redraw: bool [B, N], which of their tokens to draw anew; needs start_latents.
            guidance_scale: of classifier-free guidance, against a prompt without text; 1: none.
            rounds: runs of the backbone; images with fewer tokens to draw take as many as these.
            steps: runs of the head for each token; none: as the config says.
            sampler: of the head; none: as the config says.
            order: in which tokens are drawn: random, raster (row by row), or confidence, in each round those of which the head is
                surest.
            guidance_schedule: constant, or linear: it grows with the share of the image that is drawn, as MAR has it.
            temperature: scales the noise.
            refresh_every: rounds after which the backbone runs over the whole image again, in the others over tokens that changed
                and those to draw; 1 is exact, more is faster.
            seed: of order and noise.
            first_number: number of the first image, where a longer list is painted in parts.
            progress: called after each round with its number, from 1, the number of rounds, the latents [B, N, C] so far, and
                which of them are masked still [B, N].

        Returns:
            Latents, fp32 [B, N, C]; `processor.to_pictures` makes pictures of them.

        Raises:
            ValueError: a prompt does not end in begin_image_token_id; shapes do not fit; no such rounds, steps or sampler.
            FloatingPointError: what was drawn is not finite.
        """
        config = self.config
        if input_ids.shape[1] < 2 or (input_ids[:, -1] != config.begin_image_token_id).any():
            raise ValueError(
                "each prompt must be bos_token_id, text, begin_image_token_id, padded on the left: see processor.to_paint"
            )
        sampling = ImageSampling(
            rounds=rounds,
            steps=config.diffusion["sampling_steps"] if steps is None else steps,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            order=order,
            sampler=config.diffusion["sampler"] if sampler is None else sampler,
            temperature=temperature,
            refresh_every=refresh_every,
            seed=seed,
        )
        sampling.head_sampler(schedule=self.schedule, parameterization=self.parameterization)  # errors before work
        shape = (len(input_ids), config.num_image_tokens, config.image["channels"])
        latents_BNC, masked_BN = self._start(start_latents, redraw, shape=shape)
        prompt = self._read_prompts(input_ids, attention_mask, image_latents, guided=sampling.guided)

        return paint_tokens(
            _Painter(self, prompt, sampling=sampling),
            latents_BNC=latents_BNC,
            masked_BN=masked_BN,
            sampling=sampling,
            first_number=first_number,
            progress=progress,
        )

    def _start(
        self, start_latents: Tensor | None, redraw: Tensor | None, *, shape: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor]:
        device = self.model.mask_embedding.device
        if (start_latents is None) != (redraw is None):
            raise ValueError("give start_latents and redraw together, or neither")
        if start_latents is None or redraw is None:
            return torch.zeros(shape, device=device), torch.ones(shape[:2], dtype=torch.bool, device=device)
        if start_latents.shape != shape or redraw.shape != shape[:2]:
            raise ValueError(
                f"start_latents are {tuple(start_latents.shape)} and redraw {tuple(redraw.shape)}, not {shape} and {shape[:2]}"
            )
        return start_latents.to(device, torch.float32), redraw.to(device, torch.bool)

    def _read_prompts(
        self, input_ids: Tensor, attention_mask: Tensor | None, image_latents: Tensor | None, *, guided: bool
    ) -> KeyValueCache:
        """Keys and values of the prompts; with guidance, behind them those of as many without text, as in training."""
        valid_BP = (input_ids != self.config.pad_token_id).long() if attention_mask is None else attention_mask
        if guided:
            without = torch.full_like(input_ids, self.config.pad_token_id)
            without[:, -2], without[:, -1] = self.config.bos_token_id, self.config.begin_image_token_id
            valid_without = torch.zeros_like(valid_BP)
            valid_without[:, -2:] = 1
            input_ids, valid_BP = torch.cat((input_ids, without)), torch.cat((valid_BP, valid_without))
        cache = KeyValueCache()
        self(input_ids, attention_mask=valid_BP, cache=cache, image_latents=image_latents, logits_to_keep=1)
        cache.commit(valid_BP.bool())
        return cache


class _Painter(Painter):
    """Behind prompts that were read."""

    def __init__(self, model: MMARForCausalLM, cache: KeyValueCache, *, sampling: ImageSampling) -> None:
        super().__init__(model, sampling=sampling)
        self._whole, self._cache = model, cache
        assert cache.valid_BT is not None
        self._begin = cache.get_seq_length()
        self._first_B1 = cache.valid_BT.sum(dim=1, keepdim=True)

    def look(self, latents_BNC: Tensor, *, masked_BN: Tensor, anew_BN: Tensor) -> None:
        """See `Painter`."""
        backbone, cache = self._whole.model, self._cache
        self._tokens = tokens = Selection(anew_BN.repeat(self.halves, 1))
        image_BND = backbone.embed_images(latents_BNC, masked_MN=masked_BN).to(backbone.embed_tokens.weight.dtype)
        position_BA = self._first_B1 + tokens.place_BA
        is_first, valid_BT = cache.get_seq_length() == self._begin, cache.valid_BT
        assert valid_BT is not None
        if not is_first:
            cache.overwriting = Overwriting.of_images(tokens, begin=self._begin)
        self._h_BAD = backbone(
            tokens.take(image_BND.repeat(self.halves, 1, 1)),
            span_ids_BS=torch.zeros_like(position_BA) if is_first else None,
            valid_BT=torch.cat((valid_BT, tokens.there_BA), dim=1) if is_first else valid_BT,
            position_ids_BS=position_BA,
            cache=cache,
        )
        if is_first:
            cache.commit(tokens.there_BA)

    def conditions(self, row_K: Tensor, place_K: Tensor, *, halves: int) -> Tensor:
        """See `Painter`."""
        rows = torch.cat([row_K + half * (len(self._h_BAD) // self.halves) for half in range(halves)])
        return self._whole.post_projector(self._h_BAD[rows, self._tokens.column_BN[rows, place_K.repeat(halves)]])
