"""What only CogVideoX does: 1000 noise levels of its own, which its native scheduler steps through as Euler does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cogvideox_family import COGVIDEOX_FAMILIES
from diffusers import CogVideoXDDIMScheduler
from torch import Tensor

from rats_video.backbones.cogvideox import CogVideoXBackbone
from rats_video.backbones.kinds import load_backbone
from rats_video.diffusion.schedule import sigma_grid
from rats_video.errors import UserError
from rats_video.inference.student import CARD, StudentCard, save_student
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

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
        cogvideox.velocity(torch.randn(6, 4, 1, 4, 4), sigma, text.map(lambda part: part.expand(6, -1, -1)))
    hook.remove()
    assert seen[0].tolist() == timesteps.tolist()
    assert not seen[0].is_floating_point()


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (9, 3), (49, 13)])
def test_latent_frames_are_odd(cogvideox: CogVideoXBackbone, frames: int, latent_frames: int) -> None:
    assert cogvideox.latent_shape(ClipSpec(frames, 16, 24, 8.0)) == (4, latent_frames, 4, 6)
    with pytest.raises(UserError, match=rf" 8, got {frames + 4} \(take {frames} or {frames + 8}\)$"):
        cogvideox.latent_shape(ClipSpec(frames + 4, 16, 24, 8.0))  # a pair decodes to 8 frames, not to 5


@pytest.mark.parametrize("change", [{"prediction_type": "epsilon"}, {"rescale_betas_zero_snr": False}])
def test_schedule_of_another_kind(cogvideox: CogVideoXBackbone, change: dict[str, Any]) -> None:
    configs = {"scheduler": {**cogvideox.parts["scheduler"].config, **change}}
    with pytest.raises(UserError, match=r"^x: scheduler/scheduler_config\.json: not a CogVideoX schedule"):
        CogVideoXBackbone.check({}, configs, "x")


def test_foreign_schedule_and_cogvideox_15_are_refused_before_their_weights_are_read(tmp_path: Path) -> None:
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
    config.write_text(json.dumps(json.loads(config.read_text()) | {"patch_size_t": 2}))
    with pytest.raises(UserError, match=r": transformer/config\.json: CogVideoX 1\.5, .* \(give CogVideoX-2b or"):
        load_backbone(tmp_path)
