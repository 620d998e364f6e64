"""The group-relative policy objective: raises a reward that has no gradient.

As GRPO does for flow models (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818), the student's sampler is made
noisy, K rollouts of a prompt are compared with one another, and steps that led to better ones are made likelier.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rats_video.config.fields import Config, PositiveFloat
from rats_video.diffusion.flow import stochastic_step
from rats_video.methods.base import WITH_GRADIENT
from rats_video.methods.draws import draw_noise
from rats_video.methods.finite import block_gradient, finite_clips, mask_scores
from rats_video.methods.scoring import score_clips
from rats_video.seeds import seeded
from rats_video.types import Backbone, PromptBatch, Reward, RewardScores, VelocityFn

SAME_SHARE = 0.005


class PolicyConfig(Config):
    """Noisy rollouts of the student, judged against one another (Flow-GRPO, arXiv 2505.05470): needs no gradient.

    All steps but the last, which draws no noise, can learn from it, whatever `student.grad_steps`.
    """

    samples: int = Field(
        4, ge=2, lt=10**6, description="rollouts a prompt and update, all from the noise of its other rollouts"
    )
    noise: float = Field(0.3, gt=0, le=1, description="share of the noise that each step but the last draws anew")
    normalize: bool = Field(default=True, description="measure rewards in standard deviations of their group")
    clip: PositiveFloat = Field(5.0, description="a lead over the group counts as this much at most, either way")
    trained_share: float = Field(
        1.0, gt=0, le=1, description="share of the noisy steps that learn from an update, chosen at random, rounded up"
    )

    @property
    def needs_euler(self) -> str | None:
        """What a re-noising student, which draws all noise anew, does not go with, as a clause; None if nothing."""
        return None if self.noise == 1 else f"draws a share of the noise anew (policy.noise={self.noise:g}, not 1)"

    def needs_other_noise(self, share: float) -> str | None:
        """What a student that draws that share anew when it is sampled does not go with, as a clause, if anything."""
        if abs(self.noise - share) < SAME_SHARE:
            return None
        return f"draws another share of the noise anew (policy.noise={self.noise:g}, where {share:.3f} would do)"

    def num_trained(self, num_steps: int) -> int:
        """Number of steps, of `num_steps`, that learn from an update."""
        return math.ceil(self.trained_share * (num_steps - 1) - 1e-9)

    def evaluations(self, num_steps: int) -> float:
        """Network evaluations a clip and update."""
        return self.samples * (num_steps + (WITH_GRADIENT - 1) * self.num_trained(num_steps))


TRAINED_STEPS = 10**6
"""Second number of the stream that chooses which steps learn from a batch."""


@dataclass(frozen=True)
class StochasticRollout:
    """One noisy rollout of B prompts.

    Args:
        x0: the clips `[B, C, F, H, W]`, with gradient to the student through the last step alone, if any.
        log_likelihood: `[B]`, of the trained steps given each step's latents, with gradient to the student.
        divergence: `[B]`, Kullback-Leibler divergence of the trained steps from the reference's; 0 without one.
        states: the latents `[B, C, F, H, W]` after each step but the last, data.
    """

    x0: Tensor
    log_likelihood: Tensor
    divergence: Tensor
    states: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Group:
    """K noisy rollouts of each of B prompts, and their scores.

    Args:
        paths: K rollouts of B prompts.
        scores: K times the scores of B clips.
        policy: its settings.
    """

    paths: tuple[StochasticRollout, ...]
    scores: tuple[RewardScores, ...]
    policy: PolicyConfig

    @property
    def kept(self) -> Tensor:
        """`[B]` bool: prompts all of whose clips have finite scores."""
        return finite_clips(*self.scores)

    @property
    def log_likelihood(self) -> Tensor:
        """`[K, B]`, with gradient to the student."""
        return torch.stack([path.log_likelihood for path in self.paths])

    @property
    def divergence(self) -> Tensor:
        """`[K, B]`, with gradient to the student."""
        return torch.stack([path.divergence for path in self.paths])

    def rewards(self, kept: Tensor) -> Tensor:
        """`[K, B]`; 0 for clips that are not kept `[B]`, so that none of them is better than its group."""
        return torch.stack([mask_scores(scores, kept).clip for scores in self.scores])


def sample_group(
    student: Backbone,
    reward: Reward,
    batch: PromptBatch,
    sigmas: Tensor,
    policy: PolicyConfig,
    *,
    reference: VelocityFn | None = None,
    through_last: bool = False,
    with_gradient: bool = False,
) -> Group:
    """K rollouts of each prompt, all from the batch's own noise; what they draw on the way depends on its seeds alone.

    Args:
        student: the policy.
        reward: scores the clips at the end.
        batch: B prompts.
        sigmas: the student's grid `[N + 1]`.
        policy: number of rollouts, their noise, and the share of steps that learn.
        reference: the student's steps are compared with its steps.
        through_last: give the clips gradient to the student, through the last step, which draws no noise.
        with_gradient: give the scores gradient to the clips.
    """
    assert len(batch.seeds) == len(batch.prompts), "one seed a prompt"
    paths = sample_rollouts(student, batch, sigmas, policy, reference=reference, through_last=through_last)
    clips = [path.x0.view_as(path.x0) for path in paths]  # only the gradient from pixels comes back here
    with torch.set_grad_enabled(with_gradient):
        scores = [score_clips(reward, student, each, batch.prompts, batch.grad_frames) for each in clips]
    group = Group(paths, tuple(scores), policy)
    for each in clips:
        block_gradient(each, group.kept)
    return group


def sample_rollouts(
    student: Backbone,
    batch: PromptBatch,
    sigmas: Tensor,
    policy: PolicyConfig,
    *,
    reference: VelocityFn | None = None,
    through_last: bool = False,
) -> tuple[StochasticRollout, ...]:
    """K rollouts of each prompt, with the policy's share of steps trained; arguments as of `sample_group`."""
    trained = trained_steps(batch.index, len(sigmas) - 1, policy)
    return tuple(
        stochastic_rollout(
            student, batch, sigmas, policy.noise, sample,
            trained=trained, reference=reference, through_last=through_last,
        )
        for sample in range(policy.samples)
    )  # fmt: skip


