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
from rats_video.diffusion.causal import pool_to_latent_frames
from rats_video.distillation.guard import SEED_OFFSET, build_guard
from rats_video.distillation.method import build_rats
from rats_video.distillation.roles import build_roles
from rats_video.distillation.run_rewards import check_rewards, latent_space, load_run_rewards, loss_reward
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.inference.sampler import SamplerSpec, sample_videos
from rats_video.inference.student import StudentCard, save_student
from rats_video.methods.rats import rats_step
from rats_video.planning.devices import find_device
from rats_video.planning.runs import PlanBuilder
from rats_video.pretraining import latent_reward as latent_training
from rats_video.pretraining.latent_pool import LatentRewardTrainConfig, LatentSampler, ScoredLatents, corrupt_latents
from rats_video.pretraining.latent_reward import agreement, ascend_reward, pixel_loss, score_loss
from rats_video.pretraining.ranks import rank_correlation
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
SHAPE = {"width": 8, "blocks": 2, "coarse": 2}


@pytest.fixture
def space(tiny_wan: Path, backbone: WanBackbone, clip: ClipSpec) -> LatentSpace:
    return latent_space(tiny_wan, backbone, clip)


@pytest.fixture
def reward(space: LatentSpace, reward_folders: tuple[Path, Path]) -> LatentReward:
    torch.manual_seed(2)
    imitated = WordRewardConfig(path=str(reward_folders[0]))
    made = LatentReward(space, imitated, WordReward.load(reward_folders[0]), **SHAPE)
    for block in made.sketch.blocks:
        torch.nn.init.normal_(block.time.weight, std=0.1)  # as if trained: at first blocks change nothing
    return made.requires_grad_(requires_grad=False).eval()


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


def test_a_pixel_frame_comes_from_latents_near_it(space: LatentSpace) -> None:
    torch.manual_seed(0)
    sketch = SketchDecoder(space, width=8, blocks=1, coarse=4)
    torch.nn.init.normal_(sketch.blocks[0].time.weight)  # type: ignore[arg-type,union-attr]
    latents = torch.randn(1, space.channels, 6, 4, 4, generator=seeded(0)).requires_grad_()
    clip = sketch(latents)
    assert clip.shape == (1, 21, 3, 8, 8)
    for frame, latent in ((0, 0), (1, 1), (4, 1), (5, 2), (20, 5)):
        (gradient,) = torch.autograd.grad(clip[0, frame].sum(), latents, retain_graph=True)
        reached = gradient[0].abs().sum(dim=(0, 2, 3)) > 0
        assert reached.tolist() == [abs(latent - other) <= 2 for other in range(6)]


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
        assert (tflops == 0) == (phase in {"teacher decode", "student decode", "decode backward"}), phase
    assert latent.tflops["student rollout"] == pixel.tflops["student rollout"]
    assert latent.parameters["reward"] == sum(weight.numel() for weight in reward.parameters())
    assert latent.memory.peak < pixel.memory.peak


# -------------------------------------------------------------------------------------------------------------- taught


TRAIN = """
clip: {{num_frames: 5, height: 32, width: 32}}
model: {model}
reward: {{path: {reward}}}
student: {student}
width: 8
sketch_steps: 1
sample_steps: [2]
guidance_scales: [1.0, 2.0]
num_samples: 8
num_damaged: 4
num_rendered: 8
rounds: 1
num_climbed: 4
other_prompts: 1
sample_batch: 4
batch_size: 8
steps: {steps}
optimizer: {{lr: 5.0e-3}}
eval_clips: 8
"""


@pytest.fixture
def studio(tiny_wan: Path, backbone: WanBackbone, color_reward: Any, captions: tuple[str, ...]) -> LatentSampler:
    cfg = LatentRewardTrainConfig.model_validate({
        "clip": {"num_frames": 5, "height": 32, "width": 32}, "model": str(tiny_wan), "reward": {"path": "-"},
        "coarse": 4, "other_prompts": 1, "sample_batch": 4, "optimizer": {"lr": 1e-3},
    })  # fmt: skip
    return LatentSampler(cfg, backbone, color_reward, captions)


def test_scored_is_what_the_pixel_reward_says_of_each_prompt(studio: LatentSampler, color_reward: Any) -> None:
    scored = studio.sampled(studio.backbone, 6, 1, [(2, 1.0), (3, 2.0)])
    assert (len(scored), scored.parts) == (6, ("color",))
    videos = studio.backbone.decode(scored.latents)
    assert scored.small.shape == (6, 5, 3, 8, 8)
    assert int(scored.small[1, 2, 0, 3, 1]) == round(255 * float(videos[1, 2, 0, 12:16, 4:8].mean()))
    for column in range(2):
        said = color_reward(videos, [studio.prompts[i] for i in scored.prompts[:, column].tolist()])
        torch.testing.assert_close(scored.clip[:, column, 0], said.clip)
        torch.testing.assert_close(scored.clip[:, column, 1], said.parts["color"])
        assert scored.frames is not None
        torch.testing.assert_close(scored.frames[:, column], pool_to_latent_frames(said.frames, 4))


