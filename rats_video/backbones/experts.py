"""Wan 2.2 A14B's two experts: which of them owns a noise level, hence each step of a sampler.

Distillation needs nothing of it: student and teacher are compared at the same noise levels, and a step is made, and
trained, by the expert that owns the level it starts from.
"""

from __future__ import annotations

from torch import Tensor

from rats_video.backbones.family import NUM_TRAIN_TIMESTEPS

HIGH_NOISE, LOW_NOISE = "transformer", "transformer_2"  # folders of the pipeline


def is_low_noise(sigma: Tensor, boundary_ratio: float) -> Tensor:
    """True where `transformer_2` owns the noise level: below the boundary, which itself is still `transformer`'s.

    Timesteps are compared, not sigmas, so that rounding falls as it does in `WanPipeline`.
    """
    return sigma * NUM_TRAIN_TIMESTEPS < boundary_ratio * NUM_TRAIN_TIMESTEPS


def expert_by_step(sigmas: Tensor, boundary_ratio: float | None) -> list[str]:
    """Folder name of the expert that makes each of N steps along a grid `[N + 1]`; without a boundary, always one."""
    if boundary_ratio is None:
        return [HIGH_NOISE] * (len(sigmas) - 1)
    return [LOW_NOISE if low else HIGH_NOISE for low in is_low_noise(sigmas[:-1], boundary_ratio).tolist()]
