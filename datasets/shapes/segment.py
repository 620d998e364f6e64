"""Cuts each frame of a shapes clip into object and background."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rats_video.datasets.shapes.render import SHAPES, SHAPES_CLIP

MIN_CONTRAST = 0.25  # RGB distance of object and background; the palettes are at least 0.52 apart
AREA = (0.025, 0.4)  # of the frame; rendered shapes cover 0.077 ... 0.174, two of them still count as seen


class Scene(NamedTuple):
    """Each frame cut into object and background."""

    coverage: Tensor  # [B, T, height, width] in [0, 1]: how much of a pixel is object
    present: Tensor  # [B, T] bool: an object of sensible contrast and size is there; the rest is junk where not
    color: Tensor  # [B, T, 3]
    area: Tensor  # [B, T], as a share of the frame
    centroid: Tensor  # [B, T, 2] (x, y)
    fits: Tensor  # [B, T, 3]: overlap with each of SHAPES


def border_pixels(videos: Tensor) -> Tensor:
    """The pixels along the four edges, averaged over two rows against noise: `[B, T, 2 * (height + width), 3]`."""
    top, bottom = videos[..., :2, :].mean(-2), videos[..., -2:, :].mean(-2)
    left, right = videos[..., :2].mean(-1), videos[..., -2:].mean(-1)
    return torch.cat([top, bottom, left, right], -1).transpose(-1, -2)


def segment(videos: Tensor, border: Tensor) -> Scene:
    """The object of clips `[B, T, 3, height, width]`, told from the background by the colour of its border pixels."""
    height, width = videos.shape[-2:]
    background = median(border, dim=2)[..., None, None]  # [B, T, 3, 1, 1]
    distance = (videos - background).square().sum(2).sqrt()  # [B, T, height, width]
    # The smallest object that counts is wholly as bright as this; a few stray pixels cannot raise it.
    brightest = distance.flatten(2).topk(int(AREA[0] * height * width)).values[..., -1]  # [B, T]
    contrast = median(brightest, dim=1)  # [B]; of the clip, so that a frame where the object fades has none
    coverage = (distance / contrast.clamp(min=MIN_CONTRAST)[:, None, None, None]).clamp(max=1)
    # Soft edges give sub-pixel centroids, but only next to the object: elsewhere it is noise.
    coverage = coverage * _grow(coverage > 0.5)

    pixels = coverage.sum((-2, -1)).clamp(min=1.0)  # [B, T]
    area = pixels / (height * width)
    x, y = (torch.arange(n, device=videos.device) + 0.5 for n in (width, height))
    centre_x = (coverage.sum(-2) * x).sum(-1) / pixels  # not `@`: TF32 would be 0.05 pixels off
    centre_y = (coverage.sum(-1) * y).sum(-1) / pixels
    core = coverage.flatten(2).pow(8)  # edges are a mix with the background
    color = torch.einsum("btp,btcp->btc", core, videos.flatten(3)) / core.sum(-1, keepdim=True).clamp(min=1.0)
    return Scene(
        coverage=coverage,
        present=(area > AREA[0]) & (area < AREA[1]) & (contrast > MIN_CONTRAST)[:, None],
        color=color,
        area=area,
        centroid=torch.stack([centre_x, centre_y], -1) * (SHAPES_CLIP.width / min(height, width)),
        fits=_fits(coverage, x - centre_x[..., None], y - centre_y[..., None]),
    )


def _grow(mask: Tensor) -> Tensor:
    """The mask `[..., height, width]` (bool) and the pixels that touch it, corners too."""
    for dim in (-2, -1):
        last = mask.shape[dim] - 1
        grown = mask.clone()
        grown.narrow(dim, 0, last).logical_or_(mask.narrow(dim, 1, last))
        grown.narrow(dim, 1, last).logical_or_(mask.narrow(dim, 0, last))
        mask = grown
    return mask


def _fits(coverage: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Overlap (IoU) `[B, T, 3]` with each of SHAPES, drawn around the centroid with the same area.

    Args:
        coverage: `[B, T, height, width]`.
        x: `[B, T, width]`, pixels right of the centroid.
        y: `[B, T, height]`, pixels below the centroid.
    """
    sharp = _sharpen(coverage)
    pixels = sharp.sum((-2, -1))
    x, y = x[..., None, :].abs(), y[..., :, None]
    reaches = {  # how far the outline must lie from the centroid to pass through (x, y), and the area for a reach of 1
        "circle": ((x.square() + y.square()).sqrt(), torch.pi),
        "square": (torch.maximum(x, y.abs()), 4.0),
        "triangle": (torch.maximum(3**0.5 / 2 * x - y / 2, y), 27**0.5),
    }
    fits = []
    for name in SHAPES:
        reach, unit_area = reaches[name]
        ideal = _sharpen(0.5 + (pixels / unit_area).sqrt()[..., None, None] - reach)
        shared = torch.minimum(sharp, ideal).sum((-2, -1))
        fits.append(shared / (pixels + ideal.sum((-2, -1)) - shared).clamp(min=1.0))
    return torch.stack(fits, -1)


def _sharpen(coverage: Tensor) -> Tensor:
    """Steepen edges around the half level, so that a blurry outline fits as well as a crisp one."""
    return (2 * coverage - 0.5).clamp(0, 1)


def median(values: Tensor, dim: int, valid: Tensor | None = None) -> Tensor:
    """Upper median over `dim` of the `valid` values; inf if there are none (callers mask what follows from it).

    By sorting, so that it is deterministic on a GPU too, as `torch.median` is not.
    """
    if valid is None:
        return values.sort(dim).values.select(dim, values.shape[dim] // 2)
    valid = valid.expand_as(values)
    ordered = values.masked_fill(~valid, torch.inf).sort(dim).values
    middle = (valid.sum(dim, keepdim=True) // 2).clamp(max=values.shape[dim] - 1)
    return ordered.gather(dim, middle).squeeze(dim)