def test_changed_clips_keep_their_own_prompts(studio: LatentSampler) -> None:
    pool = studio.sampled(studio.backbone, 4, 1, [(2, 1.0)])
    same = studio.changed("copied clips", 8, 2, pool, lambda latents, *_: latents)
    for latents, place in zip(same.latents, same.prompts[:, 0], strict=True):
        (source,) = (i for i, kept in enumerate(pool.latents) if torch.equal(kept, latents))
        assert place == pool.prompts[source, 0]


def test_damage_changes_every_clip_in_one_of_its_ways() -> None:
    latents = torch.randn(64, 4, 3, 4, 4, generator=seeded(0))
    changed = corrupt_latents(latents, [], seeded(1))
    others = latents.roll(1, dims=0)
    cut = ((changed == latents) | (changed == others)).flatten(1).all(dim=1)
    assert 8 <= int(cut.sum()) <= 26  # a quarter, about
    assert torch.equal(changed[cut][:, :, 0], latents[cut][:, :, 0])
    assert torch.equal(changed[cut][:, :, -1], others[cut][:, :, -1])
    assert (changed != latents).flatten(1).any(dim=1).all()


def test_climbing_goes_up_by_the_distance_at_most(reward: LatentReward, studio: LatentSampler) -> None:
    latents = torch.randn(4, reward.space.channels, 2, 4, 4, generator=seeded(0))
    prompts = list(studio.prompts[:4])
    with torch.no_grad():
        higher = ascend_reward(reward, 0.2)(latents.clone(), prompts, seeded(1))
        gain = reward.score_latents(higher, prompts).clip - reward.score_latents(latents, prompts).clip
    assert (gain > 0).all()
    assert ((higher - latents).square().mean(dim=(1, 2, 3, 4)).sqrt() <= 0.2).all()
    assert not higher.requires_grad


def test_scored_is_found_again_if_it_was_made_from_the_same(studio: LatentSampler, tmp_path: Path) -> None:
    scored = studio.sampled(studio.backbone, 4, 1, [(2, 1.0)])
    scored.save(tmp_path / "pool.safetensors", "a")
    found = ScoredLatents.find(tmp_path / "pool.safetensors", "a")
    assert found is not None
    assert found.parts == scored.parts
    for name in ("latents", "small", "prompts", "clip", "frames"):
        assert torch.equal(getattr(found, name), getattr(scored, name))
    assert ScoredLatents.find(tmp_path / "pool.safetensors", "b") is None
    assert ScoredLatents.find(tmp_path / "none.safetensors", "a") is None


def test_losses_are_zero_for_who_knows(reward: LatentReward, studio: LatentSampler) -> None:
    places = torch.randint(len(studio.prompts), (6, 2), generator=seeded(0))
    latents = torch.randn(6, reward.space.channels, 2, 4, 4, generator=seeded(1))
    with torch.no_grad():
        sketch = reward.sketch(latents).clamp(0, 1)
        said = [reward.score_latents(latents, [studio.prompts[i] for i in column.tolist()]) for column in places.T]
    small = (255 * sketch).round().byte()
    clip = torch.stack([torch.stack([one.clip, *one.parts.values()], dim=-1) for one in said], dim=1)
    frames = torch.stack([pool_to_latent_frames(one.frames, 4) for one in said if one.frames is not None], dim=1)
    known = ScoredLatents(latents, small, places, clip, frames, ("alignment", "quality"))
    everyone = torch.arange(6)

    def apart(pool: ScoredLatents, column: int) -> float:
        return float(score_loss(reward, sketch, pool, everyone, studio.prompts, column))

    assert float(pixel_loss(sketch, small, 0.0)) <= 0.5 / 255
    assert apart(known, 0) == pytest.approx(0, abs=1e-9)
    assert apart(known, 1) == pytest.approx(0, abs=1e-9)
    metrics = agreement(reward, known, studio.prompts)
    assert metrics["rank_correlation"] == pytest.approx(1, abs=1e-5)
    assert metrics["frame_rank_correlation"] == pytest.approx(1, abs=1e-5)
    assert metrics["bias"] == pytest.approx(0, abs=1e-5)
    spread = known.clip[:, 0, 0].std()
    off = replace(known, clip=known.clip + torch.tensor([1, 0, 0]) * spread, frames=None)
    assert agreement(reward, off, studio.prompts)["bias"] == pytest.approx(-float(spread), abs=1e-5)
    assert apart(off, 0) == pytest.approx(1 - 0.3 / 2, rel=1e-3)  # Huber's of one spread, of one score in three


def test_pixels_that_stand_out_count_more() -> None:
    small = torch.zeros(1, 1, 3, 2, 2, dtype=torch.uint8)
    small[0, 0, 0, 0, 0] = 204  # 0.8: the frame's mean red is 0.2
    black = torch.zeros(1, 1, 3, 2, 2)
    assert float(pixel_loss(black, small, 0.0)) == pytest.approx(0.8 / 12)
    assert float(pixel_loss(black, small, 10.0)) == pytest.approx((1 + 10 * 0.6) * 0.8 / 12)
    assert float(pixel_loss(small / 255 + 0.1, small, 10.0)) == pytest.approx((7 + 3 * 3) / 4 * 0.1)


