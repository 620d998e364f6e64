"""Three methods of consistency along the teacher's path: their losses by hand, their cost, and what they refuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from rats_video.backbones.wan import WanBackbone
from rats_video.condition import Condition
from rats_video.diffusion.schedule import sigma_grid
from rats_video.distillation.method import build_method
from rats_video.distillation.roles import build_roles
from rats_video.distillation.run_rewards import check_rewards
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.methods.base import Method
from rats_video.methods.consistency import Consistency
from rats_video.methods.consistency_loss import draw_pairs
from rats_video.methods.dollar import Dollar
from rats_video.methods.t2v_turbo import T2VTurbo
from rats_video.training.batches import draw_batch
from rats_video.training.loop import train_loop
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.training.update import accumulate_gradient
from rats_video.types import PromptBatch

MakeConfig = Callable[..., DistillConfig]
PAIRS = ("method.pairs.count=2", "method.pairs.huber=null")
KINDS = {
    "consistency": ("method.kind=consistency", "method.reward_weight=0.5"),
    "t2v_turbo": ("method.kind=t2v_turbo", "method.video_reward.kind=motion_smoothness"),
    "dollar": ("method.kind=dollar", "method.fake_score.rounds=2"),
}


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
    drawn = list(draw_pairs(method.teacher, batch, ends, method.config.pairs))
    for index, pairs in enumerate(drawn):
        for row, prompt in enumerate(batch.prompts):
            one = student.encode_text([prompt])
            i = int((sigmas - pairs.sigma[row]).abs().argmin())
            end = max(level for level in ends.tolist() if level < float(sigmas[i]) - 1e-6)

            def jump(i: int, row: int = row, one: Condition = one, end: float = end) -> Tensor:
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
        method = replace(method, config=method.config.model_copy(update={"reward_weight": 0.0}))
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
