"""Every file of a run, named once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rats_video.errors import UserError
from rats_video.files import strays


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
        return self.root / "config.resolved.yaml"

    @property
    def environment(self) -> Path:
        """Versions and hardware."""
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
    def guard(self) -> Path:
        """What the guard has seen."""
        return self.root / "guard.json"

    @property
    def guard_figure(self) -> Path:
        """The same, drawn."""
        return self.root / "guard.png"

    @property
    def best(self) -> Path:
        """The weights of the best student that the guard has seen."""
        return self.root / "best"

    @property
    def student(self) -> Path:
        """The finished student."""
        return self.root / "student"

    @property
    def curves(self) -> Path:
        """The training figure."""
        return self.root / "training.png"

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
