"""Clips whose score is not finite: nothing of them reaches the weights, they are counted, and too many end the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.methods.gate import build_gate
from rats_video.methods.rats import Rats, rats_step
from rats_video.methods.teacher import TeacherSampler
from rats_video.optim import OptimizerConfig
from rats_video.training.batches import draw_batch
from rats_video.training.faults import StepFault
from rats_video.training.loop import train_loop
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.training.settings import TrainingConfig
from rats_video.training.skipped import SkippedClips
from rats_video.training.update import accumulate_gradient
from rats_video.types import PromptBatch, Reward, RewardScores

MakeConfig = Callable[..., DistillConfig]


class Failing:
    """A reward that has no number for one prompt, and there an infinite slope."""

    def __init__(self, reward: Reward, bad: str, kinds: str = "clip frames") -> None:
        self._reward, self._bad, self._kinds = reward, bad, kinds

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        scores = self._reward(videos, prompts)
        assert scores.frames is not None
        rows = [row if p != self._bad else self._broken(row) for row, p in zip(scores.frames, prompts, strict=True)]
        frames = torch.stack(rows) if "frames" in self._kinds else scores.frames
        clip = torch.stack(rows).mean(dim=1) if "clip" in self._kinds else scores.clip
        return RewardScores(clip, frames, {"color": torch.stack(rows)[:, 0] if "part" in self._kinds else clip})

    @staticmethod
    def _broken(row: Tensor) -> Tensor:
        return (row - row.detach()).sqrt() / 0


@pytest.fixture
def make_rats(
    backbone: WanBackbone, color_reward: Reward, make_config: MakeConfig
) -> Callable[..., tuple[Rats, DistillConfig]]:
    base = backbone.with_own_denoiser()
    with torch.no_grad():
        for parameter in backbone.denoiser.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))

    def make(
        *overrides: str, student: Reward = color_reward, teacher: Reward = color_reward
    ) -> tuple[Rats, DistillConfig]:
        cfg = make_config(*overrides)
        sampler = TeacherSampler(base, teacher, cfg.teacher, cfg.shift)
        gate = build_gate(cfg.method.gate, backbone.temporal_stride)
        return Rats(backbone, sampler, student, gate, cfg.method, cfg.student, cfg.shift), cfg

    return make


Make = Callable[..., tuple[Rats, DistillConfig]]


def pick(batch: PromptBatch, rows: Sequence[int]) -> PromptBatch:
    return replace(
        batch, prompts=tuple(batch.prompts[i] for i in rows), noise=batch.noise[list(rows)],
        seeds=tuple(batch.seeds[i] for i in rows), index=batch.index + 1,
    )  # fmt: skip


def gradient(rats: Rats, loss: Tensor) -> Tensor:
    grads = torch.autograd.grad(loss, list(rats.student.weights.values()), allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
@pytest.mark.parametrize(
    "options",
    [("method.policy={samples: 2}",), ("method.reward_margin=0.1",), ("method.gate={kind: constant}",)],
    ids=["policy", "margin", "constant"],
)
def test_the_gradient_is_that_of_the_others(
    make_rats: Make, color_reward: Reward, captions: tuple[str, ...], capsys: pytest.CaptureFixture[str],
    who: str, options: tuple[str, ...],
) -> None:  # fmt: skip
    _, cfg = make_rats(*options)
    good, _ = make_rats(*options)
    batch = replace(draw_batch(good.student, cfg, captions, 0), prompts=captions[:2])
    batch = replace(batch, noise=batch.noise[[0, 1]])
    failing = Failing(color_reward, captions[1])
    roles = ["student", "teacher"] if who == "both" else [who]
    rats, _ = make_rats(*options, **dict.fromkeys(roles, failing))
    loss, row = rats_step(rats, batch)
    rest, others = rats_step(good, pick(batch, [0]))
    assert loss.item() == pytest.approx(rest.item() / 2, abs=1e-6)
    ours, theirs = gradient(rats, loss), gradient(good, rest) / 2
    assert theirs.norm() > 1e-3
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)
    assert row["reward/skipped"] == 0.5
    assert others["reward/skipped"] == 0
    for name in ("reward/student", "reward/teacher", "gate/weight", "shaping/0.000", "reward/student/color"):
        assert row[name] == pytest.approx(others[name] / 2, abs=1e-6)
    assert capsys.readouterr().err == (
        f"warning: reward: clip left out, its score is not a finite number: {captions[1]!r}\n"
    )


@pytest.mark.parametrize("kind", ["frames", "part"])
def test_frames_and_parts_must_be_finite_too(
    make_rats: Make, color_reward: Reward, batch: PromptBatch, kind: str
) -> None:
    rats, _ = make_rats(student=Failing(color_reward, batch.prompts[0], kind))
    loss, row = rats_step(rats, batch)
    assert row["reward/skipped"] == 0.5
    assert gradient(rats, loss).isfinite().all()


def test_what_the_denoiser_did_wrong_is_not_excused(make_rats: Make, batch: PromptBatch) -> None:
    """A diverged student has no finite score either, but leaving its clips out would hide it."""
    rats, _ = make_rats()
    broken = batch.noise.clone()
    broken[0] = torch.inf
    loss, _ = rats_step(rats, replace(batch, noise=broken))
    assert loss.isnan()


def test_parts_agree(make_rats: Make, color_reward: Reward, captions: tuple[str, ...]) -> None:
    failing = Failing(color_reward, captions[0])
    found, rows = [], []
    for parts in (1, 4):
        rats, cfg = make_rats("training.batch_size=4", student=failing, teacher=failing)
        batch = replace(draw_batch(rats.student, cfg, captions, 0), prompts=captions[:4])
        rats.student.denoiser.zero_grad()
        rows.append(accumulate_gradient(rats.step, batch, parts))
        found.append(torch.cat([weight.grad.flatten() for weight in rats.student.weights.values()]))  # type: ignore[union-attr]
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 1e-5
    assert rows[1] == pytest.approx(rows[0], rel=1e-4, abs=1e-6)
    assert rows[0]["reward/skipped"] == 0.25


# ------------------------------------------------------------------------------------------------------- over a run


def training(**options: int) -> TrainingConfig:
    return TrainingConfig(optimizer=OptimizerConfig(lr=1.0), batch_size=8, **options)  # type: ignore[arg-type]


def test_the_log_shows_the_mean_over_the_others() -> None:
    row = {"loss": 3.0, "reward/skipped": 0.25, "reward/student": 1.5, "gate/weight": 0.6, "shaping/0.000": 0.3}
    assert SkippedClips(training(), 0).count(row, 0) == pytest.approx(
        {"loss": 3.0, "reward/skipped": 2, "reward/student": 2.0, "gate/weight": 0.8, "shaping/0.000": 0.4}
    )


def test_too_many_end_the_run() -> None:
    skipped = SkippedClips(training(max_skipped=4), 1)
    skipped.count({"reward/skipped": 0.25}, 0)
    skipped.count({"reward/skipped": 0.125}, 1)
    with pytest.raises(UserError, match=r"^reward: 5 clips had no finite score by step 3, .*max_skipped is 4; earlier"):
        skipped.count({"reward/skipped": 0.125}, 2)


def test_a_step_without_any_score_is_no_step() -> None:
    skipped = SkippedClips(training(max_skipped=0), 0)
    with pytest.raises(StepFault, match=r"^no clip has a finite score$"):
        skipped.count({"reward/skipped": 1.0}, 0)
    assert skipped.count({"reward/skipped": 0.0}, 1) == {"reward/skipped": 0}  # none of its clips is counted


def test_a_resumed_run_goes_on_counting(
    make_rats: Make, color_reward: Reward, captions: tuple[str, ...], tmp_path: Path
) -> None:
    few, failing = captions[:3], Failing(color_reward, captions[0])
    rats, cfg = make_rats("training.batch_size=4")
    expected = [draw_batch(rats.student, cfg, few, step).prompts.count(captions[0]) for step in range(5)]
    assert sum(expected[:2]) > 0
    assert 4 not in expected
    assert sum(expected[2:]) > 0
    run = RunFolder(tmp_path)

    def train(steps: int, most: int) -> list[float]:
        options = (f"training.steps={steps}", f"training.max_skipped={most}", "training.checkpoint_every=1")
        rats, cfg = make_rats("training.batch_size=4", *options, student=failing)
        train_loop(rats, cfg, few, run)
        return [row["reward/skipped"] for row in read_metrics(run.metrics)]

    assert train(2, sum(expected)) == expected[:2]
    last = max(step for step in range(5) if expected[step])
    with pytest.raises(UserError, match=rf"^reward: {sum(expected)} clips had no .* by step {last + 1},"):
        train(5, sum(expected) - 1)
    assert (run.checkpoints / f"step-{last:06d}" / "state.json").is_file()
    assert train(5, sum(expected)) == expected  # each counted once
