"""HunyuanVideo's VAE, decoded with bounded memory: tiles that backward recomputes, attention without its mask."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def decode_tiles(vae: Any, latents: Tensor, *, recompute: bool = False) -> Tensor:
    """`AutoencoderKLHunyuanVideo.decode`, which does not clamp: `[B, 3, T, height, width]`, about [-1, 1].

    As there, clips of more than 4 latent frames (17 pixel frames) are decoded in tiles of 5 that start 3 apart and
    are blended over 4 pixel frames. With `recompute` a tile is all that backward ever holds, whatever the length.
    """

    def decode(tile: Tensor) -> Tensor:
        pixels: Tensor = vae.decoder(vae.post_quant_conv(tile))
        return pixels

    def decode_tile(start: int) -> Tensor:
        tile = latents[:, :, start : start + size + 1]
        pixels: Tensor = checkpoint(decode, tile, use_reentrant=False) if recompute else decode(tile)
        return pixels if start == 0 else pixels[:, :, 1:]  # decoded as a first frame, which it is not

    stride, frames = vae.temporal_compression_ratio, latents.shape[2]
    size, step = vae.tile_sample_min_num_frames // stride, vae.tile_sample_stride_num_frames // stride
    if frames <= size:
        return decode_tile(0)
    tiles = [decode_tile(start) for start in range(0, frames, step)]
    for before, tile in pairwise(tiles):
        vae.blend_t(before, tile, (size - step) * stride)  # in place
    kept = [tile[:, :, : step * stride + (index == 0)] for index, tile in enumerate(tiles)]
    return torch.cat(kept, dim=2)[:, :, : (frames - 1) * stride + 1]


class MasklessMidBlock(nn.Module):
    """`HunyuanVideoMidBlock3D` without the `[N, N]` mask over its N = F h w tokens; same parameters, same values.

    The mask lets a frame's tokens see their own and earlier frames. One frame's queries against the keys so far need
    none: at 544 x 960 a tile's mask would take 7 GB in float32.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.resnets, self.attentions = block.resnets, block.attentions

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, C, F, h, w]` to the same."""
        hidden = self.resnets[0](hidden)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            if attention is not None:
                hidden = hidden + attend_to_past(attention, hidden)
            hidden = resnet(hidden)
        return hidden


def attend_to_past(attention: Any, hidden: Tensor) -> Tensor:
    """What a diffusers `Attention` adds to `[B, C, F, h, w]` where each frame sees itself and the frames before."""
    tokens = attention.group_norm(hidden.flatten(2)).transpose(1, 2)  # [B, N, C]
    query, key, value = (
        project(tokens).unflatten(2, (attention.heads, -1)).transpose(1, 2)  # [B, heads, N, C / heads]
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    frame = hidden.shape[3] * hidden.shape[4]
    ends = range(frame, tokens.shape[1] + 1, frame)
    seen = [
        F.scaled_dot_product_attention(query[:, :, end - frame : end], key[:, :, :end], value[:, :, :end])
        for end in ends
    ]
    out: Tensor = attention.to_out[0](torch.cat(seen, dim=2).transpose(1, 2).flatten(2))
    return out.transpose(1, 2).reshape(hidden.shape)


def use_maskless_attention(vae: Any) -> None:
    """The same decoder, without quadratic memory."""
    if not isinstance(vae.decoder.mid_block, MasklessMidBlock):
        vae.decoder.mid_block = MasklessMidBlock(vae.decoder.mid_block)
