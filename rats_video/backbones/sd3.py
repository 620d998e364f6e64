"""Stable Diffusion 3 and 3.5 text-to-image, from any folder that `diffusers.StableDiffusion3Pipeline` loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rats_video.backbones.family import NUM_TRAIN_TIMESTEPS
from rats_video.backbones.image import KlImageBackbone
from rats_video.backbones.stock import StockCall
from rats_video.condition import Condition
from rats_video.errors import UserError
from rats_video.types import ClipSpec

TEXT_LENGTH = 256  # rows of T5 features a prompt, as many as the pipeline takes unless it is told otherwise
CLIP_LENGTH = 77  # rows of both CLIPs' features before them
CLIP_LAYER = -2  # hidden states taken


class StableDiffusion3Backbone(KlImageBackbone):
    """A Stable Diffusion 3 pipeline's models: `transformer`, `vae`, two CLIPs and a T5 (`text_encoder` to `_3`).

    Guidance is the plain formula. The skipped layers that its authors advise for 3.5 medium, a third call a step, are
    left out, as the pipeline leaves them out unless it is asked.
    """

    family = "Stable Diffusion 3"
    pipelines = ("StableDiffusion3Pipeline",)
    main_tokenizer = "tokenizer_3"
    text_limit = TEXT_LENGTH
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip

    @classmethod
    def component_classes(cls) -> dict[str, Any]:
        """The class of each part."""
        from diffusers import AutoencoderKL, SD3Transformer2DModel
        from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

        return {
            "transformer": SD3Transformer2DModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModelWithProjection,
            "tokenizer": AutoTokenizer,
            "text_encoder_2": CLIPTextModelWithProjection,
            "tokenizer_2": AutoTokenizer,
            "text_encoder_3": T5EncoderModel,
            "tokenizer_3": AutoTokenizer,
        }

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns a token."""
        size = int(self.parts["transformer"].config.patch_size)
        return 1, size, size

    def latent_shape(self, clip: ClipSpec) -> tuple[int, int, int, int]:
        """`(C, 1, H, W)` of an image's latents.

        Raises:
            UserError: as every family, or the transformer knows no places for so large an image.
        """
        shape, (_, rows, _) = super().latent_shape(clip), self.patch_size
        known = int(self.parts["transformer"].config.pos_embed_max_size) * rows
        if max(shape[2:]) > known:
            what = f"{clip.height} x {clip.width} is larger than the positions it was made with"
            raise UserError(what, where="clip", fix=f"at most {known * self.spatial_stride} pixels a side")
        return shape

    def _encode(self, prompts: Sequence[str]) -> Condition:
        """Both CLIPs' features beside each other, T5's behind them: `[B, 333, D]`; and pooled `[B, P]`."""
        clips = [
            self.parts[f"text_encoder{number}"](
                self._tokens(f"tokenizer{number}", prompts, CLIP_LENGTH), output_hidden_states=True
            )
            for number in ("", "_2")
        ]
        t5 = self.parts["text_encoder_3"](self._tokens("tokenizer_3", prompts, TEXT_LENGTH))[0]
        seen = torch.cat([clip.hidden_states[CLIP_LAYER] for clip in clips], dim=-1)
        return Condition(
            torch.cat([pad(seen, (0, t5.shape[-1] - seen.shape[-1])), t5], dim=1),
            pooled=torch.cat([clip.text_embeds for clip in clips], dim=-1),
        )

    def _velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        transformer = self.parts["transformer"]
        own = condition.map(lambda part: part.to(transformer.dtype))
        velocity: Tensor = transformer(
            latents.squeeze(2).to(transformer.dtype), own.embeds, own.pooled, sigma * NUM_TRAIN_TIMESTEPS,
            return_dict=False,
        )[0]  # fmt: skip
        return velocity.unsqueeze(2).to(latents.dtype)

    def stock_call(self, num_steps: int, shift: float) -> StockCall:
        """`FlowMapEulerDiscreteScheduler` shifts equal steps of [1, 0] once.

        `FlowMatchEulerDiscreteScheduler` would shift twice there, as the pipeline passes no sigmas.
        """
        from diffusers import FlowMapEulerDiscreteScheduler

        stock = super().stock_call(num_steps, shift)
        return replace(
            stock, scheduler=FlowMapEulerDiscreteScheduler(shift=shift), latents=lambda noise: noise.squeeze(2)
        )
