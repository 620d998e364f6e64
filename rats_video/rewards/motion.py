"""Motion between two frames: Lucas and Kanade's local motion, on a pyramid and differentiable throughout."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_LONG_SIDE = 128  # pixels at which motion is looked for
_COARSEST = 12  # pixels of the short side at which the search starts
_WINDOW = 7  # pixels that are taken to move together
_STEPS = 2  # refinements a level
_STIFFNESS = 1e-3  # squared contrast a pixel below which there is nothing to follow
_NOISE = 1e-4  # squared change of a pixel (0.01) that needs no explanation


def shrunk(videos: Tensor) -> Tensor:
    """Videos `[B, T, 3, height, width]` with their long side brought down to 128 pixels, by averages over areas."""
    height, width = videos.shape[-2:]
    scale = min(1.0, _LONG_SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small: Tensor = F.interpolate(videos.flatten(0, 1), size, mode="area").unflatten(0, videos.shape[:2])
    return small


def softened(frames: Tensor) -> Tensor:
    """Frames `[N, 3, height, width]` under a binomial 3 x 3: else reading between pixels would pass for less noise."""
    kernel = frames.new_tensor([1.0, 2.0, 1.0]) / 4
    kernel = (kernel[:, None] * kernel).expand(frames.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), kernel, groups=frames.shape[1])


def half_motion(first: Tensor, second: Tensor) -> Tensor:
    """Displacement in pixels `[N, 2, height, width]` (x, y) at each place half-way between two frames.

    A thing at `x` half-way was at `x - d` in `first` and will be at `x + d` in `second` (each `[N, 3, height, width]`).
    Lucas and Kanade (1981), symmetric in the frames and coarse to fine (Bouguet 2001): in each window of 7 x 7 pixels
    `d` minimises the squared difference of all colours, less its mean, so that a change of brightness is no motion.
    Where there is nothing to follow `d` keeps what the coarser level found, at last 0.
    """
    levels = [(first, second)]
    while min(levels[-1][0].shape[-2:]) >= 2 * _COARSEST:
        one, two = levels[-1]
        levels.append((F.avg_pool2d(one, 2), F.avg_pool2d(two, 2)))
    motion = torch.zeros_like(levels[-1][0][:, :2])
    for one, two in reversed(levels):
        size = one.shape[-2:]
        if motion.shape[-2:] != size:
            growth = motion.new_tensor([size[1] / motion.shape[-1], size[0] / motion.shape[-2]]).view(2, 1, 1)
            motion = growth * F.interpolate(motion, size, mode="bilinear", align_corners=False)
        for _ in range(_STEPS):
            motion = motion + _refinement(warped(one, -motion), warped(two, motion))
    return motion


def explained(first: Tensor, second: Tensor, motion: Tensor) -> Tensor:
    """Share of the change around each pixel that the motion explains, `[N, 1, height, width]` in [0, 1].

    1 - (change left when both frames are brought together) / (change), each less its mean in the window: 1 where
    something moves, about 0 for noise, which no motion explains, and 0 where nothing changes.
    """
    before = _covariance((first - second)[:, None])[:, 0]
    difference = warped(first, -motion) - warped(second, motion)
    after = _covariance(difference[:, None])[:, 0]
    return (1 - (after + _NOISE) / (before + _NOISE)).clamp(min=0)


def warped(frames: Tensor, displacement: Tensor) -> Tensor:
    """Frames `[N, 3, height, width]` read at `x + displacement` (pixels, `[N, 2, height, width]`), bilinearly."""
    height, width = frames.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=frames.device, dtype=frames.dtype),
        torch.arange(width, device=frames.device, dtype=frames.dtype),
        indexing="ij",
    )
    place = torch.stack([x, y]) + displacement
    place = place.nan_to_num(0, 0, 0)  # the gradient of `grid_sample` at NaN ends the process on a CPU
    size = place.new_tensor([width, height]).view(2, 1, 1)
    grid = ((2 * place + 1) / size - 1).permute(0, 2, 3, 1)
    return F.grid_sample(frames, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _refinement(one: Tensor, two: Tensor) -> Tensor:
    """The step of half the motion that is left between two frames already brought together."""
    mean, difference = (one + two) / 2, one - two
    padded = F.pad(mean, (1, 1, 1, 1), mode="replicate")
    x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    covariance = _covariance(torch.stack([x, y, difference], dim=1))
    xx, yy, xy = covariance[:, 0, 0] + _STIFFNESS, covariance[:, 1, 1] + _STIFFNESS, covariance[:, 0, 1]
    x_change, y_change = covariance[:, 0, 2], covariance[:, 1, 2]
    step = torch.stack([yy * x_change - xy * y_change, xx * y_change - xy * x_change], dim=1)
    return step / (2 * (xx * yy - xy * xy))[:, None]


def _covariance(cues: Tensor) -> Tensor:
    """Covariance of K cues `[N, K, 3, height, width]` in the window around each pixel, summed over colours."""
    mean = _around(cues)
    return _around((cues[:, :, None] * cues[:, None]).sum(dim=3)) - (mean[:, :, None] * mean[:, None]).sum(dim=3)


def _around(images: Tensor) -> Tensor:
    """Mean over the window around each pixel, as far as it lies in the image.

    Two products with band matrices: six times as fast as pooling on a CPU.
    """
    along_y, along_x = (_band(size, images) for size in images.shape[-2:])
    return along_y @ images @ along_x.T


def _band(size: int, like: Tensor) -> Tensor:
    """`[size, size]`, each row the mean over the window around its index."""
    index = torch.arange(size, device=like.device)
    inside = ((index[:, None] - index).abs() <= _WINDOW // 2).to(like)
    return inside / inside.sum(dim=1, keepdim=True)
