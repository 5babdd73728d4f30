"""What a budget is best spent on, under a law (Hoffmann et al., arXiv 2203.15556, equation 4).

With C = k N D the loss is least where N = G (C / k)^a and D = (C / k)^b / G, with a = beta / (alpha + beta),
b = alpha / (alpha + beta) and G = (alpha A / (beta B))^(1 / (alpha + beta)).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmar_megatron.scaling.law.huber import Array
from mmar_megatron.scaling.law.surface import Law


@dataclass(frozen=True)
class Allocation:
    """The best use of K budgets under P laws, [P, K]; nan where a law lacks a term, so that nothing is traded off."""

    params: Array
    tokens: Array
    loss: Array


def exponents(law: Law) -> tuple[Array, Array]:
    """a and b of N ~ C^a and D ~ C^b, [P] each."""
    total = law.alpha + law.beta
    return law.beta / total, law.alpha / total


def allocate(law: Law, flops_K: Array, *, flops_per_product: float) -> Allocation:
    """The best size, tokens and their loss.

    Args:
        flops_K: budgets.
        flops_per_product: k, of training for each parameter and token.
    """
    a, b = exponents(law)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_G = (np.log(law.alpha * law.A) - np.log(law.beta * law.B)) / (law.alpha + law.beta)
        log_product = np.log(flops_K / flops_per_product)
        params = np.exp(log_G[:, None] + a[:, None] * log_product)
        tokens = np.exp(-log_G[:, None] + b[:, None] * log_product)
        # Infinitely many of one and none of the other.
        possible = np.isfinite(log_G)[:, None]
        params, tokens = np.where(possible, params, np.nan), np.where(possible, tokens, np.nan)
        return Allocation(params, tokens, law.loss(params, tokens))
