"""AC-DMD: noise between two levels, matching where a noisy step lands, and the fake score's agreement with itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rats_video.methods.ac_dmd import AmbientMatching, ConsistentFakeScoreConfig, noise_further, transition
from rats_video.methods.distribution_matching import DistributionMatching, matching_loss
from rats_video.methods.draws import FAKE_SCORE, SCORE_LEVEL, draw_noise, draw_uniform
from rats_video.types import PromptBatch

CLIPS = 4000
SPREAD = 0.5  # of the clips, whose mean is 1
BATCH = PromptBatch(0, ("a",) * CLIPS, torch.zeros(CLIPS, 1, 1, 1, 1), 4, seeds=tuple(range(CLIPS)))
NO_TEXT: Any = SimpleNamespace()


def best_velocity(latents: Tensor, sigma: Tensor, _text: object = None) -> Tensor:
    """The mean of `noise - x0` given latents, where x0 is normal."""
    sigma = sigma.view(-1, 1, 1, 1, 1)
    variance = ((1 - sigma) * SPREAD).square() + sigma.square()
    return (sigma - (1 - sigma) * SPREAD**2) / variance * (latents - (1 - sigma)) - 1


class Role:
    """A model that knows the best velocity, or one that is off by `error` at all levels."""

    def __init__(self, error: float = 0.0, tilt: float = 0.0) -> None:
        self.error = torch.tensor(error, requires_grad=True)
        self.tilt = torch.tensor(tilt, requires_grad=True)

    def velocity(self, latents: Tensor, sigma: Tensor, text: object) -> Tensor:
        return best_velocity(latents, sigma, text) + self.error + self.tilt * sigma.view(-1, 1, 1, 1, 1)

    def nearest_levels(self, sigma: Tensor) -> Tensor:
        return sigma

    def encode_text(self, _prompts: object) -> Any:
        return SimpleNamespace(with_given=lambda _given: NO_TEXT)


def ambient(fake: Role, teacher: Role | None = None, *, fresh: float = 0.9, weight: float = 1.0) -> AmbientMatching:
    cfg = ConsistentFakeScoreConfig(consistency_weight=weight, levels=(0.02, 0.98))
    matching = DistributionMatching(teacher or fake, fake, cfg, 1.0)  # type: ignore[arg-type]  # stand-ins
    return AmbientMatching(matching, cfg, fresh)


def clips_at(level: float) -> Tensor:
    torch.manual_seed(0)
    x0 = 1 + SPREAD * torch.randn(CLIPS, 1, 1, 1, 1)
    return (1 - level) * x0 + level * torch.randn_like(x0)


def test_noise_between_two_levels_leaves_the_flows_marginal() -> None:
    s, t = torch.tensor(0.4), torch.full((CLIPS,), 0.8)
    between = noise_further(clips_at(0.4), s, t, torch.randn(CLIPS, 1, 1, 1, 1))
    assert between.latents.mean().item() == pytest.approx(0.2, abs=0.05)
    assert between.latents.var().item() == pytest.approx((0.2 * SPREAD) ** 2 + 0.8**2, rel=0.1)
    assert between.std[0].item() ** 2 == pytest.approx(0.8**2 - (0.2 / 0.6) ** 2 * 0.4**2)
    x0, noise = torch.full((1, 1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1, 1), -2.0)
    whole = noise_further(x0, torch.tensor(0.0), torch.tensor([0.7]), noise)  # from a clip: the flow itself
    assert whole.latents.item() == pytest.approx(0.3 * 3 + 0.7 * -2)
    assert whole.target.item() == pytest.approx(0.7 * (-2 - 3))


@pytest.mark.parametrize("level", [0.0, 0.4])
def test_the_target_is_the_best_velocity_on_average(level: float) -> None:
    t = torch.full((CLIPS,), 0.8)
    between = noise_further(clips_at(level), torch.tensor(level), t, torch.randn(CLIPS, 1, 1, 1, 1))
    off = between.target - between.std * best_velocity(between.latents, t)
    error = float(off.std()) / CLIPS**0.5
    assert abs(float(off.mean())) < 4 * error
    assert abs(float((off * between.latents).mean())) < 8 * error  # at all latents, not on average alone


def test_matching_leads_back_by_one_noisy_step_of_each_score() -> None:
    fake, teacher = Role(0.3), Role()
    found, start, s = ambient(fake, teacher), clips_at(0.4).requires_grad_(), torch.tensor(0.4)
    loss = found.loss(start, s, BATCH)
    between, noise = found.draw(start.detach(), s, BATCH, SCORE_LEVEL), draw_noise(BATCH, SCORE_LEVEL, 2)
    assert float(between.sigma.min()) >= 0.41
    ends = [
        transition(between.latents, role.velocity(between.latents, between.sigma, None), between.sigma,
                   s.expand(CLIPS), 0.9, noise)
        for role in (teacher, fake)
    ]  # fmt: skip
    torch.testing.assert_close(loss, matching_loss(start, *ends))
    (slope,) = torch.autograd.grad(loss.sum(), start)
    by_teacher, by_fake = (end.detach() for end in ends)
    torch.testing.assert_close(
        slope, (by_fake - by_teacher) / (start.detach() - by_teacher).abs(), rtol=1e-3, atol=1e-4
    )


def test_a_noisy_step_of_the_best_velocity_keeps_the_marginal() -> None:
    sigma, end = torch.full((CLIPS,), 0.8), torch.full((CLIPS,), 0.7)
    latents = clips_at(0.8)
    there = transition(latents, best_velocity(latents, sigma), sigma, end, 0.3, torch.randn(CLIPS, 1, 1, 1, 1))
    assert there.mean().item() == pytest.approx(0.3, abs=0.05)
    assert there.var().item() == pytest.approx((0.3 * SPREAD) ** 2 + 0.7**2, rel=0.1)
    still = transition(latents, best_velocity(latents, sigma), sigma, end, 0.0, torch.full_like(latents, 1e9))
    torch.testing.assert_close(still, latents - 0.1 * best_velocity(latents, sigma))  # Euler's


def test_the_fake_score_learns_the_best_velocity_and_agrees_with_itself() -> None:
    s = torch.tensor(0.4)
    role = Role()
    loss, row = ambient(role, weight=0.0).fake_loss(clips_at(0.4), s, BATCH, 0)
    assert row == {"loss": loss.item()}
    slope, tilt = torch.autograd.grad(loss, (role.error, role.tilt))
    wrong = Role(0.5)
    worse = ambient(wrong, weight=0.0).fake_loss(clips_at(0.4), s, BATCH, 0)[0]
    slope_there, _ = torch.autograd.grad(worse, (wrong.error, wrong.tilt))
    assert abs(float(slope)) < 0.15 * abs(float(slope_there))
    assert abs(float(tilt)) < 0.15 * abs(float(slope_there))
    assert worse > loss

    loss, row = ambient(Role(), weight=0.5).fake_loss(clips_at(0.4), s, BATCH, 0)
    assert row["loss"] == pytest.approx(row["flow"] + 0.5 * row["consistency"])
    assert loss.item() == pytest.approx(row["loss"])


def test_the_disagreement_is_a_product_of_two_paths() -> None:
    found, latents, sigma = ambient(role := Role(0.2, 0.7)), clips_at(0.8), torch.full((CLIPS,), 0.8)
    velocity = role.velocity(latents, sigma, None)
    value = found.disagreement(latents, sigma, velocity, NO_TEXT, BATCH, 1)
    lower = sigma - 0.2 * draw_uniform(BATCH, FAKE_SCORE, 1, 3)
    off = []
    for path in (4, 5):
        there = transition(latents, velocity, sigma, lower, 0.9, draw_noise(BATCH, FAKE_SCORE, 1, path))
        clean = there - lower.view(-1, 1, 1, 1, 1) * role.velocity(there, lower, None)
        off.append(clean - (latents - 0.8 * velocity))
    torch.testing.assert_close(value, (off[0] * off[1]).mean())
    assert value < (off[0].square()).mean()  # which counts the paths' own noise
