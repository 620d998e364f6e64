"""GRPO and RTDMD: their losses from the formula written out, and their gradients against the analytic one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from linear_student import FRESH, SIGMAS, LinearStudent, moments, toy_batch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from rats_video.backbones.wan import WanBackbone
from rats_video.diffusion.schedule import sigma_grid
from rats_video.distillation.method import build_method
from rats_video.distillation.roles import build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.methods.distribution_matching import DistributionMatching
from rats_video.methods.draws import draw_noise
from rats_video.methods.grpo import Grpo
from rats_video.methods.policy import PolicyConfig, policy_loss, sample_group, trained_steps
from rats_video.methods.rtdmd import Rtdmd, RtdmdConfig
from rats_video.training.batches import draw_batch
from rats_video.training.loop import train_loop
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.training.update import accumulate_gradient
from rats_video.types import PromptBatch, Reward, RewardScores

Make = Callable[..., tuple[Any, DistillConfig]]
GRPO = "{kind: grpo, policy: {samples: 3, noise: 0.5}, kl_weight: 0.2}"
RTDMD = (
    "{kind: rtdmd, policy: {samples: 2, noise: 0.5}, policy_weight: 0.7, reward_weight: 0.4, distribution_weight: 0.3}"
)


class NearTarget:
    """The squared distance of the latents from 0.5, negative; differentiable."""

    def score_latents(self, latents: Tensor, _prompts: Sequence[str]) -> RewardScores:
        return RewardScores(-(latents - 0.5).square().sum(dim=(1, 2, 3, 4)))


class Stepped:
    """A reward that counts: it has no gradient anywhere."""

    differentiable = False

    def __call__(self, videos: Tensor, _prompts: Sequence[str]) -> RewardScores:
        with torch.no_grad():
            return RewardScores((videos * 255).round().remainder(2).mean(dim=(1, 2, 3, 4)))


@pytest.fixture
def make_method(loaded: WanBackbone, color_reward: Reward, make_config: Callable[..., DistillConfig]) -> Make:
    """A method of the tiny model whose student has moved away from its base, with the colour reward."""

    def make(method: str, *overrides: str, reward: Reward = color_reward) -> tuple[Any, DistillConfig]:
        cfg = make_config(f"method={method}", "training.batch_size=4", *overrides)
        student, teacher = build_roles(cfg, loaded.with_own_denoiser())
        with torch.no_grad():
            for index, weight in enumerate(student.weights.values()):
                weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)))
        built = build_method(cfg, student, teacher)
        return replace(built, reward=reward), cfg  # type: ignore[type-var]

    return make


def rollouts_by_hand(
    method: Grpo | Rtdmd, batch: PromptBatch, samples: int, fresh: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Clips with gradient in their last step, log-likelihoods and divergences `[K, B]`, by torch's own Gaussians."""
    sigmas, student = sigma_grid(batch.num_steps, 3.0), method.student
    text, clips, likelihoods, divergences = student.encode_text(batch.prompts), [], [], []
    for sample in range(samples):
        latents, likelihood, divergence = batch.noise, torch.zeros(4), torch.zeros(4)
        for step, (sigma, after) in enumerate(itertools.pairwise(sigmas.tolist())):
            means = []
            for network in (student, method.teacher.backbone):
                velocity = network.velocity(latents, torch.full((4,), sigma), text)
                x0, noise = latents - sigma * velocity, latents + (1 - sigma) * velocity
                means += [(1 - after) * x0 + after * math.sqrt(1 - fresh**2) * noise]
            if after == 0:
                clips.append(means[0])
                continue
            mine, base = (Normal(mean, after * fresh) for mean in means)
            latents = (means[0] + after * fresh * draw_noise(batch, sample, step)).detach()
            drawn = mine.log_prob(latents) + math.log(after * fresh * math.sqrt(2 * math.pi))
            likelihood = likelihood + drawn.mean(dim=(1, 2, 3, 4))
            divergence = divergence + kl_divergence(mine, base).mean(dim=(1, 2, 3, 4))
        likelihoods.append(likelihood)
        divergences.append(divergence)
    return clips, torch.stack(likelihoods), torch.stack(divergences)


