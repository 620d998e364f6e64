"""The policy objective: the noise it adds, its gradient against the analytic one, and that it is the same in parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from linear_student import FRESH, SIGMAS, LinearStudent, moments, toy_batch
from torch import Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.diffusion.flow import euler_step, stochastic_step
from rats_video.diffusion.rollout import rollout
from rats_video.distillation.method import build_rats
from rats_video.distillation.roles import build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.methods.policy import Group, PolicyConfig, advantages, policy_loss, sample_group, stochastic_rollout
from rats_video.methods.rats import Rats, rats_step
from rats_video.training.batches import draw_batch
from rats_video.training.loop import train_loop
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.training.update import accumulate_gradient
from rats_video.types import Reward, RewardScores

MakeConfig = Callable[..., DistillConfig]
POLICY = "method.policy={samples: 2, noise: 0.5}"
TARGET = 0.5


class NearTarget:
    """The squared distance of the latents from a target, negative."""

    def score_latents(self, latents: Tensor, _prompts: Sequence[str]) -> RewardScores:
        assert not torch.is_grad_enabled()
        return RewardScores(-(latents - TARGET).square().sum(dim=(1, 2, 3, 4)))


def test_a_step_keeps_the_flows_noise() -> None:
    """For one clean clip the velocity is exact, and the latents at each level have the flow's own distribution."""
    x0, sigma, after = 0.3, torch.tensor(0.9), torch.tensor(0.5)
    latents = (1 - sigma) * x0 + sigma * torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    mean, std = stochastic_step(latents, (latents - x0) / sigma, sigma, after, FRESH)
    ours = mean + std * torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    assert std.item() == pytest.approx(0.5 * FRESH)
    assert ours.mean().item() == pytest.approx(0.5 * x0, abs=5e-3)
    assert ours.std().item() == pytest.approx(0.5, rel=1e-2)


def test_without_noise_it_is_eulers_step() -> None:
    latents, velocity = torch.randn(2, 2, 3, 4, 4), torch.randn(2, 2, 3, 4, 4)
    sigma, after = torch.tensor(0.9), torch.tensor(0.5)
    mean, std = stochastic_step(latents, velocity, sigma, after, 0.0)
    assert torch.equal(mean, euler_step(latents, velocity, sigma, after))
    assert std == 0
    assert stochastic_step(latents, velocity, after, torch.tensor(0.0), FRESH)[1] == 0  # the last step


def test_without_noise_all_samples_are_the_deterministic_path() -> None:
    student, batch = LinearStudent(4), toy_batch(4)
    path = rollout(student.velocity, batch.noise, SIGMAS, student.encode_text(batch.prompts))
    for sample in range(2):
        noisy = stochastic_rollout(student, batch, SIGMAS, 0.0, sample)  # type: ignore[arg-type]
        assert torch.equal(noisy.x0, path.x0)
        assert noisy.log_likelihood.tolist() == [0] * 4


def test_moments_of_the_clips() -> None:
    """From one starting noise: the mean and the variance at sigma 0 that the steps' recursion gives."""
    clips = 4000
    student, batch = LinearStudent(clips), toy_batch(clips, channels=4)
    batch = replace(batch, noise=batch.noise[:1].expand_as(batch.noise))
    x0 = stochastic_rollout(student, batch, SIGMAS, FRESH, 0).x0  # type: ignore[arg-type]
    mean, variance = (each[0].detach().flatten() for each in moments(student, batch.noise))
    ours = x0.detach().flatten(1)
    torch.testing.assert_close(ours.var(dim=0), variance, rtol=0.1, atol=0)  # 4 standard errors
    assert ((ours.mean(dim=0) - mean).abs() < 4 * (variance / clips).sqrt()).all()
    assert variance.min() > 0.05


def test_the_gradient_is_that_of_the_expected_reward() -> None:
    clips, channels, samples = 3000, 2, 4
    student, batch = LinearStudent(clips), toy_batch(clips, channels)
    policy = PolicyConfig(samples=samples, noise=FRESH, normalize=False)
    group = sample_group(student, NearTarget(), batch, SIGMAS, policy)  # type: ignore[arg-type]
    rewards = group.rewards(torch.ones(clips, dtype=torch.bool))
    loss = policy_loss(group, rewards).sum()
    ours = torch.autograd.grad(loss, (student.slope, student.offset))
    mean, variance = moments(student, batch.noise)
    expected_reward = -((mean - TARGET).square() + variance).sum()
    analytic = torch.autograd.grad(expected_reward, (student.slope, student.offset))
    for mine, theirs in zip(ours, analytic, strict=True):
        estimate = -channels * samples / (samples - 1) * mine  # the likelihood is a mean, the baseline holds the sample
        error = float((estimate - theirs).std()) / math.sqrt(clips)
        assert abs(float(theirs.mean())) > 10 * error
        assert float(estimate.mean()) == pytest.approx(float(theirs.mean()), abs=4 * error)


def test_advantages_know_no_shift_and_no_scale() -> None:
    rewards = torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    ours = advantages(rewards, normalize=True)
    torch.testing.assert_close(ours[:, 0], torch.tensor([-2.0, -1.0, 3.0]) / math.sqrt(14 / 3))
    assert ours[:, 1].tolist() == [0, 0, 0]  # all alike: nothing to prefer
    torch.testing.assert_close(advantages(7 * rewards - 30, normalize=True), ours)
    assert advantages(rewards, normalize=False)[:, 0].tolist() == [-2, -1, 3]


