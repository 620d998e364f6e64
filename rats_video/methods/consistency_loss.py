"""Consistency along the teacher's path: points of one path should be sent to one and the same place.

The consistency function of the student is one Euler step of any length, `f(x, s, e) = x + (e - s) * velocity(x, s)`;
`f(x, e, e) = x` holds by itself. In each segment of the noise axis it should send every point of the teacher's guided
path to the path's point at the segment's lower end `e`: with the student's own intervals for segments (trajectory
segmented, Hyper-SD, arXiv 2404.13686, section 3.1) that is exactly the step which its few-step sampler makes; with one
segment it is a consistency model (arXiv 2303.01469), which predicts the clip.

Where the nearer of two neighbours is sent is the target and carries no gradient. It is the student's own, not that of
an average of its weights: improved consistency training (arXiv 2310.14189, section 3.2) finds the average to hurt, and
without it there is no third copy of the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rats_video.config.fields import Config, NonNegativeFloat, PositiveFloat, PositiveInt
from rats_video.diffusion.flow import add_noise
from rats_video.methods.base import WITH_GRADIENT, BaseMethodConfig
from rats_video.methods.draws import TRAJECTORY, draw_noise, draw_uniform
from rats_video.methods.horizon import SAME_SIGMA, at_horizons
from rats_video.methods.teacher import TeacherSampler
from rats_video.types import Backbone, PromptBatch


class PairsConfig(Config):
    """Pairs of neighbouring points of the teacher's path; each costs a call of the student with gradient, one without.

    `path` takes them from the teacher's rollout, one of which serves all pairs of an update and `teacher.reuse`
    updates; `noised` noises the rollout's clip anew and follows the guided teacher for one step.
    """

    source: Literal["path", "noised"] = Field("path", description="where they come from, as above")
    count: PositiveInt = Field(4, description="pairs a clip and update")
    skip: PositiveInt = Field(1, description="steps of the teacher's grid between the two, inside their segment")
    huber: PositiveFloat | None = Field(
        0.03, description="root mean square distance below which the loss is quadratic; null = quadratic always"
    )

    def evaluations(self, teacher: float, guided: float) -> float:
        """Network evaluations a clip and update, with the teacher's."""
        return teacher + self.count * (WITH_GRADIENT + 1 + (guided if self.source == "noised" else 0))


class BaseConsistencyConfig(BaseMethodConfig):
    """Keys of methods that send points of the teacher's path to one place, and may raise a reward beside it."""

    draws_levels: ClassVar[bool] = True
    uses_trajectory: ClassVar[bool] = True

    pairs: PairsConfig = PairsConfig()
    reward_weight: NonNegativeFloat = Field(1.0, description="of the reward in the loss; 0 leaves it out")

    @property
    def uses_gradient(self) -> bool:
        """True with a weight on the reward."""
        return self.reward_weight > 0

    @property
    def uses_teacher(self) -> bool:
        """True: the pairs lie on its path."""
        return True


@dataclass(frozen=True)
class TrajectoryPairs:
    """Two neighbouring points of the teacher's path for each of B clips, and the end of the segment both are in.

    Args:
        latents: `[B, C, F, H, W]`, the farther from the clip.
        sigma: `[B]`, theirs.
        near: `[B, C, F, H, W]`, the nearer; `sigma_near` `[B]` is below `sigma` and not below `end`.
        sigma_near: `[B]`.
        end: `[B]`.
    """

    latents: Tensor
    sigma: Tensor
    near: Tensor
    sigma_near: Tensor
    end: Tensor


