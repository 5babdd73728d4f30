"""Diffusion for continuous tokens: noise schedules, what the network predicts, the loss, samplers, and the numerics of it all.

Pure torch, without parallelism: every function works on whatever rows it is given.
"""

from mmar_megatron.diffusion.parameterization import (
    Parameterization,
    ParameterizationName,
    add_noise,
    check_compatible,
    diffusion_loss,
    guide,
    zero_loss,
)
from mmar_megatron.diffusion.sampler import Sampler, SamplerKind, gaussian_noise
from mmar_megatron.diffusion.schedule import NoiseSchedule, ScheduleName

__all__ = [
    "NoiseSchedule",
    "Parameterization",
    "ParameterizationName",
    "Sampler",
    "SamplerKind",
    "ScheduleName",
    "add_noise",
    "check_compatible",
    "diffusion_loss",
    "gaussian_noise",
    "guide",
    "zero_loss",
]
