"""Causal VAEs decode a clip chunk by chunk: the same pixels from a graph whose size is bounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from rats_video.backbones.compute import DecodeConfig

Caches = Any
"""A decoder's memory of earlier chunks: tensors, None and constants in lists, tuples or dicts; None is the
start of a clip."""

Step = Callable[[Tensor, Caches], tuple[Tensor, Caches]]
"""`(latents [B, C, f, H, W] of one chunk, caches) -> (pixels [B, 3, t, height, width], caches)`. Pure: it leaves the
caches it is given as they are."""


def decode_chunks(
    step: Step,
    latents: Tensor,
    sizes: Sequence[int] | None = None,
    *,
    decoding: DecodeConfig | None = None,
    grad_frames: range | None = None,
) -> Tensor:
    """Decode a clip chunk by chunk, differentiably.

    Saved for backward on the device, beside the pixels:
      * plain: all activations of every chunk;
      * `decoding.checkpoint`: the latents and the caches between chunks; backward decodes each chunk once more;
      * with `decoding.offload` as well: the latents. The caches wait in (pinned) host memory, and
        their way there and back is the price; backward needs one chunk's activations at a time;
      * `grad_frames`: what is said above, but for the window's chunks only.
    Wan 2.1 at 480 x 832 in float32, a latent frame: 26 GB of activations, 3.8 GB of caches. A mode that is exact and
    flat without the host would decode each frame again from the first (F^2 / 2 frames), so there is none.

    Exact: all pixels, always; gradients of plain, checkpointed and offloaded decoding are those of `torch.autograd`
    through the whole clip. Truncated: with `grad_frames` only the window's pixels carry gradient, and only to the
    window's latents. What the window's latents do to later pixels, and earlier latents to the window's, is left out.

    Args:
        step: decodes one chunk.
        latents: `[B, C, F, H, W]` as the VAE wants them.
        sizes: latent frames of each chunk; None decodes frame by frame.
        decoding: which options are on; None is plain. Its `window` and `small` are the caller's business.
        grad_frames: latent frames with gradient, widened to whole chunks; None = all of them.

    Returns:
        Pixels `[B, 3, T, height, width]`.
    """
    decoding = decoding or DecodeConfig()
    pixels, caches, first = [], None, 0
    for chunk in latents.split(list(sizes or [1] * latents.shape[2]), dim=2):
        frames = range(first, first := first + chunk.shape[2])
        has_grad = torch.is_grad_enabled() and (grad_frames is None or _overlap(frames, grad_frames))
        with torch.set_grad_enabled(has_grad):
            if has_grad and decoding.checkpoint:
                with save_on_cpu(pin_memory=True) if decoding.offload else nullcontext():
                    part, caches = recomputed(step, chunk, caches)
            else:
                part, caches = step(chunk, caches)
        pixels.append(part)
    return torch.cat(pixels, dim=2)


def chunk_sizes(frames: int, size: int) -> list[int]:
    """`frames` in chunks of `size`; what is over comes with the first."""
    count = max(frames // size, 1)
    return [frames - size * (count - 1), *[size] * (count - 1)]


def _overlap(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, of which only the inputs are saved: backward computes it again, with the same result.

    Torch's checkpointing saves tensors as autograd does, so that hooks reach them and outer checkpoints drop them, only
    where each is an argument; what stands in a list or a dict it holds on to.
    """
    leaves, layout = tree_flatten(args)

    def flat(*leaves: Any) -> Any:
        return function(*tree_unflatten(leaves, layout))

    return checkpoint(flat, *leaves, use_reentrant=False, preserve_rng_state=False)  # no decoder draws random numbers
