"""Configuration of what a run does about steps that must not reach the weights."""

from __future__ import annotations

from pydantic import Field

from rats_video.config.schema import Config, NonNegativeInt, PositiveFloat


class FaultsConfig(Config):
    """A step whose loss, gradient or updated weights are not finite is left out; too many, and the run goes back.

    It goes back to the last checkpoint from which a step succeeded, and on from there at a lower learning rate: the
    batches are the same ones, so nothing else would make a difference. A run that keeps going back stops.
    """

    skip: NonNegativeInt = Field(3, description="steps in a row that are left out; one more, and the run goes back")
    skip_total: NonNegativeInt = Field(50, description="the same for steps left out in all")
    rollbacks: NonNegativeInt = Field(3, description="how often the run may go back before it stops")
    lower: float = Field(0.5, gt=0, lt=1, description="factor of the learning rate, for good, each time it goes back")
    max_norm: PositiveFloat | None = Field(
        None, description="a gradient with a larger norm, before it is clipped, is a fault too; null = any is clipped"
    )
