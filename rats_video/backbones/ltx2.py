"""LTX-2 and 2.3, text or a picture to video with sound: `diffusers.LTX2Pipeline`, `LTX2ImageToVideoPipeline`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from rats_video.backbones.family import DENOISER, NUM_TRAIN_TIMESTEPS, refuse_last, token_timesteps
from rats_video.backbones.ltx import LTXBackbone
from rats_video.backbones.ltx2_guidance import guide
from rats_video.backbones.sizes import divide_clip
from rats_video.backbones.stock import StockCall
from rats_video.condition import Condition, GivenFrames
from rats_video.config.guidance import AudioVideoGuidance
from rats_video.errors import UserError
from rats_video.sound import Sound
from rats_video.types import ClipSpec, FurtherGuidance, Guide

TEXT_LENGTH = 1024  # rows LTX2Pipeline pads every prompt to; the connectors turn the padding into registers
VOCODERS = ("LTX2Vocoder", "LTX2VocoderWithBWE")  # of LTX-2, and of 2.3


class LTX2Backbone(LTXBackbone):
    """An LTX-2 pipeline's models: `transformer`, `vae`, `audio_vae`, `vocoder`, `text_encoder` (Gemma 3), `connectors`.

    A clip's latents are those of its pictures `[B, C, F, H, W]` and, behind them along F, as many further frames as
    hold the numbers of its sound, L latents of D numbers; the rest of the last one is 0. So they are one tensor for
    every solver step, average and file, and a picture is held in the first frame as in any family. `split` takes them
    apart. The fps says how long the sound is.

    Encoded prompts are what the connectors make of them, for pictures and for sound side by side.
    """

    family = "LTX-2"
    pipelines = ("LTX2Pipeline",)
    text_limit = TEXT_LENGTH
    has_sound = True
    can_share_tokens = False  # of diffusers' plan the sound has no part
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "audio_ff.net.0.proj", "audio_ff.net.2",
    )  # fmt: skip
    original_names = (
        (r"^(audio_)?proj_in\.", r"\1patchify_proj."),
        (r"^(audio_)?time_embed\.", r"\1adaln_single."),
        (r"^(audio_)?prompt_adaln\.", r"\1prompt_adaln_single."),
        (r"^av_cross_attn_(video|audio)_scale_shift\.", r"av_ca_\1_scale_shift_adaln_single."),
        (r"^av_cross_attn_(?:video|audio)_(a2v|v2a)_gate\.", r"av_ca_\1_gate_adaln_single."),
        (r"\.(video|audio)_a2v_cross_attn_scale_shift_table$", r".scale_shift_table_a2v_ca_\1"),
        (r"\.norm_([qk])\.", r".\1_norm."),
    )

    @classmethod
    def native_clip(cls, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:  # noqa: ARG003
        """`LTX2Pipeline`'s defaults."""
        return {"num_frames": 121, "fps": 24.0}

    @classmethod
    def further_guidance(cls, configs: Mapping[str, Mapping[str, Any]]) -> AudioVideoGuidance:
        """`LTX2Pipeline`'s defaults, without the call that would change nothing."""
        denoiser, settings = configs.get(DENOISER, {}), AudioVideoGuidance()
        if denoiser.get("perturbed_attn") and denoiser.get("num_layers", 48) > max(settings.stg_blocks):
            return settings
        return AudioVideoGuidance(stg_scale=0, audio_stg_scale=0)

    @classmethod
    def component_classes(cls) -> dict[str, Any]:
        """The class of each part."""
        from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2VideoTransformer3DModel
        from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
        from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

        return {
            "transformer": LTX2VideoTransformer3DModel,
            "vae": AutoencoderKLLTX2Video,
            "audio_vae": AutoencoderKLLTX2Audio,
            "vocoder": LTX2Vocoder,
            "connectors": LTX2TextConnectors,
            "text_encoder": Gemma3ForConditionalGeneration,
            "tokenizer": AutoTokenizer,
        }

    @classmethod
    def classes_in(cls, index: Mapping[str, Any]) -> dict[str, Any]:
        """Theirs, with the vocoder that the folder has."""
        from diffusers.pipelines import ltx2

        _, named = index.get("vocoder", (None, VOCODERS[0]))
        return {**cls.component_classes(), "vocoder": getattr(ltx2, named if named in VOCODERS else VOCODERS[0])}

    @classmethod
    def check(cls, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]], where: str) -> None:
        """As every family; LTX-2.5 reads its prompts with another text encoder.

        Raises:
            UserError: it is LTX-2.5, or takes pictures or sound in patches.
        """
        super().check(index, configs, where)
        text = configs.get("text_encoder", {}).get("model_type", "gemma3")
        if text != "gemma3":
            what = f"its text encoder is a {text!r}, as LTX-2.5's: LTX-2 and 2.3 have a 'gemma3'"
            raise UserError(what, where=where, fix="give LTX-2 or 2.3")
        patches = [f"{sound}patch_size{time}" for sound in ("", "audio_") for time in ("", "_t")]
        if large := [key for key in patches if configs.get(DENOISER, {}).get(key, 1) != 1]:
            what = f"its transformer has {large[0]} {configs[DENOISER][large[0]]}: every latent of LTX-2 is a token"
            raise UserError(what, where=where, fix="give LTX-2 or 2.3")

    @property
    def sound_width(self) -> int:
        """D, the numbers of one latent of the sound: its channels and mel bins."""
        vae = self.parts["audio_vae"]
        return int(vae.config.latent_channels * vae.config.mel_bins // vae.mel_compression_ratio)

    def sound_length(self, num_frames: int, fps: float) -> int:
        """L, the latents of the sound of that many pixel frames, as the pipeline counts them."""
        vae = self.parts["audio_vae"]
        a_second: float = vae.config.sample_rate / vae.config.mel_hop_length / float(vae.temporal_compression_ratio)
        return round(num_frames / fps * a_second)

    def latent_shape(self, clip: ClipSpec) -> tuple[int, int, int, int]:
        """`(C, F, H, W)` of a clip's latents, with the frames that hold its sound.

        Raises:
            UserError: the VAE cannot divide the clip, or it is too small for its decoder, or too short for a sound.
        """
        # A decoder that mirrors pictures at their edges, as published, needs two latents a side.
        least = 2 if self.vae.config.decoder_spatial_padding_mode == "reflect" else 1
        strides, channels = (self.temporal_stride, self.spatial_stride), self.latent_channels
        frames, height, width = divide_clip(clip, *strides, self.patch_size, least)
        if self.sound_length(clip.num_frames, clip.fps) < 1:
            raise UserError(f"{clip.num_frames} are too few for a sound at {clip.fps:g} fps", where="clip.num_frames",
                            fix=f"take {1 + self.temporal_stride} or more")  # fmt: skip
        return channels, frames + self._sound_frames(frames, channels * height * width, clip.fps), height, width

    def _sound_frames(self, frames: int, numbers: int, fps: float) -> int:
        """The frames of so many `numbers` that hold the sound of that many latent `frames` of pictures."""
        length = self.sound_length(1 + (frames - 1) * self.temporal_stride, fps)
        return math.ceil(length * self.sound_width / numbers)

    def num_pictures(self, shape: Sequence[int]) -> int:
        """How many of the frames of latents `[..., C, F, H, W]` are pictures' (the others hold the sound)."""
        channels, frames, height, width = shape[-4:]
        numbers = channels * height * width
        fits = (n for n in range(1, frames) if n + self._sound_frames(n, numbers, self.fps) == frames)
        if (found := next(fits, None)) is None:
            raise ValueError(f"no clip at {self.fps:g} fps has latents of {tuple(shape)}")
        return found

    def split(self, latents: Tensor) -> Mapping[str, Tensor]:
        """`video` `[B, C, F, H, W]` and `audio` `[B, D, L, 1, 1]`."""
        pictures = self.num_pictures(latents.shape)
        length = self.sound_length(1 + (pictures - 1) * self.temporal_stride, self.fps)
        numbers = latents[:, :, pictures:].flatten(1)[:, : length * self.sound_width]
        return {"video": latents[:, :, :pictures], "audio": rearrange(numbers, "b (l d) -> b d l 1 1", l=length)}

    def join(self, video: Tensor, audio: Tensor) -> Tensor:
        """The inverse of `split`."""
        batch, channels, pictures, height, width = video.shape
        frames = self._sound_frames(pictures, channels * height * width, self.fps)
        numbers = rearrange(audio, "b d l 1 1 -> b (l d)").to(video.dtype)
        padded = F.pad(numbers, (0, frames * channels * height * width - numbers.shape[1]))
        return torch.cat([video, padded.view(batch, channels, frames, height, width)], dim=2)

    def sample_noise(self, batch: int, clip: ClipSpec, generator: torch.Generator) -> Tensor:
        """Standard normal, but for the 0 behind the sound."""
        return self.join(**self.split(super().sample_noise(batch, clip, generator)))

    def _encode(self, prompts: Sequence[str]) -> Condition:
        """What the connectors make of all layers `[B, L, Dv + Da]`, with its mask; of one prompt at a time."""
        return Condition.cat([self._encode_one(prompt) for prompt in prompts])

    def _encode_one(self, prompt: str) -> Condition:
        tokens = self.parts["tokenizer"](
            [prompt.strip()], padding="max_length", padding_side="left", max_length=self.text_limit, truncation=True,
            return_tensors="pt",
        ).to(self.device)  # fmt: skip
        # Without its head, which would make a number of each token and word.
        seen = self.parts["text_encoder"].model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
        )
        layers = torch.stack(seen.hidden_states, dim=-1).flatten(2, 3)
        video, audio, mask = self.parts["connectors"](layers, tokens.attention_mask, padding_side="left")
        return Condition(torch.cat([video, audio], dim=-1), mask)

    def given_frames(self, clip: ClipSpec, first: Tensor, last: Tensor | None = None) -> GivenFrames:
        """Held, as in `LTX2ImageToVideoPipeline`, but as it is: that one first compresses the picture as a film is."""
        refuse_last(last, "LTX-2")
        return GivenFrames.hold_first(self.encode(first[:, None]), self.latent_shape(clip)[1])

    def _velocity(self, latents: Tensor, sigma: Tensor, condition: Condition, **changed: Any) -> Tensor:
        """One call; `changed` are arguments of the transformer that guidance changes."""
        transformer, parts = self.parts["transformer"], self.split(latents)
        config, (frames, height, width) = transformer.config, parts["video"].shape[2:]
        levels, timestep = condition.levels(sigma), sigma * NUM_TRAIN_TIMESTEPS
        levels = levels if levels.ndim == 1 else levels[:, :frames]
        video_text = config.caption_channels if config.use_prompt_embeddings else config.cross_attention_dim
        texts = condition.embeds.to(transformer.dtype).tensor_split([video_text], dim=-1)
        video, audio = transformer(
            rearrange(parts["video"], "b c f h w -> b (f h w) c").to(transformer.dtype),
            rearrange(parts["audio"], "b d l 1 1 -> b l d").to(transformer.dtype),
            *texts, token_timesteps(levels, height * width), timestep, timestep,
            encoder_attention_mask=condition.mask, audio_encoder_attention_mask=condition.mask,
            num_frames=frames, height=height, width=width, fps=self.fps, audio_num_frames=parts["audio"].shape[2],
            use_cross_timestep=True, return_dict=False, **changed,
        )  # fmt: skip
        return self.join(
            rearrange(video, "b (f h w) c -> b c f h w", f=frames, h=height).to(latents.dtype),
            rearrange(audio, "b l d -> b d l 1 1").to(latents.dtype),
        )

    def decode(self, latents: Tensor, grad_frames: range | None = None) -> Tensor:
        """Pixels `[B, T, 3, height, width]` in [0, 1], differentiable, of the pictures' latents."""
        return super().decode(self.split(latents)["video"], grad_frames)

    def decode_sound(self, latents: Tensor) -> Sound:
        """The audio VAE's spectrogram as the vocoder plays it; differentiable."""
        vae, vocoder = self.parts["audio_vae"], self.parts["vocoder"]
        spectrogram = rearrange(self._sound_of_vae(latents), "b l (c m) -> b c l m", c=vae.config.latent_channels)
        waves: Tensor = vocoder(vae.decode(spectrogram, return_dict=False)[0])
        return Sound(waves.to(latents.dtype), int(vocoder.config.output_sampling_rate))

    def _sound_of_vae(self, latents: Tensor) -> Tensor:
        """The sound's latents `[B, L, D]` as the audio VAE wants them: their normalisation undone."""
        vae = self.parts["audio_vae"]
        tokens = rearrange(self.split(latents)["audio"], "b d l 1 1 -> b l d").to(vae.dtype)
        made: Tensor = tokens * vae.latents_std.to(tokens) + vae.latents_mean.to(tokens)
        return made

    def guidance(self, further: FurtherGuidance | None = None) -> Guide:
        """By the text alone, at one scale for pictures and sound; or as `LTX2Pipeline` guides, by `further`.

        Raises:
            UserError: spatio-temporal guidance would do nothing here.
        """
        if not isinstance(further, AudioVideoGuidance):
            return super().guidance(further)
        config = self.parts["transformer"].config
        if further.uses_stg and not config.perturbed_attn:
            what = "this transformer cannot skip its self-attention (LTX-2; 2.3 can): the call would change nothing"
            raise UserError(
                what, where="teacher.further_guidance.stg_scale", fix="set stg_scale and audio_stg_scale to 0"
            )
        is_plan = self.parts["transformer"].device.type == "meta"  # of a transformer that is cut short
        if further.uses_stg and not is_plan and max(further.stg_blocks) >= config.num_layers:
            what = f"its transformer has {config.num_layers} blocks, got {max(further.stg_blocks)}"
            fix = f"take 0 to {config.num_layers - 1}"
            raise UserError(what, where="teacher.further_guidance.stg_blocks", fix=fix)
        return Guide(partial(guide, self, further), 2 + further.calls)

    def stock_call(self, num_steps: int, shift: float) -> StockCall:
        """As most; each kind of guidance, which a student has none of, is switched off by its own argument."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        off = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
        off |= {f"audio_{name}": value for name, value in off.items()}
        return StockCall(
            FlowMatchEulerDiscreteScheduler(shift=shift),
            {"num_inference_steps": num_steps, "frame_rate": self.fps, **off},
            latents=lambda noise: self._to_vae(self.split(noise)["video"]),  # it takes their statistics out again
            seen=lambda latents: rearrange(self.split(latents)["video"], "b c f h w -> b (f h w) c"),
            beside=lambda noise: {"audio_latents": self._sound_of_vae(noise)},
        )  # fmt: skip

    @property
    def picture_pipeline(self) -> str:
        """Of image to video."""
        return "LTX2ImageToVideoPipeline"

    def picture_call(self, stock: StockCall) -> StockCall:
        """That one compresses a picture first as films are, unless it is told not to; it needs its latents made."""
        quiet = {"image_crf": 0}
        return replace(stock, call={**stock.call, **quiet}, note="image_crf=0: the picture as it is, as in training")
