"""The plan of every method against what runs: memory as the allocator counts it, network calls by hand."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from shared import made_once
from torch import nn
from torch.profiler import ProfilerActivity, profile
from wan22_family import build
from wan_i2v_family import build_image_pipeline

from rats_video.datasets.prompts.split import load_prompts
from rats_video.distillation.method import build_method
from rats_video.distillation.roles import build_backbone, build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.planning.devices import Device
from rats_video.planning.estimate import Plan, network_calls
from rats_video.planning.runs import PlanBuilder
from rats_video.training.loop import train_loop
from rats_video.training.run_folder import RunFolder

pytestmark = [pytest.mark.pipeline, pytest.mark.slow]

CPU = Device("cpu", 0, 0.1, 0.1, 0.1, 0.5)
LORA = ("student.weights.kind=lora", "student.weights.rank=4")
CHECKPOINTS = ("compute.activation_checkpointing=true", "compute.decode.checkpoint=true")
MakeConfig = Callable[..., DistillConfig]
Calls = Callable[..., dict[str, float]]


def planned(cfg: DistillConfig) -> Plan:
    return PlanBuilder(cfg, CPU, 1).plan(cfg, CPU)


def planned_peak(cfg: DistillConfig) -> float:
    return planned(cfg).memory.peak


def measured_peak(cfg: DistillConfig, folder: Path) -> int:
    """Bytes of weights and of whatever torch's allocator hands out in two steps of the real loop."""
    backbone = build_backbone(cfg, torch.device("cpu"))
    student, teacher = build_roles(cfg, backbone)
    method = build_method(cfg, student, teacher)
    modules = [each for each in (*backbone.parts.values(), method.reward) if isinstance(each, nn.Module)]
    modules += [student.denoiser, teacher.denoiser]
    if (matching := getattr(method, "matching", None)) is not None:
        modules += [matching.fake.denoiser]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    sizes = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    longest = max(load_prompts(cfg.prompts).train, key=len)
    gc.collect()  # what an earlier profile saw allocated, and this one saw freed, would count as less than nothing
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_loop(method, cfg, [longest], RunFolder(folder))
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return sum(sizes.values()) + peak


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("student.grad_steps=1", "clip.num_frames=9", CHECKPOINTS[0]),
        LORA,
        (*LORA, *CHECKPOINTS),
        (*LORA, "teacher.kind=ema", "training.batch_size=1"),
        (*LORA, *CHECKPOINTS, "compute.quantization=nf4"),
    ],
    ids=["full", "full checkpointed", "lora", "lora checkpointed", "one clip, ema", "nf4"],
)
def test_the_peak_is_what_the_allocator_counts(
    make_config: MakeConfig, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    cfg = make_config(*overrides)
    assert planned_peak(cfg) == pytest.approx(measured_peak(cfg, tmp_path), rel=0.08)  # the bar is 0.15


@pytest.mark.parametrize("kind", ["wan21", "wan22-5b"])
def test_clips_from_pictures_are_planned_with_them(
    make_config: MakeConfig, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    builds = {
        "wan21": partial(build_image_pipeline, clip_sees=1, experts=False), "wan22-5b": partial(build, experts=False),
    }  # fmt: skip
    folder = made_once(tmp_path_factory, f"i2v-{kind}", builds[kind])
    changes = (f"model={folder}", "clip={num_frames: 9, height: 32, width: 32}", "method.gate.level=clip", *LORA)
    cfg = make_config(*changes, "prompts={kind: shapes, first_frame: true}")
    plan = planned(cfg)
    assert plan.memory.peak == pytest.approx(measured_peak(cfg, tmp_path), rel=0.1)
    assert ("image encoder" in plan.memory.held) == (kind == "wan21")
    assert plan.tflops["pictures"] > 0
    if kind == "wan22-5b":
        without = planned(make_config(*changes, "prompts={kind: shapes}"))
        assert without.tflops["pictures"] == 0
        assert plan.tflops["teacher rollout"] > without.tflops["teacher rollout"]  # a modulation a token


METHODS = {
    "dmd2": ("method={kind: dmd2, gan: {}}",),
    "dmd2 lora, one clip at a time": ("method={kind: dmd2, reward_weight: 1}", *LORA, "training.micro_batch_size=1"),
    "advdmd": ("method={kind: advdmd, policy_every: 99}", "student.sampler=renoise"),
    "rtdmd": ("method={kind: rtdmd, policy: {samples: 3}}",),
    "dollar": ("method.kind=dollar", *LORA),
    "grpo": ("method={kind: grpo, kl_weight: 0.1}",),
    "consistency": ("method.kind=consistency", "teacher.num_steps=24"),
    "t2v_turbo": ("method={kind: t2v_turbo, video_reward: {kind: motion_smoothness}}", *LORA),
    "refl": ("method.kind=refl", *LORA),
    "imitation": ("method.kind=imitation",),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_peak_of_every_method_is_what_the_allocator_counts(
    make_config: MakeConfig, tmp_path: Path, name: str
) -> None:
    cfg = make_config(*METHODS[name])
    assert planned_peak(cfg) == pytest.approx(measured_peak(cfg, tmp_path), rel=0.15)


@pytest.fixture
def calls(make_config: MakeConfig) -> Calls:
    """Network evaluations a clip and step of a configuration."""

    def count(*overrides: str) -> dict[str, float]:
        cfg = make_config(*overrides)
        return network_calls(cfg, PlanBuilder(cfg, CPU, 1).calls(cfg), cfg.method.critic_rounds)

    return count


def test_network_calls_by_hand(calls: Calls) -> None:
    assert calls("teacher.num_steps=50") == {"teacher": 100, "student": 4}  # guided: two evaluations a step
    assert calls("teacher.num_steps=50", "teacher.guidance_scale=1", "student.num_steps=[3, 5]")["teacher"] == 50
    assert calls("student.num_steps=[3, 5, 8]")["student"] == pytest.approx(16 / 3)
    assert calls("teacher.num_steps=50", "teacher.reuse=4")["teacher"] == 25
    fading = ("teacher.kind=ema", "teacher.num_steps=10", "teacher.guidance_scale=3", "training.steps=100")
    assert calls(*fading, "teacher.guidance_fade_steps=50")["teacher"] == 15  # guided for half of the run
    assert calls(*fading, "teacher.guidance_end=2")["teacher"] == 20


def test_network_calls_of_the_rivals_by_hand(calls: Calls) -> None:
    both = "student.num_steps=[2, 4]"
    assert calls("method={kind: dmd2, fake_score: {rounds: 2}}", both) == {"student": 3, "scores": 3, "critic": 8}
    found = calls("method={kind: dmd2, fake_score: {rounds: 2}}", both, "student.sampler=renoise")
    assert found == {"student": 2, "scores": 3, "critic": 6}  # to a level: 1.5 of 2 steps, 2.5 of 4
    found = calls("method={kind: dmd2, fake_score: {rounds: 2}, gan: {}}", "teacher.num_steps=10")
    assert found == {"teacher": 20, "student": 4, "scores": 4, "critic": 12}  # a round: 4, the student's, the real
    found = calls("method={kind: senseflow, fake_score: {rounds: 2}, gan: null}", "teacher.num_steps=10")
    assert found == {"student": 3.5, "scores": 5, "critic": 7}  # to a level: 2.5 of 4 steps, and one for the guidance
    found = calls("method={kind: rtdmd, policy: {samples: 3}, fake_score: {rounds: 2}}", both)
    assert found == {"student": 9, "scores": 9, "critic": 8}
    assert calls("method={kind: dollar, pairs: {count: 2}, fake_score: {rounds: 1}}", "teacher.num_steps=10", both) == {
        "teacher": 20, "student": 7, "scores": 3, "critic": 4,
    }  # fmt: skip
    assert calls("method={kind: grpo, policy: {samples: 3}}", both) == {"student": 9}
    found = calls("method={kind: grpo, policy: {samples: 3}, kl_weight: 0.1}", both)
    assert found == {"student": 9, "scores": 6}  # the base's, at each noisy step
    found = calls("method={kind: consistency, pairs: {count: 2}, reward_weight: 1}", "teacher.num_steps=10")
    assert found == {"teacher": 20, "student": 8}  # two for each pair, and a rollout for the reward
    assert calls("method.kind=refl", both) == {"student": 3}
