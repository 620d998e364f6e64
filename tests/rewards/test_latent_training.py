"""How a latent reward is taught: what is scored, the losses, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rats_video.backbones.wan import WanBackbone
from rats_video.diffusion.causal import pool_to_latent_frames
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.inference.student import StudentCard, save_student
from rats_video.pretraining import latent_reward as latent_training
from rats_video.pretraining.latent_pool import LatentRewardTrainConfig, LatentSampler, ScoredLatents, corrupt_latents
from rats_video.pretraining.latent_reward import agreement, ascend_reward, pixel_loss, score_loss
from rats_video.pretraining.reward import rank_correlation
from rats_video.rewards.latent import LatentReward
from rats_video.seeds import seeded

MakeConfig = Callable[..., DistillConfig]
Command = Callable[..., Any]


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
