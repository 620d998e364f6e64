"""Any objective in the same loop: which kinds there are, what an update of each costs, and the two without a network of
their own, ReFL and imitation, against what they should equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest
import torch
import yaml
from torch import Tensor, nn

from rats_video.backbones.wan import WanBackbone
from rats_video.diffusion.schedule import sigma_grid
from rats_video.distillation.method import build_method
from rats_video.distillation.roles import build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.methods.base import Method
from rats_video.training.batches import draw_batch
from rats_video.training.loop import train_loop
from rats_video.training.run_folder import RunFolder
from rats_video.types import Reward

MakeConfig = Callable[..., DistillConfig]
Make = Callable[..., tuple[Method, DistillConfig]]
GATE = "gate: {kind: sigmoid}"


@pytest.fixture
def make_method(loaded: WanBackbone, color_reward: Reward, make_config: MakeConfig) -> Make:
    """A method of the tiny model, with the colour reward."""

    def make(method: str, *overrides: str) -> tuple[Method, DistillConfig]:
        cfg = make_config(f"method={method}", *overrides)
        built = build_method(cfg, *build_roles(cfg, loaded.with_own_denoiser()))
        return replace(built, reward=color_reward), cfg  # type: ignore[type-var]

    return make


# ------------------------------------------------------------------------------------------------ what an update costs


class Calls:
    """Counts the network evaluations of clips, those with gradient as three; what backward repeats is not seen."""

    def __init__(self, *networks: nn.Module) -> None:
        self.count, self._networks, self._hooks = 0, dict.fromkeys(networks), ExitStack()

    def __enter__(self) -> Self:
        for network in self._networks:
            self._hooks.enter_context(network.register_forward_pre_hook(self._called, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _called(self, _network: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        clips = len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        self.count += clips * (3 if torch.is_grad_enabled() else 1)


COSTED = {
    "rats": f"{{{GATE}}}",
    "rats_without_reward": f"{{{GATE}, reward_weight: 0, policy: {{samples: 3}}}}",
    "rats_by_policy": f"{{{GATE}, policy: {{samples: 3, trained_share: 0.5}}}}",
    "imitation": "{kind: imitation}",
    "refl": "{kind: refl}",
    "refl_2": "{kind: refl, last_steps: 2}",
    "refl_all": "{kind: refl, last_steps: 9}",
    "grpo": "{kind: grpo, policy: {samples: 3}}",
    "grpo_some": "{kind: grpo, policy: {samples: 2, trained_share: 0.6}, kl_weight: 0.1}",
    "rtdmd": "{kind: rtdmd, policy: {samples: 2}}",
    "advdmd": "{kind: advdmd, policy_from: 0, policy_every: 1, policy: {samples: 2}, fake_score: {rounds: 2}}",
    "rtdmd_consistent": "{kind: rtdmd, policy: {samples: 2}, fake_score: {rounds: 1, consistency_weight: 1}}",
    "rtdmd_some": "{kind: rtdmd, policy: {samples: 3, trained_share: 0.5}, reward_weight: 0, fake_score: {rounds: 2}}",
}


@pytest.mark.parametrize("num_steps", [3, 4])
@pytest.mark.parametrize("kind", COSTED)
def test_the_count_is_the_calls(make_method: Make, captions: tuple[str, ...], kind: str, num_steps: int) -> None:
    scale = 1.0 if kind == "rtdmd" else 2.0  # a teacher without guidance is called once
    method, cfg = make_method(
        COSTED[kind], f"student.num_steps=[{num_steps}]", f"teacher.guidance_scale={scale}", "student.grad_steps=2"
    )
    batch = draw_batch(method.student, cfg, captions, 0)
    networks = [method.student.denoiser, method.teacher.backbone.denoiser]
    networks += [matching.fake.denoiser] if (matching := getattr(method, "matching", None)) else []
    with Calls(*networks) as calls:
        for critic in method.critics.values():
            for index in range(critic.rounds):
                critic.loss(batch, index)
        method.step(batch)
    assert calls.count == cfg.evaluations(num_steps)


# ---------------------------------------------------------------------------------------------------- ReFL, imitation


@pytest.mark.parametrize("last_steps", [1, 2, 9])
def test_refl_is_the_truncated_rollout(make_method: Make, captions: tuple[str, ...], last_steps: int) -> None:
    refl, cfg = make_method(
        f"{{kind: refl, last_steps: {last_steps}, reward_weight: 0.7}}", "student.grad_steps=1"
    )  # which steps carry gradient is ReFL's own K
    batch = draw_batch(refl.student, cfg, captions, 0)
    loss, row = refl.step(batch)
    text, sigmas, latents = refl.student.encode_text(batch.prompts), sigma_grid(4, 3.0), batch.noise
    for step in range(4):
        latents = latents.detach() if step == 4 - last_steps else latents
        slope = refl.student.velocity(latents, sigmas[step].expand(2), text)
        latents = latents + (sigmas[step + 1] - sigmas[step]) * slope
    by_hand = -0.7 * refl.reward(refl.student.decode(latents), batch.prompts).clip.mean()
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-6)
    assert row["loss"] == loss.item()
    assert row["reward/student"] == pytest.approx(-loss.item() / 0.7)
    ours, theirs = (torch.autograd.grad(each, list(refl.student.weights.values())) for each in (loss, by_hand))
    assert max(float(g.abs().max()) for g in theirs) > 1e-4
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-3)


def test_imitation_is_rats_without_reward_and_gate(
    make_method: Make, captions: tuple[str, ...], tmp_path: Path
) -> None:
    shaping = "shaping: {motion_weight: 0.3, horizon_weights: [1, 2, 3, 4]}"
    trained = []
    for name, settings in {
        "imitation": f"{{kind: imitation, {shaping}}}",
        "rats": f"{{kind: rats, alpha: 1, reward_weight: 0, gate: {{kind: constant, weight: 1}}, {shaping}}}",
    }.items():
        method, cfg = make_method(settings, "training.steps=3")
        before = {key: weight.detach().clone() for key, weight in method.student.weights.items()}
        (tmp_path / name).mkdir()
        train_loop(method, cfg, captions, RunFolder(tmp_path / name))
        trained.append(method.student.weights)
        assert not any(
            torch.equal(weight, before[key]) for key, weight in trained[-1].items() if weight.grad is not None
        )
    assert all(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())


# ------------------------------------------------------------------------------------------------------- configuration


def test_a_method_without_a_kind_is_rats(make_config: MakeConfig) -> None:
    tree = make_config().model_dump()
    assert tree["method"].pop("kind") == "rats"
    assert DistillConfig.model_validate(tree) == make_config()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("method={kind: grop}",), "method.kind: unknown kind 'grop' (did you mean 'grpo'?)"),
        (("method={kind: refl, gate: {kind: constant}}",), "method.gate: unknown key"),
        (("method={kind: refl}", "guard={on_alarm: shape}"), "strengthens the shaping of rats; refl has none"),
        (("method={kind: grpo}", "student.num_steps=[4, 1]"), "grpo learns from the steps before the last"),
        (("method={kind: grpo, policy: {samples: 1}}",), "method.policy.samples: must be at least 2"),
        (("method={kind: grpo, policy: {trained_share: 0}}",), "method.policy.trained_share: must be greater than 0"),
        (("method={kind: rtdmd, distribution_weight: 0}",), "method.distribution_weight: must be greater than 0"),
        (("method={kind: refl, last_steps: 0}",), "method.last_steps: must be at least 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(make_config: MakeConfig, settings: Sequence[str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        make_config(*settings)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plan_of_code_of_ones_own_is_one_line(command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = command("plan", "--config", "tiny", "--set", "method={kind: custom, target: 'my_module:Mine'}")
    assert (code, err.count("\n")) == (2, 1)
    assert "method.kind: is code of your own, which plan does not run (plan a packaged method)" in err


def test_a_run_from_before_there_were_kinds_goes_on(
    command: Callable[..., tuple[int, str, str]], config_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    start = ("distill", "--config", config_file, "--output", run)
    assert command(*start)[0] == 0
    resolved = run / "config.resolved.yaml"
    tree = yaml.safe_load(resolved.read_text())
    assert tree["method"].pop("kind") == "rats"
    resolved.write_text(yaml.safe_dump(tree))
    code, _, err = command(*start, "--resume", "--set", "training.steps=3")
    assert code == 0, err
    assert (run / "metrics.jsonl").read_text().count("\n") == 3
    tree["training"]["steps"] = 3
    resolved.write_text(yaml.safe_dump(tree))
    code, out, err = command("evaluate", run)
    assert code == 0, err
    assert "| student |" in out
