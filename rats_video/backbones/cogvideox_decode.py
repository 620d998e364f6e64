"""CogVideoX's VAE, decoded chunk by chunk."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rats_video.backbones.chunked import Caches, Step, chunk_sizes, decode_chunks, recomputed
from rats_video.backbones.compute import DecodeConfig


def decode_cogvideox(
    vae: Any, latents: Tensor, decoding: DecodeConfig | None = None, grad_frames: range | None = None
) -> Tensor:
    """`AutoencoderKLCogVideoX.decode` on raw latents `[B, C, F, H, W]`: `[B, 3, T, height, width]`, about [-1, 1].

    It decodes two latent frames at a time, three at the start where F is odd, and normalises each chunk over all of its
    frames: `grad_frames` is widened to whole chunks. `decode_chunks` says what is exact and what is truncated.
    """
    if decoding is not None and decoding.checkpoint:  # one chunk of 480 x 720 alone has 119 GB of activations
        vae.enable_gradient_checkpointing(recomputed)
    else:
        vae.disable_gradient_checkpointing()
    sizes = chunk_sizes(latents.shape[2], vae.num_latent_frames_batch_size)
    return decode_chunks(_cogvideox_step(vae), latents, sizes, decoding=decoding, grad_frames=grad_frames)


def _cogvideox_step(vae: Any) -> Step:
    def step(chunk: Tensor, caches: Caches) -> tuple[Tensor, Caches]:
        hidden = chunk if vae.post_quant_conv is None else vae.post_quant_conv(chunk)
        pixels, after = vae.decoder(hidden, conv_cache=caches)
        return pixels, _needed(after)

    return step


def _needed(caches: dict[str, Any]) -> dict[str, Any]:
    """Without what the norms' 1 x 1 x 1 convolutions return: all of their input, never read again."""
    return {
        key: _needed(entry) if isinstance(entry, dict) else entry
        for key, entry in caches.items()
        if key not in {"conv_y", "conv_b"}
    }