def test_likelier_is_what_scored_better() -> None:
    student, batch = LinearStudent(1), toy_batch(1)
    group = sample_group(student, NearTarget(), batch, SIGMAS, PolicyConfig(samples=2))  # type: ignore[arg-type]
    swapped = Group(group.paths, group.scores[::-1], group.policy)
    kept = torch.tensor([True])
    one, other = (policy_loss(each, each.rewards(kept)) for each in (group, swapped))
    assert one.item() == pytest.approx(-other.item())
    first = 0 if group.scores[0].clip > group.scores[1].clip else 1
    lead = group.log_likelihood[first] - group.log_likelihood[1 - first]
    assert one.item() == pytest.approx(-lead.item() / 2)  # advantages are 1 and -1


# --------------------------------------------------------------------------------------------------- in the real step


@pytest.fixture
def make_rats(loaded: WanBackbone, make_config: MakeConfig) -> Callable[..., tuple[Rats, DistillConfig]]:
    def make(*overrides: str) -> tuple[Rats, DistillConfig]:
        cfg = make_config(POLICY, "training.batch_size=4", *overrides)
        return build_rats(cfg, *build_roles(cfg, loaded.with_own_denoiser())), cfg

    return make


Make = Callable[..., tuple[Rats, DistillConfig]]


@pytest.mark.parametrize("weights", [(), ("student.weights.kind=lora", "student.weights.rank=2")], ids=["full", "lora"])
def test_the_step_is_policy_and_shaping(make_rats: Make, captions: tuple[str, ...], weights: tuple[str, ...]) -> None:
    rats, cfg = make_rats("method.reward_weight=0.7", *weights)
    batch = draw_batch(rats.student, cfg, captions, 0)
    loss, row = rats_step(rats, batch)
    shaping, _ = rats_step(replace(rats, config=cfg.method.model_copy(update={"reward_weight": 0.0})), batch)
    group = sample_group(rats.student, rats.reward, batch, rats.student.sigmas(4, cfg.shift), rats.config.policy)  # type: ignore[arg-type]
    rewards = torch.stack([scores.clip for scores in group.scores])
    lead = (rewards - rewards.mean(dim=0)) / rewards.std(dim=0, correction=0)
    by_hand = shaping - 0.7 * (lead * group.log_likelihood).mean()
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-6)
    assert row["reward/policy_mean"] == pytest.approx(rewards.mean().item(), abs=1e-6)
    assert row["reward/policy_spread"] == pytest.approx(rewards.std(dim=0, correction=0).mean().item(), abs=1e-6)
    ours, theirs = (torch.autograd.grad(each, list(rats.student.weights.values())) for each in (loss, by_hand))
    assert max(float(g.abs().max()) for g in theirs) > 1e-4
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-3)


def test_margin_caps_what_is_worth_more(make_rats: Make, captions: tuple[str, ...]) -> None:
    rats, cfg = make_rats("method.reward_margin=0", "method.alpha=0")
    low = RewardScores(torch.full((4,), -99.0), torch.full((4, 5), -99.0))
    batch = draw_batch(rats.student, cfg, captions, 0)
    rollout = rats.teacher.rollout(batch)
    rats.teacher.rollout = lambda _: replace(rollout, scores=low)  # type: ignore[method-assign]
    loss, row = rats_step(rats, batch)
    assert loss.item() == 0  # all are past the teacher: none is better
    assert row["reward/policy_mean"] == -99


@pytest.mark.parametrize("teacher", [(), ("teacher.reuse=2",)], ids=["fresh", "reused"])
def test_each_update_and_each_clip_draws_its_own(
    make_rats: Make, captions: tuple[str, ...], teacher: tuple[str, ...]
) -> None:
    rats, cfg = make_rats(*teacher)
    batches = [draw_batch(rats.student, cfg, captions, step) for step in range(3)]
    assert len({seed for batch in batches for seed in batch.seeds}) == 12
    assert draw_batch(rats.student, cfg, captions, 1).seeds == batches[1].seeds
    assert draw_batch(rats.student, cfg.model_copy(update={"seed": 6}), captions, 1).seeds != batches[1].seeds


def test_gradient_of_the_parts_is_the_gradient(
    make_rats: Make, color_reward: Reward, captions: tuple[str, ...]
) -> None:
    found = []
    for parts in (1, 4):
        rats, cfg = make_rats(f"compute.activation_checkpointing={parts == 4}")  # a call repeated within one that is
        rats = replace(rats, reward=color_reward)  # a random network's spread is so small that rounding counts
        accumulate_gradient(rats.step, draw_batch(rats.student, cfg, captions, 0), parts)
        found.append(torch.cat([weight.grad.flatten() for weight in rats.student.weights.values()]))  # type: ignore[union-attr]
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 1e-4


def test_a_resumed_run_is_the_run(make_rats: Make, captions: tuple[str, ...], tmp_path: Path) -> None:
    weights, rows = [], []
    for folder, stops in (("whole", (2,)), ("halves", (1, 2))):
        (tmp_path / folder).mkdir()
        for steps in stops:
            rats, cfg = make_rats("training.batch_size=2", f"training.steps={steps}")
            train_loop(rats, cfg, captions, RunFolder(tmp_path / folder))
        weights.append(rats.student.weights)
        read = read_metrics(tmp_path / folder / "metrics.jsonl")
        rows.append([{key: value for key, value in row.items() if key != "seconds"} for row in read])
    assert rows[0] == rows[1]
    assert rows[0][0]["reward/policy_spread"] > 0
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
