"""Sigma grids: falling noise levels 1 ... 0."""

from __future__ import annotations

import torch
from torch import Tensor


def sigma_grid(num_steps: int, shift: float) -> Tensor:
    """`[num_steps + 1]` float32 noise levels, 1 ... 0: `shift * u / (1 + (shift - 1) * u)` for u in equal steps.

    A grid of `m * num_steps` steps with the same shift contains this one exactly (Wan 2.1's flow grid).

    Raises:
        ValueError: `num_steps` < 1 or `shift` <= 0.
    """
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"sigma_grid needs num_steps >= 1 and shift > 0, got {num_steps} and {shift}")
    u = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * u / (1 + (shift - 1) * u)).float()


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """Noise levels for uniform `u` in [0, 1], distributed as the grid of the same shift."""
    return shift * u / (1 + (shift - 1) * u)
