"""The check of an export: the stock pipeline's clips against our sampler's, from the same noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from rats_video.errors import UserError, first_line
from rats_video.export.base import Clips, ExportedStudent, Form
from rats_video.export.stock import sample_stock

# The latents tell. Rounding moved single ones by 1e-5 in float32 and 0.03 in bfloat16, another frame rate by 0.02,
# other noise levels by 0.4 and more. Pixels tell of the VAE, which an export only copies, and of eight bits.
UNCHECKED = "not compared with our sampler (--no-verify)"
LEAST_PSNR, LEAST_PSNR_QUANTIZED = 25.0, 15.0


@dataclass(frozen=True)
class Difference:
    """The distance between clips, of pixels in [0, 1].

    Args:
        latents: root mean square over that of ours: one of a million may be far off in half precision.
        largest: of any pixel.
        mean: mean absolute.
        psnr: peak signal-to-noise ratio over all pixels, dB; infinite where they are equal.
    """

    latents: float
    largest: float
    mean: float
    psnr: float

    @staticmethod
    def of(ours: Clips, theirs: Clips) -> Difference:
        """Between clips of one shape."""
        latents = (ours.latents - theirs.latents).double().norm() / ours.latents.double().norm()
        error = (ours.videos - theirs.videos).double()
        square = float(error.square().mean())
        psnr = math.inf if square == 0 else -10 * math.log10(square)
        return Difference(float(latents), float(error.abs().max()), float(error.abs().mean()), psnr)

    def __str__(self) -> str:
        pixels = f"largest pixel difference {self.largest:.2g}, mean {self.mean:.2g}, PSNR {self.psnr:.1f} dB"
        return f"relative difference of the latents {self.latents:.2g}; {pixels}"


def sample_export(form: Form, exported: ExportedStudent, device: torch.device, folder: Path) -> Clips:
    """The clips of an export, loaded and sampled by the target's own code.

    Raises:
        UserError: it cannot be loaded or sampled, or its clips are not the student's.
    """
    assert exported.clips is not None
    try:
        clips = sample_stock(form.load(exported, device, folder), exported)
    except (ValueError, KeyError, RuntimeError, OSError, TypeError, NameError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError | UserError):
            raise
        raise UserError(
            f"stock diffusers cannot load or sample it: {first_line(error)}; nothing is kept",
            where=f"--format {form.name}",
        ) from error
    check(Difference.of(exported.clips, clips), exported.dtype, loses=form.loses, where=f"--format {form.name}")
    return clips


def check(difference: Difference, dtype: torch.dtype, *, loses: bool, where: str) -> None:
    """Raise UserError where an export is not the student."""
    if loses:
        good = difference.psnr >= LEAST_PSNR_QUANTIZED
    else:  # half of the digits
        good = difference.latents <= math.sqrt(torch.finfo(dtype).eps) and difference.psnr >= LEAST_PSNR
    if not good:  # NaN too
        raise UserError(
            f"the stock pipeline does not sample what the student does: {difference}; nothing is kept", where=where,
            fix="try another --format" if loses else "this is a bug of rats-video or of an untested diffusers",
        )  # fmt: skip
