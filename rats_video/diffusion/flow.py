"""Rectified flow: the straight path between data and noise, and one step along it, with or without fresh noise."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from rats_video.types import SamplerKind


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """`(1 - sigma) * x0 + sigma * noise` for `[B, C, F, H, W]` and sigma `[B]`, or `[B, F]` with one a latent frame."""
    sigma = sigma.view(len(sigma), 1, -1, 1, 1)
    return (1 - sigma) * x0 + sigma * noise


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Latents at `sigma_next`, following `velocity = d latents / d sigma` from `sigma` (0-d tensors)."""
    return latents + (sigma_next - sigma) * velocity


FRESH_SHARES: Mapping[SamplerKind, float] = {"euler": 0.0, "renoise": 1.0, "cps": math.sin(0.9 * math.pi / 2)}
"""The share of its noise that each step but the last draws anew, by the sampler; of cps, RTDMD's eta 0.9."""


def stochastic_step(
    latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, fresh: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a step that draws a share `fresh` in [0, 1] of its noise anew.

    The velocity splits the latents into `x0 = latents - sigma * velocity` and `noise = latents + (1 - sigma) *
    velocity`. Euler puts them together again at the next level, `(1 - sigma_next) * x0 + sigma_next * noise`. Here

        mean = (1 - sigma_next) * x0 + sigma_next * sqrt(1 - fresh^2) * noise,    std = sigma_next * fresh,

    whose noise has the variance `sigma_next^2` of the flow's own marginal again, however long the step
    (coefficients-preserving sampling, arXiv 2509.05952; `fresh` = 1 is a consistency model's sampler). The
    Euler-Maruyama step of Flow-GRPO (arXiv 2505.05470, eq. 9) agrees to first order in the step's length: in a few
    long steps it leaves noise behind that no later call removes, and its std is infinite at sigma 1. The last step,
    to sigma 0, has no noise; `fresh` = 0 is the Euler step.
    """
    noise = latents + (1 - sigma) * velocity
    mean = euler_step(latents, velocity, sigma, sigma_next) - sigma_next * (1 - math.sqrt(1 - fresh**2)) * noise
    return mean, sigma_next * fresh
