"""DMD2 of a student that re-noises: single steps at drawn levels, from backward simulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rats_video.diffusion.flow import add_noise
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.methods.dmd2 import Dmd2
from rats_video.methods.draws import FAKE_SCORE, RENOISE, STUDENT_LEVEL, draw_noise
from rats_video.training.batches import slice_batch
from rats_video.training.loop import train_loop
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder

KIND = "method={kind: dmd2, fake_score: {rounds: 2, optimizer: {lr: 1.0e-3}}}"
SAMPLER = "student.sampler=renoise"
Make = Callable[..., tuple[DistillConfig, Dmd2]]


@pytest.fixture
def make(build_dmd2: Callable[[DistillConfig], Dmd2], make_config: Callable[..., DistillConfig]) -> Make:
    def call(*overrides: str) -> tuple[DistillConfig, Dmd2]:
        cfg = make_config(KIND, SAMPLER, *overrides)
        return cfg, build_dmd2(cfg)

    return call


@pytest.mark.parametrize("stream", [(STUDENT_LEVEL,), (FAKE_SCORE, 1)])
def test_a_clip_is_one_prediction_after_backward_simulation(
    make: Make, draw: Callable[..., Any], stream: tuple[int, ...]
) -> None:
    cfg, dmd = make()
    sigmas, levels = dmd.student.sigmas(4, cfg.shift), set()
    for step in range(10):
        batch = draw(cfg, step)
        calls: list[tuple[Tensor, bool]] = []

        hook = dmd.student.denoiser.register_forward_pre_hook(
            lambda _network, inputs, calls=calls: calls.append((inputs[1] / 1000, torch.is_grad_enabled()))
        )
        made = dmd.generate(batch, *stream)
        hook.remove()
        level = len(calls) - 1
        levels.add(level)
        assert [flag for _, flag in calls] == [False] * level + [True]
        torch.testing.assert_close(torch.stack([sigma[0] for sigma, _ in calls]), sigmas[: level + 1])
        text = dmd.student.encode_text(batch.prompts)
        latents = batch.noise if stream == (STUDENT_LEVEL,) else draw_noise(batch, *stream, 2)
        with torch.no_grad():  # written out
            for at in range(level + 1):
                clean = latents - sigmas[at] * dmd.student.velocity(latents, sigmas[at].expand(2), text)
                latents = add_noise(clean, draw_noise(batch, RENOISE, *stream, at), sigmas[at + 1].expand(2))
        torch.testing.assert_close(made.x0.detach(), clean)
    assert levels == {0, 1, 2, 3}


def test_the_count_is_the_mean_of_the_calls(make: Make, draw: Callable[..., Any]) -> None:
    cfg, dmd = make("student.grad_steps=[1, 3]", "teacher.guidance_scale=1")
    found: list[int] = []
    for role in (dmd.student, dmd.teacher.backbone, dmd.matching.fake):
        role.denoiser.register_forward_pre_hook(
            lambda _network, inputs: found.append(len(inputs[0]) * (3 if torch.is_grad_enabled() else 1))
        )
    steps, levels = 16, []
    for step in range(steps):
        batch = draw(cfg, step)
        for index in range(2):
            dmd.fake_score_loss(batch, index)
        dmd.step(batch)
        levels += [
            len(dmd.steps(batch, *stream)[0]) - 2 for stream in ((FAKE_SCORE, 0), (FAKE_SCORE, 1), (STUDENT_LEVEL,))
        ]
    assert set(levels) == {1, 3}
    a_clip = sum(levels) / steps + 3 + 2 * (1 + 3) + 2
    assert sum(found) / steps == pytest.approx(cfg.training.batch_size * a_clip)
    assert cfg.evaluations(4) == cfg.training.batch_size * (3 * 2 + 3 + 2 * (1 + 3) + 2)


def test_parts_of_a_batch_are_its_rows(make: Make, draw: Callable[..., Any]) -> None:
    cfg, dmd = make()
    batch = draw(cfg)
    whole = dmd.generate(batch, FAKE_SCORE, 0).x0
    parts = [dmd.generate(slice_batch(batch, slice(row, row + 1)), FAKE_SCORE, 0).x0 for row in range(2)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)


def test_two_steps_and_two_more_are_four(make: Make, captions: tuple[str, ...], tmp_path: Path) -> None:
    def train(folder: str, steps: int) -> list[dict[str, float]]:
        cfg, dmd = make(f"training.steps={steps}")
        (tmp_path / folder).mkdir(exist_ok=True)
        train_loop(dmd, cfg, captions, RunFolder(tmp_path / folder))
        rows = read_metrics(tmp_path / folder / "metrics.jsonl")
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    whole, _, both = train("whole", 4), train("halves", 2), train("halves", 4)
    assert whole == both


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("{kind: imitation}", "imitation learns from points of an Euler trajectory: set student.sampler=euler"),
        (
            "{kind: grpo}",
            r"grpo draws a share of the noise anew \(policy.noise=0.3, not 1\): set student.sampler=euler",
        ),
        ("{kind: grpo, policy: {noise: 1}}", ""),
        ("{kind: refl}", ""),
    ],
)
def test_methods_that_need_an_ode(make_config: Callable[..., DistillConfig], method: str, message: str) -> None:
    if not message:
        assert make_config(f"method={method}", SAMPLER).student.sampler == "renoise"
        return
    with pytest.raises(UserError, match=message):
        make_config(f"method={method}", SAMPLER)
