"""What runs inside or after a run and fails: the user's reward, the encoder, a disk under the clips."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_runs import assert_refused, assert_same_run, checkpoints, fill

from rats_video.inference import video
from rats_video.inference.video import read_mp4

Command = Callable[..., Any]

REWARD = """
from pathlib import Path
def score(videos, prompts):
    if Path({mark!r}).exists():
        Path({mark!r}).unlink()
        raise ZeroDivisionError("my bug")
    return videos.mean(dim=(1, 2, 3, 4))
"""


def test_reward_that_raises_amid_a_run(distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "reward_that_raises.py").write_text(REWARD.format(mark=str(mark)))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    options = (
        "reward={kind: custom, target: 'reward_that_raises:score'}", "training.steps=3", "training.checkpoint_every=1",
    )  # fmt: skip
    from rats_video.training import update

    step = update.Updater.step

    def marked(*arguments: Any) -> Any:
        if arguments[3] == 2:
            mark.touch()
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("rats_video.training.update.Updater.step", marked)
        outcome = distill("run", *options)
    expected = "reward reward_that_raises:score: fails: ZeroDivisionError: my bug (reward_that_raises.py, line 6)"
    assert_refused(outcome, expected)
    assert checkpoints(tmp_path / "run") == ["step-000001", "step-000002"]
    assert distill("run", "--resume", *options).code == 0
    assert distill("whole", *options).code == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# ------------------------------------------------------------------------------------------------------------- clips


@pytest.fixture(scope="module")
def student(command: Command, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("faults") / "student"
    options = ("--output", output, "--set", "training.steps=1")
    assert command("distill", "--config", config_file, *options).code == 0
    return output


@pytest.fixture
def sample(command: Command, student: Path, captions: tuple[str, ...]) -> Command:
    """Three clips into a folder."""
    prompts = [part for prompt in captions[:3] for part in ("--prompt", prompt)]
    return lambda output: command("sample", "--model", student, "--output", output, *prompts)


def encoder_error() -> None:
    from av.error import ExternalError

    raise ExternalError(542398533, "Generic error in an external library", "avcodec_send_frame()")


def interrupt() -> None:
    raise KeyboardInterrupt


def half_way(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Something happens after two frames of the second clip."""
    images, clips = video._rgb_images, iter(range(9))

    def some(frames: Any) -> Iterator[Any]:
        is_second = next(clips) == 1
        for index, image in enumerate(images(frames)):
            if is_second and index == 2:
                act()
            yield image

    monkeypatch.setattr(video, "_rgb_images", some)


def whole_clips(folder: Path) -> list[str]:
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("manifest."))
    assert all(path.suffix == ".mp4" and len(read_mp4(path)[0]) == 5 for path in files)
    return [path.name[:3] for path in files]


def test_encoder_that_fails_half_way(sample: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        half_way(patch, encoder_error)
        outcome = sample(tmp_path / "clips")
    assert_refused(outcome, "cannot write the video: the encoder failed: ")
    assert "external library" in outcome.err
    assert whole_clips(tmp_path / "clips") == ["000"]
    with monkeypatch.context() as patch:
        half_way(patch, interrupt)
        outcome = sample(tmp_path / "clips")
    assert outcome.code == 130
    assert "the same command makes the rest" in outcome.err.splitlines()[-1]
    assert whole_clips(tmp_path / "clips") == ["000", "001"]
    assert sample(tmp_path / "clips").code == 0
    assert len(json.loads((tmp_path / "clips" / "manifest.json").read_text())) == 3


@pytest.mark.parametrize(
    ("clip", "what", "whole"),
    [(1, "cannot write the video: No space", ["000"]), (3, "cannot write the record: ", ["000", "001", "002"])],
    ids=["clip", "manifest"],
)
def test_full_disk_under_the_clips(
    sample: Command, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, clip: int, what: str,
    whole: list[str],
) -> None:  # fmt: skip
    disk, encode, written = small_disk(256), video._encode, []

    def filling(*arguments: Any, **options: Any) -> None:
        if len(written) == clip:
            fill(disk, 0)
        encode(*arguments, **options)
        written.append(arguments)
        if len(written) == clip == 3:
            fill(disk, 0)

    with monkeypatch.context() as patch:
        patch.setattr(video, "_encode", filling)
        assert_refused(sample(disk / "clips"), what)
    assert whole_clips(disk / "clips") == whole
    (disk / "ballast").unlink()
    assert sample(disk / "clips").code == 0
    assert len(json.loads((disk / "clips" / "manifest.json").read_text())) == 3
