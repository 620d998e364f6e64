"""Distribution matching: its gradient by hand, and a Gaussian that the student must become."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from rats_video.condition import Condition
from rats_video.diffusion.flow import add_noise
from rats_video.methods.distribution_matching import DistributionMatching, FakeScoreConfig
from rats_video.methods.draws import FAKE_SCORE, SCORE_LEVEL, draw_noise, draw_uniform
from rats_video.methods.teacher import FrozenTeacherConfig, TeacherSampler
from rats_video.seeds import seeded
from rats_video.types import PromptBatch

MEAN, STD, STEPS = 1.5, 0.4, 200


class Gaussian(nn.Module):
    """A backbone whose clips are independent numbers, normal around `mean`: its velocity is known exactly."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std).log())

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    def encode_text(self, prompts: Sequence[str]) -> Condition:
        return Condition(torch.zeros(len(prompts), 1, 1))

    def nearest_levels(self, sigma: Tensor) -> Tensor:
        return sigma

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002
        """`E[noise - x0 | latents]` of `latents = (1 - sigma) * x0 + sigma * noise`."""
        sigma = sigma.view(-1, 1, 1, 1, 1)
        variance = self.log_std.exp() ** 2
        off = (latents - (1 - sigma) * self.mean) / ((1 - sigma) ** 2 * variance + sigma**2)
        return sigma * off - (self.mean + (1 - sigma) * variance * off)


def batch_of(size: int, step: int) -> PromptBatch:
    generator = seeded(1, step)
    seeds = tuple(torch.randint(2**62, (size,), generator=generator).tolist())
    return PromptBatch(step, ("",) * size, torch.randn(size, 1, 1, 4, 16, generator=generator), 1, seeds=seeds)


def matching_of(fake: nn.Module, teacher: nn.Module, guidance_scale: float = 1.0) -> DistributionMatching:
    cfg = FrozenTeacherConfig(kind="frozen", num_steps=4, guidance_scale=guidance_scale)
    return DistributionMatching(TeacherSampler(teacher, None, cfg, 3.0), fake, FakeScoreConfig(), shift=3.0)  # type: ignore[arg-type]


def test_loss_and_gradient_are_the_papers() -> None:
    teacher, fake, batch = Gaussian(MEAN, STD), Gaussian(-0.5, 0.8), batch_of(3, 0)
    x0 = (0.3 * batch.noise + 0.2).requires_grad_()
    matching = matching_of(fake, teacher)
    loss = matching.loss(x0, batch)
    loss.sum().backward()
    u = 0.02 + 0.96 * draw_uniform(batch, SCORE_LEVEL, 0)
    sigma = 3 * u / (1 + 2 * u)
    noisy = add_noise(x0.detach(), draw_noise(batch, SCORE_LEVEL, 1), sigma)
    predicted = [noisy - sigma.view(-1, 1, 1, 1, 1) * each.velocity(noisy, sigma, None) for each in (teacher, fake)]  # type: ignore[arg-type]
    by_teacher, by_fake = (each.detach() for each in predicted)
    size = (x0.detach() - by_teacher).abs().flatten(1).mean(dim=1)
    gradient = (by_fake - by_teacher) / size.view(-1, 1, 1, 1, 1)
    assert x0.grad is not None
    torch.testing.assert_close(64 * x0.grad, gradient)  # the loss is a mean over a clip's 64 numbers
    torch.testing.assert_close(loss.detach(), (gradient.flatten(1) ** 2).mean(dim=1) / 2)
    assert float(gradient.abs().mean()) > 0.1
    assert fake.mean.grad is None


def test_nothing_is_left_to_learn_where_the_scores_agree() -> None:
    batch = batch_of(4, 0)
    x0 = batch.noise.clone().requires_grad_()
    loss = matching_of(Gaussian(MEAN, STD), Gaussian(MEAN, STD)).loss(x0, batch)
    loss.sum().backward()
    assert x0.grad is not None
    assert float(loss.detach().abs().max()) == float(x0.grad.abs().max()) == 0.0


def test_teacher_is_asked_about_the_real_clip_with_the_same_noise_and_level() -> None:
    batch, real, asked = batch_of(4, 0), torch.full((4, 1, 1, 4, 16), 2.0), []

    class Asked(Gaussian):
        def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
            asked.append((latents, sigma))
            return super().velocity(latents, sigma, condition)

    x0 = batch.noise
    loss = matching_of(Asked(0.0, 1.0), Asked(MEAN, STD)).loss(x0, batch, teacher_at=real)
    (seen, sigma), (own, _) = asked  # the teacher, then the fake score
    torch.testing.assert_close(seen - own, (1 - sigma).view(-1, 1, 1, 1, 1) * (real - x0))
    same = matching_of(Gaussian(0.0, 1.0), Gaussian(MEAN, STD)).loss(real, batch)
    assert torch.equal(same, matching_of(Gaussian(0.0, 1.0), Gaussian(MEAN, STD)).loss(real, batch, teacher_at=real))
    assert not torch.allclose(loss, same)


@pytest.mark.parametrize("start", [(-1.0, 1.2), (3.0, 0.1)])
def test_student_becomes_the_teachers_distribution(start: tuple[float, float]) -> None:
    """One call of a student is `mean + spread * noise`; it ends with the teacher's mean and spread.

    Imitating the teacher's prediction from noise alone would end with its mean and no spread at all.
    """
    teacher, fake = Gaussian(MEAN, STD), Gaussian(0.0, 1.0)
    mean, spread = (torch.tensor(each, requires_grad=True) for each in start)
    matching = matching_of(fake, teacher)

    def sample(batch: PromptBatch, index: int) -> Tensor:
        return mean + spread * draw_noise(batch, FAKE_SCORE, index, 2)

    critic = matching.critic(sample)
    own = torch.optim.Adam(critic.weights.values(), lr=0.1, betas=(0.5, 0.9))
    optimizer = torch.optim.Adam([mean, spread], lr=0.05, betas=(0.5, 0.9))
    for step in range(STEPS):
        batch = batch_of(8, step)
        for index in range(3):
            own.zero_grad()
            critic.loss(batch, index)[0].backward()
            own.step()
        for each, lr in ((own, 0.1), (optimizer, 0.05)):
            each.param_groups[0]["lr"] = lr * (1 - step / STEPS)
        optimizer.zero_grad()
        matching.loss(mean + spread * batch.noise, batch).mean().backward()
        optimizer.step()
    assert (mean.item(), spread.item()) == pytest.approx((MEAN, STD), abs=0.06)
    assert (fake.mean.item(), fake.log_std.exp().item()) == pytest.approx((MEAN, STD), abs=0.06)
    predicted = batch.noise - teacher.velocity(batch.noise, torch.ones(8), None)  # type: ignore[arg-type]
    assert float(predicted.detach().std()) == pytest.approx(0.0, abs=1e-5)
    assert float(predicted.detach().mean()) == pytest.approx(MEAN)
