"""What is particular to Wan 2.2: two experts with a boundary between them, and the 5B model's timesteps and VAE."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor
from wan22_family import BOUNDARY, CLIP, build, load_lora, native_velocity, take_euler_steps

from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.experts import HIGH_NOISE, LOW_NOISE, expert_by_step
from rats_video.backbones.wan import WanBackbone
from rats_video.diffusion.rollout import rollout
from rats_video.diffusion.schedule import sigma_grid
from rats_video.errors import UserError
from rats_video.inference.sampler import SamplerSpec, sample_batch
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

pytestmark = pytest.mark.pipeline

PROMPTS = ["a fast red circle moving left on a gray background", "a slow green square"]
LORA = LoraConfig(kind="lora", rank=2, alpha=4)


@pytest.fixture(scope="module")
def a14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "a14b"
    build(folder, experts=True)
    return folder


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "5b"
    build(folder, experts=False)
    return folder


@pytest.fixture
def backbone(a14b: Path) -> WanBackbone:
    return WanBackbone.from_pretrained(a14b)


def stock(folder: Path) -> Any:
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    take_euler_steps(pipeline)
    return pipeline


def stock_sample(pipeline: Any, noise: Tensor, num_steps: int) -> Tensor:
    return pipeline(
        PROMPTS, latents=noise, num_inference_steps=num_steps, guidance_scale=1.0, output_type="latent",
        num_frames=CLIP.num_frames, height=CLIP.height, width=CLIP.width,
    ).frames  # fmt: skip


@torch.no_grad()
def our_sample(backbone: WanBackbone, noise: Tensor, num_steps: int) -> Tensor:
    return rollout(backbone.velocity, noise, sigma_grid(num_steps, 3.0), backbone.encode_text(PROMPTS)).x0


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------ two experts


def test_known_steps() -> None:
    grid = sigma_grid(4, 5.0)  # 1, 0.9375, 0.8333, 0.625, 0
    assert expert_by_step(grid, 0.875) == [HIGH_NOISE, HIGH_NOISE, LOW_NOISE, LOW_NOISE]
    assert expert_by_step(grid, 0.9375) == [HIGH_NOISE, HIGH_NOISE, LOW_NOISE, LOW_NOISE]  # the boundary is the high's
    assert expert_by_step(grid, 0.93751) == [HIGH_NOISE, LOW_NOISE, LOW_NOISE, LOW_NOISE]
    assert expert_by_step(grid, None) == [HIGH_NOISE] * 4


@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.75, 0.5, 1.0])  # most of them noise levels of the grid
@pytest.mark.parametrize("num_steps", [1, 4, 5])
def test_steps_fall_to_the_pipelines_expert(a14b: Path, backbone: WanBackbone, boundary: float, num_steps: int) -> None:
    pipeline = stock(a14b)
    pipeline.register_to_config(boundary_ratio=boundary)
    backbone.boundary_ratio = boundary
    theirs, ours = [], []
    for calls, experts in ((theirs, pipeline.components), (ours, backbone.parts)):
        for name in (HIGH_NOISE, LOW_NOISE):
            experts[name].register_forward_hook(lambda *_, name=name, calls=calls: calls.append(name))
    noise = backbone.sample_noise(2, CLIP, seeded(1))
    close(our_sample(backbone, noise, num_steps), stock_sample(pipeline, noise, num_steps))
    assert ours == theirs == expert_by_step(sigma_grid(num_steps, 3.0), boundary)


@pytest.mark.parametrize("scales", [(4.0, 3.0), (4.0, None), (1.0, 3.0), (3.0, 1.0)])
def test_each_expert_has_its_own_guidance(
    a14b: Path, backbone: WanBackbone, scales: tuple[float, float | None]
) -> None:
    first, second = scales
    noise = backbone.sample_noise(2, CLIP, seeded(4))
    _, ours = sample_batch(backbone, PROMPTS, noise, SamplerSpec(4, 3.0, first, "", second))
    theirs = stock(a14b)(
        PROMPTS, latents=noise, num_inference_steps=4, guidance_scale=first, guidance_scale_2=second,
        output_type="latent", num_frames=CLIP.num_frames, height=CLIP.height, width=CLIP.width,
    ).frames  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_one_expert_has_no_second_guidance(ti2v: Path) -> None:
    one = WanBackbone.from_pretrained(ti2v)
    with pytest.raises(UserError, match=r"^guidance_scale_2: this Wan has no second expert \(leave it out\)$"):
        sample_batch(one, PROMPTS, one.sample_noise(2, CLIP, seeded(4)), SamplerSpec(4, 3.0, 4.0, "", 3.0))


def test_a_batch_on_both_sides_is_split(a14b: Path, backbone: WanBackbone) -> None:
    noise = backbone.sample_noise(3, CLIP, seeded(2))
    sigma, prompts = torch.tensor([0.3, BOUNDARY, 0.874]), [*PROMPTS, ""]
    velocity = backbone.velocity(noise, sigma, backbone.encode_text(prompts))
    with torch.no_grad():
        close(velocity, native_velocity(stock(a14b), noise, sigma, prompts))
    velocity[1].sum().backward()
    high, low = (backbone.parts[name].proj_out.weight.grad for name in (HIGH_NOISE, LOW_NOISE))
    assert high.abs().max() > 0
    assert not low.any()


@pytest.mark.parametrize(
    ("grad_steps", "learning"), [(range(4), {HIGH_NOISE, LOW_NOISE}), ([0], {HIGH_NOISE}), ([3], {LOW_NOISE})]
)
def test_an_expert_learns_from_the_steps_it_makes(
    backbone: WanBackbone, grad_steps: Sequence[int], learning: set[str]
) -> None:
    student, noise = backbone.with_adapter("student", LORA), backbone.sample_noise(2, CLIP, seeded(3))
    text = student.encode_text(PROMPTS)
    path = rollout(student.velocity, noise, sigma_grid(4, 3.0), text, grad_steps=grad_steps)
    student.decode(path.x0).square().mean().backward()
    moved = {name.split(".")[0] for name, w in student.weights.items() if w.grad is not None and w.grad.any()}
    assert moved == learning


def test_both_experts_are_the_denoiser(backbone: WanBackbone) -> None:
    assert set(backbone.denoisers) == {HIGH_NOISE, LOW_NOISE}
    assert {name.split(".")[0] for name in backbone.weights} == {HIGH_NOISE, LOW_NOISE}
    assert all(weight.requires_grad for weight in backbone.weights.values())
    twin = backbone.with_own_denoiser()
    with torch.no_grad():
        for weight in twin.weights.values():
            weight.zero_()
    assert twin.boundary_ratio == BOUNDARY
    assert backbone.parts[LOW_NOISE].proj_out.weight.any()


def test_whole_students_of_two_experts(backbone: WanBackbone, tmp_path: Path) -> None:
    student, noise = backbone.with_own_denoiser(), backbone.sample_noise(2, CLIP, seeded(4))
    with torch.no_grad():
        for network in student.denoisers.values():
            network.proj_out.weight.mul_(1.5)
    student.save_role(tmp_path)
    again = backbone.load_role(tmp_path)
    assert torch.equal(our_sample(again, noise, 4), our_sample(student, noise, 4))
    shutil.rmtree(tmp_path / LOW_NOISE)
    with pytest.raises(UserError, match="no transformer_2/ in it"):
        backbone.load_role(tmp_path)


def test_one_lora_file_for_two_experts(a14b: Path, backbone: WanBackbone, tmp_path: Path) -> None:
    noise = backbone.sample_noise(2, CLIP, seeded(5))
    base = our_sample(backbone, noise, 4)
    student = backbone.with_adapter("student", LORA)
    assert torch.equal(our_sample(student, noise, 4), base)
    with torch.no_grad():
        for name, weight in student.weights.items():
            weight.add_(0.1 * torch.randn(weight.shape, generator=seeded(len(name))))
    student.save_role(tmp_path)
    ours = our_sample(student, noise, 4)
    assert (ours - base).abs().max() > 0.01
    assert torch.equal(our_sample(WanBackbone.from_pretrained(a14b).load_role(tmp_path), noise, 4), ours)

    pipeline = stock(a14b)
    load_lora(pipeline, tmp_path)
    close(stock_sample(pipeline, noise, 4), ours)


def test_folders_that_do_not_fit_their_boundary(a14b: Path, tmp_path: Path) -> None:
    shutil.copytree(a14b, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, LOW_NOISE: [None, None]}))  # as diffusers' script converts Wan 2.1
    with pytest.raises(UserError, match=r"boundary_ratio is 0.875, but there is no transformer_2"):
        WanBackbone.from_pretrained(tmp_path / "model")
    index.write_text(json.dumps({**content, "boundary_ratio": None}))  # diffusers never calls the second one then
    assert set(WanBackbone.from_pretrained(tmp_path / "model").denoisers) == {HIGH_NOISE}
    index.write_text(json.dumps(content))
    shutil.rmtree(tmp_path / "model" / LOW_NOISE)
    with pytest.raises(UserError, match="no transformer_2/ in it"):
        WanBackbone.from_pretrained(tmp_path / "model")


# -------------------------------------------------------------------------------------------------------------- 5B


def test_one_timestep_a_clip_equals_the_pipelines_one_a_token(ti2v: Path) -> None:
    pipeline, backbone, seen = stock(ti2v), WanBackbone.from_pretrained(ti2v), []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, __, options: seen.append(options["timestep"]), with_kwargs=True
    )
    noise = backbone.sample_noise(2, CLIP, seeded(6))
    close(our_sample(backbone, noise, 4), stock_sample(pipeline, noise, 4))
    assert noise.shape == (2, 6, 3, 2, 4)
    assert [tuple(timestep.shape) for timestep in seen] == [(2, 3 * 1 * 2)] * 4
    assert all((timestep == timestep[0, 0]).all() for timestep in seen)  # why one is enough


def test_encode_is_the_5b_vaes_normalised_mean(ti2v: Path) -> None:
    vae, backbone = stock(ti2v).vae, WanBackbone.from_pretrained(ti2v)
    videos = torch.rand(2, 9, 3, 32, 64, generator=seeded(7))
    mean, std = (torch.tensor(vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    latents = backbone.encode(videos)
    assert latents.shape == (2, *backbone.latent_shape(CLIP))
    with torch.no_grad():
        close(latents * std + mean, vae.encode(videos.transpose(1, 2) * 2 - 1).latent_dist.mean)
    assert backbone.decode(latents).shape == videos.shape


def test_5b_clips_divide_by_32(ti2v: Path) -> None:
    backbone = WanBackbone.from_pretrained(ti2v)
    assert backbone.spatial_stride == 16
    with pytest.raises(UserError, match="must be a multiple of 32, got 48"):
        backbone.latent_shape(ClipSpec(9, 48, 64, 8.0))
