"""The map between latent frames and pixel frames of a causal VAE.

Latent 0 holds pixel frame 0 alone; latent f >= 1 holds `stride * (f - 1) + 1 ... stride * f`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pool_to_latent_frames(frames: Tensor, temporal_stride: int) -> Tensor:
    """Mean of pixel-frame values `[B, T]` on each latent frame: `[B, F]`."""
    first, rest = frames[:, :1], frames[:, 1:]
    return torch.cat([first, rest.unflatten(1, (-1, temporal_stride)).mean(dim=2)], dim=1)
