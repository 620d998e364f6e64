"""The map between latent frames and pixel frames of a causal VAE.

Latent 0 holds pixel frame 0 alone; latent f >= 1 holds `stride * (f - 1) + 1 ... stride * f`. Before latent 0 a
model may sample frames that no pixel shows (CogVideoX 1.5).
"""

from __future__ import annotations

import torch
from torch import Tensor


def pool_to_latent_frames(frames: Tensor, temporal_stride: int) -> Tensor:
    """Mean of pixel-frame values `[B, T]` on each latent frame: `[B, F]`."""
    first, rest = frames[:, :1], frames[:, 1:]
    return torch.cat([first, rest.unflatten(1, (-1, temporal_stride)).mean(dim=2)], dim=1)


def with_hidden_frames(weights: Tensor, num_frames: int) -> Tensor:
    """Weights `[B, F]` of all latent frames, from those of the frames that pixels show; `[B, 1]` stays as it is.

    Any before them share the first one's patch, and get its weight.
    """
    hidden = 0 if weights.shape[1] == 1 else num_frames - weights.shape[1]
    return torch.cat([weights[:, :1].expand(-1, hidden), weights], dim=1)
