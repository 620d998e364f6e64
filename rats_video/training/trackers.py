"""TensorBoard, Weights & Biases and Trackio: they get a copy of the log; nothing depends on it."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rats_video.errors import UserError, first_line, warn
from rats_video.files import write_json
from rats_video.methods.base import LogRow
from rats_video.reading import read_json
from rats_video.training.callbacks import Callback
from rats_video.training.guard import Guard, GuardEvaluation
from rats_video.training.run_folder import RunFolder
from rats_video.training.settings import RunSettings, Tracker
from rats_video.training.validation import ValidationClips, ValidationEvaluation

NO_METRICS = {"step"}  # keys of a row that are not sent


class TrackerBackend(Protocol):
    """A tracker, opened for this run."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers of a step."""
        ...

    def show(self, evaluation: ValidationEvaluation) -> None:
        """Send clips, or pictures of them."""
        ...

    def end(self) -> None:
        """Flush and close."""
        ...


def check_trackers(trackers: Sequence[Tracker]) -> None:
    """Raise UserError if a tracker is not installed."""
    if not trackers:
        return
    from accelerate.utils import is_tensorboard_available, is_trackio_available, is_wandb_available

    is_there = {
        "tensorboard": is_tensorboard_available,
        "wandb": is_wandb_available,
        "trackio": is_trackio_available,
    }
    for name in trackers:
        if not is_there[name]():
            raise UserError(
                f"{name} is not installed", where="tracking.trackers", fix='pip install "rats-video[trackers]"'
            )


class Trackers(Callback):
    """Sends the log's rows, the guard's evaluations and the clips, from the main process.

    RUN/metrics.jsonl remains the reference. A tracker that fails causes one warning and is then dropped; the training
    continues.

    Args:
        cfg: the run's configuration, which is sent too.
        run: the folder of their files and of the run's identity with them: a resumed run keeps it.
        guard: its evaluations are sent.
        clips: they are sent.
    """

    def __init__(
        self, cfg: RunSettings, run: RunFolder, guard: Guard | None = None, clips: ValidationClips | None = None
    ) -> None:
        self._cfg, self._run, self._guard, self._clips = cfg, run, guard, clips
        self._services: dict[Tracker, TrackerBackend] = {}
        self._failed: set[Tracker] = set()
        self._sent: set[int] = set()  # steps of the guard's evaluations

    def on_start(self, state: Mapping[str, Any]) -> None:
        """Open the trackers at the step after a checkpoint."""
        self.on_end()
        self._sent = {row["step"] for row in state.get("guard", {}).get("looks", ())}
        for name in self._cfg.tracking.trackers:
            with self._tolerating(name):
                self._services[name] = open_tracker(name, self._cfg, self._run, state["step"])
        self.on_checkpoint()

    def on_step(self, step: int, row: LogRow) -> None:
        """Send the row if it is due, and new evaluations and clips."""
        if step % self._cfg.tracking.every == 0 or step == self._cfg.training.steps:
            self.log({name: value for name, value in row.items() if name not in NO_METRICS}, step)
        self.on_checkpoint()

    def on_checkpoint(self) -> None:
        """Send the guard's evaluations and the clips since the last call."""
        for evaluation in self._guard.evaluations if self._guard else ():
            if evaluation.step not in self._sent:
                self._sent.add(evaluation.step)
                self.log(_numbers(evaluation), evaluation.step)
        for clips in self._clips.news() if self._clips else ():
            self.log({f"validation/{name}": mean for name, mean in clips.means.items()}, clips.step)
            self._each(lambda service, clips=clips: service.show(clips))  # type: ignore[misc]

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers of a step to all trackers."""
        self._each(lambda service: service.log(values, step))

    def on_end(self) -> None:
        """Send the rest, and close the trackers."""
        self.on_checkpoint()
        self._each(lambda service: service.end())
        self._services.clear()

    def _each(self, do: Callable[[TrackerBackend], None]) -> None:
        for name, service in list(self._services.items()):
            with self._tolerating(name):
                do(service)

    def _tolerating(self, name: Tracker) -> _IgnoreTrackerErrors:
        return _IgnoreTrackerErrors(name, self._services)


class _IgnoreTrackerErrors(AbstractContextManager[None]):
    """Turns an error of a tracker into a warning, and drops the tracker."""

    def __init__(self, name: Tracker, services: dict[Tracker, TrackerBackend]) -> None:
        self._name, self._services = name, services

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self._services.pop(self._name, None)
        warn(
            f"{self._name} is told no more: {first_line(error)}; the training goes on, metrics.jsonl has everything",
            where="tracking",
        )
        return True


def _numbers(evaluation: GuardEvaluation) -> dict[str, float]:
    means = {f"guard/{name}": evaluation.mean(name) for name in evaluation.scores}
    return means | {"guard/drift": evaluation.drift, "guard/alarms": float(len(evaluation.alarms))}


# ---------------------------------------------------------------------------------------------------- the three of them


def open_tracker(name: Tracker, cfg: RunSettings, run: RunFolder, start: int) -> TrackerBackend:
    """Open a tracker through Accelerate for a run that continues after `start` steps."""
    from accelerate import PartialState

    PartialState(cpu=True)  # Accelerate's logging needs it; on a CPU it changes nothing
    tracking = cfg.tracking
    title, identity = tracking.name or run.root.resolve().name, _identity(run)
    match name:
        case "tensorboard":
            return TensorBoard(run, cfg, start)
        case "wandb":
            return WandB(run, cfg, title, identity)
        case "trackio":
            return Trackio(cfg, f"{title}-{identity}")


def _identity(run: RunFolder) -> str:
    """The id by which the services find a resumed run."""
    if not run.tracking.is_file():
        write_json(run.tracking, {"id": uuid.uuid4().hex[:8]})
    return str(read_json(run.tracking)["id"])


class TensorBoard:
    """Event files in RUN/tensorboard; events of steps that will be done again are hidden.

    Not by Accelerate's `store_init_configuration`, which makes a run of its own of every configuration. Clips are sent
    as contact sheets, since torch's `add_video` shows nothing without moviepy.
    """

    def __init__(self, run: RunFolder, cfg: RunSettings, start: int) -> None:
        import yaml
        from accelerate.tracking import TensorBoardTracker

        folder = run.tensorboard
        self._tracker = TensorBoardTracker(folder.name, folder.parent, purge_step=start + 1 if start else 0)
        self._tracker.main_process_only = False
        self._tracker.start()
        text = yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)
        self._tracker.log({"config": "\n".join(f"    {line}" for line in text.splitlines())}, step=start)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One scalar a name."""
        self._tracker.log(dict(values), step=step)

    def show(self, evaluation: ValidationEvaluation) -> None:
        """The contact sheet."""
        import numpy as np
        from PIL import Image

        with Image.open(evaluation.sheet) as sheet:
            self._tracker.log_images({"validation": np.asarray(sheet)[None]}, step=evaluation.step, dataformats="NHWC")

    def end(self) -> None:
        """Close the file."""
        self._tracker.finish()


