"""What GPUs have and how they are connected, for forecasts. Their peaks of computation are in `flops`.

Sources, all NVIDIA's: the data sheets of the A100 (2021), H100, H200 (2024) and HGX B200 (2025); for the network the DGX of each
generation, which has one adapter of 200 or 400 Gb/s for each GPU. Memory is what CUDA reports, which is less than on the label.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU in a machine of `per_node`; rates in bytes a second."""

    name: str
    memory: int
    """Bytes."""
    memory_rate: float
    link_rate: float
    """To the GPUs of its machine, in one direction."""
    network_rate: float
    """To those of others, in one direction."""
    per_node: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="a100", memory=79 * 2**30, memory_rate=2.04e12, link_rate=300e9, network_rate=25e9),
        Gpu(name="h100", memory=79 * 2**30, memory_rate=3.35e12, link_rate=450e9, network_rate=50e9),
        Gpu(name="h200", memory=139 * 2**30, memory_rate=4.8e12, link_rate=450e9, network_rate=50e9),
        Gpu(name="b200", memory=178 * 2**30, memory_rate=7.7e12, link_rate=900e9, network_rate=50e9),
    )
}
