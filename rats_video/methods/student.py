"""The student's own rollout, and the reward of its clip: what every method begins with."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor

from rats_video.diffusion.flow import FRESH_SHARES
from rats_video.diffusion.rollout import rollout
from rats_video.methods.base import BaseMethod, LogRow, Method, StepsConfig
from rats_video.methods.draws import RENOISE, draw_noise
from rats_video.methods.finite import SKIPPED, block_gradient, finite_clips, mask_scores, warn_skipped
from rats_video.methods.scoring import score_clips
from rats_video.types import FreshNoise, PromptBatch, RewardScores, Trajectory


def student_rollout(
    method: Method | BaseMethod,
    batch: PromptBatch,
    grad_steps: Collection[int] | None = None,
    *,
    predictions: bool = False,
) -> Trajectory:
    """The student's own few-step trajectory from the shared noise, kept at every noise level below 1.

    `grad_steps` carry gradient; None takes those of the configuration. With `predictions` it has those of all calls.
    """
    if grad_steps is None:
        grad_steps = method.student_config.gradient_steps(batch.num_steps)
    return rollout(
        method.student.velocity,
        batch.noise,
        method.student.sigmas(batch.num_steps, method.shift),
        batch.condition(method.student),
        keep=range(1, batch.num_steps + 1),
        grad_steps=grad_steps,
        predict=range(batch.num_steps) if predictions else (),
        fresh=step_noise(method.student_config, batch),
        share=FRESH_SHARES[method.student_config.sampler],
    )


def step_noise(steps: StepsConfig, batch: PromptBatch, *stream: int) -> FreshNoise | None:
    """What the student draws on its way, by each prompt's own seed and the step; None of an Euler sampler."""
    return None if steps.sampler == "euler" else partial(draw_noise, batch, RENOISE, *stream)


def score_student_clip(
    method: Method | BaseMethod, batch: PromptBatch, x0: Tensor, *, with_gradient: bool
) -> tuple[RewardScores, LogRow]:
    """The reward of clean latents `[B, C, F, H, W]`, and its columns of the log row.

    A clip whose score is not finite scores 0, passes no gradient on and is counted.
    """
    clip = x0.view_as(x0)  # only the gradient from pixels comes back here
    with torch.set_grad_enabled(with_gradient):
        scores = score_clips(method.reward, method.student, clip, batch.prompts, batch.grad_frames)
    kept = finite_clips(scores)
    block_gradient(clip, kept)
    scores = mask_scores(scores, kept)
    if not bool(kept.all()):
        warn_skipped(batch.prompts, kept)
    row = {"reward/student": scores.clip, SKIPPED: (~kept).float()}
    row |= {f"reward/student/{name}": part for name, part in scores.parts.items()}
    return scores, {name: float(value.detach().mean()) for name, value in row.items()}
