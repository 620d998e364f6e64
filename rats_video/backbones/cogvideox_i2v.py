"""CogVideoX image-to-video (5b and 1.5), from any folder that `diffusers.CogVideoXImageToVideoPipeline` loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rats_video.backbones.cogvideox import CogVideoXBackbone
from rats_video.backbones.family import DENOISER, need_picture, refuse_last
from rats_video.condition import Condition, GivenFrames
from rats_video.types import ClipSpec

OFS = 2.0  # what the pipeline tells 1.5 by its embedding of that name, whatever the picture


class CogVideoXImageBackbone(CogVideoXBackbone):
    """As CogVideoX; the first frame's latents are further channels of the denoiser's input, 0 in the other frames."""

    pipelines = ("CogVideoXImageToVideoPipeline",)
    needs_picture = True

    @classmethod
    def knows(cls, index: Mapping[str, Any]) -> bool:
        """True for its own pipeline alone: the networks' classes are those of text to video."""
        return index["_class_name"] in cls.pipelines

    def _call(self, noisy: Tensor, condition: Condition, timesteps: Tensor, **options: Any) -> Tensor:
        channels = need_picture(condition)
        if self.parts[DENOISER].config.ofs_embed_dim is not None:
            options["ofs"] = noisy.new_full((1,), OFS)
        return super()._call(torch.cat([noisy, channels.to(noisy)], dim=1), condition, timesteps, **options)

    @torch.no_grad()
    def given_frames(self, clip: ClipSpec, first: Tensor, last: Tensor | None = None) -> GivenFrames:
        """The latents of first frames `[B, 3, height, width]` in [0, 1]: the mean, where the pipeline draws them."""
        refuse_last(last, "CogVideoX")
        latents = self.encode(first[:, None])[:, :, :1]  # where a frame pads, the pipeline has the picture in it alone
        if self.vae.config.invert_scale_latents:  # 1.5 was trained with them so
            latents = latents / float(self.vae.config.scaling_factor) ** 2
        missing = self.latent_shape(clip)[1] - latents.shape[2]
        return GivenFrames(channels=F.pad(latents, (0, 0, 0, 0, 0, missing)))
