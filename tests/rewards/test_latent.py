"""A reward on latents: what it looks at, what it refuses, how it is taught, and that a step with it decodes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.distillation.guard import SEED_OFFSET, build_guard
from rats_video.distillation.method import build_rats
from rats_video.distillation.roles import build_roles
from rats_video.distillation.run_rewards import check_rewards, latent_space, load_run_rewards, loss_reward
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.inference.sampler import SamplerSpec, sample_videos
from rats_video.methods.rats import rats_step
from rats_video.planning.devices import find_device
from rats_video.planning.runs import PlanBuilder
from rats_video.rewards.latent import LatentReward, LatentSpace, SketchDecoder, read_imitated
from rats_video.rewards.reward import RewardConfig, build_reward
from rats_video.rewards.reward import reward_folders as reward_folders_of
from rats_video.rewards.word import WordReward, WordRewardConfig
from rats_video.runtime import ALONE
from rats_video.seeds import seeded
from rats_video.training.guard import GuardConfig
from rats_video.training.run_folder import RunFolder
from rats_video.types import ClipSpec, PromptBatch, Reward

MakeConfig = Callable[..., DistillConfig]
Command = Callable[..., Any]


@pytest.fixture
def latent_config(reward: LatentReward, make_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    reward.save(tmp_path / "latent")
    return lambda *more: make_config("reward.kind=latent", f"reward.path={tmp_path / 'latent'}", *more)


# ---------------------------------------------------------------------------------------------------------- the scores


def test_the_pixel_reward_judges_the_sketch(
    reward: LatentReward, batch: PromptBatch, reward_folders: tuple[Path, Path]
) -> None:
    sketch = reward.sketch(batch.noise)
    assert sketch.shape == (2, 5, 3, 16, 16)
    drawn = reward.enlarge(sketch)
    assert drawn.shape == (2, 5, 3, 32, 32)
    torch.testing.assert_close(drawn[..., 1::2, ::2], sketch.clamp(0, 1))
    expected = WordReward.load(reward_folders[0])(drawn, batch.prompts)
    said = reward.score_latents(batch.noise, batch.prompts)
    assert torch.equal(said.clip, expected.clip)
    assert said.frames is not None
    assert expected.frames is not None
    assert torch.equal(said.frames, expected.frames)
    assert said.parts.keys() == {"alignment", "quality"}


def test_saturated_pixels_keep_their_gradient(reward: LatentReward, batch: PromptBatch) -> None:
    with torch.no_grad():
        reward.sketch.refine[-1].bias += 5  # type: ignore[operator,union-attr]
    latents = batch.noise.requires_grad_()
    drawn = reward.enlarge(reward.sketch(latents))
    assert torch.equal(drawn, torch.ones_like(drawn))
    drawn[:, -1].sum().backward()
    assert latents.grad is not None
    assert (latents.grad != 0).any()


@pytest.mark.parametrize("hidden", [0, 1])
def test_a_pixel_frame_comes_from_latents_near_it(space: LatentSpace, hidden: int) -> None:
    torch.manual_seed(0)
    sketch = SketchDecoder(replace(space, num_frames=21), width=8, blocks=1, coarse=4)
    torch.nn.init.normal_(sketch.blocks[0].time.weight)  # type: ignore[arg-type,union-attr]
    latents = torch.randn(1, space.channels, hidden + 6, 4, 4, generator=seeded(0)).requires_grad_()
    clip = sketch(latents)
    assert clip.shape == (1, 21, 3, 8, 8)
    for frame, latent in ((0, 0), (1, 1), (4, 1), (5, 2), (20, 5)):
        (gradient,) = torch.autograd.grad(clip[0, frame].sum(), latents, retain_graph=True)
        reached = gradient[0].abs().sum(dim=(0, 2, 3)) > 0
        assert reached.tolist() == [other >= 0 and abs(latent - other) <= 2 for other in range(-hidden, 6)]


def test_gradient_reaches_every_latent_frame_and_is_right(reward: LatentReward, batch: PromptBatch) -> None:
    reward = reward.double()
    latents = batch.noise[:1].double().requires_grad_()

    def score(latents: Tensor) -> Tensor:
        said = reward.score_latents(latents, batch.prompts[:1])
        assert said.frames is not None
        return said.clip.sum() + said.frames.square().sum()

    (gradient,) = torch.autograd.grad(score(latents), latents)
    assert (gradient.square().sum(dim=(0, 1, 3, 4)) > 1e-12).all()
    direction = torch.randn(latents.shape, generator=seeded(1), dtype=torch.float64)
    slope = (score(latents + 1e-6 * direction) - score(latents - 1e-6 * direction)) / 2e-6
    assert float((gradient * direction).sum()) == pytest.approx(float(slope.detach()), rel=1e-5)


def test_clips_are_judged_one_by_one_and_by_their_own_prompt(reward: LatentReward, batch: PromptBatch) -> None:
    together = reward.score_latents(batch.noise, batch.prompts).clip
    alone = [reward.score_latents(batch.noise[i : i + 1], batch.prompts[i : i + 1]).clip for i in (1, 0)]
    torch.testing.assert_close(torch.cat(alone[::-1]), together)
    swapped = reward.score_latents(batch.noise, batch.prompts[::-1]).clip
    assert (swapped - together).abs().min() > 1e-5


# ------------------------------------------------------------------------------------------------------------- folders


def test_what_is_saved_scores_the_same(
    reward: LatentReward, space: LatentSpace, batch: PromptBatch, tmp_path: Path
) -> None:
    reward.save(tmp_path)
    asked: list[RewardConfig] = []

    def build(imitated: RewardConfig) -> Reward:
        asked.append(imitated)
        return reward.judge

    again = LatentReward.load(tmp_path, "cpu", build, space)
    assert asked == [reward.imitated]
    assert {name.split(".")[0] for name in load_file(tmp_path / "model.safetensors")} == {
        "stem", "blocks", "enlarge", "refine",
    }  # fmt: skip
    one, other = (each.score_latents(batch.noise, batch.prompts) for each in (reward, again))
    assert torch.equal(one.clip, other.clip)
    assert torch.equal(one.frames, other.frames)  # type: ignore[arg-type]
    assert again.imitated == reward.imitated
    assert not any(weight.requires_grad for weight in again.parameters())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"channels": 16}, "channels 4 (here 16)"),
        ({"height": 64, "width": 96}, "height 32 (here 64), width 32 (here 96)"),
        ({"family": "LTX-Video"}, "family Wan (here LTX-Video)"),
    ],
)
def test_latents_of_another_kind_are_refused(
    reward: LatentReward, space: LatentSpace, tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    reward.save(tmp_path)
    with pytest.raises(UserError) as caught:
        LatentReward.load(tmp_path, "cpu", lambda _: reward.judge, replace(space, **change))
    assert str(caught.value) == (
        f"{tmp_path}: was trained for other latents: {line} "
        "(train one for this model and clip size: rats-video train reward --latent)"
    )


def test_another_vae_is_another_kind(tiny_wan: Path, space: LatentSpace, clip: ClipSpec, backbone: WanBackbone,
                                     tmp_path: Path) -> None:  # fmt: skip
    (tmp_path / "vae").mkdir()
    weights = bytearray(next((tiny_wan / "vae").glob("*.safetensors")).read_bytes())
    weights[-1] ^= 1
    (tmp_path / "vae" / "model.safetensors").write_bytes(weights)
    other = latent_space(tmp_path, backbone, clip)
    assert replace(other, vae=space.vae) == space
    assert other.vae != space.vae


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("config.json", "{", "not a latent reward"),
        ("config.json", "{}", "not a latent reward: its config.json has no 'network'"),
        ("config.json", None, "not a latent reward"),
        ("model.safetensors", "no", "not a latent reward"),
    ],
)
def test_a_folder_that_holds_none_is_one_line(
    reward: LatentReward, space: LatentSpace, tmp_path: Path, file: str, content: str | None, line: str
) -> None:
    reward.save(tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    with pytest.raises(UserError) as caught:
        LatentReward.load(tmp_path, "cpu", lambda _: reward.judge, space)
    assert str(caught.value).startswith(f"{tmp_path}: {line}")
    assert "\n" not in str(caught.value)


def test_a_reward_that_imitates_nothing_known_is_refused(reward: LatentReward, tmp_path: Path) -> None:
    reward.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "imitates": {"kind": "taste"}}))
    with pytest.raises(UserError, match="names no reward that it imitates"):
        read_imitated(tmp_path)


# ----------------------------------------------------------------------------------------------------------- in a run


def test_a_step_decodes_nothing_and_follows_the_latents(
    latent_config: MakeConfig, backbone: WanBackbone, batch: PromptBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = latent_config("method.alpha=0")
    rats = build_rats(cfg, *build_roles(cfg, backbone))
    assert isinstance(rats.reward, LatentReward)
    decoded: list[int] = []
    monkeypatch.setattr(WanBackbone, "decode", lambda *_: decoded.append(1))
    loss, row = rats_step(rats, batch)
    loss.backward()
    assert decoded == []
    assert row["loss"] == pytest.approx(-row["reward/student"])
    assert {"reward/student/alignment", "gate/frame1"} <= row.keys()
    norms = [weight.grad.norm() for weight in rats.student.weights.values() if weight.grad is not None]
    assert torch.stack(norms).max() > 0


def test_clips_are_judged_by_the_reward_it_imitates(
    latent_config: MakeConfig, reward_folders: tuple[Path, Path], batch: PromptBatch
) -> None:
    cfg = latent_config()
    judge = build_reward(cfg.reward, torch.device("cpu"), where="reward")
    videos = torch.rand(2, 5, 3, 32, 32, generator=seeded(3))
    expected = WordReward.load(reward_folders[0])(videos, batch.prompts)
    assert torch.equal(judge(videos, batch.prompts).clip, expected.clip)


def test_the_guard_looks_at_what_trains_and_at_what_it_imitates(
    latent_config: MakeConfig, reward: LatentReward, backbone: WanBackbone, batch: PromptBatch, clip: ClipSpec,
    tmp_path: Path,
) -> None:  # fmt: skip
    cfg = latent_config("heldout_reward=null")
    judges = load_run_rewards(cfg, reward, torch.device("cpu"))
    guard = build_guard(cfg, GuardConfig(num_clips=2), judges, batch.prompts, RunFolder(tmp_path / "run"), ALONE)
    guard.evaluate(SimpleNamespace(student=backbone, teacher=SimpleNamespace(backbone=backbone)), 0, 0.0)  # type: ignore[arg-type]
    (samples,) = sample_videos(backbone, batch.prompts, clip, SamplerSpec(4, cfg.shift), seed=cfg.seed + SEED_OFFSET)
    found = guard.evaluations[0].scores
    assert found["reward"] == pytest.approx(reward.score_latents(samples.latents, batch.prompts).clip.tolist())
    assert found["imitated_reward"] == pytest.approx(judges.trained(samples.videos, batch.prompts).clip.tolist())


def test_teachers_stored_for_another_pixel_reward_are_not_taken(latent_config: MakeConfig, tmp_path: Path) -> None:
    folders = reward_folders_of(latent_config().reward, where="reward")
    imitated = read_imitated(tmp_path / "latent")
    assert isinstance(imitated, WordRewardConfig)
    assert folders == [tmp_path / "latent", Path(imitated.path)]


def test_prompts_are_checked_by_the_reward_it_imitates(latent_config: MakeConfig, backbone: WanBackbone) -> None:
    cfg = latent_config()
    with pytest.raises(UserError, match="the reward knows no word of 'a zebra'"):
        check_rewards(cfg, loss_reward(cfg, backbone), ["a zebra"], torch.device("cpu"))


def test_reward_ranks_are_refused(latent_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"a latent reward .* computes beside the student: set parallel.reward_ranks=0"):
        latent_config("parallel.reward_ranks=1")


def test_a_plan_counts_no_decode(reward: LatentReward, latent_config: MakeConfig, make_config: MakeConfig) -> None:
    device = find_device("cpu")

    def plan(cfg: DistillConfig) -> Any:
        return PlanBuilder(cfg, device, 1).plan(cfg, device)

    latent, pixel = plan(latent_config()), plan(make_config())
    for phase, tflops in latent.tflops.items():
        is_decode = phase in {"teacher decode", "student decode", "decode backward"}
        assert (tflops == 0) == (is_decode or pixel.tflops[phase] == 0), phase
    assert latent.tflops["student rollout"] == pixel.tflops["student rollout"]
    assert latent.parameters["reward"] == sum(weight.numel() for weight in reward.parameters())
    assert latent.memory.peak < pixel.memory.peak
