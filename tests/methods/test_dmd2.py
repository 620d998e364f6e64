"""DMD2 and what is added to it: its cost, its parts, its checkpoints, and what each option changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import write_cache
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import softplus

from rats_video.backbones.wan import WanBackbone
from rats_video.diffusion.flow import add_noise
from rats_video.distillation.method import build_method
from rats_video.distillation.roles import build_backbone, build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.methods.distribution_matching import DistributionMatching
from rats_video.methods.dmd2 import Dmd2
from rats_video.methods.draws import FAKE_SCORE, draw_noise
from rats_video.training.loop import train_loop
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.training.update import accumulate_gradient
from rats_video.types import ClipSpec

ROUNDS = ", fake_score: {rounds: 2, optimizer: {lr: 1.0e-3}}"
GAN = "gan: {weight: 0.1, fake_score_weight: 0.1}"
POLICY = "adversarial_reward: {weight: 0.5, policy: {samples: 2}}"
LORA = "student.weights={kind: lora, rank: 2, alpha: 4}"
METHODS = {
    "plain": "",
    "reward": ", reward_weight: 1.0",
    "gan": f", {GAN}",
    "policy": f", {GAN}, {POLICY}",
    "policy on a share of the steps": f", {GAN}, {POLICY.replace('samples: 2', 'samples: 2, trained_share: 0.5')}",
    "forced": ", data_forcing: 1.0, real_data: {path: CACHE, weight: 0}",
    "gan on real clips": f", {GAN}, real_data: {{path: CACHE, weight: 0}}",
}
Make = Callable[..., tuple[DistillConfig, Dmd2]]


@pytest.fixture(scope="module")
def cache(
    tmp_path_factory: pytest.TempPathFactory, tiny_wan: Path, loaded: WanBackbone, captions: tuple[str, ...],
    clip: ClipSpec,
) -> Path:  # fmt: skip
    return write_cache(tmp_path_factory.mktemp("caches") / "cache", tiny_wan, loaded, captions, clips=[clip])


@pytest.fixture
def make(build_dmd2: Callable[[DistillConfig], Dmd2], make_config: Callable[..., DistillConfig], cache: Path) -> Make:
    def call(options: str, *overrides: str) -> tuple[DistillConfig, Dmd2]:
        rounds = "" if "fake_score:" in options else ROUNDS
        method = f"method={{kind: dmd2{rounds}{options.replace('CACHE', str(cache))}}}"
        cfg = make_config(method, *overrides)
        return cfg, build_dmd2(cfg)

    return call


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("weights", ["full", "lora"])
def test_evaluations_are_the_calls(make: Make, draw: Callable[..., Any], name: str, weights: str) -> None:
    cfg, dmd = make(METHODS[name], *([LORA] if weights == "lora" else []))
    found = []

    def count(_network: object, inputs: tuple[Tensor, ...]) -> None:
        found.append(len(inputs[0]) * (3 if torch.is_grad_enabled() else 1))

    roles = (dmd.student, dmd.teacher.backbone, dmd.matching.fake)
    for network in {id(role.denoiser): role.denoiser for role in roles}.values():
        network.register_forward_pre_hook(count)
    steps = range(24) if name == "forced" else range(1)  # where they begin is drawn: a mean
    for step in steps:
        batch = draw(cfg, step)
        (critic,) = dmd.critics.values()
        for index in range(critic.rounds):
            critic.loss(batch, index)
        dmd.step(batch)
    assert sum(found) / len(steps) == pytest.approx(cfg.evaluations(4), rel=0.2 if name == "forced" else 1e-9)


ALL = f", reward_weight: 0.5, ida: 0.9, {GAN}, {POLICY}, data_forcing: 0.5, real_data: {{path: CACHE, weight: 0.1}}"


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_three_steps_and_two_more_are_five(make: Make, captions: tuple[str, ...], tmp_path: Path, weights: str) -> None:
    def train(folder: str, steps: int) -> list[dict[str, float]]:
        cfg, dmd = make(ALL, f"training.steps={steps}", *([LORA] if weights == "lora" else []))
        (tmp_path / folder).mkdir(exist_ok=True)
        train_loop(dmd, cfg, captions, RunFolder(tmp_path / folder))
        rows = read_metrics(tmp_path / folder / "metrics.jsonl")
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    whole, _, both = train("whole", 5), train("halves", 3), train("halves", 5)
    assert whole == both
    forced = ["reward/student" not in row for row in whole]
    assert any(forced)
    assert not all(forced)
    files = {path.name for path in (tmp_path / "whole/checkpoints/step-000005").glob("*.safetensors")}
    assert files == {f"{name}.safetensors" for name in ("fake_score", "fake_score-optimizer", "optimizer", "student")}
    for file in files:
        one, other = (load_file(tmp_path / run / "checkpoints/step-000005" / file) for run in ("whole", "halves"))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
        before = load_file(tmp_path / "halves/checkpoints/step-000003" / file)
        assert any(not torch.equal(tensor, before[name]) for name, tensor in one.items())
    assert any(name.startswith("discriminator.") for name in load_file(
        tmp_path / "whole/checkpoints/step-000005/fake_score.safetensors"
    ))  # fmt: skip


def test_a_base_in_host_memory_changes_nothing(
    make_config: Callable[..., DistillConfig], captions: tuple[str, ...], tmp_path: Path
) -> None:
    rows = []
    for offload in ("none", "block"):
        cfg = make_config(f"method={{kind: dmd2{ROUNDS}, {GAN}}}", LORA, f"compute.offload={offload}")
        dmd = build_method(cfg, *build_roles(cfg, build_backbone(cfg, torch.device("cpu"))))
        (tmp_path / offload).mkdir()
        train_loop(dmd, cfg, captions, RunFolder(tmp_path / offload))
        rows.append([{**row, "seconds": 0} for row in read_metrics(tmp_path / offload / "metrics.jsonl")])
    assert rows[0] == rows[1]


@pytest.mark.parametrize("options", ["", f", {GAN}, {POLICY}", ALL], ids=["plain", "policy", "all"])
def test_parts_add_up_to_the_whole(make: Make, draw: Callable[..., Any], options: str) -> None:
    for step in range(2):
        found = []
        for parts in (1, 2):  # each with its own teacher, which knows a part's rollout again
            cfg, dmd = make(options, "training.batch_size=4")
            (critic,) = dmd.critics.values()
            batch = draw(cfg, step)
            row = accumulate_gradient(lambda part, learn=critic.loss: learn(part, 1), batch, parts)  # type: ignore[misc]
            own = torch.cat([weight.grad.flatten() for weight in critic.weights.values() if weight.grad is not None])
            row |= accumulate_gradient(dmd.step, batch, parts)
            gradient = [weight.grad for weight in dmd.student.weights.values() if weight.grad is not None]
            found.append((own, torch.cat([each.flatten() for each in gradient]), row))
        (*whole, row), (*sums, its_row) = found
        for one, other in zip(whole, sums, strict=True):
            assert float((one - other).norm() / one.norm()) < 1e-4  # type: ignore[operator, union-attr]
        # A policy's loss is the difference of log-likelihoods near 1, each times an advantage in standard deviations of
        # rewards that differ by little: float32's last digit of a reward is 1e-5 of those. The gradient is held above.
        assert its_row == pytest.approx(row, rel=1e-4, abs=1e-5 if options == "" else 1e-4)


def test_fake_score_that_is_not_finite_leaves_the_step_out(
    make: Make, captions: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, dmd = make(", ida: 0.5", "training.steps=3", "training.checkpoint_every=1", "training.keep_checkpoints=3")
    calls, flow_error = [0], DistributionMatching.flow_error

    def broken(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        calls[0] += 1
        return flow_error(velocity, x0, noise) * (torch.nan if calls[0] == 3 else 1)  # the second step's first round

    monkeypatch.setattr(DistributionMatching, "flow_error", staticmethod(broken))
    train_loop(dmd, cfg, captions, RunFolder(tmp_path))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["faults/skipped"] for row in rows] == [0, 1, 0]
    for file in ("student", "optimizer", "fake_score", "fake_score-optimizer"):
        states = [load_file(tmp_path / f"checkpoints/step-00000{step}/{file}.safetensors") for step in (1, 2, 3)]
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
        assert any(not torch.equal(tensor, states[2][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_fake_score_follows_the_student(make: Make, weights: str) -> None:
    _, dmd = make(", ida: 0.9", *([LORA] if weights == "lora" else []))
    fake, student = dmd.matching.fake.weights, dmd.student.weights
    assert fake.keys() == student.keys()
    assert all(torch.equal(fake[name], weight) for name, weight in student.items())
    assert all(fake[name] is not weight for name, weight in student.items())
    with torch.no_grad():
        for weight in student.values():
            weight.add_(1.0)
    before = {name: weight.detach().clone() for name, weight in fake.items()}
    dmd.update_ema(1, resumed=True)
    assert all(torch.equal(fake[name], weight) for name, weight in before.items())
    dmd.update_ema(1)
    for name, weight in before.items():
        torch.testing.assert_close(fake[name].detach(), weight + 0.1)


def test_discriminators_losses_by_hand(make: Make, draw: Callable[..., Any]) -> None:
    cfg, dmd = make(f", {GAN}")
    _, plain = make("")
    assert dmd.gan is not None
    batch = draw(cfg)
    text = dmd.student.encode_text(batch.prompts)
    (loss, row), (flow, _) = (each.fake_score_loss(batch, 1) for each in (dmd, plain))
    with torch.no_grad():
        made = dmd.generate(batch, FAKE_SCORE, 1)
        latents, _, sigma = dmd.matching.renoise(made.x0, batch, FAKE_SCORE, 1)
        real = add_noise(dmd.teacher.rollout(batch).trajectory.x0, draw_noise(batch, 10**6 + 3, 1), sigma)
        student, other = dmd.gan(latents, sigma, text)[1], dmd.gan(real, sigma, text)[1]
        own = (softplus(student) + softplus(-other)).mean()
    torch.testing.assert_close(loss, flow + 0.1 * own)
    assert row["gan"] == pytest.approx(float(own))
    optimizer = torch.optim.Adam(dmd.critics["fake_score"].weights.values(), lr=1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        loss, row = dmd.fake_score_loss(batch, 1)
        loss.backward()
        optimizer.step()
    assert row["gan"] < 0.95 * float(own)
    assert row["real"] > row["student"]


def test_forced_rollout_begins_at_the_noised_real_clip(make: Make, draw: Callable[..., Any]) -> None:
    cfg, dmd = make(METHODS["forced"])
    sigmas, seen = dmd.student.sigmas(4, 3.0), []
    dmd.student.denoiser.register_forward_pre_hook(lambda _network, inputs: seen.append(inputs))
    lengths = set()
    for step in range(12):
        batch = draw(cfg, step)
        seen.clear()
        made = dmd.generate(batch, FAKE_SCORE, 0)
        latents, timestep, *_ = seen[0]
        first = 4 - len(seen)
        lengths.add(first)
        assert torch.equal(timestep, 1000 * sigmas[first].expand(2))
        noise = draw_noise(batch, FAKE_SCORE, 0, 2)
        assert made.real is not None
        torch.testing.assert_close(latents, (1 - sigmas[first]) * made.real + sigmas[first] * noise)
    assert lengths == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("options", "overrides", "expected"),
    [
        ("", ["teacher.kind=ema"], "teacher.kind: is the student's own average"),
        (", data_forcing: 0.5", [], "data_forcing needs real_data"),
        (f", {POLICY}", [], "it needs gan"),
        (", fake_score: {levels: [0.5, 0.2]}", [], "must rise within"),
    ],
)
def test_what_cannot_be_is_one_line(make: Make, options: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        make(options, *overrides)
    assert "\n" not in str(caught.value)