def trained_steps(index: int, num_steps: int, policy: PolicyConfig) -> Collection[int]:
    """The steps that learn from batch `index`, of those that draw noise: random, the same in every process."""
    chosen = torch.randperm(num_steps - 1, generator=seeded(index, TRAINED_STEPS))
    return chosen[: policy.num_trained(num_steps)].tolist()


def stochastic_rollout(
    student: Backbone,
    batch: PromptBatch,
    sigmas: Tensor,
    fresh: float,
    sample: int,
    *,
    trained: Collection[int] | None = None,
    reference: VelocityFn | None = None,
    through_last: bool = False,
) -> StochasticRollout:
    """One noisy rollout: the clips, and the likelihood of the steps that led to them, given each step's latents.

    Gradient flows through the likelihood of each trained step (None: all but the last), never from step to step: a
    step's latents are data. The last step draws nothing, so nothing about it is more or less likely; its clips may have
    gradient (`through_last`). Each call with gradient is repeated in backward, so that what is kept of a step is its
    latents, whatever the model's size. Like Flow-GRPO's, likelihood and divergence are means over the latents' numbers:
    their gradients have the size of shaping's. Steps that are not trained draw the same noise in every rollout, so
    that what makes one better is in the others (step-subset GRPO, arXiv 2605.26108).
    """
    text = batch.condition(student)
    sigmas = sigmas.to(batch.noise.device)
    last = len(sigmas) - 2
    trained = range(last) if trained is None else trained
    latents, states = text.hold(batch.noise), []
    log_likelihood = divergence = batch.noise.new_zeros(len(batch.noise))
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        before, level = latents, sigma.expand(len(latents))
        with torch.set_grad_enabled(torch.is_grad_enabled() and (through_last if step == last else step in trained)):
            slope = checkpoint(student.velocity, before, level, text, use_reentrant=False, preserve_rng_state=False)
            latents, std = stochastic_step(before, slope, sigma, sigma_next, fresh)
            latents = text.hold(latents)
        if step == last or fresh == 0:
            continue
        mean, latents = latents, latents.detach()
        latents = text.hold(latents + std * draw_noise(batch, sample if step in trained else 0, step))
        states.append(latents)
        if step in trained:
            log_likelihood = log_likelihood - half_mean_square((latents - mean) / std)
            if reference is not None:
                with torch.no_grad():
                    base, _ = stochastic_step(before, reference(before, level, text), sigma, sigma_next, fresh)
                divergence = divergence + half_mean_square((mean - base) / std)
    return StochasticRollout(latents, log_likelihood, divergence, tuple(states))


def half_mean_square(latents: Tensor) -> Tensor:
    """`[B]` of `[B, C, F, H, W]`."""
    return latents.square().mean(dim=(1, 2, 3, 4)) / 2


def advantages(rewards: Tensor, *, normalize: bool) -> Tensor:
    """Lead of each of a group's K clips over their mean, `[K, B]`, in the group's standard deviations.

    Without `normalize` they are in the reward's own units, and the gradient of `policy_loss`, times `K / (K - 1)` and
    the count of a clip's latents, is an unbiased estimate of minus the gradient of the noisy student's expected reward
    with respect to the steps that draw noise (REINFORCE with the others' mean as baseline).
    """
    lead = rewards - rewards.mean(dim=0)
    # If all are alike there is nothing to prefer: rounding must not become a preference.
    spread = rewards.std(dim=0, correction=0)
    return torch.where(spread > 1e-6, lead / spread.clamp(min=1e-6), 0.0) if normalize else lead


def policy_loss(group: Group, rewards: Tensor) -> Tensor:
    """`-mean over K of advantage * log-likelihood`, `[B]`, for rewards `[K, B]`.

    Each group is used for one update, by the policy that drew it: the likelihood ratio of PPO and GRPO is 1, its
    clipping never acts, and the gradient is this one's.
    """
    lead = advantages(rewards, normalize=group.policy.normalize).clamp(-group.policy.clip, group.policy.clip)
    return -(lead * group.log_likelihood).mean(dim=0)