def test_rank_correlation_by_hand() -> None:
    values = torch.tensor([3.0, 1.0, 2.0, 10.0])
    assert rank_correlation(values, values.exp()) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
    # ranks 2 0 1 3 and 1 0 2 3: 1 - 6 * (1 + 0 + 1 + 0) / (4 * 15)
    assert rank_correlation(values, torch.tensor([2.0, 1.0, 3.0, 10.0])) == pytest.approx(0.8)


@pytest.fixture
def student(backbone: WanBackbone, tiny_wan: Path, tmp_path: Path) -> Path:
    backbone.save_role(tmp_path / "student")
    card = StudentCard(str(tiny_wan), (2,), 3.0, {"num_frames": 5.0, "height": 32.0, "width": 32.0, "fps": 8.0}, 1, 0,
                       6.0, "float32")  # fmt: skip
    save_student(backbone, card, tmp_path / "student")
    return tmp_path / "student"


def test_training_from_the_command_line(
    command: Command, tiny_wan: Path, reward_folders: tuple[Path, Path], student: Path, tmp_path: Path
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(TRAIN.format(model=tiny_wan, reward=reward_folders[0], student=student, steps=4))
    outputs = [tmp_path / "first", tmp_path / "again"]
    for output in outputs:
        code, out, err = command("train", "reward", "--latent", "--config", config, "--output", output)
        assert code == 0, err
        assert out.endswith(f" s: {output}\n")
        assert "rank_correlation_student: " in out
    assert sorted(path.name for path in outputs[0].iterdir()) == [
        "config.json", "config.resolved.yaml", "model.safetensors", "training.json",
    ]  # fmt: skip
    metrics = json.loads((outputs[0] / "training.json").read_text())["metrics"]
    assert {f"rank_correlation_{name}" for name in ("samples", "student", "damaged", "climbed")} <= metrics.keys()
    one, again = (load_file(output / "model.safetensors") for output in outputs)
    assert all(torch.equal(one[key], again[key]) for key in one)


def test_training_goes_on_from_another_one(
    command: Command, tiny_wan: Path, reward_folders: tuple[Path, Path], reward: LatentReward, tmp_path: Path
) -> None:
    reward.save(tmp_path / "first")
    config = tmp_path / "mine.yaml"
    text = TRAIN.format(model=tiny_wan, reward=reward_folders[0], student="null", steps=1)
    config.write_text(f"{text}init: {tmp_path / 'first'}\n".replace("lr: 5.0e-3", "lr: 1.0e-6"))
    code, _, err = command("train", "reward", "--latent", "--config", config, "--output", tmp_path / "out")
    assert code == 0, err
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "out"))
    moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
    assert 0 < float(moved.max()) < 1e-5


def test_an_interrupted_training_goes_on_from_what_was_scored(
    command: Command, tiny_wan: Path, reward_folders: tuple[Path, Path], student: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = tmp_path / "mine.yaml"
    config.write_text(TRAIN.format(model=tiny_wan, reward=reward_folders[0], student=student, steps=2))
    with monkeypatch.context() as cut:
        cut.setattr(latent_training, "build_optimizer", interrupt)
        code, _, err = command("train", "reward", "--latent", "--config", config, "--output", tmp_path / "out")
    assert (code, err.splitlines()[-1]) == (2, "error: the power failed")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.resolved.yaml", "pool.safetensors"}
    with monkeypatch.context() as cut:
        cut.setattr(latent_training, "training_pool", interrupt)
        go_on = ("--config", config, "--output", tmp_path / "out", "--resume")
        code, _, err = command("train", "reward", "--latent", *go_on)
    assert code == 0, err


def interrupt(*_: object) -> None:
    raise UserError("the power failed")


def test_what_cannot_be_rendered_is_one_line(command: Command, tiny_wan: Path, reward_folders: tuple[Path, Path],
                                             captions: tuple[str, ...], tmp_path: Path) -> None:  # fmt: skip
    config = tmp_path / "mine.yaml"
    (tmp_path / "a.txt").write_text("\n".join(captions[:4]))
    (tmp_path / "b.txt").write_text("\n".join(captions[4:]))
    prompts = f"{{kind: file, train: {tmp_path / 'a.txt'}, heldout: {tmp_path / 'b.txt'}}}"
    text = TRAIN.format(model=tiny_wan, reward=reward_folders[0], student="null", steps=1)
    config.write_text(f"{text}prompts: {prompts}\n")
    code, _, err = command("train", "reward", "--latent", "--config", config, "--output", tmp_path / "out")
    assert code != 0
    assert "num_rendered: only shapes are rendered, and only Wan's VAE encodes here (use 0)" in err
    assert not (tmp_path / "out").exists()
