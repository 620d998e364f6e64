"""How LTX-2 guides: away from several weaker calls, each part by scales of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from rats_video.condition import Condition
from rats_video.config.guidance import AudioVideoGuidance
from rats_video.diffusion.guidance import with_spread


class TwoParts(Protocol):
    """A model of pictures and sound, as its guidance sees it."""

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition, **changed: Any) -> Tensor:
        """One call; `changed` are arguments of the transformer."""
        ...

    def split(self, latents: Tensor) -> Mapping[str, Tensor]:
        """`video` and `audio`."""
        ...

    def join(self, video: Tensor, audio: Tensor) -> Tensor:
        """The inverse of `split`."""
        ...


def guide(
    model: TwoParts, settings: AudioVideoGuidance, cond: Tensor, uncond: Tensor, scale: float | Tensor,
    latents: Tensor, sigma: Tensor, condition: Condition,
) -> Tensor:  # fmt: skip
    """Away from each weaker call, and back towards the spread of the clean clip without guidance.

    The pipeline adds in clean clips `x0 = latents - sigma * velocity`; sums are the same in velocities.
    """
    weaker = [(uncond, scale - 1, settings.audio_scale - 1)]
    if settings.uses_stg:
        skipped = model.velocity(latents, sigma, condition, spatio_temporal_guidance_blocks=settings.stg_blocks)
        weaker.append((skipped, settings.stg_scale, settings.audio_stg_scale))
    if settings.uses_modality:
        alone = model.velocity(latents, sigma, condition, isolate_modalities=True)
        weaker.append((alone, settings.modality_scale - 1, settings.audio_modality_scale - 1))
    noisy, plain = model.split(latents), model.split(cond)
    others = [(model.split(other), weights) for other, *weights in weaker]
    level = sigma.view(-1, 1, 1, 1, 1)
    parts = {}
    for place, (name, share) in enumerate({"video": settings.rescale, "audio": settings.audio_rescale}.items()):
        guided = plain[name] + sum(weights[place] * (plain[name] - other[name]) for other, weights in others)
        clean = with_spread(noisy[name] - level * guided, noisy[name] - level * plain[name], share)
        parts[name] = (noisy[name] - clean) / level
    return condition.at_rest(model.join(**parts))
