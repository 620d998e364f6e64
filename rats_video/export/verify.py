"""The check of an export: the stock pipeline's clips against our sampler's, from the same noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from rats_video.errors import UserError, first_line
from rats_video.export.base import ExportedStudent, Form
from rats_video.export.stock import sample_stock

# Wrong noise levels or keys show by whole tenths; sums in another order by 1e-6 (1e-5 where a LoRA is merged).
LARGEST = 1e-4
# In half precision rounding alone moves pixels; eight bits move them further.
LEAST_PSNR_HALF, LEAST_PSNR_QUANTIZED = 25.0, 15.0


@dataclass(frozen=True)
class Difference:
    """The distance between clips, of pixels in [0, 1].

    Args:
        largest: of any pixel.
        mean: mean absolute.
        psnr: peak signal-to-noise ratio over all pixels, dB; infinite where they are equal.
    """

    largest: float
    mean: float
    psnr: float

    @staticmethod
    def of(ours: Tensor, theirs: Tensor) -> Difference:
        """Between clips `[B, T, 3, height, width]` of one shape."""
        error = (ours - theirs).double()
        square = float(error.square().mean())
        psnr = math.inf if square == 0 else -10 * math.log10(square)
        return Difference(float(error.abs().max()), float(error.abs().mean()), psnr)

    def __str__(self) -> str:
        return f"largest pixel difference {self.largest:.2g}, mean {self.mean:.2g}, PSNR {self.psnr:.1f} dB"


def sample_export(form: Form, exported: ExportedStudent, device: torch.device, folder: Path) -> Tensor:
    """The clips `[N, T, 3, height, width]` of an export, loaded and sampled by the target's own code.

    Raises:
        UserError: it cannot be loaded or sampled, or its clips are not the student's.
    """
    assert exported.videos is not None
    try:
        videos = sample_stock(form.load(exported, device, folder), exported)
    except (ValueError, KeyError, RuntimeError, OSError, TypeError, NameError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError | UserError):
            raise
        raise UserError(
            f"stock diffusers cannot load or sample it: {first_line(error)}; nothing is kept",
            where=f"--format {form.name}",
        ) from error
    check(Difference.of(exported.videos, videos), exported.dtype, loses=form.loses, where=f"--format {form.name}")
    return videos


def check(difference: Difference, dtype: torch.dtype, *, loses: bool, where: str) -> None:
    """Raise UserError where an export is not the student."""
    if loses:
        good = difference.psnr >= LEAST_PSNR_QUANTIZED
    elif dtype == torch.float32:
        good = difference.largest <= LARGEST
    else:
        good = difference.psnr >= LEAST_PSNR_HALF
    if not good:  # NaN too
        raise UserError(
            f"the stock pipeline does not sample what the student does: {difference}; nothing is kept", where=where,
            fix="try another --format" if loses else "this is a bug of rats-video or of an untested diffusers",
        )  # fmt: skip
