"""Consistency along the teacher's path: known solutions, the losses by hand, and what three methods make of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from rats_video.backbones.wan import WanBackbone
from rats_video.diffusion.schedule import sigma_grid
from rats_video.distillation.method import build_method
from rats_video.distillation.roles import build_roles
from rats_video.distillation.run_rewards import check_rewards
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.methods.base import Method
from rats_video.methods.consistency import Consistency
from rats_video.methods.consistency_loss import PairsConfig, SegmentGrid, draw_pairs, trajectory_consistency_loss
from rats_video.methods.dollar import Dollar
from rats_video.methods.t2v_turbo import T2VTurbo
from rats_video.methods.teacher import TeacherSampler
from rats_video.training.batches import draw_batch
from rats_video.training.loop import train_loop
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.training.update import accumulate_gradient
from rats_video.types import PromptBatch, TextCondition

MakeConfig = Callable[..., DistillConfig]
PAIRS = ("method.pairs.count=2", "method.pairs.huber=null")
KINDS = {
    "consistency": ("method.kind=consistency", "method.reward_weight=0.5"),
    "t2v_turbo": ("method.kind=t2v_turbo", "method.video_reward.kind=motion_smoothness"),
    "dollar": ("method.kind=dollar", "method.fake_score.rounds=2"),
}


class Field(nn.Module):
    """A velocity field in place of a model: `rate * latents + drift`, both trained."""

    def __init__(self, rate: float, drift: Tensor) -> None:
        super().__init__()
        self.rate, self.drift = nn.Parameter(torch.tensor(rate)), nn.Parameter(drift)
        self.calls = 0

    def velocity(self, latents: Tensor, sigma: Tensor, text: TextCondition) -> Tensor:
        self.calls += len(latents)
        assert len(sigma) == len(latents) == len(text)
        return self.rate * latents + self.drift

    def encode_text(self, prompts: Sequence[str]) -> TextCondition:
        return TextCondition(torch.zeros(len(prompts), 1, 1))

    def sigmas(self, num_steps: int, shift: float) -> Tensor:
        return sigma_grid(num_steps, shift)


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

    def velocity(self, latents: Tensor, sigma: Tensor, text: TextCondition) -> Tensor:  # noqa: ARG002
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


# The three methods


@pytest.fixture
def make_method(loaded: WanBackbone, make_config: MakeConfig) -> Callable[..., tuple[Method, DistillConfig]]:
    """A method whose student is not its teacher."""

    def make(kind: str, *overrides: str) -> tuple[Any, DistillConfig]:
        cfg = make_config(*KINDS[kind], *PAIRS, *overrides)
        method = build_method(cfg, *build_roles(cfg, loaded.with_own_denoiser()))
        with torch.no_grad():
            for weight in method.student.weights.values():
                weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        return method, cfg

    return make


def pairs_by_hand(method: Any, batch: PromptBatch, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Mean square distances written out, and the first clips predicted; the levels drawn are those of `draw_pairs`."""
    student, base, total, first = method.student, method.teacher.backbone, 0.0, []
    sigmas = sigma_grid(8, 3.0)
    text, negative = base.encode_text(batch.prompts), base.encode_text([""] * len(batch.prompts))
    points, x = [batch.noise], batch.noise
    with torch.no_grad():
        for high, low in itertools.pairwise(sigmas):
            level = high.expand(len(x))
            cond, uncond = base.velocity(x, level, text), base.velocity(x, level, negative)
            x = x + (low - high) * (uncond + 2.0 * (cond - uncond))
            points.append(x)
    drawn = list(draw_pairs(method.teacher, batch, ends, method.method.pairs))
    for index, pairs in enumerate(drawn):
        for row, prompt in enumerate(batch.prompts):
            one = student.encode_text([prompt])
            i = int((sigmas - pairs.sigma[row]).abs().argmin())
            end = max(level for level in ends.tolist() if level < float(sigmas[i]) - 1e-6)

            def jump(i: int, row: int = row, one: TextCondition = one, end: float = end) -> Tensor:
                here = points[i][row : row + 1]
                return here + (end - sigmas[i]) * student.velocity(here, sigmas[i].expand(1), one)

            landed = jump(i)
            if index == 0:
                first.append(landed)
            total = total + ((landed - jump(i + 1).detach()) ** 2).mean()
    return total / (len(drawn) * len(batch.prompts)), torch.cat(first)  # type: ignore[operator]


