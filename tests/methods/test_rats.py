"""The RATS step: its loss and gradient recomputed from the formula, and who gets gradient; then the teacher's ways."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rats_video.backbones.wan import WanBackbone
from rats_video.condition import Condition
from rats_video.diffusion.schedule import sigma_grid
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.methods.gate import build_gate
from rats_video.methods.rats import Rats, capped_reward, rats_step
from rats_video.methods.teacher import TeacherRollout, TeacherSampler
from rats_video.methods.teacher_cache import DiskRolloutCache
from rats_video.optim import ema_update_
from rats_video.training.loop import train_loop
from rats_video.training.run_folder import RunFolder
from rats_video.types import PromptBatch, Reward, RewardScores

MakeConfig = Callable[..., DistillConfig]
WEIGHTS = (1.0, 2.0, 3.0, 4.0)
SET = [
    "method.reward_weight=0.7",
    f"method.shaping.horizon_weights={list(WEIGHTS)}",
    "method.shaping.motion_weight=0.3",
]
FRAMES = ((0, 1), (1, 5))  # pixel frames of each latent frame


@pytest.fixture
def make_rats(backbone: WanBackbone, color_reward: Reward, make_config: MakeConfig) -> Callable[..., Rats]:
    """Student and teacher of different weights, with the colour reward."""
    base = backbone.with_own_denoiser()
    with torch.no_grad():
        for parameter in backbone.denoiser.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))

    def make(*overrides: str, reward: Reward = color_reward, store: DiskRolloutCache | None = None) -> Rats:
        cfg = make_config(*SET, *overrides)
        teacher = TeacherSampler(base, reward, cfg.teacher, cfg.shift, store)
        gate = build_gate(cfg.method.gate, backbone.temporal_stride)
        return Rats(backbone, teacher, reward, cfg.student, cfg.shift, gate=gate, config=cfg.method)

    return make


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    module.zero_grad(set_to_none=True)
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def guide_by_hand(base: WanBackbone, batch: PromptBatch, reward: Reward) -> tuple[list[Tensor], RewardScores]:
    """8 guided Euler steps, every second one kept, as the method's text says it."""
    text, nothing = base.encode_text(batch.prompts), base.encode_text([""])
    nothing = Condition(nothing.embeds.expand(2, -1, -1))
    sigmas, x, kept = sigma_grid(8, 3.0), batch.noise, []
    with torch.no_grad():
        for step in range(8):
            sigma = sigmas[step].expand(2)
            cond, uncond = base.velocity(x, sigma, text), base.velocity(x, sigma, nothing)
            x = x + (sigmas[step + 1] - sigmas[step]) * (uncond + 2.0 * (cond - uncond))
            kept += [x] if step % 2 else []
        return kept, reward(base.decode(x), batch.prompts)


def loss_by_hand(
    rats: Rats, batch: PromptBatch, *, reward_weight: float, alpha: float, grad_steps: Sequence[int] = range(4)
) -> Tensor:
    horizons, teacher = guide_by_hand(rats.teacher.backbone, batch, rats.reward)
    text, sigmas = rats.student.encode_text(batch.prompts), sigma_grid(4, 3.0)
    x, shaping = batch.noise, torch.zeros(2, 2)
    for step in range(4):
        slope = rats.student.velocity(x, sigmas[step].expand(2), text)
        x = x + (sigmas[step + 1] - sigmas[step]) * (slope if step in grad_steps else slope.detach())
        off = x - horizons[step]
        for frame in range(2):
            shaping[:, frame] += WEIGHTS[step] / 10 * (off[:, :, frame] ** 2).mean(dim=(1, 2, 3))
            shaping[:, frame] += WEIGHTS[step] / 10 * 0.3 * ((off[:, :, 1] - off[:, :, 0]) ** 2).mean(dim=(1, 2, 3))
    scores = rats.reward(rats.student.decode(x), batch.prompts)
    assert scores.frames is not None
    assert teacher.frames is not None
    loss = -reward_weight * scores.clip.mean()
    for frame, (first, last) in enumerate(FRAMES):
        lead = (teacher.frames - scores.frames)[:, first:last].mean(dim=1)
        weight = 0.1 + 0.9 / (1 + torch.exp(-lead / 0.05))
        loss = loss + alpha * (weight.detach() * shaping[:, frame]).mean() / 2
    return loss


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"reward_weight": 0.7, "alpha": 2.0}),
        (["method.reward_weight=0"], {"reward_weight": 0.0, "alpha": 2.0}),
        (["method.alpha=0"], {"reward_weight": 0.7, "alpha": 0.0}),
        (["student.grad_steps=2"], {"reward_weight": 0.7, "alpha": 2.0, "grad_steps": (2, 3)}),
    ],
    ids=["rats", "imitation", "reward_only", "truncated"],
)
def test_loss_and_gradient_are_the_formulas(
    make_rats: Callable[..., Rats], batch: PromptBatch, overrides: list[str], expected: dict[str, Any]
) -> None:
    rats = make_rats(*overrides)
    loss, row = rats_step(rats, batch)
    by_hand = loss_by_hand(rats, batch, **expected)
    torch.testing.assert_close(loss, by_hand, atol=1e-6, rtol=1e-5)
    assert row["loss"] == loss.item()
    ours, theirs = (gradients(each, rats.student.denoiser) for each in (loss, by_hand))
    assert max(g.abs().max() for g in theirs) > 1e-3
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-3)


