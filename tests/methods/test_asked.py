"""A teacher asked about a share of the clips: who is asked, that the loss has the mean of the full one, and its log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.distillation.method import build_rats
from rats_video.distillation.roles import build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.methods.base import LogRow
from rats_video.methods.rats import Rats
from rats_video.methods.teacher import FrozenTeacherConfig
from rats_video.training.asking import GATE, AskedShare
from rats_video.training.batches import ask_with, draw_batch
from rats_video.training.loop import train_loop
from rats_video.training.metrics import read_metrics
from rats_video.training.run_folder import RunFolder
from rats_video.training.update import accumulate_gradient
from rats_video.types import PromptBatch

MakeConfig = Callable[..., DistillConfig]
MakeRats = Callable[..., tuple[Rats, DistillConfig]]


@pytest.fixture
def make_rats(loaded: WanBackbone, make_config: MakeConfig) -> MakeRats:
    def make(*overrides: str) -> tuple[Rats, DistillConfig]:
        cfg = make_config("training.batch_size=4", *overrides)
        rats = build_rats(cfg, *build_roles(cfg, loaded.with_own_denoiser()))
        assert isinstance(rats, Rats)
        return rats, cfg

    return make


def asked_of(cfg: DistillConfig, backbone: WanBackbone, prompts: tuple[str, ...], steps: int) -> list[tuple[bool, ...]]:
    batches = [draw_batch(backbone, cfg, prompts, step) for step in range(steps)]
    assert all(batch.asked is not None for batch in batches)
    return [batch.asked or () for batch in batches]


@pytest.mark.parametrize("share", [0.25, 0.3, 0.75])
@pytest.mark.parametrize("seed", [0, 1])
def test_any_stretch_of_the_run_asks_its_share_to_one(
    loaded: WanBackbone, make_config: MakeConfig, captions: tuple[str, ...], share: float, seed: int
) -> None:
    cfg = make_config("training.batch_size=4", f"teacher.asked={share}", f"seed={seed}")
    flat = [asked for update in asked_of(cfg, loaded, captions, 25) for asked in update]
    for first in range(0, 90, 7):
        for last in range(first + 1, 101, 9):
            assert abs(sum(flat[first:last]) - share * (last - first)) <= 1


def test_each_clip_is_asked_about_with_the_same_probability(
    loaded: WanBackbone, make_config: MakeConfig, captions: tuple[str, ...]
) -> None:
    cfg = make_config("training.batch_size=4", "teacher.asked=0.3")
    drawn = [asked_of(cfg.model_copy(update={"seed": seed}), loaded, captions, 2) for seed in range(300)]
    shares = torch.tensor(drawn, dtype=torch.float32).mean(dim=0)
    assert shares.shape == (2, 4)
    assert (shares - 0.3).abs().max() < 4 * (0.3 * 0.7 / 300) ** 0.5


def test_by_update_all_clips_or_none(loaded: WanBackbone, make_config: MakeConfig, captions: tuple[str, ...]) -> None:
    cfg = make_config("training.batch_size=4", "teacher.asked=0.25", "teacher.asked_by=update", "teacher.reuse=2")
    updates = asked_of(cfg, loaded, captions, 32)
    assert {len(set(update)) for update in updates} == {1}
    assert updates[0::2] == updates[1::2]  # both updates of a rollout
    assert sum(update[0] for update in updates) == 8


def gradient(rats: Rats, batch: PromptBatch, parts: int = 1) -> tuple[Tensor, LogRow]:
    rats.student.denoiser.zero_grad(set_to_none=True)
    row = accumulate_gradient(rats.step, batch, parts)
    return torch.cat(
        [weight.grad.flatten() for weight in rats.student.weights.values() if weight.grad is not None]
    ), row


def ask(batch: PromptBatch, *rows: int, share: float = 1.0) -> PromptBatch:
    return replace(batch, asked=tuple(row in rows for row in range(len(batch.prompts))), asked_share=share)


@pytest.mark.parametrize("level", ["frame", "clip"])
def test_the_mean_over_all_draws_is_the_published_gradient(
    make_rats: MakeRats, captions: tuple[str, ...], level: str
) -> None:
    """Systematic sampling at 1/4 of four clips has four equally likely draws: each asks about one clip."""
    rats, cfg = make_rats(f"method.gate.level={level}")
    batch = draw_batch(rats.student, cfg, captions, 0)
    whole, row = gradient(rats, batch)
    rarely, _ = make_rats(f"method.gate.level={level}", "teacher.asked=0.25")
    draws = [
        gradient(rarely, replace(ask(batch, clip, share=0.25), index=clip)) for clip in range(4)
    ]  # each a rollout of its own
    mean = torch.stack([found for found, _ in draws]).mean(dim=0)
    assert float((mean - whole).norm() / whole.norm()) < 1e-5
    assert min(float((found - whole).norm() / whole.norm()) for found, _ in draws) > 1e-3  # no draw is the whole
    for name in ("loss", "reward/student"):
        assert sum(each[name] for _, each in draws) / 4 == pytest.approx(row[name], rel=1e-5)
    for name in ("reward/teacher", "reward/gap", "gate/weight", "shaping/0.000"):
        assert sum(each[name] for _, each in draws) == pytest.approx(row[name], rel=1e-5)


def test_all_asked_is_bit_equal_to_the_published_loss(make_rats: MakeRats, captions: tuple[str, ...]) -> None:
    rats, cfg = make_rats()
    batch = draw_batch(rats.student, cfg, captions, 0)
    assert batch.asked is None
    assert torch.equal(gradient(rats, batch)[0], gradient(rats, ask(batch, 0, 1, 2, 3))[0])


def test_nobody_asked_is_reward_alone_and_costs_no_teacher_call(
    make_rats: MakeRats, captions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rats, cfg = make_rats("teacher.asked=0.25")
    alone, _ = make_rats("method.alpha=0")
    batch = draw_batch(rats.student, cfg, captions, 0)
    expected, _ = gradient(alone, replace(batch, asked=None))
    monkeypatch.setattr(rats.teacher, "rollout", lambda _: pytest.fail("the teacher was called"))
    found, row = gradient(rats, ask(batch))
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert row["teacher/asked"] == row["gate/weight"] == 0


def test_micro_batches_add_up(make_rats: MakeRats, captions: tuple[str, ...]) -> None:
    rats, cfg = make_rats("teacher.asked=0.5")
    batch = ask(draw_batch(rats.student, cfg, captions, 0), 0, 1)  # the second half asks about none
    (whole, row), (halves, parts) = gradient(rats, batch), gradient(rats, batch, 2)
    assert float((halves - whole).norm() / whole.norm()) < 1e-5
    assert parts == pytest.approx(row, rel=1e-4, abs=1e-6)


def test_the_log_has_means_over_the_clips_asked_about(
    make_rats: MakeRats, captions: tuple[str, ...], tmp_path: Path
) -> None:
    runs = {}
    for name, options in {"all": (), "rarely": ("teacher.asked=0.25", "teacher.asked_by=update")}.items():
        rats, cfg = make_rats("training.steps=4", "training.optimizer.lr=1e-12", *options)
        (tmp_path / name).mkdir()
        train_loop(rats, cfg, captions, RunFolder(tmp_path / name))
        runs[name] = read_metrics(tmp_path / name / "metrics.jsonl")
        for row in runs[name]:  # what was really called
            assert row["evaluations"] == cfg.evaluations(4, asked=row.get("teacher/asked", 1.0))
        assert sum(row["evaluations"] for row in runs[name]) == pytest.approx(4 * cfg.evaluations(4))
    asked = [row for row in runs["rarely"] if row["teacher/asked"]]
    assert len(asked) == 1  # of four updates
    [whole] = [row for row in runs["all"] if row["step"] == asked[0]["step"]]
    for name in ("reward/teacher", "reward/student", "reward/gap", "gate/weight", "shaping/0.000"):
        assert asked[0][name] == pytest.approx(whole[name], rel=1e-4), name
    for row in runs["rarely"]:
        assert row["teacher/asked"] in {0, 1}
        assert ("reward/teacher" in row) == ("gate/weight" in row) == (row["teacher/asked"] == 1)


def test_what_is_counted(make_config: MakeConfig) -> None:
    often, rarely = make_config("training.batch_size=4"), make_config("training.batch_size=4", "teacher.asked=0.25")
    teacher = 4 * often.teacher.num_steps * often.teacher.calls_per_step / often.teacher.reuse
    assert often.evaluations(4) - rarely.evaluations(4) == pytest.approx(0.75 * teacher)


FOLLOWS = ("teacher.asked=0.5", "teacher.asked_follows=gate")


def test_the_share_falls_with_the_average_gate(make_rats: MakeRats, captions: tuple[str, ...]) -> None:
    rats, cfg = make_rats(*FOLLOWS, "teacher.asked_least=0.4", "teacher.reuse=2")
    share = AskedShare(cfg, {})
    batches = [draw_batch(rats.student, cfg, captions, step) for step in range(8)]
    assert share.draw(batches[0]).asked_share == 0.5  # before anything is known
    share.learned({GATE: 0.2}, batches[0])
    assert share.draw(batches[1]).asked == share.draw(batches[0]).asked  # the same batch: its rollouts are kept
    share.learned({}, batches[0])  # nobody was asked
    assert share.draw(batches[2]).asked_share == pytest.approx(0.5 * (0.9 + 0.1 * 0.2))
    assert AskedShare(cfg, share.state).draw(batches[4]).asked_share == pytest.approx(0.5 * 0.92)
    for _ in range(10):
        share.learned({GATE: 0.0}, batches[0])
    assert share.draw(batches[6]).asked_share == 0.4
    assert AskedShare(cfg.model_copy(update={"teacher": FrozenTeacherConfig(kind="frozen")}), {}).state == {}


@pytest.mark.parametrize("by", ["clip", "update"])
def test_given_the_share_the_mean_over_all_draws_is_the_published_gradient(
    make_rats: MakeRats, captions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """A quarter of four clips, or of the updates, has four equally likely draws."""
    published, cfg = make_rats()
    batch = draw_batch(published.student, cfg, captions, 0)
    whole, _ = gradient(published, batch)
    rats, cfg = make_rats(*FOLLOWS, f"teacher.asked_by={by}")
    draws = []
    for place in range(4):
        monkeypatch.setattr("rats_video.training.batches._uniform", lambda *_, start=place / 4: start)
        draws.append(ask_with(replace(batch, index=place), cfg, 0.25))
    assert [sum(column) for column in zip(*(draw.asked or () for draw in draws), strict=True)] == [1, 1, 1, 1]
    mean = torch.stack([gradient(rats, draw)[0] for draw in draws]).mean(dim=0)
    assert float((mean - whole).norm() / whole.norm()) < 1e-5


def test_a_resumed_run_asks_as_one_that_never_stopped(
    make_rats: MakeRats, captions: tuple[str, ...], tmp_path: Path
) -> None:
    rows = {}
    for name, stops in {"whole": (6,), "resumed": (3, 6)}.items():
        (tmp_path / name).mkdir()
        for steps in stops:
            rats, cfg = make_rats(*FOLLOWS, f"training.steps={steps}", "training.checkpoint_every=3")
            train_loop(rats, cfg, captions, RunFolder(tmp_path / name))
        rows[name] = [{**row, "seconds": 0} for row in read_metrics(tmp_path / name / "metrics.jsonl")]
    assert rows["resumed"] == rows["whole"]
    assert {row["teacher/asked"] for row in rows["whole"]} == {0.5, 0.25}  # as the gate lets go


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.asked=0"], "teacher.asked: must be"),
        (["teacher.asked=1.5"], "teacher.asked: must be at most 1"),
        (
            ["teacher.asked=0.5", "method.reward_margin=1"],
            "method.reward_margin of rats needs the teacher",
        ),
        (["teacher.asked=0.5", "parallel.shard=true"], "set teacher.asked_by=update"),
        (["teacher.asked_follows=gate", "method={kind: refl}"], "refl has no gate to follow"),
        (["teacher.asked=0.01", "teacher.asked_follows=gate"], "teacher.asked_least is above teacher.asked"),
    ],
)
def test_what_would_be_wrong_is_refused(make_config: MakeConfig, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        make_config(*overrides)
