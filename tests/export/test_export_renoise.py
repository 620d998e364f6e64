"""Exports of students that re-noise: diffusers' LCM scheduler at their levels, ComfyUI's lcm on the card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cogvideox_family import COGVIDEOX_FAMILIES
from family import Family
from flux_family import FLUX
from safetensors import safe_open
from sd3_family import SD3
from wan_family import WAN

from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.kinds import load_backbone
from rats_video.backbones.stock import _shift_of_lcm
from rats_video.commands.export_model import ExportRequest, run_export_model
from rats_video.diffusion.schedule import sigma_grid
from rats_video.errors import UserError
from rats_video.inference.student import StudentCard, save_student
from rats_video.seeds import seeded

SHIFT = 2.0


def student(family: Family, folder: Path) -> Path:
    family.build(folder / "base-model")
    role = load_backbone(folder / "base-model").with_adapter("student", LoraConfig(kind="lora", rank=2, alpha=6))
    generator = seeded(7)
    with torch.no_grad():
        for weight in role.weights.values():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    clip = family.clip
    size = {"num_frames": clip.num_frames, "height": clip.height, "width": clip.width, "fps": clip.fps}
    card = StudentCard(str(folder / "base-model"), (2, 4), SHIFT, size, steps=7, seed=3, sampler="renoise")
    save_student(role, card, folder / "student")
    return folder / "student"


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
def test_the_scheduler_alone_makes_our_grid(num_steps: int, shift: float) -> None:
    from diffusers import FlowMatchLCMScheduler

    sigmas = sigma_grid(num_steps, shift)
    end = float(sigmas[-2]) if num_steps > 1 else None
    scheduler = FlowMatchLCMScheduler(shift=_shift_of_lcm(num_steps, shift), shift_terminal=end)
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(scheduler.sigmas, sigmas, atol=1e-6, rtol=0)
    torch.testing.assert_close(scheduler.timesteps, 1000 * sigmas[:-1], atol=1e-3, rtol=0)


def test_many_calls_at_a_large_shift_are_refused_in_one_line() -> None:
    assert _shift_of_lcm(20, 30.0) == pytest.approx(14.666, abs=1e-3)
    with pytest.raises(UserError, match=r"no settings for 64 calls at shift 30 \(export with fewer --nfe\)"):
        _shift_of_lcm(64, 30.0)


@pytest.mark.pipeline
def test_code_of_the_card_repeats_its_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler draws from the global generator, which pipelines hand no `generator`."""
    run_export_model(ExportRequest("diffusers", str(student(WAN, tmp_path)), output=tmp_path / "out"), "cpu")
    (code,) = re.findall(r"```python\n(.*?)\n```", (tmp_path / "out/README.md").read_text(), re.DOTALL)
    assert code.count('pipe.to("cuda" if torch.cuda.is_available() else "cpu")') == 1
    monkeypatch.chdir(tmp_path)
    clips = []
    for _ in range(2):
        made: dict[str, Any] = {}
        exec(code.replace('output_type="pil"', 'output_type="pt"').partition("frames[0].save")[0], made)
        clips.append(made["frames"])
    assert torch.equal(*clips)


@pytest.mark.pipeline
@pytest.mark.parametrize("family", [WAN, SD3, FLUX], ids=lambda family: family.name)
def test_stock_pipelines_make_our_clips_of_the_same_noise(family: Family, tmp_path: Path) -> None:
    source = student(family, tmp_path)
    assert json.loads((source / "rats.json").read_text())["sampler"] == "renoise"
    for form in ("diffusers", "lora"):
        lines = run_export_model(ExportRequest(form, str(source), output=tmp_path / form), "cpu")
        assert any("relative difference of the latents" in line for line in lines)  # or it would have been refused
        about = json.loads((tmp_path / form / "scheduler/scheduler_config.json").read_text())
        assert about["_class_name"] == "FlowMatchLCMScheduler"
        card = (tmp_path / form / "README.md").read_text()
        assert "fresh noise is put for the next" in card
        assert ("num_inference_steps=4 alone" in card) == (family is not FLUX)
        assert json.loads((tmp_path / form / "rats.json").read_text())["sampler"] == "renoise"
    with safe_open(tmp_path / "lora/pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["rats_video"])["sampler"] == "renoise"


@pytest.mark.pipeline
def test_cogvideox_is_refused_in_one_line(tmp_path: Path) -> None:
    source = student(COGVIDEOX_FAMILIES[1], tmp_path)
    with pytest.raises(UserError, match="takes no scheduler that draws fresh noise, as this student does"):
        run_export_model(ExportRequest("diffusers", str(source), output=tmp_path / "out"), "cpu")
    assert not (tmp_path / "out").exists()
