"""Rectified flow: the straight path between data and noise, and one Euler step along it."""

from __future__ import annotations

from torch import Tensor


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """`(1 - sigma) * x0 + sigma * noise` for `[B, C, F, H, W]` and sigma `[B]`."""
    sigma = sigma.view(-1, 1, 1, 1, 1)
    return (1 - sigma) * x0 + sigma * noise


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Latents at `sigma_next`, following `velocity = d latents / d sigma` from `sigma` (0-d tensors)."""
    return latents + (sigma_next - sigma) * velocity
