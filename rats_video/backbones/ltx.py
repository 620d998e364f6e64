"""LTX-Video text-to-video, 0.9.0 to 0.9.8: `diffusers.LTXPipeline` and `LTXConditionPipeline`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor

from rats_video.backbones.channel_stats import ChannelStatsBackbone
from rats_video.backbones.family import NUM_TRAIN_TIMESTEPS, dynamic_shift, refuse_last, token_timesteps
from rats_video.backbones.stock import StockCall
from rats_video.condition import Condition, GivenFrames
from rats_video.diffusion.flow import add_noise
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

TEXT_LENGTH = 128  # rows LTXPipeline pads every prompt to; the mask leaves the padding out
TEXT_LENGTH_095 = 256  # the same of LTXConditionPipeline
# VAEs since 0.9.1 finish the denoising: as diffusers advises, they are shown a little noise and told how much.
DECODE_TIMESTEP, DECODE_NOISE, DECODE_SEED = 0.05, 0.025, 0


class LTXBackbone(ChannelStatsBackbone):
    """An LTX-Video pipeline's four models: `transformer`, `vae`, `text_encoder`, `tokenizer`.

    The native scheduler's shift for a clip of S tokens is `exp(mu)`, mu running from `base_shift` at
    `base_image_seq_len` tokens to `max_shift` at `max_image_seq_len`. Its stretch to `shift_terminal` is left out:
    stretched grids of N and 4 N steps do not nest.
    """

    family = "LTX-Video"
    pipelines: tuple[str, ...] = ("LTXPipeline", "LTXConditionPipeline")
    text_limit = TEXT_LENGTH
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    exact_window = False
    can_share_tokens = True
    has_small_decoder = False
    lora_alpha_tensors = False
    original_names: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^proj_in\.", "patchify_proj."),
        (r"^time_embed\.", "adaln_single."),
        (r"\.norm_([qk])\.", r".\1_norm."),
    )

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        if self.is_095:
            self.text_limit, self.pipelines = TEXT_LENGTH_095, ("LTXConditionPipeline",)

    @classmethod
    def native_clip(cls, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:  # noqa: ARG003
        """As its authors sample it."""
        return {"fps": 25.0}

    @classmethod
    def component_classes(cls) -> dict[str, Any]:
        """The class of each part."""
        from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel
        from transformers import AutoTokenizer, T5EncoderModel

        return {
            "transformer": LTXVideoTransformer3DModel,
            "vae": AutoencoderKLLTXVideo,
            "text_encoder": T5EncoderModel,
            "tokenizer": AutoTokenizer,
        }

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Every latent is a token: the VAE has compressed enough."""
        return 1, 1, 1

    def _encode(self, prompts: Sequence[str]) -> Condition:
        """Embeds `[B, L, D]` and mask `[B, L]` (bool), L = `text_limit`, as the version's pipeline gives them.

        T5 attends to the padding in LTXPipeline, and does not in LTXConditionPipeline.
        """
        inputs = self.parts["tokenizer"](
            list(prompts), padding="max_length", max_length=self.text_limit, truncation=True, return_tensors="pt"
        ).to(self.device)
        mask = inputs.attention_mask.bool()
        return Condition(self.parts["text_encoder"](inputs.input_ids, mask if self.is_095 else None)[0], mask)

    @property
    def pictures(self) -> Literal["none", "optional", "needed"]:
        """It takes text alone, or a picture too."""
        return "optional"

    def given_frames(self, clip: ClipSpec, first: Tensor, last: Tensor | None = None) -> GivenFrames:
        """Held, as in `LTXImageToVideoPipeline`; its latents are the posterior's mean, of which it draws one."""
        refuse_last(last, "LTX-Video")
        return GivenFrames.hold_first(self.encode(first[:, None]), self.latent_shape(clip)[1])

    def _velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        transformer = self.parts["transformer"]
        frames, height, width = latents.shape[2:]
        timestep = token_timesteps(condition.levels(sigma), height * width)
        velocity: Tensor = transformer(
            rearrange(latents, "b c f h w -> b (f h w) c").to(transformer.dtype),
            condition.embeds.to(transformer.dtype),
            timestep,
            condition.mask,
            num_frames=frames, height=height, width=width, return_dict=False, **self._places(latents),
        )[0]  # fmt: skip
        return rearrange(velocity, "b (f h w) c -> b c f h w", f=frames, h=height).to(latents.dtype)

    @property
    def is_095(self) -> bool:
        """True for 0.9.5 and later, told by the VAE: the pipeline's name in the folder does not tell."""
        return bool(self.vae.config.down_block_types[-1] == "LTXVideo095DownBlock3D")

    def _places(self, latents: Tensor) -> dict[str, Any]:
        """The tokens' places in seconds and pixels, as the transformer's arguments.

        Since 0.9.5 a latent frame lies where its first pixel frame does, and the first one, which holds one pixel
        frame alone, at 0: `LTXConditionPipeline._scale_video_ids`. Before, they were evenly spaced.
        """
        time, space = self.temporal_stride, self.spatial_stride
        if not self.is_095:
            return {"rope_interpolation_scale": (time / self.fps, space, space)}
        frames, height, width = (torch.arange(float(size), device=latents.device) for size in latents.shape[2:])
        seconds = (frames * time + 1 - time).clamp(min=0) / self.fps
        places = torch.stack(torch.meshgrid(seconds, height * space, width * space, indexing="ij")).flatten(1)
        return {"video_coords": places.expand(len(latents), -1, -1)}

    def stated(self, scheduler: Mapping[str, Any], clip: ClipSpec) -> dict[str, float]:
        """Where shifting is dynamic, the shift for as many tokens as the clip has: see the class."""
        if not scheduler.get("use_dynamic_shifting"):
            return super().stated(scheduler, clip)
        tokens = ChannelStatsBackbone.latent_shape(self, clip)[1:]  # of pictures alone, where there is sound too
        return dynamic_shift(scheduler, math.prod(tokens))

    def stock_call(self, num_steps: int, shift: float) -> StockCall:
        """As most; without dynamic shifting the scheduler ignores LTX's `mu`."""
        rate = int(self.fps) if self.fps == int(self.fps) else self.fps
        stock = super().stock_call(num_steps, shift)
        call: dict[str, Any] = {**stock.call, "frame_rate": rate}
        if self.vae.config.timestep_conditioning:
            call |= {"decode_timestep": DECODE_TIMESTEP, "decode_noise_scale": DECODE_NOISE}
        name, note = self.pipelines[0], f"frame_rate={rate}, the rate it was trained at"
        if self.is_095:  # whose own are others; those that are given reach the network as they are, unshifted
            timesteps = (self.sigmas(num_steps, shift)[:-1] * NUM_TRAIN_TIMESTEPS).tolist()
            del call["num_inference_steps"]
            call, note = call | {"timesteps": timesteps}, f"{note}, and timesteps={timesteps}"
            stock = replace(stock, scheduler=type(stock.scheduler)(shift=1.0))
        return replace(
            stock, call=call, latents=lambda noise: rearrange(noise, "b c f h w -> b (f h w) c"), seed=DECODE_SEED,
            note=f"{name} must be told {note}", draws_noise=self.is_095,
        )  # fmt: skip

    @property
    def picture_pipeline(self) -> str:
        """Since 0.9.5 one pipeline serves both."""
        return "LTXConditionPipeline" if self.is_095 else "LTXImageToVideoPipeline"

    def picture_call(self, stock: StockCall) -> StockCall:
        """Since 0.9.5 the pipeline adds noise to the picture unless it is told not to."""
        if not self.is_095:
            return replace(stock, note=stock.note.replace(self.pipelines[0], self.picture_pipeline))
        quiet = {"image_cond_noise_scale": 0.0}
        return replace(
            stock, call={**stock.call, **quiet}, note=f"{stock.note}, and image_cond_noise_scale=0.0, as in training"
        )

    def _latent_stats(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (stat.to(like).view(1, -1, 1, 1, 1) for stat in (self.vae.latents_mean, self.vae.latents_std))
        return mean, std / self.vae.config.scaling_factor

    def _decode_tiles(self, latents: Tensor, grad_frames: range | None) -> Tensor:
        return self._decode(latents, grad_frames)  # the VAE's own decode, with what it has to be told

    def _decode(self, latents: Tensor, grad_frames: range | None) -> Tensor:
        """A deterministic function of each clip: all noise a VAE asks for is the same for every clip and call."""
        if grad_frames is not None:
            raise ValueError("no window of LTX-Video's decoder is exact")
        vae, timestep = self.vae, None
        (vae.enable_gradient_checkpointing if self.decoding.checkpoint else vae.disable_gradient_checkpointing)()
        if vae.config.timestep_conditioning:
            noise = torch.randn(latents.shape[1:], generator=seeded(DECODE_SEED)).to(latents)
            latents = add_noise(latents, noise, latents.new_full((len(latents),), DECODE_NOISE))
            timestep = latents.new_full((len(latents),), DECODE_TIMESTEP)
        with torch.random.fork_rng([latents.device] if latents.is_cuda else []):
            torch.manual_seed(DECODE_SEED)  # some VAEs' layers add noise from the global generator
            pixels: Tensor = vae.decode(latents, timestep, return_dict=False)[0]
        return pixels
