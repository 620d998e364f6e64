"""Student and teacher as adapters on one base: trained, resumed, saved, and the same in diffusers' own pipeline."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rats_video.backbones.wan import WanBackbone
from rats_video.distillation.method import build_rats
from rats_video.distillation.roles import build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.inference.sampler import SamplerSpec, clip_noise, sample_videos
from rats_video.methods.rats import Rats
from rats_video.training.loop import train_loop
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.types import ClipSpec

LORA = ("student.weights.kind=lora", "student.weights.rank=4", "student.weights.alpha=8")
TEACHERS = {
    "frozen": LORA,
    "ema": (*LORA, "teacher.kind=ema", "teacher.num_steps=4", "teacher.decay=0.5"),
}
Train = Callable[..., Rats]


@pytest.fixture
def train(
    loaded: WanBackbone, make_config: Callable[..., DistillConfig], captions: tuple[str, ...], tmp_path: Path
) -> Train:
    def call(folder: str, *overrides: str) -> Rats:
        (tmp_path / folder).mkdir(exist_ok=True)
        cfg = make_config("training.optimizer.lr=0.02", *overrides)
        rats = build_rats(cfg, *build_roles(cfg, loaded.with_own_denoiser()))
        train_loop(rats, cfg, captions, RunFolder(tmp_path / folder))
        return rats

    return call


@pytest.mark.parametrize("teacher", TEACHERS)
def test_two_steps_and_two_more_are_four(train: Train, tmp_path: Path, teacher: str) -> None:
    torch.manual_seed(1)
    whole = train("whole", "training.steps=4", *TEACHERS[teacher])
    torch.manual_seed(2)  # adapters start where the run's seed says, not torch's
    train("halves", "training.steps=2", *TEACHERS[teacher])
    both = train("halves", "training.steps=4", *TEACHERS[teacher])
    rows = [[{**row, "seconds": 0} for row in read_metrics(tmp_path / name / "metrics.jsonl")]
            for name in ("whole", "halves")]  # fmt: skip
    assert rows[0] == rows[1]
    for one, other in ((whole.student, both.student), (whole.teacher.backbone, both.teacher.backbone)):
        assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())


@pytest.mark.parametrize("teacher", TEACHERS)
def test_only_the_students_adapter_trains(
    train: Train, loaded: WanBackbone, captions: tuple[str, ...], clip: ClipSpec, teacher: str
) -> None:
    rats = train("run", "training.steps=2", *TEACHERS[teacher])
    student, other = rats.student, rats.teacher.backbone
    assert student.denoiser is other.denoiser
    assert {id(weight) for weight in student.denoiser.parameters() if weight.requires_grad} == {
        id(weight) for weight in student.weights.values()
    }
    noise, text, sigma = clip_noise(loaded, clip, 0, 0), loaded.encode_text(captions[:1]), torch.full((1,), 0.7)
    with torch.no_grad():
        base = loaded.velocity(noise, sigma, text)
        trained, taught = (role.velocity(noise, sigma, text) for role in (student, other))
    assert not torch.allclose(trained, base, atol=1e-4)
    assert torch.allclose(taught, base, atol=1e-6) == (teacher == "frozen")
    if teacher == "ema":  # 0.5 * (0.5 * start + 0.5 * first) + 0.5 * second: between where it began and the student
        b = next(name for name in student.weights if ".lora_B" in name)
        assert 0 < other.weights[b].norm() < student.weights[b].norm()


def test_an_average_of_bfloat16_adapters_is_float32(
    loaded: WanBackbone, make_config: Callable[..., DistillConfig]
) -> None:
    cfg = make_config(*TEACHERS["ema"], "student.weights.dtype=bfloat16")
    student, teacher = build_roles(cfg, loaded.with_own_denoiser())
    assert {weight.dtype for weight in student.weights.values()} == {torch.bfloat16}
    assert {weight.dtype for weight in teacher.weights.values()} == {torch.float32}
    assert all(torch.equal(weight, student.weights[name].float()) for name, weight in teacher.weights.items())


def test_targets_that_no_layer_has_are_one_line(loaded: WanBackbone, make_config: Callable[..., DistillConfig]) -> None:
    with pytest.raises(UserError, match=r"^student.weights.targets: no layer of the denoiser is called to_z \(null"):
        build_roles(make_config(*LORA, "student.weights.targets=[to_z]"), loaded.with_own_denoiser())


def test_stock_pipeline_with_the_lora_file_makes_the_same_clip(
    train: Train, tiny_wan: Path, captions: tuple[str, ...], clip: ClipSpec, tmp_path: Path
) -> None:
    from diffusers import FlowMapEulerDiscreteScheduler, WanPipeline

    student = train("run", "training.steps=2", *TEACHERS["ema"]).student
    student.save_role(tmp_path / "lora")
    (ours,) = sample_videos(student, captions[:1], clip, SamplerSpec(4, 3.0), seed=3)

    pipe = WanPipeline.from_pretrained(tiny_wan)
    pipe.scheduler = FlowMapEulerDiscreteScheduler(shift=3.0)
    pipe.set_progress_bar_config(disable=True)

    def stock() -> torch.Tensor:
        frames: torch.Tensor = pipe(
            prompt=captions[0], latents=clip_noise(student, clip, 3, 0), num_inference_steps=4, guidance_scale=1.0,
            num_frames=clip.num_frames, height=clip.height, width=clip.width, output_type="pt",
        ).frames  # fmt: skip
        return frames

    bare = stock()
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(stock(), ours.videos, atol=1e-5, rtol=0)
    assert (bare - ours.videos).abs().max() > 1e-3


def test_distill_sample_and_evaluate(
    command: Callable[..., tuple[int, str, str]], config_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = [item for setting in (*LORA, "compute.cache_text=true") for item in ("--set", setting)]
    arguments = ["distill", "--config", config_file, "--output", run, "--device", "cpu", *settings]
    code, _, err = command(*arguments)
    assert code == 0, err
    assert re.match(r"distill on cpu: student LoRA, [\d,]+ weights train; precision float32; attention native", err)
    assert (run / "student" / "pytorch_lora_weights.safetensors").is_file()
    assert '"attention": "native"' in (run / "environment.json").read_text()
    code, _, err = command(*arguments, "--resume")
    assert code == 0, err
    code, _, err = command(
        "sample", "--model", run, "--nfe", "4", "--prompt", "a red circle", "--output", tmp_path / "clips"
    )
    assert code == 0, err
    code, out, err = command("evaluate", run, "--nfe", "4", "--num-clips", "2")
    assert code == 0, err
    assert "student" in out