def euler(student: WanBackbone, noise: Tensor, prompts: tuple[str, ...], grad_from: int) -> Tensor:
    sigmas, text = sigma_grid(4, 3.0), student.encode_text(prompts)
    for step in range(4):
        velocity = student.velocity(noise, sigmas[step].expand(len(noise)), text)
        noise = noise + (sigmas[step + 1] - sigmas[step]) * (velocity if step >= grad_from else velocity.detach())
        noise = noise if step >= grad_from else noise.detach()
    return noise


def loss_by_hand(kind: str, method: Any, batch: PromptBatch) -> Tensor:
    student, reward = method.student, method.reward
    if kind == "t2v_turbo":
        loss, predicted = pairs_by_hand(method, batch, sigma_grid(1, 3.0))
        image, video = reward.terms.values()
        clips = student.decode(predicted)
        return loss - (image.reward(clips, batch.prompts).clip + video.reward(clips, batch.prompts).clip).mean()
    loss, _ = pairs_by_hand(method, batch, sigma_grid(4, 3.0))
    if kind == "consistency":
        x0 = euler(student, batch.noise, batch.prompts, grad_from=3)
        return loss - 0.5 * reward(student.decode(x0), batch.prompts).clip.mean()
    x0 = euler(student, batch.noise, batch.prompts, grad_from=0)
    return loss + method.matching.loss(x0, batch).mean() - reward(student.decode(x0), batch.prompts).clip.mean()


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_the_formulas(
    make_method: Callable[..., tuple[Any, DistillConfig]], captions: tuple[str, ...], kind: str
) -> None:
    method, cfg = make_method(kind)
    batch = draw_batch(method.student, cfg, captions, 0)
    loss, row = method.step(batch)
    by_hand = loss_by_hand(kind, method, batch)
    torch.testing.assert_close(loss, by_hand, atol=1e-5, rtol=1e-5)
    assert row["loss"] == loss.item()
    assert row["reward/skipped"] == 0
    weights = list(method.student.weights.values())
    ours, theirs = (torch.autograd.grad(each, weights, allow_unused=True) for each in (loss, by_hand))
    assert max(float(g.abs().max()) for g in theirs if g is not None) > 1e-3
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-3)
    for network in (
        method.teacher.backbone,
        getattr(getattr(method, "matching", None), "fake", method.teacher.backbone),
    ):
        assert all(weight.grad is None for weight in network.denoiser.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overrides", [(), ("method.pairs.source=noised", "student.num_steps=[3]")], ids=["", "noised"])
def test_evaluations_are_the_calls(
    make_method: Callable[..., tuple[Any, DistillConfig]],
    captions: tuple[str, ...], tmp_path: Any, kind: str, overrides: tuple[str, ...],
) -> None:  # fmt: skip
    method, cfg = make_method(kind, "training.steps=1", *overrides)
    count = 0

    def called(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal count
        (velocity,) = output
        count += len(velocity) * (3 if velocity.requires_grad else 1)

    networks = {id(each.denoiser): each.denoiser for each in (method.student, method.teacher.backbone)}
    if kind == "dollar":
        networks[id(method.matching.fake.denoiser)] = method.matching.fake.denoiser
    for network in networks.values():
        network.register_forward_hook(called)
    train_loop(method, cfg, captions, RunFolder(tmp_path))
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["evaluations"] == count


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_parts_is_the_gradient(
    make_method: Callable[..., tuple[Any, DistillConfig]], captions: tuple[str, ...], kind: str
) -> None:
    found = []
    for parts in (1, 2):
        method, cfg = make_method(kind, "training.batch_size=2")
        row = accumulate_gradient(method.step, draw_batch(method.student, cfg, captions, 3), parts)
        gradients = [weight.grad for weight in method.student.weights.values()]
        found.append((row["loss"], torch.cat([g.flatten() for g in gradients if g is not None])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert float((found[0][1] - found[1][1]).norm() / found[0][1].norm()) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_uninterrupted(
    make_method: Callable[..., tuple[Any, DistillConfig]], captions: tuple[str, ...], tmp_path: Any, kind: str
) -> None:
    options = ("teacher.reuse=2", "training.batch_size=1", "student.num_steps=[4,3]")
    students, rows = [], []
    for name, lengths in (("whole", (4,)), ("halves", (2, 4))):
        (tmp_path / name).mkdir()
        for steps in lengths:
            method, cfg = make_method(kind, *options, f"training.steps={steps}")
            train_loop(method, cfg, captions, RunFolder(tmp_path / name))
        students.append(method.student.denoiser.state_dict())
        rows.append(
            [
                {k: v for k, v in row.items() if k != "seconds"}
                for row in read_metrics(tmp_path / name / "metrics.jsonl")
            ]
        )
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4]
    assert all(torch.equal(value, students[1][name]) for name, value in students[0].items())


def test_stages_cut_the_segments_finer_first(
    make_method: Callable[..., tuple[Any, DistillConfig]], captions: tuple[str, ...]
) -> None:
    method, cfg = make_method("consistency", "training.steps=10", "teacher.reuse=2", "method.stages=[2,1]")
    assert isinstance(method, Consistency)
    ends = []

    def ends_of(*arguments: Any) -> tuple[Tensor, None]:
        ends.append(len(arguments[3]) - 1)
        return torch.zeros(()), None

    with mock.patch("rats_video.methods.consistency.trajectory_consistency_loss", ends_of):
        method = replace(method, method=method.method.model_copy(update={"reward_weight": 0.0}))
        for step in range(10):
            method.step(draw_batch(method.student, cfg, captions, step))
    assert ends == [8, 8, 8, 8, 8, 8, 4, 4, 4, 4]  # batches 0 to 2 of 5, two updates each


def test_without_rewards_nothing_is_decoded(
    make_method: Callable[..., tuple[Any, DistillConfig]], captions: tuple[str, ...]
) -> None:
    for kind in ("consistency", "t2v_turbo"):
        method, cfg = make_method(kind, "method.reward_weight=0")
        with mock.patch.object(type(method.student), "decode", side_effect=AssertionError):
            _, row = method.step(draw_batch(method.student, cfg, captions, 0))
        assert row["loss"] == row["consistency/loss"] > 0


def test_the_classes(make_method: Callable[..., tuple[Any, DistillConfig]]) -> None:
    for kind, made in (("consistency", Consistency), ("t2v_turbo", T2VTurbo), ("dollar", Dollar)):
        method, _ = make_method(kind)
        assert type(method) is made
        assert list(method.critics) == (["fake_score"] if kind == "dollar" else [])


# What is refused


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("consistency", ["method.stages=[2]"], r"the last of the stages \[2\] must be 1"),
        ("consistency", ["teacher.cache=somewhere"], "set teacher.cache=null"),
        ("t2v_turbo", ["parallel.reward_ranks=1"], "a reward rank has one reward"),
        ("dollar", ["parallel.shard=true"], "set parallel.shard=false"),
    ],
)
def test_what_cannot_be(make_config: MakeConfig, kind: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config(*KINDS[kind], *overrides)


def test_a_video_reward_that_cannot_be_climbed_is_found_before_the_run(
    make_method: Callable[..., tuple[Any, DistillConfig]], captions: tuple[str, ...]
) -> None:
    method, cfg = make_method("t2v_turbo")
    judges = check_rewards(cfg, method.reward, captions, method.student.device)
    assert judges.trained is method.reward

    class Blind(nn.Module):
        differentiable = False

        def forward(self, videos: Tensor, prompts: Sequence[str]) -> Any:
            return method.reward.terms["image"].reward(videos, prompts)

    method.reward.terms["video"] = replace(method.reward.terms["video"], reward=Blind())
    with pytest.raises(UserError, match=r"^method\.video_reward: is not differentiable"):
        check_rewards(cfg, method.reward, captions, method.student.device)
