"""The time left of work whose pieces take unequal time."""

from __future__ import annotations

import pytest

from rats_video import progress
from rats_video.progress import ClipBar, Pace, ProgressBar, followed_by


class Clock:
    """A time of our own; `sleep` makes it pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_equal_steps(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("work", 4, start=1) as bar:
        clock.sleep(40)
        bar.advance(loss=0.25)
    assert capsys.readouterr().err == "work 2/4  left 1:20  loss 0.25\n"


def test_left_in_all_is_told_once_the_rest_is_known(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    rest: list[float | None] = [None]
    with followed_by(lambda: rest[0]), followed_by(lambda: 5.0), ProgressBar("work", 3) as bar:
        clock.sleep(20)
        bar.advance()
        rest[0] = 75.0
        clock.sleep(20)
        bar.advance()
    with ProgressBar("work", 2) as bar:
        clock.sleep(20)
        bar.advance()
    assert capsys.readouterr().err.splitlines() == [
        "work 1/3  left 0:40 of this stage", "work 2/3  left 0:20, 1:40 in all", "work 1/2  left 0:20"
    ]  # fmt: skip


def test_decoding_counts_where_calls_are_few(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Two clips of 100 calls a second each ten calls, eight seconds beside them; then eighteen clips of 4 calls."""
    pace = Pace()
    with ClipBar("evaluate", 2 * 100 + 18 * 4, 20, pace) as bar:
        clock.sleep(2 * (10 + 8))
        bar.made(200, 2, 20.0)
    assert capsys.readouterr().err == "evaluate 2/20  left 2:31  \n".replace("  \n", "\n")  # 7.2 s in calls, 144 beside
    assert pace.seconds(100, 1) == pytest.approx(18)
    assert pace.seconds(0, 0) == 0


def test_a_pace_goes_on_from_one_bar_to_the_next(clock: Clock) -> None:
    pace = Pace()
    for seconds in (10, 30):
        with ClipBar("work", 4, 1, pace) as bar:
            clock.sleep(seconds)
            bar.made(4, 1, 4.0)
    assert pace.seconds(8, 1) == pytest.approx(8 + (6 + 26) / 2)
