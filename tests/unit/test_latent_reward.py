"""A reward on latents: what it looks at, what it refuses, how it is taught, and that a step with it decodes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.build.distill import build_rats, build_roles, prepare_base
from rats_video.build.dry_runs import Builders, DryRuns
from rats_video.build.reward import build_reward, check_rewards, latent_space, loss_reward
from rats_video.config.distill import DistillConfig
from rats_video.config.pretrain import LatentRewardTrainConfig
from rats_video.config.reward import WordRewardConfig
from rats_video.diffusion.causal import pool_to_latent_frames, spread_to_pixel_frames
from rats_video.distill.step import rats_step
from rats_video.errors import UserError
from rats_video.inference.student import StudentCard, save_student
from rats_video.planning.devices import find_device
from rats_video.rewards.latent_reward import LatentReward, LatentSpace
from rats_video.rewards.word_reward import WordReward
from rats_video.seeds import seeded
from rats_video.training import latent_reward as latent_training
from rats_video.training.latent_pool import Scored, Studio, damage
from rats_video.training.latent_reward import agreement, climb, imitation_losses
from rats_video.training.reward import rank_correlation
from rats_video.types import ClipSpec, PromptBatch, TextCondition

MakeConfig = Callable[..., DistillConfig]
Command = Callable[..., Any]
SHAPE = {"parts": ["alignment", "quality"], "has_frames": True, "width": 8, "halvings": 0}


@pytest.fixture
def space(tiny_wan: Path, backbone: WanBackbone, clip: ClipSpec) -> LatentSpace:
    return latent_space(tiny_wan, backbone, clip)


@pytest.fixture
def reward(space: LatentSpace, backbone: WanBackbone, reward_folders: tuple[Path, Path]) -> LatentReward:
    torch.manual_seed(2)
    imitated = WordRewardConfig(path=str(reward_folders[0]))
    made = LatentReward(space, imitated, backbone.encode_text, **SHAPE)  # type: ignore[arg-type]
    made.mean.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    made.spread.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    return made.requires_grad_(requires_grad=False).eval()


@pytest.fixture
def latent_config(reward: LatentReward, make_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    reward.save(tmp_path / "latent")
    return lambda *more: make_config("reward.kind=latent", f"reward.path={tmp_path / 'latent'}", *more)


# ---------------------------------------------------------------------------------------------------------- the scores


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 8))
def test_pooling_undoes_spreading(batch: int, frames: int, stride: int) -> None:
    values = torch.arange(float(batch * frames)).view(batch, frames).sin()
    spread = spread_to_pixel_frames(values, stride)
    assert spread.shape == (batch, 1 + stride * (frames - 1))
    torch.testing.assert_close(pool_to_latent_frames(spread, stride), values)


def test_a_latent_frame_s_value_is_that_of_its_pixel_frames() -> None:
    assert spread_to_pixel_frames(torch.tensor([[5.0, 6.0, 7.0]]), 4).tolist() == [[5, 6, 6, 6, 6, 7, 7, 7, 7]]


def test_scores_by_name_at_their_own_levels(reward: LatentReward, batch: PromptBatch) -> None:
    said = reward.score_latents(batch.noise, batch.prompts)
    clip, frames = reward(batch.noise, reward.text(reward.encode_text(batch.prompts))[:, None])
    torch.testing.assert_close(said.clip, 1 + 0.1 * clip[:, 0, 0])
    torch.testing.assert_close(said.parts["alignment"], 2 + 0.2 * clip[:, 0, 1])
    torch.testing.assert_close(said.parts["quality"], 3 + 0.3 * clip[:, 0, 2])
    assert said.frames is not None
    torch.testing.assert_close(said.frames, 4 + 0.4 * frames[:, 0, [0, 1, 1, 1, 1]])


def test_gradient_reaches_every_latent_frame_and_is_right(reward: LatentReward, batch: PromptBatch) -> None:
    text = reward.text(reward.encode_text(batch.prompts[:1]))[:, None].double()
    reward = reward.double()
    latents = batch.noise[:1].double().requires_grad_()

    def score(latents: Tensor) -> Tensor:
        clip, frames = reward(latents, text)
        return clip[:, 0, 0].sum() + frames.square().sum()

    (gradient,) = torch.autograd.grad(score(latents), latents)
    assert (gradient.square().sum(dim=(0, 1, 3, 4)) > 1e-12).all()
    direction = torch.randn(latents.shape, generator=seeded(1), dtype=torch.float64)
    slope = (score(latents + 1e-6 * direction) - score(latents - 1e-6 * direction)) / 2e-6
    assert float((gradient * direction).sum()) == pytest.approx(float(slope.detach()), rel=1e-5)


def test_clips_are_judged_one_by_one_and_by_their_own_prompt(reward: LatentReward, batch: PromptBatch) -> None:
    together = reward.score_latents(batch.noise, batch.prompts).clip
    reward._texts.clear()
    alone = [reward.score_latents(batch.noise[i : i + 1], batch.prompts[i : i + 1]).clip for i in (1, 0)]
    torch.testing.assert_close(torch.cat(alone[::-1]), together)
    swapped = reward.score_latents(batch.noise, batch.prompts[::-1]).clip
    assert (swapped - together).abs().min() > 1e-5


def test_every_prompt_is_encoded_once(reward: LatentReward, batch: PromptBatch, backbone: WanBackbone) -> None:
    asked: list[Sequence[str]] = []

    def encode(prompts: Sequence[str]) -> TextCondition:
        asked.append(tuple(prompts))
        return backbone.encode_text(prompts)

    reward.encode_text = encode
    one, other = batch.prompts
    reward.score_latents(batch.noise, (one, one))
    reward.score_latents(batch.noise, (other, one))
    assert asked == [(one,), (other,)]


def test_padding_of_a_prompt_does_not_count(reward: LatentReward) -> None:
    embeds = torch.randn(1, 3, reward.space.text_width, generator=seeded(4))
    junk = torch.cat([embeds, torch.ones_like(embeds)], dim=1)
    zeros = torch.cat([embeds, torch.zeros_like(embeds)], dim=1)
    expected = reward.text(TextCondition(embeds))
    torch.testing.assert_close(reward.text(TextCondition(zeros)), expected)
    torch.testing.assert_close(reward.text(TextCondition(junk, torch.tensor([[1, 1, 1, 0, 0, 0]]))), expected)


# ------------------------------------------------------------------------------------------------------------- folders


def test_what_is_saved_scores_the_same(
    reward: LatentReward, space: LatentSpace, batch: PromptBatch, backbone: WanBackbone, tmp_path: Path
) -> None:
    reward.save(tmp_path)
    again = LatentReward.load(tmp_path, "cpu", backbone.encode_text, space)
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
        LatentReward.load(tmp_path, "cpu", reward.encode_text, replace(space, **change))
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
        ("config.json", "{}", "not a latent reward: its config.json has no 'space'"),
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
        LatentReward.load(tmp_path, "cpu", reward.encode_text, space)
    assert str(caught.value).startswith(f"{tmp_path}: {line}")
    assert "\n" not in str(caught.value)


def test_a_reward_that_imitates_nothing_known_is_refused(reward: LatentReward, tmp_path: Path) -> None:
    reward.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "imitates": {"kind": "taste"}}))
    with pytest.raises(UserError, match="names no reward that it imitates"):
        LatentReward.build(tmp_path, reward.encode_text)


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
        return DryRuns(cfg, Builders(prepare_base, build_roles), device, 1).plan(cfg, device)

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
def studio(tiny_wan: Path, backbone: WanBackbone, color_reward: Any, captions: tuple[str, ...]) -> Studio:
    cfg = LatentRewardTrainConfig.model_validate({
        "clip": {"num_frames": 5, "height": 32, "width": 32}, "model": str(tiny_wan), "reward": {"path": "-"},
        "other_prompts": 1, "sample_batch": 4, "optimizer": {"lr": 1e-3},
    })  # fmt: skip
    return Studio(cfg, backbone, color_reward, captions)


def test_scored_is_what_the_pixel_reward_says_of_each_prompt(studio: Studio, color_reward: Any) -> None:
    scored = studio.sampled(studio.backbone, 6, 1, [(2, 1.0), (3, 2.0)])
    assert (len(scored), scored.parts) == (6, ("color",))
    videos = studio.backbone.decode(scored.latents)
    for column in range(2):
        said = color_reward(videos, [studio.prompts[i] for i in scored.prompts[:, column].tolist()])
        torch.testing.assert_close(scored.clip[:, column, 0], said.clip)
        torch.testing.assert_close(scored.clip[:, column, 1], said.parts["color"])
        assert scored.frames is not None
        torch.testing.assert_close(scored.frames[:, column], pool_to_latent_frames(said.frames, 4))


def test_changed_clips_keep_their_own_prompts(studio: Studio) -> None:
    pool = studio.sampled(studio.backbone, 4, 1, [(2, 1.0)])
    same = studio.changed("copied clips", 8, 2, pool, lambda latents, *_: latents)
    for latents, place in zip(same.latents, same.prompts[:, 0], strict=True):
        (source,) = (i for i, kept in enumerate(pool.latents) if torch.equal(kept, latents))
        assert place == pool.prompts[source, 0]


def test_damage_changes_every_clip_in_one_of_its_ways() -> None:
    latents = torch.randn(64, 4, 3, 4, 4, generator=seeded(0))
    changed = damage(latents, [], seeded(1))
    others = latents.roll(1, dims=0)
    cut = ((changed == latents) | (changed == others)).flatten(1).all(dim=1)
    assert 8 <= int(cut.sum()) <= 26  # a quarter, about
    assert torch.equal(changed[cut][:, :, 0], latents[cut][:, :, 0])
    assert torch.equal(changed[cut][:, :, -1], others[cut][:, :, -1])
    assert (changed != latents).flatten(1).any(dim=1).all()


def test_climbing_goes_up_by_the_distance_at_most(reward: LatentReward, studio: Studio) -> None:
    latents = torch.randn(4, reward.space.channels, 2, 4, 4, generator=seeded(0))
    prompts = list(studio.prompts[:4])
    with torch.no_grad():
        higher = climb(reward, studio, 0.2)(latents.clone(), prompts, seeded(1))
        gain = reward.score_latents(higher, prompts).clip - reward.score_latents(latents, prompts).clip
    assert (gain > 0).all()
    assert ((higher - latents).square().mean(dim=(1, 2, 3, 4)).sqrt() <= 0.2).all()
    assert not higher.requires_grad


def test_scored_is_found_again_if_it_was_made_from_the_same(studio: Studio, tmp_path: Path) -> None:
    scored = studio.sampled(studio.backbone, 4, 1, [(2, 1.0)])
    scored.save(tmp_path / "pool.safetensors", "a")
    found = Scored.find(tmp_path / "pool.safetensors", "a")
    assert found is not None
    assert found.parts == scored.parts
    for name in ("latents", "prompts", "clip", "frames"):
        assert torch.equal(getattr(found, name), getattr(scored, name))
    assert Scored.find(tmp_path / "pool.safetensors", "b") is None
    assert Scored.find(tmp_path / "none.safetensors", "a") is None


def test_losses_are_zero_for_who_knows(reward: LatentReward, studio: Studio) -> None:
    texts = TextCondition.cat([studio.backbone.encode_text([prompt]) for prompt in studio.prompts])
    places = torch.randint(len(studio.prompts), (6, 2), generator=seeded(0))
    latents = torch.randn(6, reward.space.channels, 2, 4, 4, generator=seeded(1))
    with torch.no_grad():
        text = reward.text(texts.map(lambda part: part[places.flatten()])).unflatten(0, (6, 2))
        clip, frames = reward(latents, text)
    known = Scored(
        latents, places, reward.mean[:-1] + reward.spread[:-1] * clip, reward.mean[-1] + reward.spread[-1] * frames,
        reward.parts,
    )  # fmt: skip
    assert float(imitation_losses(reward, known, torch.arange(6), texts)["scores"]) == pytest.approx(0, abs=1e-9)
    metrics = agreement(reward, known, studio.prompts)
    assert metrics["rank_correlation"] == pytest.approx(1, abs=1e-5)
    assert metrics["frame_rank_correlation"] == pytest.approx(1, abs=1e-5)
    assert metrics["bias"] == pytest.approx(0, abs=1e-5)
    off = replace(known, clip=known.clip + 0.05, frames=None)  # half a spread of the clip's own
    assert agreement(reward, off, studio.prompts)["bias"] == pytest.approx(-0.05, abs=1e-5)
    assert float(imitation_losses(reward, off, torch.arange(6), texts)["scores"]) > 0.05


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
    with pytest.raises(AssertionError):
        torch.testing.assert_close(one["mean"], torch.zeros_like(one["mean"]))


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
