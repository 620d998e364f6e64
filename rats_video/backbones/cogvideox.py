"""CogVideoX text-to-video (2b, 5b and 1.5), from any folder that `diffusers.CogVideoXPipeline` loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.cogvideox_decode import decode_cogvideox
from rats_video.backbones.family import DENOISER
from rats_video.backbones.sizes import divide_clip, nearest
from rats_video.backbones.stock import StockCall
from rats_video.condition import Condition
from rats_video.diffusion.schedule import sigma_grid
from rats_video.errors import UserError
from rats_video.types import ClipSpec

TEXT_LENGTH = 226  # rows CogVideoXPipeline pads every prompt to; all of them are attended to
_SHIFTS: Mapping[Any, float] = {3.0: 3.0, 1.0: 2.0}  # by `snr_shift_scale`, of the 2b and the 5bs
FRAMES_AT_ONCE = 2  # latent frames the VAE decodes together; a frame left over joins the first two


class CogVideoXBackbone(PipelineBackbone):
    """A CogVideoX pipeline's four models and its scheduler, whose noise levels are part of the model.

    The model sees `x = a x0 + s noise` with `a^2 + s^2 = 1` at one of 1000 timesteps and predicts `v = a noise - s x0`.
    Our latents are `y = x / (a + s)`, which lie on the straight path at `sigma = s / (a + s)`; there

        velocity = noise - x0 = (s x + a v) - (a x - s v) = (s - a) x + (s + a) v,

    and a step of `CogVideoXDDIMScheduler` is an Euler step. The native "trailing" timesteps lie near our grid of
    shift 3 for CogVideoX-2b and shift 2 for CogVideoX-5b and 1.5.

    CogVideoX 1.5 takes latent frames in pairs. The VAE's are odd in number, so one more comes before the first: a copy
    of it where a clip is encoded, as in its authors' training; denoised with the others and not decoded, as in
    `CogVideoXPipeline`.
    """

    family = "CogVideoX"
    pipelines = ("CogVideoXPipeline",)
    text_limit = TEXT_LENGTH
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        signal: Tensor = parts["scheduler"].alphas_cumprod.double()
        self._signal, self._noise = signal.sqrt().float(), (1 - signal).sqrt().float()  # a and s by timestep
        self._levels = self._noise / (self._signal + self._noise)  # [1000], rising to 1

    @classmethod
    def check(cls, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]], where: str) -> None:
        """Refuse what takes an image, does not predict v, does not start from pure noise, or pads otherwise."""
        super().check(index, configs, where)
        schedule = configs.get("scheduler")
        if schedule and (schedule["prediction_type"] != "v_prediction" or not schedule["rescale_betas_zero_snr"]):
            raise UserError(
                "not a CogVideoX schedule", where=f"{where}: scheduler/scheduler_config.json",
                fix="needs prediction_type v_prediction and rescale_betas_zero_snr true",
            )  # fmt: skip
        if (frames := configs.get(DENOISER, {}).get("patch_size_t")) not in (None, FRAMES_AT_ONCE):
            raise UserError(
                f"patch_size_t is {frames}, which no CogVideoX has", where=f"{where}: transformer/config.json",
                fix=f"needs null, or {FRAMES_AT_ONCE} as in CogVideoX 1.5",
            )  # fmt: skip

    @classmethod
    def native_clip(cls, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:  # noqa: ARG003
        """As its authors sample it; the size in a configuration of 1.5 is the largest that it has positions for."""
        if configs.get(DENOISER, {}).get("patch_size_t") is None:
            return {"fps": 8.0}
        return {"num_frames": 81, "height": 768, "width": 1360, "fps": 16.0}

    @classmethod
    def component_classes(cls) -> dict[str, Any]:
        """The class of each part."""
        from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
        from transformers import AutoTokenizer, T5EncoderModel

        return {
            "transformer": CogVideoXTransformer3DModel,
            "vae": AutoencoderKLCogVideoX,
            "text_encoder": T5EncoderModel,
            "tokenizer": AutoTokenizer,
            "scheduler": CogVideoXDDIMScheduler,
        }

    @property
    def temporal_stride(self) -> int:
        """Pixel frames a latent frame, but for the first."""
        return int(self.vae.config.temporal_compression_ratio)

    @property
    def spatial_stride(self) -> int:
        """Pixels a latent row or column."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns a token."""
        config = self.parts["transformer"].config
        return config.patch_size_t or 1, config.patch_size, config.patch_size

    @property
    def _padding(self) -> int:
        """Latent frames before a clip's own, which are odd in number: they fill the first patch."""
        return self.patch_size[0] - 1

    def latent_shape(self, clip: ClipSpec) -> tuple[int, int, int, int]:
        """`(C, F, H, W)` of a clip's latents; F is odd, but even in CogVideoX 1.5, with the one that pads.

        Raises:
            UserError: the VAE, which decodes latent frames in pairs after the first, or the patches cannot divide it;
                or it is larger than CogVideoX 1.5 has positions for.
        """
        if (clip.num_frames - 1) % (step := FRAMES_AT_ONCE * self.temporal_stride):
            raise UserError(
                f"must be 1 + a multiple of {step}, got {clip.num_frames}", where="clip.num_frames",
                fix=nearest(clip.num_frames, 1, step),
            )  # fmt: skip
        config, stride = self.parts["transformer"].config, self.spatial_stride
        for name, pixels, most in (
            ("height", clip.height, config.sample_height * stride), ("width", clip.width, config.sample_width * stride)
        ):  # fmt: skip
            if self._padding and pixels > most:
                raise UserError(
                    f"this model has positions for {most} at most, got {pixels}", where=f"clip.{name}",
                    fix=f"take {most} or less",
                )  # fmt: skip
        rows, columns = self.patch_size[1:]
        frames, height, width = divide_clip(clip, self.temporal_stride, stride, (1, rows, columns))
        return self.latent_channels, self._padding + frames, height, width

    def sigmas(self, num_steps: int, shift: float) -> Tensor:
        """`[num_steps + 1]` noise levels, 1 ... 0: those of the timesteps nearest to the grid of this shift.

        What nests before snapping nests after it.

        Raises:
            UserError: two levels fall on one timestep.
        """
        grid = sigma_grid(num_steps, shift)
        timesteps = self._timesteps(grid[:-1])
        if len(timesteps.unique()) < num_steps:
            raise UserError(
                f"{num_steps} solver steps of shift {shift} meet at one of {self.family}'s timesteps", where="shift",
                fix="take fewer steps or a larger shift",
            )  # fmt: skip
        return torch.cat([self._levels[timesteps], grid[-1:]])

    def nearest_levels(self, sigma: Tensor) -> Tensor:
        """`[B]`: those of the nearest of the 1000 timesteps."""
        return self._levels.to(sigma.device)[self._timesteps(sigma)]

    def _timesteps(self, sigma: Tensor) -> Tensor:
        """The nearest timesteps `[B]`."""
        return (self._levels.to(sigma.device) - sigma[:, None]).abs().argmin(dim=1)

    def _encode(self, prompts: Sequence[str]) -> Condition:
        """Embeds `[B, 226, D]`; neither T5 nor the transformer masks the padding, as in CogVideoXPipeline."""
        inputs = self.parts["tokenizer"](
            list(prompts), padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        ).to(self.device)
        return Condition(self.parts["text_encoder"](inputs.input_ids)[0])

    def _velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        timesteps = self._timesteps(sigma)
        a, s = (table.to(latents)[timesteps].view(-1, 1, 1, 1, 1) for table in (self._signal, self._noise))
        noisy = latents * (a + s)
        return (s - a) * noisy + (s + a) * self._call(noisy, condition, timesteps).to(latents.dtype)

    def _call(self, noisy: Tensor, condition: Condition, timesteps: Tensor, **options: Any) -> Tensor:
        """The transformer's v, `[B, C, F, H, W]`."""
        transformer = self.parts["transformer"]
        v: Tensor = transformer(
            noisy.transpose(1, 2).to(transformer.dtype), condition.embeds.to(transformer.dtype), timesteps,
            image_rotary_emb=self._rotary_embedding(noisy), return_dict=False, **options,
        )[0]  # fmt: skip
        return v.transpose(1, 2)

    def _rotary_embedding(self, latents: Tensor) -> Any:
        """Cosines and sines of each token's place, `[tokens, head_dim]`; None for models that add theirs."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        config = self.parts["transformer"].config
        if not config.use_rotary_positional_embeddings:
            return None
        frames, *grid = (size // patch for size, patch in zip(latents.shape[2:], self.patch_size, strict=True))
        trained = config.sample_height // config.patch_size, config.sample_width // config.patch_size
        if config.patch_size_t is None:  # places are scaled to the size that it was trained at
            places: dict[str, Any] = {"crops_coords": get_resize_crop_region_for_grid(grid, *trained[::-1])}
        else:
            places = {"crops_coords": None, "grid_type": "slice", "max_size": trained}
        return get_3d_rotary_pos_embed(
            config.attention_head_dim, grid_size=grid, temporal_size=frames, device=latents.device, **places
        )

    @torch.no_grad()
    def encode(self, videos: Tensor) -> Tensor:
        """As every family; where frames pad, they are copies of the first."""
        latents = super().encode(videos)
        return torch.cat([latents[:, :, :1]] * self._padding + [latents], dim=2)

    def decode(self, latents: Tensor, grad_frames: range | None = None) -> Tensor:
        """As every family; frames that pad are left out, and a window on them is one on the first."""
        if grad_frames is not None:
            first, last = grad_frames.start - self._padding, grad_frames.stop - self._padding
            grad_frames = range(max(first, 0), max(last, 1))
        return super().decode(latents[:, :, self._padding :], grad_frames)

    def _to_vae(self, latents: Tensor) -> Tensor:
        return latents / float(self.vae.config.scaling_factor)

    def _from_vae(self, latents: Tensor) -> Tensor:
        return latents * float(self.vae.config.scaling_factor)

    def _decode(self, latents: Tensor, grad_frames: range | None) -> Tensor:
        return decode_cogvideox(self.vae, latents, self.decoding, grad_frames)

    def stated(self, scheduler: Mapping[str, Any], clip: ClipSpec) -> dict[str, float]:  # noqa: ARG002
        """The shift nearest to its own timesteps, and the size of the frames that 2b and 5b were trained at."""
        config, pixels = self.parts["transformer"].config, self.spatial_stride
        size = {"clip.height": config.sample_height * pixels, "clip.width": config.sample_width * pixels}
        if config.patch_size_t is not None:  # the largest that it has positions for
            size = {}
        shift = _SHIFTS.get(scheduler.get("snr_shift_scale"))
        return size if shift is None else {"shift": shift, **size}

    def stock_call(self, num_steps: int, shift: float) -> StockCall:
        """`TCDScheduler` at eta 0 is DDIM, and unlike CogVideoX's own scheduler takes a list of timesteps.

        It knows no `snr_shift_scale`, so the schedule is given by its betas. Timestep 0 is the clean clip, as the
        end is.
        """
        from diffusers import TCDScheduler

        signal: Tensor = self.parts["scheduler"].alphas_cumprod.double().clone()
        levels = (1 - signal).sqrt() / (signal.sqrt() + (1 - signal).sqrt())
        grid = self.sigmas(num_steps, shift)[:-1].double()
        timesteps: list[int] = (levels - grid[:, None]).abs().argmin(dim=1).tolist()
        signal[0] = 1
        betas = torch.cat([signal.new_zeros(1), 1 - signal[1:] / signal[:-1]])
        scheduler = TCDScheduler(
            trained_betas=betas.tolist(), prediction_type="v_prediction", clip_sample=False,
            original_inference_steps=len(betas),
        )  # fmt: skip
        return StockCall(
            scheduler, {"timesteps": timesteps, "guidance_scale": 1.0}, latents=lambda noise: noise.transpose(1, 2),
            note=f"CogVideoXPipeline must be given timesteps={timesteps}: no scheduler configuration holds them",
        )  # fmt: skip
