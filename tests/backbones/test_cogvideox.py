"""What only CogVideoX does: 1000 noise levels of its own, which its native scheduler steps through as Euler does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cogvideox_family import COGVIDEOX_FAMILIES
from diffusers import CogVideoXDDIMScheduler
from shared import made_once
from torch import Tensor

from rats_video.backbones.cogvideox import CogVideoXBackbone
from rats_video.backbones.kinds import load_backbone
from rats_video.diffusion.schedule import sigma_grid
from rats_video.errors import UserError
from rats_video.hub import CARD
from rats_video.inference.student import StudentCard, save_student
from rats_video.methods.base import StepsConfig
from rats_video.methods.gate import SigmoidGateConfig, build_gate
from rats_video.methods.imitation import Imitation, ImitationConfig
from rats_video.methods.rats import Rats, RatsConfig, rats_step
from rats_video.methods.scoring import score_clips
from rats_video.methods.shaping import ShapingConfig, shaping_by_horizon
from rats_video.methods.student import student_rollout
from rats_video.methods.teacher import FrozenTeacherConfig, TeacherSampler
from rats_video.rewards.latent import LatentReward, LatentSpace
from rats_video.rewards.word import WordRewardConfig
from rats_video.seeds import seeded
from rats_video.types import ClipSpec, PromptBatch, RewardScores

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module", params=COGVIDEOX_FAMILIES, ids=lambda family: family.name)
def cogvideox(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CogVideoXBackbone:
    folder = tmp_path_factory.mktemp("cogvideox") / request.param.name
    request.param.build(folder)
    return CogVideoXBackbone.from_pretrained(folder)


def levels(scheduler: Any) -> Tensor:
    """`s / (a + s)` of every timestep, in double precision."""
    signal, noise = scheduler.alphas_cumprod.double().sqrt(), (1 - scheduler.alphas_cumprod.double()).sqrt()
    return noise / (signal + noise)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 5, 8, 50])
def test_native_step_is_an_euler_step_on_the_straight_path(cogvideox: CogVideoXBackbone, num_steps: int) -> None:
    """x = a x0 + s noise and v = a noise - s x0; y = x / (a + s) moves by the difference of sigma times velocity."""
    scheduler = cogvideox.parts["scheduler"]
    scheduler.set_timesteps(num_steps)
    generator = seeded(0)
    for timestep in scheduler.timesteps.tolist():
        x, v = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
        before = float(scheduler.alphas_cumprod[timestep])
        later = timestep - 1000 // num_steps
        after = float(scheduler.alphas_cumprod[later]) if later >= 0 else 1.0
        (a, s), (a_next, s_next) = ((signal**0.5, (1 - signal) ** 0.5) for signal in (before, after))
        velocity = (s * x + a * v) - (a * x - s * v)
        euler = x / (a + s) + (s_next / (a_next + s_next) - s / (a + s)) * velocity
        stepped = scheduler.step(v, timestep, x, return_dict=False)[0] / (a_next + s_next)
        torch.testing.assert_close(euler, stepped, atol=1e-12, rtol=0)


def test_levels_are_the_schedules_own(cogvideox: CogVideoXBackbone) -> None:
    table = levels(cogvideox.parts["scheduler"])
    for num_steps in (1, 4, 8, 48):
        ours, grid = cogvideox.sigmas(num_steps, 3.0), sigma_grid(num_steps, 3.0)
        assert ours[0] == 1
        assert ours[-1] == 0
        distance = (ours[:-1, None].double() - table).abs().amin(dim=1)
        assert distance.max() < 1e-7
        nearest = (grid[:-1, None].double() - table).abs().amin(dim=1)
        torch.testing.assert_close((ours - grid).abs()[:-1].double(), nearest, atol=1e-6, rtol=0)


def test_a_students_card_has_its_own_levels(cogvideox: CogVideoXBackbone, tmp_path: Path) -> None:
    save_student(cogvideox, StudentCard("base", (4,), 3.0, {}, steps=1, seed=0), tmp_path / "student")
    sigmas = json.loads((tmp_path / "student" / CARD).read_text())["sigmas"]["4"]
    assert sigmas == cogvideox.sigmas(4, 3.0).tolist()
    assert sigmas != sigma_grid(4, 3.0).tolist()


@pytest.mark.parametrize(("few", "many"), [(4, 48), (3, 48), (5, 50), (8, 48)])
def test_snapped_grids_still_nest(cogvideox: CogVideoXBackbone, few: int, many: int) -> None:
    assert torch.equal(cogvideox.sigmas(few, 3.0), cogvideox.sigmas(many, 3.0)[:: many // few])


def test_two_levels_on_one_timestep(cogvideox: CogVideoXBackbone) -> None:
    with pytest.raises(UserError, match=r"^shift: 500 solver steps of shift 1\.0 meet at one of CogVideoX's timesteps"):
        cogvideox.sigmas(500, 1.0)


def test_velocity_calls_the_network_at_the_levels_own_timestep(cogvideox: CogVideoXBackbone) -> None:
    seen: list[Tensor] = []
    hook = cogvideox.denoiser.time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    text, timesteps = cogvideox.encode_text(["a red circle"]), torch.tensor([0, 1, 13, 499, 998, 999])
    sigma = levels(cogvideox.parts["scheduler"])[timesteps].float()
    with torch.no_grad():
        cogvideox.velocity(torch.randn(6, 4, 2, 4, 4), sigma, text.map(lambda part: part.expand(6, -1, -1)))
    hook.remove()
    assert seen[0].tolist() == timesteps.tolist()
    assert not seen[0].is_floating_point()


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (9, 3), (49, 13)])
def test_latent_frames_are_odd_and_one_more_fills_pairs(
    cogvideox: CogVideoXBackbone, frames: int, latent_frames: int
) -> None:
    latent_frames += cogvideox.patch_size[0] - 1
    assert cogvideox.latent_shape(ClipSpec(frames, 16, 24, 8.0)) == (4, latent_frames, 4, 6)
    with pytest.raises(UserError, match=rf" 8, got {frames + 4} \(take {frames} or {frames + 8}\)$"):
        cogvideox.latent_shape(ClipSpec(frames + 4, 16, 24, 8.0))  # a pair decodes to 8 frames, not to 5


@pytest.mark.parametrize("change", [{"prediction_type": "epsilon"}, {"rescale_betas_zero_snr": False}])
def test_schedule_of_another_kind(cogvideox: CogVideoXBackbone, change: dict[str, Any]) -> None:
    configs = {"scheduler": {**cogvideox.parts["scheduler"].config, **change}}
    with pytest.raises(UserError, match=r"^x: scheduler/scheduler_config\.json: not a CogVideoX schedule"):
        CogVideoXBackbone.check({}, configs, "x")


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> CogVideoXBackbone:
    family = COGVIDEOX_FAMILIES[2]
    return CogVideoXBackbone.from_pretrained(made_once(tmp_path_factory, family.name, family.build))


@pytest.mark.parametrize(("name", "most", "size"), [("height", 32, (48, 24)), ("width", 48, (16, 64))])
def test_clip_beyond_the_positions_of_15(
    paired: CogVideoXBackbone, name: str, most: int, size: tuple[int, int]
) -> None:
    assert paired.latent_shape(ClipSpec(9, 32, 48, 16.0)) == (4, 4, 8, 12)
    with pytest.raises(
        UserError, match=rf"^clip\.{name}: this model has positions for {most} at most, got {max(size)} "
    ):
        paired.latent_shape(ClipSpec(9, *size, 16.0))


@pytest.mark.parametrize(("window", "frames"), [(range(1), 1), (range(2), 1), (range(1, 3), 2), (range(4, 6), 5)])
def test_a_window_on_the_frame_that_pads_is_one_on_the_first(
    paired: CogVideoXBackbone, window: range, frames: int
) -> None:
    latents = torch.randn(1, 4, 6, 4, 6, generator=seeded(0), requires_grad=True)
    plain = paired.vae.decode(latents[:, :, 1:].detach() / 0.7).sample
    videos = paired.decode(latents, window)
    torch.testing.assert_close(videos, (plain.transpose(1, 2) / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    videos.sum().backward()
    assert latents.grad is not None
    reached = (latents.grad.abs().amax(dim=(0, 1, 3, 4)) > 0).nonzero().flatten().tolist()
    chunk = {1: [1, 2, 3], 2: [1, 2, 3], 5: [4, 5]}[frames]  # the first three are decoded together
    assert reached == chunk


class Brightness:
    """A reward of pixels: the mean of each frame."""

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:  # noqa: ARG002
        return RewardScores(videos.mean(dim=(1, 2, 3, 4)), videos.mean(dim=(2, 3, 4)))


def test_a_step_of_15_weighs_its_hidden_frame_as_the_first(paired: CogVideoXBackbone) -> None:
    reward, student = Brightness(), paired.with_own_denoiser()
    with torch.no_grad():
        for weight in student.weights.values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=seeded(7)))
    few = FrozenTeacherConfig(kind="frozen", num_steps=2)
    config = RatsConfig(gate=SigmoidGateConfig(kind="sigmoid", tau=0.01))
    rats = Rats(
        student, TeacherSampler(paired, reward, few, 2.0), reward, StepsConfig(num_steps=(2,)), 2.0, config=config,
        gate=build_gate(config.gate, paired.temporal_stride),
    )  # fmt: skip
    batch = PromptBatch(0, ("red",), paired.sample_noise(1, ClipSpec(17, 16, 24, 16.0), seeded(0)), num_steps=2)
    teacher, ours = rats.teacher.rollout(batch), student_rollout(rats, batch)
    weight = rats.gate(teacher.scores, reward(student.decode(ours.x0), batch.prompts))
    assert weight.shape == (1, 5)
    assert weight.std() > 0.01
    shaping = shaping_by_horizon(ours, teacher.trajectory, ShapingConfig(motion_weight=0.5)).mean(dim=0)
    expected = (weight[:, [0, 0, 1, 2, 3, 4]] * shaping).mean() - reward(student.decode(ours.x0), ()).clip.mean()
    torch.testing.assert_close(rats_step(rats, batch)[0], expected)


def test_no_reward_scores_the_hidden_frame_whatever_the_method(paired: CogVideoXBackbone) -> None:
    """All methods score by `score_clips`: pixels or latents, of the first frame and no earlier one."""
    clip, judge = ClipSpec(17, 16, 24, 16.0), Brightness()
    space = LatentSpace("CogVideoX", "", 4, paired.spatial_stride, paired.temporal_stride, 17, 16, 24)
    latent = LatentReward(space, WordRewardConfig(kind="word", path="x"), judge, width=4, blocks=1, coarse=4)
    for reward in (judge, latent):
        latents = paired.sample_noise(1, clip, seeded(1)).requires_grad_()
        score_clips(reward, paired, latents, ["red"]).clip.sum().backward()
        assert latents.grad is not None
        assert (latents.grad.abs().amax(dim=(0, 1, 3, 4)) > 0).tolist() == [False, True, True, True, True, True]


def test_losses_on_latents_count_the_hidden_frame_of_the_first_frames_tokens(paired: CogVideoXBackbone) -> None:
    """The network reads and writes both as one token: unmatched, the hidden half would spoil the other step by step."""
    student, judge = paired.with_own_denoiser(), Brightness()
    with torch.no_grad():
        for weight in student.weights.values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=seeded(7)))
    teacher = TeacherSampler(paired, judge, FrozenTeacherConfig(kind="frozen", num_steps=2), 2.0)
    method = Imitation(
        student, teacher, judge, StepsConfig(num_steps=(2,)), 2.0, config=ImitationConfig(kind="imitation")
    )
    batch = PromptBatch(0, ("red",), paired.sample_noise(1, ClipSpec(17, 16, 24, 16.0), seeded(0)), num_steps=2)
    path = teacher.rollout(batch).trajectory
    apart = shaping_by_horizon(student_rollout(method, batch), path, ShapingConfig(motion_weight=0.5))
    assert apart.shape == (2, 1, 6)
    torch.testing.assert_close(method.step(batch)[0], apart.mean())


def test_15_is_trained_and_sampled_with_its_hidden_frame(paired: CogVideoXBackbone) -> None:
    """One shape of latents from pixels and from noise; the frame that pads is the first again."""
    clip = ClipSpec(17, 16, 24, 16.0)
    latents = paired.encode(torch.rand(1, 17, 3, 16, 24, generator=seeded(0)))
    assert latents.shape == paired.sample_noise(1, clip, seeded(0)).shape == (1, 4, 6, 4, 6)
    assert torch.equal(latents[:, :, 0], latents[:, :, 1])
    assert not torch.equal(latents[:, :, 1], latents[:, :, 2])


def test_foreign_schedules_and_patches_are_refused_before_their_weights_are_read(tmp_path: Path) -> None:
    COGVIDEOX_FAMILIES[0].build(tmp_path)
    for weights in tmp_path.glob("*/*.safetensors"):
        weights.write_bytes(b"not to be read")
    CogVideoXDDIMScheduler(prediction_type="epsilon").save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UserError, match=r": scheduler/scheduler_config\.json: not a CogVideoX schedule"):
        load_backbone(tmp_path)
    CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True).save_pretrained(
        tmp_path / "scheduler"
    )
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"patch_size_t": 3}))
    with pytest.raises(
        UserError, match=r": transformer/config\.json: patch_size_t is 3, which no CogVideoX has \(needs"
    ):
        load_backbone(tmp_path)
