"""Every file of a run, named once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rats_video.errors import UserError
from rats_video.files import tidy
from rats_video.reading import read_json, strays

CONFIG = "config.resolved.yaml"


def read_sessions(path: Path) -> list[dict[str, Any]]:
    """What a run computed with, an object a session, the newest last; a run of before has one object, not in a list.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    found = read_json(path) if path.is_file() else []
    sessions = found if isinstance(found, list) else [found]
    if not all(isinstance(session, dict) for session in sessions):
        raise ValueError("no JSON object")
    return sessions


@dataclass(frozen=True)
class RunFolder:
    """Where a distillation and what follows it keep their files."""

    root: Path

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

    @property
    def config(self) -> Path:
        """The configuration with all defaults filled in; a folder with it is a run."""
        return self.root / CONFIG

    @property
    def environment(self) -> Path:
        """Code, versions, command, seeds and hardware: a list, one entry for each time the run was started."""
        return self.root / "environment.json"

    @property
    def text(self) -> Path:
        """Encoded prompts, where `compute.cache_text` is on."""
        return self.root / "text.safetensors"

    @property
    def plan(self) -> Path:
        """What the run was expected to need, and what its first steps did."""
        return self.root / "plan.json"

    @property
    def metrics(self) -> Path:
        """One JSON row a step."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.root / "checkpoints"

    @property
    def milestones(self) -> Path:
        """Weights of the student on its way, one folder each: what `compare` draws its curves from."""
        return self.root / "milestones"

    def milestone(self, step: int) -> Path:
        """The student after that many updates."""
        return self.milestones / f"step-{step:06d}"

    @property
    def guard(self) -> Path:
        """What the guard has seen."""
        return self.root / "guard.json"

    @property
    def guard_figure(self) -> Path:
        """The same, drawn."""
        return self.root / "guard.png"

    @property
    def best(self) -> Path:
        """The weights of the best students that the guard has seen, one folder each."""
        return self.root / "best"

    def best_student(self, step: int) -> Path:
        """The weights of the student after `step` steps, where it was the best until then."""
        return self.best / f"step-{step:06d}"

    @property
    def student(self) -> Path:
        """The finished student."""
        return self.root / "student"

    @property
    def curves(self) -> Path:
        """The training figure."""
        return self.root / "training.png"

    @property
    def validation(self) -> Path:
        """The student's clips while it trained, one folder a look."""
        return self.root / "validation"

    @property
    def tracking(self) -> Path:
        """By which names the trackers know the run."""
        return self.root / "tracking.json"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.root / "tensorboard"

    def tidy(self) -> None:
        """Undo what a killed training left half-written; for who holds the folder's lock."""
        files = (self.config, self.environment, self.text, self.plan, self.metrics, self.guard, self.guard_figure)
        tidy(self.root, {path.name for path in (*files, self.tracking, self.student, self.curves)})
        tidy(self.checkpoints)
        tidy(self.best)
        tidy(self.validation)

    @property
    def samples(self) -> Path:
        """The student's clips."""
        return self.root / "samples"

    @property
    def comparison(self) -> Path:
        """Teacher, base and student side by side."""
        return self.root / "comparison"

    @property
    def evaluation(self) -> Path:
        """The table and the curve over NFE."""
        return self.root / "evaluation"
