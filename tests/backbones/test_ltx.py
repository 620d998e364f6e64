"""What only LTX-Video does: frames a second, a decoder that looks ahead and wants a little noise, its own shift."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from ltx_family import CLIP, LTX_095, LTX_FAMILIES

from rats_video.backbones.compute import DecodeConfig
from rats_video.backbones.ltx import LTXBackbone
from rats_video.distillation.compute import memory_advice
from rats_video.distillation.roles import build_backbone
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.seeds import seeded

pytestmark = pytest.mark.pipeline

NATIVE_SHIFT = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096}


@pytest.fixture(scope="module", params=LTX_FAMILIES, ids=lambda family: family.name)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ltx") / request.param.name
    request.param.build(path)
    return path


@pytest.fixture(scope="module")
def ltx(folder: Path) -> LTXBackbone:
    return LTXBackbone.from_pretrained(folder)


def decode_config(make_config: Callable[..., DistillConfig], folder: Path, *overrides: str) -> DistillConfig:
    size = (f"clip.{key}={getattr(CLIP, key)}" for key in ("num_frames", "height", "width"))
    return make_config(f"model={folder}", *size, "clip.fps=12", *overrides)


def test_frames_a_second_reach_the_velocity_of_every_role(
    make_config: Callable[..., DistillConfig], folder: Path
) -> None:
    ltx = build_backbone(decode_config(make_config, folder), torch.device("cpu"))
    noise, text = ltx.sample_noise(1, CLIP, seeded(0)), ltx.encode_text(["a red circle"])
    seen: list[Any] = []
    ltx.denoiser.rope.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[-2]))
    with torch.no_grad():
        for role in (ltx, ltx.with_own_denoiser()):
            role.velocity(noise, torch.ones(1), text)
    assert seen == [(8 / 12, 32, 32)] * 2


def test_no_window_of_the_decoder_is_exact(
    make_config: Callable[..., DistillConfig], folder: Path, ltx: LTXBackbone
) -> None:
    with pytest.raises(UserError, match=r"^compute\.decode\.window: [^\n]*LTX-Video[^\n]*$"):
        build_backbone(decode_config(make_config, folder, "compute.decode.window=2"), torch.device("cpu"))
    with pytest.raises(ValueError, match="no window"):
        ltx.decode(torch.zeros(1, 8, 3, 2, 2), range(1, 2))


def test_nothing_waits_on_the_host_between_frames(make_config: Callable[..., DistillConfig], folder: Path) -> None:
    cfg = decode_config(make_config, folder, "compute.decode.checkpoint=true", "compute.decode.offload=true")
    with pytest.raises(UserError, match=r"^compute\.decode\.offload: LTX-Video's VAE is not decoded frame by frame"):
        build_backbone(cfg, torch.device("cpu"))
    advice = memory_advice(decode_config(make_config, folder, "compute.decode.checkpoint=true"))
    assert "compute.activation_checkpointing=true" in advice
    assert "decode.offload" not in advice
    assert "decode.window" not in advice


def test_pixels_lie_around_their_own_latent_frame(ltx: LTXBackbone) -> None:
    """The decoder looks as far ahead as back from the eight pixel frames that the causal map gives a latent frame."""
    latents = torch.randn(1, 8, 25, 1, 1, generator=seeded(1))
    other = latents.clone()
    other[:, :, 12] += 1
    with torch.no_grad():
        differs = (ltx.decode(latents) - ltx.decode(other)).abs().amax(dim=(0, 2, 3, 4)).nonzero()[:, 0]
    first, last = int(differs[0]), int(differs[-1])
    assert 0 < first < 8 * 11 + 1
    assert 8 * 12 < last < 8 * 24
    assert 8 * 11 + 1 - first == last - 8 * 12


def test_decode_depends_on_the_clip_alone(ltx: LTXBackbone) -> None:
    latents = torch.randn(3, 8, 3, 2, 2, generator=seeded(2))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with torch.no_grad():
        together = ltx.decode(latents)
        alone = torch.cat([ltx.decode(clip) for clip in latents.split(1)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert torch.equal(torch.rand(1), expected)  # the caller's randomness is untouched


def test_checkpointed_decode_is_exact_and_saves_less(ltx: LTXBackbone) -> None:
    latents = torch.randn(1, 8, 3, 2, 2, generator=seeded(3)).requires_grad_()
    saved, outcomes = [], []
    for checkpoint in (False, True):
        backbone, held = copy.copy(ltx), {}
        backbone.decoding = DecodeConfig(checkpoint=checkpoint)

        def hold(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            videos = backbone.decode(latents)
        saved.append(sum(held.values()))
        outcomes.append((videos, *torch.autograd.grad(videos.square().sum(), latents)))
    for ours, theirs in zip(*outcomes, strict=True):
        assert torch.equal(ours, theirs)
    assert saved[1] < 0.6 * saved[0]  # the last convolution, which is kept, weighs much in one so small


@pytest.mark.parametrize("tokens", [1024, 7392])
def test_native_grid_is_ours_with_shift_exp_mu(ltx: LTXBackbone, tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **NATIVE_SHIFT)
    mu = calculate_shift(tokens, 1024, 4096, 0.95, 2.05)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4), mu=mu)
    torch.testing.assert_close(ltx.sigmas(4, math.exp(mu)), scheduler.sigmas)


def test_095_is_told_by_its_vae_whatever_its_pipeline_is_called(tmp_path: Path) -> None:
    LTX_095.build(tmp_path)
    index = tmp_path / "model_index.json"
    content = json.loads(index.read_text())
    assert content["_class_name"] == "LTXConditionPipeline"
    index.write_text(json.dumps(content | {"_class_name": "LTXPipeline"}))
    backbone = LTXBackbone.from_pretrained(tmp_path)
    assert (backbone.text_limit, backbone.pipelines) == (256, ("LTXConditionPipeline",))
    backbone.fps = 24.0
    places = backbone._places(torch.zeros(1, 8, 3, 1, 2))["video_coords"]
    assert places[0, 0].tolist() == pytest.approx([0, 0, 1 / 24, 1 / 24, 9 / 24, 9 / 24])  # seconds
    assert places[0, 2].tolist() == [0, 32] * 3  # pixels
