"""HunyuanVideo's VAE, decoded with bounded memory: recomputed tiles, a few frames at a time, no attention mask."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rats_video.backbones.chunked import Caches, chunk_sizes, decode_chunks, recomputed
from rats_video.backbones.compute import DecodeConfig

FRAMES_AT_ONCE = 2  # that a convolution takes in; two before them are seen again

Prepare = Callable[[Tensor, bool], Tensor]
"""`(hidden [B, C, f, h, w], is_start) -> what is convolved`: of each frame alone; the first of a clip may differ."""


def decode_tiles(vae: Any, latents: Tensor, *, recompute: bool = False) -> Tensor:
    """`AutoencoderKLHunyuanVideo.decode`, which does not clamp: `[B, 3, T, height, width]`, about [-1, 1].

    As there, clips of more than 4 latent frames (17 pixel frames) are decoded in tiles of 5 that start 3 apart and
    are blended over 4 pixel frames. With `recompute` backward holds one tile's block inputs, whatever the length.
    """

    def decode(tile: Tensor) -> Tensor:
        return run_decoder(vae.decoder, vae.post_quant_conv(tile), recompute=recompute)

    def decode_tile(start: int) -> Tensor:
        tile = latents[:, :, start : start + size + 1]
        pixels: Tensor = recomputed(decode, tile) if recompute else decode(tile)
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


def run_decoder(decoder: Any, latents: Tensor, *, recompute: bool) -> Tensor:
    """`HunyuanVideoDecoder3D.forward`; with `recompute`, backward computes one residual block at a time.

    17 frames of 544 x 960 have 9 GB in float32 at 256 channels, and a residual block as diffusers writes it keeps seven
    such tensors alive: normalised, activated, padded. Here they exist for a few frames only.
    """
    decoding = DecodeConfig(checkpoint=recompute)

    def run(function: Callable[..., Tensor], *args: Any) -> Tensor:
        out: Tensor = recomputed(function, *args) if recompute and torch.is_grad_enabled() else function(*args)
        return out

    def resnet(block: Any, hidden: Tensor) -> Tensor:
        def activate(frames: Tensor, _: bool) -> Tensor:  # noqa: FBT001
            out: Tensor = block.nonlinearity(frames)
            return out

        inner = run(lambda hidden: convolve(block.conv1, activate, block.norm1(hidden), decoding), hidden)
        out = convolve(block.conv2, activate, block.norm2(inner), decoding)
        return out + (hidden if block.conv_shortcut is None else block.conv_shortcut.conv(hidden))

    hidden = decoder.mid_block(decoder.conv_in(latents))
    for block in decoder.up_blocks:
        for part in block.resnets:
            hidden = run(lambda hidden, part=part: resnet(part, hidden), hidden)
        for upsampler in block.upsamplers or ():
            hidden = convolve(upsampler.conv, enlarge(upsampler.upsample_factor), hidden, decoding)
    return run(lambda hidden: convolve(decoder.conv_out, lambda frames, _: decoder.conv_act(frames),
                                       decoder.conv_norm_out(hidden), decoding), hidden)  # fmt: skip


def convolve(conv: Any, prepare: Prepare, hidden: Tensor, decoding: DecodeConfig) -> Tensor:
    """`conv(prepare(hidden))` of a `HunyuanVideoCausalConv3d`, of which a few frames are prepared and padded at a time.

    Plain decoding with gradient would keep them all, and those that slices share twice: it takes them at once.
    """
    *_, width, _ = padding = conv.time_causal_padding  # the last two: frames before and after
    is_kept = torch.is_grad_enabled() and not decoding.checkpoint

    def step(chunk: Tensor, before: Caches) -> tuple[Tensor, Caches]:
        ready = prepare(chunk, before is None)
        if before is None:
            padded = F.pad(ready, padding, mode=conv.pad_mode)
        else:
            seen = torch.cat([prepare(before, False)[:, :, -width:], ready], dim=2)  # noqa: FBT003
            padded = F.pad(seen, (*padding[:4], 0, 0), mode=conv.pad_mode)
        return conv.conv(padded), chunk[:, :, -width:]

    frames = hidden.shape[2]
    sizes = [frames] if is_kept else chunk_sizes(frames, FRAMES_AT_ONCE)
    return decode_chunks(step, hidden, sizes, decoding=decoding)


def enlarge(factor: tuple[int, int, int]) -> Prepare:
    """Nearest neighbours; the first frame of a clip stays one."""

    def prepare(frames: Tensor, is_start: bool) -> Tensor:  # noqa: FBT001
        if not is_start:
            return F.interpolate(frames, scale_factor=factor)
        first = F.interpolate(frames[:, :, :1], scale_factor=(1, *factor[1:]))
        return torch.cat([first, prepare(frames[:, :, 1:], False)], dim=2) if frames.shape[2] > 1 else first  # noqa: FBT003

    return prepare


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
    """The residual of a diffusers `Attention` on `[B, C, F, h, w]` where each frame sees itself and those before."""
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
    """The same encoder and decoder, without quadratic memory."""
    for half in (vae.encoder, vae.decoder):
        if not isinstance(half.mid_block, MasklessMidBlock):
            half.mid_block = MasklessMidBlock(half.mid_block)
