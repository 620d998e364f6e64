"""Every file of a run, named once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rats_video.errors import UserError
from rats_video.files import tidy
from rats_video.reading import read_json, strays

CONFIG = "config.resolved.yaml"


def read_sessions(path: Path) -> list[dict[str, Any]]:
    """Sessions of a run and what each computed with, the newest last; a run of before has one object, not in a list.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    found = read_json(path) if path.is_file() else []
    sessions = found if isinstance(found, list) else [found]
    if not all(isinstance(session, dict) for session in sessions):
        raise ValueError("no JSON object")
    return sessions


class RunFolder:
    """The files of a distillation and of what follows it.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / CONFIG  # with all defaults filled in; a folder with it is a run
        self.environment = root / "environment.json"  # code, versions, command, seeds, hardware: one entry a start
        self.text = root / "text.safetensors"  # encoded prompts, where `compute.cache_text` is on
        self.plan = root / "plan.json"  # what the run was expected to need, and what its first steps did
        self.metrics = root / "metrics.jsonl"  # one JSON row a step
        self.checkpoints = root / "checkpoints"  # one folder each
        self.milestones = root / "milestones"  # snapshots of the student, for the curves of `compare`
        self.guard = root / "guard.json"  # the guard's evaluations
        self.guard_figure = root / "guard.png"  # the same, drawn
        self.best = root / "best"  # the best students that the guard has seen, one folder each
        self.student = root / "student"  # the finished student
        self.curves = root / "training.png"
        self.validation = root / "validation"  # the student's clips while it trained, one folder an evaluation
        self.tracking = root / "tracking.json"  # by which names the trackers know the run
        self.tensorboard = root / "tensorboard"  # its event files
        self.samples = root / "samples"  # the student's clips
        self.comparison = root / "comparison"  # teacher, base and student side by side
        self.evaluation = root / "evaluation"  # the table and the curve over NFE

    def milestone(self, step: int) -> Path:
        """The student after that many updates."""
        return self.milestones / f"step-{step:06d}"

    def best_student(self, step: int) -> Path:
        """The weights of the student after `step` steps, where it was the best until then."""
        return self.best / f"step-{step:06d}"

    def check_entries(self) -> None:
        """Refuse a folder in which a write would end elsewhere, or a read never; a stranger may have made it.

        Raises:
            UserError: names the first link that leads out of it, pipe or device in it.
        """
        if odd := strays(self.root):
            raise UserError(
                "leads out of the run's folder, or is no plain file", where=str(odd[0]),
                fix="remove it, or put in its place what it points to",
            )  # fmt: skip

    def tidy(self) -> None:
        """Undo what a killed training left half-written; only for the holder of the folder's lock."""
        files = (self.config, self.environment, self.text, self.plan, self.metrics, self.guard, self.guard_figure)
        tidy(self.root, {path.name for path in (*files, self.tracking, self.student, self.curves)})
        tidy(self.checkpoints)
        tidy(self.milestones)
        tidy(self.best)
        tidy(self.validation)
