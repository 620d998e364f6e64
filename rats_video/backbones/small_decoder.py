"""Small decoders that stand in for a family's VAE while training: TAEHV by Ollin Boer Bohan (MIT).

https://github.com/madebyollin/taehv has weights for Wan 2.1 and Wan 2.2 A14B (`taew2_1`), Wan 2.2 5B (`taew2_2`),
HunyuanVideo (`taehv`), CogVideoX (`taecvx`) and LTX 2 (`taeltx_2`), some as safetensors, some as .pth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from rats_video.backbones.chunked import Caches, decode_chunks
from rats_video.backbones.compute import DecodeConfig
from rats_video.errors import UserError
from rats_video.reading import load_tensors

_CONVERT = """convert it once: python -c "import torch; from safetensors.torch import save_file; \
save_file(torch.load('{name}', weights_only=True), '{stem}.safetensors')\""""


class MemoryBlock(nn.Module):
    """A residual block over a frame and the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, frames: Tensor, before: Tensor) -> Tensor:
        """Frames `[B, t, C, H, W]`, and `[B, C, H, W]` the one before the first."""
        past = torch.cat([before[:, None], frames[:, :-1]], dim=1)
        update: Tensor = self.conv(torch.cat([frames, past], dim=2).flatten(0, 1))
        return F.relu(update.unflatten(0, frames.shape[:2]) + frames)


class TimeUpsample(nn.Module):
    """Each frame becomes `stride` frames."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """`[B, t, C, H, W]` to `[B, t * stride, C, H, W]`."""
        more: Tensor = self.conv(frames.flatten(0, 1))
        return more.reshape(len(frames), -1, *frames.shape[2:])


class SmallDecoder(nn.Module):
    """TAEHV's decoder: latents as the denoiser sees them to pixels, latent frame by latent frame, causal.

    Three stages of three memory blocks, each followed by a 2 x 2 and, where the VAE's temporal stride asks for it, a
    temporal upsampling; then patches of pixels. Layers are numbered as in the published weights.

    Args:
        latent_channels: C of the latents.
        widths: channels of the three stages and of the last convolution.
        patch_size: pixels a side that the last convolution writes at once.
        temporal_stride: pixel frames a latent frame: 4 or 8.
    """

    def __init__(self, latent_channels: int, widths: tuple[int, ...], patch_size: int, temporal_stride: int) -> None:
        super().__init__()
        self.patch_size, self.temporal_stride = patch_size, temporal_stride
        doublings = temporal_stride.bit_length() - 1  # in the last stages
        layers: list[nn.Module] = [_SoftClamp(), _conv(latent_channels, widths[0]), nn.ReLU()]
        for stage, (width, after) in enumerate(itertools.pairwise(widths)):
            layers += [MemoryBlock(width) for _ in range(3)]
            layers += [
                nn.Upsample(scale_factor=2),
                TimeUpsample(width, 2 if stage >= 3 - doublings else 1),
                _conv(width, after, bias=False),
            ]
        layers += [nn.ReLU(), _conv(widths[-1], 3 * patch_size**2)]
        self.decoder = nn.Sequential(*layers)

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return int(self.decoder[1].in_channels)  # type: ignore[arg-type]

    @property
    def spatial_stride(self) -> int:
        """Pixels a latent row or column."""
        return 8 * self.patch_size

    def forward(
        self, latents: Tensor, decoding: DecodeConfig | None = None, grad_frames: range | None = None
    ) -> Tensor:
        """Pixels `[B, 3, 1 + stride * (F - 1), height, width]`, about [-1, 1] and not clamped, of `[B, C, F, H, W]`.

        `decode_chunks` says what `decoding` and `grad_frames` do to memory and gradients.
        """
        return decode_chunks(self._step, latents, decoding=decoding, grad_frames=grad_frames)

    def _step(self, chunk: Tensor, caches: Caches) -> tuple[Tensor, Caches]:
        hidden, after = chunk.transpose(1, 2), list[Tensor]()
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                before = torch.zeros_like(hidden[:, 0]) if caches is None else caches[len(after)]
                after.append(hidden[:, -1].clone())  # a view would keep its whole chunk alive
                hidden = layer(hidden, before)
            elif isinstance(layer, TimeUpsample):
                hidden = layer(hidden)
            else:
                hidden = layer(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        pixels = F.pixel_shuffle(hidden, self.patch_size).transpose(1, 2) * 2 - 1  # its own range is [0, 1]
        return pixels[:, :, self.temporal_stride - 1 :] if caches is None else pixels, after


class _SoftClamp(nn.Module):
    def forward(self, latents: Tensor) -> Tensor:
        return torch.tanh(latents / 3) * 3


def _conv(width: int, after: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(width, after, 3, padding=1, **options)


def as_published(*, latent_channels: int, spatial_stride: int, temporal_stride: int) -> SmallDecoder:
    """A TAEHV of random weights for a model's latents: the shapes of the published ones, for a plan."""
    return SmallDecoder(latent_channels, (256, 128, 64, 64), spatial_stride // 8, temporal_stride)


def load_small_decoder(
    folder: Path, *, latent_channels: int, spatial_stride: int, temporal_stride: int, where: str
) -> SmallDecoder:
    """Load the one .safetensors file of a folder, in float32 and frozen; the encoder's weights in it are left out.

    Args:
        folder: holds the file as published, e.g. `taew2_1.safetensors`.
        latent_channels: of the model it is to serve, as the strides are.
        spatial_stride: pixels a latent row or column.
        temporal_stride: pixel frames a latent frame.
        where: the configuration key, for errors.

    Raises:
        UserError: no such file, not safetensors, not TAEHV's weights, or weights for another model's latents.
    """
    path = _weights_file(folder, where)
    try:
        tensors = load_tensors(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}", where=where) from error
    weights = {name: tensor.float() for name, tensor in tensors.items() if not name.startswith("encoder.")}
    decoder = _built_for(weights, path, temporal_stride, where)
    if (decoder.latent_channels, decoder.spatial_stride) != (latent_channels, spatial_stride):
        raise UserError(
            f"{path.name} decodes {decoder.latent_channels} latent channels by {decoder.spatial_stride}, "
            f"the model has {latent_channels} by {spatial_stride}",
            where=where, fix="take the decoder of this model, e.g. taew2_1 for Wan 2.1 or taew2_2 for Wan 2.2 5B",
        )  # fmt: skip
    decoder.load_state_dict(weights)
    return decoder.requires_grad_(requires_grad=False).eval()


def _weights_file(folder: Path, where: str) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{folder} holds {len(found)} .safetensors files", where=where, fix="leave one")
    if pickled := next(iter(sorted(folder.glob("*.pt*"))), None):
        raise UserError(
            f"{pickled} is a pickle, which may run code when it is loaded",
            where=where, fix=_CONVERT.format(name=pickled, stem=pickled.with_suffix("")),
        )  # fmt: skip
    raise UserError(f"no .safetensors file in {folder}", where=where, fix="give the folder of a TAEHV decoder")


def _built_for(weights: dict[str, Tensor], path: Path, temporal_stride: int, where: str) -> SmallDecoder:
    """A decoder of the shapes that `weights` have; cuts the published frames that this stride does not use."""
    convolutions = [f"decoder.{layer}.weight" for layer in (1, 8, 14, 20, 22)]
    if missing := [name for name in convolutions if name not in weights or weights[name].ndim != 4]:
        raise UserError(f"{path} is no TAEHV decoder: it has no convolution {missing[0]}", where=where)
    *widths, channels = (weights[name].shape[0] for name in convolutions)
    latent_channels, patch_size = weights[convolutions[0]].shape[1], math.isqrt(channels // 3)
    decoder = SmallDecoder(latent_channels, tuple(widths), patch_size, temporal_stride)
    for name, layer in decoder.named_modules():
        if isinstance(layer, TimeUpsample) and (key := f"{name}.conv.weight") in weights:
            # Trained with more frames than are wanted here: upstream keeps the last, and so do we.
            weights[key] = weights[key][-layer.conv.out_channels :]
    if wrong := next(_mismatches(decoder, weights), None):
        raise UserError(f"{path} is no TAEHV decoder: {wrong}", where=where)
    return decoder


def _mismatches(decoder: SmallDecoder, weights: dict[str, Tensor]) -> Iterator[str]:
    expected = decoder.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            yield f"{name} is missing"
        elif name not in expected:
            yield f"{name} is unexpected"
        elif expected[name].shape != weights[name].shape:
            yield f"{name} has shape {list(weights[name].shape)} instead of {list(expected[name].shape)}"
