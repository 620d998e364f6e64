"""Shaping on the clean clips that calls predict: numbers by hand, the whole loss by hand, and rollouts found again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from rats_video.backbones.wan import WanBackbone
from rats_video.condition import Condition
from rats_video.diffusion.rollout import rollout
from rats_video.diffusion.schedule import sigma_grid
from rats_video.distillation.method import build_method
from rats_video.distillation.roles import build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.distillation.teacher_identity import teacher_identity
from rats_video.methods.base import BaseMethod
from rats_video.methods.imitation import Imitation
from rats_video.methods.shaping import ShapingConfig, cosine_distance, latents_distance, shaping_by_horizon
from rats_video.methods.teacher import FrozenTeacherConfig, TeacherSampler
from rats_video.methods.teacher_cache import DiskRolloutCache
from rats_video.training.batches import draw_batch
from rats_video.types import PromptBatch, Trajectory

MakeConfig = Callable[..., DistillConfig]
X0 = ("method.shaping.space=x0", "method.shaping.distance=both")
NOTHING = Condition(torch.zeros(1, 1, 1))


def test_cosine_by_hand() -> None:
    ours = torch.tensor([[3.0, 1.0, 2.0], [4.0, 0.0, 2.0]]).view(1, 2, 3, 1, 1)  # (3, 4), (1, 0), (2, 2) by frame
    theirs = torch.tensor([[6.0, 0.0, -1.0], [8.0, 5.0, -1.0]]).view(1, 2, 3, 1, 1)
    torch.testing.assert_close(cosine_distance(ours, theirs), torch.tensor([[0.0, 1.0, 2.0]]))


def test_distances_add_up_and_motion_is_by_squares() -> None:
    ours, theirs = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 3, 4, 5, 5)
    l2, cosine, both = (
        latents_distance(ours, theirs, ShapingConfig(distance=distance, motion_weight=0.0))  # type: ignore[arg-type]
        for distance in ("l2", "cosine", "both")
    )
    torch.testing.assert_close(both, l2 + cosine)
    torch.testing.assert_close(cosine, cosine_distance(ours, theirs))
    moved = latents_distance(ours, theirs, ShapingConfig(distance="cosine", motion_weight=0.5))
    squares = latents_distance(ours, theirs, ShapingConfig(distance="l2", motion_weight=0.5))
    torch.testing.assert_close(moved - cosine, squares - l2)


def test_a_straight_path_predicts_its_end_from_everywhere() -> None:
    start, end = torch.randn(1, 2, 1, 3, 3), torch.randn(1, 2, 1, 3, 3)
    path = rollout(lambda x, _, __: (start - end).expand_as(x), start, sigma_grid(5, 3.0), NOTHING, predict=(0, 2, 4))
    assert path.predictions is not None
    assert path.predictions.sigmas == tuple(sigma_grid(5, 3.0)[[0, 2, 4]].tolist())
    for predicted in path.predictions.latents:
        torch.testing.assert_close(predicted, end)
    torch.testing.assert_close(path.predictions.x0, path.x0)  # the last call's is where the rollout ends


def test_x0_compares_predictions_alone() -> None:
    near, far = (torch.full((1, 1, 1, 1, 1), value) for value in (1.0, 3.0))
    ours = Trajectory((0.0,), (near,), 1, Trajectory((1.0,), (far,), 1))
    theirs = Trajectory((0.0,), (near,), 1, Trajectory((1.0,), (near,), 1))
    assert shaping_by_horizon(ours, theirs, ShapingConfig()).item() == 0
    assert shaping_by_horizon(ours, theirs, ShapingConfig(space="x0")).item() == 4


def method_of(loaded: WanBackbone, cfg: DistillConfig) -> BaseMethod:
    method = build_method(cfg, *build_roles(cfg, loaded.with_own_denoiser()))
    assert isinstance(method, BaseMethod)
    return method


def predictions_by_hand(
    backbone: WanBackbone, batch: PromptBatch, num_steps: int, guidance_scale: float
) -> list[Tensor]:
    """Euler steps; `x - sigma * velocity` of each call."""
    text, nothing = backbone.encode_text(batch.prompts), backbone.encode_text([""])
    nothing = Condition(nothing.embeds.expand(len(batch.prompts), -1, -1))
    sigmas, x, clean = sigma_grid(num_steps, 3.0), batch.noise, []
    for step in range(num_steps):
        sigma = sigmas[step].expand(len(x))
        slope = backbone.velocity(x, sigma, text)
        if guidance_scale != 1:
            without = backbone.velocity(x, sigma, nothing)
            slope = without + guidance_scale * (slope - without)
        clean.append(x - sigmas[step] * slope)
        x = x + (sigmas[step + 1] - sigmas[step]) * slope
    return clean


def test_the_loss_is_the_formula(loaded: WanBackbone, make_config: MakeConfig, captions: tuple[str, ...]) -> None:
    tree = make_config().model_dump() | {
        "method": {"kind": "imitation", "shaping": {"space": "x0", "distance": "both", "motion_weight": 0.0}},
        "guard": None,
    }
    cfg = DistillConfig.model_validate(tree)
    method = method_of(loaded, cfg)
    assert isinstance(method, Imitation)
    with torch.no_grad():  # apart from its teacher
        for weight in method.student.weights.values():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    batch = draw_batch(method.student, cfg, captions, 0)
    teacher, base = cfg.teacher, method.teacher.backbone
    with torch.no_grad():
        theirs = predictions_by_hand(base, batch, teacher.num_steps, teacher.guidance_scale)[:: teacher.num_steps // 4]  # type: ignore[arg-type]
        ours = predictions_by_hand(method.student, batch, 4, 1.0)  # type: ignore[arg-type]
        loss, _ = method.step(batch)
    by_hand = []
    for a, b in zip(ours, theirs, strict=True):
        frames = [F.cosine_similarity(a[:, :, f].flatten(1), b[:, :, f].flatten(1)) for f in range(a.shape[2])]
        by_hand.append((a - b).square().mean() + 1 - torch.stack(frames).mean())
    torch.testing.assert_close(loss, torch.stack(by_hand).mean(), atol=1e-6, rtol=1e-4)
    assert by_hand[0] > 1e-3


def test_grids_that_do_not_nest_are_interpolated(
    loaded: WanBackbone, make_config: MakeConfig, captions: tuple[str, ...], color_reward: object
) -> None:
    cfg = make_config(*X0, "teacher.num_steps=6")
    batch = draw_batch(loaded, cfg, captions, 0)
    sampler = TeacherSampler(loaded, color_reward, cfg.teacher, 3.0, predictions=True)  # type: ignore[arg-type]
    found = sampler.rollout(batch).trajectory.predictions
    assert found is not None
    assert found.sigmas == tuple(sigma_grid(4, 3.0)[:-1].tolist())
    own = rollout(
        loaded.velocity, batch.noise, sigma_grid(6, 3.0), loaded.encode_text(batch.prompts),
        negative=loaded.encode_text([""]), guidance_scale=cfg.teacher.guidance_scale, predict=range(6),
    ).predictions  # fmt: skip
    assert own is not None
    torch.testing.assert_close(found.latents[0], own.latents[0])
    torch.testing.assert_close(found.latents[2], own.latents[3])  # both grids pass the middle
    high, low = own.sigmas[1:3]
    share = (high - found.sigmas[1]) / (high - low)
    torch.testing.assert_close(found.latents[1], torch.lerp(own.latents[1], own.latents[2], share))


def test_a_stored_rollout_has_its_predictions_and_its_own_place(
    loaded: WanBackbone, make_config: MakeConfig, captions: tuple[str, ...], color_reward: object, tmp_path: Path
) -> None:
    cfg = make_config(*X0)
    assert isinstance(cfg.teacher, FrozenTeacherConfig)
    batch = draw_batch(loaded, cfg, captions, 0)
    store = DiskRolloutCache(tmp_path, {}, torch.device("cpu"))
    sampler = TeacherSampler(loaded, color_reward, cfg.teacher, 3.0, store, predictions=True)  # type: ignore[arg-type]
    made, found = sampler.rollout(batch), store.load(batch)
    assert found is not None
    assert made.trajectory.predictions is not None
    assert found.trajectory.predictions is not None
    assert found.trajectory.predictions.sigmas == made.trajectory.predictions.sigmas
    for one, other in zip(found.trajectory.predictions.latents, made.trajectory.predictions.latents, strict=True):
        assert torch.equal(one, other)
    plain = make_config()
    assert teacher_identity(cfg, cfg.teacher) != teacher_identity(plain, cfg.teacher)
    assert store.load(replace(batch, index=1)) is None
