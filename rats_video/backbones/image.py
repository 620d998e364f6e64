"""The base of text-to-image families: their clips have one frame."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.family import dynamic_shift
from rats_video.errors import UserError
from rats_video.types import ClipSpec


class ImageBackbone(PipelineBackbone):
    """A pipeline of images, `[B, C, 1, H, W]` as latents.

    Where shifting is dynamic, the shift is the scheduler's for as many tokens as the image has. Its stretch to
    `shift_terminal` is left out, as LTX-Video's is: stretched grids do not nest.
    """

    makes = "image"
    text_first = True
    exact_window = False
    packing: ClassVar[int] = 1
    """Latent rows, and columns, that the pipeline packs into one token."""

    @classmethod
    def native_clip(cls, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:  # noqa: ARG003
        """One square megapixel, as the pipelines' `default_sample_size` says."""
        return {"num_frames": 1, "height": 1024, "width": 1024, "fps": 1.0}

    @property
    def temporal_stride(self) -> int:
        """There is one frame."""
        return 1

    @property
    def latent_channels(self) -> int:
        """C of the latents; the transformer takes those of a token as its channels."""
        return super().latent_channels // self.packing**2

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns a token."""
        return 1, self.packing, self.packing

    def latent_shape(self, clip: ClipSpec) -> tuple[int, int, int, int]:
        """`(C, 1, H, W)` of an image's latents.

        Raises:
            UserError: the clip has several frames, or the VAE or the transformer's patches cannot divide it.
        """
        if clip.num_frames != 1:
            what = f"{self.family} makes images, which have one frame, got {clip.num_frames}"
            raise UserError(what, where="clip.num_frames", fix="take 1")
        return super().latent_shape(clip)

    def stated(self, scheduler: Mapping[str, Any], clip: ClipSpec) -> dict[str, float]:
        """The scheduler's shift; where shifting is dynamic, for as many tokens as the image has."""
        if not scheduler.get("use_dynamic_shifting"):
            return super().stated(scheduler, clip)
        return dynamic_shift(scheduler, math.prod(self.latent_shape(clip)[1:]) // math.prod(self.patch_size))


class KlImageBackbone(ImageBackbone):
    """The base of those whose VAE is diffusers' `AutoencoderKL` of pictures."""

    @property
    def spatial_stride(self) -> int:
        """Pixels a latent row or column."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def _tokens(self, tokenizer: str, prompts: Sequence[str], length: int) -> Tensor:
        """Ids `[B, length]` by the part of that name, padded and cut to one length."""
        tokens = self.parts[tokenizer](
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        ids: Tensor = tokens.input_ids.to(self.device)
        return ids

    def _to_vae(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        return latents / float(config.scaling_factor) + float(config.shift_factor)

    def _from_vae(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        return (latents - float(config.shift_factor)) * float(config.scaling_factor)

    def _posterior_mean(self, pixels: Tensor) -> Tensor:
        return super()._posterior_mean(pixels.squeeze(2)).unsqueeze(2)

    def _decode(self, latents: Tensor, grad_frames: range | None) -> Tensor:
        refuse_window(grad_frames)
        vae = self.vae
        (vae.enable_gradient_checkpointing if self.decoding.checkpoint else vae.disable_gradient_checkpointing)()
        pixels: Tensor = vae.decode(latents.squeeze(2), return_dict=False)[0]
        return pixels.unsqueeze(2)

    def _decode_tiles(self, latents: Tensor, grad_frames: range | None) -> Tensor:
        return self._decode(latents, grad_frames)


def refuse_window(grad_frames: range | None) -> None:
    """Raise ValueError for a window of frames, which an image has not."""
    if grad_frames is not None:
        raise ValueError("an image has no window of frames")


def pack(latents: Tensor) -> Tensor:
    """`[B, C, 1, 2 H, 2 W]` as tokens `[B, H W, 4 C]`."""
    return rearrange(latents, "b c 1 (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(tokens: Tensor, rows: int) -> Tensor:
    """The inverse of `pack`: tokens of H `rows`."""
    return rearrange(tokens, "b (h w) (c p q) -> b c 1 (h p) (w q)", h=rows, p=2, q=2)