def assert_same_loss(method: Grpo | Rtdmd, loss: Tensor, by_hand: Tensor) -> None:
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-6, rel=1e-4)
    ours, theirs = (torch.autograd.grad(each, list(method.student.weights.values())) for each in (loss, by_hand))
    assert max(float(g.abs().max()) for g in theirs) > 1e-4
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=2e-3)


def advantages_by_hand(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean(dim=0)) / rewards.std(dim=0, correction=0)


# ---------------------------------------------------------------------------------------------------------------- GRPO


@pytest.mark.parametrize("clip", [5.0, 0.5])
def test_grpo_is_the_formula(make_method: Make, captions: tuple[str, ...], clip: float) -> None:
    grpo, cfg = make_method(GRPO.replace("noise: 0.5", f"noise: 0.5, clip: {clip}"))
    batch = draw_batch(grpo.student, cfg, captions, 0)
    loss, row = grpo.step(batch)
    clips, likelihood, divergence = rollouts_by_hand(grpo, batch, 3, 0.5)
    with torch.no_grad():
        rewards = torch.stack([grpo.reward(grpo.student.decode(x0), batch.prompts).clip for x0 in clips])
    lead = advantages_by_hand(rewards).clamp(-clip, clip)
    assert lead.abs().max() > 0.9 or clip == 0.5
    assert_same_loss(grpo, loss, -(lead * likelihood).mean() + 0.2 * divergence.mean())
    assert row["policy/divergence"] == pytest.approx(divergence.mean().item(), rel=1e-3)
    assert divergence.min() > 0.01
    assert row["reward/student"] == pytest.approx(rewards.mean().item(), abs=1e-6)
    assert row["reward/student/color"] == pytest.approx(rewards.mean().item(), abs=1e-6)
    assert row["loss"] == loss.item()


