"""RTDMD's cold start and its fake score's agreement, DOLLAR's reward stage, AdvDMD's updates by turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.diffusion.flow import FRESH_SHARES, stochastic_step
from rats_video.diffusion.rollout import rollout
from rats_video.distillation.method import build_method
from rats_video.distillation.roles import build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.methods.advdmd import AdvDmd
from rats_video.methods.dollar import Dollar
from rats_video.methods.draws import FAKE_SCORE, RENOISE, STUDENT_LEVEL, draw_noise
from rats_video.methods.policy import sample_rollouts
from rats_video.methods.rtdmd import Rtdmd
from rats_video.methods.student import student_rollout
from rats_video.training.loop import train_loop
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.types import Reward

ROUNDS = "fake_score: {rounds: 2, optimizer: {lr: 1.0e-3}}"
CONSISTENT = "fake_score: {rounds: 2, consistency_weight: 0.5, optimizer: {lr: 1.0e-3}}"
POLICY = "policy: {samples: 2, noise: 0.988}"
GAN = "gan: {weight: 0.1, fake_score_weight: 0.1}"
Make = Callable[..., tuple[DistillConfig, Any]]
Row = dict[str, float]


@pytest.fixture
def make(loaded: WanBackbone, color_reward: Reward, make_config: Callable[..., DistillConfig]) -> Make:
    def call(method: str, *overrides: str) -> tuple[DistillConfig, Any]:
        cfg = make_config(f"method={{{method}}}", *overrides)
        built = build_method(cfg, *build_roles(cfg, loaded.with_own_denoiser()))
        return cfg, replace(built, reward=color_reward)  # type: ignore[type-var]

    return call


@pytest.fixture
def train(make: Make, captions: tuple[str, ...], tmp_path: Path) -> Callable[..., list[Row]]:
    """Rows of a training of four steps, of which the first `steps` are made now."""

    def call(folder: str, steps: int, method: str, *overrides: str) -> list[Row]:
        cfg, built = make(method, f"training.steps={steps}", *overrides)
        (tmp_path / folder).mkdir(exist_ok=True)
        train_loop(built, cfg, captions, RunFolder(tmp_path / folder))
        rows = read_metrics(tmp_path / folder / "metrics.jsonl")
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    return call


# --------------------------------------------------------------------------------------------------------------- RTDMD


@pytest.mark.parametrize("stream", [(STUDENT_LEVEL,), (FAKE_SCORE, 1)])
def test_a_cold_step_lands_where_the_noisy_sampler_would(
    make: Make, draw: Callable[..., Any], stream: tuple[int, ...]
) -> None:
    cfg, rtdmd = make(f"kind: rtdmd, cold_start: 1, {POLICY}, {ROUNDS}")
    assert isinstance(rtdmd, Rtdmd)
    sigmas, ends = rtdmd.student.sigmas(4, cfg.shift), set()
    for index in range(6):
        batch = draw(cfg, index)
        landed, end = rtdmd.one_step(batch, *stream)
        assert landed.requires_grad
        text = rtdmd.student.encode_text(batch.prompts)
        latents = batch.noise if stream == (STUDENT_LEVEL,) else draw_noise(batch, *stream, 2)
        last = sigmas.tolist().index(end.item()) - 1
        ends.add(last)
        with torch.no_grad():
            for step in range(last + 1):
                slope = rtdmd.student.velocity(latents, sigmas[step].expand(2), text)
                mean, std = stochastic_step(latents, slope, sigmas[step], sigmas[step + 1], 0.988)
                latents = mean + std * draw_noise(batch, RENOISE, *stream, step)
        torch.testing.assert_close(landed.detach(), latents)
    assert len(ends) > 1


def test_the_cold_start_is_matching_alone_and_then_all_terms(make: Make, draw: Callable[..., Any]) -> None:
    cfg, rtdmd = make(f"kind: rtdmd, cold_start: 0.5, {POLICY}, {CONSISTENT}", "training.steps=4")
    assert rtdmd.cold_batches == 2
    loss, row = rtdmd.step(draw(cfg, 1))
    by_hand = rtdmd.ambient.loss(*rtdmd.one_step(draw(cfg, 1), STUDENT_LEVEL), draw(cfg, 1)).mean()
    assert loss.item() == pytest.approx(by_hand.item())
    assert row.keys() == {"loss", "distribution/loss", "reward/skipped"}
    assert {"policy/loss", "reward/student"} <= rtdmd.step(draw(cfg, 2))[1].keys()
    for index in (1, 2):
        fake = rtdmd.fake_score_loss(draw(cfg, index), 0)[1]
        assert fake["loss"] == pytest.approx(fake["flow"] + 0.5 * fake["consistency"], rel=1e-5)
    a_step = cfg.method.evaluations(4, 0, 0, 2)
    warm = 2 * (4 + 2 * 3) + 2 * (2 + 3) + 2 * (4 + 9)
    cold = 1.5 + 3 + 3 + 2 * (2.5 + 9)
    assert a_step == (warm + cold) / 2


def test_the_sampler_of_rtdmd_is_that_of_its_training(make: Make, draw: Callable[..., Any]) -> None:
    assert FRESH_SHARES["cps"] == pytest.approx(0.98769, abs=1e-5)  # sin(0.9 * 90 degrees)
    cfg, rtdmd = make(f"kind: rtdmd, {POLICY}, {ROUNDS}", "student.sampler=cps")
    batch = draw(cfg)
    path = student_rollout(rtdmd, batch, grad_steps=())
    sigmas, text, latents = rtdmd.student.sigmas(4, cfg.shift), rtdmd.student.encode_text(batch.prompts), batch.noise
    with torch.no_grad():
        for step in range(4):
            slope = rtdmd.student.velocity(latents, sigmas[step].expand(2), text)
            clean, noise = latents - sigmas[step] * slope, latents + (1 - sigmas[step]) * slope
            kept, fresh = (1 - FRESH_SHARES["cps"] ** 2) ** 0.5, FRESH_SHARES["cps"] * draw_noise(batch, RENOISE, step)
            latents = (1 - sigmas[step + 1]) * clean + sigmas[step + 1] * (kept * noise + fresh)
    torch.testing.assert_close(path.x0, latents)


def test_a_share_of_one_is_the_re_noising_sampler_and_of_none_is_eulers() -> None:
    noise = torch.randn(2, 1, 1, 2, 2)

    def sample(**options: Any) -> Tensor:
        text: Any = _Text()
        return rollout(
            lambda x, s, _: x * s.view(-1, 1, 1, 1, 1), noise, torch.tensor([1, 0.6, 0.0]), text, **options
        ).x0

    fresh = torch.randn_like(noise)
    torch.testing.assert_close(sample(fresh=lambda _: fresh, share=0.0), sample())
    torch.testing.assert_close(
        sample(fresh=lambda _: fresh, share=1 - 1e-7), sample(fresh=lambda _: fresh), atol=1e-3, rtol=0
    )


class _Text:
    def hold(self, latents: Tensor) -> Tensor:
        return latents


def test_rtdmd_goes_on_in_both_stages(train: Callable[..., list[Row]]) -> None:
    method = f"kind: rtdmd, cold_start: 0.5, {POLICY}, {CONSISTENT}"
    whole, first = train("whole", 2, method), train("halves", 1, method)  # a share of the run: its only step is cold
    both = train("halves", 2, method)
    assert whole[0]["loss"] == first[0]["loss"]
    assert whole == both
    assert ["policy/loss" in row for row in whole] == [False, True]


# -------------------------------------------------------------------------------------------------------------- DOLLAR


def test_the_reward_comes_after_distillation(make: Make, draw: Callable[..., Any]) -> None:
    settings = "kind: dollar, pairs: {count: 1}, reward_weight: 0.7"
    cfg, dollar = make(f"{settings}, reward_stage: 0.5, {ROUNDS}", "training.steps=4")
    assert isinstance(dollar, Dollar)
    assert (dollar.reward_from, dollar.critics["fake_score"].until) == (2, 2)
    loss, row = dollar.step(draw(cfg, 1))
    assert loss.item() == pytest.approx(row["matching/loss"] + row["consistency/loss"])
    loss, row = dollar.step(draw(cfg, 2))
    assert "matching/loss" not in row
    assert loss.item() == pytest.approx(-0.7 * row["reward/student"])
    loss.backward()
    assert any(weight.grad is not None for weight in dollar.student.weights.values())
    _, together = make(f"{settings}, {ROUNDS}")
    assert together.critics["fake_score"].until is None
    _, row = together.step(draw(cfg, 2))
    assert row["loss"] == pytest.approx(row["matching/loss"] + row["consistency/loss"] - 0.7 * row["reward/student"])


def test_the_fake_score_rests_in_the_rewards_stage(train: Callable[..., list[Row]]) -> None:
    rows = train("run", 2, f"kind: dollar, pairs: {{count: 1}}, reward_stage: 0.5, {ROUNDS}")
    assert ["fake_score/loss" in row for row in rows] == [True, False]
    assert ["matching/loss" in row for row in rows] == [True, False]


# -------------------------------------------------------------------------------------------------------------- AdvDMD


def test_advdmd_takes_turns(make: Make, draw: Callable[..., Any]) -> None:
    method = f"kind: advdmd, policy_from: 0.5, policy_weight: 0.3, policy: {{samples: 2, noise: 1}}, {GAN}, {ROUNDS}"
    cfg, adv = make(method, "student.sampler=renoise", "training.steps=8")
    assert isinstance(adv, AdvDmd)
    assert [adv.is_policy(draw(cfg, index)) for index in range(8)] == [False] * 5 + [True, False, True]
    batch = draw(cfg, 2)
    assert adv.step(batch)[0].item() == adv.dmd.step(batch)[0].item()
    batch, sigmas = draw(cfg, 5), adv.student.sigmas(4, cfg.shift)
    loss, row = adv.step(batch)
    paths = sample_rollouts(adv.student, batch, sigmas, adv.config.policy)
    text = adv.student.encode_text(batch.prompts)
    logits = []
    with torch.no_grad():
        for path in paths:
            assert len(path.states) == 3
            seen = [adv.dmd.gan(state, sigmas[k + 1].expand(2), text)[1] for k, state in enumerate(path.states)]
            latents, _, sigma = adv.dmd.matching.renoise(path.x0, batch, 10**6 + 3)
            logits.append(torch.stack([*seen, adv.dmd.gan(latents, sigma, text)[1]]).mean(dim=0))
    rewards = torch.stack(logits)
    assert row["gan/student"] == pytest.approx(rewards.mean().item(), rel=1e-5)
    sign = (rewards[0] - rewards[1]).sign()  # of two, each is one standard deviation from their mean
    likelihood = torch.stack([path.log_likelihood for path in paths])
    by_hand = -0.3 * (sign * (likelihood[0] - likelihood[1])).mean() / 2
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-3, abs=1e-6)
    loss.backward()
    assert any(weight.grad is not None for weight in adv.student.weights.values())
    assert all(weight.grad is None for weight in adv.critics["fake_score"].weights.values())


def test_advdmd_goes_on(train: Callable[..., list[Row]]) -> None:
    settings = (
        f"kind: advdmd, policy_from: 0, policy: {{samples: 2, noise: 1}}, {GAN}, {ROUNDS}",
        "student.sampler=renoise",
    )
    whole, _, both = (train(*run, *settings) for run in (("whole", 2), ("halves", 1), ("halves", 2)))
    assert whole == both
    assert ["policy/loss" in row for row in whole] == [False, True]


@pytest.mark.parametrize(
    ("method", "sampler", "message"),
    [
        (
            "kind: rtdmd",
            "cps",
            r"rtdmd draws another share .*policy.noise=0.3, where 0.988 would do.*student.sampler=euler",
        ),
        ("kind: dmd2", "cps", "dmd2 knows no such sampler: set student.sampler=euler"),
        ("kind: refl", "cps", "refl knows no such sampler"),
        ("kind: advdmd, policy: {noise: 0.5}", "renoise", "advdmd draws a share of the noise anew"),
        ("kind: dollar, reward_stage: 1", "euler", "method.reward_stage: must be less than 1"),
        ("kind: rtdmd, cold_start: 2", "euler", "method.cold_start: must be at most 1"),
    ],
)
def test_what_does_not_fit_is_one_line(
    make_config: Callable[..., DistillConfig], method: str, sampler: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make_config(f"method={{{method}}}", f"student.sampler={sampler}")
    assert "\n" not in str(caught.value)
