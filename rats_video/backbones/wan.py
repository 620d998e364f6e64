"""Wan 2.1 text-to-video, from any folder that `diffusers.WanPipeline` loads."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn

from rats_video.errors import UserError
from rats_video.types import ClipSpec, TextCondition

TEXT_LENGTH = 512  # rows WanPipeline's cross-attention sees: the prompt's, then zeros
NUM_TRAIN_TIMESTEPS = 1000


class WanBackbone:
    """A Wan pipeline's four models behind the `Backbone` protocol.

    Args:
        transformer: WanTransformer3DModel.
        vae: AutoencoderKLWan; its weights are frozen here.
        text_encoder: UMT5EncoderModel, frozen.
        tokenizer: its tokenizer.
    """

    def __init__(self, transformer: Any, vae: Any, text_encoder: Any, tokenizer: Any) -> None:
        self.transformer = transformer
        self.vae = vae.requires_grad_(requires_grad=False).eval()
        self.text_encoder = text_encoder.requires_grad_(requires_grad=False).eval()
        self.tokenizer = tokenizer
        self.temporal_stride: int = vae.config.scale_factor_temporal
        use_compact_text(transformer)
        use_fast_norms(vae)

    @classmethod
    def from_pretrained(cls, folder: Path, device: torch.device | str = "cpu") -> Self:
        """Load a pipeline folder.

        Raises:
            UserError: a component is missing or is not of this family.
        """
        from diffusers import AutoencoderKLWan, WanTransformer3DModel
        from safetensors import SafetensorError
        from transformers import AutoTokenizer, UMT5EncoderModel
        from transformers.utils import logging

        for part in ("transformer", "vae", "text_encoder", "tokenizer"):
            if not (folder / part).is_dir():
                raise UserError(
                    f"no {part}/ in it", where=str(folder), fix="give a folder that diffusers.WanPipeline loads"
                )
        logging.disable_progress_bar()
        try:
            parts = (
                WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32),
                AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32),
                UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
            )
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"cannot load it as a Wan pipeline: {reason}", where=str(folder)) from error
        transformer, vae, text_encoder = (part.to(device).eval() for part in parts)
        return cls(transformer, vae, text_encoder, tokenizer)

    @property
    def denoiser(self) -> nn.Module:
        """The network whose calls are counted as NFE."""
        denoiser: nn.Module = self.transformer
        return denoiser

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return next(self.denoiser.parameters()).device

    def twin(self) -> Self:
        """The same model with its own copy of the denoiser; VAE and text encoder are shared."""
        return type(self)(copy.deepcopy(self.transformer), self.vae, self.text_encoder, self.tokenizer)

    def load_denoiser(self, folder: Path) -> Self:
        """The same model with the denoiser of another folder's `transformer/`, e.g. a student's."""
        from diffusers import WanTransformer3DModel

        try:
            transformer = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"cannot load its transformer/: {reason}", where=str(folder)) from error
        transformer = transformer.to(self.device).eval()
        return type(self)(transformer, self.vae, self.text_encoder, self.tokenizer)

    def latent_shape(self, clip: ClipSpec) -> tuple[int, int, int, int]:
        """`(C, F, H, W)` of a clip's latents.

        Raises:
            UserError: the VAE or the transformer's patches cannot divide the clip.
        """
        stride, config = self.vae.config.scale_factor_spatial, self.transformer.config
        if (clip.num_frames - 1) % self.temporal_stride:
            raise UserError(
                f"num_frames must be 1 + a multiple of {self.temporal_stride}, got {clip.num_frames}",
                where="clip.num_frames",
            )
        for name, pixels, patch in zip(
            ("height", "width"), (clip.height, clip.width), config.patch_size[1:], strict=True
        ):
            if pixels % (stride * patch):
                raise UserError(f"must be a multiple of {stride * patch}, got {pixels}", where=f"clip.{name}")
        frames = 1 + (clip.num_frames - 1) // self.temporal_stride
        if frames % config.patch_size[0]:
            raise UserError(
                f"{clip.num_frames} give {frames} latent frames, which patches of {config.patch_size[0]} do not divide",
                where="clip.num_frames",
            )
        return config.in_channels, frames, clip.height // stride, clip.width // stride

    def sample_noise(self, batch: int, clip: ClipSpec, generator: Generator) -> Tensor:
        """Standard normal `[B, C, F, H, W]`; drawn where the generator lives, so a CPU one is the same everywhere."""
        noise = torch.randn(batch, *self.latent_shape(clip), generator=generator, device=generator.device)
        return noise.to(self.device)

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that the tokenizer does not know (always empty for subword tokenizers)."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None:
            return []
        return [word for word in prompt.split() if unknown in self.tokenizer(word, add_special_tokens=False).input_ids]

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> TextCondition:
        """Encode B prompts as `[B, L, D]`, L <= 512: the last row is zero and stands for all rows up to 512.

        The same features as `WanPipeline.encode_prompt(max_sequence_length=512)` (see `CompactTextProcessor`).
        """
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        inputs = self.tokenizer(
            [prompt_clean(prompt) for prompt in prompts],
            padding="longest",
            max_length=TEXT_LENGTH,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        embeds = self.text_encoder(inputs.input_ids, inputs.attention_mask).last_hidden_state
        embeds = embeds * inputs.attention_mask[..., None]
        if embeds.shape[1] < TEXT_LENGTH:
            embeds = torch.cat([embeds, embeds.new_zeros(len(embeds), 1, embeds.shape[2])], dim=1)
        return TextCondition(embeds)

    def velocity(self, latents: Tensor, sigma: Tensor, text: TextCondition) -> Tensor:
        """`noise - x0`, `[B, C, F, H, W]`, at noise levels `sigma` `[B]`."""
        timestep = sigma * NUM_TRAIN_TIMESTEPS
        velocity: Tensor = self.transformer(latents, timestep, text.embeds, return_dict=False)[0]
        return velocity

    @torch.no_grad()
    def encode(self, videos: Tensor) -> Tensor:
        """Normalised latents `[B, C, F, H, W]` (posterior mean) of pixels `[B, T, 3, height, width]` in [0, 1]."""
        latents: Tensor = self.vae.encode(videos.transpose(1, 2) * 2 - 1).latent_dist.mode()
        mean, std = self._latent_stats(latents)
        return (latents - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels `[B, T, 3, height, width]` in [0, 1], differentiable.

        Saturated pixels are clamped straight-through: diffusers' own decode clamps hard, and a reward could then
        never pull a saturated pixel back.
        """
        mean, std = self._latent_stats(latents)
        pixels = (decode_unclamped(self.vae, latents * std + mean).transpose(1, 2) + 1) / 2
        return pixels + (pixels.clamp(0, 1) - pixels).detach()

    def _latent_stats(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = like.new_tensor(self.vae.config.latents_mean), like.new_tensor(self.vae.config.latents_std)
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def decode_unclamped(vae: Any, latents: Tensor) -> Tensor:
    """`AutoencoderKLWan.decode` on raw latents without its final clamp: `[B, 3, T, height, width]`, about [-1, 1]."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

    cache: list[Any] = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    hidden = vae.post_quant_conv(latents)
    chunks = [
        vae.decoder(hidden[:, :, frame : frame + 1], feat_cache=cache, feat_idx=[0], first_chunk=frame == 0)
        for frame in range(hidden.shape[2])
    ]
    pixels = torch.cat(chunks, dim=2)
    patch_size = vae.config.patch_size
    return pixels if patch_size is None else unpatchify(pixels, patch_size=patch_size)


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
                attention_mask = hidden_states.new_zeros(1, 1, 1, rows)
                attention_mask[..., -1] = math.log(TEXT_LENGTH - rows + 1)
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

    return CompactTextProcessor()
