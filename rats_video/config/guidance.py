"""Settings of guidance beyond the one scale of the text."""

from __future__ import annotations

from pydantic import Field

from rats_video.config.fields import Config, NonNegativeFloat, NonNegativeInt, PositiveFloat


class AudioVideoGuidance(Config):
    """What LTX-2 is guided by beside the text scale of its pictures; the defaults are `LTX2Pipeline`'s, for LTX-2.3."""

    audio_scale: PositiveFloat = Field(7.0, description="text scale of the sound; guidance_scale is the pictures'")
    stg_scale: NonNegativeFloat = Field(
        1.0,
        description="away from clips without self-attention in stg_blocks (arXiv 2411.18664); 0 = off, one call less",
    )
    audio_stg_scale: NonNegativeFloat = Field(1.0, description="the same of the sound")
    stg_blocks: tuple[NonNegativeInt, ...] = Field((28,), min_length=1, description="the first block is 0")
    modality_scale: float = Field(
        3.0, ge=1, allow_inf_nan=False,
        description="away from pictures and sound made without each other; 1 = off, one call less",
    )  # fmt: skip
    audio_modality_scale: float = Field(3.0, ge=1, allow_inf_nan=False, description="the same of the sound")
    rescale: float = Field(
        0.7, ge=0, le=1, description="how far the guided clip gets back its spread without guidance (arXiv 2305.08891)"
    )
    audio_rescale: float = Field(0.7, ge=0, le=1, description="the same of the sound")

    @property
    def uses_stg(self) -> bool:
        """True if a call without self-attention is made."""
        return self.stg_scale > 0 or self.audio_stg_scale > 0

    @property
    def uses_modality(self) -> bool:
        """True if a call without attention between pictures and sound is made."""
        return self.modality_scale > 1 or self.audio_modality_scale > 1

    @property
    def calls(self) -> int:
        """Network evaluations of a guided step beside the two of the text."""
        return self.uses_stg + self.uses_modality
