"""Pieces of published formulas that several rewards share, written out: what their ports are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rats_video.seeds import seeded


def smooth_clips(num_frames: int, height: int, width: int) -> Tensor:
    """Two clips `[2, T, 3, height, width]` in whole steps of 1/255, as PIL has them."""
    coarse = torch.rand(2 * num_frames, 3, 5, 6, generator=seeded(1))
    frames = F.interpolate(coarse, (height, width), mode="bilinear")
    return ((frames * 255).round() / 255).unflatten(0, (2, num_frames))


def pil_squares(frames: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """What torchvision's Resize(size, BICUBIC), CenterCrop(size), ToTensor and Normalize make of PIL images."""
    from PIL import Image

    height, width = frames.shape[-2:]
    scaled = (size * height // min(height, width), size * width // min(height, width))
    top, left = (round((side - size) / 2.0) for side in scaled)
    arrays = [(frame * 255).round().byte().permute(1, 2, 0).numpy() for frame in frames]
    images = [Image.fromarray(array).resize(scaled[::-1], Image.Resampling.BICUBIC) for array in arrays]
    crops = [np.asarray(image.crop((left, top, left + size, top + size))) / 255.0 for image in images]
    normalized = (np.stack(crops) - np.asarray(mean)) / np.asarray(std)
    return torch.from_numpy(normalized).permute(0, 3, 1, 2).float()


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    """`softmax(query key^T / sqrt(d) + bias) value`, `[N, L, width]`, head by head on neighbouring channels."""
    parts = []
    for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value)), strict=True):
        parts.append(((q @ k.transpose(1, 2)) / q.shape[-1] ** 0.5 + bias).softmax(dim=-1) @ v)
    return torch.cat(parts, dim=-1)


class Layers:
    """A checkpoint's layers by the names of their tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self[f"{name}.weight"].T + self[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        spread = (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        return centred / spread * self[f"{name}.weight"] + self[f"{name}.bias"]
