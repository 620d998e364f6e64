"""How clips that start from a picture keep to it, and if they move as asked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from rats_video.errors import UserError

PSNR, LIKENESS, DISPLACEMENT = "first_frame_psnr", "picture_likeness", "displacement"
_LEAST_ERROR = 1e-10  # mean square: equal pictures have 100 dB
_COARSE = 8  # rows and columns


def picture_measure(videos: Tensor, first: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Metrics `[B]` of clips `[B, T, 3, height, width]` that start from pictures `[B, 3, height, width]` in [0, 1].

    `first_frame_psnr` is the first frame's, in dB, against the picture as the model saw it. `picture_likeness` is the
    mean cosine, over the later frames, of 8 x 8 pixels without their mean colour: of pixels, no network's; a clip that
    stands still has 1, so it is good near the teacher's. `displacement` is of the shapes alone.
    """
    error = (videos[:, 0].float() - first.float()).square().mean(dim=(1, 2, 3))
    found = {PSNR: -10 * error.clamp(min=_LEAST_ERROR).log10()}
    if videos.shape[1] > 1:
        given = _coarse(first[:, None].float())
        found[LIKENESS] = F.cosine_similarity(_coarse(videos[:, 1:].float()), given, dim=-1).mean(dim=1)
    return found | _displacement(videos, prompts)


def _coarse(frames: Tensor) -> Tensor:
    """Frames `[B, T, 3, height, width]` as vectors `[B, T, 3 * 64]` without their mean colour."""
    small = F.adaptive_avg_pool2d(frames.flatten(0, 1), _COARSE)
    rows: Tensor = (small - small.mean(dim=(-2, -1), keepdim=True)).flatten(1)
    return rows.unflatten(0, frames.shape[:2])  # type: ignore[no-any-return]


def _displacement(videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """The shapes' displacement against the prompts'; nothing where a prompt is no caption of theirs."""
    from rats_video.datasets.shapes.measure import measure_displacement

    if videos.shape[1] < 3:  # fewer frames show no line
        return {}
    try:
        return {DISPLACEMENT: measure_displacement(videos, prompts)}
    except UserError:
        return {}
