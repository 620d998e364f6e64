"""SenseFlow: each of its parts against the formula written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.diffusion.flow import add_noise
from rats_video.distillation.method import build_method
from rats_video.distillation.roles import build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.methods.draws import DISCRIMINATOR, FAKE_SCORE, RENOISE, STUDENT_LEVEL, draw_noise
from rats_video.methods.senseflow import SenseFlow
from rats_video.training.loop import train_loop
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.training.update import accumulate_gradient

GAN = "gan: {vision: {kind: word}, halvings: 1}"
ROUNDS = "fake_score: {rounds: 2, optimizer: {lr: 1.0e-3}}"
Make = Callable[..., tuple[DistillConfig, SenseFlow]]


@pytest.fixture
def make(loaded: WanBackbone, make_config: Callable[..., DistillConfig]) -> Make:
    def call(options: str, *overrides: str) -> tuple[DistillConfig, SenseFlow]:
        cfg = make_config(f"method={{kind: senseflow, {ROUNDS}{options}}}", *overrides)
        built = build_method(cfg, *build_roles(cfg, loaded.with_own_denoiser()))
        assert isinstance(built, SenseFlow)
        return cfg, built

    return call


def test_its_settings_are_the_published_ones(make_config: Callable[..., DistillConfig]) -> None:
    method = make_config("method={kind: senseflow}").method.model_dump()
    assert (method["ida"], method["isg_weight"], method["guidance"], method["from_real"]) == (
        0.97,
        1.0,
        (1.0, 8.0),
        0.5,
    )
    fake = method["fake_score"]
    assert (fake["rounds"], fake["levels"], fake["density"]) == (5, (0.001, 1.0), "logit_normal")
    gan = method["gan"]
    assert (gan["weight"], gan["halvings"], gan["vision"]["kind"]) == (2.0, 3, "dino_clip")
    assert gan["vision"]["layers"] == (0, 3, 6, 9, 11, 15, 20, 24)


@pytest.mark.parametrize("from_real", [0, 1])
def test_a_step_begins_at_a_simulated_or_a_real_clip(make: Make, draw: Callable[..., Any], from_real: int) -> None:
    cfg, method = make(f", gan: null, from_real: {from_real}")
    sigmas, levels = method.student.sigmas(4, cfg.shift), set()
    for index in range(6):
        batch = draw(cfg, index)
        for stream in ((STUDENT_LEVEL,), (FAKE_SCORE, 1)):
            made = method.one_step(batch, *stream)
            levels.add(made.level)
            text = method.student.encode_text(batch.prompts)
            noise = batch.noise if stream == (STUDENT_LEVEL,) else draw_noise(batch, *stream, 2)
            with torch.no_grad():
                if from_real:
                    here = sigmas[made.level].expand(2)
                    latents = add_noise(method.teacher.rollout(batch).trajectory.x0, noise, here)
                else:
                    latents = noise
                    for at in range(made.level):
                        clean = latents - sigmas[at] * method.student.velocity(latents, sigmas[at].expand(2), text)
                        latents = add_noise(clean, draw_noise(batch, RENOISE, *stream, at), sigmas[at + 1].expand(2))
                here = sigmas[made.level]
                clean = latents - here * method.student.velocity(latents, here.expand(2), text)
            torch.testing.assert_close(made.latents, latents)
            torch.testing.assert_close(made.x0.detach(), clean)
            assert made.x0.requires_grad
            assert not made.latents.requires_grad
    assert levels == {0, 1, 2, 3}


def test_the_loss_is_its_three_terms(make: Make, draw: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, method = make(f", {GAN}, isg_weight: 0.7, from_real: 0", "student.grad_steps=[1]")
    batch = draw(cfg)
    asked: list[float] = []
    teacher = method.teacher.velocity
    monkeypatch.setattr(
        type(method.teacher),
        "velocity",
        lambda _, *args: asked.append(args[3]) or teacher(*args),  # type: ignore[func-returns-value]
    )
    loss, row = method.step(batch)
    guidance = [method.draw_guidance(batch, use) for use in range(2)]
    assert asked == guidance
    assert all(1 <= scale <= 8 for scale in guidance if scale is not None)
    made, sigmas = method.one_step(batch, STUDENT_LEVEL), method.student.sigmas(4, cfg.shift)
    matching = method.matching.loss(made.x0, batch, guidance=guidance[0]).mean()
    assert row["matching/loss"] == pytest.approx(matching.item(), rel=1e-5)
    assert method.gan is not None
    real = method.teacher.backbone.decode(method.teacher.rollout(batch).trajectory.x0)
    logits = method.gan(method.student.decode(made.x0)[:, [0, 4]], real[:, [0, 4]], batch, DISCRIMINATOR)
    hinge = (1 - sigmas[1]) ** 2 * -logits.mean()
    assert row["gan/loss"] == pytest.approx(hinge.item(), rel=1e-4, abs=1e-7)
    whole = matching + 0.7 * row["isg/loss"] + 2 * hinge
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    loss.backward()
    assert all(weight.grad is None for weight in method.matching.fake.weights.values())


def test_intra_segment_guidance_by_hand(make: Make, draw: Callable[..., Any]) -> None:
    cfg, method = make(", gan: null, guidance: null, from_real: 0", "student.grad_steps=[2]")
    batch = draw(cfg)
    made = method.one_step(batch, STUDENT_LEVEL)
    sigma, end = method.student.sigmas(4, cfg.shift)[2:4]
    text = method.student.encode_text(batch.prompts)
    found = method.isg_loss(made, batch).item()

    def by_way_of(middle: Tensor) -> float:
        with torch.no_grad():
            slope = method.teacher.velocity(made.latents, sigma.expand(2), text)
            between = made.latents + (middle - sigma) * slope
            target = between + (end - middle) * method.student.velocity(between, middle.expand(2), text)
            landed = made.latents + (end - sigma) * method.student.velocity(made.latents, sigma.expand(2), text)
            return float(((landed - target).square() + 1e-6).sqrt().mean() - 1e-3)

    length = sigma - end
    ways = [by_way_of(end + length * share) for share in torch.linspace(0.05, 0.95, 181)]
    assert min(abs(way - found) for way in ways) < 0.01 * found  # by one of the levels within the step
    (gradient,) = torch.autograd.grad(method.isg_loss(made, batch), made.x0, retain_graph=True)
    assert 0 < float(gradient.abs().max()) <= float(length / sigma) / gradient.numel() * 1.001


def test_levels_are_logit_normal(make: Make, draw: Callable[..., Any]) -> None:
    cfg, method = make(", gan: null", "shift=1")
    fake = method.matching.cfg.model_copy(update={"levels": (0.2, 0.8)})
    matching = replace(method.matching, cfg=fake)
    levels = torch.cat([matching.renoise(draw(cfg).noise, draw(cfg, step), 1)[2] for step in range(60)])
    assert 0.2 < float(levels.min()) < float(levels.max()) < 0.8
    # The sigmoid of a normal number: mean 1/2, standard deviation 0.208, which the range makes 0.6 times that.
    assert levels.mean().item() == pytest.approx(0.5, abs=0.04)
    assert levels.std().item() == pytest.approx(0.125, abs=0.025)


def test_the_count_is_the_mean_of_the_calls(make: Make, draw: Callable[..., Any]) -> None:
    cfg, method = make(", gan: null, from_real: 0", "student.grad_steps=[1, 3]")
    found: list[int] = []
    for role in (method.student, method.teacher.backbone, method.matching.fake):
        role.denoiser.register_forward_pre_hook(
            lambda _network, inputs: found.append(len(inputs[0]) * (3 if torch.is_grad_enabled() else 1))
        )
    batch = draw(cfg)
    for index in range(2):
        method.fake_score_loss(batch, index)
    method.step(batch)
    calls = sum(found)
    levels = [method.one_step(batch, *stream).level for stream in ((FAKE_SCORE, 0), (FAKE_SCORE, 1), (STUDENT_LEVEL,))]
    # All simulations; then the step, its guidance by teacher (two calls) and student, both scores, and two rounds.
    assert calls == 2 * (sum(levels) + 3 + (2 + 1) + (2 + 1) + 2 * (1 + 3))
    assert cfg.evaluations(4) == cfg.training.batch_size * (3 * 2 + 3 + (2 + 1) + (2 + 1) + 2 * (1 + 3))


def test_the_fake_score_follows_the_student(make: Make) -> None:
    _, method = make(", gan: null")
    fake, student = method.matching.fake.weights, method.student.weights
    assert all(torch.equal(fake[name], weight) for name, weight in student.items())
    with torch.no_grad():
        for weight in student.values():
            weight.add_(1.0)
    before = {name: weight.detach().clone() for name, weight in fake.items()}
    method.update_ema(1)
    for name, weight in before.items():
        torch.testing.assert_close(fake[name].detach(), weight + 0.03)


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_two_steps_and_one_more_are_three(make: Make, captions: tuple[str, ...], tmp_path: Path, weights: str) -> None:
    lora = ["student.weights={kind: lora, rank: 2, alpha: 4}"] if weights == "lora" else []

    def train(folder: str, steps: int) -> list[dict[str, float]]:
        cfg, method = make(f", {GAN}", f"training.steps={steps}", *lora)
        (tmp_path / folder).mkdir(exist_ok=True)
        train_loop(method, cfg, captions, RunFolder(tmp_path / folder))
        rows = read_metrics(tmp_path / folder / "metrics.jsonl")
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    whole, _, both = train("whole", 3), train("halves", 2), train("halves", 3)
    assert whole == both
    assert {"isg/loss", "gan/loss", "fake_score/gan", "fake_score/flow"} <= whole[0].keys()


def test_parts_add_up_to_the_whole(make: Make, draw: Callable[..., Any]) -> None:
    found = []
    for parts in (1, 2):
        cfg, method = make(f", {GAN}", "training.batch_size=4", "student.grad_steps=[1]")
        (critic,) = method.critics.values()
        batch = draw(cfg)
        row = accumulate_gradient(lambda part, learn=critic.loss: learn(part, 1), batch, parts)  # type: ignore[misc]
        own = torch.cat([weight.grad.flatten() for weight in critic.weights.values() if weight.grad is not None])
        row |= accumulate_gradient(method.step, batch, parts)
        gradient = [weight.grad for weight in method.student.weights.values() if weight.grad is not None]
        found.append((own, torch.cat([each.flatten() for each in gradient]), row))
    (*whole, row), (*sums, its_row) = found
    for one, other in zip(whole, sums, strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-4  # type: ignore[operator, union-attr]
    assert its_row == pytest.approx(row, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("guidance: [8, 1]", "guidance .8.0, 1.0. must rise, above 0"),
        ("gan: {vision: {kind: dino}}", "method.gan.vision.kind: unknown kind 'dino'"),
        ("ida: 1", "method.ida: must be less than 1"),
    ],
)
def test_what_does_not_fit_is_one_line(make_config: Callable[..., DistillConfig], options: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make_config(f"method={{kind: senseflow, {options}}}")
    assert "\n" not in str(caught.value)
