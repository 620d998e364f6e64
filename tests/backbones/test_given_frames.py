"""Videos that start from a picture, against diffusers' own image-to-video pipelines: Wan 2.1, 2.2 A14B, 2.2 TI2V-5B."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shared import made_once
from torch import Tensor
from wan22_family import SHIFT, build
from wan_i2v_family import build_image_pipeline

from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.kinds import load_backbone
from rats_video.backbones.wan import WanBackbone
from rats_video.backbones.wan_i2v import WanImageBackbone
from rats_video.condition import Condition, GivenFrames
from rats_video.diffusion.rollout import rollout
from rats_video.diffusion.schedule import sigma_grid
from rats_video.distillation.roles import build_backbone
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.inference.sampler import SamplerSpec, sample_batch
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

pytestmark = pytest.mark.pipeline

CLIP = ClipSpec(num_frames=9, height=32, width=64, fps=8.0)
PROMPT = "a fast red circle"


@dataclass(frozen=True)
class Kind:
    build: Callable[[Path], None]
    backbone: type[PipelineBackbone]
    takes_last: bool = False


KINDS = {
    "wan21": Kind(partial(build_image_pipeline, clip_sees=1, experts=False), WanImageBackbone),
    "wan21-first-last": Kind(
        partial(build_image_pipeline, clip_sees=2, experts=False), WanImageBackbone, takes_last=True
    ),
    "wan22-a14b": Kind(partial(build_image_pipeline, clip_sees=0, experts=True), WanImageBackbone, takes_last=True),
    "wan22-5b": Kind(partial(build, experts=False), WanBackbone),
}


@dataclass(frozen=True)
class Case:
    kind: Kind
    folder: Path
    backbone: PipelineBackbone
    stock: Any


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    from diffusers import FlowMapEulerDiscreteScheduler, WanImageToVideoPipeline

    kind = KINDS[request.param]
    folder = made_once(tmp_path_factory, f"i2v-{request.param}", kind.build)
    stock = WanImageToVideoPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = FlowMapEulerDiscreteScheduler(shift=SHIFT)
    return Case(kind, folder, load_backbone(folder), stock)


@pytest.fixture(autouse=True)
def _no_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


def picture(seed: int) -> tuple[Image.Image, Tensor]:
    """A picture of the clip's size, and its pixels `[1, 3, height, width]`."""
    pixels = np.random.default_rng(seed).integers(0, 256, (CLIP.height, CLIP.width, 3), dtype=np.uint8)
    return Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def stock_sample(
    case: Case, noise: Tensor, *, steps: int, guidance_scale: float, last: bool, kind: str, second: float | None = None
) -> Tensor:
    return case.stock(
        picture(0)[0], PROMPT, num_inference_steps=steps, guidance_scale=guidance_scale, negative_prompt="",
        guidance_scale_2=second,
        height=CLIP.height, width=CLIP.width, num_frames=CLIP.num_frames, output_type=kind, latents=noise,
        last_image=picture(1)[0] if last else None, max_sequence_length=512,
    ).frames  # fmt: skip


def given(case: Case, *, last: bool) -> GivenFrames:
    return case.backbone.given_frames(CLIP, picture(0)[1], picture(1)[1] if last else None)


def test_its_folder_is_told_from_others(case: Case) -> None:
    assert type(case.backbone) is case.kind.backbone


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("pictures", ["first", "both"])
def test_clips_are_the_stock_pipelines(case: Case, guidance_scale: float, pictures: str) -> None:
    last = pictures == "both"
    if last and not case.kind.takes_last:
        pytest.skip("takes a first frame alone")
    if not last and case.backbone.parts["transformer"].config.pos_embed_seq_len:
        pytest.skip("takes both")
    backbone = case.backbone
    noise = backbone.sample_noise(1, CLIP, seeded(3))
    condition = backbone.encode_text([PROMPT]).with_given(given(case, last=last))
    path = rollout(
        backbone.velocity, noise, sigma_grid(3, SHIFT), condition,
        negative=backbone.encode_text([""]), guidance_scale=guidance_scale,
    )  # fmt: skip
    theirs = partial(stock_sample, case, noise, steps=3, guidance_scale=guidance_scale, last=last)
    torch.testing.assert_close(path.x0, theirs(kind="latent"), atol=2e-4, rtol=0)
    torch.testing.assert_close(backbone.decode(path.x0), theirs(kind="pt"), atol=2e-4, rtol=0)


def test_the_second_expert_has_its_own_guidance(case: Case) -> None:
    backbone, noise = case.backbone, case.backbone.sample_noise(1, CLIP, seeded(3))
    if case.kind is not KINDS["wan22-a14b"]:
        with pytest.raises(UserError, match="this Wan has no second expert"):
            backbone.guidance_by_level(3.5, 2.5)
        return
    frames = given(case, last=False)
    _, ours = sample_batch(backbone, [PROMPT], noise, SamplerSpec(4, SHIFT, 3.5, "", 2.5), given=frames)
    theirs = stock_sample(case, noise, steps=4, guidance_scale=3.5, second=2.5, last=False, kind="latent")
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