def test_the_row_shows_both_rewards_the_gate_and_each_horizon(
    make_rats: Callable[..., Rats], batch: PromptBatch
) -> None:
    rats = make_rats()
    _, row = rats_step(rats, batch)
    _, teacher = guide_by_hand(rats.teacher.backbone, batch, rats.reward)
    assert row["reward/teacher"] == pytest.approx(teacher.clip.mean().item(), abs=1e-6)
    assert row["reward/gap"] == pytest.approx(row["reward/student"] - row["reward/teacher"], abs=1e-6)
    assert row["gate/weight"] == pytest.approx((row["gate/frame0"] + row["gate/frame1"]) / 2, abs=1e-6)
    assert row["reward/student/color"] == pytest.approx(row["reward/student"])
    horizons = [key for key in row if key.startswith("shaping/")]
    assert horizons == ["shaping/0.900", "shaping/0.750", "shaping/0.500", "shaping/0.000"]
    assert all(row[key] > 0 for key in horizons)


def test_gradient_reaches_the_student_only(
    make_rats: Callable[..., Rats], backbone: WanBackbone, batch: PromptBatch, reward_folders: tuple[Path, Path]
) -> None:
    from rats_video.rewards.word import WordReward

    reward = WordReward.load(reward_folders[0])
    rats = make_rats(reward=reward)
    loss, _ = rats_step(rats, batch)
    assert max(g.abs().max() for g in gradients(loss, rats.student.denoiser)) > 0
    others = (rats.teacher.backbone.denoiser, reward, backbone.vae, backbone.parts["text_encoder"])
    assert all(parameter.grad is None for module in others for parameter in module.parameters())


