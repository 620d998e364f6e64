"""The sampler: exact on straight paths, equal to a loop written out, gradient only where it is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rats_video.condition import Condition, GivenFrames
from rats_video.diffusion.rollout import rollout
from rats_video.diffusion.schedule import sigma_grid

TEXT = Condition(torch.zeros(2, 3, 4))
NEGATIVE = Condition(torch.zeros(1, 2, 4))


class Counter:
    """`velocity = scale * latents + sigma`, counting evaluations a clip."""

    def __init__(self) -> None:
        self.rows = 0
        self.sigmas: list[float] = []

    def __call__(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        assert len(latents) == len(sigma) == len(condition)
        self.rows += len(latents)
        self.sigmas.append(float(sigma[0]))
        return 0.5 * latents + sigma.view(-1, 1, 1, 1, 1)


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_constant_velocity_integrates_exactly(noise: Tensor, num_steps: int) -> None:
    x0 = torch.full_like(noise, 0.3)
    path = rollout(lambda *_: noise - x0, noise, sigma_grid(num_steps, 3.0), TEXT)
    torch.testing.assert_close(path.x0, x0, atol=1e-6, rtol=0)
    assert path.sigmas == (0.0,)


def test_equals_a_loop_written_out(noise: Tensor) -> None:
    velocity = Counter()
    path = rollout(velocity, noise, torch.tensor([1.0, 0.6, 0.5, 0.0]), TEXT)
    x = noise.double()
    for high, low in ((1.0, 0.6), (0.6, 0.5), (0.5, 0.0)):
        x = x - (high - low) * (0.5 * x + high)
    torch.testing.assert_close(path.x0.double(), x, atol=1e-6, rtol=0)
    assert velocity.sigmas == pytest.approx([1.0, 0.6, 0.5])


def test_keeps_the_latents_asked_for(noise: Tensor) -> None:
    sigmas = sigma_grid(4, 3.0)
    whole = rollout(Counter(), noise, sigmas, TEXT, keep=range(5))
    assert whole.sigmas == tuple(sigmas.tolist())
    assert torch.equal(whole.latents[0], noise)
    some = rollout(Counter(), noise, sigmas, TEXT, keep=[2, 1])
    assert some.sigmas == tuple(sigmas[[1, 2, 4]].tolist())
    for ours, theirs in zip(some.latents, [whole.latents[i] for i in (1, 2, 4)], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("scale", "evaluations"), [(1.0, 5), (3.0, 10), (0.5, 10)])
def test_nfe_is_what_was_evaluated(noise: Tensor, scale: float, evaluations: int) -> None:
    velocity = Counter()
    path = rollout(velocity, noise, sigma_grid(5, 3.0), TEXT, negative=NEGATIVE, guidance_scale=scale)
    assert velocity.rows / len(noise) == path.nfe == evaluations


def test_guidance_without_a_negative_prompt_raises(noise: Tensor) -> None:
    with pytest.raises(ValueError, match="negative prompt"):
        rollout(Counter(), noise, sigma_grid(2, 3.0), TEXT, guidance_scale=2.0)


@pytest.mark.parametrize("grad_steps", [(), (2,), (0, 3), (1, 2), (0, 1, 2, 3)])
def test_gradient_reaches_only_the_chosen_calls(noise: Tensor, grad_steps: tuple[int, ...]) -> None:
    sigmas = sigma_grid(4, 3.0)
    weights = torch.linspace(0.2, 0.8, 4).requires_grad_()  # one a step
    start = noise.clone().requires_grad_()

    def velocity(latents: Tensor, sigma: Tensor, _: Condition) -> Tensor:
        return weights[int((sigmas == sigma[0]).nonzero())] * latents.sin()

    path = rollout(velocity, start, sigmas, TEXT, grad_steps=grad_steps)
    path.x0.square().sum().backward()

    by_hand, begun = weights.detach().clone().requires_grad_(), noise.clone().requires_grad_()
    x = begun
    for step in range(4):
        slope = by_hand[step] * x.sin()
        x = x + (sigmas[step + 1] - sigmas[step]) * (slope if step in grad_steps else slope.detach())
    x.square().sum().backward()
    torch.testing.assert_close(path.x0, x)
    torch.testing.assert_close(start.grad, begun.grad)
    if grad_steps:
        torch.testing.assert_close(weights.grad, by_hand.grad)
        assert weights.grad is not None
        assert weights.grad.nonzero()[:, 0].tolist() == list(grad_steps)
    else:
        assert weights.grad is None


def test_no_graph_inside_no_grad(noise: Tensor) -> None:
    weight = torch.ones((), requires_grad=True)
    with torch.no_grad():
        path = rollout(lambda x, *_: weight * x, noise, sigma_grid(2, 3.0), TEXT, grad_steps=(0, 1))
    assert not path.x0.requires_grad


def test_renoising_steps_are_those_of_diffusers(noise: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.schedulers import scheduling_flow_match_lcm as lcm

    velocity, sigmas = Counter(), sigma_grid(4, 3.0)
    drawn = torch.randn(4, *noise.shape, generator=torch.Generator().manual_seed(1))
    left = iter(drawn)
    monkeypatch.setattr(lcm, "randn_tensor", lambda *_, **__: next(left))
    scheduler, theirs = lcm.FlowMatchLCMScheduler(shift=1.0), noise
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    for timestep in scheduler.timesteps:
        slope = velocity(theirs, timestep.expand(2) / 1000, TEXT)
        theirs = scheduler.step(slope, timestep, theirs, return_dict=False)[0]
    path = rollout(velocity, noise, sigmas, TEXT, fresh=lambda step: drawn[step])
    torch.testing.assert_close(path.x0, theirs, atol=1e-5, rtol=1e-5)
    assert float((path.x0 - rollout(velocity, noise, sigmas, TEXT).x0).abs().max()) > 0.1


def test_renoising_leaves_given_frames(noise: Tensor) -> None:
    given = GivenFrames.hold_first(torch.full((2, 3, 1, 4, 4), 5.0), 2)
    seen: list[Tensor] = []

    def velocity(latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        seen.append(latents)
        return condition.at_rest(latents * sigma.view(-1, 1, 1, 1, 1))

    x0 = rollout(velocity, noise, sigma_grid(3, 3.0), TEXT.with_given(given), fresh=lambda _: noise).x0
    assert all((latents[:, :, 0] == 5.0).all() for latents in (*seen, x0))
