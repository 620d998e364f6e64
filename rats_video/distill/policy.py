"""The group-relative policy objective: raises a reward that has no gradient.

As GRPO does for flow models (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818), the student's sampler is made
noisy, K rollouts of a prompt are judged against one another, and steps that led to better ones are made likelier.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rats_video.config.method import PolicyConfig
from rats_video.diffusion.flow import noisy_step
from rats_video.distill.draws import draw_noise
from rats_video.distill.finite import only
from rats_video.distill.judge import judge
from rats_video.types import Backbone, PromptBatch, Reward, RewardScores


@dataclass(frozen=True)
class Group:
    """K noisy rollouts of each of B prompts: how they score, and how likely their steps are.

    Args:
        scores: K times the scores of B clips, without gradient.
        log_likelihood: `[K, B]`, with gradient to the student.
        normalize: measure rewards in standard deviations of their group.
    """

    scores: tuple[RewardScores, ...]
    log_likelihood: Tensor
    normalize: bool

    def rewards(self, kept: Tensor) -> Tensor:
        """`[K, B]`; 0 for clips that are not kept `[B]`, so that none of them is better than its group."""
        return torch.stack([only(scores, kept).clip for scores in self.scores])


def sample_group(student: Backbone, reward: Reward, batch: PromptBatch, sigmas: Tensor, policy: PolicyConfig) -> Group:
    """K rollouts of each prompt, all from the batch's own noise; what they draw on the way depends on its seeds alone.

    Args:
        student: the policy.
        reward: judges the clips at the end; no gradient is asked of it.
        batch: B prompts.
        sigmas: the student's grid `[N + 1]`.
        policy: how many rollouts, and how noisy.
    """
    assert len(batch.seeds) == len(batch.prompts), "one seed a prompt"
    scores, likelihoods = [], []
    for sample in range(policy.samples):
        x0, log_likelihood = noisy_rollout(student, batch, sigmas, policy.noise, sample)
        with torch.no_grad():
            scores.append(judge(reward, student, x0, batch.prompts))
        likelihoods.append(log_likelihood)
    return Group(tuple(scores), torch.stack(likelihoods), policy.normalize)


def noisy_rollout(
    student: Backbone, batch: PromptBatch, sigmas: Tensor, fresh: float, sample: int
) -> tuple[Tensor, Tensor]:
    """The clip `[B, C, F, H, W]` and the log-likelihood `[B]` of the steps that led to it, given each step's latents.

    Gradient flows through the likelihood of every step but the last, never from step to step: a step's latents are
    data. The last step draws nothing, so nothing about it is more or less likely: it is shaping that teaches it. Each
    network call is repeated in backward, so that what is kept of a step is its latents, whatever the model's size.
    Like Flow-GRPO's, the likelihood is a mean over the latents' numbers: its gradient has the size of shaping's.
    """
    text = student.encode_text(batch.prompts)
    sigmas = sigmas.to(batch.noise.device)
    last = len(sigmas) - 2
    latents, log_likelihood = batch.noise, batch.noise.new_zeros(len(batch.noise))
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        level = sigma.expand(len(latents))
        if step == last:  # nothing is drawn
            with torch.no_grad():
                slope = student.velocity(latents, level, text)
        else:
            slope = checkpoint(student.velocity, latents, level, text, use_reentrant=False, preserve_rng_state=False)
        mean, std = noisy_step(latents, slope, sigma, sigma_next, fresh)
        latents = mean.detach()
        if step != last and fresh > 0:
            latents = latents + std * draw_noise(batch, sample, step)
            log_likelihood = log_likelihood - ((latents - mean) / std).square().mean(dim=(1, 2, 3, 4)) / 2
    return latents, log_likelihood


def advantages(rewards: Tensor, *, normalize: bool) -> Tensor:
    """How much better each of a group's K clips is than their mean, `[K, B]`, in the group's standard deviations.

    Without `normalize` they are in the reward's own units, and the gradient of `policy_loss`, times `K / (K - 1)` and
    the count of a clip's latents, is an unbiased estimate of minus the gradient of the noisy student's expected reward
    with respect to the steps that draw noise (REINFORCE with the others' mean as baseline).
    """
    lead = rewards - rewards.mean(dim=0)
    # Where all are alike there is nothing to prefer, and rounding is not to be blown up to a preference.
    spread = rewards.std(dim=0, correction=0)
    return torch.where(spread > 1e-6, lead / spread.clamp(min=1e-6), 0.0) if normalize else lead


def policy_loss(group: Group, rewards: Tensor) -> Tensor:
    """`-mean over K of advantage * log-likelihood`, `[B]`, for rewards `[K, B]`.

    Each group is used for one update, by the policy that drew it: the likelihood ratio of PPO and GRPO is 1, its
    clipping never acts, and the gradient is this one's.
    """
    return -(advantages(rewards, normalize=group.normalize) * group.log_likelihood).mean(dim=0)