def test_imitation_builds_no_graph_through_the_reward(
    make_rats: Callable[..., Rats], batch: PromptBatch, color_reward: Reward
) -> None:
    seen: list[bool] = []

    def spy(videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        seen.append(videos.requires_grad)
        return color_reward(videos, prompts)

    rats_step(make_rats("method.reward_weight=0", reward=spy), batch)
    rats_step(make_rats(reward=spy), batch)
    assert seen == [False, False, False, True]  # teacher and student, twice


def test_reward_margin_caps_the_gradient() -> None:
    student, teacher = torch.tensor([1.0, 2.0, 4.0], requires_grad=True), torch.tensor([1.5, 1.5, 1.5])
    gain = capped_reward(student, teacher, margin=1.0)
    assert gain.tolist() == [1.0, 2.0, 2.5]
    gain.sum().backward()
    assert student.grad is not None
    assert student.grad.tolist() == [1.0, 1.0, 0.0]
    assert capped_reward(student, teacher, None) is student


def test_reward_margin_reaches_the_loss(make_rats: Callable[..., Rats], batch: PromptBatch) -> None:
    margin = "method.reward_margin=0"
    loss, row = rats_step(make_rats(margin, "method.alpha=0"), batch)
    guide = make_rats().teacher.rollout(batch)
    _, free = rats_step(make_rats(), batch)
    assert free["reward/gap"] != 0
    assert row["reward/student"] == free["reward/student"]  # the log shows the true reward
    clips = rats_scores(make_rats(), batch)
    assert loss.item() == pytest.approx(-0.7 * torch.minimum(clips, guide.scores.clip).mean().item(), abs=1e-6)
    assert not torch.equal(torch.minimum(clips, guide.scores.clip), clips)


def rats_scores(rats: Rats, batch: PromptBatch) -> Tensor:
    from rats_video.methods.student import student_rollout

    with torch.no_grad():
        return rats.reward(rats.student.decode(student_rollout(rats, batch).x0), batch.prompts).clip


# ------------------------------------------------------------------------------------------------------ the teacher


class Counted:
    """Counts the teacher's network calls."""

    def __init__(self, teacher: TeacherSampler) -> None:
        self.calls = 0
        teacher.backbone.denoiser.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1


def same_guide(one: TeacherRollout, other: TeacherRollout) -> bool:
    pairs = [*zip(one.trajectory.latents, other.trajectory.latents, strict=True), (one.scores.clip, other.scores.clip)]
    assert one.scores.frames is not None
    assert other.scores.frames is not None
    pairs += [(one.scores.frames, other.scores.frames)]
    pairs += [(one.scores.parts[name], other.scores.parts[name]) for name in {**one.scores.parts, **other.scores.parts}]
    meta = (one.trajectory.sigmas, one.trajectory.nfe) == (other.trajectory.sigmas, other.trajectory.nfe)
    return meta and all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_the_guide_is_the_guided_rollout(make_rats: Callable[..., Rats], batch: PromptBatch) -> None:
    rats = make_rats()
    guide, (by_hand, scores) = rats.teacher.rollout(batch), guide_by_hand(rats.teacher.backbone, batch, rats.reward)
    torch.testing.assert_close(guide.scores.clip, scores.clip)
    assert guide.trajectory.nfe == 16
    assert guide.trajectory.sigmas == tuple(sigma_grid(4, 3.0)[1:].tolist())
    for ours, theirs in zip(guide.trajectory.latents, by_hand, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        assert not ours.requires_grad


def test_grids_that_do_not_nest_still_give_the_students_horizons(
    make_rats: Callable[..., Rats], batch: PromptBatch
) -> None:
    guide = make_rats("teacher.num_steps=7").teacher.rollout(batch)
    assert guide.trajectory.sigmas == tuple(sigma_grid(4, 3.0)[1:].tolist())


def test_one_rollout_serves_all_updates_on_a_batch(make_rats: Callable[..., Rats], batch: PromptBatch) -> None:
    teacher = make_rats().teacher
    count = Counted(teacher)
    first = teacher.rollout(batch)
    assert teacher.rollout(batch) is first
    assert count.calls == 8  # both guidance branches in one call
    teacher.rollout(replace(batch, index=1))
    assert count.calls == 16


def test_ema_moves_by_its_decay() -> None:
    average, model = nn.Linear(2, 1), nn.Linear(2, 1)
    with torch.no_grad():
        average.weight.fill_(1.0)
        model.weight.fill_(3.0)
    ema_update_(dict(average.named_parameters()), dict(model.named_parameters()), 0.75)
    assert average.weight.tolist() == [[1.5, 1.5]]
    assert model.weight.tolist() == [[3.0, 3.0]]


def test_only_an_ema_teacher_follows(make_rats: Callable[..., Rats]) -> None:
    ema = make_rats("teacher.kind=ema", "teacher.num_steps=8", "teacher.decay=0.9")
    teacher, student = ema.teacher.backbone.denoiser, ema.student.denoiser
    before = copy.deepcopy(teacher.state_dict())
    make_rats().teacher.update_ema(ema.student, 1)  # frozen, the same weights
    ema.teacher.update_ema(ema.student, 5, resumed=True)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    ema.teacher.update_ema(ema.student, 6)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(dict(teacher.named_parameters())[name], 0.9 * before[name] + 0.1 * parameter)


def test_guidance_fades_with_the_updates(make_rats: Callable[..., Rats]) -> None:
    fade = ["guidance_scale=3", "guidance_end=1", "guidance_fade_steps=10", "num_steps=8"]
    rats = make_rats("teacher.kind=ema", *(f"teacher.{key}" for key in fade))
    scales = []
    for updates in (0, 5, 10, 99):
        rats.teacher.update_ema(rats.student, updates, resumed=True)
        scales.append(rats.teacher.guidance_scale)
    assert scales == [3.0, 2.0, 1.0, 1.0]
    assert make_rats("teacher.guidance_scale=4").teacher.guidance_scale == 4.0


def test_a_faded_teacher_costs_half(make_rats: Callable[..., Rats], batch: PromptBatch) -> None:
    fade = ["guidance_scale=3", "guidance_end=1", "guidance_fade_steps=1", "num_steps=8"]
    rats = make_rats("teacher.kind=ema", *(f"teacher.{key}" for key in fade))
    assert rats.teacher.rollout(batch).trajectory.nfe == 16
    rats.teacher.update_ema(rats.student, 1, resumed=True)
    assert rats.teacher.rollout(replace(batch, index=1)).trajectory.nfe == 8


def test_training_moves_the_student_and_no_frozen_teacher(
    make_config: MakeConfig, make_rats: Callable[..., Rats], captions: tuple[str, ...], tmp_path: Path
) -> None:
    rats = make_rats()
    before = [copy.deepcopy(each.denoiser.state_dict()) for each in (rats.teacher.backbone, rats.student)]
    train_loop(rats, make_config(), captions, RunFolder(tmp_path))
    after = [each.denoiser.state_dict() for each in (rats.teacher.backbone, rats.student)]
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert all(not torch.equal(after[1][name], value) for name, value in before[1].items() if "attn" in name)


def endless_reward(videos: Tensor, _: Sequence[str]) -> RewardScores:
    return RewardScores(videos.mean(dim=(1, 2, 3, 4)) / 0)


def endless_slope(videos: Tensor, _: Sequence[str]) -> RewardScores:
    """Finite itself, but the slope of a square root at 0 is infinite."""
    brightness = videos.mean(dim=(1, 2, 3, 4))
    return RewardScores((brightness - brightness.detach()).sqrt())


@pytest.mark.parametrize(
    ("reward", "line"),
    [
        (endless_reward, r"^reward: no clip has a finite score at step 2; no checkpoint to go back to"),
        (endless_slope, r"^distill: the gradient is nan at step 2; .*lower training\.optimizer\.lr or method\.alpha"),
    ],
)
def test_what_is_not_finite_never_reaches_the_weights(
    make_config: MakeConfig, make_rats: Callable[..., Rats], captions: tuple[str, ...], tmp_path: Path, reward: Reward,
    line: str,
) -> None:  # fmt: skip
    rats = make_rats(reward=reward)
    before = copy.deepcopy(rats.student.denoiser.state_dict())
    with pytest.raises(UserError, match=line):
        train_loop(rats, make_config("training.faults.skip=1"), captions, RunFolder(tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in rats.student.denoiser.state_dict().items())
    assert not (tmp_path / "checkpoints").exists()


# ---------------------------------------------------------------------------------------------- rollouts kept on disk


@pytest.fixture
def store_at(tmp_path: Path) -> Callable[..., DiskRolloutCache]:
    return lambda **identity: DiskRolloutCache(tmp_path / "cache", {"model": 1, **identity}, torch.device("cpu"))


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.safetensors"))


def test_a_stored_rollout_is_the_rollout(
    make_rats: Callable[..., Rats], batch: PromptBatch, store_at: Callable[..., DiskRolloutCache], tmp_path: Path
) -> None:
    fresh = make_rats(store=store_at()).teacher.rollout(batch)
    teacher = make_rats(store=store_at()).teacher
    count = Counted(teacher)
    assert same_guide(teacher.rollout(batch), fresh)
    assert count.calls == 0
    assert len(files(tmp_path)) == 1
    assert [path.suffix for path in (tmp_path / "cache").rglob("*.partial")] == []


@pytest.mark.parametrize("change", ["identity", "noise", "prompts", "num_steps", "index"])
def test_another_rollout_is_not_mixed_in(
    make_rats: Callable[..., Rats], batch: PromptBatch, store_at: Callable[..., DiskRolloutCache], change: str
) -> None:
    make_rats(store=store_at()).teacher.rollout(batch)
    others = {
        "identity": batch,
        "noise": replace(batch, noise=batch.noise + 1e-3),
        "prompts": replace(batch, prompts=batch.prompts[::-1]),
        "num_steps": replace(batch, num_steps=2),
        "index": replace(batch, index=3),
    }
    store = store_at(weights="other") if change == "identity" else store_at()
    assert store.load(others[change]) is None
    assert store_at().load(batch) is not None


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "no header", "no latents"])
def test_a_damaged_file_is_computed_again(
    make_rats: Callable[..., Rats],
    batch: PromptBatch,
    store_at: Callable[..., DiskRolloutCache],
    tmp_path: Path,
    damage: str,
) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    fresh = make_rats(store=store_at()).teacher.rollout(batch)
    (path,) = files(tmp_path)
    content = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    match damage:
        case "truncated":
            path.write_bytes(content[:-8])
        case "empty":
            path.write_bytes(b"")
        case "garbage":
            path.write_bytes(b"x" * len(content))
        case "no header":
            save_file({"clip": torch.zeros(2)}, path)
        case "no latents":
            save_file({"clip": torch.zeros(2)}, path, header)
    teacher = make_rats(store=store_at()).teacher
    assert same_guide(teacher.rollout(batch), fresh)
    assert same_guide(make_rats(store=store_at()).teacher.rollout(batch), fresh)
    stored = store_at().load(batch)
    assert stored is not None
    assert same_guide(stored, fresh)
