"""The guard: which student is best, when it raises the alarm, what it does then, and what it knows when resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rats_video.backbones.wan import WanBackbone
from rats_video.evaluation.guard_plot import plot_guard
from rats_video.inference.sampler import SamplerSpec
from rats_video.runtime import ALONE
from rats_video.training.anchor import InitialWeights
from rats_video.training.checkpoint import find_damage, list_checkpoints, save_weights, steps_done
from rats_video.training.guard import Guard, GuardClips, GuardConfig, finite_mean
from rats_video.training.run_folder import RunFolder
from rats_video.types import ClipSpec

SEEN = [{"reward": 0.1, "heldout_reward": 0.1}, {"reward": 0.3, "heldout_reward": 0.6},
        {"reward": 0.9, "heldout_reward": 0.2}, {"reward": 0.2, "heldout_reward": 0.9}]  # fmt: skip
PROMPTS = [f"prompt {i}" for i in range(6)]
TEACHER = {"reward": 0.5, "heldout_reward": 0.5, "dynamic_degree": 1.0, "saturation": 0.5}
NOISE = torch.tensor([-0.03, 0.01, 0.02, -0.01, 0.03, -0.02])


class Script:
    """Measures that echo, look after look, what a test wants them to: the teacher first, then the student."""

    def __init__(self, teacher: dict[str, float], looks: Sequence[dict[str, float]]) -> None:
        self.looks, self.calls = [TEACHER | teacher, *looks], 0

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        assert (len(videos), list(prompts)) == (6, PROMPTS)
        said = self.looks[self.calls]
        self.calls += 1
        # A little different for each clip and each look, as real scores are.
        return {name: value + NOISE.roll(self.calls) for name, value in (TEACHER | said).items()}


@pytest.fixture
def watch(backbone: WanBackbone, clip: ClipSpec, tmp_path: Path) -> Callable[..., Guard]:
    """A guard that has looked at a student of step 0, 10, 20 ... with the scores given."""
    run = RunFolder(tmp_path / "run")
    rats: Any = SimpleNamespace(student=backbone, teacher=SimpleNamespace(backbone=backbone))

    def call(*looks: dict[str, float], teacher: dict[str, float] | None = None, **options: Any) -> Guard:
        spec = SamplerSpec(1, 3.0)
        clips = GuardClips(PROMPTS, clip, spec, spec, [Script(teacher or {}, looks)], seed=3, batch_size=6)
        guard = Guard(GuardConfig(every=10, **options), clips, run)
        for index in range(len(looks)):
            guard.evaluate(rats, 10 * index, drift=0.1 * index)
        return guard

    return call


def scores(reward: float, heldout: float, **others: float) -> dict[str, float]:
    return {"reward": reward, "heldout_reward": heldout, **others}


def best_step(guard: Guard) -> int:
    assert guard.best is not None
    return guard.best.step


def test_best_is_by_the_heldout_reward_not_by_the_trained_one(watch: Callable[..., Guard]) -> None:
    guard = watch(scores(0.1, 0.1), scores(0.3, 0.6), scores(0.9, 0.4))
    assert best_step(guard) == 10
    assert finite_mean(guard.evaluations[1].scores["heldout_reward"]) == pytest.approx(0.6, abs=1e-6)


@pytest.mark.parametrize("broken", [{"dynamic_degree": 0.6}, {"saturation": 0.7}])
def test_student_that_froze_or_oversaturates_is_never_best(
    watch: Callable[..., Guard], broken: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    guard = watch(scores(0.1, 0.1), scores(0.3, 0.3), scores(0.9, 0.9, **broken))
    assert best_step(guard) == 10
    (alarm,) = guard.evaluations[2].alarms
    assert "the teacher's" in alarm
    err = capsys.readouterr().err
    assert (
        f"warning: guard: reward hacking? {alarm}; the best student so far is kept in {guard._run.best_student(10)}"
        in err
    )
    assert (
        len(
            watch(scores(0.1, 0.1), scores(0.9, 0.9, **broken), motion_loss=0.5, saturation_gain=0.5)
            .evaluations[1]
            .alarms
        )
        == 0
    )


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"loudness": -12.0}, "loudness is -12, the teacher's -20"),
        ({"loudness": -31.0}, "loudness is -31, the teacher's -20"),
        ({"silence": 0.6}, "silence is 0.6, the teacher's 0.1"),
        ({"clipped_sound": 0.04}, "clipped sound is 0.04, the teacher's 0.002"),
    ],
)
def test_student_that_goes_silent_or_clips_or_shouts_is_never_best(
    watch: Callable[..., Guard], broken: dict[str, float], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = {"loudness": -20.0, "silence": 0.1, "clipped_sound": 0.002}
    like = {"loudness": -17.0, "silence": 0.2, "clipped_sound": 0.005}
    guard = watch(
        scores(0.1, 0.1, **sound), scores(0.3, 0.3, **like), scores(0.9, 0.9, **sound | broken), teacher=sound
    )
    assert best_step(guard) == 10
    (alarm,) = guard.evaluations[2].alarms
    assert alarm.startswith(said[:-5])
    shown = capsys.readouterr().err
    assert "loudness -17 (-20), clipped sound 0.005 (0.002), silence 0.2 (0.1)" in shown


def test_monitor_that_was_broken_at_the_start_raises_no_alarm_but_is_not_best(watch: Callable[..., Guard]) -> None:
    guard = watch(*(scores(0.1 * i, 0.1 * i, dynamic_degree=0.2) for i in range(3)))
    assert [look.alarms for look in guard.evaluations] == [(), (), ()]
    assert guard.best is None


def test_alarm_wants_a_clear_rise_and_a_clear_fall(watch: Callable[..., Guard]) -> None:
    def alarms(*change: float) -> int:
        return len(watch(scores(0.3, 0.6), scores(0.3 + change[0], 0.6 + change[1])).evaluations[1].alarms)

    assert alarms(0.3, -0.3) == 1
    assert alarms(0.3, 0.0) == 0  # within the noise of six clips
    assert alarms(0.0, -0.3) == 0  # both fell, or one did: bad luck or a bad rate, not hacking
    assert alarms(-0.3, -0.3) == 0


def test_part_of_the_heldout_reward_may_fall_while_the_whole_rises(watch: Callable[..., Guard]) -> None:
    part = "heldout_reward/motion"
    start = {part: 0.5, **scores(0.1, 0.1)}
    guard = watch(start, {part: 0.2, **scores(0.5, 0.3)}, teacher={part: 0.5})
    (alarm,) = guard.evaluations[1].alarms
    assert "the heldout reward/motion fell by 0.3" in alarm
    assert best_step(guard) == 10


def test_reward_of_latents_that_rises_while_the_imitated_one_falls_is_an_alarm(watch: Callable[..., Guard]) -> None:
    looks = ({"imitated_reward": 0.5, **scores(0.1, 0.1)}, {"imitated_reward": 0.2, **scores(0.5, 0.1)})
    (alarm,) = watch(*looks, teacher={"imitated_reward": 0.5}).evaluations[1].alarms
    assert "the reward rose by 0.4" in alarm
    assert "the imitated reward fell by 0.3" in alarm


def test_without_a_heldout_reward_the_imitated_one_chooses(
    backbone: WanBackbone, clip: ClipSpec, tmp_path: Path
) -> None:
    looks = iter([(0.5, 0.5), (0.1, 0.1), (0.2, 0.6), (0.9, 0.4)])

    def measure(videos: Tensor, _: Sequence[str]) -> dict[str, Tensor]:
        said = dict(zip(("reward", "imitated_reward"), next(looks), strict=True))
        return {name: torch.full((len(videos),), value) for name, value in said.items()}

    spec = SamplerSpec(1, 3.0)
    guard = Guard(GuardConfig(), GuardClips(PROMPTS, clip, spec, spec, [measure], 0, 6), RunFolder(tmp_path))
    rats: Any = SimpleNamespace(student=backbone, teacher=SimpleNamespace(backbone=backbone))
    for step in (0, 1, 2):
        guard.evaluate(rats, step, 0.0)
    assert best_step(guard) == 1


def test_without_a_heldout_reward_the_trained_one_chooses_and_monitors_still_watch(
    backbone: WanBackbone, clip: ClipSpec, tmp_path: Path
) -> None:
    looks = iter([TEACHER, scores(0.1, 0), scores(0.4, 0), scores(0.9, 0, dynamic_degree=0.1)])

    def measure(videos: Tensor, _: Sequence[str]) -> dict[str, Tensor]:
        said = TEACHER | next(looks)
        return {name: torch.full((len(videos),), value) for name, value in said.items() if name != "heldout_reward"}

    spec = SamplerSpec(1, 3.0)
    guard = Guard(GuardConfig(), GuardClips(PROMPTS, clip, spec, spec, [measure], 0, 6), RunFolder(tmp_path))
    rats: Any = SimpleNamespace(student=backbone, teacher=SimpleNamespace(backbone=backbone))
    for step in (0, 1, 2):
        guard.evaluate(rats, step, 0.0)
    assert best_step(guard) == 1
    assert len(guard.evaluations[2].alarms) == 1


def test_scores_that_are_not_numbers_are_left_out(watch: Callable[..., Guard]) -> None:
    assert finite_mean([1.0, float("nan"), 3.0]) == 2.0
    guard = watch(scores(0.1, 0.1), scores(0.5, float("nan")))
    assert best_step(guard) == 0
    assert guard.evaluations[1].alarms == ()


def test_alarm_may_stop_the_run_or_strengthen_shaping(watch: Callable[..., Guard]) -> None:
    hacked = [scores(0.1, 0.6), *(scores(0.2 * i, 0.6 - 0.2 * i) for i in range(1, 6))]
    assert [watch(*hacked[:n]).stops for n in (1, 2)] == [False, False]
    assert [watch(*hacked[:n], on_alarm="stop").stops for n in (1, 2)] == [False, True]
    assert [watch(*hacked[:n], on_alarm="shape").shaping for n in (1, 2, 3, 6)] == [1, 2, 4, 8]
    assert watch(*hacked).shaping == 1


def test_kept_student_is_that_of_the_best_look(
    watch: Callable[..., Guard], backbone: WanBackbone, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    guard = watch(scores(0.1, 0.3))
    before = {name: weight.detach().clone() for name, weight in backbone.weights.items()}
    rats: Any = SimpleNamespace(student=backbone, teacher=SimpleNamespace(backbone=backbone))
    guard._clips.measures[0].looks += [scores(0.9, 0.1)]  # type: ignore[attr-defined]
    with torch.no_grad():
        next(iter(backbone.weights.values())).add_(1)
    guard.evaluate(rats, 10, 0.0)
    (folder,) = (tmp_path / "run" / "best").iterdir()
    kept = load_file(folder / "student.safetensors")
    assert all(torch.equal(kept[name], weight) for name, weight in before.items())
    assert folder.name == "step-000000"
    assert find_damage(folder) is None


def test_resumed_guard_knows_what_was_seen_until_its_checkpoint(watch: Callable[..., Guard]) -> None:
    guard = watch(*SEEN[:3])
    record = json.loads(json.dumps(guard.record))  # as it lies in a checkpoint
    watch(*SEEN)  # and what came after it
    again = Guard(guard.cfg, guard._clips, guard._run)
    again.load_state(record)
    assert again.evaluations == guard.evaluations
    assert again.best == guard.evaluations[1]
    assert json.loads(guard._run.guard.read_text()) == record
    assert not again.is_due(20, last=35)
    assert [step for step in range(21, 36) if again.is_due(step, last=35)] == [30, 35]


def kept_steps(guard: Guard) -> list[int]:
    return [steps_done(path) for path in list_checkpoints(guard._run.best)]


def test_best_students_of_all_checkpoints_are_kept(watch: Callable[..., Guard], tmp_path: Path) -> None:
    rising = [scores(0.1 * i, 0.1 * i) for i in range(1, 5)]
    assert kept_steps(watch(*rising[:3])) == [0, 10, 20]  # no checkpoint yet: all may be needed
    for step in (10, 20):
        save_weights(tmp_path / "run" / "checkpoints", step, {"a": torch.ones(1)})
    assert kept_steps(watch(*rising)) == [10, 20, 30]


def test_lost_best_student_is_not_chosen_and_looked_at_anew(
    watch: Callable[..., Guard], capsys: pytest.CaptureFixture[str]
) -> None:
    guard = watch(*SEEN)
    assert best_step(guard) == 30
    weights = guard._run.best_student(30) / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"dust")
    again = Guard(guard.cfg, guard._clips, guard._run)
    again.load_state(guard.record)
    assert best_step(again) == 10
    assert f"{weights.parent}: the best student so far is lost: student.safetensors is not" in capsys.readouterr().err
    assert [look.alarms for look in again.evaluations] == [look.alarms for look in guard.evaluations]
    assert again.is_due(30, last=30)
    shutil.rmtree(guard._run.best)
    again.load_state(guard.record)
    assert again.best is None


def test_figure_marks_the_student_that_was_kept(watch: Callable[..., Guard], tmp_path: Path) -> None:
    guard = watch(scores(0.1, 0.1), scores(0.3, 0.6), scores(0.9, 0.2))
    record = json.loads(guard._run.guard.read_text())
    assert record["best"] == 10
    assert [look["step"] for look in record["looks"]] == [0, 10, 20]
    assert len(record["looks"][2]["alarms"]) == 1
    plot_guard(record, tmp_path / "guard.png")
    assert (tmp_path / "guard.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------------ the anchor


def test_drift_is_relative_to_the_norm_at_the_start() -> None:
    weights = {"a": torch.nn.Parameter(torch.tensor([3.0, 0.0])), "b": torch.nn.Parameter(torch.tensor([4.0]))}
    anchor = InitialWeights(weights)
    assert anchor.drift(ALONE) == 0
    with torch.no_grad():
        weights["a"][1] += 1.0
    assert anchor.drift(ALONE) == pytest.approx(1 / 5)


def test_pull_is_the_gradient_of_the_squared_distance() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    anchor = InitialWeights({"w": weight})
    with torch.no_grad():
        weight += torch.tensor([0.5, -1.0])
    weight.grad = torch.tensor([10.0, 10.0])
    anchor.add_drift_gradient(0.2)
    torch.testing.assert_close(weight.grad, torch.tensor([10.1, 9.8]))
