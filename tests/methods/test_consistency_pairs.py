"""Consistency along the teacher's path: which points are compared, and solutions that are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from rats_video.condition import Condition
from rats_video.diffusion.guidance import PLAIN
from rats_video.diffusion.schedule import sigma_grid
from rats_video.distillation.settings import DistillConfig
from rats_video.methods.consistency_loss import PairsConfig, SegmentGrid, draw_pairs, trajectory_consistency_loss
from rats_video.methods.teacher import TeacherSampler
from rats_video.types import Guide, PromptBatch

MakeConfig = Callable[..., DistillConfig]


class Field(nn.Module):
    """A velocity field in place of a model: `rate * latents + drift`, both trained."""

    def __init__(self, rate: float, drift: Tensor) -> None:
        super().__init__()
        self.rate, self.drift = nn.Parameter(torch.tensor(rate)), nn.Parameter(drift)
        self.calls = 0

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        self.calls += len(latents)
        assert len(sigma) == len(latents) == len(condition)
        return self.rate * latents + self.drift

    def encode_text(self, prompts: Sequence[str]) -> Condition:
        return Condition(torch.zeros(len(prompts), 1, 1))

    def sigmas(self, num_steps: int, shift: float) -> Tensor:
        return sigma_grid(num_steps, shift)

    def guidance(self, _further: object = None) -> Guide:
        return PLAIN


@pytest.fixture
def latents_batch() -> PromptBatch:
    noise = torch.randn(3, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return PromptBatch(0, ("a", "b", "c"), noise, num_steps=4, seeds=(11, 12, 13))


def sampler(field: Any, make_config: MakeConfig, *overrides: str) -> TeacherSampler:
    cfg = make_config("teacher.guidance_scale=1", *overrides)
    return TeacherSampler(field, mock.Mock(side_effect=AssertionError("nobody judges a path")), cfg.teacher, 3.0)


# The pairs


def test_pairs_stay_in_their_segment() -> None:
    teacher, ends = sigma_grid(8, 3.0), sigma_grid(5, 3.0)  # do not nest: only 1 and 0 are in both
    grid = SegmentGrid.of(teacher, ends)
    levels = grid.levels.tolist()
    assert levels == sorted({*teacher.tolist(), *ends.tolist()}, reverse=True)
    assert len(levels) == 9 + 6 - 2
    for skip in (1, 2, 20):
        far, near, end = grid.draw(torch.arange(12) / 12, skip)
        assert far == list(range(12))  # every level above 0 is drawn
        for i, j, k in zip(far, near, end, strict=True):
            assert levels[k] == max(level for level in ends.tolist() if level < levels[i])
            assert i < j <= k
            assert j in (i + skip, k)


@pytest.mark.parametrize("num_steps", [3, 4, 5, 8])
def test_grids_that_nest_are_the_teachers(num_steps: int) -> None:
    teacher = sigma_grid(num_steps * 3, 3.0)
    grid = SegmentGrid.of(teacher, sigma_grid(num_steps, 3.0))
    torch.testing.assert_close(grid.levels, teacher, atol=1e-7, rtol=0)
    assert grid.ends == tuple(3 * (index // 3 + 1) for index in range(3 * num_steps))


@pytest.mark.parametrize("source", ["path", "noised"])
def test_points_lie_on_the_teachers_path(latents_batch: PromptBatch, make_config: MakeConfig, source: Any) -> None:
    teacher = sampler(Field(0.7, torch.tensor(0.2)), make_config)
    path = teacher.trajectory(latents_batch)
    assert path.sigmas == pytest.approx(sigma_grid(8, 3.0).tolist())
    assert torch.equal(path.latents[0], latents_batch.noise)
    at = {round(sigma, 5): latents for sigma, latents in zip(path.sigmas, path.latents, strict=True)}
    cfg = PairsConfig(source=source, count=6)
    for pairs in draw_pairs(teacher, latents_batch, sigma_grid(4, 3.0), cfg):
        for row in range(3):
            high, low = (round(float(each[row]), 5) for each in (pairs.sigma, pairs.sigma_near))
            assert high > low >= round(float(pairs.end[row]), 5)
            if source == "path":
                assert torch.equal(pairs.latents[row], at[high][row])
                assert torch.equal(pairs.near[row], at[low][row])
            else:  # one Euler step of the field
                velocity = 0.7 * pairs.latents[row] + 0.2
                torch.testing.assert_close(pairs.near[row], pairs.latents[row] + (low - high) * velocity)


def test_noised_points_have_the_flows_marginal(latents_batch: PromptBatch, make_config: MakeConfig) -> None:
    teacher = sampler(Field(0.0, torch.tensor(0.0)), make_config)  # a clip is its own noise
    pairs = next(draw_pairs(teacher, latents_batch, sigma_grid(4, 3.0), PairsConfig(source="noised")))
    sigma = pairs.sigma.view(-1, 1, 1, 1, 1)
    fresh = (pairs.latents - (1 - sigma) * latents_batch.noise) / sigma
    assert float(fresh.std()) == pytest.approx(1, abs=0.2)
    assert abs(float((fresh * latents_batch.noise).mean())) < 0.3  # not the rollout's


def test_each_update_of_a_rollout_draws_other_pairs_of_the_same_path(
    latents_batch: PromptBatch, make_config: MakeConfig
) -> None:
    field = Field(0.7, torch.tensor(0.2))
    teacher = sampler(field, make_config)
    drawn = []
    for seeds in ((11, 12, 13), (21, 22, 23), (11, 12, 13)):
        pairs = draw_pairs(teacher, replace(latents_batch, seeds=seeds), sigma_grid(4, 3.0), PairsConfig(count=8))
        drawn.append(torch.stack([each.sigma for each in pairs]))
    assert field.calls == 3 * 8  # one rollout of three clips
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    teacher.trajectory(replace(latents_batch, micro_batch=1))
    assert field.calls == 2 * 3 * 8
    teacher.trajectory(replace(latents_batch, index=1))
    assert field.calls == 3 * 3 * 8


# Known answers


@pytest.mark.parametrize(("ends", "skip"), [(4, 1), (5, 1), (1, 1), (4, 3)])
def test_straight_paths_cost_the_exact_student_nothing(
    latents_batch: PromptBatch, make_config: MakeConfig, ends: int, skip: int
) -> None:
    drift = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    teacher, student = sampler(Field(0.0, drift), make_config), Field(0.0, drift.clone())
    loss, landed = trajectory_consistency_loss(
        student, teacher, latents_batch, sigma_grid(ends, 3.0), PairsConfig(skip=skip)
    )  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() < 1e-10
    assert student.drift.grad is not None
    assert student.drift.grad.abs().max() < 1e-5
    if ends == 1:
        torch.testing.assert_close(landed, teacher.trajectory(latents_batch).x0)
    student.drift.data += 0.1
    wrong, _ = trajectory_consistency_loss(
        student, teacher, latents_batch, sigma_grid(ends, 3.0), PairsConfig(skip=skip)
    )  # type: ignore[arg-type]
    assert wrong.item() > 1e-4


class Jumps(Field):
    """A student of one free rate a level: `velocity = rates[level] * latents`, enough for a linear ODE."""

    def __init__(self, levels: Tensor) -> None:
        super().__init__(0.0, torch.tensor(0.0))
        self.levels, self.rates = levels, nn.Parameter(torch.zeros(len(levels)))

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002
        index = (sigma[:, None] - self.levels).abs().argmin(dim=1)
        return self.rates[index].view(-1, 1, 1, 1, 1) * latents


@pytest.mark.parametrize("num_segments", [4, 1])
def test_converged_on_a_linear_ode_it_is_the_solution(
    latents_batch: PromptBatch, make_config: MakeConfig, num_segments: int
) -> None:
    """`dx / dsigma = a x` has `x(e) = x(s) exp(a (e - s))`, so `f(x, s, e) = x exp(a (e - s))` for every level s."""
    rate, num_steps = 0.8, 32
    teacher = sampler(Field(rate, torch.tensor(0.0)), make_config, f"teacher.num_steps={num_steps}")
    ends = sigma_grid(num_segments, 3.0)
    grid = SegmentGrid.of(sigma_grid(num_steps, 3.0), ends)
    student = Jumps(grid.levels)
    optimizer = torch.optim.Adam([student.rates], lr=0.1)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 150)
        batch = replace(latents_batch, seeds=(step, step + 1000, step + 2000))
        loss, _ = trajectory_consistency_loss(student, teacher, batch, ends, PairsConfig(count=6, skip=8, huber=None))  # type: ignore[arg-type]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    starts = [index for index in range(num_steps) if index == 0 or grid.ends[index - 1] == index]
    assert len(starts) == num_segments  # what the few-step sampler calls
    for start in starts:
        length = float(grid.levels[grid.ends[start]] - grid.levels[start])
        jump = 1 + length * float(student.rates[start].detach())
        assert jump == pytest.approx(math.exp(rate * length), abs=0.015)  # the teacher's own steps are 0.006 off