def test_a_clip_without_a_score_adds_nothing(
    make_method: Make, captions: tuple[str, ...], color_reward: Reward
) -> None:
    def broken(videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        scores = color_reward(videos, prompts)
        nan = torch.tensor([prompt == first for prompt in prompts])
        return RewardScores(torch.where(nan, torch.nan, scores.clip))

    grpo, cfg = make_method(GRPO, reward=broken)
    batch = draw_batch(grpo.student, cfg, captions[:4], 0)
    first = batch.prompts[0]
    others = [index for index, prompt in enumerate(batch.prompts) if prompt != first]
    loss, row = grpo.step(batch)
    clips, likelihood, divergence = rollouts_by_hand(grpo, batch, 3, 0.5)
    with torch.no_grad():
        rewards = torch.stack([color_reward(grpo.student.decode(x0), batch.prompts).clip for x0 in clips])
    each = -(advantages_by_hand(rewards) * likelihood).mean(dim=0) + 0.2 * divergence.mean(dim=0)
    assert row["reward/skipped"] == 1 - len(others) / 4 > 0
    assert_same_loss(grpo, loss, each[others].sum() / 4)


def test_a_reward_without_gradient_teaches(make_method: Make, captions: tuple[str, ...], tmp_path: Path) -> None:
    for name, method in {"grpo": GRPO, "rtdmd": RTDMD.replace("reward_weight: 0.4", "reward_weight: 0")}.items():
        built, cfg = make_method(method, "training.steps=1", reward=Stepped())
        (tmp_path / name).mkdir()
        before = built.student.weights["proj_out.weight"].detach().clone()
        train_loop(built, cfg, captions, RunFolder(tmp_path / name))
        assert not torch.equal(built.student.weights["proj_out.weight"], before)


def test_steps_that_learn_are_chosen_by_turns() -> None:
    policy = PolicyConfig(trained_share=0.5)
    chosen = [tuple(trained_steps(index, 4, policy)) for index in range(300)]
    assert chosen == [tuple(trained_steps(index, 4, policy)) for index in range(300)]
    assert {len(set(steps)) for steps in chosen} == {2}  # half of three, rounded up
    for step in range(3):
        assert sum(step in steps for steps in chosen) == pytest.approx(200, abs=35)
    assert PolicyConfig(trained_share=0.1).num_trained(31) == 3
    assert [PolicyConfig(trained_share=0.6).num_trained(steps) for steps in (1, 2, 6)] == [0, 1, 3]


def by_choice(steps: int, policy: PolicyConfig) -> list[int]:
    """For each step that draws noise, the index of a batch that teaches that one alone."""
    found = {tuple(trained_steps(index, steps, policy)): index for index in range(50)}
    return [found[(step,)] for step in range(steps - 1)]


def test_steps_apart_add_up_to_the_gradient_of_the_expected_reward() -> None:
    clips, channels, samples = 3000, 2, 4
    student, batch = LinearStudent(clips), toy_batch(clips, channels)
    policy = PolicyConfig(samples=samples, noise=FRESH, normalize=False, clip=1e9, trained_share=0.5)
    loss = torch.zeros((), dtype=torch.float64)
    for index in by_choice(3, policy):
        group = sample_group(student, NearTarget(), replace(batch, index=index), SIGMAS, policy)  # type: ignore[arg-type]
        loss = loss + policy_loss(group, group.rewards(group.kept)).sum()
    ours = torch.autograd.grad(loss, (student.slope, student.offset))
    mean, variance = moments(student, batch.noise)
    theirs = torch.autograd.grad(-((mean - 0.5).square() + variance).sum(), (student.slope, student.offset))
    assert_unbiased(ours, theirs, -channels * samples / (samples - 1))


def assert_unbiased(ours: Sequence[Tensor], theirs: Sequence[Tensor], scale: float) -> None:
    for mine, analytic in zip(ours, theirs, strict=True):
        error = float((scale * mine - analytic).std()) / math.sqrt(len(mine))
        assert abs(float(analytic.mean())) > 10 * error
        assert float(scale * mine.mean()) == pytest.approx(float(analytic.mean()), abs=4 * error)


# --------------------------------------------------------------------------------------------------------------- RTDMD


def test_rtdmd_is_its_three_terms(make_method: Make, captions: tuple[str, ...]) -> None:
    rtdmd, cfg = make_method(RTDMD)
    batch = draw_batch(rtdmd.student, cfg, captions, 0)
    with torch.no_grad():
        for weight in rtdmd.matching.fake.weights.values():
            weight.mul_(1.1)
    loss, row = rtdmd.step(batch)
    clips, likelihood, _ = rollouts_by_hand(rtdmd, batch, 2, 0.5)
    rewards = torch.stack([rtdmd.reward(rtdmd.student.decode(x0), batch.prompts).clip for x0 in clips])
    policy = -(advantages_by_hand(rewards.detach()) * likelihood).mean()
    matching = torch.stack([rtdmd.matching.loss(x0, batch, k) for k, x0 in enumerate(clips)]).mean()
    assert matching > 1e-4
    assert_same_loss(rtdmd, loss, 0.7 * policy - 0.4 * rewards.mean() + 0.3 * matching)
    # Rewards of two clips differ by little: in standard deviations float32's last digit of one is so much.
    spread = rewards.detach().std(dim=0, correction=0)
    digit = float(torch.finfo(torch.float32).eps * (rewards.detach().abs().amax(dim=0) / spread).max())
    rounding = 4 * digit * float(likelihood.detach().abs().max())
    assert rounding < 0.02 * abs(policy.item())
    assert row["policy/loss"] == pytest.approx(policy.item(), abs=1e-6 + rounding)
    assert row["distribution/loss"] == pytest.approx(matching.item(), rel=1e-4)
    assert row["loss"] == pytest.approx(
        0.7 * row["policy/loss"] - 0.4 * row["reward/student"] + 0.3 * row["distribution/loss"], abs=1e-6
    )


def test_noisy_steps_and_the_last_one_are_the_whole_gradient() -> None:
    """The policy's part and the reward's own, at the weights of theory, are the gradient of the expected reward."""
    clips, channels, samples = 3000, 2, 4
    student, batch = LinearStudent(clips), toy_batch(clips, channels)
    student.sigmas = lambda _steps, _shift: SIGMAS  # type: ignore[attr-defined]
    method = RtdmdConfig(
        kind="rtdmd",
        policy=PolicyConfig(samples=samples, noise=FRESH, normalize=False, clip=1e9),
        policy_weight=channels * samples / (samples - 1),
        distribution_weight=1e-12,
    )
    nothing = SimpleNamespace(loss=lambda x0, *_: 0 * x0.sum(dim=(1, 2, 3, 4)))
    rtdmd = Rtdmd(
        student=student, teacher=None, reward=NearTarget(), student_config=None, shift=2.0,
        config=method, matching=nothing,
    )  # type: ignore[arg-type]  # fmt: skip
    loss, _ = rtdmd.step(batch)
    ours = torch.autograd.grad(clips * loss, (student.slope, student.offset))
    mean, variance = moments(student, batch.noise, through_last=True)
    theirs = torch.autograd.grad(-((mean - 0.5).square() + variance).sum(), (student.slope, student.offset))
    assert_unbiased(ours, theirs, -1)


def test_the_fake_score_learns_from_noisy_clips_of_new_noise(make_method: Make, captions: tuple[str, ...]) -> None:
    rtdmd, cfg = make_method(RTDMD)
    assert isinstance(rtdmd.matching, DistributionMatching)
    batch = draw_batch(rtdmd.student, cfg, captions, 0)
    ((name, critic),) = rtdmd.critics.items()
    assert (name, critic.rounds) == ("fake_score", 1)
    losses = [critic.loss(batch, index)[0] for index in (0, 1, 0)]
    assert losses[0].item() == losses[2].item() != losses[1].item()
    losses[0].backward()
    assert max(float(w.grad.abs().max()) for w in critic.weights.values() if w.grad is not None) > 1e-4
    assert all(weight.grad is None for weight in rtdmd.student.weights.values())


# ---------------------------------------------------------------------------------------------------- both in the loop


@pytest.mark.parametrize("method", [GRPO, RTDMD], ids=["grpo", "rtdmd"])
def test_gradient_of_the_parts_is_the_gradient(make_method: Make, captions: tuple[str, ...], method: str) -> None:
    found = []
    for parts in (1, 4):
        built, cfg = make_method(method.replace("noise: 0.5", "noise: 0.5, trained_share: 0.5"))
        batch = draw_batch(built.student, cfg, captions, 0)
        row = accumulate_gradient(built.step, batch, parts)
        gradient = torch.cat([w.grad.flatten() for w in built.student.weights.values() if w.grad is not None])
        found.append((gradient, row))
    (whole, row), (parts_, rows) = found
    assert float((parts_ - whole).norm() / whole.norm()) < 1e-4
    assert rows == pytest.approx(row, abs=1e-5)


@pytest.mark.parametrize("method", [GRPO, RTDMD], ids=["grpo", "rtdmd"])
def test_a_resumed_run_is_the_run(make_method: Make, captions: tuple[str, ...], tmp_path: Path, method: str) -> None:
    weights, rows = [], []
    for folder, stops in (("whole", (2,)), ("halves", (1, 2))):
        (tmp_path / folder).mkdir()
        for steps in stops:
            built, cfg = make_method(method, f"training.steps={steps}", "student.num_steps=[4,3]")
            train_loop(built, cfg, captions, RunFolder(tmp_path / folder))
        weights.append(built.student.weights)
        read = read_metrics(tmp_path / folder / "metrics.jsonl")
        rows.append([{key: value for key, value in row.items() if key != "seconds"} for row in read])
    assert rows[0] == rows[1]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