class WandB:
    """A run of Weights & Biases, which is found again by its id; WANDB_MODE=offline keeps it on this machine.

    Its own steps only grow: what comes late, or again, would be dropped. Ours is a metric, and the axis of all others.
    """

    def __init__(self, run: RunFolder, cfg: RunSettings, title: str, identity: str) -> None:
        import wandb
        from accelerate.tracking import WandBTracker

        settings = wandb.Settings(console="off", disable_git=True, save_code=False)  # what is printed stays here
        self._tracker = WandBTracker(
            cfg.tracking.project, name=title, id=identity, resume="allow", dir=str(run.root), settings=settings
        )
        self._tracker.start()
        self._tracker.tracker.define_metric("step", hidden=True)
        self._tracker.tracker.define_metric("*", step_metric="step")
        self._tracker.store_init_configuration(cfg.model_dump(mode="json"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One row."""
        self._tracker.log({**values, "step": step})

    def show(self, evaluation: ValidationEvaluation) -> None:
        """The clips."""
        import wandb

        clips = _videos(evaluation, lambda path, prompt: wandb.Video(str(path), caption=prompt, format="mp4"))
        self._tracker.log({**clips, "step": evaluation.step})

    def end(self) -> None:
        """Send what is left."""
        self._tracker.finish()


class Trackio:
    """A run of Trackio, in TRACKIO_DIR on this machine unless its own variables name a Space; found again by its name.

    The configuration is given at the start: Accelerate's `store_init_configuration` would add a key of its own.
    """

    def __init__(self, cfg: RunSettings, name: str) -> None:
        from accelerate.tracking import TrackioTracker

        self._tracker = TrackioTracker(
            cfg.tracking.project, name=name, resume="allow", config=cfg.model_dump(mode="json"), embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        with redirect_stdout(sys.stderr):  # what a command prints is its result
            self._tracker.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One row."""
        self._tracker.log(dict(values), step=step)

    def show(self, evaluation: ValidationEvaluation) -> None:
        """The clips."""
        import trackio

        clips = _videos(evaluation, lambda path, prompt: trackio.Video(str(path), caption=prompt))
        self._tracker.log(clips, step=evaluation.step)

    def end(self) -> None:
        """Write what is left."""
        with redirect_stdout(sys.stderr):
            self._tracker.finish()


def _videos(evaluation: ValidationEvaluation, video: Callable[[Path, str], Any]) -> dict[str, Any]:
    folder = evaluation.sheet.parent
    return {
        f"validation/clip-{index:02d}": video(folder / clip["file"], clip["prompt"])
        for index, clip in enumerate(evaluation.clips)
        if clip["file"]
    }
