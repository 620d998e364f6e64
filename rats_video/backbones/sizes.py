"""The grid of latents of a clip."""

from __future__ import annotations

from rats_video.errors import UserError
from rats_video.types import ClipSpec


def divide_clip(
    clip: ClipSpec, temporal: int, spatial: int, patch: tuple[int, int, int], least: int = 1
) -> tuple[int, int, int]:
    """`(F, H, W)` of a clip's latents.

    Args:
        clip: its size in pixels.
        temporal: pixel frames a latent frame, but for the first, which holds one.
        spatial: pixels a latent row or column.
        patch: latent frames, rows and columns a token.
        least: latent rows and columns that the decoder needs.

    Raises:
        UserError: they cannot divide the clip, or it is too small.
    """
    frames_a_patch = temporal * patch[0]
    first = 1 + (patch[0] - 1) * temporal  # the fewest frames that fill a patch
    fix = nearest(clip.num_frames, first, frames_a_patch)
    if (clip.num_frames - 1) % temporal:
        raise UserError(
            f"must be 1 + a multiple of {temporal}, got {clip.num_frames}", where="clip.num_frames", fix=fix
        )
    for name, pixels, size in (("height", clip.height, patch[1]), ("width", clip.width, patch[2])):
        step = spatial * size
        smallest = step * -(-least // size)
        if pixels % step or pixels < smallest:
            wanted = f"a multiple of {step}" if pixels % step else f"at least {smallest}"
            fix = nearest(pixels, smallest, step)
            raise UserError(f"must be {wanted}, got {pixels}", where=f"clip.{name}", fix=fix)
    frames = 1 + (clip.num_frames - 1) // temporal
    if frames % patch[0]:
        raise UserError(
            f"{clip.num_frames} give {frames} latent frames, which patches of {patch[0]} do not divide",
            where="clip.num_frames", fix=fix,
        )  # fmt: skip
    return frames, clip.height // spatial, clip.width // spatial


def nearest(value: int, first: int, step: int) -> str:
    """Says how to mend a value that is not among first, first + step, first + 2 * step and so on."""
    below = value - (value - first) % step
    return f"take {first}" if below < first else f"take {below} or {below + step}"
