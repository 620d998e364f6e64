"""Wan 2.1 and 2.2 text-to-video, from any folder that `diffusers.WanPipeline` loads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rats_video.backbones.channel_stats import ChannelStatsBackbone
from rats_video.backbones.experts import HIGH_NOISE, LOW_NOISE, is_low_noise
from rats_video.backbones.family import refuse_last, token_timesteps
from rats_video.backbones.stock import StockCall
from rats_video.backbones.wan_decode import decode_unclamped
from rats_video.condition import Condition, GivenFrames
from rats_video.errors import UserError
from rats_video.types import ClipSpec

ADDS_TO_LOGITS = (None, "native", "_native_math")  # attention kernels that take any additive mask
TEXT_LENGTH = 512  # rows WanPipeline's cross-attention sees: the prompt's, then zeros


class WanBackbone(ChannelStatsBackbone):
    """A Wan pipeline's models: `transformer`, `vae`, `text_encoder`, `tokenizer`; with `boundary_ratio` two experts.

    Wan 2.2 A14B has a second `transformer_2`, which makes the steps below `boundary_ratio`: both are trained, each by
    the steps that it makes. Wan 2.2 TI2V-5B gives each token a timestep of its own (`expand_timesteps`), 0 where a
    frame is given: noise levels are `[B, F]` then. Where a clip is made from text alone they are all equal, so we give
    the clip one: the same modulation, without the `[B, tokens, 6, D]` of it that each block would hold (2 GB in float32
    at 704 x 1280 x 121).
    """

    family = "Wan"
    pipelines = ("WanPipeline",)
    text_limit = TEXT_LENGTH
    optional_parts: ClassVar[tuple[str, ...]] = (LOW_NOISE,)
    settings = ("boundary_ratio", "expand_timesteps")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    can_share_tokens = True
    original_names: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
        (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
        (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
        (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\.", "head.head."),
        (r"\.scale_shift_table$", ".modulation"),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_out\.0\.", ".o."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
        (r"\.norm2\.", ".norm3."),
    )

    def __init__(self, **parts: Any) -> None:
        self.boundary_ratio: float | None = parts.get("boundary_ratio")
        self.expand_timesteps: bool = bool(parts.get("expand_timesteps"))
        if self.boundary_ratio is not None:
            self.denoiser_parts = (HIGH_NOISE, LOW_NOISE)
        super().__init__(**parts)
        for network in self.denoisers.values():
            use_compact_text(network)
        use_fast_norms(self.vae)

    @classmethod
    def check(cls, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]], where: str) -> None:
        """Refuse what takes an image, and a boundary without a second expert."""
        super().check(index, configs, where)
        boundary = index.get("boundary_ratio")
        if boundary is not None and not cls.has_part(LOW_NOISE, index, configs):
            raise UserError(
                f"boundary_ratio is {boundary}, but there is no {LOW_NOISE}", where=f"{where}: model_index.json",
                fix="give the folder of both experts, or a boundary_ratio of null (as Wan 2.1 has it)",
            )  # fmt: skip

    @classmethod
    def native_clip(cls, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:  # noqa: ARG003
        """As its authors sample it; TI2V-5B is larger and faster than the rest."""
        if index.get("expand_timesteps"):
            return {"num_frames": 121, "height": 704, "width": 1280, "fps": 24.0}
        return {"fps": 16.0}

    @classmethod
    def component_classes(cls) -> dict[str, Any]:
        """The class of each part."""
        from diffusers import AutoencoderKLWan, WanTransformer3DModel
        from transformers import AutoTokenizer, UMT5EncoderModel

        return {
            HIGH_NOISE: WanTransformer3DModel,
            LOW_NOISE: WanTransformer3DModel,
            "vae": AutoencoderKLWan,
            "text_encoder": UMT5EncoderModel,
            "tokenizer": AutoTokenizer,
        }

    @property
    def temporal_stride(self) -> int:
        """Pixel frames a latent frame, but for the first."""
        return int(self.vae.config.scale_factor_temporal)

    @property
    def spatial_stride(self) -> int:
        """Pixels a latent row or column."""
        return int(self.vae.config.scale_factor_spatial)

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns a token."""
        frames, rows, columns = self.parts["transformer"].config.patch_size
        return frames, rows, columns

    def _encode(self, prompts: Sequence[str]) -> Condition:
        """`[B, L, D]`, L <= 512: the last row is zero and stands for all rows up to 512.

        The same features as `WanPipeline.encode_prompt(max_sequence_length=512)` (see `CompactTextProcessor`).
        """
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        inputs = self.parts["tokenizer"](
            [prompt_clean(prompt) for prompt in prompts],
            padding="longest",
            max_length=TEXT_LENGTH,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        embeds = self.parts["text_encoder"](inputs.input_ids, inputs.attention_mask).last_hidden_state
        embeds = embeds * inputs.attention_mask[..., None]
        if embeds.shape[1] < TEXT_LENGTH:
            embeds = torch.cat([embeds, embeds.new_zeros(len(embeds), 1, embeds.shape[2])], dim=1)
        return Condition(embeds)

    def _velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        if self.boundary_ratio is None:
            return self._call(HIGH_NOISE, latents, sigma, condition)
        low = is_low_noise(sigma, self.boundary_ratio)
        if low.all():
            return self._call(LOW_NOISE, latents, sigma, condition)
        if not low.any():
            return self._call(HIGH_NOISE, latents, sigma, condition)
        velocity = torch.empty_like(latents)
        for expert, rows in ((HIGH_NOISE, ~low), (LOW_NOISE, low)):
            own = condition.map(lambda part, rows=rows: part[rows])  # type: ignore[misc]
            velocity[rows] = self._call(expert, latents[rows], sigma[rows], own)
        return velocity

    def _call(self, expert: str, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        transformer = self.parts[expert]
        _, rows, columns = self.patch_size
        timestep = token_timesteps(condition.levels(sigma), latents[0, 0, 0].numel() // (rows * columns))
        given = condition.given or GivenFrames()
        inputs = latents if given.channels is None else torch.cat([latents, given.channels], dim=1)
        velocity: Tensor = transformer(
            inputs.to(transformer.dtype), timestep, condition.embeds.to(transformer.dtype),
            None if given.image is None else _one_a_picture(transformer, given.image).to(transformer.dtype),
            return_dict=False,
        )[0]  # fmt: skip
        return velocity.to(latents.dtype)

    @property
    def pictures(self) -> Literal["none", "optional", "needed"]:
        """TI2V-5B takes text alone, or a picture too."""
        return "optional" if self.expand_timesteps else super().pictures

    @property
    def picture_pipeline(self) -> str:
        """The one of TI2V-5B has a class of its own for each use."""
        return "WanImageToVideoPipeline"

    def latent_shape(self, clip: ClipSpec) -> tuple[int, int, int, int]:
        """As all, and no more tokens along an axis than there are rotary positions."""
        shape = super().latent_shape(clip)
        known, spatial = self.parts["transformer"].config.rope_max_seq_len, self.spatial_stride
        most = [known * patch for patch in self.patch_size]
        pixels = 1 + (most[0] - 1) * self.temporal_stride, most[1] * spatial, most[2] * spatial
        for name, size, limit, fix in zip(("num_frames", "height", "width"), shape[1:], most, pixels, strict=True):
            if size > limit:
                what = f"{getattr(clip, name)} is more than the positions that the model has"
                raise UserError(what, where=f"clip.{name}", fix=f"at most {fix}")
        return shape

    def given_frames(self, clip: ClipSpec, first: Tensor, last: Tensor | None = None) -> GivenFrames:
        """TI2V-5B holds the latents of first frames `[B, 3, height, width]` in [0, 1]."""
        if not self.expand_timesteps:
            return super().given_frames(clip, first, last)
        refuse_last(last, "Wan 2.2 TI2V-5B")
        return GivenFrames.hold_first(self.encode(first[:, None]), self.latent_shape(clip)[1])

    def guidance_by_level(self, scale: float, scale_2: float) -> Callable[[Tensor], Tensor]:
        """The second scale for the levels of `transformer_2`, as the stock pipeline's `guidance_scale_2`."""
        if (boundary := self.boundary_ratio) is None:
            return super().guidance_by_level(scale, scale_2)
        return lambda sigma: torch.where(is_low_noise(sigma, boundary), scale_2, scale)

    def _decode(self, latents: Tensor, grad_frames: range | None) -> Tensor:
        return decode_unclamped(self.vae, latents, self.decoding, grad_frames)

    def stock_call(self, num_steps: int, shift: float) -> StockCall:
        """`FlowMapEulerDiscreteScheduler` shifts equal steps of [1, 0] once and keeps fractional timesteps.

        `FlowMatchEulerDiscreteScheduler` would shift twice there, as `WanPipeline` passes no sigmas.
        """
        from diffusers import FlowMapEulerDiscreteScheduler

        return replace(super().stock_call(num_steps, shift), scheduler=FlowMapEulerDiscreteScheduler(shift=shift))


def _one_a_picture(transformer: Any, image: Tensor) -> Tensor:
    """Features `[B, L, D]` as the transformer takes them: of a first and a last picture one behind the other."""
    pictures = 1 if transformer.config.pos_embed_seq_len is None else 2
    rows: Tensor = image.unflatten(1, (pictures, -1)).flatten(0, 1)
    return rows


class FastRmsNorm(nn.Module):
    """`WanRMS_norm` over channels, which spends its time in a vector norm over a strided dimension; same parameters."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.gamma, self.bias, self.scale = norm.gamma, norm.bias, norm.scale

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise `[B, C, ...]`."""
        square = hidden.float().square().sum(dim=1, keepdim=True)
        inverse = square.clamp(min=1e-24).rsqrt() * self.scale  # F.normalize bounds the norm at 1e-12
        normed: Tensor = hidden * inverse.to(hidden.dtype) * self.gamma + self.bias
        return normed


def use_fast_norms(vae: Any) -> None:
    """The same VAE, 1.4 times as fast forward and backward on a CPU."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    for parent in list(vae.modules()):
        for name, child in parent.named_children():
            if isinstance(child, WanRMS_norm) and child.channel_first:
                setattr(parent, name, FastRmsNorm(child))


def use_compact_text(transformer: Any) -> None:
    """Let cross-attention take text shorter than 512 rows with unchanged results."""
    processor = _compact_text_processor()
    for block in transformer.blocks:
        block.attn2.set_processor(processor)


def _compact_text_processor() -> Any:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class CompactTextProcessor(WanAttnProcessor):  # type: ignore[misc]
        """Attention over a prompt whose ~500 padding rows are folded into one.

        WanPipeline pads every prompt with zero rows to 512 and masks none of them. Equal rows have equal keys and
        values, so m of them are one key with `log m` added to its logit: exact, and twice as fast on a small model.
        A kernel that adds nothing to logits gets the padding rows themselves.
        """

        def __call__(
            self,
            attn: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            attention_mask: Tensor | None = None,
            rotary_emb: Any = None,
        ) -> Any:
            if encoder_hidden_states is not None and encoder_hidden_states.shape[1] < TEXT_LENGTH:
                rows = encoder_hidden_states.shape[1]
                if self._attention_backend in ADDS_TO_LOGITS:
                    attention_mask = hidden_states.new_zeros(1, 1, 1, rows)
                    attention_mask[..., -1] = math.log(TEXT_LENGTH - rows + 1)
                else:
                    padding = encoder_hidden_states[:, -1:].expand(-1, TEXT_LENGTH - rows, -1)
                    encoder_hidden_states = torch.cat([encoder_hidden_states, padding], dim=1)
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

    return CompactTextProcessor()
