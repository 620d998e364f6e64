"""Latents that are normalised by a mean and a deviation of each channel."""

from __future__ import annotations

from torch import Tensor

from rats_video.backbones.base import PipelineBackbone


class ChannelStatsBackbone(PipelineBackbone):
    """The base of families whose VAE states the statistics of its latents; by default in its configuration."""

    def _to_vae(self, latents: Tensor) -> Tensor:
        mean, std = self._latent_stats(latents)
        return latents * std + mean

    def _from_vae(self, latents: Tensor) -> Tensor:
        mean, std = self._latent_stats(latents)
        return (latents - mean) / std

    def _latent_stats(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation, `[1, C, 1, 1, 1]` each, in the dtype and on the device of `like`."""
        mean, std = like.new_tensor(self.vae.config.latents_mean), like.new_tensor(self.vae.config.latents_std)
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)
