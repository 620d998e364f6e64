"""Wan's VAE, decoded latent frame by latent frame."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rats_video.backbones.chunked import Caches, Step, decode_chunks, recomputed
from rats_video.backbones.compute import DecodeConfig

_BLOCK_CACHES = 2  # one for each causal convolution of a residual block that looks back


def decode_unclamped(
    vae: Any, latents: Tensor, decoding: DecodeConfig | None = None, grad_frames: range | None = None
) -> Tensor:
    """`AutoencoderKLWan.decode` on raw latents without its final clamp: `[B, 3, T, height, width]`, about [-1, 1].

    `decode_chunks` says what `decoding` and `grad_frames` do to memory and gradients.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock

    recompute_blocks(vae.decoder, WanResidualBlock, on=decoding is not None and decoding.checkpoint)
    return decode_chunks(wan_step(vae), vae.post_quant_conv(latents), decoding=decoding, grad_frames=grad_frames)


def wan_step(vae: Any) -> Step:
    """Decodes one latent frame after `post_quant_conv`; the caches are what causal convolutions remember."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

    num_convs = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    patch_size = vae.config.patch_size

    def step(frame: Tensor, caches: Caches) -> tuple[Tensor, Caches]:
        after = [None] * num_convs if caches is None else list(caches)  # the decoder replaces its entries
        pixels = vae.decoder(frame, feat_cache=after, feat_idx=[0], first_chunk=caches is None)
        return pixels if patch_size is None else unpatchify(pixels, patch_size=patch_size), after

    return step


class RecomputedBlock(nn.Module):
    """A residual block of the decoder whose activations backward computes again; weights keep their names.

    One latent frame's activations are 26 GB at 480 x 832: recomputed as a whole, they would be alive all at once.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        self._block = (block,)  # in a tuple, its weights are not entered twice
        self.on = True

    def forward(self, hidden: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        """As the block's own: takes its caches out of `feat_cache`, puts new ones in and moves `feat_idx` on."""
        if not self.on:
            plain: Tensor = self._block[0](hidden, feat_cache=feat_cache, feat_idx=feat_idx)
            return plain
        mine = slice(feat_idx[0], feat_idx[0] + _BLOCK_CACHES)
        out: Tensor
        out, feat_cache[mine] = recomputed(self._pure, hidden, feat_cache[mine])
        feat_idx[0] = mine.stop
        return out

    def _pure(self, hidden: Tensor, caches: list[Any]) -> tuple[Tensor, list[Any]]:
        after = list(caches)
        return self._block[0](hidden, feat_cache=after, feat_idx=[0]), after


def recompute_blocks(decoder: nn.Module, kind: type[nn.Module], *, on: bool) -> None:
    """The same decoder; while it is on, one block of that kind has its activations alive at a time in its backward."""
    for parent in list(decoder.modules()):
        for name, child in parent.named_children():
            if isinstance(child, kind) and on:
                setattr(parent, name, RecomputedBlock(child))
            elif isinstance(child, RecomputedBlock):
                child.on = on
