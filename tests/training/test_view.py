"""What a terminal shows of a training, and where its time is said to go."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rats_video.distillation.settings import DistillConfig
from rats_video.progress import followed_by
from rats_video.timing import Stopwatch, phase
from rats_video.training.guard import Guard, GuardEvaluation
from rats_video.training.run_folder import RunFolder
from rats_video.training.view import BARS, TerminalView, sparkline

CPU = torch.device("cpu")
ROW = {"loss": 2.0, "reward/skipped": 1, "faults/skipped": 0, "faults/rollbacks": 0, "grad_norm": 0.5, "lr": 1e-3}
RATS = {"reward/student": 0.25, "reward/teacher": 0.5, "reward/gap": -0.25, "gate/weight": 0.75}
RIVAL = {"reward/student": 0.25, "fake_score/loss": 0.125}
Make = Callable[..., tuple[TerminalView, io.StringIO]]


@pytest.fixture
def make(make_config: Callable[..., DistillConfig], tmp_path: Path) -> Make:
    def call(
        width: int, *overrides: str, terminal: bool = True, guard: Guard | None = None
    ) -> tuple[TerminalView, io.StringIO]:
        written = io.StringIO()
        console = Console(file=written, width=width, height=30, force_terminal=terminal, color_system=None)
        return TerminalView(
            make_config("training.steps=20", *overrides), RunFolder(tmp_path), CPU, guard, console
        ), written

    return call


def shown(view: TerminalView, width: int) -> list[str]:
    console = Console(file=io.StringIO(), record=True, width=width, force_terminal=True, color_system=None)
    console.print(view)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [20, 60, 200])
@pytest.mark.parametrize("extra", [RATS, RIVAL], ids=["rats", "rival"])
def test_every_line_fits(
    make: Make, make_config: Callable[..., DistillConfig], tmp_path: Path, width: int, extra: dict[str, float]
) -> None:
    cfg = make_config("guard={every: 4}")
    assert cfg.guard is not None
    guard = Guard(cfg.guard, None, RunFolder(tmp_path))  # type: ignore[arg-type]  # samples nothing
    guard._teacher = {"reward": [0.5]}
    guard.evaluations = [GuardEvaluation(4, {"reward": [0.25]}, 0.01, alarms=("x" * 300,))]
    view, written = make(width, "validation={every: 6}", "guard={every: 4}", guard=guard)
    view.on_start({"step": 0})
    before = len(shown(view, width))
    for step in range(7):
        view.on_step(step + 1, ROW | extra)
    view.on_end()
    lines = shown(view, width)
    assert max(map(len, lines)) <= width
    assert before + sum(name in extra for name in ("gate/weight", "fake_score/loss")) == len(lines)
    drawn = written.getvalue()
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h") == 1  # the cursor is back
    assert drawn.endswith("\x1b[?25h")


def test_figures_are_the_runs(make: Make) -> None:
    view, _ = make(200, "validation={every: 6}", "training.checkpoint_every=5")
    view.on_start({"step": 0})
    for step in range(7):
        view.on_step(step + 1, ROW | RATS)
    view.on_step(8, {"faults/skipped": 1, "faults/rollbacks": 2})  # a step that was left out has nothing else
    view.on_end()
    lines = {line.split("  ")[0]: line for line in shown(view, 200)}
    assert "student 0.25  teacher 0.5  gap -0.25" in lines["reward"]
    assert "weight 0.75" in lines["gate"]
    assert "loss 2  gradient 0.5  rate 0.001" in lines["loss"]
    assert "8/20" in lines["distill"]
    assert lines["distill"].count("━") == round(30 * 8 / 20)
    assert "7 clips  1 steps  gone back 2x" in lines["left out"]
    assert "checkpoint at 10  clips at 12" in lines["next"]


def test_figures_are_smoothed_and_companions_are_shown(make: Make) -> None:
    view, _ = make(120)
    view.on_start({"step": 0})
    for step in range(15):
        view.on_step(step + 1, ROW | RIVAL | {"reward/student": float(step)})
    view.on_end()
    lines = {line.split("  ")[0]: line for line in shown(view, 120)}
    assert f"student {sum(range(5, 15)) / 10:.3g}" in lines["reward"]
    assert "loss 0.125" in lines["fake score"]
    assert "gate" not in lines


def test_run_that_goes_on_shows_its_past(make: Make, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 4, "reward/skipped": 2, "reward/student": 0.5}\n')
    view, _ = make(120)
    view.on_start({"step": 1})
    view.on_end()
    text = "\n".join(shown(view, 120))
    assert "loss 4" in text
    assert "2 clips" in text
    assert "1/20" in text
    assert "left ?" in text


def test_display_tells_what_is_left_in_all(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with followed_by(lambda: 90.0):
        view, _ = make(120)
    view._done, view._taken, now[0] = 2, 10.0, 10.0
    assert "left 1:30, 3:00 in all" in shown(view, 120)[0]  # 18 steps of 5 seconds


def test_log_file_gets_plain_lines(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    view, written = make(60, terminal=False)
    view.on_start({"step": 18})
    for step in (19, 20):
        view.on_step(step, ROW | RATS)
    view.on_end()
    assert written.getvalue() == ""
    assert capsys.readouterr().err == "distill 20/20  left 0:00  reward 0.25  teacher 0.5  gate 0.75  loss 2\n"


def test_sparkline_rises_from_the_lowest_to_the_highest() -> None:
    assert sparkline([float(value) for value in range(8)], 20) == BARS
    assert sparkline([0, 0, 7, 7], 2) == BARS[0] + BARS[-1]
    assert sparkline([3, 3], 9) == BARS[0] * 2
    assert sparkline([0, float("nan"), 1], 9) == f"{BARS[0]} {BARS[-1]}"
    assert sparkline([0, 1], 9, ascii_only=True) == "_#"
    assert sparkline([], 9) == ""


def test_inner_phase_is_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    stopwatch = Stopwatch(CPU)
    stopwatch.start()  # 0

    @phase("student")
    def forward() -> None:  # 1
        with phase("teacher"):  # 2
            pass  # 3

    forward()  # 4
    with pytest.raises(ValueError, match="x"), phase("backward"):  # 5
        raise ValueError("x")  # 6
    assert stopwatch.read() == {"rest": 1 + 1 + 1, "student": 1 + 1, "teacher": 1, "backward": 1}  # 7
    stopwatch.stop()
    forward()
    assert next(clock) == 8


class Event:
    """A CUDA event that the device has passed when `now` says so."""

    now, made = 0, 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.made += 1
        self.at = Event.made

    def query(self) -> bool:
        return self.at <= Event.now

    def elapsed_time(self, end: Event) -> float:
        assert end.query()
        return 1000.0 * (end.at - self.at)


def test_on_cuda_nobody_waits_for_what_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    stopwatch = Stopwatch(torch.device("cuda"))
    stopwatch.start()  # 1
    with phase("teacher"):  # 2
        pass  # 3
    Event.now = 2
    assert stopwatch.read() == {"rest": 1}  # 4
    Event.now = 5
    assert stopwatch.read() == {"rest": 1 + 1 + 1, "teacher": 1}  # 5
    stopwatch.stop()