def test_another_picture_makes_another_clip(case: Case) -> None:
    if case.backbone.parts["transformer"].config.pos_embed_seq_len:
        pytest.skip("takes both")
    backbone, noise = case.backbone, case.backbone.sample_noise(1, CLIP, seeded(3))
    text = backbone.encode_text([PROMPT])
    clips = [
        rollout(
            backbone.velocity, noise, sigma_grid(2, SHIFT),
            text.with_given(backbone.given_frames(CLIP, picture(seed)[1])),
        ).x0
        for seed in (0, 1)
    ]  # fmt: skip
    assert (clips[0] - clips[1]).abs().mean() > 1e-2


def test_a_model_that_needs_a_picture_says_so(case: Case) -> None:
    noise = case.backbone.sample_noise(1, CLIP, seeded(3))
    text = case.backbone.encode_text([PROMPT])
    if case.kind.backbone is WanBackbone:  # makes videos from text as well
        assert case.backbone.velocity(noise, torch.tensor([0.5]), text).shape == noise.shape
        return
    with pytest.raises(UserError, match="makes a video from a picture, and none is given"):
        case.backbone.velocity(noise, torch.tensor([0.5]), text)


def test_a_text_model_takes_no_picture(tiny_wan: Path) -> None:
    backbone = load_backbone(tiny_wan)
    with pytest.raises(UserError, match=r"^image: Wan makes videos from text alone"):
        backbone.given_frames(CLIP, picture(0)[1])


def test_held_frames_stay_and_the_rest_goes_on(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = made_once(tmp_path_factory, "i2v-wan22-5b", KINDS["wan22-5b"].build)
    backbone = load_backbone(folder)
    frames = backbone.given_frames(CLIP, picture(0)[1])
    condition = backbone.encode_text([PROMPT]).with_given(frames)
    noise = backbone.sample_noise(1, CLIP, seeded(3))
    path = rollout(
        backbone.velocity, noise, sigma_grid(4, SHIFT), condition, keep=range(5), predict=range(4), grad_steps=()
    )
    assert frames.held is not None
    for latents in (*path.latents, *(path.predictions or path).latents):
        assert torch.equal(latents[:, :, 0], frames.held[:, :, 0])
    assert torch.equal(path.latents[0][:, :, 1:], noise[:, :, 1:])
    velocity = backbone.velocity(noise, torch.tensor([0.7]), condition)
    assert velocity[:, :, 0].eq(0).all()
    assert velocity[:, :, 1:].ne(0).any()
    held_in = noise.clone()
    held_in[:, :, 0] = 100.0  # what the caller has there counts for nothing
    assert torch.equal(backbone.velocity(held_in, torch.tensor([0.7]), condition), velocity)
    with pytest.raises(UserError, match="takes a first frame alone"):
        backbone.given_frames(CLIP, picture(0)[1], picture(1)[1])


def test_conditions_go_together_and_apart() -> None:
    parts = [
        Condition(
            torch.full((1, 2, 3), float(row)),
            given=GivenFrames(torch.full((1, 4, 3, 2, 2), float(row)), (True, False, False), image=torch.ones(1, 5, 6)),
        )
        for row in range(3)
    ]
    both = Condition.cat(parts)
    assert both.given is not None
    assert both.given.held is not None
    assert both.given.held[:, 0, 0, 0, 0].tolist() == both.embeds[:, 0, 0].tolist() == [0, 1, 2]
    assert both.given.is_held == (True, False, False)
    assert both.given.image is not None
    assert both.given.image.shape == (3, 5, 6)
    assert both.given.channels is None
    second = both.map(lambda part: part[1:2])
    latents = torch.full((1, 4, 3, 2, 2), 9.0)
    assert second.hold(latents)[0, 0, :, 0, 0].tolist() == [1, 9, 9]
    assert second.at_rest(latents)[0, 0, :, 0, 0].tolist() == [0, 9, 9]
    assert second.levels(torch.tensor([0.5])).tolist() == [[0, 0.5, 0.5]]
    assert latents.eq(9).all()
    alone = Condition(torch.zeros(1, 2, 3))
    assert alone.hold(latents) is alone.at_rest(latents) is latents
    assert alone.levels(torch.tensor([0.5])).tolist() == [0.5]


def test_a_run_without_pictures_refuses_a_model_that_needs_them(
    make_config: Callable[..., DistillConfig], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = made_once(tmp_path_factory, "i2v-wan22-a14b", KINDS["wan22-a14b"].build)
    with pytest.raises(UserError, match=r"^model: is a WanImageToVideoPipeline, whose videos start from pictures"):
        build_backbone(make_config(f"model={folder}"), torch.device("cpu"))