@dataclass(frozen=True)
class SegmentGrid:
    """All noise levels at which pairs may lie: the teacher's, and the ends of the segments.

    Args:
        levels: `[M + 1]` falling, 1 ... 0.
        ends: for each of the M levels above 0 the index of its segment's end.
    """

    levels: Tensor
    ends: tuple[int, ...]

    @classmethod
    def of(cls, teacher: Tensor, ends: Tensor) -> SegmentGrid:
        """Join the teacher's grid `[M' + 1]` and the segments' ends, 1 ... 0; a level in both counts once."""
        apart = (teacher[:, None] - ends[None]).abs().amin(dim=1) > SAME_SIGMA
        levels = torch.cat([teacher[apart], ends]).sort(descending=True).values
        next_end = [int((levels >= end - SAME_SIGMA).sum()) - 1 for end in ends.tolist()]
        owners = [next(end for end in next_end if end > index) for index in range(len(levels) - 1)]
        return cls(levels, tuple(owners))

    def draw(self, u: Tensor, skip: int) -> tuple[list[int], list[int], list[int]]:
        """Indices of a pair's two points and of its segment's end, for `u` `[B]` uniform in [0, 1)."""
        far = (u * len(self.ends)).long().tolist()
        ends = [self.ends[index] for index in far]
        return far, [min(index + skip, end) for index, end in zip(far, ends, strict=True)], ends


def trajectory_consistency_loss(
    student: Backbone, teacher: TeacherSampler, batch: PromptBatch, ends: Tensor, cfg: PairsConfig
) -> tuple[Tensor, Tensor]:
    """Mean loss of a batch's pairs, 0-d, and where the first pair of each clip is sent, `[B, C, F, H, W]`.

    Args:
        student: gradient goes to it.
        teacher: whose path the pairs are of.
        batch: B prompts; `cfg.count` pairs each are drawn by its seeds, other ones in every update of a rollout.
        ends: of the segments, `[K + 1]` falling, 1 ... 0.
        cfg: which pairs, and the distance.
    """
    pairs = draw_pairs(teacher, batch, ends, cfg)
    found = [consistency_loss(student, pair, batch.prompts, cfg.huber) for pair in pairs]
    return torch.stack([loss.mean() for loss, _ in found]).mean(), found[0][1]


def draw_pairs(
    teacher: TeacherSampler, batch: PromptBatch, ends: Tensor, cfg: PairsConfig
) -> Iterator[TrajectoryPairs]:
    """`cfg.count` pairs of each clip."""
    path = teacher.trajectory(batch)
    grid = SegmentGrid.of(torch.tensor(path.sigmas), ends)
    points = at_horizons(path, tuple(grid.levels.tolist())).latents if cfg.source == "path" else ()
    levels = grid.levels.to(batch.noise)
    for index in range(cfg.count):
        far, near, end = grid.draw(draw_uniform(batch, TRAJECTORY, index), cfg.skip)
        sigma, sigma_near = levels[far], levels[near]
        if cfg.source == "path":
            latents, there = _rows(points, far), _rows(points, near)
        else:
            latents = add_noise(path.x0, draw_noise(batch, TRAJECTORY, index, 1), sigma)
            with torch.no_grad():
                velocity = teacher.velocity(latents, sigma, batch.condition(teacher.backbone))
            there = _step(latents, velocity, sigma, sigma_near)
        yield TrajectoryPairs(latents, sigma, there, sigma_near, levels[end])


def consistency_loss(
    student: Backbone, pairs: TrajectoryPairs, prompts: tuple[str, ...], huber: float | None
) -> tuple[Tensor, Tensor]:
    """Distance between the places that the two points of each pair are sent to, `[B]`, and the farther one's place.

    With the mean square `d` over a clip's latents it is `d`, or pseudo-Huber's `sqrt(d + huber^2) - huber`, whose
    gradient has the same size for all clips and segments that are farther off than `huber`.
    """
    text = student.encode_text(prompts)
    landed = _step(pairs.latents, student.velocity(pairs.latents, pairs.sigma, text), pairs.sigma, pairs.end)
    with torch.no_grad():
        velocity = student.velocity(pairs.near, pairs.sigma_near, text)
        target = _step(pairs.near, velocity, pairs.sigma_near, pairs.end)
    square = (landed - target).square().mean(dim=(1, 2, 3, 4))
    return square if huber is None else (square + huber**2).sqrt() - huber, landed


def _step(latents: Tensor, velocity: Tensor, sigma: Tensor, end: Tensor) -> Tensor:
    """The Euler step between two levels, of each clip's own `[B]`."""
    return latents + (end - sigma).view(-1, 1, 1, 1, 1) * velocity


def _rows(points: tuple[Tensor, ...], index: list[int]) -> Tensor:
    return torch.stack([points[i][row] for row, i in enumerate(index)])
