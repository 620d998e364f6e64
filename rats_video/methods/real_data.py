"""Real clips beside the RATS step: flow matching at the few noise levels that the student is ever called at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, device

from rats_video.condition import Condition
from rats_video.config.fields import Config, NonNegativeFloat, NumClips
from rats_video.diffusion.flow import add_noise, euler_step
from rats_video.seeds import seeded
from rats_video.types import Backbone


class RealDataConfig(Config):
    """Real clips, prepared by `rats-video prepare`, that the student's velocity is kept close to."""

    path: str = Field(description="the cache; its training clips of the run's size are used")
    weight: NonNegativeFloat = Field(0.1, description="of the term in the loss; 0 leaves it out")
    batch_size: NumClips | None = Field(
        None, description="real clips an update, over all processes; null = training.batch_size"
    )
    prompt_dropout: float = Field(0.0, ge=0, le=1, description="share of clips with the empty prompt for their own")
    digest: str | None = Field(None, description="of the cache's clips; the run writes it down")


REAL = 33
"""Stream of random numbers."""

RealSource = Callable[[int], tuple[Tensor, Condition]]
"""`step -> latents [B, C, F, H, W], text`: this process's real clips of a step, with their first frames if given."""


@dataclass(frozen=True)
class RealClips:
    """Real clips of a step, with their random numbers.

    Args:
        latents: `[B, C, F, H, W]`.
        text: of B prompts.
        noise: `[B, C, F, H, W]`.
        place: in [0, 1): which of the student's steps they are noised for. One for all, so that experts of their own
            noise levels, split over processes, are called together.
    """

    latents: Tensor
    text: Condition
    noise: Tensor
    place: float

    def parts(self, most: int) -> Iterator[RealClips]:
        """The clips in at most that many micro-batches."""
        size = -(-len(self.latents) // most)
        for start in range(0, len(self.latents), size):
            yield self._rows(slice(start, start + size))

    def _rows(self, rows: slice) -> RealClips:
        text = self.text.map(lambda part: part[rows])
        return RealClips(self.latents[rows], text, self.noise[rows], self.place)


@dataclass(frozen=True)
class RealData:
    """The source of real clips, and their weight.

    Args:
        source: gives this process's clips.
        weight: of their loss.
        batch_size: clips a step, over all processes.
        rows: which of them are this process's.
        seed: of the noise.
    """

    source: RealSource
    weight: float
    batch_size: int
    rows: slice
    seed: int

    def draw(self, step: int, where: device) -> RealClips:
        """The clips of a step, a pure function of it; each has the same noise on any number of processes."""
        latents, text = self.source(step)
        generator = seeded(self.seed, REAL, step)
        place = float(torch.rand((), generator=generator))
        noise = torch.randn(self.batch_size, *latents.shape[1:], generator=generator)[self.rows]
        return RealClips(latents.to(where), text.map(lambda part: part.to(where)), noise.to(where), place)


def real_data_loss(student: Backbone, clips: RealClips, sigmas: Tensor) -> Tensor:
    """`[B]`: mean square distance of one of the student's Euler steps from the straight path of a real clip.

    The step starts at the noised clip `(1 - sigma) * x0 + sigma * noise` and should end at the clip noised to the next
    level, so this is shaping with the clip's own path for a teacher, in the same unit. It is flow matching's error of
    the velocity, `|velocity - (noise - x0)|^2`, weighed by the step's length squared: what the student's sampler makes
    of such an error. The usual weight of x0-prediction, sigma^2, would count most at sigma 1, where the best answer is
    the mean of all clips of the prompt, a blur; this one counts most in the last, longest steps to the clip itself.

    Args:
        student: called once.
        clips: B of them.
        sigmas: `[N + 1]`, the student's grid, 1 ... 0.
    """
    index = int(clips.place * (len(sigmas) - 1))
    here, after = (each.to(clips.latents.device).expand(len(clips.latents)) for each in sigmas[index : index + 2])
    noisy = clips.text.hold(add_noise(clips.latents, clips.noise, here))
    velocity = student.velocity(noisy, here, clips.text)
    landed = euler_step(noisy, velocity, here[0], after[0])
    path = clips.text.hold(add_noise(clips.latents, clips.noise, after))
    return (landed - path).square().mean(dim=(1, 2, 3, 4))
