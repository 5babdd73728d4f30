"""The diffusion head: a residual MLP that models p(token | condition) by denoising, one token at a time.

Architecture, names of parameters and initialisation are those of MAR's head (Li et al., "Autoregressive Image Generation without
Vector Quantization", arXiv 2406.11838, section 3 and appendix), so that weights could be mapped name by name. It differs in its
output: one value for each channel (MAR also predicts a variance).

Suffixes: K tokens, R noise levels for each token, C channels of a token, Z width of the condition, W width of the head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep, then an MLP."""

    def __init__(self, *, width: int, num_frequencies: int = 256, max_period: float = 10000.0) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.max_period = max_period
        self.mlp = nn.Sequential(nn.Linear(num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        """[...] of numbers in [0, 1000] -> [..., W]."""
        half = self.num_frequencies // 2
        exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angle = timestep.float()[..., None] * torch.exp(-math.log(self.max_period) * exponent)
        sinusoids = torch.cat((angle.cos(), angle.sin()), dim=-1)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


def modulate(x: Tensor, *, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's affine map (DiT, arXiv 2212.09748)."""
    return x * (1 + scale) + shift


class ResBlock(nn.Module):
    """LayerNorm -> shift and scale -> linear, SiLU, linear -> gate, around a residual."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, *, condition: Tensor) -> Tensor:
        """[..., W] -> the same."""
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift=shift, scale=scale))


class FinalLayer(nn.Module):
    """LayerNorm without weights -> shift and scale -> linear."""

    def __init__(self, *, width: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, *, condition: Tensor) -> Tensor:
        """[..., W] -> [..., C]."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift=shift, scale=scale))


class DiffusionHead(nn.Module):
    """Predicts u (v by default) for noisy tokens, each on its own, given the backbone's condition z."""

    def __init__(self, *, depth: int, width: int, channels: int, condition_width: int) -> None:
        super().__init__()
        self.time_embed = TimestepEmbedder(width=width)
        self.cond_embed = nn.Linear(condition_width, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width=width) for _ in range(depth))
        self.final_layer = FinalLayer(width=width, channels=channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial weights."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name in ("time_embed.mlp.0.weight", "time_embed.mlp.2.weight"):
                nn.init.normal_(parameter, std=0.02)
            # All modulations and the output start at zero: each block is the identity, and the head predicts 0.
            elif ".adaLN_modulation." in name or name.startswith("final_layer.linear."):
                nn.init.zeros_(parameter)

    def forward(self, x_KRC: Tensor, *, timestep_KR: Tensor, z_KZ: Tensor) -> Tensor:
        """Predict u.

        Args:
            x_KRC: noisy tokens, fp32.
            timestep_KR: noise levels in units of 1/1000 of the schedule, [0, 1000).
            z_KZ: one condition for each token, shared by its R noise levels (so it is embedded once).

        Returns:
            [K, R, C] in the head's dtype.
        """
        condition_KRW = self.time_embed(timestep_KR) + self.cond_embed(z_KZ)[:, None, :]
        x_KRW = self.input_proj(x_KRC.to(self.input_proj.weight.dtype))
        for block in self.res_blocks:
            x_KRW = block(x_KRW, condition=condition_KRW)
        return self.final_layer(x_KRW, condition=condition_KRW)
